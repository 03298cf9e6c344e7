"""What is added to the scores of attention, and which keys are hidden, taken apart into the arguments of
`autopart.kernels.attention`.

A boolean mask is a conjunction. What depends on places alone becomes `causal` and `window`, what depends on samples and
keys alone becomes `padding`. Of a float mask the least number, or minus infinity, stands for keys that are hidden; a
bias that depends on the difference of the places alone becomes `relative`, of queries + keys - 1 numbers a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from autopart.ir.graph import call_args, has_gradient, info, new_call
from autopart.passes.constant_values import ConstantValues
from autopart.passes.relative_bias import by_places

aten = torch.ops.aten
AND = ("aten.__and__.Tensor", "aten.bitwise_and.Tensor", "aten.logical_and")
NOT = ("aten.bitwise_not", "aten.logical_not")
FILLS = {
    "aten.where.ScalarOther": (0, 1, 2, False),
    "aten.where.self": (0, 1, 2, False),
    "aten.where.ScalarSelf": (0, 2, 1, True),
    "aten.where.Scalar": (0, 1, 2, False),
    "aten.masked_fill.Scalar": (1, 0, 2, True),
}
"""Operator -> the places of the condition, of the other values and of the number, and whether the number is where the
condition is true."""
MODERATE = 1e4
"""The largest constant of an additive mask that hides nothing."""
BOUNDED = {
    f"aten.{name}"
    for name in """arange arange.start arange.start_step add.Tensor sub.Tensor mul.Tensor div.Tensor neg reshape
    unsqueeze expand slice.Tensor select.int permute transpose.int _to_copy cumsum cat full ones zeros squeeze.dim
    pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor reciprocal abs clamp_min clamp_max clamp rsub.Scalar alias
    full_like ones_like zeros_like repeat""".split()
}
"""Operators of an additive mask that hides nothing, as ALiBi."""


@dataclass
class Masks:
    """The masks of an attention.

    causal, behind, ahead  as `constant_values.Places`
    padding, rest          conditions that all must hold, of samples and keys, and of samples, queries and keys
    added                  what is added to scores: without a gradient, or with one
    fill                   the number that stands for a hidden key; None where no key is hidden by a number
    fills                  how often it is added
    blocked                whether the fill is in place of scores, so that it stops their gradients
    outside                whether something with a gradient is added beside the fill
    """

    causal: bool = False
    behind: int = 0
    ahead: int = 0
    padding: list[fx.Node] = field(default_factory=list)
    rest: list[fx.Node] = field(default_factory=list)
    added: list[fx.Node] = field(default_factory=list)
    fill: float | None = None
    fills: int = 0
    blocked: bool = False
    outside: bool = False

    @property
    def blind(self) -> bool:
        """Whether a query may see no key: by places alone each sees its own."""
        return bool(self.padding or self.rest)


def hide(masks: Masks, seen: fx.Node, constants: ConstantValues) -> None:
    """Add the factors of a condition, true where a query sees a key."""
    record = info(seen)
    if record.name in AND:
        for factor in seen.args:
            hide(masks, factor, constants)  # type: ignore[arg-type]
        return
    if record.name == "aten.expand" or (record.name == "aten._to_copy" and info(seen.args[0]).dtype == torch.bool):  # type: ignore[arg-type]
        hide(masks, seen.args[0], constants)  # type: ignore[arg-type]
        return
    shape = record.shape
    places = constants.places(seen)
    if places is not None:
        masks.causal |= places.causal
        masks.behind = min(masks.behind or places.behind, places.behind or masks.behind)
        masks.ahead = min(masks.ahead or places.ahead, places.ahead or masks.ahead)
    elif len(shape) == 4 and shape[1] == shape[2] == 1:
        masks.padding.append(seen)
    else:
        masks.rest.append(seen)


def add(masks: Masks, node: fx.Node, sign: int, constants: ConstantValues) -> bool:
    """Add what is added to the scores, or subtracted if `sign` is -1; whether it is understood."""
    record = info(node)
    call = call_args(node, "aten.add.Tensor")
    if len(call) == 2 and all(isinstance(a, fx.Node) for a in call) and not node.kwargs:
        return all(add(masks, a, sign, constants) for a in call)
    if (filled := fill_of(node)) and sign == 1:
        hidden, rest, number, negated = filled
        if not hide_by(masks, number, hidden, negated, constants):
            return False
        outside, fills = masks.outside, masks.fills
        understood = _is_zero(rest) or (isinstance(rest, fx.Node) and add(masks, rest, sign, constants))
        masks.outside, masks.fills = outside, fills
        return understood
    if _is_zero(node):
        return True
    if call := call_args(node, "aten.expand"):
        return add(masks, call[0], sign, constants)
    if not record.grad and not _moderate(node, constants):
        return False
    if sign == -1:
        with node.graph.inserting_after(node):
            node = new_call(node.graph, aten.neg.default, (node,), node)
    masks.outside |= record.grad
    masks.added.append(node)
    return True


def hide_by(masks: Masks, number: float, condition: fx.Node, negated: bool, constants: ConstantValues) -> bool:
    """Hide keys by a number where a condition is true, if `negated`, or false; False where other keys are hidden by a
    number of another kind: a finite one, or minus infinity."""
    if masks.fill is not None and math.isinf(masks.fill) != math.isinf(number):
        return False
    masks.fill, masks.fills = number, masks.fills + 1
    while negated and (inner := _inner(condition)) is not None:
        condition, negated = inner
    if negated:
        with condition.graph.inserting_after(condition):
            condition = new_call(condition.graph, aten.logical_not.default, (condition,), condition)
    hide(masks, condition, constants)
    return True


def _inner(condition: fx.Node) -> tuple[fx.Node, bool] | None:
    """The condition that a condition negates, or tests the fills of, and whether its own negation is that one's."""
    if info(condition).name in NOT:
        return condition.args[0], False  # type: ignore[return-value]
    return _of_fill(condition)


