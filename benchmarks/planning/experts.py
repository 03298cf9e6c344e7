"""Hold the planner's own choice against what experts chose, on the models and device counts they published.

Every configuration of two tables of data/ is planned twice on the device it names, for the same global batch: once with
the expert's degrees, ZeRO level and recompute forced, once with all of it left to the planner. The micro-batch is free
both times, so that neither side is held to a size the other may leave. Both times are predictions of the same cost
model, beside the measured one where it was published. The planner searches a space that has the expert's plan in it, so
its own choice must be at least as fast in every row: the exit status says whether it is.

`benchmarks/accuracy/published.py` reads the rows and names what this project cannot express in each.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from autopart import Estimate, Mesh, PartitionError, Plan
from benchmarks.accuracy.published import Bench, Published, read
from benchmarks.support.command import command_line

FILES = ("megatron_sc21_table1_a100.csv", "torchtitan_llama3.csv")
SLOW = 20.0
"""Seconds of one search above which a row is named slow."""

EQUAL = 1e-6
"""Relative difference of two predictions that are the same."""


@dataclass(frozen=True)
class Side:
    """One plan of a row: what was decided, what it is predicted to take, and how long the search took."""

    decided: Mapping[str, Any]
    seconds: float
    gap: float
    fits: bool
    shares: Mapping[str, float]
    search_seconds: float

    @staticmethod
    def of(plan: Plan, taken: float) -> Side:
        """Of a plan whose search took so long."""
        names = ("pp", "dp", "tp", "zero", "recompute", "micro_batch")
        shares = {k: v / plan.step_seconds for k, v in Estimate.of(plan).breakdown.items()}
        decided = {n: getattr(plan, n) for n in names}
        return Side(decided, plan.step_seconds, plan.gap, plan.fits, shares, taken)


@dataclass(frozen=True)
class Compared:
    """A row with both sides, or why it has none; `wrong` where that is the planner's fault."""

    expert: Published
    theirs: Side | None = None
    own: Side | None = None
    problem: str = ""
    wrong: bool = False
    why: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """How many times as fast the own choice is."""
        return self.theirs.seconds / self.own.seconds if self.theirs and self.own else float("nan")

    @property
    def slower(self) -> bool:
        """Whether the own choice is slower than one it could have taken."""
        return bool(self.theirs and self.own and self.theirs.fits and self.ratio < 1 - EQUAL)


def compare(bench: Bench, expert: Published) -> Compared:
    """Both plans of a row. Where the expert's does not fit, it is priced all the same, at their own micro-batch."""
    if expert.skipped:
        return Compared(expert, problem=expert.skipped)
    forced = dict(expert.forced)
    try:
        try:
            theirs = bench.plan(expert, **forced, schedule="1f1b")
        except PartitionError as error:
            if "no plan fits" not in str(error):
                raise
            size = expert.micro_batch
            theirs = bench.plan(expert, **forced, schedule="1f1b", micro_batch=size, must_fit=False)
        own = bench.plan(expert)
    except PartitionError as error:
        return Compared(expert, problem=str(error).replace("\n", " "))
    except AssertionError as error:
        return Compared(expert, problem=f"the planner contradicts itself: {error}", wrong=True)
    sides = Side.of(*theirs), Side.of(*own)
    return Compared(expert, *sides, why=tuple(differences(*sides)))


def differences(theirs: Side, own: Side) -> Iterator[str]:
    """What the two sides decide otherwise, and where the slower one's time goes more than the other's."""
    for name, value in theirs.decided.items():
        if own.decided[name] != value:
            yield f"{name} {value} -> {own.decided[name]}"
    for name, share in theirs.shares.items():
        before, after = share * theirs.seconds, own.shares[name] * own.seconds
        if abs(before - after) > 0.02 * theirs.seconds:
            yield f"{name} {(after - before) / theirs.seconds:+.0%} of their step"


def table(rows: Sequence[Compared]) -> Table:
    """The rows as a table."""
    made = Table("row", "model", "mesh", "measured", "expert", "own", "ratio", "gap", "search s", "why", "left out")
    for row in rows:
        head = (
            row.expert.name,
            f"{row.expert.model} {row.expert.sequence}",
            row.expert.mesh,
            f"{row.expert.measured or math.nan:.3g}",
        )
        if row.theirs is None or row.own is None:
            made.add_row(*head, "", "", "", "", "", row.problem, "; ".join(row.expert.besides))
            continue
        fits = "" if row.theirs.fits else " (does not fit)"
        made.add_row(
            *head,
            f"{row.theirs.seconds:.4g}{fits}",
            f"{row.own.seconds:.4g}",
            f"[red]{row.ratio:.3f}[/]" if row.slower else f"{row.ratio:.3f}",
            f"{row.own.gap:.1%}",
            f"{row.theirs.search_seconds:.1f} + {row.own.search_seconds:.1f}",
            "; ".join(row.why),
            "; ".join(row.expert.besides),
        )
    return made


def line(row: Compared) -> str:
    """A row in short."""
    if row.theirs is None or row.own is None:
        return row.problem
    searches = f"{row.theirs.search_seconds:.1f} and {row.own.search_seconds:.1f}"
    verdict = "slower than the expert's, " if row.slower else ""
    return f"{verdict}{row.theirs.seconds:.4g} s theirs, {row.own.seconds:.4g} s own, searched in {searches} s"


def to_json(row: Compared) -> dict[str, Any]:
    """A row as plain data."""
    return {**asdict(row), "ratio": row.ratio if row.theirs else None, "slower": row.slower}


def main() -> int:
    """Run the rows asked for; the exit status is 1 where an own choice is slower than an expert's, or wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", help="rows whose name, model or mesh has TEXT in it")
    parser.add_argument("--most", type=int, metavar="N", help="rows of at most N devices")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="of one search")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 240)
    bench, rows = Bench(options.time_limit), list[Compared]()
    for expert in (row for file in FILES for row in read(file)):
        text = f"{expert.name} {expert.model} {expert.sequence} {expert.mesh}"
        if (options.only and options.only not in text) or (
            options.most and Mesh.parse(expert.mesh).size > options.most
        ):
            continue
        row = compare(bench, expert)
        rows.append(row)
        console.print(f"{text}: {line(row)}", markup=False, highlight=False, soft_wrap=True)
    console.print(table(rows))
    slow = [r for r in rows if r.own and r.theirs and max(r.own.search_seconds, r.theirs.search_seconds) > SLOW]
    slower, wrong = [r for r in rows if r.slower], [r for r in rows if r.wrong]
    console.print(
        f"{len(rows)} rows, {sum(r.own is not None for r in rows)} compared, {len(slower)} own choices slower than the "
        f"expert's, {len(wrong)} wrong; searches over {SLOW:.0f} s: {', '.join(r.expert.name for r in slow) or 'none'}"
    )
    if options.json:
        run = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "command": command_line(__spec__.name),
        }
        options.json.write_text(json.dumps({**run, "rows": [to_json(r) for r in rows]}, indent=1) + "\n")
    return 1 if slower or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
