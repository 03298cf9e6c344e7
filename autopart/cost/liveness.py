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
    gathered     at the start of its backward    in the next one                 whole parameters of the segment before
    pending      in the last reader's backward   in the first reader's backward  gradients of shared parameters
    workspace    at the end of its backward      at once                         gradients being reduced (ZeRO 2, 3)
    workspace    at the end of a step            at once                         optimizer's temporaries, or a message

The peak of a stage is the largest sum of bytes at a moment (`moments`). Moments are: before a backward; in the backward
of each segment, those of `SegmentBytes.in_backward`; the end of a step. Readers of this model: `transient_peaks` for
all intervals of positions at once, `planner.exact_refinement` for rows of an ILP, `planner.memory_tree` for people,
plans and certificates. Bytes are a number in `memory_tree`, an array by position in `transient_peaks`, an array by the
solver's variables in `exact_refinement`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autopart.cost.training_state import Training

MODES = ("none", "selective", "mincut", "full")
"""Activation checkpointing modes of a block. What a block saves for its backward:

    none       everything that backward reads
    selective  its inputs, and the results of its matrix products
    mincut     its inputs, and the fewest bytes from which backward recomputes the rest without matrix products
               (`passes.checkpoint_cut`)
    full       its inputs

An array "by mode", or [MODES, ...], has one row for each."""

AUTOMATIC = ("none", "mincut", "full")
"""The modes that the planner chooses from unless it is told otherwise. "selective" is not among them: "mincut" saves no
more bytes and recomputes no more operators."""

PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, MESSAGES = (
    "parameters", "gradients", "optimizer", "activations", "messages",
)  # fmt: skip
RECOMPUTED, IN_FLIGHT, GATHERED, PENDING, WORKSPACE = "recomputed", "in flight", "gathered", "pending", "workspace"
TRANSIENT = (RECOMPUTED, IN_FLIGHT, GATHERED, PENDING, WORKSPACE)
"""Kinds of bytes that are alive in the backward of one segment, or at the end of a step, and not from one to
another."""

Amount = Any
"""Bytes: a number, or an array of numbers."""
Alive = Mapping[str, Amount]
"""Kind -> bytes that are alive at a moment."""


@dataclass
class SegmentBytes:
    """Bytes of a segment for a micro-batch, whatever its mode.

    saved_bytes        by mode: results and other tensors that operators save for backward, without the block's input
    reused_bytes       by mode: saved results that recomputing does not allocate again
    block_input_bytes  values from other segments, saved where the segment is recomputed
    regathered_bytes   values that are whole after recomputing, less the shards that mode "none" saves of these values
    largest_gradient   the largest gradient of an operator
    backward_bytes     the most gradients of one operator: [0] in the first backward of a step, [1] in a later one
    reduced_bytes      parameters whose gradients ranks reduce: [0] the sum of all, [1] the largest
    single_parameter   whether the segment reads exactly one parameter
    ahead_bytes        whole parameters of the segment before, which are gathered ahead (`Training.ahead_bytes`)
    """

    saved_bytes: Amount
    reused_bytes: Amount
    block_input_bytes: Amount
    regathered_bytes: Amount
    largest_gradient: Amount
    backward_bytes: Amount
    reduced_bytes: Amount
    single_parameter: Amount
    ahead_bytes: Amount

    def saved_under(self, mode: int) -> Amount:
        """Bytes that one micro-batch saves: saved[mode], and the block input where the segment is recomputed."""
        return self.saved_bytes[mode] + self.block_input_bytes * (mode > 0)

    def in_backward(self, mode: int, first: bool, training: Training) -> list[Alive]:
        """The transient bytes at each moment of the segment's backward, which is the `first` of a step or a later one.

        Moments: in the backward of an operator; while ranks reduce the gradients; if the segment is recomputed, right
        after it was."""
        whole = self.saved_bytes[0] + self.regathered_bytes
        parameters = training.gathered_bytes(self.reduced_bytes[0])
        reduce = training.grad_reduce_workspace(self.reduced_bytes[0], self.reduced_bytes[1], self.single_parameter)
        parameters, ahead = parameters + self.ahead_bytes, self.ahead_bytes
        operator = {IN_FLIGHT: self.backward_bytes[0 if first else 1], GATHERED: parameters}
        found: list[Alive] = [operator, {IN_FLIGHT: self.largest_gradient, GATHERED: ahead, WORKSPACE: reduce}]
        if mode:
            operator[RECOMPUTED] = whole - self.saved_bytes[mode]
            found.append(
                {IN_FLIGHT: self.largest_gradient, GATHERED: parameters, RECOMPUTED: whole - self.reused_bytes[mode]}
            )
        return found


