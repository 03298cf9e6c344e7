"""nn.Module + batch -> torch.export's program, functionalised, or the reason why not.

What torch.export would get wrong without a word is refused here or put right: regions without gradients, backward
functions of the user's own, tensors that a model reaches behind autograd's back, Python's own random numbers.
"""

from __future__ import annotations

import copy
import logging
import os
import pickle
import random
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.utils.checkpoint
from torch import fx, nn

from autopart.errors import PartitionError
from autopart.frontend.autograd_functions import CustomFunction
from autopart.frontend.functionalize import functional
from autopart.frontend.inputs import main_dtype
from autopart.frontend.layer_sampling import Dropped, SampledLayers
from autopart.frontend.torch_private import FakeTensor, FakeTensorMode, lazy_graph_modules
from autopart.ir.ctc import ctc_loss

PACKAGES = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep,
)
"""Where lines that are not the user's come from."""

PYTHON = os.path.dirname(os.__file__) + os.sep
"""Where Python's own modules lie, and inside of it the packages that are installed."""


def export(
    model: nn.Module,
    inputs: Mapping[str, Any],
    dtype: torch.dtype | None,
    sampled: Sequence[SampledLayers] = (),
) -> torch.export.ExportedProgram:
    """Export the forward pass of a copy of the model whose tensors are fake, and whose lists of blocks end where
    `sampled` says. Raises PartitionError with the user's line and, where another attention of transformers can be
    traced, its name."""
    try:
        return _export(model, inputs, dtype, sampled)
    except PartitionError:
        raise
    except Exception as error:  # whatever a forward pass may raise
        own = [*model._modules, *model._parameters, *model._buffers]
        if taken := [name for name in own if hasattr(fx.GraphModule, name) and not hasattr(nn.Module, name)]:
            raise PartitionError(
                f"torch.export cannot trace an attribute of the model that is called {taken[0]!r}",
                "torch.fx's graph modules have another of that name",
                "another name for it, or this model inside of another module",
            ) from error
        names = ("sdpa", "eager") if not sampled else ()
        other = next((name for name in names if _traces_with(model, inputs, dtype, name)), "")
        raise _untraceable(error, other) from error


