"""Pipeline schedules as data: the table of schedules, one file each, and what a schedule is turned into.

A schedule is the order in which a stage computes the forwards and backwards of its micro-batches. `program.py` adds the
messages to it, which makes a static list of instructions for each stage; `verify.py` checks the lists of all stages;
`simulate.py` runs them on a clock. Sends do not block and receives do. Activations and gradients travel on separate
channels, each of which keeps the order of its messages. Open `one_f_one_b.py` first, then `program.py`.
"""

from collections.abc import Callable
from typing import Any

from autopart.errors import PartitionError
from autopart.plan.schedules import gpipe, one_f_one_b
from autopart.plan.schedules.ops import Order, peak_in_flight

SCHEDULES: dict[str, Callable[[int, int, int], Order]] = {"gpipe": gpipe.order, "1f1b": one_f_one_b.order}
"""Name -> the computations of a stage, from (stage, stages, micro-batches)."""

IN_FLIGHT: dict[str, Callable[[int, int, int], int]] = {"gpipe": gpipe.in_flight, "1f1b": one_f_one_b.in_flight}
"""Name -> the most micro-batches in flight on a stage, from (stage, stages, micro-batches): a formula for what
`in_flight` otherwise counts."""


def compute_order(schedule: str, stage: int, stages: int, micro_batches: int) -> Order:
    """The forwards and backwards of `stage` under the named schedule.

    Raises PartitionError for an unknown schedule, a stage outside the pipeline, or no micro-batches.
    """
    if schedule not in SCHEDULES:
        raise PartitionError(f"unknown schedule {schedule!r}", try_=f"use one of {', '.join(SCHEDULES)}")
    if not 0 <= stage < stages:
        raise PartitionError(f"stage {stage} is not one of {stages} stages")
    if micro_batches < 1:
        raise PartitionError(f"{micro_batches} micro-batches", why="a pipeline step needs at least one")
    return SCHEDULES[schedule](stage, stages, micro_batches)


def in_flight(schedule: str, stage: int, stages: int, micro_batches: int) -> int:
    """The most micro-batches whose activations `stage` holds at once. Raises PartitionError as `compute_order` does."""
    if schedule in IN_FLIGHT and micro_batches > 2 * stages:
        return IN_FLIGHT[schedule](stage, stages, micro_batches)
    return peak_in_flight(op for op, _ in compute_order(schedule, stage, stages, micro_batches))


def receive_buffer_bytes(received_bytes: Any, in_flight: int, micro_batches: int) -> Any:
    """Bytes of the receives that a stage has posted at its memory peak.

    received_bytes  bytes that the stage receives from other stages for one micro-batch

    The peak is in a backward. Where not all micro-batches are in flight, a forward follows it, whose receives are
    posted before the backward begins (`autopart.plan.schedules.program.receives_ahead`).
    """
    return received_bytes * (micro_batches > in_flight)
