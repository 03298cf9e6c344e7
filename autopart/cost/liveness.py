"""The one memory model: what every segment of a stage allocates, and the moments at which most of it is alive.

A segment stands at one position of a stage. F is the number of micro-batches in flight, m that of a step, and w are the
bytes that a segment has saved once it has run forward a second time: `saved_bytes[0] + regathered_bytes`. Bytes are of
one rank:

    kind         allocated                       freed                           bytes of a segment
    parameters   before the step                 after the step                  `Training.state_bytes`
    gradients    in its first backward           after the step                  `Training.state_bytes`
    optimizer    before the step                 after the step                  `Training.state_bytes`
    activations  in its forward                  at the end of its backward      F (saved[mode] + block input)
    activations  when the stage takes it         when the stage's backward ends  F x a received value that none saves
    messages     when the stage is ready for it  when the stage takes it         values from other stages
    recomputed   at the start of its backward    in its backward                 w - saved[mode] or w - reused[mode]
    in flight    in its backward                 in its backward                 gradients of one operator
    gathered     at the start of its backward    in its backward                 whole parameters (ZeRO 3)
    pending      in the last reader's backward   in the first reader's backward  gradients of shared parameters
    workspace    at the end of its backward      then                            gradients being reduced (ZeRO 2, 3)
    workspace    at the end of a step            then                            optimizer's temporaries, or a message

The peak of a stage is the most that is alive at one of these moments (`moments`, `end_of_step`): before a backward; in
the backward of each segment, at each of `SegmentBytes.in_backward`; at the end of a step. Readers: `transient_peaks`
for all intervals of positions at once, the rows of `planner.exact_refinement`, `planner.memory_tree` for people, plans
and certificates. An amount of bytes is a number there, or an array: by position, or by the solver's variables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autopart.cost.training_state import Training

MODES = ("none", "selective", "mincut", "full")
"""Checkpointing modes of a block: what it saves for its backward. Everything that backward reads; its inputs and the
results of its matrix products; its inputs and the least from which backward can do without matrix products
(`passes.checkpoint_cut`); its inputs. Arrays by mode have a row for each, `SegmentBytes.saved_bytes` among them."""

AUTOMATIC = ("none", "mincut", "full")
"""The modes among which the planner chooses by itself: "mincut" saves at most what "selective" does, and runs at most
as much again."""

PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, MESSAGES = (
    "parameters", "gradients", "optimizer", "activations", "messages",
)  # fmt: skip
RECOMPUTED, IN_FLIGHT, GATHERED, PENDING, WORKSPACE = "recomputed", "in flight", "gathered", "pending", "workspace"
TRANSIENT = (RECOMPUTED, IN_FLIGHT, GATHERED, PENDING, WORKSPACE)
"""Kinds that are alive at one moment of a step alone."""

Amount = Any
"""Bytes: a number, or an array of numbers."""
Alive = Mapping[str, Amount]
"""Kind -> bytes that are alive at a moment."""


@dataclass
class SegmentBytes:
    """Bytes of a segment for a micro-batch, whatever its mode.

    saved_bytes        by mode: what operators give or keep, without the block's input
    reused_bytes       by mode: what the second forward does not allocate again
    block_input_bytes  values from other segments, saved where the segment is recomputed
    regathered_bytes   what is whole after the second forward, less the shards that mode "none" saves of it
    largest_gradient   the largest gradient of an operator;  backward_bytes: the most of one operator's gradients, in
                       the first backward of a step and in others
    reduced_bytes      parameters whose gradients ranks reduce: their sum, and the largest of them
    single_parameter   whether the segment reads one parameter
    """

    saved_bytes: Amount
    reused_bytes: Amount
    block_input_bytes: Amount
    regathered_bytes: Amount
    largest_gradient: Amount
    backward_bytes: Amount
    reduced_bytes: Amount
    single_parameter: Amount

    def saved_under(self, mode: int) -> Amount:
        """saved[mode] + block input where the segment is recomputed: bytes saved by one micro-batch."""
        return self.saved_bytes[mode] + self.block_input_bytes * (mode > 0)

    def in_backward(self, mode: int, first: bool, training: Training) -> list[Alive]:
        """Moments of the segment's backward, the `first` of a step or another, with what is alive there alone: in the
        backward of an operator; right after the second forward; while ranks reduce the gradients."""
        whole = self.saved_bytes[0] + self.regathered_bytes
        parameters = training.gathered_bytes(self.reduced_bytes[0])
        reduce = training.grad_reduce_workspace(self.reduced_bytes[0], self.reduced_bytes[1], self.single_parameter)
        operator = {IN_FLIGHT: self.backward_bytes[0 if first else 1], GATHERED: parameters}
        found: list[Alive] = [operator, {IN_FLIGHT: self.largest_gradient, WORKSPACE: reduce}]
        if mode:
            operator[RECOMPUTED] = whole - self.saved_bytes[mode]
            found.append(
                {IN_FLIGHT: self.largest_gradient, GATHERED: parameters, RECOMPUTED: whole - self.reused_bytes[mode]}
            )
        return found


@dataclass(frozen=True)
class Backward:
    """A backward of a step: whether no gradients exist before it, and the micro-batches in flight when it starts."""

    first: bool
    in_flight: int


def backwards(in_flight: int, micro_batches: int) -> list[Backward]:
    """The backwards in which most may be alive. Where all micro-batches of a step are in flight before the first
    backward, gradients are allocated in that backward; afterwards one micro-batch less is in flight."""
    if in_flight < micro_batches:
        return [Backward(False, in_flight)]
    return [Backward(True, in_flight), Backward(False, in_flight - 1)][:in_flight]


def freed(saved: Any) -> Any:
    """[positions + 1]: bytes of one micro-batch that are freed when the backward of each position starts: the sum of
    what later positions saved. The last row is the moment before the backward of the last position."""
    before = np.cumsum(np.concatenate([0.0 * saved[:1], saved]), axis=0)
    return before[-1] - np.concatenate([before[1:], before[-1:]])


def unallocated(gradients: Any, first: bool) -> Any:
    """[positions + 1]: bytes of gradients that do not exist when the backward of each position ends, the `first` of a
    step or another: the sum of those of earlier positions. The last row is the moment before all of them."""
    return np.cumsum(np.concatenate([0.0 * gradients[:1], gradients * first]), axis=0)


@dataclass(frozen=True)
class StageBytes:
    """A stage: its segments in order, and what all of them share.

    segments   of every position;  modes: the checkpointing modes that each may use
    prelude    what the stage makes for all its segments, whose backward is the last
    saved      [positions]: bytes of a micro-batch by the position at the end of whose backward they are freed
    shared_saved  bytes of a micro-batch that are freed when the stage's backward is done
    gradients  [positions]: bytes of the gradients that a position alone allocates
    state      bytes of all parameters, gradients and optimizer states
    pending    position of the last reader of a shared parameter; bytes of the gradients of shared parameters that wait
               until the first reader's backward
    messages   bytes of values from other stages on their way;  end: bytes allocated at the end of a step
    """

    segments: Sequence[SegmentBytes]
    modes: Sequence[Sequence[int]]
    prelude: SegmentBytes | None
    saved: Any
    shared_saved: Amount
    gradients: Any
    state: tuple[Amount, Amount, Amount]
    pending: tuple[int, Amount]
    messages: Amount
    end: Sequence[Amount]


@dataclass(frozen=True)
class Moment:
    """A moment of a step, with all that is alive then.

    position  the index of the segment in whose backward it is; -1: the prelude's; the number of segments: before them
    backward  the backward of the step; None at the end of a step
    """

    position: int
    backward: Backward | None
    alive: Alive

    @property
    def bytes(self) -> Amount:
        """All that is alive."""
        return sum(self.alive.values())

    @property
    def transient(self) -> Amount:
        """What is alive at this moment alone."""
        return sum(self.alive.get(kind, 0.0) for kind in TRANSIENT)


def moments(stage: StageBytes, training: Training, in_flight: int, micro_batches: int) -> Iterator[Moment]:
    """The moments at one of which most is alive in a stage with `in_flight` micro-batches in flight."""
    parameters, gradients, optimizer = stage.state
    saved, last = stage.saved.sum(0) + stage.shared_saved, len(stage.segments)
    later = freed(stage.saved)
    for backward in backwards(in_flight, micro_batches):
        earlier = unallocated(stage.gradients, backward.first)

        def at(position: int, gone: Amount, missing: Amount, more: Alive, b: Backward = backward) -> Moment:
            alive = {PARAMETERS: parameters, GRADIENTS: gradients - missing, OPTIMIZER: optimizer}
            alive |= {ACTIVATIONS: b.in_flight * saved - gone, MESSAGES: stage.messages}
            return Moment(position, b, {**alive, **more})

        yield at(last, 0.0 * saved, earlier[-1], {})
        for more in stage.prelude.in_backward(0, False, training) if stage.prelude else ():
            yield at(-1, stage.saved.sum(0), 0.0 * saved, more)
        for position, segment in enumerate(stage.segments):
            pending = stage.pending[1] * (position < stage.pending[0])
            for mode in stage.modes[position]:
                for more in segment.in_backward(mode, backward.first, training):
                    yield at(position, later[position], earlier[position], {**more, PENDING: pending})
    for workspace in stage.end:
        alive = {PARAMETERS: parameters, GRADIENTS: gradients, OPTIMIZER: optimizer, WORKSPACE: workspace}
        yield Moment(last, None, alive)
