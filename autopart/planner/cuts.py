"""The best cut of a row of positions into stages, exactly: minimise sum(f) + (m - 1) max(f) over all cuts.

`candidate` calls `best_cut` for the cut of a plan; docs/planner.md lists the other callers. f[s, i, j] are the seconds
of stage s with positions i..j-1 (`interval_costs`), infinite where they do not fit. For a threshold T, the cut of least
sum(f) among those with max(f) <= T is a shortest path 0 -> n in an acyclic graph. T is lowered from the largest value
that could still win to the least max(f) of any cut; every path found with max(f) = t rules out all T >= t.
`tests/planner/test_plan.py` compares the result with every cut.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopart.cost.compute import Array
from autopart.cost.intervals import NEVER, interval_ends


@dataclass(frozen=True)
class Cut:
    """The first position of every stage, sum(f) + (m - 1) max(f) in seconds, and the least max(f) of any cut."""

    starts: tuple[int, ...]
    seconds: float
    least_max: float


def best_cut(columns: Callable[[int], Array], stages: int, micro_batches: int) -> Cut | None:
    """The best cut; None where none fits. `columns(s)` has f[s, i, j] for all intervals in the order of
    `intervals.interval_ends`."""
    m, bands = micro_batches, _bands([columns(s) for s in range(stages)])
    loosest = _path(bands, NEVER)
    if loosest is None:
        return None
    floor, least = sum(loosest[1]), _least_maximum(bands)
    tight = _path(bands, least)
    assert tight is not None
    best = min((_cut(path, m, least) for path in (loosest, tight)), key=lambda c: c.seconds)
    limit = (best.seconds - floor) / (m - 1) if m > 1 else 0.0
    while limit > least:
        found = _path(bands, limit)
        assert found is not None
        best = min(best, _cut(found, m, least), key=lambda c: c.seconds)
        if sum(found[1]) + (m - 1) * least >= best.seconds:
            break
        limit = min(np.nextafter(max(found[1]), 0.0), (best.seconds - floor) / (m - 1))
    return best


def spans_of(starts: Sequence[int], positions: int) -> list[tuple[int, int]]:
    """The span of every stage, (i, j) for the positions i..j-1, from the first position of each."""
    return list(itertools.pairwise((*starts, positions)))


Path = tuple[tuple[int, ...], tuple[float, ...]]
"""The first position of every stage, and its seconds."""


def _cut(path: Path, m: int, least: float) -> Cut:
    starts, times = path
    return Cut(starts, sum(times) + (m - 1) * max(times), least)


def _bands(columns: Sequence[Array]) -> list[Array]:
    """For every stage band[j, l] = f[j - l - 1, j]: intervals by end and length, up to the longest that fits."""
    n = (math.isqrt(8 * len(columns[0]) + 1) - 1) // 2
    starts, ends = interval_ends(n)
    distinct, lengths = {id(f): f for f in columns}, ends - starts
    longest = max(int(np.max(lengths[np.isfinite(f)], initial=1)) for f in distinct.values())
    short = np.flatnonzero(lengths <= longest)
    at = ends[short], lengths[short] - 1
    bands = {}
    for key, f in distinct.items():
        bands[key] = np.full((n + 1, longest), NEVER)
        bands[key][at] = f[short]
    return [bands[id(f)] for f in columns]


def _reach(n: int, longest: int) -> tuple[Array, Array]:
    """reach [n + 1], 0 at 0 and infinite elsewhere; and a view of it, before[j, l] = reach[j - l - 1], infinite where
    that is no position."""
    padded = np.full(longest + n + 1, NEVER)
    padded[longest] = 0.0
    return padded[longest:], np.lib.stride_tricks.sliding_window_view(padded, longest)[: n + 1, ::-1]


def _path(bands: Sequence[Array], limit: float) -> Path | None:
    """The cut of least sum(f) among those with max(f) <= `limit`; None where there is none."""
    n, every = bands[0].shape[0] - 1, np.arange(bands[0].shape[0])
    reach, before = _reach(n, bands[0].shape[1])
    back: list[NDArray[np.int_]] = []
    for band in bands:
        total = before + (band if limit == NEVER else np.where(band <= limit, band, NEVER))
        back.append(total.argmin(1))
        reach[:] = total[every, back[-1]]
    if not np.isfinite(reach[n]):
        return None
    starts, times, end = [], [], n
    for band, length in zip(reversed(bands), reversed(back), strict=True):
        times.append(float(band[end, length[end]]))
        end -= int(length[end]) + 1
        starts.append(end)
    return tuple(reversed(starts)), tuple(reversed(times))


def _least_maximum(bands: Sequence[Array]) -> float:
    """The least max(f) of any cut."""
    reach, before = _reach(bands[0].shape[0] - 1, bands[0].shape[1])
    for band in bands:
        reach[:] = np.maximum(before, band).min(1)
    return float(reach[-1])
