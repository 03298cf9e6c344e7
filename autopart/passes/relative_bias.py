"""A bias of pairs of a query and a key that depends on the difference of their places alone, as a vector.

The operators that make the bias (queries, keys) are repeated for one row of queries + keys - 1 differences: T5's
buckets and its embedding, ALiBi's slopes. Every number is computed as before, once instead of once for every pair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from autopart.ir.graph import info, new_call
from autopart.passes.constant_values import ConstantValues
from autopart.sharding.rules.pointwise import RULES as POINTWISE

aten = torch.ops.aten
Dims = tuple[int, int]
"""The dims of queries and of keys, counted from the right: (-2, -1)."""


def by_places(node: fx.Node, queries: int, keys: int, constants: ConstantValues) -> fx.Node | None:
    """The node's values in one row: of its last dims (queries, keys) the first has size 1, and element
    j - i + queries - 1 of the other is what query i and key j had. None where the values depend on more."""
    if min(queries, keys) < 2 or info(node).shape[-2:] != (queries, keys):
        return None
    return _Row(queries, keys, constants).of(node, (-2, -1))


class _Row:
    """The row of every value that was asked for."""

    def __init__(self, queries: int, keys: int, constants: ConstantValues) -> None:
        self.queries, self.keys, self.constants = queries, keys, constants
        self.made: dict[tuple[fx.Node, Dims], fx.Node | None] = {}

    def of(self, node: fx.Node, dims: Dims) -> fx.Node | None:
        """The row of a node, whose size is 1 along the first of dims and queries + keys - 1 along the other."""
        key = node, dims
        if key not in self.made:
            self.made[key] = self._difference(node, dims) or self._call(node, dims)
        return self.made[key]

    def _call(self, node: fx.Node, dims: Dims) -> fx.Node | None:
        """The node's operator, of rows."""
        name = info(node).name
        repeated = MOVES.get(name) or (_pointwise if name in POINTWISE else None)
        if repeated is None or len(info(node).shapes) > 1:
            return None
        args = repeated(self, node, dims)
        if args is None:
            return None
        with node.graph.inserting_after(node):
            return new_call(node.graph, node.target, args, node, dict(node.kwargs))  # type: ignore[arg-type]

    def is_pair(self, node: fx.Node, dims: Dims) -> bool | None:
        """Whether a node has a number for every pair along dims; None where it has one for every query or key."""
        shape = info(node).shape
        sizes = [shape[d] if -d <= len(shape) else 1 for d in dims]
        return None if 1 in sizes and sizes != [1, 1] else sizes != [1, 1]

    def sizes(self, sizes: Any, dims: Dims) -> list[int]:
        """The sizes of a value, as those of its row."""
        found = list(sizes)
        found[dims[0]], found[dims[1]] = 1, self.queries + self.keys - 1
        return found

    def _difference(self, node: fx.Node, dims: Dims) -> fx.Node | None:
        """Keys' places less queries', or the reverse, plus a number, as a range of whole numbers."""
        if info(node).name != "aten.sub.Tensor" or len(node.args) != 2 or node.kwargs:
            return None
        starts: dict[int, tuple[int, int]] = {}
        for sign, operand in zip((1, -1), node.args, strict=True):
            for at, (dim, size) in enumerate(zip(dims, (self.queries, self.keys), strict=True)):
                start = self._start(operand, dim, size)
                if start is not None:
                    starts[at] = sign, start
        if len(starts) < 2 or starts[0][0] == starts[1][0]:
            return None
        sign = starts[1][0]
        offset = sign * (starts[1][1] - starts[0][1])
        graph, shape = node.graph, self.sizes(info(node).shape, dims)
        with graph.inserting_after(node):
            whole = {"dtype": info(node).dtype}
            line = new_call(graph, aten.arange.start, (1 - self.queries, self.keys), node, whole)
        for target, number, idle in ((aten.mul.Tensor, sign, 1), (aten.add.Tensor, offset, 0)):
            if number != idle:
                with graph.inserting_after(line):
                    line = new_call(graph, target, (line, number), node)
        with graph.inserting_after(line):
            return new_call(graph, aten.reshape.default, (line, shape), node)

    def _start(self, operand: Any, dim: int, size: int) -> int | None:
        """The first of the places start, start + 1, ... that an operand counts along a dim; it has no other."""
        shape = info(operand).shape if isinstance(operand, fx.Node) else ()
        if -dim > len(shape) or shape[dim] != size or max(shape[:dim] + shape[dim:][1:], default=1) > 1:
            return None
        value = self.constants.value(operand)
        if value is None or value.dtype != torch.int64:
            return None
        flat = value.flatten()
        return int(flat[0]) if torch.equal(flat - flat[0], torch.arange(size)) else None


