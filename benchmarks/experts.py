"""Hold the planner's own choice against what experts chose, on the models and device counts they published.

Every configuration of data/*.csv is planned twice on the nearest device of the tables, for the same global batch in
bfloat16: once with the expert's degrees, ZeRO level and recompute forced, once with all of it left to the planner. The
micro-batch is free both times, so that neither side is held to a size the other may leave. Both times are predictions
of the same cost model, beside the measured one where it was published. The planner searches a space that has the
expert's plan in it, so its own choice must be at least as fast in every row: the exit status says whether it is.

What this project cannot express is named in each row, and the nearest taken: a context-parallel degree is made part of
the tensor-parallel one.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from autopart import Estimate, Mesh, PartitionError, Plan, models
from autopart.compile import Source, make_plan
from autopart.request import Request

HERE = Path(__file__).resolve().parent
FILES = ("megatron_sc21_table1_a100.csv", "torchtitan_llama3.csv")
SLOW = 20.0
"""Seconds of one search above which a row is named slow."""

EQUAL = 1e-6
"""Relative difference of two predictions that are the same."""

Row = Mapping[str, str]


@dataclass(frozen=True)
class Expert:
    """One published configuration in this project's terms.

    forced       degrees, ZeRO level and recompute
    micro_batch  theirs, over all ranks
    measured     seconds of a step as published
    left_out     what they did that cannot be expressed here, or is different here
    """

    name: str
    model: str
    sequence: int
    mesh: str
    global_batch: int
    forced: Mapping[str, Any]
    micro_batch: int
    measured: float
    left_out: tuple[str, ...]
    skipped: str = ""


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

    expert: Expert
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


def experts() -> Iterator[Expert]:
    """Every configuration of the files."""
    for name in FILES:
        with (HERE / "data" / name).open() as file:
            for number, row in enumerate(csv.DictReader(file), 1):
                yield expert_of(row, f"{row['source_id']}:{number}")


def expert_of(row: Row, name: str) -> Expert:
    """One row in this project's terms."""
    count, per_host = int(row["num_gpus"]), int(row["gpus_per_node"])
    device = next(
        d for key, d in (("A100", "a100-80gb"), ("H200", "h200"), ("H100", "h100-80gb")) if key in row["hardware"]
    )
    tp, pp, dp, cp = (int(row[k] or 1) for k in ("tp", "pp", "dp", "cp"))
    size = model_of(row["model"])
    forced = {"pp": pp, "dp": dp, "tp": tp * cp, "zero": int(row["zero"] or 0), "recompute": recompute_of(row)}
    fills = pp * dp * tp * cp == count
    skipped = "" if fills else f"pp {pp} x dp {dp} x tp {tp} x cp {cp} is not {count} devices"
    micro = int("".join(c for c in row["micro_batch"].split("(")[0] if c.isdigit()) or 1)
    return Expert(
        name=name,
        model=size,
        sequence=int(row["seq_len"]),
        mesh=f"{count // per_host}x{per_host}:{device}",
        global_batch=int(row["global_batch"]),
        forced=forced,
        micro_batch=micro * dp,
        measured=measured_seconds(row),
        left_out=tuple(left_out(row)),
        skipped=skipped,
    )


def model_of(name: str) -> str:
    """The name of a model in the table of sizes: GPT-1.7B is gpt-1.7b, Llama-3.1-8B is llama-3-8b."""
    found = name.lower().replace("llama-3.1", "llama-3")
    assert found in models.SIZES, name
    return found


def recompute_of(row: Row) -> str:
    """What all blocks do; "selective(per-op)" is what is called selective here."""
    return row["recompute"].partition("(")[0] or "none"


def left_out(row: Row) -> Iterator[str]:
    """What a row did that is not in the plan that stands for it."""
    if int(row["vpp"] or 1) > 1:
        yield f"{row['vpp']} interleaved pieces a stage"
    elif "interleaved" in row["schedule"]:
        yield "interleaved schedule"
    if int(row["cp"] or 1) > 1:
        yield f"cp {row['cp']} made part of tp"
    if row["dtype"].startswith("float8"):
        yield f"{row['dtype']}, here bf16"
    elif row["dtype"] == "fp16":
        yield "fp16 with fp32 states, here bf16"
    elif row["dtype"] == "bf16":
        yield "fp32 states, here bf16"
    if "async" in row["notes"].lower():
        yield "async TP"
    if "96GB" in row["hardware"]:
        yield "H100 of 96 GB and 500 W, here of 80 GB"


