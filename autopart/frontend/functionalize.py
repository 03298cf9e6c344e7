"""An exported program -> the same program without side effects.

`run_decompositions({})` of torch.export traces a program twice more, which takes longer than the export of most
transformers. A program of operators in `KEPT` is rewritten here instead, to the graph that torch would give;
tests/frontend/test_functional.py compares the two. A change of a tensor in place becomes a new value, which later
readers of the tensor read, and the last value of a buffer becomes an output. A change of a slice, or of a slice of a
slice, is a new value of the whole tensor too. A program that reads another view of a tensor after a change is left to
torch.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind, OutputKind, OutputSpec, TensorArgument

aten = torch.ops.aten

KEPT = frozenset(
    """
    __and__ __or__ _assert_tensor_metadata abs adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d add addcmul
    addmm alias amax amin any arange argmax avg_pool1d avg_pool2d baddbmm bernoulli binary_cross_entropy_with_logits
    bitwise_and bitwise_not bitwise_or bmm broadcast_tensors cat ceil celu clamp clamp_min clone col2im concat
    concatenate constant_pad_nd conv1d conv2d conv3d conv_transpose2d copy cos cosine_similarity cross_entropy_loss
    cumsum detach diff div einsum elu embedding eq erf exp expand expm1 eye fill flip floor floor_divide full full_like
    gather ge gelu glu group_norm gt hardsigmoid hardswish hardtanh im2col index index_add index_select isin layer_norm
    le leaky_relu lerp lift_fresh_copy linalg_solve_triangular linalg_vector_norm linear log log1p log_sigmoid
    log_softmax logical_and logical_not logical_or logsumexp lt masked_fill matmul max max_pool1d max_pool2d maximum
    mean min minimum mish mm mse_loss mul multiply ne neg new_empty new_full new_ones new_zeros nll_loss_nd one_hot ones
    ones_like pad permute pixel_shuffle pixel_unshuffle polar pow prelu rand rand_like randn randn_like reciprocal relu
    relu6 remainder repeat repeat_interleave rms_norm roll rsqrt rsub scalar_tensor scaled_dot_product_attention scatter
    scatter_add select sigmoid sign silu sin slice smooth_l1_loss softmax softplus sort split_with_sizes sqrt square
    squeeze stack std sub sum t tanh topk transpose tril triu unbind unfold unsqueeze upsample_bilinear2d
    upsample_nearest2d var view view_as_complex view_as_real where zeros zeros_like
    """.split()
)
"""Operators that `run_decompositions({})` leaves as they are."""


def one_name_each(exported: torch.export.ExportedProgram) -> None:
    """Take out of a program the names of buffers under which it reads nothing, where it reads the same buffer under
    another: those of a module that stands in several places of the model. `run_decompositions` refuses a program that
    changes a tensor which it is given twice."""
    specs, state = exported.graph_signature.input_specs, exported.state_dict
    placeholders = {node.name: node for node in exported.graph.find_nodes(op="placeholder")}
    read = {id(state.get(spec.target)) for spec in specs if spec.target and placeholders[spec.arg.name].users}
    for spec in [spec for spec in specs if spec.kind is InputKind.BUFFER and spec.target in state]:
        if not placeholders[spec.arg.name].users and id(state[spec.target]) in read:
            exported.graph.erase_node(placeholders[spec.arg.name])
            specs.remove(spec)


def functional(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without changes in place, without regions that turn gradients off, and without operators that may
    give a view or a copy."""
    module, signature = exported.graph_module, exported.graph_signature
    if not (_known(module) and _changes_known(module.graph, signature.inputs_to_buffers)):
        return exported.run_decompositions({})
    graph = module.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.wrap_with_set_grad_enabled):
        _inline(exported, node)
    order = {node: place for place, node in enumerate(graph.nodes)}
    changed = {node: [_wholes(tensor) for tensor in _changed(node)] for node in order}
    newest: dict[fx.Node, fx.Node] = {}
    for node in order:
        with graph.inserting_before(node):
            new, *values = _rewritten(graph, node)
            for wholes, value in zip(changed[node], values, strict=True):
                for tensor, now in _after(graph, wholes, value, newest).items():
                    old = newest.get(tensor, tensor)
                    for user in [user for user in old.users if order.get(user, -1) > order[node]]:
                        user.replace_input_with(old, now)
                    _now_given(signature, old, now)
                    newest[tensor] = now
        if new is not node:
            node.replace_all_uses_with(new)
            _now_given(signature, node, new)
            graph.erase_node(node)
            newest[node] = new
    _give_back(exported, [(n, newest[n]) for n in graph.find_nodes(op="placeholder") if n in newest])
    graph.eliminate_dead_code()
    return exported


