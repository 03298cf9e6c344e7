"""Values that depend on shapes and buffers alone, and the patterns of masks among them.

A value is computed when it is asked for. The mask of a long sequence is not computed, since it would take one byte for
each pair of tokens: it is bounded in blocks of BLOCK_SIZE x BLOCK_SIZE. A comparison is monotonic in each argument, so
that the least and the largest numbers of a block's rows and columns bound the comparison in the block. Blocks whose two
bounds differ, such as those on the diagonal of a causal mask, are computed one at a time.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from autopart.ir.graph import info, operands, shape_args
from autopart.sharding.rules import RULES, strategies
from autopart.sharding.rules.base import replaced

Take = Callable[[Tensor, bool], Tensor]
"""(numbers in rows and columns, whether the upper bound is asked for) -> one block, or a bound of every block."""
MAX_ELEMENTS = 2**24
"""The most elements of a value that is computed."""
BLOCK_SIZE = 128
"""Rows of a block, and columns of a block."""

COMPARISONS = {"aten.le": "-+", "aten.lt": "-+", "aten.ge": "+-", "aten.gt": "+-"}
"""Operator -> for each argument, whether the result is non-decreasing (+) or non-increasing (-) in it. The bounds hold
for integers and booleans alone: floating-point arguments may be NaN."""
LOGIC = {
    **dict.fromkeys(("aten.__and__", "aten.bitwise_and", "aten.logical_and"), "++"),
    **dict.fromkeys(("aten.__or__", "aten.bitwise_or", "aten.logical_or"), "++"),
    **dict.fromkeys(("aten.bitwise_not", "aten.logical_not"), "-"),
}
"""Operator on booleans -> the signs of its arguments, as in COMPARISONS."""
RESHAPES = ("aten.reshape", "aten.unsqueeze")
"""Operators whose bounds are those of their input where the last two dims stay."""

PATTERNS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "all": lambda row, column: row >= 0 * column,
    "causal": lambda row, column: row >= column,
}
"""Pattern -> the mask at a row and a column. It is non-decreasing in the row and non-increasing in the column."""


class Places(NamedTuple):
    """The keys j that a query i sees by its place: j <= i where `causal`; i - j < `behind` and j - i < `ahead` where
    these are not 0."""

    causal: bool = False
    behind: int = 0
    ahead: int = 0

    def mask(self, row: Callable[[bool], Tensor], column: Callable[[bool], Tensor], most: bool) -> Tensor:
        """The mask at rows and columns, or a bound: an upper one if `most`. Rows and columns are asked for alike."""
        seen = column(not most) <= row(most) if self.causal else column(True) >= 0 * row(True)
        seen = seen & (row(not most) - column(most) < self.behind) if self.behind else seen
        return seen & (column(not most) - row(most) < self.ahead) if self.ahead else seen


class ConstantValues:
    """The values and patterns of a graph's nodes that depend on shapes and buffers alone."""

    def __init__(self, buffers: Mapping[str, Tensor | None]) -> None:
        self.buffers = buffers
        self.known: dict[fx.Node, Tensor | None] = {}
        self.patterns: dict[fx.Node, str] = {}
        self.by_places: dict[fx.Node, Places | None] = {}

    def value(self, node: fx.Node) -> Tensor | None:
        """The node's value; None where it depends on data or has more than MAX_ELEMENTS elements.

        Dims along which the value repeats have stride 0.
        """
        if node not in self.known:
            self.known[node] = self._compute(node)
        return self.known[node]

    def pattern(self, node: fx.Node) -> str:
        """The pattern of a boolean node: "all" if it is true everywhere, "causal" if it is lower-triangular in its last
        two dims, "" if its pattern is another or is not known."""
        if node not in self.patterns:
            self.patterns[node] = self._pattern(node) if info(node).dtype == torch.bool else ""
        return self.patterns[node]

    def places(self, node: fx.Node) -> Places | None:
        """The keys that queries see by a square boolean mask, by their places alone; None where its values are not
        known, or depend on more. The first row and the last tell what the whole mask is then held against."""
        if node not in self.by_places:
            self.by_places[node] = self._places(node)
        return self.by_places[node]

    def _places(self, node: fx.Node) -> Places | None:
        shape = info(node).shape
        if len(shape) < 2 or shape[-1] != shape[-2] or not math.prod(shape):
            return None
        ends = [self._taken(node, partial(_row, at), True) for at in (0, shape[-1] - 1)]
        least, most = self._taken(node, _bound, False), self._taken(node, _bound, True)
        if least is None or most is None or any(end is None or end.numel() not in (1, shape[-1]) for end in ends):
            return None
        first, last = (end.expand(*end.shape[:-1], shape[-1]).flatten() for end in ends if end is not None)
        ahead, behind = int(first.sum()), int(last.sum())
        found = Places(ahead == 1 < shape[-1], behind % shape[-1], 0 if ahead == 1 else ahead % shape[-1])
        rows, columns = torch.arange(shape[-1])[:, None], torch.arange(shape[-1])[None]

        def wanted(take: Take, most: bool) -> Tensor:
            return found.mask(lambda upper: take(rows, upper), lambda upper: take(columns, upper), most)

        return found if self._is(wanted, node, least, most) else None

    def _compute(self, node: fx.Node) -> Tensor | None:
        record = info(node)
        if record.kind == "buffer":
            value = self.buffers.get(record.name)
            return value if value is None else value.cpu()
        if record.kind != "op" or len(record.shapes) > 1 or record.dtype.is_floating_point:
            return None
        values = {n: v for n in node.all_input_nodes if (v := self.value(n)) is not None}
        if len(values) < len(node.all_input_nodes):
            return None
        given, values, shape = _unrepeated_call(node, values)
        if shape.numel() > MAX_ELEMENTS:
            return None
        args, kwargs = fx.map_arg((given, node.kwargs), lambda n: values[n])
        result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
        return _without_equal_elements(result).expand(record.shape)

    def _pattern(self, mask: fx.Node) -> str:
        shape = torch.Size((1, 1, *info(mask).shape))
        if not shape.numel():
            return "all"
        least, most = self._taken(mask, _bound, False), self._taken(mask, _bound, True)
        if least is None or most is None:
            return ""
        rows, columns = torch.arange(shape[-2])[:, None], torch.arange(shape[-1])[None]

        def wanted(name: str, take: Take, most: bool) -> Tensor:
            return PATTERNS[name](take(rows, most), take(columns, not most))

        names = PATTERNS if shape[-2] == shape[-1] else ("all",)
        return next((name for name in names if self._is(partial(wanted, name), mask, least, most)), "")

    def _is(self, wanted: Callable[[Take, bool], Tensor], mask: fx.Node, least: Tensor, most: Tensor) -> bool:
        """Whether a mask equals the wanted one. `least` and `most` are the mask's bounds in every block."""
        lowest, highest = wanted(_bound, False), wanted(_bound, True)
        if bool((least & ~lowest | ~most & highest).any()):
            return False
        unsure = (least ^ most) | torch.zeros_like(lowest)
        for place in unsure.reshape(-1, *lowest.shape).any(0).nonzero().tolist():
            block = partial(_block, place)
            taken = self._taken(mask, block, True)
            if taken is None or bool((taken ^ wanted(block, True)).any()):
                return False
        return True

    def _taken(self, node: fx.Node, take: Take, most: bool) -> Tensor | None:
        """`take` of the node's value; None where the value is not known. `most` asks for the upper bound."""
        record, inputs = info(node), node.all_input_nodes
        name = ".".join(record.name.split(".")[:2])
        if name == "aten.expand":
            return self._taken(inputs[0], take, most)
        if name in RESHAPES and info(inputs[0]).shape[-2:] == record.shape[-2:]:
            taken = self._taken(inputs[0], take, most)
            if taken is not None and taken.shape[:-2].numel() == 1:
                return taken
        dtypes = {info(n).dtype for n in inputs}
        table = LOGIC if dtypes == {torch.bool} else COMPARISONS
        signs = None if any(d.is_floating_point for d in dtypes) else table.get(name)
        if signs is None:
            value = self.value(node)
            return None if value is None else take(torch.atleast_2d(_without_stride_zero(value)), most)
        args = [
            self._taken(a, take, most == (sign == "+")) if isinstance(a, fx.Node) else a
            for a, sign in zip(node.args, signs, strict=True)
        ]
        return None if any(a is None for a in args) else node.target(*args)  # type: ignore[operator]


