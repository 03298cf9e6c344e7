"""Attention becomes the operator `attention` on GPUs, where that keeps no number for every pair of a query and a key.

Three forms are found: torch's attention with a mask of pairs, the same with dropout (`passes/randomness.py`), and
attention written out as two products, a softmax and what is added to the scores between. Where no mask is left, or a
causal one alone, torch's attention stays, or takes the place of what is written out. `passes/attention_masks.py`
takes the masks apart. Keys and values that are repeated for the heads of queries are passed as they were before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from autopart.ir.graph import Traced, call_args, calls, info, new_call, update_info
from autopart.ir.random_ops import dropout_attention
from autopart.kernels.attention import MAX_WIDTH, attention
from autopart.kernels.launch import TRITON_NAMES
from autopart.passes.attention_masks import Arguments, Masks, Writer, add, hide, hide_by
from autopart.passes.attention_scores import Attention, written_out
from autopart.passes.constant_values import ConstantValues
from autopart.passes.traffic import traffic

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
ATTENTION = "aten.scaled_dot_product_attention"
FUSED = "attention"
"""The operator, as `no_fuse` names it."""


def fuse_attention(traced: Traced) -> None:
    """Replace attentions in place; what is replaced is left without readers."""
    graph, constants = traced.graph, ConstantValues(traced.buffers)
    writer = Writer(graph, constants)
    for node in calls(graph):
        find = FORMS.get(info(node).name) if node.users else None
        found = find(node) if find is not None else None
        if found is None or not _fits(found):
            continue
        masks = _masks(found, constants)
        keys = info(found.key).shape[2]
        kind = found.plain, info(node).name == ATTENTION, found.sinks is not None
        given = masks and writer.arguments(masks, found.query, keys, *kind)
        if given and _pays(found, given):
            _replace(graph, found, given)
    for node in calls(graph):
        if info(node).name == ATTENTION:
            _ungroup(graph, node)
    graph.eliminate_dead_code()


def _torch_s(node: fx.Node) -> Attention | None:
    """torch's attention under a mask."""
    given: tuple[Any, ...] = (*node.args, *(None, 0.0, False)[len(node.args) - 3 :])
    query, key, value, mask, p, causal = given
    if not isinstance(mask, fx.Node) or p or causal or len(info(query).shape) != 4:
        return None
    scale: Any = node.kwargs.get("scale") or 1 / math.sqrt(info(query).shape[-1])
    return Attention(node, [node], query, key, value, scale, terms=[(mask, 1)], plain=False)


def _with_dropout(node: fx.Node) -> Attention | None:
    """The same with dropout."""
    args: tuple[Any, ...] = node.args
    query, key, value, mask, *rest = args
    scale, causal, *_, p, stream = rest[4:]
    if not isinstance(mask, fx.Node) or causal:
        return None
    return Attention(node, [node], query, key, value, scale, terms=[(mask, 1)], plain=False, drawn=(p, stream))


FORMS: dict[str, Callable[[fx.Node], Attention | None]] = {
    ATTENTION: _torch_s,
    "autopart.dropout_attention": _with_dropout,
    "aten.softmax.int": written_out,
    "aten._safe_softmax": written_out,
}
"""Operator -> what finds the attention that it belongs to."""


def _fits(found: Attention) -> bool:
    """Whether the kernels take these tensors, and all that is replaced is of one block."""
    query, key, value = (info(n) for n in (found.query, found.key, found.value))
    return (
        {query.dtype} == {key.dtype, value.dtype, info(found.call).dtype}
        and query.dtype in TRITON_NAMES
        and all(len(x.shape) == 4 and math.prod(x.shape) for x in (query, key, value))
        and max(query.shape[3], value.shape[3]) <= MAX_WIDTH
        and query.shape[0] == key.shape[0] == value.shape[0]
        and key.shape[1] == value.shape[1] in (1, query.shape[1])  # torch's attention repeats a single head (Falcon)
        and len({info(n).layer for n in found.inside}) == 1
    )