def _known(module: Any) -> bool:
    for node in module.graph.nodes:
        if node.op != "call_function" or getattr(node.target, "__name__", "") == "getitem":
            continue
        if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
            region = getattr(module, node.args[1].target)
            if not _known(region) or any(map(_changed, region.graph.nodes)):
                return False
        elif not (_in_place(node) or _rewritable(node) or (_name(node) in KEPT and not node.target._schema.is_mutable)):
            return False
    return True


def _changes_known(graph: fx.Graph, buffers: Mapping[str, str]) -> bool:
    """Whether every tensor that is changed is a buffer or made by the program, or a part of one that it made, which is
    changed once, itself or by its parts, and no other view of it is read later."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    sharing = defaultdict[int, list[fx.Node]](list)
    for node in order:
        for memory in _memory(node):
            sharing[memory].append(node)
    changes = Counter(_tensor(changed) for node in order for changed in _changed(node))
    for node in order:
        for changed in map(_tensor, _changed(node)):
            if changed.op == "placeholder" and changed.name not in buffers:
                return False
            sharers = [n for memory in _memory(changed) for n in sharing[memory] if order[n] < order[node]]
            *part_of, whole = wholes = _wholes(changed)
            others = [n for n in sharers if _tensor(n) not in wholes]
            if part_of and (whole.op == "placeholder" or any(changes[part] > (part is changed) for part in part_of)):
                return False
            if any(n.op == "placeholder" or any(order[u] > order[node] for u in n.users) for n in others):
                return False
    return True


def _memory(node: Any) -> set[int]:
    """Numbers of the storages of a node's outputs."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else (value,)
    return {v.untyped_storage()._cdata for v in values if isinstance(v, torch.Tensor)}


def _changed(node: Any) -> Sequence[fx.Node]:
    """The tensors that a call changes in place."""
    if _in_place(node):
        return node.args[:1]
    return [s for s in node.args[3:5] if s is not None] if _name(node) == "batch_norm" and node.args[5] else ()


def _tensor(node: Any) -> Any:
    """The node that made a tensor, which a row of changes in place returned."""
    while _in_place(node):
        node = node.args[0]
    return node


SCATTERS = {"slice": aten.slice_scatter.default, "select": aten.select_scatter.default}
"""Operators that give a part of a tensor -> those that put one back."""


def _wholes(node: Any) -> list[fx.Node]:
    """A tensor, the one that it is a slice or a row of, the one that this is a part of, and so on."""
    wholes = [_tensor(node)]
    while _name(wholes[-1]) in SCATTERS:
        wholes.append(_tensor(wholes[-1].args[0]))
    return wholes


def _after(
    graph: fx.Graph, wholes: Sequence[Any], value: fx.Node, newest: Mapping[fx.Node, fx.Node]
) -> dict[fx.Node, fx.Node]:
    """What tensors are after a change of the first of `wholes`: each is a part of the next one.

    value   what the first is then
    newest  what tensors were before, where they were changed before
    """
    now = {wholes[0]: value}
    for part, whole in pairwise(wholes):
        value = _call(graph, part, SCATTERS[_name(part)], newest.get(whole, whole), value, *part.args[1:])
    now[wholes[-1]] = value
    for part in reversed(wholes[1:-1]):
        now[part] = value = _call(graph, part, part.target, value, *part.args[1:])
    return now


def _in_place(node: Any) -> bool:
    """Whether a call changes its first argument in place, as relu_ and add_ do."""
    name = _name(node)
    known = name[-1:] == "_" and (name[:-1] in KEPT or name[:-1] in REWRITES)
    return known and _functional_of(node) is not None


def _functional_of(node: Any) -> Any:
    """The overload of an operator out of place: aten.relu.default of aten.relu_.default; None if there is none."""
    packet = getattr(aten, _name(node).removesuffix("_"))
    return getattr(packet, node.target._overloadname, None)


def _now_given(signature: torch.export.ExportGraphSignature, old: fx.Node, new: fx.Node) -> None:
    """Let the outputs that were `old` be `new` in the signature."""
    for spec in signature.output_specs:
        if getattr(spec.arg, "name", None) == old.name:
            spec.arg.name = new.name


