"""Rewrites of the pass `simplify`: of masks, indices and conditions with known values, and of losses by targets that
depend on weights."""

from typing import Any

import torch
from torch import fx

from autopart.ir.graph import info, new_call
from autopart.passes.constant_values import ConstantValues

aten = torch.ops.aten


def _is_arange(values: torch.Tensor, dim: int, size: int) -> bool:
    """Whether `values` is 0, 1, ..., size - 1 along `dim`, and has size 1 in the other dims."""
    shape = [1] * values.dim()
    shape[dim] = size
    return list(values.shape) == shape and torch.equal(values.flatten(), torch.arange(size))


def index_all(graph: fx.Graph, node: fx.Node, constants: ConstantValues) -> fx.Node | None:
    """x[arange(m)[:, None], arange(n)[None, :]] as a reshape of x, whose shape is (m, n)."""
    if info(node).name != "aten.index.Tensor":
        return None
    source, indices = node.args
    assert isinstance(source, fx.Node) and isinstance(indices, (list, tuple))
    shape = info(source).shape
    rank, place = len(info(node).shape), -1
    if len(indices) != len(shape):
        return None
    for index, size in zip(indices, shape, strict=True):
        if not isinstance(index, fx.Node):
            return None
        values = constants.value(index)
        if values is None:
            return None
        values = values.reshape([1] * (rank - values.dim()) + list(values.shape))
        place = next((d for d in range(place + 1, rank) if _is_arange(values, d, size)), rank)
        if place == rank:
            return None
    return new_call(graph, aten.reshape.default, (source, list(info(node).shape)), node)


def true_conditions(graph: fx.Graph, node: fx.Node, constants: ConstantValues) -> fx.Node | None:
    """where(c, x, y) as x, and c & a as a, for a condition c that is true everywhere."""
    name = info(node).name
    if name in ("aten.where.self", "aten.where.ScalarOther"):
        pairs = [(node.args[0], node.args[1])]
    elif name in ("aten.__and__.Tensor", "aten.bitwise_and.Tensor", "aten.logical_and"):
        pairs = [(node.args[0], node.args[1]), (node.args[1], node.args[0])]
    else:
        return None
    for condition, kept in pairs:
        if not isinstance(condition, fx.Node) or not isinstance(kept, fx.Node):
            continue
        if constants.pattern(condition) == "all" and info(kept).dtype == info(node).dtype:
            return new_call(graph, aten.expand.default, (kept, list(info(node).shape)), node)
    return None


def attention_mask(graph: fx.Graph, node: fx.Node, constants: ConstantValues) -> fx.Node | None:
    """Attention without a mask, with `is_causal`, or with a smaller mask.

    A mask that is true everywhere is removed. A lower-triangular mask becomes `is_causal=True`. An expanded mask is
    passed as it was before the expansion.
    """
    if info(node).name != "aten.scaled_dot_product_attention" or len(node.args) < 4:
        return None
    mask = node.args[3]
    if not isinstance(mask, fx.Node):
        return None
    head, tail = node.args[:3], list(node.args[4:])
    pattern = constants.pattern(mask)
    if pattern == "all":
        return new_call(graph, node.target, (*head, None, *tail), node, dict(node.kwargs))  # type: ignore[arg-type]
    if pattern == "causal":
        return new_call(graph, node.target, (*head, None, tail[0] if tail else 0.0, True), node, dict(node.kwargs))  # type: ignore[arg-type]
    if info(mask).name == "aten.expand" and len(info(mask.args[0]).shape) == len(info(mask).shape):  # type: ignore[arg-type]
        return new_call(graph, node.target, (*head, mask.args[0], *tail), node, dict(node.kwargs))  # type: ignore[arg-type]
    return None


def learned_targets(graph: fx.Graph, node: fx.Node, constants: ConstantValues) -> fx.Node | None:
    """cross_entropy(x, t) as the sum of the losses / (number of targets t != ignore_index), where t depends on weights.

    The number of valid targets is then not known before the forward pass.
    """
    if info(node).name != "aten.cross_entropy_loss":
        return None
    given: tuple[Any, ...] = (*node.args, *(None, 1, -100, 0.0)[len(node.args) - 2 :])
    x, targets, weight, reduction, ignored, smoothing = given
    counted = weight is None and reduction == 1 and not info(targets).dtype.is_floating_point
    if not counted or not _learned(targets):
        return None
    total = new_call(graph, aten.cross_entropy_loss.default, (x, targets, None, 2, ignored, smoothing), node)
    number = new_call(graph, aten.sum.default, (new_call(graph, aten.ne.Scalar, (targets, ignored), node),), node)
    return new_call(graph, aten.div.Tensor, (total, number), node)


def _learned(node: fx.Node) -> bool:
    """Whether a value depends on a parameter."""
    seen, todo = {node}, [node]
    while todo:
        node = todo.pop()
        if info(node).kind == "parameter":
            return True
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        todo += new
    return False
