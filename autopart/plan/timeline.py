"""A plan on a clock: what every stage does when, as its schedule runs with the plan's own seconds.

A plan predicts its step as sum(f) + (m - 1) max(f), f being the seconds of each stage for one of m micro-batches. That
f counts both ends of a message, and spreads the gradient sync evenly over turns (`training_state.amortization`). The
timeline tells forward (F) and backward (B) apart. A message is a latency, half of its seconds in either direction, that
overlaps with work. Gradient sync that no backward hides comes after the last backward.

- For equal stages without messages both give (m + p - 1) f.
- 1F1B without sync, with B / F equal on all stages, takes no longer than predicted, and less where f has messages.
- 1F1B with B / F that differs can take longer than predicted.
- GPipe can too, since its forwards and its backwards each have their own slowest stage: without messages it takes
  sum(F) + sum(B) + (m - 1) (max(F) + max(B)), a bubble of (p - 1) / (m + p - 1) for equal stages (Huang et al., arXiv
  1811.06965, section 2.3).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autopart.errors import PartitionError
from autopart.plan.fields import PlanFields
from autopart.plan.schedules import in_flight
from autopart.plan.schedules.ops import ONCE_A_STEP, Instruction, Op
from autopart.plan.schedules.program import instructions
from autopart.plan.schedules.simulate import simulate
from autopart.plan.schedules.verify import verify
from autopart.plan.slowed_step import SlowedStep, slowed_step
from autopart.plan.stages import PlanStage
from autopart.plan.stragglers import Stragglers
from autopart.plan.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from rich.text import Text

Event = tuple[Instruction, float, float]
"""An instruction, its start and its end: a receive starts when it is posted, a send ends when its message arrives."""

COMPUTE = (Op.FORWARD, Op.BACKWARD)
SENDS = (Op.SEND, Op.SEND_GRAD)
MARKS = {
    Op.FORWARD: ("Ff", "forward", "green"),
    Op.BACKWARD: ("Bb", "backward", "blue"),
    Op.RECV: ("--", "waits for a message", "red"),
    Op.RECV_GRAD: ("--", "waits for a message", "red"),
    Op.REDUCE: ("==", "gradient sync", "magenta"),
    Op.STEP: ("oo", "optimizer", "yellow"),
}
"""Instruction -> its marks in the chart for even and odd micro-batches, their meaning, their colour."""


CAUSES: Mapping[Op, str] = {
    Op.FORWARD: "forward",
    Op.BACKWARD: "backward",
    Op.RECV: "waiting",
    Op.RECV_GRAD: "waiting",
    Op.SEND: "sending",
    Op.SEND_GRAD: "sending",
    Op.REDUCE: "gradient sync",
    Op.STEP: "optimizer",
}
"""Instruction -> cause of its seconds. Collectives over tp belong to forward and backward."""


@dataclass(frozen=True)
class StageTimeline:
    """One stage's step.

    events          in order of their starts
    seconds         cause -> seconds of the step: forward, backward, waiting (for messages), gradient sync, optimizer
                    (which plans do not price) and idle (before the first event and after the last)
    peak_in_flight  the most micro-batches in flight at once
    resident        bytes that a rank has allocated for the whole step
    allocated       (second, activations, transient): from that second on, a rank has so many bytes of these kinds
    """

    events: tuple[Event, ...] = field(repr=False)
    seconds: dict[str, float]
    peak_in_flight: int
    resident: float
    allocated: tuple[tuple[float, float, float], ...] = field(repr=False)

    @property
    def memory(self) -> tuple[tuple[float, float], ...]:
        """(second, bytes): from that second on, a rank has so many bytes allocated."""
        return tuple((second, self.resident + sum(nbytes)) for second, *nbytes in self.allocated)

    @property
    def peak_bytes(self) -> float:
        """The most bytes that a rank has allocated."""
        return max(nbytes for _, nbytes in self.memory)


@dataclass(frozen=True)
class Timeline:
    """A simulated step of a plan.

    seconds            from the first instruction to the last end
    predicted_seconds  `Plan.step_seconds`
    bubble             1 - mean over stages of the seconds at work / the longest time from a stage's first work to its
                       last
    stages             the stages' timelines
    slowed             the step with stragglers; None where none were given. The other fields are without them
    """

    seconds: float
    predicted_seconds: float
    bubble: float
    stages: tuple[StageTimeline, ...]
    slowed: SlowedStep | None = None

    def to_json(self) -> dict[str, Any]:
        """The timeline as dicts, lists, numbers and text."""
        return {
            "seconds": self.seconds,
            "predicted_seconds": self.predicted_seconds,
            "bubble": self.bubble,
            "stages": [
                {
                    "seconds": stage.seconds,
                    "peak_in_flight": stage.peak_in_flight,
                    "peak_bytes": stage.peak_bytes,
                    "memory": stage.memory,
                    "events": [{**_named(entry), "start": start, "end": end} for entry, start, end in stage.events],
                }
                for stage in self.stages
            ],
            **({"slowed": self.slowed.to_json()} if self.slowed else {}),
        }

    def trace(self) -> dict[str, Any]:
        """The step as Chrome's Trace Event Format, which Perfetto reads too: a thread a stage, a slice a message
        on its way, a counter of bytes a stage; times in microseconds."""
        return {"displayTimeUnit": "ms", "traceEvents": list(_trace_events(self))}

    def chart(self, width: int = 100) -> Text:
        """A row for each stage, `width` characters of time, and a legend."""
        from rich.text import Text

        lines = [
            Text(
                f"step {seconds_text(self.seconds)} simulated, {seconds_text(self.predicted_seconds)} predicted   "
                f"bubble {self.bubble:.1%}"
            )
        ]
        lines += [Text(str(self.slowed))] if self.slowed else []
        for number, stage in enumerate(self.stages):
            row = Text(f"stage {number:<3} ").append_text(_row(stage, self.seconds, width))
            shares = ", ".join(f"{k} {v / self.seconds:.0%}" for k, v in stage.seconds.items() if v > 0)
            lines.append(
                row.append(f"  {shares}; {stage.peak_in_flight} in flight, at most {bytes_text(stage.peak_bytes)}")
            )
        legend = Text(" " * 10)
        for marks, meaning, colour in dict.fromkeys(MARKS.values()):
            legend.append("/".join(dict.fromkeys(marks)), colour).append(f" {meaning}   ")
        return Text("\n").join([*lines, legend])

    def __str__(self) -> str:
        return self.chart().plain


def timeline(plan: PlanFields, *, slow: Stragglers | None = None) -> Timeline:
    """Simulate a step of a plan.

    slow  what is slower than the plan supposes; `Timeline.slowed` has the step with it, by the rules of
          `autopart.plan.slowed_step`

    Raises PartitionError where stages would wait for each other for ever, with who waits for whom, for a schedule that
    is not known, and for stragglers that are not on the plan's mesh.
    """
    edges = {(i, to): seconds / 2 for i, stage in enumerate(plan.stages) for to, _, seconds in stage.sends}
    lists = instructions(plan.schedule, plan.pp, plan.micro_batches, edges)
    verify(lists)
    run = simulate(
        lists,
        [s.forward_seconds for s in plan.stages],
        [s.backward_seconds for s in plan.stages],
        edges,
        [s.sync_seconds for s in plan.stages],
    )
    events: list[list[Event]] = [[] for _ in plan.stages]
    for at, entry, start, end in run.events:
        events[at].append((entry, start, end))
    stages = []
    for index, stage in enumerate(plan.stages):
        flights = in_flight(plan.schedule, index, plan.pp, plan.micro_batches)
        stages.append(
            StageTimeline(
                tuple(events[index]),
                _seconds(events[index], run.seconds),
                run.peak_in_flight[index],
                _resident(stage),
                tuple(_allocated(events[index], stage, flights)),
            )
        )
    slowed = slowed_step(plan, slow, lists, edges, run.seconds) if slow else None
    return Timeline(run.seconds, plan.step_seconds, run.bubble, tuple(stages), slowed)


def compare_stragglers(plans: Mapping[str, PlanFields], slow: Stragglers) -> dict[str, SlowedStep]:
    """Name -> the step with stragglers, of several plans, the fastest first. In one draw all plans for as many ranks
    have the same slow ranks.

    Raises PartitionError for no plans, and as `timeline` does."""
    if not plans:
        raise PartitionError("no plans to compare", try_='{"planned": plan, "tp=8": other}')
    found = {name: made for name, plan in plans.items() if (made := timeline(plan, slow=slow).slowed)}
    return dict(sorted(found.items(), key=lambda row: row[1].seconds))


def _seconds(events: list[Event], whole: float) -> dict[str, float]:
    """Cause -> seconds of a stage's step."""
    found = {cause: 0.0 for op, cause in CAUSES.items() if op not in SENDS}
    for entry, start, end in events:
        if entry.op not in SENDS:
            found[CAUSES[entry.op]] += end - start
    return {**found, "idle": whole - sum(found.values())}


