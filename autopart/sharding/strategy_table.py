"""The planner's problem as plain data: what `formulate` writes, `weigh` prices and `solve` solves.

A model is a row of positions, runs of operators that stay together; equal blocks are one class, so that a table has
as many variables for 126 layers as for two. What is priced at a position is told by lists of positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autopart.sharding.notation import Placement
from autopart.sharding.resharding import Step
from autopart.sharding.rules import Product, Strategy

Placements = tuple[Placement, ...]
Chain = tuple[Step, ...]


@dataclass(frozen=True)
class Value:
    """One output of a node: bytes as traced, whether they count samples, whether a gradient flows."""

    bytes: float
    batch: bool
    grad: bool


@dataclass
class Node:
    """An operator, parameter or input to decide about.

    key       its name in plans;  kind: "op", "parameter", "input", "buffer" or "end" for what takes the loss
    options   strategies to choose from, one along every axis
    values    its outputs;  operands: (node, output) of every operand, None for what is no tensor
    firsts    for every operand the first that is the same value: two of one class may be two
    batch     whether its work grows with samples;  product: whether matrix units do it
    peak, again, runs, kind_index (kind)  as in `cost.Work`;  matrix, grads: as in `graph.Info`
    inner     bytes autograd keeps besides its operands and outputs
    view, logits, weights, times  as in `graph.Info`
    group     the class of its run; -1 for what every stage makes for itself
    """

    key: str
    kind: str
    options: list[tuple[Strategy, ...]]
    values: list[Value]
    operands: list[tuple[int, int] | None] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)
    flops: float = 0.0
    batch: bool = False
    product: bool = False
    matrix: Product | None = None
    grads: tuple[bool, bool] = (False, False)
    peak: float = float("inf")
    again: int = 0
    runs: int = 1
    kind_index: int = 0
    inner: float = 0.0
    grad: bool = False
    view: bool = False
    logits: bool = False
    weights: tuple[int, ...] = ()
    times: float = 2.0
    group: int = -1

    def given(self, option: int, output: int = 0) -> Placements:
        """The placement of an output under an option."""
        return tuple(s.outputs[output] for s in self.options[option])

    def taken(self, option: int, operand: int) -> Placements:
        """The placement an operand is taken in."""
        return tuple(p if (p := s.inputs[operand]) is not None else Placement("R") for s in self.options[option])


@dataclass
class ValueUses:
    """A value with all its uses, for all places in the model where the pattern is the same.

    uses     (node, operand) of every use;  inside: whether a use is in the run that makes the value
    homes    position that makes the value at each place, -1 for what every stage makes for itself
    users    position of every use, at each place, -1 for a use by what every stage makes for itself
    needs    for every use the positions that need it, at each place: its own, or for what every stage makes for itself
             those that need that
    chains   (have, want) -> what has to run, for each change that is possible
    """

    source: int
    output: int
    uses: tuple[tuple[int, int], ...]
    inside: tuple[bool, ...]
    homes: list[int] = field(default_factory=list)
    users: list[tuple[int, ...]] = field(default_factory=list)
    needs: list[tuple[tuple[int, ...], ...]] = field(default_factory=list)
    chains: dict[tuple[Placements, Placements], Chain] = field(default_factory=dict)

    @cached_property
    def several(self) -> bool:
        """Whether several positions use the value, at each place."""
        return len(set(self.users[0])) > 1

    @cached_property
    def ends(self) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
        """At each place, the position that makes the value and the first that uses it."""
        return np.array(self.homes), np.array([users[0] for users in self.users])

    @cached_property
    def spots(self) -> list[dict[tuple[int, int], tuple[int, ...]]]:
        """At each place, every (node, operand) that uses the value and the positions where it does."""
        return [_grouped(self.uses, [(p,) for p in users]) for users in self.users]

    @cached_property
    def needed(self) -> list[dict[tuple[int, int], tuple[int, ...]]]:
        """At each place, every (node, operand) that uses the value and the positions that need it."""
        return [_grouped(self.uses, needs) for needs in self.needs]


@dataclass
class SavedTensor:
    """Memory of one node that autograd keeps for others, for all places where the pattern is the same.

    keepers  (node, operand it reads the memory through; -1: it made it, -2: as it was made)
    places   position of every keeper, at each place
    """

    root: int
    keepers: tuple[tuple[int, int], ...]
    places: list[tuple[int, ...]] = field(default_factory=list)

    @cached_property
    def first(self) -> NDArray[np.int_]:
        """The position of the first keeper, at each place."""
        return np.array([places[0] for places in self.places])

    @cached_property
    def several(self) -> bool:
        """Whether several positions keep the memory, at each place."""
        return len(set(self.places[0])) > 1

    @cached_property
    def spots(self) -> list[dict[tuple[int, int], tuple[int, ...]]]:
        """At each place, every keeper and the positions where it keeps."""
        return [_grouped(self.keepers, [(p,) for p in places]) for places in self.places]


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

    axes        names of the axes inside a stage;  tp: ranks of the tensor-parallel one
    labels      of every position;  group: its class;  block: whether it is a numbered block
    state       parameter's node -> the positions that hold it, at each place
    shared      node that every stage makes for itself -> the positions that need it, for each of its class
    tied        nodes that take the same option
    """

    axes: tuple[str, ...]
    tp: int
    nodes: list[Node]
    flows: list[ValueUses]
    keeps: list[SavedTensor]
    labels: tuple[str, ...]
    group: tuple[int, ...]
    block: tuple[bool, ...]
    state: dict[int, list[tuple[int, ...]]]
    shared: dict[int, list[tuple[int, ...]]]
    tied: list[list[int]]
