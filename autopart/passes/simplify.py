"""fx.Graph -> fx.Graph: the same values from fewer operators, of fewer kinds.

A rewrite is a function (graph, node, constant values) -> the node in its place, or None. Every rewrite is tried on
every node, in order, until none applies. Operators that change nothing are removed. Arguments become positional. A
product with a bias becomes a product and an addition. Products of flattened tensors become products of the tensors
themselves. An attention mask that depends on shapes alone is removed where it is true everywhere, and becomes
`is_causal=True` where it is lower-triangular.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx

from autopart.ir.expert_ops import grouped_linear
from autopart.ir.graph import Traced, call_args, calls, has_gradient, info, is_pick, loss_of, new_call
from autopart.passes.constant_values import ConstantValues
from autopart.passes.simplify_masks import attention_mask, index_all, learned_targets, true_conditions

aten = torch.ops.aten


def simplify(traced: Traced) -> Traced:
    """Simplify the graph in place."""
    graph = traced.graph
    constants = ConstantValues(traced.buffers)
    graph.eliminate_dead_code()
    for node in calls(graph):
        _positional(node)
    for _ in range(4):
        if not any([_rewrite(graph, rewrite, constants) for rewrite in REWRITES]):
            break
    merge_equal(graph)
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.op == "placeholder" and not node.users and info(node).name not in traced.updated:
            graph.erase_node(node)
    graph.lint()
    return traced


def merge_equal(graph: fx.Graph) -> None:
    """Compute equal values without gradient once, such as the masks of all layers. Random values are left apart."""
    seen: dict[object, fx.Node] = {}
    for node in calls(graph):
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if info(node).grad or node is loss_of(graph) or random:
            continue
        key = (node.target, repr(node.args), repr(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _rewrite(
    graph: fx.Graph, rewrite: Callable[[fx.Graph, fx.Node, ConstantValues], fx.Node | None], constants: ConstantValues
) -> bool:
    """Try a rewrite on every node in place. Returns whether it replaced any."""
    changed = False
    for node in calls(graph):
        if not node.users:
            continue
        with graph.inserting_before(node):
            new = rewrite(graph, node, constants)
        if new is not None:
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            changed = True
    if changed:
        graph.eliminate_dead_code()
    return changed


def _positional(node: fx.Node) -> None:
    """Pass arguments by position where the schema allows it. Arguments for device and layout are removed."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    kwargs = {
        k: v for k, v in node.kwargs.items() if k not in ("pin_memory", "layout", "non_blocking", "memory_format")
    }
    if "device" in kwargs:
        kwargs["device"] = None
    args = list(node.args)
    schema = [a for a in node.target._schema.arguments if not a.kwarg_only]
    for argument in schema[len(args) :]:
        if not any(a.name in kwargs for a in schema[len(args) :]):
            break
        args.append(kwargs.pop(argument.name, argument.default_value))
    node.args, node.kwargs = tuple(args), {k: v for k, v in kwargs.items() if v is not None}


