"""An exported program -> the same without side effects, by rewriting its graph where that is enough.

torch.export's `run_decompositions({})` runs a program twice more to find it, which for most transformers costs more
than the export itself. A program of operators known here that changes nothing in place is rewritten instead, to the
graph that torch would give (tests/test_functional.py compares them).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

KEPT = frozenset(
    """
    __and__ __or__ _assert_tensor_metadata abs add addmm alias amax amin any arange argmax bitwise_and bitwise_not
    bitwise_or bmm cat ceil clamp clamp_min clone conv1d conv2d cos cross_entropy_loss cumsum detach diff div einsum
    embedding eq erf exp expand fill floor full full_like gather ge gelu gt index isin layer_norm le leaky_relu
    lift_fresh_copy linalg_vector_norm linear log log1p log_softmax logical_and logical_not logical_or lt
    masked_fill matmul max maximum mean min minimum mm mse_loss mul ne neg new_empty new_full new_ones new_zeros
    nll_loss_nd ones ones_like pad permute pow reciprocal relu repeat repeat_interleave rsqrt rsub scalar_tensor
    scaled_dot_product_attention select sigmoid sign silu sin slice softmax softplus split_with_sizes sqrt square
    squeeze stack sub sum tanh topk transpose tril triu unbind unsqueeze view where zeros zeros_like
    """.split()
)
"""Operators that `run_decompositions({})` leaves as they are."""


def functional(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without changes in place, without regions that switch gradients off, and without operators that
    give sometimes a view and sometimes a copy."""
    if not _known(exported.graph_module):
        return exported.run_decompositions({})
    graph = exported.graph_module.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.wrap_with_set_grad_enabled):
        _inline(exported, node)
    for node in list(graph.nodes):
        if become := REWRITES.get(_name(node)):
            with graph.inserting_before(node):
                new = become(graph, node)
            node.replace_all_uses_with(new)
            exported.graph_signature.replace_all_uses(node.name, new.name)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return exported


def _known(module: Any) -> bool:
    for node in module.graph.nodes:
        if node.op != "call_function" or getattr(node.target, "__name__", "") == "getitem":
            continue
        if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
            if not _known(getattr(module, node.args[1].target)):
                return False
        elif not (_name(node) in KEPT or _rewritable(node)) or node.target._schema.is_mutable:
            return False
    return True


def _name(node: Any) -> str:
    """ "view" of aten.view.default; operators that are not torch's keep their package's name."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.removeprefix("aten::") if schema else ""


def _rewritable(node: Any) -> bool:
    if _name(node) == "dropout":
        _, probability, training = node.args
        return not (probability and training)
    moved = _name(node) == "to" and node.args[0].meta["val"].device != node.meta["val"].device
    return _name(node) in REWRITES and not moved


def _inline(exported: torch.export.ExportedProgram, call: Any) -> None:
    """Put a region's operators where it is called. What it makes has been detached by those who export."""
    graph = call.graph
    region = getattr(exported.graph_module, call.args[1].target).graph
    values = dict(zip(region.find_nodes(op="placeholder"), call.args[2:], strict=True))
    with graph.inserting_before(call):
        for node in region.nodes:
            if node.op == "call_function":
                values[node] = graph.node_copy(node, values.__getitem__)
    (results,) = region.output_node().args
    for pick in list(call.users):
        value = values[results[pick.args[1]]]
        pick.replace_all_uses_with(value)
        exported.graph_signature.replace_all_uses(pick.name, value.name)
        graph.erase_node(pick)
    graph.erase_node(call)


def _call(graph: fx.Graph, like: fx.Node, target: Any, source: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
    value = source.meta["val"]
    with value.fake_mode:
        made = target(value, *args, **kwargs)
    node = graph.call_function(target, (source, *args), kwargs)
    node.meta = like.meta | {"val": made}
    return node


def _cast(graph: fx.Graph, node: Any) -> Any:
    source, dtype = node.args[0], node.meta["val"].dtype
    if source.meta["val"].dtype == dtype:
        return source
    return _call(graph, node, aten._to_copy.default, source, dtype=dtype)


def _contiguous(graph: fx.Graph, node: Any) -> Any:
    source = node.args[0]
    if source.meta["val"].is_contiguous():
        return source
    return _call(graph, node, aten.clone.default, source, memory_format=torch.contiguous_format)


def _reshape(graph: fx.Graph, node: Any) -> Any:
    source, shape = node.args[0], list(node.meta["val"].shape)
    try:
        return _call(graph, node, aten.view.default, source, shape)
    except (RuntimeError, ValueError):  # the strides allow no view
        copy = _call(graph, node, aten.clone.default, source, memory_format=torch.contiguous_format)
        return _call(graph, node, aten._unsafe_view.default, copy, shape)


def _expand(graph: fx.Graph, node: Any) -> Any:
    return _call(graph, node, aten.expand.default, node.args[0], list(node.meta["val"].shape))


def _chunk(graph: fx.Graph, node: Any) -> Any:
    source, chunks, dim = (*node.args, 0)[:3]
    size = -(-source.meta["val"].shape[dim] // chunks)
    return _call(graph, node, aten.split.Tensor, source, size, dim)


def _split(graph: fx.Graph, node: Any) -> Any:
    by_sizes = isinstance(node.args[1], (list, tuple))
    return _call(graph, node, aten.split_with_sizes.default if by_sizes else aten.split.Tensor, *node.args)


def _source(graph: fx.Graph, node: Any) -> Any:
    return node.args[0]


REWRITES: Mapping[str, Callable[[fx.Graph, fx.Node], Any]] = {
    "chunk": _chunk,
    "contiguous": _contiguous,
    "dropout": _source,
    "reshape": _reshape,
    "split": _split,
    "to": _cast,
    "expand_as": _expand,
    "flatten": _reshape,
    "reshape_as": _reshape,
    "type_as": _cast,
    "view_as": _reshape,
}
