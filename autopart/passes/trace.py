"""nn.Module + batch -> fx.Graph: the graph that `autopart.frontend.export` gives, with a record on every node."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import OutputKind, TensorArgument
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from autopart.errors import OperatorError, PartitionError
from autopart.frontend.export import export
from autopart.frontend.layer_sampling import Sample, digest
from autopart.frontend.no_gradient import gives_constant, reaches
from autopart.frontend.short_loops import TIMES
from autopart.frontend.source_lines import own_frames, source_line
from autopart.frontend.torch_private import tree_unflatten
from autopart.ir.graph import KEY, Info, Traced, has_gradient, info, placeholders, update_info
from autopart.ir.random_ops import Stream, returned
from autopart.passes.inner_blocks import inner_blocks
from autopart.sharding.rules import flatten, is_contraction, op_name


def trace(
    model: nn.Module,
    batch: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    sampled: Sequence[Sample] = (),
    outputs: Sequence[str] = (),
    short: bool = False,
) -> Traced:
    """Trace the forward pass of one micro-batch.

    `batch` has the model's keyword arguments, with samples in dim 0 of every tensor; its size is the micro-batch.
    `dtype`, if given, is the dtype that parameters of the model's main dtype are traced in. Of a list of blocks in
    `sampled` some equal blocks are left out. `outputs` are names of what the model returns, which the program is to
    return beside the loss: "logits", or "1" for the second of a tuple. `short`: of long loops some iterations are
    traced (`frontend.short_loops`). No parameter's value is read, so that the model may be on meta. Raises
    PartitionError, with the user's line, where the model cannot be traced or has no loss to train by.
    """
    sizes = {k: v.shape[0] for k, v in batch.items() if isinstance(v, torch.Tensor) and v.dim()}
    if not sizes or len(set(sizes.values())) != 1:
        raise PartitionError("the batch has no common size", f"samples in dim 0: {sizes}", "equal sizes in dim 0")
    inputs = {k: v for k, v in batch.items() if v is not None}
    exported = export(model, inputs, dtype, sampled, short)
    signature = exported.graph_signature
    if signature.user_inputs_to_mutate:
        raise PartitionError(
            f"the forward pass changes its input {sorted(signature.user_inputs_to_mutate.values())[0]}",
            "a batch is read by several ranks and micro-batches",
            "a copy of it in the forward pass: x = x.clone()",
        )
    graph = exported.graph_module.graph
    aliases = _aliases(model)
    changed, known = _set_outputs(graph, exported, outputs)
    updated = tuple(aliases.get(name, name) for name in changed)
    _drop_assertions(graph)
    lifted = _merge_constants(graph, exported)
    keys = {name: key for name, key in zip(signature.user_inputs, inputs, strict=True) if isinstance(name, str)}
    kinds = {name: ("input", key) for name, key in keys.items()}
    kinds |= {name: ("buffer", value[0]) for name, value in lifted.items()}
    kinds |= {name: ("buffer", aliases.get(path, path)) for name, path in signature.inputs_to_buffers.items()}
    kinds |= {name: ("parameter", aliases.get(path, path)) for name, path in signature.inputs_to_parameters.items()}
    for node in [n for n in graph.nodes if n.op != "output"]:
        value = node.meta.get("val")
        if value is None or (node.op == "placeholder" and not isinstance(value, torch.Tensor)):
            graph.erase_node(node)
        elif node.op == "placeholder":
            node.meta[KEY] = _record(node, *kinds.get(node.name, ("input", node.name)))
        else:
            node.meta[KEY] = _record(node, "op", op_name(node.target))
    inner_blocks(graph)
    _own_constants(graph, frozenset(name for name, _ in lifted.values()))
    _check_dtypes(graph)
    _check_gradient(graph.output_node().args[0], model)
    buffers = _buffers(model, dict(lifted.values()), placeholders(graph, "buffer"))
    classes = {path: type(module).__name__ for path, module in model.named_modules()}
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    samples = next(iter(sizes.values()))
    return Traced(graph, type(model).__name__, buffers, aliases, samples, classes, parameters, updated, known)


def _set_outputs(
    graph: fx.Graph, exported: torch.export.ExportedProgram, returned: Sequence[str] = ()
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Make the graph's outputs the loss and, behind it, the new values of the buffers that the forward pass changes.
    Values that are `returned` by these names are marked.

    The loss is the output called `loss`, else the first scalar. Returns the names of these buffers, and the names that
    `returned` may have.
    """
    output = graph.output_node()
    nodes = {n.name: n for n in graph.nodes}
    specs = [spec for spec in exported.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    values = [nodes[spec.arg.name] if isinstance(spec.arg, TensorArgument) else None for spec in specs]
    assert exported.call_spec.out_spec is not None
    tree = tree_unflatten(values, exported.call_spec.out_spec)
    loss = loss_of(tree, values, lambda value: value is not None and value.meta["val"].dim() == 0)
    if loss is None or loss.meta["val"].dim() or not loss.meta["val"].is_floating_point():
        raise PartitionError(
            "the model returns no scalar loss",
            f"its outputs have shapes {[tuple(v.meta['val'].shape) for v in values if v is not None]}",
            "put the labels into the batch, or wrap the model so that forward returns the loss",
        )
    known = tuple(name for name, node in _outputs(tree) if node is not loss and _leads_to(loss, node))
    for name in returned:
        _mark(graph, name, _named(tree, name), loss)
    changes = exported.graph_signature.buffers_to_mutate
    output.args = (loss, *(nodes[name] for name in changes))
    graph.eliminate_dead_code(lambda node: node.is_impure() and not _is_random(node))
    return tuple(changes.values()), known


def _outputs(tree: Any, path: str = "") -> Iterator[tuple[str, fx.Node]]:
    """The nodes in what a model returns, each with the name that `_named` finds it by."""
    if isinstance(tree, fx.Node) and path:
        yield path, tree
    elif isinstance(tree, (Mapping, tuple, list)):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _outputs(value, f"{path}.{key}" if path else str(key))


def _leads_to(loss: fx.Node, node: fx.Node) -> bool:
    """Whether the loss is computed from what a node computes."""
    return node.op != "placeholder" and reaches(loss, {node.name})


def _named(tree: Any, name: str) -> Any:
    """What a model returns by a name: a key, an attribute, or a number in a tuple; "1.logits" is inside of another."""
    for part in name.split("."):
        if isinstance(tree, Mapping):
            tree = tree.get(part)
        elif isinstance(tree, (tuple, list)) and part.isdigit():
            tree = tree[int(part)] if int(part) < len(tree) else None
        else:
            tree = getattr(tree, part, None)
    return tree


def _mark(graph: fx.Graph, name: str, node: Any, loss: fx.Node) -> None:
    """Put the operator `returned` between a value and what reads it. Raises PartitionError for a name that the model
    does not return, and for a value from which the loss does not come."""
    if not isinstance(node, fx.Node) or node.op == "placeholder":
        raise PartitionError(
            f"the model returns no tensor {name!r}",
            "outputs are named by keys or attributes of what forward returns, or by numbers in a tuple",
            'outputs=["logits"]',
        )
    if node is loss or not _leads_to(loss, node):
        raise PartitionError(
            f"the loss does not come from the output {name!r}",
            "stages compute the loss and what it comes from",
            "an output on the way to the loss, such as logits",
        )
    with graph.inserting_after(node):
        marked = graph.call_function(returned, (node, Stream(name)))
    marked.meta = {key: value for key, value in node.meta.items() if key != KEY}
    node.replace_all_uses_with(marked, lambda user: user is not marked)


def _is_random(node: fx.Node) -> bool:
    """Whether a call draws random numbers, which torch.fx keeps even if nobody reads them."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def loss_of(output: Any, leaves: Sequence[Any], is_scalar: Callable[[Any], bool]) -> Any:
    """The loss among what a model returns: the output called `loss`, else the first scalar leaf; None without one."""
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    return loss if loss is not None else next(filter(is_scalar, leaves), None)


def _merge_constants(graph: fx.Graph, exported: torch.export.ExportedProgram) -> dict[str, tuple[str, Any]]:
    """Merge the tensors of equal values that the forward pass makes of Python's numbers.

    Name of a placeholder -> name and value of its tensor; the name is a hash of the value.
    """
    found: dict[str, tuple[str, Any]] = {}
    first: dict[str, fx.Node] = {}
    lifted = exported.graph_signature.inputs_to_lifted_tensor_constants
    for node in graph.find_nodes(op="placeholder"):
        if node.name in lifted:
            value = exported.constants.get(lifted[node.name])
            name = lifted[node.name]
            if isinstance(value, torch.Tensor) and not value.is_meta:
                name = f"constant_{digest(value, value.dtype, *value.shape)[:8]}"
            found[node.name] = name, value
            if first.setdefault(name, node) is not node:
                node.replace_all_uses_with(first[name])
                graph.erase_node(node)
    return found


def _own_constants(graph: fx.Graph, constants: frozenset[str]) -> None:
    """Give a constant that the operators of one block alone read the block's label, so that equal blocks may have
    constants of other values."""
    for node in placeholders(graph, "buffer"):
        layers = {info(user).layer for user in node.users if KEY in user.meta}
        if info(node).name in constants and len(layers) == 1:
            update_info(node, layer=layers.pop())


def _drop_assertions(graph: fx.Graph) -> None:
    """Remove assertions on data, and the numbers that only they read."""
    for node in reversed(graph.nodes):
        unread = node.op == "call_function" and not node.users
        if unread and ("_assert" in str(node.target) or _is_number(node)):
            graph.erase_node(node)


def _check_dtypes(graph: fx.Graph) -> None:
    """Raise OperatorError for a product of two dtypes, which fake tensors allow and real ones do not."""
    for node in graph.nodes:
        if KEY in node.meta and is_contraction(node.meta[KEY].name):
            dtypes: dict[str, str] = {}
            for factor in flatten(node.args)[:3]:
                if isinstance(factor, fx.Node) and factor.meta[KEY].dtypes:
                    dtypes.setdefault(str(factor.meta[KEY].dtype).removeprefix("torch."), factor.meta[KEY].name)
            if len(dtypes) > 1:
                raise OperatorError(
                    f"a product of {' and '.join(dtypes)} ({node.meta[KEY].source or node.name})",
                    f"they are of {' and '.join(dtypes.values())}",
                    "the batch, the parameters and the buffers of one dtype (model.to(dtype) casts buffers too), or "
                    "x.to(weight.dtype) in forward",
                )


def _check_gradient(loss: fx.Node, model: nn.Module) -> None:
    """Raise PartitionError where no gradient flows from the loss to a parameter."""
    if loss.meta[KEY].grad:
        return
    parameters = list(model.parameters())
    trained = sum(p.requires_grad for p in parameters)
    why = "it comes from no trained parameter but through detach, torch.no_grad or integers"
    if not trained:
        why = f"none of the model's {len(parameters)} parameters is trained" if parameters else "it has no parameters"
    raise PartitionError(
        f"the loss has no gradient ({loss.meta[KEY].source or 'an input'})",
        why,
        "the loss as the first scalar that is returned, or called loss" if trained else "parameters that are trained",
    )


def _is_number(node: fx.Node) -> bool:
    """Whether the node gives a number that depends on data."""
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))


def _record(node: fx.Node, kind: str, name: str) -> Info:
    value = node.meta.get("val")
    outputs = value if isinstance(value, (tuple, list)) else (value,)
    tensors = [o for o in outputs if isinstance(o, torch.Tensor)]
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if isinstance(path, str)]
    module = paths[-1].replace("L['self']", "").lstrip(".") if paths else ""
    layer = re.match(r"(.*?\.\d+)(?:\.|$)", module)
    if kind == "parameter":
        layer = re.match(r"(.*?\.\d+)(?:\.|$)", name)
        module = name.rpartition(".")[0]
    number = _is_number(node)
    if number or any(not is_concrete_int(s) for t in tensors for s in t.shape):
        what = "a number" if number else "the shape of a tensor"
        given = value if number else [tuple(map(str, t.shape)) for t in tensors]
        raise OperatorError(
            f"{what} depends on data ({source_line(node.meta.get('stack_trace') or '') or name})",
            f"{name} gives {given}",
            "take x[mask], nonzero(), .item() and .tolist() out of the forward pass; torch.where has a fixed shape",
        )
    inputs = [n for n in node.all_input_nodes if KEY in n.meta]
    differentiable = bool(tensors) and has_gradient(tensors[0].dtype)
    return Info(
        kind=kind,
        name=name,
        shapes=tuple(tuple(int(s) for s in t.shape) for t in tensors),
        dtypes=tuple(t.dtype for t in tensors),
        grad=differentiable
        and (
            tensors[0].requires_grad
            if kind == "parameter"
            else not gives_constant(name) and any(n.meta[KEY].grad for n in inputs)
        ),
        layer=layer[1] if layer else "",
        module=module,
        source=source_line(node.meta.get("stack_trace") or ""),
        frames=own_frames(node.meta.get("stack_trace") or ""),
        batch=0 if kind == "input" else None,
        times=(node.meta.get("custom") or {}).get(TIMES, 1),
    )


def _buffers(model: nn.Module, constants: Mapping[str, Any], nodes: list[fx.Node]) -> dict[str, torch.Tensor | None]:
    own = dict(model.named_buffers(remove_duplicate=False))
    values: dict[str, torch.Tensor | None] = {}
    for node in nodes:
        name = node.meta[KEY].name
        value = own.get(name)
        if value is None:
            value = constants.get(name)
        known = isinstance(value, torch.Tensor) and value.device.type != "meta" and not hasattr(value, "fake_mode")
        values[name] = value if known else None
    return values


def _aliases(model: nn.Module) -> dict[str, str]:
    """Every further name of a tied parameter or buffer -> its first name, which `named_parameters` or `named_buffers`
    gives."""
    first: dict[int, str] = {}
    return {
        name: first[id(tensor)]
        for named in (model.named_parameters, model.named_buffers)
        for name, tensor in named(remove_duplicate=False)
        if first.setdefault(id(tensor), name) != name
    }
