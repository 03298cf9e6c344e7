"""What every range of positions costs under one choice of splits: seconds, and bytes when most is alive.

What is told of all ranges of n positions is a row of n (n + 1) / 2 numbers, in the order of `rows.spans`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autopart.cost.compute import Array
from autopart.cost.intervals import NEVER, has, maxima, place, spans, sums
from autopart.cost.position_costs import MODES, Crossings, PositionCosts
from autopart.cost.transient_peaks import TransientPeaks, moments
from autopart.plan.schedules import receive_buffer_bytes

Rows = NDArray[np.int_] | slice


@dataclass
class UniformCheckpointing:
    """All blocks of every range as one of MODES says: where they may, seconds more, and bytes less per micro-batch,
    than as the first that they may."""

    possible: NDArray[np.bool_]
    seconds: Array
    bytes: Array


@dataclass
class IntervalCosts:
    """What every range of positions costs under one choice of splits.

    seconds   forward, backward, the share of exposed gradient sync in a turn, messages; nothing run again
    state     bytes of parameters, gradients and optimizer states
    kept      bytes per micro-batch, nothing run again;  blocks_kept: of them what blocks keep
    takes     bytes of a micro-batch's values that come from earlier ranges
    first     what exists besides in a step's first backward, before which there are no gradients;  others: in others
    stepping  bytes that are made at the end of a step, when nothing is kept
    entered   bytes that several blocks take, kept if one of them is run again
    again     seconds that each of MODES adds at every position
    group     class of every position: equal ones cost the same and may do the same;  least_modes: the one of MODES that
              keeps most of those it may do
    blocks    kind of block -> how many there are;  savings: for each of MODES as the furthest that blocks are run
              again, kind of block -> what running one of it again costs and saves;  alike: of each of MODES
    """

    seconds: Array
    state: Array
    kept: Array
    blocks_kept: Array
    takes: Array
    first: TransientPeaks
    others: TransientPeaks
    stepping: Array
    entered: Array
    again: Array
    group: Sequence[int]
    least_modes: Sequence[str]
    micro_batches: int
    blocks: dict[int, Array] = field(default_factory=dict)
    savings: Sequence[dict[int, list[CheckpointStep]]] = ()
    alike: Sequence[UniformCheckpointing] = ()

    def place(self, i: int, j: int) -> int:
        """Where a range stands among all."""
        return place(i, j, len(self.group))

    def held(self, where: Rows, in_flight: int) -> Array:
        """Bytes of some ranges when most is alive, nothing run again, with that many micro-batches in flight."""
        state = self.state[where] + self.arriving(where, in_flight)
        each = [
            flights * self.kept[where] + np.maximum(m.late[0, where], m.early[where] - self.blocks_kept[where])
            for m, flights in self._backwards(in_flight)
        ]
        return np.asarray(state + np.maximum.reduce(each))

    def _backwards(self, in_flight: int) -> list[tuple[TransientPeaks, int]]:
        """The moments that count, with the micro-batches in flight then. Where all are in flight before the first
        backward, there are no gradients then, and one micro-batch less afterwards."""
        if in_flight < self.micro_batches:
            return [(self.others, in_flight)]
        return [(self.first, in_flight), (self.others, in_flight - 1)][:in_flight]

    def arriving(self, where: Rows, in_flight: int) -> Array:
        """Bytes of messages that are on their way then."""
        return np.asarray(receive_buffer_bytes(self.takes[where], in_flight, self.micro_batches))

    def within(self, most: float) -> NDArray[np.int_]:
        """The ranges that take at most so many seconds, nothing run again."""
        return np.flatnonzero(self.seconds <= most)

    def least(self, where: NDArray[np.int_], in_flight: int, limit: float, modes: Sequence[str]) -> Array:
        """f of some ranges with that many micro-batches in flight: blocks are run again, those that save most a
        second first, until the range fits."""
        seconds, steps = self.seconds[where], self.state[where] + self.stepping[where] <= limit
        short = self.held(where, in_flight) - limit
        f, over = np.where((short <= 0) & steps, seconds, NEVER), np.flatnonzero((short > 0) & steps)
        for again in self._ways_to_run_again(where[over], in_flight, limit, modes) if len(over) else ():
            f[over] = np.minimum(f[over], np.where(again.short <= 0, again.seconds, NEVER))
        return f

    def lacks(self, in_flight: int, limit: float, modes: Sequence[str]) -> Array:
        """Bytes that every range is above the limit at its smallest."""
        every = slice(None)
        short = self.held(every, in_flight) - limit
        for again in self._ways_to_run_again(every, in_flight, limit, modes):
            short = np.minimum(short, again.short)
        return np.maximum(short, self.state + self.stepping - limit)

    def modes(self, i: int, j: int, in_flight: int, limit: float, modes: Sequence[str]) -> list[str]:
        """What every position of a range does where it takes its least time: the first blocks of a kind are run
        again."""
        result, where = list(self.least_modes[i:j]), np.array([self.place(i, j)])
        if self.held(where, in_flight)[0] <= limit:
            return result
        ways = [w for w in self._ways_to_run_again(where, in_flight, limit, modes) if w.short[0] <= 0]
        for step, count in min(ways, key=lambda w: w.seconds[0]).counts if ways else ():
            mine = [p for p in range(i, j) if self.group[p] == step.kind]
            for p in mine[: int(count[0])]:
                result[p - i] = step.mode
        return result

    def exact(self, i: int, j: int, modes: Sequence[str]) -> float:
        """Seconds of a range whose positions do as `modes` say."""
        pairs = enumerate(zip(modes, self.least_modes[i:j], strict=True), start=i)
        extra = sum(self.again[MODES.index(m), p] - self.again[MODES.index(least), p] for p, (m, least) in pairs)
        return float(self.seconds[self.place(i, j)] + extra)

    def _ways_to_run_again(self, where: Rows, in_flight: int, limit: float, modes: Sequence[str]) -> Iterator[Again]:
        """Run blocks again until some ranges fit, as far as each of MODES; and all of them alike."""
        base, each = self.state[where] + self.arriving(where, in_flight) - limit, self.kept[where] + self.entered[where]
        for furthest, savings in enumerate(self.savings):
            steps = [s for group in savings.values() for s in group if s.mode in modes]
            seconds, counts, short = self.seconds[where].copy(), [], []
            for moment, flights in self._backwards(in_flight):
                held = base + flights * each
                short.append((held + moment.late[furthest, where], flights))
                short.append((held + moment.early[where] - self.blocks_kept[where], flights - 1))
            for step in sorted(steps, key=lambda s: s.seconds / s.bytes):
                needed = np.maximum.reduce([lacks / flights for lacks, flights in short if flights])
                count = np.clip(np.ceil(needed / step.bytes), 0, self.blocks[step.kind][where])
                seconds += count * step.seconds
                short = [(lacks - count * flights * step.bytes, flights) for lacks, flights in short]
                counts.append((step, count))
            if steps:
                yield Again(seconds, np.maximum.reduce([lacks for lacks, _ in short]), counts)
        for mode, alike in enumerate(self.alike):
            if MODES[mode] in modes:
                short = []
                for moment, flights in self._backwards(in_flight):
                    held = base + flights * (each - alike.bytes[where])
                    early = moment.early[where] - self.blocks_kept[where] + alike.bytes[where]
                    short.append((held + np.maximum(moment.alike[mode, where], early), flights))
                lack = np.where(alike.possible[where], np.maximum.reduce([lacks for lacks, _ in short]), NEVER)
                counts = [(CheckpointStep(k, MODES[mode], 0.0, 0.0), many[where]) for k, many in self.blocks.items()]
                yield Again(self.seconds[where] + alike.seconds[where], lack, counts)


@dataclass(frozen=True)
class Again:
    """Ranges with blocks run again: seconds, bytes still short, and how many blocks take each step."""

    seconds: Array
    short: Array
    counts: Sequence[tuple[CheckpointStep, Array]]


@dataclass(frozen=True)
class CheckpointStep:
    """What a block saves, per micro-batch in flight, when it takes the step to `mode`: bytes, for seconds."""

    kind: int
    mode: str
    seconds: float
    bytes: float


def ranges(
    found: PositionCosts,
    group: Sequence[int],
    block: Sequence[bool],
    micro_batches: int,
    turns: int,
    allowed: Sequence[tuple[str, ...]],
) -> IntervalCosts:
    """All ranges of a weighed choice; `turns` is as in `cost.turns`. `allowed` says which of MODES every position may
    do; the class of blocks that may not do the same, or keep as much, is not the same either."""
    n, everywhere = len(group), np.arange(len(group))
    least = [MODES.index(modes[0]) for modes in allowed]
    rerun = np.array([mode > 0 for mode in least])
    each = np.where(rerun, found.kept[least, everywhere] + found.entered, found.kept[0])
    seconds = sums(found.forward + found.backward + found.again[least, everywhere] + found.sync / turns)
    seconds += exposed(found.beside, found.backward) * (found.training.backwards / turns)
    state, kept, blocks_kept = (sums(x) for x in (found.parts.sum(0), each, np.where(block, each, 0.0)))
    first, others = (moments(found, allowed, block, begins) for begins in (True, False))
    depth, training = len(first.late), found.training
    stepping, entered = (sums if training.together else maxima)(found.stepping), np.zeros(len(seconds))
    sent = sums(found.summed[2])
    for item in found.items:
        inside = has(item.positions, n)
        stepping = (np.add if training.together else np.maximum)(stepping, inside * item.stepping)
        sent += inside * item.summed
        seconds += inside * (item.forward + item.backward + item.sync / turns)
        state += inside * sum(item.parts)
        kept += inside * item.kept
        if item.entered:
            entering = has([p for p in item.positions if rerun[p]], n)
            kept, entered = kept + entering * item.entered, entered + (inside & ~entering) * item.entered
    stepping = np.maximum(stepping, training.ending(sent, maxima(found.summed[1])))
    messages, takes = crossed(found.crossings, n)
    seconds += messages
    classes: dict[tuple[int, bool, tuple[str, ...], tuple[float, ...]], int] = {}
    saves = np.column_stack([*found.kept, found.entered]).round().tolist()
    rows = zip(group, block, allowed, map(tuple, saves), strict=True)
    kind = [classes.setdefault(row, len(classes)) for row in rows]
    where = {number: np.array(kind) == number for (_, isblock, *_), number in classes.items() if isblock}
    modes = {number: may for (_, _, may, _), number in classes.items()}
    return IntervalCosts(
        seconds, state, kept, blocks_kept, takes, first, others, stepping, entered, found.again, kind,
        [MODES[mode] for mode in least], micro_batches, {k: sums(mine.astype(float)) for k, mine in where.items()},
        [{k: _savings(found, k, mine, modes[k], furthest) for k, mine in where.items()} for furthest in range(depth)],
        [_alike(found, allowed, block, each, mode) for mode in range(depth)],
    )  # fmt: skip


def _alike(
    found: PositionCosts, allowed: Sequence[tuple[str, ...]], block: Sequence[bool], each: Array, mode: int
) -> UniformCheckpointing:
    """All blocks as one of MODES says; `each` position keeps so much as the first that it may."""
    cannot = [mine and MODES[mode] not in modes for modes, mine in zip(allowed, block, strict=True)]
    least = [MODES.index(modes[0]) for modes in allowed]
    more = found.again[mode] - found.again[least, np.arange(len(block))]
    less = each - found.kept[mode] - found.entered * (mode > 0)
    return UniformCheckpointing(
        sums(np.array(cannot, dtype=float)) == 0, sums(np.where(block, more, 0.0)), sums(np.where(block, less, 0.0))
    )


def exposed(beside: Array, backward: Array) -> Array:
    """Of every range, for how long gradients still travel when its backward is done.

    Backward goes from the last position to the first. When that of p is done, its gradients start to travel, which
    takes beside[p], behind those of later positions: they have come max over p of (sum of beside up to p - sum of
    backward before p) after the end. What positions run again is not counted to their backward. `beside` is
    `Device.overlapped_share` times the seconds of the messages: what is left of these is the slowdown of computing
    meanwhile, and is paid in any case. The runtime sends when a message is full, so that the last one may hold more
    than a position's.
    """
    starts, _ = spans(len(beside))
    if not beside.any():
        return np.zeros(len(starts))
    sent, done = (np.concatenate([[0.0], np.cumsum(each)]) for each in (beside, backward))
    return maxima(sent[1:] - done[:-1]) - (sent - done)[starts]


def after(beside: Sequence[float], backward: Sequence[float]) -> float:
    """`exposed` of one range, on a clock."""
    now = arrived = 0.0
    for travels, takes in zip(reversed(beside), reversed(backward), strict=True):
        now += takes
        arrived = max(arrived, now) + travels
    return arrived - now


def _savings(
    found: PositionCosts, kind: int, where: NDArray[np.bool_], modes: Sequence[str], furthest: int
) -> list[CheckpointStep]:
    """The steps of one kind of block from the first of the modes it may do towards keeping less, each dearer than the
    one before; those that another beats are left out. Blocks that take other values may take other times: the longest
    counts."""
    first, *more = [k for k in map(MODES.index, modes) if k <= furthest or MODES[k] == modes[0]]
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
    return [CheckpointStep(kind, MODES[b[0]], b[1] - a[1], a[2] - b[2]) for a, b in itertools.pairwise(hull)]


def _slope(one: tuple[int, float, float], other: tuple[int, float, float]) -> float:
    return (other[1] - one[1]) / (one[2] - other[2])


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
            taken = has(users, n) & (starts > home)
            given = (starts <= home) & (home < ends) & (ends <= max(users))
            seconds += (taken.astype(float) + given) * values.seconds
            takes += taken * values.size
    return seconds + following[0, starts] + following[0, ends], takes + following[1, starts]