def _state(memory: Mapping[str, float]) -> float:
    """Bytes of a record of memory that are neither activations nor transient."""
    return sum(nbytes for kind, nbytes in memory.items() if kind not in ("activations", "transient"))


def _resident(stage: PlanStage) -> float:
    """Bytes of the state that a stage has all the while: at the end of a step there may be more gradients than at the
    peak of the backward."""
    return min(_state(stage.memory), _state(stage.backward_memory or stage.memory))


def _allocated(events: list[Event], stage: PlanStage, most: int) -> Iterator[tuple[float, float, float]]:
    """`StageTimeline.allocated` with at most `most` micro-batches in flight.

    Activations are allocated from a micro-batch's forward to the end of its backward, transient bytes while the stage
    computes. A stage whose peak is at the end of a step has the peak's transient bytes from the gradient sync on.
    """
    memory, resident = stage.backward_memory or stage.memory, _resident(stage)
    each = memory.get("activations", 0.0) / most
    transient = memory.get("transient", 0.0) + _state(memory) - resident
    changes = {0.0: (0, 0)}
    for entry, start, end in events:
        if entry.op in COMPUTE:
            forward = entry.op is Op.FORWARD
            for second, flights, computing in ((start, int(forward), 1), (end, forward - 1, -1)):
                before = changes.get(second, (0, 0))
                changes[second] = before[0] + flights, before[1] + computing
    flights = computing = 0
    for second, change in sorted(changes.items()):
        flights, computing = flights + change[0], computing + change[1]
        if any(change) or not second:
            yield second, flights * each, computing * transient
    if stage.backward_memory:
        closing = [(start, end) for entry, start, end in events if entry.op in ONCE_A_STEP]
        more = _state(stage.memory) - resident
        yield min(start for start, _ in closing), 0.0, stage.memory.get("transient", 0.0) + more
        yield max(end for _, end in closing), 0.0, more


