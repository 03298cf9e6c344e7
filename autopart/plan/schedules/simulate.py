"""A step on a clock: when every instruction of every stage starts and ends."""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autopart.errors import PartitionError
from autopart.plan.schedules.ops import (
    RECEIVE_OF,
    SEND_OF,
    Channel,
    Instruction,
    Op,
    channel,
    peak_in_flight,
)
from autopart.plan.schedules.verify import in_causal_order


@dataclass(frozen=True, slots=True)
class SimulatedStep:
    """When what happens in a step.

    seconds         from the first instruction's start to the last one's end
    busy_seconds    of each stage: in FORWARD, BACKWARD, REDUCE and STEP
    bubble          1 - mean(busy_seconds) / span; span is the longest time over stages from the start of a stage's
                    first such instruction to the end of its last. For equal stages this is the bubble rate of Qi et
                    al., Zero Bubble Pipeline Parallelism, arXiv 2401.10241
    peak_in_flight  of each stage: the most micro-batches in flight at once
    events          (stage, instruction, start, end) in seconds, by start. A send ends when its message arrives, a
                    receive starts when it is posted
    """

    seconds: float
    busy_seconds: tuple[float, ...]
    bubble: float
    peak_in_flight: tuple[int, ...]
    events: tuple[tuple[int, Instruction, float, float], ...]


def simulate(
    lists: Sequence[Sequence[Instruction]],
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    send_seconds: Mapping[tuple[int, int], float],
    sync_seconds: Sequence[float] = (),
    step_seconds: Sequence[float] = (),
) -> SimulatedStep:
    """Run verified instruction lists on a clock.

    forward_seconds, backward_seconds  of each stage, for one micro-batch
    send_seconds                       (producer, consumer) -> latency in seconds of the tensors of that edge, the same
                                       in both directions; messages of one channel overlap, as latencies do
    sync_seconds, step_seconds         of each stage, for REDUCE and STEP; empty: zero

    Raises PartitionError for a list of seconds of another length than `lists`, for an edge without a latency, and for
    a stage that waits for ever.
    """
    stages = len(lists)
    seconds_of = {
        Op.FORWARD: forward_seconds,
        Op.BACKWARD: backward_seconds,
        Op.REDUCE: sync_seconds or [0.0] * stages,
        Op.STEP: step_seconds or [0.0] * stages,
    }
    for op, durations in seconds_of.items():
        if len(durations) != stages:
            raise PartitionError(f"{len(durations)} durations of {op.name} for {stages} stages")

    clock = [0.0] * stages
    busy = [0.0] * stages
    first = [float("inf")] * stages
    arrivals: defaultdict[Channel, deque[float]] = defaultdict(deque)
    events: list[tuple[int, Instruction, float, float]] = []
    for entry in in_causal_order(lists):
        stage = entry.stage
        start = end = clock[stage]
        if entry.op in RECEIVE_OF:
            end = start + _latency(send_seconds, entry)
            arrivals[channel(entry)].append(end)
        elif entry.op in SEND_OF:
            clock[stage] = end = max(start, arrivals[channel(entry)].popleft())
        else:
            seconds = seconds_of[entry.op][stage]
            clock[stage] = end = start + seconds
            busy[stage] += seconds
            first[stage] = min(first[stage], start)
        events.append((stage, entry, start, end))

    span = max((end - start for start, end in zip(first, clock, strict=True)), default=0.0)
    return SimulatedStep(
        seconds=max(clock, default=0.0),
        busy_seconds=tuple(busy),
        bubble=1 - sum(busy) / (stages * span) if span > 0 else 0.0,
        peak_in_flight=tuple(peak_in_flight(entry.op for entry in program) for program in lists),
        events=tuple(sorted(events, key=lambda event: event[2])),
    )


def _latency(send_seconds: Mapping[tuple[int, int], float], entry: Instruction) -> float:
    edge = (min(entry.stage, entry.peer), max(entry.stage, entry.peer))
    if edge not in send_seconds:
        raise PartitionError(f"{entry} has no latency", try_=f"give send_seconds[{edge}]")
    return send_seconds[edge]
