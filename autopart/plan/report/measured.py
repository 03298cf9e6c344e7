"""A trace of a real run -> one measured step, on the clock of the predicted one."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopart.errors import PartitionError
from autopart.plan.fields import PlanFields
from autopart.plan.schedules.ops import Op


@dataclass(frozen=True)
class Slice:
    """What a stage does from `start` to `end`, in seconds since the step began; `micro_batch` is -1 for what is of
    none."""

    op: Op
    micro_batch: int
    start: float
    end: float


@dataclass(frozen=True)
class MeasuredStep:
    """One step of a traced run: of all whole steps but the first, the one of median length.

    step     number of batches that were trained before
    of       number of whole steps that the trace has
    seconds  from the first instruction of any rank to the end of the last
    ranks    the rank of each stage that is shown: the stage's first
    stages   what that rank did, by start
    """

    step: int
    of: int
    seconds: float
    ranks: tuple[int, ...]
    stages: tuple[tuple[Slice, ...], ...]


Row = tuple[int, int, int, Slice]
"""(stage, rank, step, what was done), its seconds since the trace began."""


def measured_step(trace: str | Path | Mapping[str, Any], plan: PlanFields) -> MeasuredStep:
    """A step of a trace that `autopart.Trace` recorded: its file, or what its file has.

    Raises PartitionError for anything else, for the trace of another plan, and for a trace without a whole step.
    """
    steps: dict[int, list[Row]] = {}
    for row in _rows(trace):
        steps.setdefault(row[2], []).append(row)
    if strange := {row[0] for rows in steps.values() for row in rows} - set(range(plan.pp)):
        raise PartitionError(
            "the trace is of another plan", f"it has stage {max(strange)}, the plan has stages 0 to {plan.pp - 1}"
        )
    whole = {step: rows for step, rows in steps.items() if _whole(rows, plan)}
    if not whole:
        raise PartitionError(
            "the trace has no whole step of this plan",
            f"such a step has {plan.micro_batches} forwards and backwards on each of {plan.pp} stages; "
            f"the trace has {len(steps)} steps",
            "trace at least one step of compiled.step with the plan's batch",
        )
    later = {step: rows for step, rows in whole.items() if step > min(whole)} or whole
    lengths = sorted((max(r[3].end for r in rows) - min(r[3].start for r in rows), at) for at, rows in later.items())
    seconds, step = lengths[(len(lengths) - 1) // 2]
    rows, begun = later[step], min(row[3].start for row in later[step])
    ranks = tuple(min(row[1] for row in rows if row[0] == stage) for stage in range(plan.pp))
    stages = tuple(
        tuple(sorted((_since(row[3], begun) for row in rows if row[1] == rank), key=lambda slice: slice.start))
        for rank in ranks
    )
    return MeasuredStep(step, len(whole), seconds, ranks, stages)


def _since(slice: Slice, begun: float) -> Slice:
    return Slice(slice.op, slice.micro_batch, slice.start - begun, slice.end - begun)


def _whole(rows: Iterable[Row], plan: PlanFields) -> bool:
    """Whether a step has every forward and backward on every stage, on one rank of it at least."""
    done: dict[int, set[tuple[Op, int]]] = {}
    for stage, _, _, slice in rows:
        done.setdefault(stage, set()).add((slice.op, slice.micro_batch))
    needed = {(op, i) for op in (Op.FORWARD, Op.BACKWARD) for i in range(plan.micro_batches)}
    return all(needed <= done.get(stage, set()) for stage in range(plan.pp))


def _rows(trace: str | Path | Mapping[str, Any]) -> Iterable[Row]:
    try:
        data = trace if isinstance(trace, Mapping) else json.loads(Path(trace).read_text())
        return [_row(event) for event in data["traceEvents"] if event["ph"] == "X"]
    except OSError as error:
        raise PartitionError("cannot read the trace", str(error)) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PartitionError(
            "this is no trace of a run", f"{type(error).__name__}: {error}", "record one with autopart.Trace"
        ) from error


def _row(event: Mapping[str, Any]) -> Row:
    told = event["args"]
    start, lasted = float(event["ts"]) * 1e-6, float(event["dur"]) * 1e-6
    if not (math.isfinite(start) and math.isfinite(lasted) and lasted >= 0):
        raise ValueError(f"an event lasts {lasted} s from {start} s on")
    slice = Slice(Op(told["op"]), int(told["micro_batch"]), start, start + lasted)
    return int(event["pid"]), int(event["tid"]), int(told["step"]), slice