def _of_fill(condition: fx.Node) -> tuple[fx.Node, bool] | None:
    """Of a test whether a mask of zeros and fills is filled: the mask's condition, and whether it is then negated."""
    cast, below = call_args(condition, "aten._to_copy"), call_args(condition, "aten.lt.Scalar")
    source = cast[0] if cast else below[0] if below and below[1] <= 0 else None
    found = fill_of(source) if isinstance(source, fx.Node) else None
    if found is None or not _is_zero(found[1]) or (below and not found[2] < below[1]):
        return None
    return found[0], found[3]


def fill_of(node: fx.Node) -> tuple[fx.Node, Any, float, bool] | None:
    """The condition, the other values and the number of a mask that hides keys by a number, and whether the number is
    where the condition is true; else None."""
    record = info(node)
    if record.kind != "op" or record.name not in FILLS:
        return None
    *places, negated = FILLS[record.name]
    condition, rest, number = (node.args[at] for at in places)
    if isinstance(number, fx.Node):
        first, second = _constant(number), _constant(rest) if isinstance(rest, fx.Node) else None
        rest, number, negated = (number, second, True) if second is not None and second < 0 else (rest, first, negated)
    if not isinstance(number, (int, float)) or not isinstance(condition, fx.Node):
        return None
    least = max(torch.finfo(record.dtype).min, -1e30) if has_gradient(record.dtype) else -math.inf
    return (condition, rest, float(number), negated) if number <= least else None


def _constant(node: fx.Node) -> float | None:
    """The number that fills a tensor."""
    for name in ("aten.full", "aten.full_like"):
        if call := call_args(node, name):
            return float(call[1])
    return 0.0 if info(node).name in ("aten.zeros", "aten.zeros_like", "aten.new_zeros") else None


def _is_zero(value: Any) -> bool:
    """Whether a node, or a number, is zero."""
    return (_constant(value) if isinstance(value, fx.Node) else value) == 0.0


def _moderate(node: fx.Node, constants: ConstantValues) -> bool:
    """Whether a value without gradient hides no key: it is made of whole numbers, and of moderate constants."""
    seen, todo = {node}, [node]
    while todo:
        node = todo.pop()
        record = info(node)
        if record.kind != "op" and record.dtype.is_floating_point:
            value = constants.value(node) if record.kind == "buffer" else None
            if value is None or not bool((value.abs() <= MODERATE).all()):
                return False
        if record.kind == "op" and (record.name not in BOUNDED or not all(abs(a) <= MODERATE for a in _factors(node))):
            return False
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        todo += new
    return True


def _factors(node: fx.Node) -> list[float]:
    """The numbers that an operator multiplies by or adds; sizes and places are none."""
    counted = info(node).name.split(".")[1] in ("add", "sub", "mul", "div", "rsub", "pow", "full", "full_like")
    return [a for a in node.args if isinstance(a, float if not counted else (int, float))]


@dataclass
class Arguments:
    """The arguments of `autopart.kernels.attention.attention` that masks become."""

    mask: fx.Node | None = None
    padding: fx.Node | None = None
    bias: fx.Node | None = None
    relative: fx.Node | None = None
    causal: bool = False
    window: int = 0
    even: bool = False


def _broadcasts(shape: tuple[int, ...], scores: tuple[int, ...]) -> bool:
    """Whether the last sizes of scores are those of a shape, or 1 there."""
    return len(shape) <= 4 and all(n in (1, m) for n, m in zip(shape[::-1], scores[::-1], strict=False))


