"""Checks of what a user gives: the model, the batch, and the modes that torch is in."""

import inspect
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from autopart.errors import PartitionError, closest
from autopart.frontend.torch_private import tree_leaves


def check_inputs(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Raise PartitionError for a model or a batch that no plan can be made for, and under torch.autocast or
    torch.inference_mode."""
    check_modes("a plan")
    _check_model(model)
    _check_batch(model, batch)


def check_modes(what: str) -> None:
    """Raise PartitionError under torch.autocast or torch.inference_mode: emitted code would not run under the mode that
    is on around `what`."""
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        raise PartitionError(
            f"torch.autocast is on around {what}",
            "the emitted code runs the casts that a trace saw, each of them once",
            'torch.autocast inside forward, or precision="bfloat16", master="float32"',
        )
    if torch.is_inference_mode_enabled():
        raise PartitionError(
            f"torch.inference_mode is on around {what}", "a training step needs gradients", "without it"
        )


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        made = f"{model.__name__}(...)" if isinstance(model, type) else "an nn.Module whose forward returns the loss"
        raise PartitionError(f"the model is {given}, not an nn.Module", try_=made)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for name, tensor in tensors.items():
        if is_lazy(tensor):
            raise PartitionError(
                f"{name} has no shape yet", "a lazy module makes its weights at its first call", "model(**batch) once"
            )
        if tensor.requires_grad and (tensor._backward_hooks or tensor._post_accumulate_grad_hooks):
            raise _hooked(name)
    for path, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise _hooked(path or type(model).__name__)


def _hooked(name: str) -> PartitionError:
    return PartitionError(
        f"{name} has a hook on its backward pass",
        "the emitted code does not call it, and gradients would be others if it changes them",
        "the hook removed (its handle has .remove()), or an optimizer's own hook",
    )


def _check_batch(model: nn.Module, batch: Any) -> None:
    parameters = _parameters(model)
    names = [n for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not isinstance(batch, Mapping):
        example = ", ".join(f'"{name}": ...' for name in names[:3]) or '"x": ...'
        raise PartitionError(
            f"the batch is a {type(batch).__name__}, not a dict",
            "forward is called as model(**batch)",
            f"{{{example}}}",
        )
    for name, value in batch.items():
        if not isinstance(name, str):
            raise PartitionError(f"the batch has the key {name!r}", "keys are the names of forward's arguments")
        _check_value(name, value)
    if parameters:
        _check_call(parameters, names, batch)


def _check_value(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            raise PartitionError(
                f"batch[{name!r}] is a {type(value).__name__} of tensors",
                "only tensors that are the batch's own values are split over ranks",
                "each of them under a name of its own",
            )
        if hasattr(value, "__array__"):
            raise PartitionError(f"batch[{name!r}] is a {type(value).__name__}, not a tensor", try_="torch.as_tensor")
    elif value.layout != torch.strided or value.is_nested:
        raise PartitionError(f"batch[{name!r}] is not a dense tensor", f"its layout is {value.layout}", ".to_dense()")


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return {}


def _check_call(parameters: Mapping[str, inspect.Parameter], names: list[str], batch: Mapping[str, Any]) -> None:
    """Raise PartitionError unless forward can be called with the batch's names."""
    kinds = {p.kind for p in parameters.values()}
    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_ONLY]
    if (inspect.Parameter.VAR_POSITIONAL in kinds and not names and len(kinds) == 1) or positional:
        raise PartitionError(
            f"forward({', '.join(map(str, parameters.values()))}) takes arguments without names",
            "the batch goes by name: model(**batch)",
            f"def forward(self, {', '.join(batch)})",
        )
    unknown = [name for name in batch if name not in names]
    if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
        near = closest(unknown[0], names)
        raise PartitionError(
            f"forward has no argument {unknown[0]!r}",
            f"it takes {', '.join(names) or 'none'}",
            f"the batch's {unknown[0]!r} as {' or '.join(map(repr, near))}"
            if near
            else f"a batch without {unknown[0]!r}",
        )
    for name in names:
        if parameters[name].default is inspect.Parameter.empty and name not in batch:
            raise PartitionError(
                f"the batch lacks {name!r}, which forward needs", f"it has {', '.join(batch) or 'nothing'}"
            )


def main_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that most elements of trained parameters have, or of all parameters where none is trained; float32
    without parameters."""
    floating = [p for p in model.parameters() if p.is_floating_point()]
    elements: Counter[torch.dtype] = Counter()
    for parameter in [p for p in floating if p.requires_grad] or floating:
        elements[parameter.dtype] += parameter.numel()
    return elements.most_common(1)[0][0] if elements else torch.float32
