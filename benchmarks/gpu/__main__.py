"""What this machine's GPU has to show, in one run of less than eight minutes, what matters most first.

    machine    versions, and the bandwidth of a copy
    correct    every kernel's outputs and gradients in three dtypes, at the sizes of models, against float64
    warm       what torch.compile makes of the references, compiled side by side and not timed
    time       every kernel against a copy, eager PyTorch, torch.compile, and Liger Kernel where it is installed
    step       training steps of GPT-2 XL, and layers of Llama-3-8B and Mixtral-8x7B, by eager PyTorch, by what autopart
               emits and by Liger's models; losses first
    update     the optimizer's step over all their parameters, by one kernel and by torch.optim
    memory     predicted and measured peak memory of 30 configurations
    compile    those training steps by torch.compile
    calibrate  what `autopart calibrate` finds

A line of JSON is written to a file after each item, so that a run that is cut off loses only the item in progress.
--resume goes on with what is not ok in the file. --dry does the same at tiny sizes on the CPU and finds no times;
kernels are their references or, with TRITON_INTERPRET=1 and AUTOPART_FORCE_TRITON=1, interpreted. The exit status is
1 where an item failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.gpu import report
from benchmarks.gpu.runner import Run, read

PARALLEL = {
    "machine": 1, "correct": 5, "warm": 6, "time": 1, "step": 1, "update": 1, "memory": 3, "compile": 1, "calibrate": 1
}  # fmt: skip
"""Group -> processes that run its items side by side, where that changes nothing that they find."""
RESULTS = Path(__file__).parents[1] / "results" / "gpu_run.jsonl"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument(
        "--to", type=Path, default=RESULTS, metavar="FILE", help=f"of JSON lines (default: {RESULTS.name})"
    )
    parser.add_argument("--resume", action="store_true", help="leave out what is ok in the file")
    parser.add_argument("--seconds", type=float, default=460, help="after which it ends (default: 460)")
    parser.add_argument("--groups", nargs="+", choices=PARALLEL, default=list(PARALLEL))
    parser.add_argument("--only", nargs="+", metavar="TEXT", default=[""], help="items with a TEXT in their names")
    parser.add_argument("--show", action="store_true", help="only print what the file has")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    if options.show:
        report.show(read(options.to), console)
        return 0
    return run(options, console)


def run(options: argparse.Namespace, console: Console) -> int:
    """Run what is asked for."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # to ask for a GPU is then no use of CUDA before a fork
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    until = time.monotonic() + options.seconds
    earlier = read(options.to) if options.resume else []

    def told(record: dict[str, Any]) -> None:
        line = f"{record['item']}: {record['status']} ({record['wall_seconds']:.1f} s)"
        console.print(line, markup=False, highlight=False)

    with options.to.open("a" if options.resume else "w") as file:
        work = Run(file, options.dry, until, earlier, told)
        try:
            work.all(
                {group: count for group, count in PARALLEL.items() if group in options.groups},
                lambda item: any(text in item.name for text in options.only),
            )
        finally:
            report.show(work.records.values(), console)
    if work.left:
        names = ", ".join(item.name for item in work.left)
        console.print(f"not begun in {options.seconds:.0f} s: {names}", markup=False, highlight=False)
    return int(any(r["status"].startswith(("failed", "wrong", "the loss")) for r in work.records.values()))


if __name__ == "__main__":
    sys.exit(main())