def _export(
    model: nn.Module,
    inputs: Mapping[str, Any],
    dtype: torch.dtype | None,
    sampled: Sequence[SampledLayers] = (),
    attention: str = "",
    drawn: float | None = None,
) -> torch.export.ExportedProgram:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    skeleton: Any = _skeleton(model, mode, dtype, sampled)
    kwargs = {k: _fake(v, mode) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    _gather_experts(skeleton)
    _without_caches(skeleton)
    if attention:
        skeleton.set_attn_implementation(attention)
    custom: list[CustomFunction] = []
    before = _foreign_random()
    with (
        mode,
        lazy_graph_modules(True),
        warnings.catch_warnings(),
        _custom_functions(custom),
        _no_inference_mode(),
        _open_checkpoints(),
        _no_tensor_hooks(),
        _casts_that_change_nothing(),
        _no_validation(),
        torch.enable_grad(),
        _silence(),
        mock.patch.object(torch, "ctc_loss", ctc_loss),
        nullcontext() if drawn is None else _drawing(drawn),
    ):
        warnings.simplefilter("ignore", FutureWarning)
        exported = torch.export.export(skeleton, (), kwargs, strict=False)
        _refuse_hidden_tensors(exported)
        _cut_gradients(exported)
        exported = functional(exported)
    for function in custom:
        function.check()
    if drawn is None and _foreign_random() != before and not _never_matters(model, inputs, dtype, sampled):
        raise PartitionError(
            "the forward pass draws from Python's or numpy's random",
            "a trace would keep the one outcome it saw",
            "layerdrop=0 in the config, or torch.rand",
        )
    return exported


@contextmanager
def _silence() -> Iterator[None]:
    """torch.export prints and logs whole graphs where it fails."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(before)


@contextmanager
def _casts_that_change_nothing() -> Iterator[None]:
    """`module.to(dtype)` in a forward pass, of a module that has this dtype, puts new parameters in its place where
    tensors are fake, which torch.export refuses; it is to do nothing, as it does with real ones."""
    own: Any = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        floats = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
        same = floats and all(t.to(*args, **kwargs) is t for t in floats)
        return module if same else own(module, *args, **kwargs)

    with mock.patch.object(nn.Module, "to", to):
        yield


@contextmanager
def _no_validation() -> Iterator[None]:
    """torch.distributions look at the values that they are given, which a trace has none of."""
    with mock.patch.object(torch.distributions.Distribution, "_validate_args", False):
        yield


@contextmanager
def _no_inference_mode() -> Iterator[None]:
    """torch.inference_mode leaves no mark in a trace; torch.no_grad does, and computes the same."""
    own = torch.inference_mode.__enter__, torch.inference_mode.__exit__

    def enter(context: Any) -> None:
        context.before = torch.is_grad_enabled()
        torch.set_grad_enabled(context.before and not context.mode)

    def leave(context: Any, *error: Any) -> None:
        torch.set_grad_enabled(context.before)

    torch.inference_mode.__enter__, torch.inference_mode.__exit__ = enter, leave  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.inference_mode.__enter__, torch.inference_mode.__exit__ = own  # type: ignore[method-assign]


@contextmanager
def _open_checkpoints() -> Iterator[None]:
    """A reentrant checkpoint runs its function without gradients, and again in a backward that a trace does not see.
    What it computes is its function; without gradients only where no argument has one."""

    def run(function: Any, preserve: bool, *args: Any) -> Any:
        wanted = any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
        with torch.set_grad_enabled(torch.is_grad_enabled() and wanted):
            return function(*args)

    with mock.patch.object(torch.utils.checkpoint.CheckpointFunction, "apply", run):
        yield


@contextmanager
def _no_tensor_hooks() -> Iterator[None]:
    """Refuse hooks on gradients, which leave no mark in a trace."""

    def register(tensor: torch.Tensor, hook: Any) -> Any:
        raise PartitionError(
            f"the forward pass puts a hook on a gradient ({user_line(traceback.extract_stack())})",
            "a trace does not see it, and gradients would be others if it changes them",
            "a scale or a clamp of the loss, or of gradients after backward",
        )

    with mock.patch.object(torch.Tensor, "register_hook", register):
        yield


def _foreign_random() -> bytes:
    """The states of the random numbers that no trace follows."""
    return pickle.dumps((random.getstate(), np.random.get_state()))


@contextmanager
def _drawing(value: float) -> Iterator[None]:
    """Python's and numpy's uniform numbers are all `value`."""
    with (
        mock.patch.object(random, "random", lambda: value),
        mock.patch.object(random, "uniform", lambda low, high: low + (high - low) * value),
        mock.patch.object(np.random, "uniform", lambda low=0.0, high=1.0, size=None: low + (high - low) * value),
    ):
        yield


def _never_matters(
    model: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype | None, sampled: Sequence[SampledLayers]
) -> bool:
    """Whether the trace is the same for the least and the largest number that can be drawn, as with layerdrop 0."""
    least, largest = (_export(model, inputs, dtype, sampled, drawn=value) for value in (0.0, 1.0 - 2.0**-53))
    return str(least.graph) == str(largest.graph)


def _traces_with(model: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype | None, attention: str) -> bool:
    """Whether the model can be traced with another of transformers' attention functions."""
    current = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if current in (None, attention) or not hasattr(model, "set_attn_implementation"):
        return False
    try:
        _export(model, inputs, dtype, attention=attention)
    except Exception:
        return False
    return True


def _untraceable(error: Exception, attention: str) -> PartitionError:
    where = user_line(traceback.extract_tb(error.__traceback__))
    reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    advice = "see whether model(**batch) runs by itself; if it does, other operators in that line"
    if "DataDependent" in reason:
        reason = "what it does depends on the values of tensors"
        advice = "take values that depend on data (.item(), if x.sum() > 0, nonzero) out of the forward pass"
    if attention:
        advice = f'model.set_attn_implementation("{attention}"): the same function, and it can be traced'
    return PartitionError("torch.export cannot trace the model", f"{where}  {reason}", advice)


def user_line(frames: traceback.StackSummary) -> str:
    """The innermost line that is neither torch's, Python's nor autopart's, "model.py:88: y = f(x)"."""
    own = [f for f in frames if not f.filename.startswith((*PACKAGES, "<")) and not _is_pythons(f.filename)]
    return f"{os.path.basename(own[-1].filename)}:{own[-1].lineno}: {own[-1].line}" if own else "?"


def _is_pythons(filename: str) -> bool:
    return filename.startswith(PYTHON) and "site-packages" not in filename


def source_line(stack: str) -> str:
    """The innermost line of a stack trace that is the model's own, "modeling_llama.py:88"."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', stack)
    own = [f for f in frames if not f[0].startswith((*PACKAGES, "<"))]
    return f"{os.path.basename(own[-1][0])}:{own[-1][1]}" if own else ""


def _fake(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """A fake CPU tensor of its own, so that two inputs that are one tensor stay two."""
    with mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _skeleton(
    model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None, sampled: Sequence[SampledLayers]
) -> nn.Module:
    """A copy of the model whose tensors are fake: the same structure and tied weights, no memory; without the blocks
    that `sampled` drops. Parameters of its main dtype are of `dtype`, if one is given; others keep theirs."""
    own = main_dtype(model)
    memo: dict[int, Any] = {}
    for sample in sampled:
        blocks = list(model.get_submodule(sample.path).children())
        memo |= {id(block): Dropped() for block in blocks[sample.kept :]}
    with mode:
        for module in _kept_modules(model, frozenset(memo)):
            for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                if id(tensor) in memo:
                    continue
                is_parameter = isinstance(tensor, nn.Parameter)
                wanted = dtype if dtype and is_parameter and tensor.dtype == own else tensor.dtype
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=wanted, device="cpu")
                memo[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake
    skeleton = copy.deepcopy(model, memo)
    for sample in sampled:
        del skeleton.get_submodule(sample.path)[sample.kept :]  # type: ignore[operator]
    _renew_aliases(skeleton)
    return skeleton


def _renew_aliases(skeleton: nn.Module) -> None:
    """Where a module keeps parameters or buffers in a plain list, tuple or dict too, fill that anew for the forward
    pass: torch.export puts other tensors into modules, and into nothing else."""
    modules = list(skeleton.modules())
    tensors = [(m, n, t) for m in modules for n, t in [*m._parameters.items(), *m._buffers.items()] if t is not None]
    owners = {id(t): (m, n) for m, n, t in tensors}

    def renewed(value: Any) -> Any:
        if id(value) in owners:
            return getattr(*owners[id(value)])
        if type(value) in (list, tuple):
            return type(value)(map(renewed, value))
        return {k: renewed(v) for k, v in value.items()} if type(value) is dict else value

    def holds(value: Any) -> bool:
        inner = value.values() if type(value) is dict else value if type(value) in (list, tuple) else ()
        return id(value) in owners or any(map(holds, inner))

    own = vars(nn.Module()).keys()
    held = [(vars(m), k, v) for m in modules for k, v in vars(m).items() if k not in own and holds(v)]

    def renew(*_: object) -> None:
        for attributes, name, value in held:
            attributes[name] = renewed(value)

    def restore(*_: object) -> None:
        for attributes, name, value in held:
            attributes[name] = value

    if held:
        skeleton.register_forward_pre_hook(renew)
        skeleton.register_forward_hook(restore)


def _kept_modules(module: nn.Module, dropped: frozenset[int]) -> Iterator[nn.Module]:
    yield module
    for child in module.children():
        if id(child) not in dropped:
            yield from _kept_modules(child, dropped)


def _gather_experts(model: nn.Module) -> None:
    """Have transformers' mixtures of experts gather each token's weights, which is the same function and can be traced:
    other implementations loop over the experts in use, or sort the tokens."""
    for module in model.modules():
        if hasattr(module, "_is_expert_parallel"):
            module.config._experts_implementation = "batched_mm"  # type: ignore[union-attr]


def _without_caches(model: nn.Module) -> None:
    """Have transformers' models give no keys and values for the next token, which training has none of and torch.export
    cannot return."""
    for config in (getattr(module, "config", None) for module in model.modules()):
        if getattr(config, "use_cache", False):
            config.use_cache = False  # type: ignore[union-attr]


@contextmanager
def _custom_functions(found: list[CustomFunction]) -> Iterator[None]:
    """Note every call of an autograd.Function that is not torch's own."""
    base: Any = torch.autograd.Function.__mro__[1]  # that of torch.autograd.Function alone: some keep its bound `apply`

    def noted(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch."):
            frames = [f for f in traceback.extract_stack()[:-1] if not f.filename.startswith(PACKAGES)]
            found.append(CustomFunction(cls, args, f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}"))
        return super(base, cls).apply(*args, **kwargs)

    base.apply = classmethod(noted)
    try:
        yield
    finally:
        del base.apply


def _refuse_hidden_tensors(exported: torch.export.ExportedProgram) -> None:
    """A tensor that is neither parameter, buffer nor input has no value where the model's tensors are fake."""
    for node in exported.graph.nodes:
        name = exported.graph_signature.inputs_to_lifted_tensor_constants.get(node.name)
        if isinstance(exported.constants.get(name or ""), FakeTensor):
            stack = next((u.meta["stack_trace"] for u in node.users if u.meta.get("stack_trace")), "")
            raise PartitionError(
                f"the forward pass reaches a tensor that the model does not own ({source_line(stack) or node.name})",
                "as with weight.data, which autograd and a trace do not follow",
                "with torch.no_grad(): weight.clamp_(...) after the optimizer's step, outside the forward pass",
            )


def _cut_gradients(exported: torch.export.ExportedProgram) -> None:
    """Detach what `torch.no_grad` regions make, since decomposition inlines them and forgets."""
    parameters = exported.graph_signature.inputs_to_parameters
    for module in exported.graph_module.modules():
        graph = getattr(module, "graph", None)
        for node in list(graph.nodes) if isinstance(graph, fx.Graph) else ():
            if str(node.target) == "aten.detach_.default":
                node.target = torch.ops.aten.detach.default
            if str(node.target) == "wrap_with_set_grad_enabled" and node.args[0] is False:
                region = getattr(module, node.args[1].target).graph
                _refuse_changes(region, [_has_gradient(given, parameters) for given in node.args[2:]])
                (results,) = region.output_node().args
                for pick in list(node.users):
                    if _itself(results[pick.args[1]]).op != "placeholder":
                        _detach(pick)


def _refuse_changes(region: fx.Graph, gradients: list[bool]) -> None:
    """Raise PartitionError where a `torch.no_grad` region changes in place what has a gradient outside: autograd then
    takes the new values for the old ones."""
    outside = dict(zip(region.find_nodes(op="placeholder"), gradients, strict=True))
    for node in region.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not node.args:
            continue
        first = schema.arguments[0].alias_info
        if first is not None:
            outside[node] = outside.get(node.args[0], False)
            if first.is_write and outside[node]:
                raise PartitionError(
                    "the forward pass changes a tensor that has a gradient under torch.no_grad "
                    f"({source_line(node.meta.get('stack_trace') or '') or node.target})",
                    "autograd does not see the change, and differentiates as if there were none",
                    "a new tensor, or a change outside torch.no_grad",
                )


def _has_gradient(node: Any, parameters: Mapping[str, str]) -> bool:
    """Whether a value outside all regions is made from a parameter, by operators that have derivatives."""
    seen, todo = {node}, [node]
    while todo:
        node = todo.pop()
        if node.name in parameters:
            return True
        value, target = node.meta.get("val"), str(node.target)
        fixed = isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex())
        if fixed or target.startswith("aten.detach") or "_like." in target or target.startswith("aten.new_"):
            continue
        if target == "wrap_with_set_grad_enabled" and node.args[0] is False:
            continue
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        todo += new
    return False


def _itself(node: fx.Node) -> fx.Node:
    """What casts that change nothing gave back: a trace takes later uses of that tensor for uses of the cast."""
    while str(node.target).startswith(("aten.to.", "aten.contiguous", "aten.type_as", "aten.dropout")):
        source = node.args[0]
        if str(node.target) == "aten.dropout.default" and node.args[1] and node.args[2]:
            break
        if not isinstance(source, fx.Node) or source.meta["val"].dtype != node.meta["val"].dtype:
            break
        node = source
    return node


def _detach(node: fx.Node) -> None:
    with node.graph.inserting_after(node):
        cut = node.graph.call_function(torch.ops.aten.detach.default, (node,))
    cut.meta = dict(node.meta)
    node.replace_all_uses_with(cut, lambda user: user is not cut and user.op != "output")
