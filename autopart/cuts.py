"""Where to cut a row of positions into stages, exactly: columns, paths and thresholds.

f[s, i, j] is the least time of stage s with positions i..j-1 within its memory. For a threshold T the cheapest path
0 -> n through columns with f <= T is a shortest path in a graph without cycles; the best of sum(f) + (m - 1) max(f)
over all paths is found by lowering T from the largest value that could still win to the least one that any path meets.

What is told of all ranges of n positions is a row of n (n + 1) / 2 numbers, in the order of `spans`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from autopart.cost import Array
from autopart.schedules import on_its_way
from autopart.weigh import MODES, Crossings, Weighed

NEVER = float("inf")


@lru_cache(maxsize=64)
def spans(n: int) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """All ranges i..j-1 of n positions: every i, every j."""
    starts, ends = np.triu_indices(n + 1, 1)
    return starts, ends


def place(i: int, j: int, n: int) -> int:
    """Where the range i..j-1 stands among all."""
    return i * n - i * (i - 1) // 2 + j - i - 1


@dataclass(frozen=True)
class Cut:
    """The first position of every stage, sum(f) + (m - 1) max(f) in seconds, and the least max(f) of any cut."""

    starts: tuple[int, ...]
    seconds: float
    largest: float


def best_cut(columns: Callable[[int], Array], stages: int, micro_batches: int) -> Cut | None:
    """The best way to cut; `columns(s)` holds f[s, i, j] for all ranges, infinite for what does not fit. None where no
    way fits."""
    fill, bands = micro_batches - 1, _bands([columns(s) for s in range(stages)])
    loosest = _path(bands, NEVER)
    if loosest is None:
        return None
    floor, least = sum(loosest[1]), _least_maximum(bands)
    tight = _path(bands, least)
    assert tight is not None
    best = min((_cut(path, fill, least) for path in (loosest, tight)), key=lambda c: c.seconds)
    limit = (best.seconds - floor) / fill if fill else 0.0
    while limit > least:
        found = _path(bands, limit)
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


def _bands(columns: Sequence[Array]) -> list[Array]:
    """band[j, l] = f[j - l - 1, j]: ranges by where they end and how long they are, none longer than any that fits."""
    n = (math.isqrt(8 * len(columns[0]) + 1) - 1) // 2
    starts, ends = spans(n)
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
    """reach, 0 at the first of n + 1 places and infinite at others, and before[j, l] = reach[j - l - 1], infinite where
    there is none: a view of it."""
    padded = np.full(longest + n + 1, NEVER)
    padded[longest] = 0.0
    return padded[longest:], np.lib.stride_tricks.sliding_window_view(padded, longest)[: n + 1, ::-1]


def _path(bands: Sequence[Array], limit: float) -> Path | None:
    """The path with the least sum, of columns no larger than `limit`."""
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
    """The least largest column of any path."""
    reach, before = _reach(bands[0].shape[0] - 1, bands[0].shape[1])
    for band in bands:
        reach[:] = np.maximum(before, band).min(1)
    return float(reach[-1])


@dataclass
class Ranges:
    """What every range of positions costs under one choice of splits.

    seconds   forward, backward, the share of exposed gradient sync in a turn, messages; nothing run again
    state     bytes of parameters, gradients and optimizer states
    kept      bytes per micro-batch, nothing run again
    takes     bytes of a micro-batch's values that come from earlier ranges
    transient bytes that exist for a moment besides, less what is gone by then;  rerun: likewise if blocks are run again
    stepping  bytes that are made at the end of a step, when nothing is kept
    entered   bytes that several blocks take, kept if one of them is run again
    again     seconds that each of MODES adds at every position
    group     class of every position: equal ones cost the same and may do the same;  least_modes: the one of MODES that
              keeps most of those it may do
    blocks    kind of block -> how many there are;  savings: what running one of the kind again costs and saves
    """

    seconds: Array
    state: Array
    kept: Array
    takes: Array
    transient: Array
    rerun: Array
    stepping: Array
    entered: Array
    again: Array
    group: Sequence[int]
    least_modes: Sequence[str]
    micro_batches: int
    blocks: dict[int, Array] = field(default_factory=dict)
    savings: dict[int, list[Saving]] = field(default_factory=dict)

    def place(self, i: int, j: int) -> int:
        """Where a range stands among all."""
        return place(i, j, len(self.group))

    def held(self, where: NDArray[np.int_] | slice, in_flight: int) -> Array:
        """Bytes of some ranges when most is alive, nothing run again, with that many micro-batches in flight."""
        kept = self.state[where] + in_flight * self.kept[where] + self.transient[where]
        return kept + self.arriving(where, in_flight)

    def arriving(self, where: NDArray[np.int_] | slice, in_flight: int) -> Array:
        """Bytes of messages that are on their way then."""
        return np.asarray(on_its_way(self.takes[where], in_flight, self.micro_batches))

    def within(self, most: float) -> NDArray[np.int_]:
        """The ranges that take at most so many seconds, nothing run again."""
        return np.flatnonzero(self.seconds <= most)

    def least(self, where: NDArray[np.int_], in_flight: int, limit: float, modes: Sequence[str]) -> Array:
        """f of some ranges with that many micro-batches in flight: blocks are run again, those that save most a
        second first, until the range fits."""
        seconds, steps = self.seconds[where], self.state[where] + self.stepping[where] <= limit
        short = self.held(where, in_flight) - limit
        f, over = np.where((short <= 0) & steps, seconds, NEVER), np.flatnonzero((short > 0) & steps)
        if len(over) and self._steps(modes):
            again, needed, _ = self._run_again(where[over], short[over], in_flight, modes)
            f[over] = np.where(needed <= 0, again, NEVER)
        return f

    def lacks(self, in_flight: int, limit: float, modes: Sequence[str]) -> Array:
        """Bytes that every range is above the limit at its smallest."""
        short = self.held(slice(None), in_flight) - limit
        if self._steps(modes):
            _, needed, _ = self._run_again(np.arange(len(short)), np.maximum(short, 0.0), in_flight, modes)
            short = np.minimum(short, needed)
        return np.maximum(short, self.state + self.stepping - limit)

    def modes(self, i: int, j: int, in_flight: int, limit: float, modes: Sequence[str]) -> list[str]:
        """What every position of a range does where it takes its least time: the first blocks of a kind are run
        again."""
        result, where = list(self.least_modes[i:j]), np.array([self.place(i, j)])
        short = self.held(where, in_flight) - limit
        if short[0] > 0 and self._steps(modes):
            _, _, counts = self._run_again(where, short, in_flight, modes)
            for step, count in zip(self._steps(modes), counts, strict=True):
                mine = [p for p in range(i, j) if self.group[p] == step.kind]
                for p in mine[: int(count[0])]:
                    result[p - i] = step.mode
        return result

    def exact(self, i: int, j: int, modes: Sequence[str]) -> float:
        """Seconds of a range whose positions do as `modes` say."""
        pairs = enumerate(zip(modes, self.least_modes[i:j], strict=True), start=i)
        extra = sum(self.again[MODES.index(m), p] - self.again[MODES.index(least), p] for p, (m, least) in pairs)
        return float(self.seconds[self.place(i, j)] + extra)

    def _steps(self, modes: Sequence[str]) -> list[Saving]:
        steps = (s for group in self.savings.values() for s in group if s.mode in modes)
        return sorted(steps, key=lambda s: s.seconds / s.bytes)

    def _run_again(
        self, where: NDArray[np.int_], short: Array, in_flight: int, modes: Sequence[str]
    ) -> tuple[Array, Array, list[Array]]:
        """Run blocks again until nothing is short: seconds, bytes still short, blocks that take each step."""
        steps = self._steps(modes)
        needed = short + in_flight * self.entered[where] + (self.rerun[where] - self.transient[where])
        seconds, counts = self.seconds[where].copy(), []
        for step in steps:
            count = np.clip(np.ceil(needed / (in_flight * step.bytes)), 0, self.blocks[step.kind][where])
            seconds += count * step.seconds
            needed = needed - count * in_flight * step.bytes
            counts.append(count)
        return seconds, needed, counts


@dataclass(frozen=True)
class Saving:
    """What a block saves, per micro-batch in flight, when it takes the step to `mode`: bytes, for seconds."""

    kind: int
    mode: str
    seconds: float
    bytes: float


def ranges(
    found: Weighed,
    group: Sequence[int],
    block: Sequence[bool],
    micro_batches: int,
    turns: int,
    allowed: Sequence[tuple[str, ...]],
) -> Ranges:
    """All ranges of a weighed choice; `turns` is as in `cost.turns`. `allowed` says which of MODES every position may
    do; the class of blocks that may not do the same, or keep as much, is not the same either."""
    n, everywhere = len(group), np.arange(len(group))
    least = [MODES.index(modes[0]) for modes in allowed]
    rerun = np.array([mode > 0 for mode in least])
    each = np.where(rerun, found.kept[least, everywhere] + found.entered, found.kept[0])
    seconds = _sums(found.forward + found.backward + found.again[least, everywhere] + found.sync / turns)
    seconds += exposed(found.beside, found.backward) * (found.training.backwards / turns)
    state, kept = _sums(found.parts.sum(0)), _sums(each)
    largest, alone, training = found.largest.copy(), micro_batches == 1, found.training
    for item in found.items:
        np.maximum.at(largest, list(item.positions), item.largest)
    gathered, summing = training.gathered(found.summed[0]), training.summing(*found.summed[:2], found.alone)
    again = rerun | (np.array(block) & np.array([len(modes) > 1 for modes in allowed]))
    whole = found.kept[0] + found.wide
    transient, possible = (
        _moments(found, largest + np.maximum(largest + gathered + whole * mine, summing), block, alone)
        for mine in (rerun, again)
    )
    later = _sums(np.where(block, 0.0, found.kept[0]))
    stepping, entered = (_sums if training.together else _maxima)(found.stepping), np.zeros(len(seconds))
    summed = _sums(found.summed[2])
    for item in found.items:
        has = _has(item.positions, n)
        if item.largest:
            transient, possible = (np.maximum(x, has * 2 * item.largest - later) for x in (transient, possible))
        stepping = stepping + has * item.stepping if training.together else np.maximum(stepping, has * item.stepping)
        summed += has * item.summed
        seconds += has * (item.forward + item.backward + item.sync / turns)
        state += has * sum(item.parts)
        kept += has * item.kept
        if item.entered:
            entering = _has([p for p in item.positions if rerun[p]], n)
            kept, entered = kept + entering * item.entered, entered + (has & ~entering) * item.entered
    stepping = np.maximum(stepping, training.ending(summed, _maxima(found.summed[1])))
    messages, takes = crossed(found.crossings, n)
    seconds += messages
    classes: dict[tuple[int, bool, tuple[str, ...], tuple[float, ...]], int] = {}
    saves = np.column_stack([*found.kept, found.entered]).round().tolist()
    rows = zip(group, block, allowed, map(tuple, saves), strict=True)
    kind = [classes.setdefault(row, len(classes)) for row in rows]
    where = {number: np.array(kind) == number for (_, isblock, *_), number in classes.items() if isblock}
    modes = {number: may for (_, _, may, _), number in classes.items()}
    return Ranges(
        seconds, state, kept, takes, transient, possible, stepping, entered, found.again, kind,
        [MODES[mode] for mode in least], micro_batches, {k: _sums(mine.astype(float)) for k, mine in where.items()},
        {k: _savings(found, k, mine, modes[k]) for k, mine in where.items()},
    )  # fmt: skip


def exposed(beside: Array, backward: Array) -> Array:
    """Of every range, for how long gradients still travel when its backward is done.

    Backward goes from the last position to the first. When that of p is done, its gradients start to travel, which
    takes beside[p], behind those of later positions: they have come max over p of (sum of beside up to p - sum of
    backward before p) after the end. What positions run again is not counted to their backward. `beside` is
    `Device.beside` times the seconds of the messages: what is left of these is the slowdown of computing meanwhile, and
    is paid in any case. The runtime sends when a message is full, so that the last one may hold more than a position's.
    """
    starts, _ = spans(len(beside))
    if not beside.any():
        return np.zeros(len(starts))
    sent, done = (np.concatenate([[0.0], np.cumsum(each)]) for each in (beside, backward))
    return _maxima(sent[1:] - done[:-1]) - (sent - done)[starts]


def after(beside: Sequence[float], backward: Sequence[float]) -> float:
    """`exposed` of one range, on a clock."""
    now = arrived = 0.0
    for travels, takes in zip(reversed(beside), reversed(backward), strict=True):
        now += takes
        arrived = max(arrived, now) + travels
    return arrived - now


def _moments(found: Weighed, moment: Array, block: Sequence[bool], alone: bool) -> Array:
    """Of every range the most that exists for a moment, less what is not there then: what later positions kept, other
    than blocks, is gone when a position's backward runs, and of a micro-batch that is `alone` in a step the earlier
    positions have no gradients yet. At least nothing."""
    starts, ends = spans(len(moment))
    kept = np.concatenate([[0.0], np.cumsum(np.where(block, 0.0, found.kept[0]))])
    gradients = np.concatenate([[0.0], np.cumsum(found.parts[1] * alone)])
    most = _maxima(moment + kept[1:] - gradients[:-1]) - kept[ends] + gradients[starts]
    return np.maximum(most, 0.0)


def _savings(found: Weighed, kind: int, where: NDArray[np.bool_], modes: Sequence[str]) -> list[Saving]:
    """The steps of one kind of block from the first of the modes it may do towards keeping less, each dearer than the
    one before; those that another beats are left out. Blocks that take other values may take other times: the longest
    counts."""
    first, *more = [MODES.index(mode) for mode in modes]
    start = found.kept[first, where] + found.entered[where] * (first > 0)
    hull = [(first, 0.0, float(start.min()))]
    for mode in more:
        less = found.kept[mode, where] + found.entered[where] - start
        again = (found.again[mode, where] - found.again[first, where]).max()
        point = (mode, float(again), float(less.max() + start.min()))
        if point[2] >= hull[-1][2]:
            continue
        while len(hull) > 1 and _slope(hull[-1], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return [Saving(kind, MODES[b[0]], b[1] - a[1], a[2] - b[2]) for a, b in itertools.pairwise(hull)]


def _slope(one: tuple[int, float, float], other: tuple[int, float, float]) -> float:
    return (other[1] - one[1]) / (one[2] - other[2])


def _sums(values: Array) -> Array:
    """The sum of every range."""
    starts, ends = spans(len(values))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return total[ends] - total[starts]


def _maxima(values: Array) -> Array:
    """The maximum of every range."""
    return np.concatenate([np.maximum.accumulate(values[i:]) for i in range(len(values))])


def _has(positions: Sequence[int], n: int) -> NDArray[np.bool_]:
    """Whether a range has one of the positions."""
    following = np.full(n + 1, n)
    for p in sorted(positions, reverse=True):
        following[: p + 1] = p
    starts, ends = spans(n)
    return following[starts] < ends


def crossed(crossings: Iterable[Crossings], n: int) -> tuple[Array, Array]:
    """Of every range of n positions: seconds of the messages of what it takes from earlier ones and gives to later
    ones, and bytes of what it takes."""
    starts, ends = spans(n)
    seconds, takes, following = np.zeros(len(starts)), np.zeros(len(starts)), np.zeros((2, n + 1))
    for values in crossings:
        near = (values.users == values.homes + 1) & (not values.one)
        for row, amount in zip(following, (values.seconds, values.size), strict=True):
            np.add.at(row, values.users[near], amount)
        far = np.flatnonzero(~near)
        for where in [far] if values.one else far[:, None]:
            home, users = int(values.homes[where[0]]), values.users[where].tolist()
            taken = _has(users, n) & (starts > home)
            given = (starts <= home) & (home < ends) & (ends <= max(users))
            seconds += (taken.astype(float) + given) * values.seconds
            takes += taken * values.size
    return seconds + following[0, starts] + following[0, ends], takes + following[1, starts]