def _row(stage: StageTimeline, whole: float, width: int) -> Text:
    """A stage's step in marks: what the stage does in the middle of every slice of time."""
    from rich.text import Text

    events = [(entry, start, end) for entry, start, end in stage.events if entry.op not in SENDS and end > start]
    starts = [start for _, start, _ in events]
    row = Text()
    for slot in range(width):
        now = (slot + 0.5) / width * whole
        at = bisect_right(starts, now) - 1
        if at < 0 or events[at][2] <= now:
            row.append(".")
        else:
            marks, _, colour = MARKS[events[at][0].op]
            row.append(marks[events[at][0].micro_batch % 2], colour)
    return row


def _named(entry: Instruction) -> dict[str, Any]:
    named: dict[str, Any] = {"op": entry.op.value}
    if entry.micro_batch >= 0:
        named["micro_batch"] = entry.micro_batch
    if entry.peer >= 0:
        named["peer"] = entry.peer
    return named


def _trace_events(made: Timeline) -> Iterator[dict[str, Any]]:
    for number, stage in enumerate(made.stages):
        here = {"pid": 0, "tid": number}
        yield {"ph": "M", "name": "thread_name", **here, "args": {"name": f"stage {number}"}}
        for entry, start, end in stage.events:
            at, until = start * 1e6, end * 1e6
            named = _named(entry)
            if entry.op in SENDS:
                message = {"name": str(entry), "cat": "message", "id": str(entry), **here}
                yield {"ph": "b", **message, "ts": at, "args": named}
                yield {"ph": "e", **message, "ts": until}
            elif until > at:
                of = f" {entry.micro_batch}" if entry.micro_batch >= 0 else ""
                yield {"ph": "X", "name": f"{entry.op.value}{of}", "cat": entry.op.value, **here, "ts": at,
                       "dur": until - at, "args": named}  # fmt: skip
        for second, nbytes in stage.memory:
            yield {
                "ph": "C",
                "name": f"bytes of stage {number}",
                "pid": 0,
                "ts": second * 1e6,
                "args": {"bytes": nbytes},
            }
