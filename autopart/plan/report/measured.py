"""A trace of a real run -> one measured step, on the clock of the predicted one."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
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
class Messages:
    """Messages of one kind of a rank, of a step.

    op          the instruction within which they ran
    axis        "tp" or "dp", or "pp": messages between stages
    collective  as `PlanStage.traffic` names it
    calls       their number
    bytes       of whole tensors, as `autopart.cost.collectives` counts them
    seconds     that the rank was held up by them
    """

    op: str
    axis: str
    collective: str
    calls: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class MeasuredStep:
    """One step of a traced run: of all whole steps but the first, the one of median length.

    step        number of batches that were trained before
    of          number of whole steps that the trace has
    seconds     from the first instruction of any rank to the end of the last
    ranks       the rank of each stage that is shown: the stage's first
    stages      what that rank did, by start
    peak_bytes  of each stage's fullest rank; None where bytes were not counted
    messages    of each stage's shown rank, the mean over all traced steps; () where messages were not timed
    """

    step: int
    of: int
    seconds: float
    ranks: tuple[int, ...]
    stages: tuple[tuple[Slice, ...], ...]
    peak_bytes: tuple[int | None, ...]
    messages: tuple[tuple[Messages, ...], ...]


Row = tuple[int, int, int, Slice]
"""(stage, rank, step, what was done), its seconds since the trace began."""


def measured_step(trace: str | Path | Mapping[str, Any], plan: PlanFields) -> MeasuredStep:
    """A step of a trace that `autopart.Trace` recorded: its file, or what its file has.

    Raises PartitionError for anything else, for the trace of another plan, and for a trace without a whole step.
    """
    data = _data(trace)
    steps: dict[int, list[Row]] = {}
    for row in _read(lambda: [_row(event) for event in data["traceEvents"] if _is_instruction(event)]):
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
    ranks = [sorted({row[1] for row in rows if row[0] == stage}) for stage in range(plan.pp)]
    stages = tuple(
        tuple(sorted((_since(row[3], begun) for row in rows if row[1] == of[0]), key=lambda slice: slice.start))
        for of in ranks
    )
    told = _read(lambda: [_of_rank(row) for row in data.get("ranks", ())])
    peaks = tuple(
        max((told[r][0] for r in of if r < len(told) and told[r][0] is not None), default=None) for of in ranks
    )
    messages = tuple(told[of[0]][1] if of[0] < len(told) else () for of in ranks)
    return MeasuredStep(step, len(whole), seconds, tuple(of[0] for of in ranks), stages, peaks, messages)


def _since(slice: Slice, begun: float) -> Slice:
    return Slice(slice.op, slice.micro_batch, slice.start - begun, slice.end - begun)


def _whole(rows: Iterable[Row], plan: PlanFields) -> bool:
    """Whether a step has every forward and backward on every stage, on one rank of it at least."""
    done: dict[int, set[tuple[Op, int]]] = {}
    for stage, _, _, slice in rows:
        done.setdefault(stage, set()).add((slice.op, slice.micro_batch))
    needed = {(op, i) for op in (Op.FORWARD, Op.BACKWARD) for i in range(plan.micro_batches)}
    return all(needed <= done.get(stage, set()) for stage in range(plan.pp))


def _data(trace: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(trace, Mapping):
        return trace
    try:
        text = Path(trace).read_text()
    except OSError as error:
        raise PartitionError("cannot read the trace", str(error)) from error
    found: Mapping[str, Any] = _read(lambda: json.loads(text))
    return found


def _read(parse: Callable[[], Any]) -> Any:
    """What a parse finds. Raises PartitionError where it fails."""
    try:
        return parse()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PartitionError(
            "this is no trace of a run", f"{type(error).__name__}: {error}", "record one with autopart.Trace"
        ) from error


def _is_instruction(event: Mapping[str, Any]) -> bool:
    """Whether an event is an instruction: a recompute is a part of its backward."""
    return event["ph"] == "X" and event["args"]["op"] != "recompute"


def _of_rank(row: Mapping[str, Any]) -> tuple[int | None, tuple[Messages, ...]]:
    """Peak bytes and messages of a rank."""
    peak, steps = row["peak_bytes"], max(1, int(row["steps"]))
    messages = tuple(
        Messages(
            str(Op(m["op"])), m["axis"], m["collective"], int(m["calls"]) / steps, int(m["bytes"]) / steps,
            _finite(m["seconds"]) / steps,
        )
        for m in row["messages"]
    )  # fmt: skip
    return None if peak is None else int(peak), messages


def _finite(value: Any) -> float:
    if not (math.isfinite(number := float(value)) and number >= 0):
        raise ValueError(f"{value} is no number of seconds")
    return number


def _row(event: Mapping[str, Any]) -> Row:
    told = event["args"]
    start, lasted = float(event["ts"]) * 1e-6, float(event["dur"]) * 1e-6
    if not (math.isfinite(start) and math.isfinite(lasted) and lasted >= 0):
        raise ValueError(f"an event lasts {lasted} s from {start} s on")
    slice = Slice(Op(told["op"]), int(told["micro_batch"]), start, start + lasted)
    return int(event["pid"]), int(event["tid"]), int(told["step"]), slice
