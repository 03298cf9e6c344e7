"""Bytes that exist for a moment of a backward, of every range of positions, besides what the range holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopart.cost.compute import Array
from autopart.cost.intervals import NEVER, following, has, maxima, place, spans, sums
from autopart.cost.position_costs import MODES, PerStageOnce, PositionCosts


@dataclass
class TransientPeaks:
    """Bytes of every range that exist for a moment of a backward besides what is held, less what is gone by then or not
    there yet.

    late   from the first block on: a row for each of MODES, the furthest that blocks are run again, where they may do
           differently: what later ones kept is taken to be there;  alike: where all do as that mode says: it is gone
    early  at the positions before, where no block keeps anything of that micro-batch
    """

    late: Array
    alike: Array
    early: Array


def moments(
    found: PositionCosts, allowed: Sequence[tuple[str, ...]], block: Sequence[bool], begins: bool
) -> TransientPeaks:
    """Of a weighed choice, in the backward that `begins` a step or another. `allowed` says which of MODES every
    position may do."""
    rows = list(zip(allowed, block, strict=True))
    depth = 1 + max((MODES.index(m) for modes, mine in rows if mine for m in modes), default=0)
    least = np.array([MODES.index(modes[0]) for modes in allowed])
    mixed, alike, held = [], [], []
    for mode in range(depth):
        furthest = np.array([_furthest(modes, mode * mine) for modes, mine in rows])
        mixed.append(_at_once(found, begins, least, furthest))
        alike.append(_at_once(found, begins, np.where(block, mode, 0)))
        held.append(np.where(block, found.kept[mode] + found.entered * (mode > 0), found.kept[0]))
    result = _over_ranges(found, mixed, alike, held, block, begins)
    as_first = [sums(1.0 * (block & (least != mode))) == 0 for mode in range(depth)]
    result.late[0] = np.select(as_first, list(result.alike), result.late[0])
    return result


def _at_once(found: PositionCosts, begins: bool, *modes: NDArray[np.int_]) -> Array:
    """The most that exists at every position, if it does as one of MODES says, by any of some choices of them."""
    training, (summed, most, _) = found.training, found.summed
    backward = training.gathered(summed) + np.maximum.reduce([found.alive(mode, begins) for mode in modes])
    return np.maximum(backward, found.largest + training.summing(summed, most, found.alone))


def _furthest(modes: Sequence[str], furthest: int) -> int:
    """Which of MODES keeps least of some, none of them further than another but the first."""
    first, *more = map(MODES.index, modes)
    return max([first, *(mode for mode in more if mode <= furthest)])


def _over_ranges(
    found: PositionCosts, mixed: Sequence[Array], alike: Sequence[Array], held: Sequence[Array], block: Sequence[bool],
    begins: bool,
) -> TransientPeaks:  # fmt: skip
    """Of every range the most of every position's, as far as blocks are run again, where they may do differently
    (`mixed`) and where they do alike, when they keep `held`: with gradients that wait, less what is not there then.
    What later positions kept, of blocks only where they do alike, is gone when a position's backward runs, and in the
    backward that `begins` a step the earlier positions have no gradients yet, and none has before it."""
    n, plain = len(block), np.where(block, 0.0, found.kept[0])
    starts, ends = spans(n)
    gradients = np.concatenate([[0.0], np.cumsum(found.parts[1] * begins)])
    last, waiting = _waiting(found.items, n)
    middle = np.minimum(following(np.flatnonzero(block), n)[starts], ends)

    def within(most: Array, i: NDArray[np.int_], j: NDArray[np.int_]) -> Array:
        inside, some = np.full(len(most), -NEVER), i < j
        inside[some] = most[place(i[some], j[some], n)]
        return inside

    def most(moment: Array, kept: Array, i: NDArray[np.int_], j: NDArray[np.int_]) -> Array:
        """Between two positions, with what waits before `last`, if what every position `kept` is gone before it."""
        gone = np.concatenate([[0.0], np.cumsum(kept)])
        there = maxima(moment + gone[1:] - gradients[:-1])
        waits = np.maximum(within(there, i, np.minimum(j, last)) + waiting, within(there, np.maximum(i, last), j))
        return np.asarray(waits - gone[ends] + gradients[starts])

    none = gradients[starts] - gradients[ends]
    late = [np.maximum(most(moment, plain, middle, ends), none) for moment in mixed]
    same = [np.maximum(most(m, kept, middle, ends), none) for m, kept in zip(alike, held, strict=True)]
    early, later = most(mixed[0], plain, starts, middle), sums(plain)
    for item in found.items:
        if item.largest:
            early = np.maximum(early, has(item.positions, n) * 2 * item.largest - later)
    return TransientPeaks(np.array(late), np.array(same), early)


def _waiting(items: Sequence[PerStageOnce], n: int) -> tuple[NDArray[np.int_], Array]:
    """Of every range the last position that reads a parameter which an earlier one reads too, and bytes of the
    gradients of all such."""
    starts, ends = spans(n)
    last, waiting = starts.copy(), np.zeros(len(starts))
    for item in items:
        if item.waiting:
            inside = np.array([(starts <= p) & (p < ends) for p in item.positions])
            several = inside.sum(0) > 1
            waiting += several * item.waiting
            last = np.maximum(last, several * (inside * np.array(item.positions)[:, None]).max(0))
    return last, waiting