def _unrepeated_call(node: fx.Node, values: Mapping[fx.Node, Tensor]) -> tuple[Any, dict[fx.Node, Tensor], torch.Size]:
    """The arguments, operands and shape of a smaller call: one element in each dim along which the value repeats.

    The value repeats along a dim if the operator's rule can split the dim, and every operand that the rule splits with
    it has stride 0 there.
    """
    record, rule, found, shape = info(node), RULES.get(info(node).name), dict(values), list(info(node).shape)
    if rule is None or callable(rule.resize):
        return node.args, found, torch.Size(shape)
    for strategy in strategies(record.name, shape_args(node), record.shapes, 1):
        out, pairs = strategy.outputs[0], list(zip(operands(node), strategy.inputs, strict=True))
        taken = [(n, p) for n, p in pairs if n is not None and p is not None and p.kind == "S"]
        if out.kind != "S" or strategy.local or any(p.parts for p in (out, *(p for _, p in taken))):
            continue
        size = record.shape[out.dim]
        if all(values[n].stride(p.dim) == 0 and values[n].shape[p.dim] == size for n, p in taken):
            shape[out.dim] = min(1, size)
            for n, p in taken:
                found[n] = found[n].narrow(p.dim, 0, min(1, size))
    args = node.args if rule.resize is None else replaced(tuple(node.args), rule.resize, shape)
    return args, found, torch.Size(shape)


