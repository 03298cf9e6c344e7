"""nn.Module + batch -> fx.Graph: torch.export, forward only, then functionalised."""

from __future__ import annotations

import copy
import os
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from autopart.custom import CustomFunction
from autopart.errors import PartitionError
from autopart.graph import KEY, Info, Traced, placeholders
from autopart.rules import op_name
from autopart.torch_private import FakeTensor, FakeTensorMode, tree_unflatten

OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PACKAGES = (os.path.dirname(torch.__file__) + os.sep, OWN + os.sep)
"""Where lines that are not the user's come from."""


def trace(model: nn.Module, batch: Mapping[str, Any], dtype: torch.dtype | None = None) -> Traced:
    """Trace one micro-batch's forward pass.

    `batch` holds the model's keyword arguments, samples in dim 0 of every tensor; its size becomes the
    micro-batch. `dtype`, if given, is what floating-point parameters are taken to be. No parameter is read:
    models on meta work. Raises PartitionError naming the user's line where torch.export fails.
    """
    sizes = {k: v.shape[0] for k, v in batch.items() if isinstance(v, torch.Tensor) and v.dim()}
    if not sizes or len(set(sizes.values())) != 1:
        raise PartitionError("the batch has no common size", f"samples in dim 0: {sizes}", "equal sizes in dim 0")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    skeleton = _skeleton(model, mode, dtype)
    kwargs = {k: _fake(v, mode) if isinstance(v, torch.Tensor) else v for k, v in batch.items() if v is not None}
    _gather_experts(skeleton)
    custom: list[CustomFunction] = []
    try:
        with mode, warnings.catch_warnings(), _custom_functions(custom):
            warnings.simplefilter("ignore", FutureWarning)
            exported = torch.export.export(skeleton, (), kwargs, strict=False)
            _refuse_hidden_tensors(exported)
            _cut_gradients(exported)
            exported = exported.run_decompositions({})
    except PartitionError:
        raise
    except Exception as error:
        raise _untraceable(error) from error
    for function in custom:
        function.check()
    signature = exported.graph_signature
    if signature.user_inputs_to_mutate:
        raise PartitionError(
            f"the forward pass changes its input {sorted(signature.user_inputs_to_mutate.values())[0]}",
            "a batch is read by several ranks and micro-batches",
            "a copy of it in the forward pass: x = x.clone()",
        )
    graph = exported.graph_module.graph
    updated = _keep_loss(graph, exported)
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    keys = [k for k, v in kwargs.items()]
    users = iter(signature.user_inputs)
    aliases = _aliases(model)
    by_user = {name: key for name, key in zip(users, keys, strict=True) if isinstance(name, str)}
    for node in list(graph.nodes):
        if node.op == "output":
            continue
        if node.op == "placeholder":
            kind = (
                "parameter"
                if node.name in signature.inputs_to_parameters
                else "buffer"
                if node.name in named or node.name in lifted
                else "input"
            )
            name = named.get(node.name, "")
            name = aliases.get(name, name) or lifted.get(node.name) or by_user.get(node.name, node.name)
            if not isinstance(node.meta.get("val"), torch.Tensor):
                graph.erase_node(node)
                continue
        elif node.meta.get("val") is None:
            graph.erase_node(node)
            continue
        else:
            kind, name = "op", op_name(node.target)
        node.meta[KEY] = _record(node, kind, name)
    buffers = _buffers(model, exported, placeholders(graph, "buffer"))
    classes = {path: type(module).__name__ for path, module in model.named_modules()}
    return Traced(graph, type(model).__name__, buffers, aliases, next(iter(sizes.values())), classes, updated)


def _gather_experts(model: nn.Module) -> None:
    """Have transformers' mixtures of experts gather each token's weights, which is the same function and can be traced:
    other implementations loop over the experts in use, or sort the tokens."""
    for module in model.modules():
        if hasattr(module, "_is_expert_parallel"):
            module.config._experts_implementation = "batched_mm"  # type: ignore[union-attr]


