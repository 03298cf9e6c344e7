"""The records that `partition` makes and that `price_stage` and `emit` read: the graph of a stage, the values that the
stage sends and receives, the memory that autograd saves in it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from autopart.cost.compute import (
    SPLIT_LOSS,
    backward_gradient_bytes,
    divides_saved,
    divides_weights,
    is_loss,
    largest_gradient_bytes,
)
from autopart.ir.graph import Info, KernelBytes, info, operands
from autopart.ir.layered_graph import LayeredGraph
from autopart.passes.kernel_bytes import kernel_bytes
from autopart.sharding.notation import Placement, Shape, Strategy
from autopart.sharding.rules import Product, local_shape

Value = tuple[fx.Node, int]
Placements = tuple[Placement, ...]
Splits = Mapping[str, Mapping[str, Strategy]]
PRELUDE, PRELUDE_SEGMENT = "", -1
"""The label and the index of the prelude: the operators, as of masks, that a stage computes outside of all segments."""


OWNED = ("parameter", "buffer", "stream")
"""The kinds of placeholders that are attributes of a stage's module. "stream" is a source of random numbers."""


@dataclass(frozen=True)
class Crossing:
    """A value that one stage sends to others: its name, its producer, its consumers, its shape and bytes on a rank."""

    name: str
    producer: int
    consumers: tuple[int, ...]
    shape: Shape
    dtype: torch.dtype
    grad: bool
    size: float = 0.0


@dataclass
class SavedMemory:
    """Memory that autograd saves for one micro-batch on one rank.

    size      its bytes
    shared    whether several segments of the model save it
    segments  the segments of this stage that save it, by their index in the layered graph, or PRELUDE_SEGMENT
    regathered_bytes  segment -> bytes of the shards of other ranks, which the segment gathers again in its backward
    """

    size: float
    shared: bool
    segments: set[int] = field(default_factory=set)
    regathered_bytes: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Valid:
    """A loss that divides by the number of valid targets.

    loss          its name
    targets       the node of the targets
    ignore_index  the label that does not count
    axes          the axes that split the targets
    """

    loss: str
    targets: fx.Node
    ignore_index: int
    axes: tuple[str, ...]