def _give_back(exported: torch.export.ExportedProgram, changes: Sequence[tuple[fx.Node, fx.Node]]) -> None:
    """Make the new values of buffers the first outputs."""
    signature, output = exported.graph_signature, exported.graph_module.graph.output_node()
    output.args = ((*(value for _, value in changes), *output.args[0]),)
    signature.output_specs[:0] = [
        OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(value.name), signature.inputs_to_buffers[buffer.name])
        for buffer, value in changes
    ]


def _name(node: Any) -> str:
    """The operator's name without overload: "view" of aten.view.default, "package::name" of one that is not torch's."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.removeprefix("aten::") if schema else ""


def _rewritable(node: Any) -> bool:
    moved = _name(node) == "to" and node.args[0].meta["val"].device != node.meta["val"].device
    return (_name(node) in REWRITES or _name(node) == "batch_norm") and not moved


def _inline(exported: torch.export.ExportedProgram, call: Any) -> None:
    """Replace the call of a region by the region's operators. The values that it makes are detached already."""
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
        _now_given(exported.graph_signature, pick, value)
        graph.erase_node(pick)
    graph.erase_node(call)


def _call(graph: fx.Graph, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    values: Any = fx.map_arg(args, lambda n: n.meta["val"])
    with values[0].fake_mode:
        made = target(*values, **kwargs)
    node = graph.call_function(target, args, kwargs)
    node.meta = like.meta | {"val": made}
    return node


def _pick(graph: fx.Graph, several: fx.Node, place: int) -> fx.Node:
    node = graph.call_function(operator.getitem, (several, place))
    node.meta = several.meta | {"val": several.meta["val"][place]}
    return node


def _rewritten(graph: fx.Graph, node: Any) -> Sequence[Any]:
    """The node that replaces a node, and behind it the new values of the tensors that the node changes."""
    if _in_place(node):
        become, own = REWRITES.get(_name(node).removesuffix("_")), node.meta["val"].dtype
        new = become(graph, node) if become else _call(graph, node, _functional_of(node), *node.args, **node.kwargs)
        if new.meta["val"].dtype != own:
            new = _call(graph, node, aten._to_copy.default, new, dtype=own)
        return new, new
    if _name(node) == "batch_norm":
        return _batch_norm(graph, node)
    become = REWRITES.get(_name(node))
    return (become(graph, node) if become else node,)


def _batch_norm(graph: fx.Graph, node: Any) -> list[Any]:
    """The output of batch norm, and behind it the new running statistics if there are some."""
    *tensors, mean, variance, training, momentum, eps, _ = node.args
    if training and mean is None:
        made = _call(graph, node, aten._native_batch_norm_legit.no_stats, *tensors, True, momentum, eps)
        return [_pick(graph, made, 0)]
    if training:
        target = aten._native_batch_norm_legit_functional.default
        made = _call(graph, node, target, *tensors, mean, variance, True, momentum, eps)
        return [_pick(graph, made, place) for place in (0, 3, 4)]
    target = aten._native_batch_norm_legit_no_training.default
    return [_pick(graph, _call(graph, node, target, *tensors, mean, variance, momentum, eps), 0)]


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
    return _call(graph, node, aten.split.Tensor, source, size, *([dim] if dim else []))


def _split(graph: fx.Graph, node: Any) -> Any:
    by_sizes = isinstance(node.args[1], (list, tuple))
    return _call(graph, node, aten.split_with_sizes.default if by_sizes else aten.split.Tensor, *node.args)


def _narrow(graph: fx.Graph, node: Any) -> Any:
    source, dim, start, length = node.args
    start += source.meta["val"].shape[dim] if start < 0 else 0
    return _call(graph, node, aten.slice.Tensor, source, dim, start, start + length)


def _reversed_dims(graph: fx.Graph, node: Any) -> Any:
    source = node.args[0]
    return _call(graph, node, aten.permute.default, source, list(reversed(range(source.meta["val"].dim()))))


def _dropout(graph: fx.Graph, node: Any) -> Any:
    source, probability, training = node.args
    if not (probability and training):
        return source
    return _pick(graph, _call(graph, node, aten.native_dropout.default, source, probability, True), 0)


REWRITES: Mapping[str, Callable[[fx.Graph, fx.Node], Any]] = {
    "chunk": _chunk,
    "contiguous": _contiguous,
    "dropout": _dropout,
    "narrow": _narrow,
    "numpy_T": _reversed_dims,
    "reshape": _reshape,
    "split": _split,
    "to": _cast,
    "expand_as": _expand,
    "flatten": _reshape,
    "reshape_as": _reshape,
    "type_as": _cast,
    "unflatten": _reshape,
    "view_as": _reshape,
}
