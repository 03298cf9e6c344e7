"""The planner's problem as plain data: the nodes with their strategies, the values between them, the saved tensors.

A model is a row of positions. At each position stands a segment: operators that stay together in a stage. Equal
segments are of one segment class. A table has variables for segment classes: as many for 126 layers as for two. A node,
a value or a saved tensor of a segment class is at several places in the model; lists of positions tell the places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autopart.hardware.rows import DTYPES
from autopart.sharding.notation import Placement, Strategy
from autopart.sharding.resharding import Step
from autopart.sharding.rules import Product

Placements = tuple[Placement, ...]
Chain = tuple[Step, ...]


@dataclass(frozen=True)
class Value:
    """One output of a node: its bytes as traced, whether they grow with the samples, and whether it has a gradient."""

    bytes: float
    batch: bool
    grad: bool


@dataclass
class Node:
    """An operator, parameter, buffer or input that takes one of several strategies.

    key            its name in plans;  kind: "op", "parameter", "input", "buffer", or "end" for what takes the loss
    options        its strategies, each one along every axis
    values         its outputs;  operands: (node, output) of every operand, None for what is no tensor
    first_same_operand  for every operand the index of the first operand that is the same value
    batch          whether its work grows with the samples;  product: whether matrix units do the work
    peak_dtype     of its peak FLOP/s: `autopart.cost.compute.peak_dtype_of`
    backward_ratio, launches, kind_index (kind)  as in `autopart.cost.compute.Work`
    inner          bytes that autograd saves besides operands and outputs;  fixed: those of them that do not grow with
                   the samples, as a copy of a weight
    matrix, grads, view, logits, weights, gradient_copies  as in `autopart.ir.graph.Info`
    kernel_bytes   of a fused kernel, `autopart.ir.graph.KernelBytes` of all samples under every strategy along tp
    segment_class  the class of the node's segment; -1 for a node of the prelude, which every stage computes for itself
    """

    key: str
    kind: str
    options: list[tuple[Strategy, ...]]
    values: list[Value]
    operands: list[tuple[int, int] | None] = field(default_factory=list)
    first_same_operand: list[int] = field(default_factory=list)
    flops: float = 0.0
    batch: bool = False
    product: bool = False
    matrix: Product | None = None
    grads: tuple[bool, bool] = (False, False)
    peak_dtype: int = len(DTYPES)
    backward_ratio: int = 0
    launches: int = 1
    kind_index: int = 0
    inner: float = 0.0
    fixed: float = 0.0
    grad: bool = False
    view: bool = False
    logits: bool = False
    weights: tuple[int, ...] = ()
    gradient_copies: float = 2.0
    kernel_bytes: list[tuple[float, ...]] = field(default_factory=list)
    segment_class: int = -1
    times: int = 1

    def given(self, option: int, output: int = 0) -> Placements:
        """The placement of an output under an option."""
        return tuple(s.outputs[output] for s in self.options[option])

    def taken(self, option: int, operand: int) -> Placements:
        """The placement in which an operand is taken under an option."""
        return tuple(p if (p := s.inputs[operand]) is not None else Placement("R") for s in self.options[option])


@dataclass
class ValueUses:
    """A value with all its uses, for all places in the model with the same pattern of uses.

    source      the node that makes the value, as its `output`
    uses        (node, operand) of every use;  inside: whether the use is in the segment that makes the value
    producers   at each place, the position that makes the value; -1 for the prelude, which every stage computes
    consumers   at each place, the position of every use; -1 for a use in the prelude
    dependents  at each place, for every use the positions whose stages compute it: the use's own position; for a use
                in the prelude, all positions that read what the use makes
    times       how many times the value is made at each place, in iterations of a loop
    chains      (placement made, placement taken) -> the reshards between them, for each possible pair
    """

    source: int
    output: int
    uses: tuple[tuple[int, int], ...]
    inside: tuple[bool, ...]
    producers: list[int] = field(default_factory=list)
    consumers: list[tuple[int, ...]] = field(default_factory=list)
    dependents: list[tuple[tuple[int, ...], ...]] = field(default_factory=list)
    times: int = 1
    chains: dict[tuple[Placements, Placements], Chain] = field(default_factory=dict)

    @cached_property
    def several(self) -> bool:
        """Whether several positions of a place use the value."""
        return len(set(self.consumers[0])) > 1

    @cached_property
    def ends(self) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
        """At each place, the position that makes the value and the first that uses it."""
        return np.array(self.producers), np.array([consumers[0] for consumers in self.consumers])

    @cached_property
    def consumers_by_use(self) -> list[dict[tuple[int, int], tuple[int, ...]]]:
        """At each place, every (node, operand) that uses the value -> the positions of the use."""
        return [_grouped(self.uses, [(p,) for p in consumers]) for consumers in self.consumers]

    @cached_property
    def dependents_by_use(self) -> list[dict[tuple[int, int], tuple[int, ...]]]:
        """At each place, every (node, operand) that uses the value -> the positions whose stages compute the use."""
        return [_grouped(self.uses, dependents) for dependents in self.dependents]


@dataclass
class SavedTensor:
    """A tensor that autograd saves for backward, for all places in the model where the same nodes save it.

    root     the node that made the tensor's memory;  output: as which of its outputs
    savers   (node that saves the tensor, operand by which the node reads it); operand -1 for the node's own output, -2
             for the placement in which the root made the tensor
    places   at each place, the position of every saver
    times    how many such tensors are saved at each place, in iterations of a loop
    """

    root: int
    output: int
    savers: tuple[tuple[int, int], ...]
    places: list[tuple[int, ...]] = field(default_factory=list)
    times: int = 1

    @cached_property
    def first(self) -> NDArray[np.int_]:
        """At each place, the position of the first node that saves the tensor."""
        return np.array([places[0] for places in self.places])

    @cached_property
    def several(self) -> bool:
        """Whether several positions of a place save the tensor."""
        return len(set(self.places[0])) > 1

    @cached_property
    def positions_by_saver(self) -> list[dict[tuple[int, int], tuple[int, ...]]]:
        """At each place, every saver -> the positions where it saves the tensor."""
        return [_grouped(self.savers, [(p,) for p in places]) for places in self.places]


def _grouped(
    keys: Sequence[tuple[int, int]], positions: Sequence[tuple[int, ...]]
) -> dict[tuple[int, int], tuple[int, ...]]:
    found: dict[tuple[int, int], set[int]] = {}
    for key, where in zip(keys, positions, strict=True):
        found.setdefault(key, set()).update(where)
    return {key: tuple(sorted(where)) for key, where in found.items()}


@dataclass
class StrategyTable:
    """All there is to decide for one size of the tensor-parallel axis.

    axes        names of the mesh axes inside a stage;  tp: ranks along the tensor-parallel axis
    nodes       the nodes;  value_uses: the values between them;  saved_tensors: the tensors saved for backward
    labels      the label of every position;  block: whether a numbered block stands there
    segment_classes  the segment class of every position
    state       node of a parameter -> at each place, the positions that hold it
    shared      node of the prelude -> for each node of its class, the positions that read its value
    tied        sets of nodes that take the same option
    iterations  further such sets: the nodes of an operator in all iterations of an unrolled loop, with equal options
    saved       [`liveness.MODES`, nodes]: whether the mode saves the node's results, besides what autograd saves
    rerun       [MODES, nodes]: whether backward runs the node again in that mode
    use_rerun   of every value, [MODES, uses]: whether backward takes the value again as the use does
    """

    axes: tuple[str, ...]
    tp: int
    nodes: list[Node]
    value_uses: list[ValueUses]
    saved_tensors: list[SavedTensor]
    labels: tuple[str, ...]
    segment_classes: tuple[int, ...]
    block: tuple[bool, ...]
    state: dict[int, list[tuple[int, ...]]]
    shared: dict[int, list[tuple[int, ...]]]
    tied: list[list[int]]
    saved: NDArray[np.bool_]
    rerun: NDArray[np.bool_]
    use_rerun: list[NDArray[np.bool_]]
    iterations: list[list[int]] = field(default_factory=list)

    @cached_property
    def saving_positions(self) -> dict[int, list[int]]:
        """Node -> the positions that save its memory for backward; nodes that none saves are left out."""
        found: dict[int, set[int]] = {}
        for tensor in self.saved_tensors:
            found.setdefault(tensor.root, set()).update(p for places in tensor.places for p in places)
        return {root: sorted(positions) for root, positions in found.items()}