def gathering_ahead(segments: Sequence[SegmentBytes], training: Training) -> list[SegmentBytes]:
    """The segments of a stage, in order, each with what its backward gathers ahead: the parameters of the one before.
    Of arrays by variable an upper bound: parameters that are together more than `Training.prefetch` count."""
    ahead = [training.ahead_bytes(segment.reduced_bytes[0]) for segment in segments[:-1]]
    return [*segments[:1], *(replace(s, ahead_bytes=nbytes) for s, nbytes in zip(segments[1:], ahead, strict=True))]


@dataclass(frozen=True)
class Backward:
    """A backward of a step. `first`: no gradients exist before it. `in_flight`: micro-batches in flight as it
    starts."""

    first: bool
    in_flight: int


def backwards(in_flight: int, micro_batches: int) -> list[Backward]:
    """The backwards in which a stage's peak may be.

    Where fewer micro-batches are in flight than a step has: a later backward. Where all of them are in flight before
    the first backward: the first, in which gradients are allocated; and the second, with one micro-batch less in
    flight."""
    if in_flight < micro_batches:
        return [Backward(False, in_flight)]
    return [Backward(True, in_flight), Backward(False, in_flight - 1)][:in_flight]


def freed(saved: Any) -> Any:
    """[positions + 1]: bytes of one micro-batch that were freed before the backward of each position: the sum of what
    later positions saved. The last row is for the moment before any backward: 0."""
    before = np.cumsum(np.concatenate([0.0 * saved[:1], saved]), axis=0)
    return before[-1] - np.concatenate([before[1:], before[-1:]])


def unallocated(gradients: Any, first: bool) -> Any:
    """[positions + 1]: bytes of gradients that are not allocated when the backward of each position ends: in the
    `first` backward of a step the sum over earlier positions, in a later one 0. The last row is for the moment before
    any backward: the sum over all positions."""
    return np.cumsum(np.concatenate([0.0 * gradients[:1], gradients * first]), axis=0)


@dataclass(frozen=True)
class StageBytes:
    """A stage: its segments in order, and what all of them share.

    segments      of every position
    modes         of every position: indices in MODES of the checkpointing modes that it may use
    prelude       the operators that the stage computes for all its segments; their backward is the last
    saved         [positions]: bytes of a micro-batch that the backward of the position frees
    shared_saved  bytes of a micro-batch that are freed when the stage's backward is done
    gradients     [positions]: bytes of the gradients that a position alone allocates
    state         bytes of all parameters, all gradients, all optimizer states
    pending       (position of the last reader of a shared parameter, bytes of the gradients of shared parameters until
                  the first reader's backward)
    messages      bytes of values from other stages on their way
    end           bytes of each allocation at the end of a step
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
    """A moment of a step.

    position  the index of the segment whose backward runs; -1: the prelude's backward; the number of segments: none yet
    backward  the backward of the step; None at the end of a step
    alive     kind -> bytes that are alive
    """

    position: int
    backward: Backward | None
    alive: Alive

    @property
    def bytes(self) -> Amount:
        """All bytes that are alive."""
        return sum(self.alive.values())

    @property
    def transient(self) -> Amount:
        """The bytes of the kinds TRANSIENT."""
        return sum(self.alive.get(kind, 0.0) for kind in TRANSIENT)


def moments(stage: StageBytes, training: Training, in_flight: int, micro_batches: int) -> Iterator[Moment]:
    """The moments at which the peak of a stage with `in_flight` micro-batches in flight may be."""
    parameters, gradients, optimizer = stage.state
    saved, last = stage.saved.sum(0) + stage.shared_saved, len(stage.segments)
    later = freed(stage.saved)
    for backward in backwards(in_flight, micro_batches):
        missing = unallocated(stage.gradients, backward.first)

        def at(position: int, gone: Amount, missing: Amount, transient: Alive, b: Backward = backward) -> Moment:
            alive = {PARAMETERS: parameters, GRADIENTS: gradients - missing, OPTIMIZER: optimizer}
            alive |= {ACTIVATIONS: b.in_flight * saved - gone, MESSAGES: stage.messages}
            return Moment(position, b, {**alive, **transient})

        yield at(last, 0.0 * saved, missing[-1], {})
        for transient in stage.prelude.in_backward(0, False, training) if stage.prelude else ():
            yield at(-1, stage.saved.sum(0), 0.0 * saved, transient)
        for position, segment in enumerate(stage.segments):
            pending = stage.pending[1] * (position < stage.pending[0])
            for mode in stage.modes[position]:
                for transient in segment.in_backward(mode, backward.first, training):
                    yield at(position, later[position], missing[position], {**transient, PENDING: pending})
    for workspace in stage.end:
        alive = {PARAMETERS: parameters, GRADIENTS: gradients, OPTIMIZER: optimizer, WORKSPACE: workspace}
        yield Moment(last, None, alive)
