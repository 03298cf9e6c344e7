"""Attention that a model writes out: softmax(cap(scale q k^T) + masks) v, with or without sinks and dropout."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from autopart.ir.graph import call_args, info, new_call
from autopart.ir.random_ops import Stream
from autopart.passes.attention_masks import fill_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Attention:
    """An attention of a graph, with query, key and value (samples, heads, n, width).

    call    the node whose value it is
    inside  the operators that are replaced
    terms   what is added to the scores, or a boolean mask of them, each with its sign
    fills   numbers that stand in place of scores, each with a condition and whether it is where that is true
    plain   whether its softmax gives NaN to a query whose scores are all minus infinity
    drawn   the share that dropout drops, and its stream of random numbers
    """

    call: fx.Node
    inside: list[fx.Node]
    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float
    cap: float = 0.0
    terms: list[tuple[fx.Node, int]] = field(default_factory=list)
    fills: list[tuple[float, fx.Node, bool]] = field(default_factory=list)
    sinks: fx.Node | None = None
    plain: bool = True
    drawn: tuple[float, Stream] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether torch's attention has all of it but masks."""
        return not self.cap and self.sinks is None and self.drawn is None


@dataclass(frozen=True)
class _Scores:
    """Scores before the softmax; fields as of `Attention`. `key` is (samples, heads, width, keys)."""

    query: fx.Node
    key: fx.Node
    inside: list[fx.Node]
    scale: float = 1.0
    cap: float = 0.0
    terms: list[tuple[fx.Node, int]] = field(default_factory=list)
    fills: list[tuple[float, fx.Node, bool]] = field(default_factory=list)


def written_out(softmax: fx.Node) -> Attention | None:
    """The attention whose softmax a node is; None where its operators are others, or read by others."""
    shape, x = info(softmax).shape, softmax.args[0]
    if len(shape) != 4 or softmax.args[1] not in (-1, 3) or not isinstance(x, fx.Node) or not info(x).grad:
        return None
    behind = _behind(softmax)
    if behind is None:
        return None
    call, value, inside, drawn, cut = behind
    shifted = _shifted(x, softmax)
    scored, sinks, more = _with_sinks(*(shifted or (x, softmax)))
    if scored is None or (sinks is not None) != cut or (shifted and sinks is None):
        return None
    reader = more[-1] if more else softmax
    scores = _scores(scored, reader, info(scored).shape)
    if scores is None:
        return None
    with softmax.graph.inserting_before(softmax):
        query, key = (_in_four(n, info(scored).shape) for n in (scores.query, scores.key))
        key = _transposed(key)
    with softmax.graph.inserting_before(call):
        value = _in_four(value, info(scored).shape)
    shift = [n for n in (x, *x.all_input_nodes) if shifted and n is not reader]
    return Attention(
        call, [*scores.inside, *more, *shift, softmax, *inside], query, key, value, scores.scale, scores.cap,
        scores.terms, scores.fills, sinks, info(softmax).name == "aten.softmax.int", drawn,
    )  # fmt: skip


def _behind(softmax: fx.Node) -> tuple[fx.Node, fx.Node, list[fx.Node], Any, bool] | None:
    """From the softmax to the product with the values: this, the values, the operators, dropout, and whether the last
    column is cut off."""
    node, inside, drawn, cut = softmax, list[fx.Node](), None, False
    while len(node.users) == 1:
        (user,) = node.users
        if user.op != "call_function":
            return None
        inside.append(user)
        record = info(user)
        if record.name in ("aten.matmul", "aten.bmm"):
            left, right = user.args[:2]
            square = left is node is not right and isinstance(right, fx.Node)
            alike = square and info(right).shape[:-2] == info(node).shape[:-2]  # type: ignore[arg-type]
            return (user, right, inside, drawn, cut) if alike else None  # type: ignore[return-value]
        if record.name == "aten.slice.Tensor" and not cut and len(user.args) == 4:
            width = info(node).shape[-1]
            cut = user.args[1] in (3, -1) and user.args[2] in (0, None) and user.args[3] in (-1, width - 1)
            if not cut:
                return None
        elif record.name == "autopart.dropout" and drawn is None:
            drawn = user.args[1:3]
        elif record.name == "aten.reshape":
            if record.shape != (math.prod(info(node).shape[:2]), *info(node).shape[2:]):
                return None
        elif record.name != "aten._to_copy" or not record.dtype.is_floating_point:
            return None
        node = user
    return None


