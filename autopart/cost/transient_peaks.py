"""Peak bytes of backward of all intervals of positions at once, from the events of `liveness`.

For the interval [i, j), with F micro-batches in flight, S(p) the bytes that position p saves of a micro-batch and G(p)
the bytes of its gradients:

    peak(i, j) = state + messages + F * sum(S) + max over p in [i, j) of (transient(p) - freed(p) - unallocated(p))
    freed(p) = sum of S over (p, j);  unallocated(p) = sum of G over [i, p) in the first backward of a step, else 0
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopart.cost.compute import Array
from autopart.cost.intervals import (
    NEVER,
    contains_any,
    interval_ends,
    interval_index,
    interval_maxima,
    interval_sums,
    next_at,
)
from autopart.cost.liveness import MODES, freed, unallocated
from autopart.cost.position_costs import PerStageOnce, PositionCosts


@dataclass
class TransientPeaks:
    """The last term of `peak(i, j)`, in bytes: max over p of (transient(p) - freed(p) - unallocated(p)).

    mixed          [MODES, intervals]: the maximum over p from the interval's first block on, where blocks use any modes
                   up to the row's. freed(p) leaves out what blocks saved: all of it counts as alive
    uniform        [MODES, intervals]: the maximum over p from the first block on, where all blocks use the row's mode
    before_blocks  [intervals]: the maximum over p before the first block. freed(p) leaves out what blocks saved:
                   `IntervalCosts` subtracts it
    """

    mixed: Array
    uniform: Array
    before_blocks: Array


def transient_peaks(
    costs: PositionCosts, allowed: Sequence[tuple[str, ...]], block: Sequence[bool], first: bool
) -> TransientPeaks:
    """The peaks in the `first` backward of a step, or in a later one. `allowed` are the MODES of every position."""
    rows, everywhere = list(zip(allowed, block, strict=True)), np.arange(len(block))
    depth = 1 + max((MODES.index(m) for modes, is_block in rows if is_block for m in modes), default=0)
    least = np.array([MODES.index(modes[0]) for modes in allowed])
    transient = np.array([
        np.maximum.reduce([sum(alive.values()) for alive in costs.in_backward(mode, first, costs.training)])
        for mode in range(len(MODES))
    ])  # fmt: skip
    mixed, uniform, saved = [], [], []
    for mode in range(depth):
        furthest = np.array([_furthest(modes, mode * is_block) for modes, is_block in rows])
        mixed.append(np.maximum(transient[least, everywhere], transient[furthest, everywhere]))
        uniform.append(transient[np.where(block, mode, 0), everywhere])
        saved.append(np.where(block, costs.saved_under(mode), costs.saved_bytes[0]))
    result = _by_interval(costs, mixed, uniform, saved, block, first)
    as_first = [interval_sums(1.0 * (block & (least != mode))) == 0 for mode in range(depth)]
    result.mixed[0] = np.select(as_first, list(result.uniform), result.mixed[0])
    return result


def _furthest(modes: Sequence[str], furthest: int) -> int:
    """Index of the last of `modes` that is not beyond MODES[furthest]; at least that of the first."""
    start, *more = map(MODES.index, modes)
    return max([start, *(mode for mode in more if mode <= furthest)])


def _by_interval(
    costs: PositionCosts, mixed: Sequence[Array], uniform: Sequence[Array], saved: Sequence[Array],
    block: Sequence[bool], first: bool,
) -> TransientPeaks:  # fmt: skip
    """The peaks from transient bytes, [MODES][positions]: `mixed` where blocks may use several modes, `uniform` where
    all use one. `saved`, [MODES][positions], has the bytes that positions save under one mode."""
    n, saved_outside = len(block), np.where(block, 0.0, costs.saved_bytes[0])
    starts, ends = interval_ends(n)
    missing = unallocated(costs.state_bytes[1], first)
    last_reader, pending = _pending(costs.per_stage, n)
    first_block = np.minimum(next_at(np.flatnonzero(block), n)[starts], ends)

    def within(maxima: Array, i: NDArray[np.int_], j: NDArray[np.int_]) -> Array:
        """Of an array by interval, the number of each [i, j); -inf where that is empty."""
        inside, some = np.full(len(maxima), -NEVER), i < j
        inside[some] = maxima[interval_index(i[some], j[some], n)]
        return inside

    def peaks(transient: Array, saved: Array, i: NDArray[np.int_], j: NDArray[np.int_]) -> Array:
        """Of each interval [starts, ends), the maximum over p in [i, j) of

        transient(p) - freed(p) - unallocated(p) + (pending bytes where p < `last_reader`)
        """
        later = freed(saved)
        alive = interval_maxima(transient - later[:-1] - missing[:-1])
        while_pending = within(alive, i, np.minimum(j, last_reader)) + pending
        most = np.maximum(while_pending, within(alive, np.maximum(i, last_reader), j))
        behind_end = np.concatenate([later[:1] + saved[:1], later[:-1]])
        return np.asarray(most + behind_end[ends] + missing[starts])

    before_backward = missing[starts] - missing[ends]
    mixed_peaks = [np.maximum(peaks(t, saved_outside, first_block, ends), before_backward) for t in mixed]
    pairs = zip(uniform, saved, strict=True)
    uniform_peaks = [np.maximum(peaks(t, s, first_block, ends), before_backward) for t, s in pairs]
    before_blocks = peaks(mixed[0], saved_outside, starts, first_block)
    all_freed = interval_sums(saved_outside)
    for item in costs.per_stage:
        if item.largest_gradient:
            in_prelude = contains_any(item.positions, n) * 2 * item.largest_gradient
            before_blocks = np.maximum(before_blocks, in_prelude - all_freed)
    return TransientPeaks(np.array(mixed_peaks), np.array(uniform_peaks), before_blocks)


def _pending(per_stage: Sequence[PerStageOnce], n: int) -> tuple[NDArray[np.int_], Array]:
    """By interval: the last position that reads a parameter which an earlier position of the interval reads too; bytes
    of the gradients of all such parameters."""
    starts, ends = interval_ends(n)
    last_reader, pending = starts.copy(), np.zeros(len(starts))
    for item in per_stage:
        if item.pending_grad_bytes:
            inside = np.array([(starts <= p) & (p < ends) for p in item.positions])
            several = inside.sum(0) > 1
            pending += several * item.pending_grad_bytes
            last_reader = np.maximum(last_reader, several * (inside * np.array(item.positions)[:, None]).max(0))
    return last_reader, pending