def _pointwise(row: _Row, node: fx.Node, dims: Dims) -> tuple[Any, ...] | None:
    """An operator by elements: operands of pairs as rows, others as they are."""
    args: list[Any] = []
    for arg in node.args:
        if isinstance(arg, fx.Node):
            pair = row.is_pair(arg, dims)
            arg = None if pair is None else row.of(arg, dims) if pair else arg
            if arg is None:
                return None
        elif isinstance(arg, (list, tuple)):
            return None
        args.append(arg)
    return tuple(args)


def _moved(where: Callable[[fx.Node], list[int] | None], sizes: bool = False) -> Callable[..., tuple[Any, ...] | None]:
    """An operator that moves whole dims. `where` has for every dim of the output the dim of the input; -1 of a new one.
    `sizes`: argument 1 is the size of the output."""

    def repeated(row: _Row, node: fx.Node, dims: Dims) -> tuple[Any, ...] | None:
        source, places = node.args[0], where(node)
        assert isinstance(source, fx.Node)
        if places is None:
            return None
        rank = len(info(source).shape)
        inner = [places[d] - rank if places[d] >= 0 else 0 for d in dims]
        if 0 in inner or row.is_pair(source, (inner[0], inner[1])) is not True:
            return None
        made = row.of(source, (inner[0], inner[1]))
        rest = (row.sizes(info(node).shape, dims),) if sizes else node.args[1:]
        return None if made is None else (made, *rest)

    return repeated


def _permuted(node: fx.Node) -> list[int]:
    dims: Any = node.args[1]
    return [d % len(dims) for d in dims]


def _transposed(node: fx.Node) -> list[int]:
    found = list(range(len(info(node).shape)))
    a, b = node.args[1:3]
    found[a], found[b] = found[b], found[a]  # type: ignore[index]
    return found


def _unsqueezed(node: fx.Node) -> list[int]:
    dim: Any = node.args[1]
    rank = len(info(node).shape)
    at = dim % rank
    return [*range(at), -1, *range(at, rank - 1)]


def _reshaped(node: fx.Node) -> list[int] | None:
    """Of a reshape that adds or removes dims of size 1."""
    before, after = info(node.args[0]).shape, info(node).shape  # type: ignore[arg-type]
    wide = [d for d, n in enumerate(before) if n > 1]
    if [before[d] for d in wide] != [n for n in after if n > 1]:
        return None
    rest = iter(wide)
    return [next(rest) if n > 1 else -1 for n in after]


def _expanded(node: fx.Node) -> list[int]:
    extra = len(info(node).shape) - len(info(node.args[0]).shape)  # type: ignore[arg-type]
    return [max(d - extra, -1) for d in range(len(info(node).shape))]


def _embedded(row: _Row, node: fx.Node, dims: Dims) -> tuple[Any, ...] | None:
    """embedding(table, numbers), whose last dim is the table's."""
    table, numbers, *rest = node.args
    assert isinstance(numbers, fx.Node)
    inner = dims[0] + 1, dims[1] + 1
    if max(inner) > -1 or row.is_pair(numbers, inner) is not True:
        return None
    made = row.of(numbers, inner)
    return None if made is None else (table, made, *rest)


MOVES: dict[str, Callable[[_Row, fx.Node, Dims], tuple[Any, ...] | None]] = {
    "aten.permute": _moved(_permuted),
    "aten.transpose.int": _moved(_transposed),
    "aten.unsqueeze": _moved(_unsqueezed),
    "aten.reshape": _moved(_reshaped, sizes=True),
    "aten.expand": _moved(_expanded, sizes=True),
    "aten.embedding": _embedded,
}
"""Operator -> the arguments with which it makes the row of its values."""