def _no_op(graph: fx.Graph, node: fx.Node, constants: ConstantValues) -> fx.Node | None:
    """op(x) as x, for an operator that changes nothing, such as a clone or a dropout of 0."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    record, source = info(node), node.args[0]
    if record.shapes != info(source).shapes or record.dtypes != info(source).dtypes:
        return None
    name = record.name
    identity = (
        name in ("aten.clone", "aten.alias", "aten.contiguous", "aten.lift_fresh_copy", "aten._to_copy")
        or name in ("aten.view", "aten.reshape", "aten._unsafe_view", "aten.expand", "aten.slice.Tensor")
        or (name == "aten.detach" and not info(source).grad)
        or (name == "aten.pad" and not any(node.args[1]))  # type: ignore[arg-type]
        or (name == "aten.dropout" and (node.args[1] == 0.0 or node.args[2] is False))
        or (name in ("aten.add.Tensor", "aten.sub.Tensor") and node.args[1] == 0)
        or (name in ("aten.mul.Tensor", "aten.div.Tensor") and node.args[1] == 1)
    )
    return source if identity else None


def _single_piece(graph: fx.Graph, node: fx.Node, constants: ConstantValues) -> fx.Node | None:
    """split(x, ...)[0] as x, where the split has one piece; unbind(x)[0] of one piece as a select."""
    if info(node).name != "autopart.getitem":
        return None
    pieces = node.args[0]
    assert isinstance(pieces, fx.Node)
    if len(info(pieces).shapes) > 1:
        return None
    whole, dim = pieces.args[0], pieces.args[1] if len(pieces.args) > 1 else 0
    if info(pieces).name == "aten.unbind.int":
        return new_call(graph, aten.select.int, (whole, dim, 0), node)
    return whole if info(pieces).name in ("aten.split.Tensor", "aten.split_with_sizes", "aten.chunk") else None  # type: ignore[return-value]


def _meshgrid(graph: fx.Graph, node: fx.Node, constants: ConstantValues) -> fx.Node | None:
    """meshgrid(vectors)[i] as vector i, reshaped along dim i and expanded along the others. Indexing "xy" swaps dims 0
    and 1."""
    if not is_pick(node):
        return None
    grid, which = cast("tuple[Any, Any]", node.args)
    if info(grid).name not in ("aten.meshgrid", "aten.meshgrid.indexing"):
        return None
    shape, (vectors,) = info(node).shape, grid.args
    swapped = grid.kwargs.get("indexing") == "xy" and len(shape) > 1 and which < 2
    dim = 1 - which if swapped else which
    along = new_call(
        graph, aten.reshape.default, (vectors[which], [n if i == dim else 1 for i, n in enumerate(shape)]), node
    )
    return new_call(graph, aten.expand.default, (along, list(shape)), node)


def _experts(graph: fx.Graph, node: fx.Node, constants: ConstantValues) -> fx.Node | None:
    """bmm(weights[ids], rows) as `grouped_linear`: each row times the weight of its id, without a gathered copy of the
    weights. Shapes: rows (s, k), ids (s), weights (experts, n, k) or, `transposed`, (experts, k, n)."""
    squeezed = call_args(node, "aten.squeeze.dim") or call_args(node, "aten.squeeze.dims")
    product = call_args(squeezed[0], "aten.bmm") if squeezed else None
    for transposed, dim in ((False, 2), (True, 1)):
        if not product or info(node).shapes != ((info(product[0]).shape[0], info(squeezed[0]).shape[3 - dim]),):
            continue
        gathered, rows = product[::-1] if transposed else product
        index, spread = call_args(gathered, "aten.index.Tensor"), call_args(rows, "aten.unsqueeze")
        if not index or not spread or spread[1] not in (dim, dim - 3) or len(index[1]) != 1:
            continue
        weights, ids = index[0], index[1][0]
        if len(info(weights).shape) == 3 and len(info(ids).shape) == 1:
            return new_call(graph, grouped_linear, (spread[0], weights, ids, transposed), node)
    return None


def _copy(graph: fx.Graph, node: fx.Node, constants: ConstantValues) -> fx.Node | None:
    """copy(target, source) as the source in the target's dtype and shape."""
    if info(node).name != "aten.copy":
        return None
    target, source = node.args[:2]
    assert isinstance(target, fx.Node) and isinstance(source, fx.Node)
    if info(source).dtype != info(target).dtype:
        source = new_call(graph, aten._to_copy.default, (source,), node, {"dtype": info(target).dtype})
    return new_call(graph, aten.expand.default, (source, list(info(target).shape)), node)


def _complex_write(graph: fx.Graph, node: fx.Node, constants: ConstantValues) -> fx.Node | None:
    """slice_scatter or select_scatter of complex tensors as that of pairs of reals, which torch can differentiate."""
    if info(node).name not in ("aten.slice_scatter", "aten.select_scatter") or not info(node).dtype.is_complex:
        return None
    whole, part, *where = node.args
    dim = (where[0] if where else 0) % len(info(node).shape)  # type: ignore[operator]
    pairs = (new_call(graph, aten.view_as_real.default, (x,), node) for x in (whole, part))
    written = new_call(graph, node.target, (*pairs, dim, *where[1:]), node)  # type: ignore[arg-type]
    return new_call(graph, aten.view_as_complex.default, (written,), node)


def _conjugate(graph: fx.Graph, node: fx.Node, constants: ConstantValues) -> fx.Node | None:
    """conj(x) as conj_physical(x), which is computed at once: a lazy conjugate does not allow all views."""
    if info(node).name in ("aten.resolve_conj", "aten.resolve_neg"):
        return node.args[0]  # type: ignore[return-value]
    lazy = info(node).name in ("aten._conj", "aten.conj")
    return new_call(graph, aten.conj_physical.default, tuple(node.args), node) if lazy else None


UNSET = {
    "aten.empty_like": aten.zeros_like.default,
    "aten.new_empty": aten.new_zeros.default,
    "aten.empty.memory_format": aten.zeros.default,
}
"""Operators that leave values unset -> the same with zeros."""


def _initialised(graph: fx.Graph, node: fx.Node, constants: ConstantValues) -> fx.Node | None:
    """empty(...) as zeros(...), so that the values are equal on all ranks."""
    target = UNSET.get(info(node).name)
    return None if target is None else new_call(graph, target, tuple(node.args), node, dict(node.kwargs))