def measured_seconds(row: Row) -> float:
    """Seconds of a step, from tokens/s, or from TFLOP/s by the formula they were counted with."""
    batch, length, count = int(row["global_batch"]), int(row["seq_len"]), int(row["num_gpus"])
    if row["metric_tokens_s_gpu"]:
        return batch * length / (float(row["metric_tokens_s_gpu"]) * count)
    layers, width, words = int(row["layers"]), int(row["hidden"]), int(row["vocab"])
    flops = 96 * batch * length * layers * width**2 * (1 + length / 6 / width + words / 16 / layers / width)
    return flops / (float(row["metric_tflops_per_gpu"]) * 1e12 * count)


@dataclass
class Bench:
    """Plans, each made once: rows that differ only in what is left out here share them."""

    time_limit: float | None
    sources: dict[tuple[str, int, int], Source] = field(default_factory=dict)
    sides: dict[str, Side | Exception] = field(default_factory=dict)

    def source(self, expert: Expert) -> Source:
        """The traced model of a row; a batch of one is traced for itself."""
        key = expert.model, expert.sequence, min(2, expert.global_batch)
        if key not in self.sources:
            model, batch = models.load(expert.model, key[2], expert.sequence, meta=True, dropout=False)
            self.sources[key] = Source(model, batch, torch.bfloat16)
        return self.sources[key]

    def side(self, expert: Expert, **settings: Any) -> Side:
        """The plan of a row under some settings."""
        key = json.dumps([expert.model, expert.sequence, expert.mesh, expert.global_batch, settings], sort_keys=True)
        if key not in self.sides:
            try:
                self.sides[key] = self._search(expert, settings)
            except (PartitionError, AssertionError) as error:
                self.sides[key] = error
        found = self.sides[key]
        if isinstance(found, Exception):
            raise found
        return found

    def _search(self, expert: Expert, settings: Mapping[str, Any]) -> Side:
        request = Request(expert.global_batch, precision="bfloat16", time_limit=self.time_limit, **settings)
        source, mesh = self.source(expert), Mesh.parse(expert.mesh)
        source.short(min(2, expert.global_batch), mesh)
        started = time.process_time()
        try:
            plan = make_plan(source, mesh, request)
        except AssertionError as error:
            taken = time.process_time() - started
            whose = "the expert's plan" if settings else "the own choice"
            raise AssertionError(f"{error} ({whose}, after {taken:.1f} s)") from error
        return Side.of(plan, time.process_time() - started)

    def compare(self, expert: Expert) -> Compared:
        """Both plans of a row. Where the expert's does not fit, it is priced all the same, at their own micro-batch."""
        if expert.skipped:
            return Compared(expert, problem=expert.skipped)
        forced = dict(expert.forced)
        try:
            try:
                theirs = self.side(expert, **forced, schedule="1f1b")
            except PartitionError as error:
                if "no plan fits" not in str(error):
                    raise
                size = expert.micro_batch
                theirs = self.side(expert, **forced, schedule="1f1b", micro_batch=size, must_fit=False)
            own = self.side(expert)
        except PartitionError as error:
            return Compared(expert, problem=str(error).replace("\n", " "))
        except AssertionError as error:
            return Compared(expert, problem=f"the planner contradicts itself: {error}", wrong=True)
        return Compared(expert, theirs, own, why=tuple(differences(theirs, own)))


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
            f"{row.expert.measured:.3g}",
        )
        if row.theirs is None or row.own is None:
            made.add_row(*head, "", "", "", "", "", row.problem, "; ".join(row.expert.left_out))
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
            "; ".join(row.expert.left_out),
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
    for expert in experts():
        text = f"{expert.name} {expert.model} {expert.sequence} {expert.mesh}"
        if (options.only and options.only not in text) or (
            options.most and Mesh.parse(expert.mesh).size > options.most
        ):
            continue
        row = bench.compare(expert)
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
        run = {"torch": torch.__version__, "python": platform.python_version(), "command": shlex.join(sys.argv)}
        options.json.write_text(json.dumps({**run, "rows": [to_json(r) for r in rows]}, indent=1) + "\n")
    return 1 if slower or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
