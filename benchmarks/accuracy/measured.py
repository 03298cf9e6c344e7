"""Hold predicted step times against this machine: a profile is calibrated, every row predicted with it, then run.

A row is a model under given degrees, ZeRO level, recompute and micro-batch on 1, 2 or 4 CPU ranks (real processes,
gloo); its plan is made and priced on the profile that `autopart calibrate` wrote in the same run. Results of earlier
runs stay in the file for rows that are not run.

    python -m benchmarks.accuracy.measured                    # all: about 10 minutes
    python -m benchmarks.accuracy.measured --ranks 4          # a part
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import autopart
from benchmarks.accuracy.published_runs import kendall
from benchmarks.runtime.ranks import Job, begin, merge, on_all_ranks, parsed, time_jobs

RESULTS = Path(__file__).parents[1] / "results" / "measured.json"
KEY = ("ranks", "job")

GPT2 = "gpt2", (512, 4, 128, 8)
NARROW = "gpt2", (256, 4, 128, 8)
LLAMA = "llama", (512, 4, 128, 8)
LONG = "llama", (512, 4, 256, 8)
MLP = "mlp", (512, 6, 256, 8)

ROWS: dict[int, list[Job]] = {
    1: [
        Job(*GPT2, {"micro_batch": 8}),
        Job(*NARROW, {"micro_batch": 4}),
        Job(*LLAMA, {"micro_batch": 4, "recompute": "full"}),
        Job(*LONG, {"micro_batch": 4}),
        Job(*MLP, {"micro_batch": 2048}),
    ],
    2: [
        Job(*GPT2, {"dp": 2, "micro_batch": 8}),
        Job(*GPT2, {"tp": 2, "micro_batch": 8}),
        Job(*GPT2, {"pp": 2, "micro_batch": 2}),
        Job(*LLAMA, {"dp": 2, "micro_batch": 8, "zero": 1}),
        Job(*LLAMA, {"dp": 2, "micro_batch": 4, "zero": 3}),
        Job(*LLAMA, {"tp": 2, "micro_batch": 4}),
        Job(*LLAMA, {"pp": 2, "micro_batch": 2, "recompute": "full"}),
        Job(*MLP, {"dp": 2, "micro_batch": 1024}),
        Job(*MLP, {"tp": 2, "micro_batch": 2048}),
    ],
    4: [
        Job(*GPT2, {"dp": 4, "micro_batch": 8}),
        Job(*NARROW, {"dp": 2, "tp": 2, "micro_batch": 8}),
        Job(*GPT2, {"pp": 2, "tp": 2, "micro_batch": 2}),
        Job(*LLAMA, {"pp": 4, "micro_batch": 2}),
        Job(*LONG, {"pp": 2, "dp": 2, "micro_batch": 2}),
        Job(*LLAMA, {"tp": 4, "micro_batch": 8}),
        Job(*NARROW, {"dp": 4, "micro_batch": 8, "zero": 2}),
        Job(*MLP, {"pp": 4, "micro_batch": 512}),
    ],
}


def main() -> None:
    """Calibrate, start the ranks, and judge; or be a rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = parsed(parser, list(ROWS), 7, RESULTS)
    if "RANK" in os.environ:
        run_rank(options)
        return
    on_all_ranks(__spec__.name, options)
    show(json.loads(options.json.read_text()))


def run_rank(options: argparse.Namespace) -> None:
    """Time the rows; rank 0 keeps them."""
    begin()
    (ranks,) = options.ranks
    autopart.load_hardware(options.profile)
    rows = time_jobs(ROWS[ranks], autopart.Mesh.of(f"{ranks}:cpu-{ranks}"), options.steps)
    if dist.get_rank() == 0:
        rows = merge(options.json, rows, KEY)
        record = {"torch": torch.__version__, "cores": os.cpu_count(), **score(rows), "rows": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def score(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean absolute relative errors and Kendall's tau, as predicted and at the machine's speed of the moment."""
    for row in rows:
        row["error"] = row["predicted"] / row["measured"] - 1
        row["error_at_speed"] = row["predicted"] * row["drift"] / row["measured"] - 1
    return {
        "mape": sum(abs(row["error"]) for row in rows) / len(rows),
        "mape_at_speed": sum(abs(row["error_at_speed"]) for row in rows) / len(rows),
        "tau": kendall([("", row["predicted"], row["measured"]) for row in rows]),
        "tau_at_speed": kendall([("", row["predicted"] * row["drift"], row["measured"]) for row in rows]),
    }


def show(record: dict[str, Any]) -> None:
    """Print the results."""
    table = Table(
        title=f"mean error {record['mape']:.1%}, at the machine's speed {record['mape_at_speed']:.1%}, "
        f"Kendall's tau {record['tau']:.2f}, {record['tau_at_speed']:.2f}"
    )
    for name in ("ranks", "job", "predicted ms", "measured ms", "spread", "drift", "error", "at speed"):
        table.add_column(name, justify="left" if name == "job" else "right", no_wrap=True)
    for row in sorted(record["rows"], key=lambda row: (row["ranks"], row["job"])):
        table.add_row(
            str(row["ranks"]), row["job"], f"{row['predicted'] * 1e3:.0f}", f"{row['measured'] * 1e3:.0f}",
            f"{row['spread']:.0%}", f"{row['drift']:.2f}", f"{row['error']:+.1%}", f"{row['error_at_speed']:+.1%}",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 150).print(table)


if __name__ == "__main__":
    main()
