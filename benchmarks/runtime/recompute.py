"""Step time and memory of every checkpointing mode, measured against predictions.

    python -m benchmarks.runtime.recompute                 GPT-2 and Llama on one process
    python -m benchmarks.runtime.recompute --model llama   one of them

All blocks of a model use one mode. Modes take turns, a step each, so that whatever else the machine does falls on all
alike. Seconds are medians; bytes are the peak of all tensors alive in a step, without the model's own weights.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import NamedTuple

import torch
import transformers as hf
from rich.console import Console
from rich.table import Table
from torch import nn

import autopart
from autopart.cost.liveness import MODES
from autopart.runtime.compiled import Compiled
from benchmarks.accuracy.memory import Memory

SAMPLES, LENGTH, WIDTH, HEADS, LAYERS, WORDS = 4, 128, 256, 4, 6, 512


class Measured(NamedTuple):
    """A mode's median seconds of a step, peak bytes, and what its plan predicts of both."""

    seconds: float
    peak: int
    predicted_seconds: float
    predicted_peak: float


def gpt2() -> nn.Module:
    """A GPT-2 of LAYERS blocks."""
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, n_positions=LENGTH, vocab_size=WORDS,
            attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def llama() -> nn.Module:
    """A Llama of LAYERS blocks."""
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            num_hidden_layers=LAYERS, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_attention_heads=HEADS,
            num_key_value_heads=HEADS, max_position_embeddings=LENGTH, vocab_size=WORDS, use_cache=False,
        )
    )  # fmt: skip


MODELS = {"gpt2": gpt2, "llama": llama}


def compare(model: nn.Module, repeat: int) -> dict[str, Measured]:
    """Every mode, measured in turns."""
    tokens = torch.randint(WORDS, (SAMPLES, LENGTH))
    batch = {"input_ids": tokens, "labels": tokens}
    compiled: dict[str, Compiled] = {}
    for mode in MODES:
        made = copy.deepcopy(model)
        compiled[mode] = autopart.compile(made, "1:cpu", batch, recompute=mode, micro_batch=SAMPLES)
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    peaks = {}
    for mode, program in compiled.items():
        with Memory(apart=[p for _, p in program.stage.named_parameters()]) as memory:
            program.step(batch)
        peaks[mode] = memory.peak
    for _ in range(repeat):
        for mode, program in compiled.items():
            start = time.perf_counter()
            program.step(batch)
            seconds[mode].append(time.perf_counter() - start)
    return {
        mode: Measured(
            statistics.median(seconds[mode]), peaks[mode], program.plan.step_seconds, program.plan.memory_bytes[0]
        )
        for mode, program in compiled.items()
    }


def table(name: str, found: dict[str, Measured]) -> Table:
    """Every mode, with ratios to mode "none"."""
    made = Table("recompute", "step", "to none", "predicted", "peak", "to none", title=name)
    none = found["none"]
    for mode, row in found.items():
        made.add_row(
            mode,
            f"{row.seconds * 1e3:.1f} ms",
            f"{row.seconds / none.seconds:.2f}",
            f"{row.predicted_seconds / none.predicted_seconds:.2f}",
            f"{row.peak / 2**20:.1f} MiB",
            f"{row.peak / none.peak:.2f}",
        )
    return made


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="one model (default: all)")
    parser.add_argument("--repeat", type=int, default=20, help="steps of each mode (default: 20)")
    asked = parser.parse_args()
    torch.manual_seed(0)
    for name in [asked.model] if asked.model else MODELS:
        Console().print(table(name, compare(MODELS[name](), asked.repeat)))


if __name__ == "__main__":
    main()