def _interleave(graph: fx.Graph, node: fx.Node, constants: ConstantValues) -> fx.Node | None:
    """repeat_interleave(x, n, dim) as an unsqueeze, an expand and a reshape."""
    if info(node).name != "aten.repeat_interleave.self_int" or len(node.args) < 3 or node.args[2] is None:
        return None
    source, times, dim = node.args
    assert isinstance(source, fx.Node) and isinstance(times, int) and isinstance(dim, int)
    shape = list(info(source).shape)
    dim %= len(shape)
    spread = new_call(graph, aten.unsqueeze.default, (source, dim + 1), node)
    spread = new_call(graph, aten.expand.default, (spread, [*shape[: dim + 1], times, *shape[dim + 1 :]]), node)
    return new_call(graph, aten.reshape.default, (spread, list(info(node).shape)), node)


def _cast(graph: fx.Graph, node: fx.Node, constants: ConstantValues) -> fx.Node | None:
    """type_as(x, y) as a cast of x to y's dtype."""
    if info(node).name != "aten.type_as":
        return None
    return new_call(graph, aten._to_copy.default, (node.args[0],), node, {"dtype": info(node).dtype})


def _softmax(graph: fx.Graph, node: fx.Node, constants: ConstantValues) -> fx.Node | None:
    """softmax(cast(x), dim) as softmax(x, dim, dtype), which is computed in that dtype; without a dtype that x has."""
    if info(node).name != "aten.softmax.int":
        return None
    x, dim, *dtype = node.args
    assert isinstance(x, fx.Node)
    if dtype == [info(x).dtype]:
        return new_call(graph, node.target, (x, dim), node)  # type: ignore[arg-type]
    cast = call_args(x, "aten._to_copy") if not dtype and len(x.users) == 1 else None
    if not cast or info(x).dtype != torch.float32 or not has_gradient(info(cast[0]).dtype):
        return None
    return new_call(graph, node.target, (cast[0], dim, torch.float32), node)  # type: ignore[arg-type]


def _reshape(graph: fx.Graph, node: fx.Node, constants: ConstantValues) -> fx.Node | None:
    """A view, flatten or squeeze as a reshape to a shape without -1; a reshape of a reshape as one."""
    names = ("aten.view", "aten._unsafe_view", "aten.reshape", "aten.flatten.using_ints", "aten.squeeze")
    if info(node).name not in names:
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    joined = info(source).name == "aten.reshape"
    if joined:
        source = source.args[0]
        assert isinstance(source, fx.Node)
    if not joined and info(node).name == "aten.reshape" and list(node.args[1]) == list(info(node).shape):  # type: ignore[arg-type]
        return None
    return new_call(graph, aten.reshape.default, (source, list(info(node).shape)), node)


def _bias_apart(graph: fx.Graph, node: fx.Node, constants: ConstantValues) -> fx.Node | None:
    """linear(x, w, b) as linear(x, w) + b, and addmm alike. A bias is added once, even where the product is a partial
    sum on every rank."""
    if info(node).name == "aten.addmm" and not node.kwargs:
        bias, left, right = node.args
        product = new_call(graph, aten.mm.default, (left, right), node)
    elif info(node).name == "aten.linear" and len(node.args) == 3 and node.args[2] is not None:
        left, right, bias = node.args
        product = new_call(graph, aten.linear.default, (left, right), node)
    else:
        return None
    return new_call(graph, aten.add.Tensor, (product, bias), node)


def _unflatten(graph: fx.Graph, node: fx.Node, constants: ConstantValues) -> fx.Node | None:
    """reshape(mm(reshape(x, [-1, k]), w) + b, [..., n]) as matmul(x, w) + b, with or without b."""
    if info(node).name != "aten.reshape":
        return None
    inner = node.args[0]
    if not isinstance(inner, fx.Node) or len(inner.users) != 1:
        return None
    bias = None
    if info(inner).name == "aten.add.Tensor" and len(inner.args) == 2:
        inner, bias = inner.args
        if not isinstance(bias, fx.Node) or not isinstance(inner, fx.Node) or len(info(bias).shape) != 1:
            return None
    if info(inner).name != "aten.mm":
        return None
    flat, weight = inner.args
    if not isinstance(flat, fx.Node) or not isinstance(weight, fx.Node) or info(flat).name != "aten.reshape":
        return None
    source = flat.args[0]
    assert isinstance(source, fx.Node)
    shape = [*info(node).shape[:-1], info(flat).shape[-1]]
    if list(info(source).shape) != shape:
        source = new_call(graph, aten.reshape.default, (source, shape), flat)
    product = new_call(graph, aten.matmul.default, (source, weight), inner)
    return product if bias is None else new_call(graph, aten.add.Tensor, (product, bias), node)


REWRITES = (
    _no_op,
    _single_piece,
    _meshgrid,
    _copy,
    _cast,
    _softmax,
    _complex_write,
    _conjugate,
    _initialised,
    _interleave,
    _experts,
    _reshape,
    _bias_apart,
    learned_targets,
    _unflatten,
    index_all,
    true_conditions,
    attention_mask,
)
"""The rewrites in the order in which they are tried."""