@contextmanager
def _custom_functions(found: list[CustomFunction]) -> Iterator[None]:
    """Note every call of an autograd.Function that is not torch's own."""
    apply = torch.autograd.Function.__dict__["apply"]

    def noted(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch."):
            frames = [f for f in traceback.extract_stack()[:-1] if not f.filename.startswith(PACKAGES)]
            found.append(CustomFunction(cls, args, f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}"))
        return apply.__func__(cls, *args, **kwargs)

    torch.autograd.Function.apply = classmethod(noted)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]


def _refuse_hidden_tensors(exported: torch.export.ExportedProgram) -> None:
    """A tensor that is neither parameter, buffer nor input has no value where the model's tensors are fake."""
    for node in exported.graph.nodes:
        name = exported.graph_signature.inputs_to_lifted_tensor_constants.get(node.name)
        if isinstance(exported.constants.get(name or ""), FakeTensor):
            stack = next((u.meta["stack_trace"] for u in node.users if u.meta.get("stack_trace")), "")
            raise PartitionError(
                f"the forward pass reaches a tensor that the model does not own ({_source(stack) or node.name})",
                "as with weight.data, which autograd and a trace do not follow",
                "with torch.no_grad(): weight.clamp_(...) after the optimizer's step, outside the forward pass",
            )


def _cut_gradients(exported: torch.export.ExportedProgram) -> None:
    """Detach what `torch.no_grad` regions make, since decomposition inlines them and forgets."""
    for module in exported.graph_module.modules():
        graph = getattr(module, "graph", None)
        for node in list(graph.nodes) if isinstance(graph, fx.Graph) else ():
            if str(node.target) == "wrap_with_set_grad_enabled" and node.args[0] is False:
                (results,) = getattr(module, node.args[1].target).graph.output_node().args
                for pick in list(node.users):
                    if _itself(results[pick.args[1]]).op != "placeholder":
                        _detach(pick)


def _itself(node: fx.Node) -> fx.Node:
    """What casts that change nothing gave back: a trace takes later uses of that tensor for uses of the cast."""
    while str(node.target).startswith(("aten.to.", "aten.contiguous", "aten.type_as")):
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.meta["val"].dtype != node.meta["val"].dtype:
            break
        node = source
    return node


def _detach(node: fx.Node) -> None:
    with node.graph.inserting_after(node):
        cut = node.graph.call_function(torch.ops.aten.detach.default, (node,))
    cut.meta = dict(node.meta)
    node.replace_all_uses_with(cut, lambda user: user is not cut and user.op != "output")


def _fake(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """A fake CPU tensor of its own, so that two inputs that are one tensor stay two."""
    with mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _skeleton(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None) -> nn.Module:
    """A copy of the model whose tensors are fake: the same structure and tied weights, no memory."""
    memo: dict[int, Any] = {}
    with mode:
        for tensor in [*model.parameters(), *model.buffers()]:
            is_parameter = isinstance(tensor, nn.Parameter)
            wanted = dtype if dtype and is_parameter and tensor.is_floating_point() else tensor.dtype
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=wanted, device="cpu")
            memo[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake
    return copy.deepcopy(model, memo)


def _keep_loss(graph: fx.Graph, exported: torch.export.ExportedProgram) -> tuple[str, ...]:
    """Make the graph's outputs the loss (the output called `loss`, else the first scalar) and then the new values of
    the buffers that the forward pass changes, whose names it returns."""
    output = graph.output_node()
    nodes = {n.name: n for n in graph.nodes}
    values = [nodes[name] if isinstance(name, str) else None for name in exported.graph_signature.user_outputs]
    assert exported.call_spec.out_spec is not None
    tree = tree_unflatten(values, exported.call_spec.out_spec)
    loss = tree.get("loss") if isinstance(tree, dict) else getattr(tree, "loss", None)
    scalars = [v for v in values if v is not None and v.meta["val"].dim() == 0]
    loss = loss if loss is not None else next(iter(scalars), None)
    if loss is None or loss.meta["val"].dim() or not loss.meta["val"].is_floating_point():
        raise PartitionError(
            "the model returns no scalar loss",
            f"its outputs have shapes {[tuple(v.meta['val'].shape) for v in values if v is not None]}",
            "put the labels into the batch, or wrap the model so that forward returns the loss",
        )
    changes = exported.graph_signature.buffers_to_mutate
    output.args = (loss, *(nodes[name] for name in changes))
    graph.eliminate_dead_code()
    return tuple(changes.values())


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
    if any(not isinstance(s, int) for t in tensors for s in t.shape):
        raise PartitionError(
            f"the shape of a tensor depends on data ({_source(node.meta.get('stack_trace') or '') or name})",
            f"{name} gives {[tuple(map(str, t.shape)) for t in tensors]}",
            "take x[mask], nonzero(), .item() and .tolist() out of the forward pass; torch.where has a fixed shape",
        )
    inputs = [n for n in node.all_input_nodes if KEY in n.meta]
    differentiable = bool(tensors) and tensors[0].is_floating_point()
    return Info(
        kind=kind,
        name=name,
        shapes=tuple(tuple(int(s) for s in t.shape) for t in tensors),
        dtypes=tuple(t.dtype for t in tensors),
        grad=differentiable
        and (
            tensors[0].requires_grad
            if kind == "parameter"
            else name != "aten.detach" and any(n.meta[KEY].grad for n in inputs)
        ),
        layer=layer[1] if layer else "",
        module=module,
        source=_source(node.meta.get("stack_trace") or ""),
        batch=0 if kind == "input" else None,
    )


def _source(stack: str) -> str:
    """The innermost line of the stack that is the model's own."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', stack)
    own = [f for f in frames if not f[0].startswith((*PACKAGES, "<"))]
    return f"{os.path.basename(own[-1][0])}:{own[-1][1]}" if own else ""


def _buffers(
    model: nn.Module, exported: torch.export.ExportedProgram, nodes: list[fx.Node]
) -> dict[str, torch.Tensor | None]:
    own = dict(model.named_buffers(remove_duplicate=False))
    values: dict[str, torch.Tensor | None] = {}
    for node in nodes:
        name = node.meta[KEY].name
        value = own.get(name)
        if value is None:
            value = exported.constants.get(name)
        known = isinstance(value, torch.Tensor) and value.device.type != "meta" and not hasattr(value, "fake_mode")
        values[name] = value if known else None
    return values


def _aliases(model: nn.Module) -> dict[str, str]:
    """Every further name of a tied parameter -> its first, which `named_parameters` gives."""
    first: dict[int, str] = {}
    return {
        name: first[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if first.setdefault(id(parameter), name) != name
    }


def _untraceable(error: Exception) -> PartitionError:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(PACKAGES)]
    where = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "an unknown line"
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return PartitionError(
        "torch.export cannot trace the model",
        f"{where}\n       {type(error).__name__}: {reason}",
        "take values that depend on data (.item(), if x.sum() > 0, nonzero) out of the forward pass",
    )