@dataclass
class StageGraph:
    """One stage as a rank runs it.

    segments  (label, nodes) of every segment
    indices   of every segment: its index in the layered graph
    inputs    the keys of the batch that the stage reads
    received  the values that the stage takes from other stages
    sent      the values that the stage gives to other stages
    valid     the losses that divide by a number of valid targets
    saved     (name of the node that made the memory, placement) -> memory that autograd saves; the key ("... inside",
              ()) is for what an operator saves besides values
    values    node of `graph` -> (value of the model's graph, its placement along every axis)
    """

    index: int
    graph: fx.Graph = field(default_factory=fx.Graph)
    segments: list[tuple[str, list[fx.Node]]] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)

    inputs: list[str] = field(default_factory=list)
    received: list[Crossing] = field(default_factory=list)
    sent: list[Crossing] = field(default_factory=list)
    valid: list[Valid] = field(default_factory=list)
    saved: dict[tuple[str, Placements], SavedMemory] = field(default_factory=dict)
    values: dict[fx.Node, tuple[Value, Placements]] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardingAssignment:
    """The strategies that were chosen for every stage.

    axes        (name, ranks) of the mesh axes inside a stage
    strategies  for each stage: axis -> key of a representative -> its strategy
    starts      the index of the first segment of each stage
    scale       samples of the planned micro-batch / samples traced
    thin        axes that split samples while too few samples are traced to divide: they count in bytes, not in shapes
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
        node, output = value
        record = info(node)
        return record.output_bytes[output] * self.grow(record) / self.parts(placements)

    def grow(self, record: Info) -> float:
        """Bytes of a value at the planned micro-batch / bytes as traced."""
        return self.scale if record.batch is not None else 1.0

    def growth(self, node: fx.Node) -> float:
        """FLOPs of an operator at the planned micro-batch / FLOPs as traced; likewise the bytes that it saves."""
        counts = any(info(n).batch is not None for n in (node, *node.all_input_nodes))
        return self.scale if counts else 1.0

    def parts(self, placements: Placements) -> int:
        """The number of pieces that a value is split into."""
        return math.prod(size for p, (_, size) in zip(placements, self.axes, strict=True) if p.kind == "S")

    def shares(self, chosen: Sequence[Strategy]) -> int:
        """The number of ranks that share an operator's work."""
        return math.prod(size for s, (_, size) in zip(chosen, self.axes, strict=True) if s.shards_work)

    def inner(self, node: fx.Node, chosen: Sequence[Strategy]) -> float:
        """`Info.inner` on a rank, in bytes, at the planned micro-batch."""
        record, ranks = info(node), [size for _, size in self.axes]
        of_weights = [size for s, size in zip(chosen, ranks, strict=True) if divides_weights(s, record.weights)]
        shares = math.prod(size for s, size in zip(chosen, ranks, strict=True) if divides_saved(s))
        return record.fixed / math.prod(of_weights) + (record.inner - record.fixed) * self.growth(node) / shares

    def kernel_bytes(self, node: fx.Node, chosen: Sequence[Strategy]) -> KernelBytes:
        """A fused kernel's bytes on a rank, at the planned micro-batch."""
        ranks = {axis: size if axis == "tp" else 1 for axis, size in self.axes}
        found = kernel_bytes(node, chosen, [*ranks.values()])
        grow = self.growth(node) / math.prod(
            size for s, (axis, size) in zip(chosen, self.axes, strict=True) if s.shards_work and axis == "dp"
        )
        return KernelBytes(*(grow * size for size in found))._replace(chunk=found.chunk)

    def matrix(self, product: Product | None, chosen: Sequence[Strategy], grow: float) -> Product | None:
        """The matrix product on one rank, of an operator whose work is `grow` times what was traced."""
        if product is None:
            return None
        four = [size * (grow if grows else 1.0) for size, grows in zip(product.sizes, product.grows, strict=False)]
        for strategy, (_, ranks) in zip(chosen, self.axes, strict=True):
            if (role := product.role(strategy)) is not None:
                four[role] /= ranks
        batch, m, n, k = four
        return replace(product, sizes=product.sizes._replace(batch=batch, m=m, n=n, k=k))

    def of(self, layered: LayeredGraph, node: fx.Node, stage: int) -> tuple[Strategy, ...]:
        """The strategy of a node along every axis, in a stage."""
        key = layered.keys[layered.same[node]]
        return tuple(self.strategies[stage][axis][key] for axis, _ in self.axes)

    def placements(self, layered: LayeredGraph, value: Value, stage: int) -> Placements:
        """The placement in which a stage makes a value."""
        return tuple(s.outputs[value[1]] for s in self.of(layered, value[0], stage))


class Named(str):
    """An expression that is written as it is into emitted code."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def backward_of(node: fx.Node, grad_alloc_ratio: float) -> tuple[float, float]:
    """`largest_gradient_bytes` and `backward_gradient_bytes` of a node of a stage's graph, in bytes."""
    record = info(node)
    taken = dict.fromkeys((True, False), 0.0)
    for i, operand in enumerate(operands(node) if record.kind == "op" else []):
        if operand is not None and (record.product or i == 0) and info(operand).grad:
            taken[i in record.weights] += info(operand).size
    what = record, is_loss(record), SPLIT_LOSS in record.name
    largest = largest_gradient_bytes(record.size, taken[False], *what)
    weights = grad_alloc_ratio * taken[True]
    temporaries = record.kernel_bytes.workspace + record.kernel_bytes.chunk
    return float(largest), float(backward_gradient_bytes(record.size, taken[False], weights, *what) + temporaries)
