"""What the planner's choice costs against the best there is: every uniform configuration is run, and its choice too.

For every model and batch on 2 and on 4 CPU ranks (real processes, gloo), all degrees of pipeline, data and tensor
parallelism that fill the ranks are run with several micro-batches, each as fast as the planner can make it, and beside
them what the planner takes when it is asked for nothing, on a profile that `autopart calibrate` wrote right before.
A few rounds find those that are close to the best; these take turns for more. Regret is the median over rounds of the
choice's seconds over those of the best, less one.

    python -m benchmarks.planning.regret                              # all: three quarters of an hour
    python -m benchmarks.planning.regret --ranks 4 --pairs 0 1        # a part; results of others stay in the file
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import autopart
from benchmarks.runtime.ranks import Job, begin, on_all_ranks, parsed, prepared, time_steps

RESULTS = Path(__file__).parents[1] / "results" / "regret.json"
PAIRS: list[tuple[str, tuple[int, int, int, int]]] = [
    ("gpt2", (256, 4, 128, 8)),
    ("gpt2", (384, 4, 64, 16)),
    ("llama", (256, 4, 128, 8)),
    ("llama", (512, 4, 128, 4)),
    ("mlp", (512, 4, 64, 8)),
    ("mlp", (256, 8, 256, 8)),
]


CLOSE = 1.15
"""How many times the least seconds of the first rounds are close to it."""
FIRST = 3
"""How many times as many rounds there are for those that are close as at first."""


def main() -> None:
    """Calibrate, start the ranks, and judge; or be a rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", choices=range(len(PAIRS)), default=list(range(len(PAIRS))))
    options = parsed(parser, (2, 4), 15, RESULTS)
    if "RANK" in os.environ:
        run_rank(options)
        return
    on_all_ranks(__spec__.name, options, [["--pairs", str(pair)] for pair in options.pairs])
    show(json.loads(options.json.read_text()))


def configurations(ranks: int, model: str, sizes: tuple[int, int, int, int]) -> Iterator[Job]:
    """The planner's own, and all degrees: without a pipeline with the whole batch at once, which takes no longer than
    parts of it, with one in 2 and 4 micro-batches."""
    samples = sizes[3] * (sizes[2] if model == "mlp" else 1)
    yield Job(model, sizes, {})
    for pp in (1, 2, 4):
        for tp in (1, 2, 4):
            dp = ranks // (pp * tp)
            if dp < 1 or pp * dp * tp != ranks:
                continue
            for parts in (1,) if pp == 1 else (2, 4):
                if samples % (parts * dp) == 0:
                    yield Job(model, sizes, {"pp": pp, "dp": dp, "tp": tp, "micro_batch": samples // parts})


def run_rank(options: argparse.Namespace) -> None:
    """Time every configuration of every pair; rank 0 keeps them."""
    begin()
    (ranks,) = options.ranks
    autopart.load_hardware(options.profile)
    mesh = autopart.Mesh.of(f"{ranks}:cpu-{ranks}")
    for pair in options.pairs:
        model, sizes = PAIRS[pair]
        rows, steps = prepared(list(configurations(ranks, model, sizes)), mesh)
        time_steps(rows, steps, mesh, -(-options.steps // FIRST))
        most = CLOSE * min(row["measured"] for row in rows)
        close = [i for i, row in enumerate(rows) if i == 0 or row["measured"] <= most]
        time_steps([rows[i] for i in close], [steps[i] for i in close], mesh, options.steps)
        rows = [{**row, "close": i in close} for i, row in enumerate(rows)]
        if dist.get_rank() == 0:
            keep(options.json, [{**row, "pair": pair, "planned": i == 0} for i, row in enumerate(rows)])
    dist.barrier()
    dist.destroy_process_group()


def keep(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put rows into the file, in the place of all that are there of the same pairs, with the regret of every pair."""

    def pair_of(row: dict[str, Any]) -> tuple[int, int]:
        return row["ranks"], row["pair"]

    known, new = json.loads(path.read_text())["rows"] if path.exists() else [], set(map(pair_of, rows))
    merged = [row for row in known if pair_of(row) not in new] + rows
    pairs = sorted(set(map(pair_of, merged)))
    record = {"torch": torch.__version__, "cores": os.cpu_count(), "regret": [regret(merged, *at) for at in pairs]}
    path.write_text(json.dumps({**record, "rows": merged}, indent=1) + "\n")


def regret(rows: list[dict[str, Any]], ranks: int, pair: int) -> dict[str, Any]:
    """The planner's choice of one pair against the best; none where a configuration that is the same plan is best."""
    own = [row for row in rows if (row["ranks"], row["pair"]) == (ranks, pair)]
    (choice,) = (row for row in own if row["planned"])
    best = min((row for row in own if row["close"]), key=lambda row: row["measured"])
    ratio = statistics.median(a / b for a, b in zip(choice["seconds"], best["seconds"], strict=True))
    return {
        "ranks": ranks, "pair": pair, "model": choice["job"].partition(":")[0], "configurations": len(own) - 1,
        "choice": choice["plan"], "best": best["plan"], "seconds": choice["measured"],
        "best_seconds": best["measured"], "worst_seconds": max(row["measured"] for row in own),
        "regret": max(0.0, ratio - 1) if best["plan"] != choice["plan"] else 0.0,
    }  # fmt: skip


def show(record: dict[str, Any]) -> None:
    """Print the regrets."""
    table = Table(title="what the planner chose against the best of all configurations run")
    for name in ("ranks", "model", "runs", "choice", "ms", "best", "best ms", "worst ms", "regret"):
        table.add_column(name, overflow="fold")
    for row in record["regret"]:
        table.add_row(
            str(row["ranks"]), row["model"], str(row["configurations"]), row["choice"], f"{row['seconds'] * 1e3:.0f}",
            row["best"], f"{row['best_seconds'] * 1e3:.0f}", f"{row['worst_seconds'] * 1e3:.0f}",
            f"{row['regret']:.1%}",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 190).print(table)


if __name__ == "__main__":
    main()
