"""What `localise` makes and `price` and `emit` read: every stage's graph, with what goes in and out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from autopart.folded import Folded
from autopart.notation import Placement
from autopart.rules import Shape, Strategy

Value = tuple[fx.Node, int]
Placements = tuple[Placement, ...]
Splits = Mapping[str, Mapping[str, Strategy]]
SETUP = ""
"""The label of the run that holds what every block of a stage shares."""


OWNED = ("parameter", "buffer", "stream")
"""Kinds of placeholders that a stage's module has as attributes; "stream" is a source of random numbers."""


@dataclass(frozen=True)
class Crossing:
    """A value sent between stages: its name, shape on a rank, and who makes and takes it."""

    name: str
    producer: int
    consumers: tuple[int, ...]
    shape: Shape
    dtype: torch.dtype
    grad: bool


@dataclass(frozen=True)
class Valid:
    """A mean over valid targets: the loss that divides by their number, the node that holds the targets, the label
    that is ignored, and the axes that split the targets."""

    loss: str
    targets: fx.Node
    ignore_index: int
    axes: tuple[str, ...]


@dataclass
class StageGraph:
    """One stage's program: a graph in runs, and what goes in and out."""

    index: int
    graph: fx.Graph = field(default_factory=fx.Graph)
    runs: list[tuple[str, list[fx.Node]]] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    received: list[Crossing] = field(default_factory=list)
    sent: list[Crossing] = field(default_factory=list)
    valid: list[Valid] = field(default_factory=list)
    kept: dict[str, int] = field(default_factory=dict)
    """Run label -> bytes autograd keeps for one micro-batch on one rank."""

    @property
    def kept_bytes(self) -> int:
        """Bytes autograd keeps for one micro-batch on one rank."""
        return sum(self.kept.values())


@dataclass(frozen=True)
class Choices:
    """What was decided.

    axes        (name, size) of the axes inside a stage
    strategies  of each stage: axis -> the key of a representative -> its strategy
    starts      the first position of each stage
    """

    axes: tuple[tuple[str, int], ...]
    strategies: tuple[Splits, ...]
    starts: tuple[int, ...]

    def of(self, folded: Folded, node: fx.Node, stage: int) -> tuple[Strategy, ...]:
        """A node's strategy along every axis in a stage."""
        key = folded.keys[folded.same[node]]
        return tuple(self.strategies[stage][axis][key] for axis, _ in self.axes)

    def placements(self, folded: Folded, value: Value, stage: int) -> Placements:
        """Where a value lies as made in a stage."""
        return tuple(s.outputs[value[1]] for s in self.of(folded, value[0], stage))


class Named(str):
    """A literal of the emitted code."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
