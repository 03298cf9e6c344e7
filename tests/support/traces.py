"""Traces that tests share: a model is traced once for each batch, mode, dtype and kind of device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import nn
from transformers import PreTrainedModel

from autopart.frontend.batch import Batch
from autopart.hardware.mesh import Mesh
from autopart.passes import source


@contextmanager
def traced_once() -> Iterator[None]:
    """Where no model is changed between two traces of it. Models of transformers with equal configs are one model."""
    known: dict[str, Any] = {}
    models: list[nn.Module] = []  # alive, for no other model to have the id of one
    prepare = source.prepare

    def prepared(model: nn.Module, batch: Batch, mesh: Mesh, *given: Any) -> Any:
        key = f"{_identity(model)} {model.training} {batch} {mesh.device.type} {given}"
        if key not in known:
            known[key] = prepare(model, batch, mesh, *given)
            models.append(model)
        return known[key]

    with mock.patch.object(source, "prepare", prepared):
        yield


def _identity(model: nn.Module) -> object:
    """What tells models apart."""
    if not isinstance(model, PreTrainedModel):
        return id(model)
    tensors = {n: (t.dtype, t.device.type, t.requires_grad) for n, t in model.state_dict(keep_vars=True).items()}
    return type(model), model.config.to_json_string(use_diff=False), model.config._attn_implementation, tensors
