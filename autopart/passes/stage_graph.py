"""What `partition` makes and `price_stage` and `emit` read: every stage's graph, with what goes in and out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from autopart.cost.compute import SPLIT_LOSS, bytes_of_backward, is_loss, largest_of
from autopart.ir.graph import Info, info, operands
from autopart.ir.layered_graph import LayeredGraph
from autopart.sharding.notation import Placement
from autopart.sharding.rules import Product, Shape, Strategy, local_shape

Value = tuple[fx.Node, int]
Placements = tuple[Placement, ...]
Splits = Mapping[str, Mapping[str, Strategy]]
PRELUDE, PRELUDE_SEGMENT = "", -1
"""Label and index of the run that holds what every block of a stage shares."""


OWNED = ("parameter", "buffer", "stream")
"""Kinds of placeholders that a stage's module has as attributes; "stream" is a source of random numbers."""


@dataclass(frozen=True)
class Crossing:
    """A value sent between stages: its name, shape and bytes on a rank, and who makes and takes it."""

    name: str
    producer: int
    consumers: tuple[int, ...]
    shape: Shape
    dtype: torch.dtype
    grad: bool
    size: float = 0.0


@dataclass
class Kept:
    """Memory that autograd keeps for a micro-batch: bytes, whether several runs keep it, and the runs (in the folded
    graph; -1: what blocks share) of this stage that do.

    product  whether a matrix product gave it or keeps it
    wide     run -> bytes that it would keep besides where it is run again: there, what is gathered again is whole
    """

    size: float
    shared: bool
    product: bool
    segments: set[int] = field(default_factory=set)
    wide: dict[int, float] = field(default_factory=dict)


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
    segments: list[tuple[str, list[fx.Node]]] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    """Of every run in the folded graph."""
    inputs: list[str] = field(default_factory=list)
    received: list[Crossing] = field(default_factory=list)
    sent: list[Crossing] = field(default_factory=list)
    valid: list[Valid] = field(default_factory=list)
    kept: dict[tuple[str, Placements], Kept] = field(default_factory=dict)
    """(node whose memory it is, its placement) -> what autograd keeps for one micro-batch on one rank; "... inside" is
    what an operator keeps besides values."""


@dataclass(frozen=True)
class ShardingAssignment:
    """What was decided.

    axes        (name, size) of the axes inside a stage
    strategies  of each stage: axis -> the key of a representative -> its strategy
    starts      the first position of each stage
    scale       samples of the planned micro-batch over those traced
    thin        axes that split samples, of which too few are traced to cut shapes: they count in sizes alone
    """

    axes: tuple[tuple[str, int], ...]
    strategies: tuple[Splits, ...]
    starts: tuple[int, ...]
    scale: float = 1.0
    thin: frozenset[str] = frozenset()

    def local(self, shape: Shape, placements: Placements) -> Shape:
        """The shape of a value on a rank."""
        for placement, (axis, size) in zip(placements, self.axes, strict=True):
            shape = local_shape(shape, placement, 1 if axis in self.thin else size)
        return shape

    def size(self, value: Value, placements: Placements) -> float:
        """Bytes of a value on a rank, at the planned micro-batch."""
        record = info(value[0])
        nbytes = math.prod(record.shapes[value[1]]) * record.dtypes[value[1]].itemsize
        return nbytes * self.grow(record) / self.parts(placements)

    def grow(self, record: Info) -> float:
        """How many times larger a value is than traced."""
        return self.scale if record.batch is not None else 1.0

    def growth(self, node: fx.Node) -> float:
        """How many times more an operator works, and saves, than traced."""
        counts = any(info(n).batch is not None for n in (node, *node.all_input_nodes))
        return self.scale if counts else 1.0

    def parts(self, placements: Placements) -> int:
        """Into how many pieces a value is cut."""
        return math.prod(size for p, (_, size) in zip(placements, self.axes, strict=True) if p.kind == "S")

    def shares(self, chosen: Sequence[Strategy]) -> int:
        """How many ranks share an operator's work."""
        return math.prod(size for s, (_, size) in zip(chosen, self.axes, strict=True) if s.shards_work)

    def matrix(self, product: Product | None, chosen: Sequence[Strategy], grow: float) -> Product | None:
        """The matrix product of a rank, of an operator that works `grow` times more than traced."""
        if product is None:
            return None
        four = [size * (grow if grows else 1.0) for size, grows in zip(product.sizes, product.grows, strict=False)]
        for strategy, (_, ranks) in zip(chosen, self.axes, strict=True):
            if (role := product.role(strategy)) is not None:
                four[role] /= ranks
        batch, m, n, k = four
        return replace(product, sizes=product.sizes._replace(batch=batch, m=m, n=n, k=k))

    def of(self, layered: LayeredGraph, node: fx.Node, stage: int) -> tuple[Strategy, ...]:
        """A node's strategy along every axis in a stage."""
        key = layered.keys[layered.same[node]]
        return tuple(self.strategies[stage][axis][key] for axis, _ in self.axes)

    def placements(self, layered: LayeredGraph, value: Value, stage: int) -> Placements:
        """Where a value lies as made in a stage."""
        return tuple(s.outputs[value[1]] for s in self.of(layered, value[0], stage))


class Named(str):
    """A literal of the emitted code."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def backward_of(node: fx.Node, anew: float) -> tuple[float, float]:
    """`largest_of` and `bytes_of_backward` of a node of a stage's graph; `anew` is of `Training`."""
    record = info(node)
    taken = dict.fromkeys((True, False), 0.0)
    for i, operand in enumerate(operands(node) if record.kind == "op" else []):
        if operand is not None and (record.product or i == 0) and info(operand).grad:
            taken[i in record.weights] += info(operand).size
    what = record, is_loss(record), SPLIT_LOSS in record.name
    largest = largest_of(record.size, taken[False], *what)
    return float(largest), float(bytes_of_backward(record.size, taken[False], anew * taken[True], *what))