def _masks(found: Attention, constants: ConstantValues) -> Masks | None:
    """The masks of an attention; None where some are not understood."""
    masks = Masks(blocked=bool(found.fills))
    for number, condition, negated in found.fills:
        if not hide_by(masks, number, condition, negated, constants):
            return None
    for term, sign in found.terms:
        if info(term).dtype == torch.bool:
            hide(masks, term, constants)
        elif not add(masks, term, sign, constants):
            return None
    return masks


def _pays(found: Attention, given: Arguments) -> bool:
    """Whether the kernel keeps fewer numbers of pairs than what is there: torch's attention takes small masks too."""
    if len(found.inside) > 1 or found.drawn:
        return True
    (mask, _), *_ = found.terms
    rest = [n for n in (given.mask, given.bias) if n is not None and _of_pairs(n)]
    return _of_pairs(mask) and (not rest or given.window > 0)


def _of_pairs(node: fx.Node) -> bool:
    """Whether a mask has a number for every pair of a query and a key."""
    return min(info(node).shape[-2:]) > 1


def _replace(graph: fx.Graph, found: Attention, given: Arguments) -> None:
    out = found.call
    if found.is_plain and given == Arguments(causal=given.causal):
        with graph.inserting_before(out):
            plain = found.query, found.key, found.value, None, 0.0, given.causal
            _put(graph, out, new_call(graph, SDPA, plain, out, {"scale": found.scale}))
        return
    key, value = _unrepeated(found.key, found.value) or (found.key, found.value)
    masks = (given.mask, given.padding, given.bias, given.relative, found.sinks)
    places = (found.scale, given.causal, given.window, found.cap, given.even)
    target: Callable[..., Any] = attention if found.drawn is None else dropout_attention
    with graph.inserting_before(out):
        call = new_call(graph, target, (found.query, key, value, *masks, *places, *(found.drawn or ())), out)
        update_info(call, kernel=ATTENTION)
        moved = {"fused": traffic(call), "unfused": sum(map(traffic, found.inside))}
        update_info(call, **(moved if found.drawn is None else {}))
        _put(graph, out, call)


def _put(graph: fx.Graph, out: fx.Node, call: fx.Node) -> None:
    """Put a call in the place of a node, in the node's shape."""
    if info(call).shape != info(out).shape:
        call = new_call(graph, aten.reshape.default, (call, list(info(out).shape)), out)
    out.replace_all_uses_with(call)
    graph.erase_node(out)


def _unrepeated(key: fx.Node, value: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Keys and values before each head was repeated for as many heads of queries; None where they are not."""
    found = [_before_repeat(x) for x in (key, value)]
    if found[0] is None or found[1] is None or info(found[0]).shape[1] != info(found[1]).shape[1]:
        return None
    return found[0], found[1]


def _before_repeat(x: fx.Node) -> fx.Node | None:
    """x (samples, g, n, width), where a node is x with each of the g heads several times in turn."""
    reshape = call_args(x, "aten.reshape")
    expand = call_args(reshape[0], "aten.expand") if reshape else ()
    spread = expand[0] if expand else None
    source = call_args(spread, "aten.unsqueeze") or call_args(spread, "aten.reshape")
    if not isinstance(spread, fx.Node) or not source:
        return None
    (batch, heads, n, width), wide = info(x).shape, info(reshape[0]).shape
    before = info(source[0]).shape
    right = len(wide) == 5 and wide[0] == batch and wide[3:] == (n, width) and wide[1] * wide[2] == heads
    return source[0] if right and before == (batch, wide[1], n, width) == _without(info(spread).shape) else None


def _without(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without its dim 2, of size 1."""
    return (*shape[:2], *shape[3:]) if shape[2:3] == (1,) else ()


def _ungroup(graph: fx.Graph, node: fx.Node) -> None:
    """torch's attention without a mask takes keys and values as they are before they are repeated for the heads of
    queries. In bfloat16 alone: every GPU that has it has flash attention, the one kernel that does."""
    args: tuple[Any, ...] = node.args
    query, key, value, *rest = args
    masked = rest and rest[0] is not None
    pair = _unrepeated(key, value) if info(query).dtype == torch.bfloat16 and not masked else None
    d, e = info(query).shape[-1], info(value).shape[-1]
    if pair is None or d != e or d > MAX_WIDTH or d % 8:
        return
    node.args, node.kwargs = (query, *pair, *rest), {**node.kwargs, "enable_gqa": True}
