"""Traces that tests share: a model is traced once for each batch, mode, dtype and kind of device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import PreTrainedModel

from autopart.frontend.batch import Batch
from autopart.hardware.mesh import Mesh
from autopart.passes import source

KNOWN: dict[str, Any] = {}
"""Every trace that was made under `traced_once`."""
MODELS: list[nn.Module] = []
"""What was traced, kept alive for no other model to have the id of one."""


@contextmanager
def traced_once() -> Iterator[None]:
    """Where models do what their classes, attributes and tensors say: equal ones are one model."""
    prepare = source.prepare

    def prepared(model: nn.Module, batch: Batch, mesh: Mesh, *given: Any) -> Any:
        modes = [module.training for module in model.modules()]
        passes = source.randomness, source.fuse  # which tests replace by those for GPUs
        key = f"{_identity(model)} {modes} {batch} {mesh.device.type} {given} {passes}"
        if key not in KNOWN:
            KNOWN[key] = prepare(model, batch, mesh, *given)
            MODELS.append(model)
        return KNOWN[key]

    with mock.patch.object(source, "prepare", prepared):
        yield


def _identity(model: nn.Module) -> object:
    """What tells models apart: classes, attributes and tensors, or the config of a model of transformers. The object
    itself where an attribute is of a kind that is not known here."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first = {id(tensor): name for name, tensor in reversed(tensors)}
    forms = [(name, first[id(t)], t.shape, t.dtype, t.device, t.requires_grad) for name, t in tensors]
    if isinstance(model, PreTrainedModel):
        config = model.config
        kinds = [id(type(module)) for module in model.modules()]
        return kinds, config.to_json_string(use_diff=False), config._attn_implementation, forms
    try:
        modules = [(name, id(type(module)), _attributes(module)) for name, module in model.named_modules()]
        return modules, forms, [_values(buffer) for buffer in model.buffers()]
    except TypeError:
        return id(model)


def _values(buffer: torch.Tensor) -> object:
    """The elements of a small buffer, which may be in the trace. Raises TypeError for a large one."""
    if buffer.numel() > 2**12:
        raise TypeError("a large buffer")
    return None if buffer.is_meta else buffer.tolist()


def _attributes(module: nn.Module) -> dict[str, object]:
    """What a module has beside tensors and modules. Raises TypeError for what cannot be compared by its text."""
    inherited = vars(nn.Module())
    if any(vars(module)[name] != value for name, value in inherited.items() if "hook" in name):
        raise TypeError("hooks")
    return {name: _plain(value) for name, value in vars(module).items() if name not in inherited}


def _plain(value: object) -> object:
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return value
    if isinstance(value, FunctionType) and "<" not in value.__qualname__:
        return value.__module__, value.__qualname__
    raise TypeError(type(value).__name__)