class Writer:
    """Writes the arguments of masks into a graph, the same for all attentions that have the same masks."""

    def __init__(self, graph: fx.Graph, constants: ConstantValues) -> None:
        self.graph, self.constants = graph, constants
        self.written: dict[tuple[object, ...], fx.Node] = {}

    def arguments(
        self, masks: Masks, query: fx.Node, keys: int, softmax: bool, rounds: bool, sinks: bool
    ) -> Arguments | None:
        """The arguments for queries (samples, heads, queries, width) and so many keys; None where no call equals the
        masks.

        rounds   whether it is torch's fused attention
        softmax  whether the softmax is a plain one, which gives NaN to a query whose scores are all minus infinity,
                 where others give zeros

        torch's fused attention loses its log-sum-exp to rounding where all scores of a query are the least number, so
        that its gradients there are no derivatives: a query that may see no key for its place is left to torch.
        """
        window = (masks.behind, 0) if masks.causal else (masks.behind, masks.ahead)
        if not masks.causal and window[0] != window[1]:
            return None
        found = Arguments(causal=masks.causal, window=window[0])
        if masks.fill is not None and masks.blind and not sinks:
            found.even = math.isfinite(masks.fill)
            inexact = masks.blocked or masks.outside or masks.fills > 1 or info(query).dtype == torch.float16
            inexact |= rounds and (found.causal or found.window > 0)
            if inexact if found.even else softmax:
                return None
        scores = (*info(query).shape[:3], keys)
        for node in masks.padding:
            found.padding = self._both(found.padding, self._keys_of(node, scores[0], keys))
        for node in masks.rest:
            found.mask = self._both(found.mask, node)
        fits = found.mask is None or _broadcasts(info(found.mask).shape, scores)
        return found if fits and all(self._add(found, node, scores) for node in masks.added) else None

    def _add(self, found: Arguments, node: fx.Node, scores: tuple[int, ...]) -> bool:
        """Put an added tensor where it belongs; False where two would be in one place."""
        shape = (1,) * (4 - len(info(node).shape)) + tuple(info(node).shape)
        if not _broadcasts(shape, scores):
            return False
        if shape[2] > 1 and shape[3] > 1:
            relative = self._relative(node, scores) if shape[0] == 1 else None
            if relative is not None and found.relative is None:
                found.relative = relative
                return True
        if info(node).grad:
            if found.bias is not None or shape[2:] != scores[2:]:
                return False
            found.bias = self._reshaped(node, shape)
            return True
        if found.mask is not None:
            return False
        found.mask = self._reshaped(node, shape)
        return True

    def _relative(self, node: fx.Node, scores: tuple[int, ...]) -> fx.Node | None:
        heads, queries, keys = scores[1:]
        key = ("relative", node, heads)
        if key not in self.written:
            found = by_places(node, queries, keys, self.constants)
            if found is None:
                return None
            count, places = math.prod(info(found).shape[:-2]), queries + keys - 1
            with self.graph.inserting_after(found):
                flat = new_call(self.graph, aten.reshape.default, (found, [count, places]), node)
            if count != heads:
                with self.graph.inserting_after(flat):
                    flat = new_call(self.graph, aten.expand.default, (flat, [heads, places]), node)
            self.written[key] = flat
        return self.written[key]

    def _keys_of(self, node: fx.Node, samples: int, keys: int) -> fx.Node:
        """(samples, keys) of a condition (samples or 1, 1, 1, keys or 1)."""
        key = ("padding", node)
        if key not in self.written:
            shape = info(node).shape
            with self.graph.inserting_after(node):
                flat = new_call(self.graph, aten.reshape.default, (node, [shape[0], shape[3]]), node)
            if info(flat).shape != (samples, keys):
                with self.graph.inserting_after(flat):
                    flat = new_call(self.graph, aten.expand.default, (flat, [samples, keys]), node)
            self.written[key] = flat
        return self.written[key]

    def _both(self, first: fx.Node | None, second: fx.Node) -> fx.Node:
        """Both conditions."""
        if first is None:
            return second
        key = ("and", first, second)
        if key not in self.written:
            with self.graph.inserting_after(max(first, second)):
                self.written[key] = new_call(self.graph, aten.bitwise_and.Tensor, (first, second), second)
        return self.written[key]

    def _reshaped(self, node: fx.Node, shape: tuple[int, ...]) -> fx.Node:
        if tuple(info(node).shape) == shape:
            return node
        key = ("reshaped", node, shape)
        if key not in self.written:
            with self.graph.inserting_after(node):
                self.written[key] = new_call(self.graph, aten.reshape.default, (node, list(shape)), node)
        return self.written[key]
