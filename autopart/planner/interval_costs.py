"""Seconds and peak bytes of every interval of positions under one choice of strategies.

An array over all intervals of n positions has n (n + 1) / 2 numbers, in the order of
`intervals.interval_ends`. Peak bytes are read from the events of `cost.liveness` by `cost.transient_peaks`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autopart.cost.compute import Array
from autopart.cost.intervals import NEVER, contains_any, interval_index, interval_maxima, interval_sums
from autopart.cost.liveness import MODES, backwards
from autopart.cost.position_costs import PositionCosts
from autopart.cost.transient_peaks import TransientPeaks, transient_peaks
from autopart.plan.schedules import receive_buffer_bytes
from autopart.planner.checkpoint_steps import (
    Checkpointed,
    CheckpointStep,
    UniformCheckpointing,
    checkpoint_steps,
    uniform_checkpointing,
)
from autopart.planner.interval_seconds import crossed, exposed_in_step

Where = NDArray[np.int_] | slice
"""Indices of intervals, or all."""


@dataclass
class IntervalCosts:
    """The costs of every interval under one choice of strategies. Seconds and bytes are those with every position in
    the first checkpointing mode that it may use. Arrays are [intervals] but where another shape is told.

    seconds                forward, backward, exposed sync of weights / amortization, messages
    state_bytes            of parameters, gradients and optimizer states
    saved_bytes            of a micro-batch: saved activations, and received values that no position saves
    block_saved_bytes      the part of `saved_bytes` that blocks save
    received_bytes         of a micro-batch's values from earlier intervals
    first_backward         transient bytes in the first backward of a step, before which no gradients exist
    later_backward         transient bytes in a later backward
    end_of_step_workspace  bytes allocated at the end of a step
    host_bytes             on the host, of the optimizer's states and its copy of the parameters
    host_limit             bytes that a rank may have on its host
    block_input_bytes      of values that several blocks read; saved if one of these blocks is recomputed
    recompute_seconds      [MODES, positions]: seconds that the mode adds to the backward
    checkpoint_classes     [positions]: class, finer than the segment class: positions of one class save the same bytes
                           in every mode and may use the same modes
    least_modes            [positions]: the first mode that the position may use
    blocks                 checkpoint class -> [intervals]: number of blocks of the class
    savings                [MODES]: checkpoint class -> the steps that a block may take, none beyond the mode
    uniform                [MODES]: the costs where all blocks use the mode
    """

    seconds: Array
    state_bytes: Array
    saved_bytes: Array
    block_saved_bytes: Array
    received_bytes: Array
    first_backward: TransientPeaks
    later_backward: TransientPeaks
    end_of_step_workspace: Array
    block_input_bytes: Array
    recompute_seconds: Array
    checkpoint_classes: Sequence[int]
    least_modes: Sequence[str]
    micro_batches: int
    host_bytes: Array
    host_limit: float = NEVER
    blocks: dict[int, Array] = field(default_factory=dict)
    savings: Sequence[dict[int, list[CheckpointStep]]] = ()
    uniform: Sequence[UniformCheckpointing] = ()

    def index(self, i: int, j: int) -> int:
        """The index of the interval [i, j)."""
        return interval_index(i, j, len(self.checkpoint_classes))

    def peak_bytes(self, where: Where, in_flight: int) -> Array:
        """Peak bytes of the backwards of some intervals with `in_flight` micro-batches in flight. The peak at the end
        of a step is state_bytes + end_of_step_workspace."""
        state = self.state_bytes[where] + self.message_bytes(where, in_flight)
        each = [
            flights * self.saved_bytes[where]
            + np.maximum(peaks.mixed[0, where], peaks.before_blocks[where] - self.block_saved_bytes[where])
            for peaks, flights in self._backwards(in_flight)
        ]
        return np.asarray(state + np.maximum.reduce(each))

    def _backwards(self, in_flight: int) -> list[tuple[TransientPeaks, int]]:
        """The transient bytes of each of `liveness.backwards`, and the micro-batches in flight as it starts."""
        peaks = {True: self.first_backward, False: self.later_backward}
        return [(peaks[b.first], b.in_flight) for b in backwards(in_flight, self.micro_batches)]

    def message_bytes(self, where: Where, in_flight: int) -> Array:
        """Bytes of received values that wait for the stage."""
        return np.asarray(receive_buffer_bytes(self.received_bytes[where], in_flight, self.micro_batches))

    def within(self, most: float) -> NDArray[np.int_]:
        """The intervals that take at most so many seconds."""
        return np.flatnonzero(self.seconds <= most)

    def least_seconds(self, where: NDArray[np.int_], in_flight: int, limit: float, modes: Sequence[str]) -> Array:
        """f of some intervals under a limit of bytes; infinite for an interval that cannot fit. Blocks of an interval
        above the limit take steps to `modes`, the steps of most bytes a second first, until the interval fits."""
        step_fits = self.state_bytes[where] + self.end_of_step_workspace[where] <= limit
        step_fits &= self.host_bytes[where] <= self.host_limit
        fits = self.peak_bytes(where, in_flight) <= limit
        f, over = np.where(fits & step_fits, self.seconds[where], NEVER), np.flatnonzero(~fits & step_fits)
        for found in self._checkpointed(where[over], in_flight, limit, modes) if len(over) else ():
            f[over] = np.minimum(f[over], np.where(found.shortfall <= 0, found.seconds, NEVER))
        return f

    def shortfall(self, in_flight: int, limit: float, modes: Sequence[str]) -> Array:
        """Peak bytes of every interval - limit, with the checkpointing for which this is least; or what its host
        lacks, if that is more."""
        every = slice(None)
        shortfall = self.peak_bytes(every, in_flight) - limit
        for found in self._checkpointed(every, in_flight, limit, modes):
            shortfall = np.minimum(shortfall, found.shortfall)
        shortfall = np.maximum(shortfall, self.state_bytes + self.end_of_step_workspace - limit)
        return np.maximum(shortfall, self.host_bytes - self.host_limit)

    def modes(self, i: int, j: int, in_flight: int, limit: float, modes: Sequence[str]) -> tuple[list[str], float]:
        """The mode of every position of [i, j) with which the interval takes `least_seconds`, and the peak bytes of the
        interval with these modes. Of blocks of one class, the first take the steps."""
        result, where = list(self.least_modes[i:j]), np.array([self.index(i, j)])
        peak, end = self.peak_bytes(where, in_flight)[0], self.state_bytes[where] + self.end_of_step_workspace[where]
        over = peak > limit
        fitting = [w for w in self._checkpointed(where, in_flight, limit, modes) if w.shortfall[0] <= 0] if over else []
        if fitting:
            fastest = min(fitting, key=lambda w: w.seconds[0])
            peak = limit + fastest.shortfall[0]
            for step, count in fastest.counts:
                mine = [p for p in range(i, j) if self.checkpoint_classes[p] == step.checkpoint_class]
                for p in mine[: int(count[0])]:
                    result[p - i] = step.mode
        return result, float(max(peak, end[0]))

    def exact_seconds(self, i: int, j: int, modes: Sequence[str]) -> float:
        """Seconds of the interval [i, j) whose positions use `modes`."""
        pairs = enumerate(zip(modes, self.least_modes[i:j], strict=True), start=i)
        extra = sum(
            self.recompute_seconds[MODES.index(mode), p] - self.recompute_seconds[MODES.index(least), p]
            for p, (mode, least) in pairs
        )
        return float(self.seconds[self.index(i, j)] + extra)

    def _checkpointed(self, where: Where, in_flight: int, limit: float, modes: Sequence[str]) -> Iterator[Checkpointed]:
        """Some intervals with checkpointed blocks: for each of MODES, blocks take steps up to that mode until the
        interval fits; and for each of MODES, all blocks use it."""
        base = self.state_bytes[where] + self.message_bytes(where, in_flight) - limit
        saved, every = self.saved_bytes[where] + self.block_input_bytes[where], self._backwards(in_flight)
        for furthest, savings in enumerate(self.savings):
            steps = [s for each in savings.values() for s in each if s.mode in modes]
            seconds, counts, shortfalls = self.seconds[where].copy(), [], []
            for peaks, flights in every:
                bytes_ = base + flights * saved
                shortfalls.append((bytes_ + peaks.mixed[furthest, where], flights))
                shortfalls.append((bytes_ + peaks.before_blocks[where] - self.block_saved_bytes[where], flights - 1))
            for step in sorted(steps, key=lambda s: s.seconds / s.bytes):
                needed = np.maximum.reduce([shortfall / flights for shortfall, flights in shortfalls if flights])
                count = np.clip(np.ceil(needed / step.bytes), 0, self.blocks[step.checkpoint_class][where])
                seconds += count * step.seconds
                shortfalls = [(shortfall - count * n * step.bytes, n) for shortfall, n in shortfalls]
                counts.append((step, count))
            if steps:
                yield Checkpointed(seconds, np.maximum.reduce([shortfall for shortfall, _ in shortfalls]), counts)
        for mode, uniform in enumerate(self.uniform):
            if MODES[mode] in modes:
                each = []
                for peaks, flights in every:
                    before_blocks = peaks.before_blocks[where] - self.block_saved_bytes[where] + uniform.bytes[where]
                    transient = np.maximum(peaks.uniform[mode, where], before_blocks)
                    each.append(base + flights * (saved - uniform.bytes[where]) + transient)
                shortfall = np.where(uniform.possible[where], np.maximum.reduce(each), NEVER)
                counts = [(CheckpointStep(k, MODES[mode], 0.0, 0.0), n[where]) for k, n in self.blocks.items()]
                yield Checkpointed(self.seconds[where] + uniform.seconds[where], shortfall, counts)


def interval_costs(
    costs: PositionCosts, segment_classes: Sequence[int], block: Sequence[bool], micro_batches: int, amortization: int,
    allowed: Sequence[tuple[str, ...]], host_limit: float = NEVER,
) -> IntervalCosts:  # fmt: skip
    """The costs of all intervals under a choice of strategies. `allowed` are the modes that each position may use;
    `amortization` is that of `training_state`, `host_limit` that of `IntervalCosts`."""
    n, training = len(segment_classes), costs.training
    least = np.array([MODES.index(modes[0]) for modes in allowed])
    recomputed, per_stage = least > 0, [(item, contains_any(item.positions, n)) for item in costs.per_stage]
    saved = costs.saved_bytes[least, np.arange(n)] + costs.block_input_bytes * recomputed
    seconds = costs.forward + costs.backward + costs.recompute_seconds[least, np.arange(n)]
    seconds = interval_sums(seconds + costs.sync_seconds / amortization)
    seconds += exposed_in_step(costs) / amortization
    state, saves, block_saves = (interval_sums(x) for x in (costs.state_bytes.sum(0), saved, np.where(block, saved, 0)))
    workspace = (interval_sums if training.foreach else interval_maxima)(costs.optimizer_workspace)
    reduced, shared_inputs = interval_sums(costs.reduced_bytes[2]), np.zeros(len(seconds))
    on_host = interval_sums(costs.host_bytes)
    for item, inside in per_stage:
        workspace = (np.add if training.foreach else np.maximum)(workspace, inside * item.optimizer_workspace)
        reduced += inside * item.reduced_bytes
        on_host += inside * item.host_bytes
        seconds += inside * (item.forward + item.backward + item.sync_seconds / amortization)
        state += inside * sum(item.state_bytes)
        saves += inside * item.saved_bytes
        if item.block_input_bytes:
            already = contains_any([p for p in item.positions if recomputed[p]], n)
            saves += already * item.block_input_bytes
            shared_inputs += (inside & ~already) * item.block_input_bytes
    message_seconds, received, unsaved = crossed(costs.crossings, n)
    first_backward, later_backward = (transient_peaks(costs, allowed, block, first) for first in (True, False))
    classes = _checkpoint_classes(costs, segment_classes, block, allowed)
    where = {classes[p]: np.array(classes) == classes[p] for p in range(n) if block[p]}
    modes, depths = {classes[p]: allowed[p] for p in range(n)}, range(len(first_backward.mixed))
    return IntervalCosts(
        seconds=seconds + message_seconds,
        state_bytes=state,
        saved_bytes=saves + unsaved,
        block_saved_bytes=block_saves,
        received_bytes=received,
        first_backward=first_backward,
        later_backward=later_backward,
        end_of_step_workspace=np.maximum(
            workspace, training.end_of_step_workspace(reduced, interval_maxima(costs.reduced_bytes[1]))
        ),
        block_input_bytes=shared_inputs,
        recompute_seconds=costs.recompute_seconds,
        checkpoint_classes=classes,
        least_modes=[MODES[mode] for mode in least],
        micro_batches=micro_batches,
        host_bytes=on_host,
        host_limit=host_limit,
        blocks={k: interval_sums(mine.astype(float)) for k, mine in where.items()},
        savings=[{k: checkpoint_steps(costs, k, mine, modes[k], f) for k, mine in where.items()} for f in depths],
        uniform=[uniform_checkpointing(costs, allowed, block, saved, mode) for mode in depths],
    )


def _checkpoint_classes(
    costs: PositionCosts, segment_classes: Sequence[int], block: Sequence[bool], allowed: Sequence[tuple[str, ...]]
) -> list[int]:
    """`IntervalCosts.checkpoint_classes`: positions of equal segment class, allowed modes and saved bytes by mode."""
    saves = np.column_stack([*costs.saved_bytes, costs.block_input_bytes]).round().tolist()
    known: dict[tuple[int, bool, tuple[str, ...], tuple[float, ...]], int] = {}
    return [
        known.setdefault(row, len(known))
        for row in zip(segment_classes, block, allowed, map(tuple, saves), strict=True)
    ]
