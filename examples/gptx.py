"""Trains a small GPT-X on 2 ranks, logs what it does, and profiles the last steps.

    python examples/gptx.py --log build/gptx             # metrics.jsonl, and TensorBoard's events where it is installed
    python examples/gptx.py --log build/gptx --profile   # and torch.profiler's trace of every rank, for Perfetto
    python examples/gptx.py --log build/gptx --pp 2 --recipe --project gptx    # and a run of Weights & Biases

The model is that of `benchmarks/models/gptx.py`, in plain PyTorch. Its experiment is a folder: the plan, a line of JSON
for each update, and what the profile found.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

import autopart
from autopart.runtime.launch import launch
from benchmarks.models.gptx import GPTX, Config
from examples.text import VOCABULARY, batches

PROFILED = 2
"""Steps of a profile, the last of the training."""


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, required=True, help="the folder of the experiment")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pp", type=int, help="pipeline stages (default: the planner chooses)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--recipe", action="store_true", help="macaron, residual attention and ALiBi")
    parser.add_argument("--profile", action="store_true", help=f"profile the last {PROFILED} steps")
    parser.add_argument("--project", help="log to this project of Weights & Biases too")
    options = parser.parse_args()
    if options.profile and options.steps <= PROFILED:
        parser.error(f"a profile takes {PROFILED} steps, after others: --steps {PROFILED + 1} or more")
    return options


def loggers(compiled: autopart.Compiled, options: argparse.Namespace) -> list[autopart.Callback]:
    """What records the experiment."""
    found: list[autopart.Callback] = [autopart.Progress(compiled, options.steps)]
    if compiled.rank == 0:
        found.append(autopart.JsonLines(options.log / "metrics.jsonl"))
    with suppress(autopart.PartitionError):  # where tensorboard is not installed
        found.append(autopart.TensorBoard(compiled, options.log))
    if options.project:
        found.append(autopart.WeightsAndBiases(compiled, project=options.project))
    return found


def main() -> None:
    """Start the ranks, or be one."""
    options = parse()
    if "RANK" not in os.environ and options.ranks > 1:
        sys.exit(launch([sys.executable, *sys.argv], options.ranks))
    options.log.mkdir(parents=True, exist_ok=True)
    switches = dict.fromkeys(("macaron", "residual_attention", "alibi"), options.recipe)
    torch.manual_seed(0)
    model = GPTX(Config(vocabulary=VOCABULARY, tokens=64, width=64, layers=4, heads=4, **switches))
    data = list(batches(options.samples, 64, options.steps, seed=0))
    compiled = autopart.compile(model.train(), f"{options.ranks}:cpu", data[0], pp=options.pp)
    compiled.optimizer(torch.optim.AdamW, lr=options.lr)
    if compiled.rank == 0:
        compiled.plan.save(options.log / "plan.json")
    compiled.callbacks.extend(loggers(compiled, options))
    last = len(data) - PROFILED if options.profile else len(data)
    for batch in data[:last]:
        compiled.step(batch, clip_grad_norm=1.0)
    with autopart.profiled(compiled, options.log / "profile") if options.profile else nullcontext():
        for batch in data[last:]:
            compiled.step(batch, clip_grad_norm=1.0)
    for callback in compiled.callbacks:
        getattr(callback, "close", lambda: None)()
    if compiled.rank == 0:
        print(f"{options.log}: {', '.join(sorted(path.name for path in options.log.iterdir()))}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