def _shifted(x: fx.Node, softmax: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Scores, and the node that reads them, of scores less their greatest along the last dim, which changes no
    softmax."""
    whole, most = (*call_args(x, "aten.sub.Tensor"), None, None)[:2]
    if not isinstance(whole, fx.Node) or not isinstance(most, fx.Node) or list(x.users) != [softmax]:
        return None
    pick = call_args(most, "autopart.getitem")
    greatest = call_args(pick[0], "aten.max.dim") if pick and pick[1] == 0 else call_args(most, "aten.amax")
    along = (-1, len(info(x).shape) - 1, [-1])
    right = greatest and greatest[0] is whole and greatest[1] in along and greatest[2:] == (True,)
    others = {n for n in whole.users if n is not x and n is not most and (not pick or n is not pick[0])}
    return (whole, x) if right and not others and list(most.users) == [x] else None


def _with_sinks(x: fx.Node, reader: fx.Node) -> tuple[fx.Node | None, fx.Node | None, list[fx.Node]]:
    """Scores, a vector of a score for each head that is put behind them, and the operators that do so."""
    joined = call_args(x, "aten.cat")
    if not joined:
        return x, None, []
    parts = joined[0]
    if len(parts) != 2 or joined[1:] not in ((-1,), (3,)):
        return None, None, []
    scores, column = parts
    heads, more = info(scores).shape[1], [x]
    if info(column).shape[-1] != 1:
        return None, None, []
    while isinstance(column, fx.Node) and info(column).shape != (heads,):
        record = info(column)
        kept = record.name == "aten.reshape" and record.shape == (1, heads, 1, 1)
        if not kept and record.name not in ("aten.expand", "aten._to_copy"):
            return None, None, []
        more.insert(0, column)
        column = column.args[0]
    return (scores, column, more) if any(info(n).shape == (1, heads, 1, 1) for n in more) else (None, None, [])


def _scores(node: fx.Node, reader: fx.Node, whole: tuple[int, ...]) -> _Scores | None:
    """The scores that a node is, which `reader` alone reads."""
    if list(node.users) != [reader] or node.op != "call_function":
        return None
    record = info(node)
    if record.name in ("aten.matmul", "aten.bmm"):
        query, key = node.args
        return _Scores(query, key, [node]) if info(query).shape[:-2] == info(key).shape[:-2] else None  # type: ignore[arg-type]
    found = None
    if record.name in ("aten.reshape", "aten._to_copy"):
        flat = math.prod(whole[:2]), *whole[2:]
        allowed = record.shape in (whole, flat) and record.dtype.is_floating_point
        found = _scores(node.args[0], node, whole) if allowed else None  # type: ignore[arg-type]
    elif record.name == "aten.baddbmm":
        found = _added_to_product(node, whole)
    elif record.name in ("aten.mul.Tensor", "aten.div.Tensor"):
        found = _scaled(node, whole)
    elif filled := fill_of(node):
        inner = _scores(filled[1], node, whole) if isinstance(filled[1], fx.Node) else None
        found = inner and replace(inner, fills=[*inner.fills, (filled[2], filled[0], filled[3])])
    elif record.name in ("aten.add.Tensor", "aten.sub.Tensor") and len(node.args) == 2 and not node.kwargs:
        found = _sum(node, whole)
    return found and replace(found, inside=[*found.inside, node])


def _sum(node: fx.Node, whole: tuple[int, ...]) -> _Scores | None:
    """Scores and a term."""
    first, second = node.args
    minus = info(node).name == "aten.sub.Tensor"
    for scored, term in ((first, second),) if minus else ((first, second), (second, first)):
        if isinstance(scored, fx.Node) and isinstance(term, fx.Node) and (found := _scores(scored, node, whole)):
            return replace(found, terms=[*found.terms, (term, -1 if minus else 1)])
    return None


def _scaled(node: fx.Node, whole: tuple[int, ...]) -> _Scores | None:
    """Scores times a number, or a number times the tanh of scores over that number."""
    x, number = node.args
    if not isinstance(x, fx.Node) or not isinstance(number, (int, float)) or not number:
        return None
    if info(x).name == "aten.tanh" and info(node).name == "aten.mul.Tensor" and list(x.users) == [node]:
        inner = x.args[0]
        quotient = call_args(inner, "aten.div.Tensor")
        found = _scores(quotient[0], inner, whole) if quotient and list(inner.users) == [x] else None  # type: ignore[union-attr, arg-type]
        if not found or found.cap or found.terms or found.fills or quotient[1] != number or number < 0:
            return None
        return replace(found, cap=float(number), inside=[*found.inside, inner, x])  # type: ignore[list-item]
    found = _scores(x, node, whole)
    if not found or found.cap or found.terms or found.fills:
        return None
    factor = number if info(node).name == "aten.mul.Tensor" else 1 / number
    return replace(found, scale=found.scale * factor)


def _added_to_product(node: fx.Node, whole: tuple[int, ...]) -> _Scores | None:
    """baddbmm: beta term + alpha q k^T, of samples x heads."""
    term, query, key = node.args[:3]
    beta, alpha = (node.kwargs.get(name, 1) for name in ("beta", "alpha"))
    if len(node.args) > 3 or beta not in (0, 1) or not isinstance(term, fx.Node):
        return None
    terms = []
    if beta:
        shape = info(term).shape
        if len(shape) != 3 or shape[0] != whole[0] * whole[1]:
            return None
        with node.graph.inserting_after(term):
            terms = [(new_call(node.graph, aten.reshape.default, (term, [*whole[:2], *shape[1:]]), term), 1)]
    return _Scores(query, key, [], float(alpha), terms=terms)  # type: ignore[arg-type]


def _in_four(node: fx.Node, whole: tuple[int, ...]) -> fx.Node:
    """(samples, heads, n, width) of a node (samples heads, n, width), or the node itself."""
    if len(info(node).shape) == 4:
        return node
    wanted = (*whole[:2], *info(node).shape[1:])
    before = call_args(node, "aten.reshape")
    if before and info(before[0]).shape == wanted:
        return before[0]
    return new_call(node.graph, aten.reshape.default, (node, list(wanted)), node)


def _transposed(key: fx.Node) -> fx.Node:
    """A node with its last two dims swapped: what was swapped before, where it was."""
    swap = call_args(key, "aten.transpose.int")
    if swap and {d % 4 for d in swap[1:]} == {2, 3}:
        return swap[0]
    return new_call(key.graph, aten.transpose.int, (key, 2, 3), key)
