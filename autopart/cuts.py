"""Where to cut a row of positions into stages, exactly: columns, paths and thresholds.

f[s, i, j] is the least time of stage s with positions i..j-1 within its memory. For a threshold T the cheapest path
0 -> n through columns with f <= T is a shortest path in a graph without cycles; the best of sum(f) + (m - 1) max(f)
over all paths is found by lowering T from the largest value that could still win to the least one that any path meets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autopart.weigh import MODES, Array, Crossing, Weighed

NEVER = float("inf")


@dataclass(frozen=True)
class Cut:
    """The first position of every stage, sum(f) + (m - 1) max(f) in seconds, and the least max(f) of any cut."""

    starts: tuple[int, ...]
    seconds: float
    largest: float


def best_cut(columns: Callable[[int], Array], stages: int, micro_batches: int) -> Cut | None:
    """The best way to cut; `columns(s)` holds f[s, i, j] for all i, j (infinite where j <= i or what does not fit).
    None where no way fits."""
    fill = micro_batches - 1
    loosest = _path(columns, stages, NEVER)
    if loosest is None:
        return None
    floor, least = sum(loosest[1]), _least_maximum(columns, stages)
    tight = _path(columns, stages, least)
    assert tight is not None
    best = min((_cut(path, fill, least) for path in (loosest, tight)), key=lambda c: c.seconds)
    limit = (best.seconds - floor) / fill if fill else 0.0
    while limit > least:
        found = _path(columns, stages, limit)
        assert found is not None
        best = min(best, _cut(found, fill, least), key=lambda c: c.seconds)
        if sum(found[1]) + fill * least >= best.seconds:
            break
        limit = min(np.nextafter(max(found[1]), 0.0), (best.seconds - floor) / fill)
    return best


Path = tuple[tuple[int, ...], tuple[float, ...]]
"""The first position of every stage, and its seconds."""


def _cut(path: Path, fill: int, least: float) -> Cut:
    starts, times = path
    return Cut(starts, sum(times) + fill * max(times), least)


def _path(columns: Callable[[int], Array], stages: int, limit: float) -> Path | None:
    """The path with the least sum, of columns no larger than `limit`."""
    n = columns(0).shape[0] - 1
    reach = np.full(n + 1, NEVER)
    reach[0] = 0.0
    back: list[NDArray[np.int_]] = []
    for stage in range(stages):
        f = columns(stage)
        total = reach[:, None] + np.where(f <= limit, f, NEVER)
        back.append(total.argmin(0))
        reach = total.min(0)
    if not np.isfinite(reach[n]):
        return None
    starts, end = [], n
    for stage in range(stages - 1, -1, -1):
        starts.append(int(back[stage][end]))
        end = starts[-1]
    starts.reverse()
    ends = [*starts[1:], n]
    return tuple(starts), tuple(float(columns(s)[i, j]) for s, (i, j) in enumerate(zip(starts, ends, strict=True)))


def _least_maximum(columns: Callable[[int], Array], stages: int) -> float:
    """The least largest column of any path."""
    reach = np.full(columns(0).shape[0], NEVER)
    reach[0] = 0.0
    for stage in range(stages):
        reach = np.maximum(reach[:, None], columns(stage)).min(0)
    return float(reach[-1])


@dataclass
class Ranges:
    """What every range of positions i..j-1 costs under one choice of splits, as matrices over (i, j).

    seconds   forward, backward, the share of gradient sync in a micro-batch, messages; nothing run again
    state     bytes of parameters, gradients and optimizer states
    kept      bytes per micro-batch, nothing run again;  transient: bytes that exist for a moment
    entered   bytes that several blocks take, kept if one of them is run again
    again     seconds that each of MODES adds at every position
    group     class of every position;  block: whether it is a numbered block;  forced: what all blocks have to do
    blocks    kind of block -> how many there are;  savings: what running one of the kind again costs and saves
    """

    seconds: Array
    state: Array
    kept: Array
    transient: Array
    entered: Array
    again: Array
    group: Sequence[int]
    block: Sequence[bool]
    forced: str | None
    blocks: dict[int, Array] = field(default_factory=dict)
    savings: dict[int, list[Saving]] = field(default_factory=dict)

    def least(self, in_flight: int, limit: float, modes: Sequence[str]) -> Array:
        """f[i, j] with that many micro-batches in flight: blocks are run again, those that save most a second first,
        until the range fits."""
        short = self.state + in_flight * self.kept + self.transient - limit
        f = np.where(short <= 0, self.seconds, NEVER)
        where = np.nonzero((short > 0) & np.isfinite(self.seconds))
        if len(where[0]) and self._steps(modes):
            seconds, needed, _ = self._run_again(where, short[where], in_flight, modes)
            f[where] = np.where(needed <= 0, seconds, NEVER)
        return f

    def lacks(self, in_flight: int, limit: float, modes: Sequence[str]) -> Array:
        """Bytes that every range [i, j] is above the limit at its smallest; infinite where it is empty."""
        short = self.state + in_flight * self.kept + self.transient - limit
        where = np.nonzero(np.isfinite(self.seconds))
        result = np.full_like(short, NEVER)
        result[where] = short[where]
        if self._steps(modes):
            _, needed, _ = self._run_again(where, np.maximum(short[where], 0.0), in_flight, modes)
            result[where] = np.minimum(short[where], needed)
        return result

    def modes(self, i: int, j: int, in_flight: int, limit: float, modes: Sequence[str]) -> list[str]:
        """What every position of a range does where it takes its least time: the first blocks of a kind are run
        again."""
        result = ["none" if self.forced is None or not b else self.forced for b in self.block[i:j]]
        short = self.state[i, j] + in_flight * self.kept[i, j] + self.transient[i, j] - limit
        if short > 0 and self._steps(modes):
            where = np.array([i]), np.array([j])
            _, _, counts = self._run_again(where, np.array([short]), in_flight, modes)
            for step, count in zip(self._steps(modes), counts, strict=True):
                mine = [p for p in range(i, j) if self.block[p] and self.group[p] == step.kind]
                for p in mine[: int(count[0])]:
                    result[p - i] = step.mode
        return result

    def exact(self, i: int, j: int, modes: Sequence[str]) -> float:
        """Seconds of a range whose positions do as `modes` say."""
        extra = 0.0 if self.forced else sum(self.again[MODES.index(m), i + k] for k, m in enumerate(modes))
        return float(self.seconds[i, j] + extra)

    def _steps(self, modes: Sequence[str]) -> list[Saving]:
        steps = (s for group in self.savings.values() for s in group if s.mode in modes)
        return sorted(steps, key=lambda s: s.seconds / s.bytes)

    def _run_again(
        self, where: tuple[NDArray[np.int_], ...], short: Array, in_flight: int, modes: Sequence[str]
    ) -> tuple[Array, Array, list[Array]]:
        """Run blocks again until nothing is short: seconds, bytes still short, blocks that take each step."""
        steps = self._steps(modes)
        needed = short + in_flight * self.entered[where] + max(s.transient for s in steps)
        seconds, counts = self.seconds[where].copy(), []
        for step in steps:
            count = np.clip(np.ceil(needed / (in_flight * step.bytes)), 0, self.blocks[step.kind][where])
            seconds += count * step.seconds
            needed = needed - count * in_flight * step.bytes
            counts.append(count)
        return seconds, needed, counts


@dataclass(frozen=True)
class Saving:
    """What a block saves, per micro-batch in flight, when it goes from `before` to `mode`: bytes, for seconds; and the
    bytes that exist while it is run again."""

    kind: int
    before: str
    mode: str
    seconds: float
    bytes: float
    transient: float


def ranges(
    found: Weighed, group: Sequence[int], block: Sequence[bool], micro_batches: int, forced: str | None = None
) -> Ranges:
    """All ranges of a weighed choice. With `forced`, all blocks recompute so."""
    n, mode, isblock = len(group), MODES.index(forced or "none"), np.array(block)
    again = found.again[mode] * isblock
    each = np.where(isblock & (mode > 0), found.kept[mode] + found.entered, found.kept[0])
    seconds = _sums(found.forward + found.backward + again + found.sync / micro_batches)
    state, kept = _sums(found.parts.sum(0)), _sums(each)
    largest, gathered, entered = _maxima(found.largest), _maxima(found.gathered), np.zeros((n + 1, n + 1))
    rerun = _maxima(found.kept[0] * isblock) if mode else np.zeros((n + 1, n + 1))
    for item in found.items:
        has = _has(item.positions, n)
        seconds += has * (item.forward + item.backward + item.sync / micro_batches)
        state += has * sum(item.parts)
        kept += has * item.kept
        kept, entered = kept + has * item.entered * (mode > 0), entered + has * item.entered * (mode == 0)
        largest = np.maximum(largest, has * item.largest)
    for crossing in found.crossings:
        _send(seconds, crossing)
    seconds[np.tril_indices(n + 1)] = NEVER
    kinds = sorted({g for g, b in zip(group, block, strict=True) if b})
    where = {k: np.array([g == k and b for g, b in zip(group, block, strict=True)]) for k in kinds}
    blocks = {k: _sums(where[k].astype(float)) for k in kinds}
    return Ranges(
        seconds, state, kept, 2 * largest + gathered + rerun, entered, found.again, group, block, forced, blocks,
        {} if forced else {k: _savings(found, k, where[k]) for k in kinds},
    )  # fmt: skip


def _savings(found: Weighed, kind: int, where: NDArray[np.bool_]) -> list[Saving]:
    """The steps of one kind of block towards keeping less, each dearer than the one before; those that another beats
    are left out. Of blocks that differ at their edges the least saving counts."""
    again = found.again[:, where].max(1)
    whole = found.kept[0, where]
    kept = [whole.min(), *((found.kept[m, where] + found.entered[where] - whole).max() + whole.min() for m in (1, 2))]
    points = [(0, 0.0, kept[0])] + [(m, float(again[m]), float(kept[m])) for m in (1, 2)]
    hull = [points[0]]
    for point in points[1:]:
        if point[2] >= hull[-1][2]:
            continue
        while len(hull) > 1 and _slope(hull[-1], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return [
        Saving(kind, MODES[a[0]], MODES[b[0]], b[1] - a[1], a[2] - b[2], float(found.kept[0, where].max()))
        for a, b in zip(hull, hull[1:], strict=False)
    ]


def _slope(one: tuple[int, float, float], other: tuple[int, float, float]) -> float:
    return (other[1] - one[1]) / (one[2] - other[2])


def _sums(values: Array) -> Array:
    """sum(values[i:j]) for all i, j."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    return total[None, :] - total[:, None]


def _maxima(values: Array) -> Array:
    """max(values[i:j]) for all i, j; 0 where the range is empty."""
    n = len(values)
    result = np.zeros((n + 1, n + 1))
    for i in range(n):
        result[i, i + 1 :] = np.maximum.accumulate(values[i:])
    return result


def _has(positions: Sequence[int], n: int) -> NDArray[np.bool_]:
    """Whether a range has one of the positions."""
    following = np.full(n + 1, n)
    for p in sorted(positions, reverse=True):
        following[: p + 1] = p
    return following[:, None] < np.arange(n + 1)[None, :]


def _send(seconds: Array, crossing: Crossing) -> None:
    """A range pays for a value that it takes from an earlier one, and for one that it gives to a later one."""
    n = seconds.shape[0] - 1
    takes = _has(crossing.users, n)
    takes[: crossing.home + 1] = False
    gives = np.zeros_like(takes)
    gives[: crossing.home + 1, crossing.home + 1 : max(crossing.users) + 1] = True
    seconds += (takes.astype(float) + gives) * crossing.seconds
