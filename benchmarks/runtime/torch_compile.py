"""Step time with `compile=True` and without, on one process.

    python -m benchmarks.runtime.torch_compile                 GPT-2 and Llama
    python -m benchmarks.runtime.torch_compile --model llama   one of them

The two take turns, a step each, so that whatever else the machine does falls on both alike. Seconds are medians. The
first step, in which torch.compile compiles, is told apart.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import autopart
from benchmarks.runtime.recompute import LENGTH, MODELS, SAMPLES, WORDS


class Measured(NamedTuple):
    """Seconds of the first step, median seconds of later ones, the loss of the last step."""

    first: float
    seconds: float
    loss: float


def compare(model: nn.Module, recompute: str, repeat: int) -> dict[bool, Measured]:
    """With torch.compile and without, in turns."""
    tokens = torch.randint(WORDS, (SAMPLES, LENGTH))
    batch = {"input_ids": tokens, "labels": tokens}
    programs, seconds, losses = {}, {False: list[float](), True: list[float]()}, {}
    for compile in (False, True):
        programs[compile] = autopart.compile(
            copy.deepcopy(model), "1:cpu", batch, recompute=recompute, micro_batch=SAMPLES, compile=compile
        )
        programs[compile].optimizer(torch.optim.SGD, lr=1e-3)
    for _ in range(repeat + 1):
        for compile, program in programs.items():
            start = time.perf_counter()
            losses[compile] = float(program.step(batch))
            seconds[compile].append(time.perf_counter() - start)
    return {
        compile: Measured(first, statistics.median(later), losses[compile])
        for compile, (first, *later) in seconds.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="one model (default: all)")
    parser.add_argument("--recompute", nargs="+", default=["none", "full"], help="checkpointing modes")
    parser.add_argument("--repeat", type=int, default=20, help="steps of each (default: 20)")
    asked = parser.parse_args()
    torch.manual_seed(0)
    table = Table("model", "recompute", "compile", "first step", "step", "ratio", "loss")
    for name in [asked.model] if asked.model else MODELS:
        for mode in asked.recompute:
            found = compare(MODELS[name](), mode, asked.repeat)
            for compile, row in found.items():
                table.add_row(
                    name, mode, str(compile), f"{row.first:.1f} s", f"{row.seconds * 1e3:.1f} ms",
                    f"{row.seconds / found[False].seconds:.2f}", f"{row.loss:.6f}",
                )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