def _bound(numbers: Tensor, most: bool) -> Tensor:
    """The least number of every block, or the largest: (..., row blocks, column blocks)."""
    for dim in (-2, -1):
        parts = numbers.split(BLOCK_SIZE, dim)
        numbers = torch.cat([p.amax(dim, True) if most else p.amin(dim, True) for p in parts], dim)
    return numbers


def _block(place: list[int], numbers: Tensor, most: bool) -> Tensor:
    """The numbers of the block at a place (row block, column block). A dim of size 1 is the same in all blocks."""
    for dim, number in zip((-2, -1), place, strict=True):
        if numbers.shape[dim] > 1:
            start = number * BLOCK_SIZE
            numbers = numbers.narrow(dim, start, min(BLOCK_SIZE, numbers.shape[dim] - start))
    return numbers


def _row(at: int, numbers: Tensor, most: bool) -> Tensor:
    """One row of the numbers."""
    return numbers.narrow(-2, at, 1) if numbers.shape[-2] > 1 else numbers


def _without_stride_zero(values: Tensor) -> Tensor:
    """The tensor with size 1 in every dim of stride 0."""
    for dim, stride in enumerate(values.stride()):
        if stride == 0:
            values = values.narrow(dim, 0, min(1, values.shape[dim]))
    return values


def _without_equal_elements(values: Tensor) -> Tensor:
    """The tensor with size 1 in every dim along which all elements are equal. Large tensors are left as they are."""
    if not 0 < values.numel() <= 2**22:
        return values
    for dim, size in enumerate(values.shape):
        first = values.narrow(dim, 0, 1)
        if size > 1 and torch.equal(values, first.expand_as(values)):
            values = first
    return values
