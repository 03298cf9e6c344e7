"""Checkpointing modes of the blocks of an interval: the bytes that a mode frees, and the seconds that it costs."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopart.cost.compute import Array
from autopart.cost.intervals import interval_sums
from autopart.cost.liveness import MODES
from autopart.cost.position_costs import PositionCosts


@dataclass(frozen=True)
class CheckpointStep:
    """A change of one block to the checkpointing mode `mode`, which adds `seconds` to a micro-batch and frees `bytes`
    of each micro-batch in flight."""

    checkpoint_class: int
    mode: str
    seconds: float
    bytes: float


@dataclass(frozen=True)
class Checkpointed:
    """Intervals with checkpointed blocks. Arrays are [intervals].

    seconds    of the interval
    shortfall  peak bytes - limit
    counts     (step, number of blocks that take it)
    """

    seconds: Array
    shortfall: Array
    counts: Sequence[tuple[CheckpointStep, Array]]


@dataclass
class UniformCheckpointing:
    """Intervals whose blocks all use one mode, compared with each block in the first mode that it may use. Arrays are
    [intervals].

    possible  whether all blocks may use the mode
    seconds   that the mode adds to a micro-batch
    bytes     that the mode frees of each micro-batch in flight
    """

    possible: NDArray[np.bool_]
    seconds: Array
    bytes: Array


def uniform_checkpointing(
    costs: PositionCosts, allowed: Sequence[tuple[str, ...]], block: Sequence[bool], saved: Array, mode: int
) -> UniformCheckpointing:
    """The intervals with all blocks in MODES[mode]. `saved`, [positions], are the bytes that a position saves in the
    first mode that it may use."""
    cannot = [is_block and MODES[mode] not in modes for modes, is_block in zip(allowed, block, strict=True)]
    first = [MODES.index(modes[0]) for modes in allowed]
    more = costs.recompute_seconds[mode] - costs.recompute_seconds[first, np.arange(len(block))]
    return UniformCheckpointing(
        interval_sums(np.array(cannot, dtype=float)) == 0,
        interval_sums(np.where(block, more, 0.0)),
        interval_sums(np.where(block, saved - costs.saved_under(mode), 0.0)),
    )


def checkpoint_steps(
    costs: PositionCosts, checkpoint_class: int, where: NDArray[np.bool_], modes: Sequence[str], furthest: int
) -> list[CheckpointStep]:
    """The steps of a block of one checkpoint class, from the first of its `modes` to MODES[furthest]. They are the
    lower convex hull of (bytes saved, seconds), so that each step costs more seconds a byte than the step before. Where
    blocks of the class differ, as in what they reshard, the largest seconds count."""
    first, *more = [k for k in map(MODES.index, modes) if k <= furthest or MODES[k] == modes[0]]
    start = costs.saved_under(first)[where]
    hull = [(first, 0.0, float(start.min()))]
    for mode in more:
        change = (costs.saved_under(mode)[where] - start).max()
        seconds = (costs.recompute_seconds[mode, where] - costs.recompute_seconds[first, where]).max()
        point = (mode, float(seconds), float(change + start.min()))
        if point[2] >= hull[-1][2]:
            continue
        while len(hull) > 1 and _slope(hull[-1], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return [
        CheckpointStep(checkpoint_class, MODES[b[0]], b[1] - a[1], a[2] - b[2]) for a, b in itertools.pairwise(hull)
    ]


def _slope(one: tuple[int, float, float], other: tuple[int, float, float]) -> float:
    """Seconds a byte between two points of the hull."""
    return (other[1] - one[1]) / (one[2] - other[2])
