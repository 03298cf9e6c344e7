"""Time dropout without a kept mask: autopart's against PyTorch's, alone and in the training step of a small GPT-2.

Both sides run in turn in one process, on the GPU if there is one. A ratio below 1 means that autopart is faster. The
step with dropout 0 tells the price of dropout from that of everything else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

import autopart
from autopart.runtime import random
from autopart.runtime.simulated import World, simulated_groups
from benchmarks.support.command import command_line

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {"cpu": ["8x256x768", "8x1024x1024", "4x12x256x256", "64x64"],
          "cuda": ["8x1024x4096", "32x2048x4096", "8x32x1024x1024", "64x64"]}  # fmt: skip
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def medians(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turn after two rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 2):
        for name, run in runs.items():
            _wait()
            start = time.perf_counter()
            run()
            _wait()
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def kept_bytes(run: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward of `run`."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(kept.values())


def operator(shape: list[int], dtype: torch.dtype, p: float, repeats: int) -> dict[str, Any]:
    """Forward and backward of one dropout."""
    groups = simulated_groups(World(), 1, 1, 1, 0)
    object.__setattr__(groups, "device", DEVICE)
    source = random.stream(groups, "dropout")
    x = torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True)
    gradient = torch.randn_like(x)
    forward: dict[str, Callable[[], torch.Tensor]] = {
        "autopart": lambda: random.dropout(x, p, source, shape, 0),
        "torch": lambda: F.dropout(x, p),
    }

    def both(run: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(run(), x, gradient)

    row: dict[str, Any] = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "p": p}
    row["forward_seconds"] = medians(dict(forward), repeats)
    row["seconds"] = medians({name: both(run) for name, run in forward.items()}, repeats)
    row["kept_bytes_per_element"] = {name: kept_bytes(run) / x.numel() for name, run in forward.items()}
    return row


def steps(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A step without dropout and one with it, all in turn."""
    runs = {(p, name): run for p in (0.0, options.p) for name, run in step(options, p).items()}
    found = medians({f"{p} {name}": run for (p, name), run in runs.items()}, options.repeats)
    return [{"p": p, "seconds": {n: found[f"{p} {n}"] for n in ("autopart", "torch")}} for p in (0.0, options.p)]


def step(options: argparse.Namespace, p: float) -> dict[str, Callable[[], Any]]:
    """Forward and backward of a GPT-2, with all its dropout at `p`."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=options.layers, n_embd=options.width, n_head=8, vocab_size=4096, n_positions=options.sequence,
        use_cache=False, **dict.fromkeys(DROPOUTS, p)
    )  # fmt: skip
    model: nn.Module = transformers.GPT2LMHeadModel(config).train()
    ids = torch.randint(0, 4096, (options.batch, options.sequence))
    batch = {"input_ids": ids, "labels": ids}
    mesh = "1:cpu" if DEVICE.type == "cpu" else "1:h100-80gb"
    compiled = autopart.compile(model, mesh, batch, micro_batch=options.batch, recompute="none", seed=0)
    model = model.to(DEVICE)
    there = {name: tensor.to(DEVICE) for name, tensor in batch.items()}

    def eager() -> None:
        model.zero_grad(set_to_none=True)
        model(**there).loss.backward()

    return {"autopart": lambda: compiled.step(batch), "torch": eager}


def show(record: dict[str, Any]) -> None:
    """Print the results as a table."""
    table = Table(title=f"dropout on {record['versions']['machine']}, medians of {record['config']['repeats']}")
    for name in ("what", "autopart ms", "torch ms", "ratio", "forward alone", "autopart keeps", "torch keeps"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for row in record["operators"]:
        what = f"{'x'.join(map(str, row['shape']))} {row['dtype']}"
        kept = [f"{row['kept_bytes_per_element'][name]:.0f} B/element" for name in ("autopart", "torch")]
        table.add_row(what, *_times(row["seconds"]), _times(row["forward_seconds"])[2], *kept)
    for row in record["steps"]:
        table.add_row(f"GPT-2 step, dropout {row['p']}", *_times(row["seconds"]))
    Console(width=None if sys.stdout.isatty() else 130).print(table)


def _times(seconds: dict[str, float]) -> list[str]:
    own, theirs = seconds["autopart"], seconds["torch"]
    return [f"{own * 1e3:.3f}", f"{theirs * 1e3:.3f}", f"{own / theirs:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs="+", default=SHAPES[DEVICE.type], help="as 8x256x768")
    default = "float32" if DEVICE.type == "cpu" else "bfloat16"
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default=default)
    parser.add_argument("--p", type=float, default=0.1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    options = parser.parse_args()
    if DEVICE.type == "cpu":
        torch.set_num_threads(1)
    dtype, shapes = getattr(torch, options.dtype), [[int(n) for n in text.split("x")] for text in options.shape]
    record: dict[str, Any] = {
        "command": command_line(__spec__.name),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine(),
        },
        "config": {**{k: v for k, v in vars(options).items() if k != "json"}, "device": DEVICE.type,
                   "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "operators": [operator(shape, dtype, options.p, options.repeats) for shape in shapes],
        "steps": steps(options),
    }  # fmt: skip
    show(record)
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
