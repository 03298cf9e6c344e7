"""A model that returns no loss, with a loss of its outputs and the batch."""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from autopart.errors import PartitionError

Loss = Callable[[Any, Mapping[str, Any]], torch.Tensor]
"""Outputs of the model, and the batch -> the mean loss over the batch's samples, a scalar."""


def with_loss(model: nn.Module, loss: Loss | None) -> nn.Module:
    """The model with a forward that returns `loss(model(**inputs), batch)`; the model itself where `loss` is None.

    The inputs are what the model's forward has names for; other keys of the batch, such as targets, are for the loss
    alone. The modules, their names and their parameters are the model's own, shared.
    """
    if loss is None:
        return model
    if not callable(loss):
        raise PartitionError(f"loss={loss!r} is no function", try_="loss=lambda outputs, batch: ...")
    return _wrapped(model, loss, outputs_too=False)


def with_outputs(model: nn.Module) -> nn.Module:
    """A model that `with_loss` made, with a forward that returns the outputs of the user's model beside the loss;
    another model as it is."""
    returning_outputs = getattr(type(model), "_with_outputs", None)
    return model if returning_outputs is None else returning_outputs()


def _wrapped(model: nn.Module, loss: Loss, outputs_too: bool) -> nn.Module:
    kind = type(model)
    parameters = inspect.signature(model.forward).parameters.values()
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}

    def forward(self: nn.Module, **batch: Any) -> Any:
        outputs = kind.forward(self, **{name: value for name, value in batch.items() if name in names})
        value = loss(outputs, batch)
        return {**_named(outputs), "loss": value} if outputs_too else value

    def training(self: nn.Module) -> bool:
        return model.training

    def train(self: nn.Module, mode: bool) -> None:
        model.training = mode

    made = copy.copy(model)
    returning_outputs = staticmethod(lambda: _wrapped(model, loss, outputs_too=True))
    body = {"forward": forward, "training": property(training, train), "_with_outputs": returning_outputs}
    made.__class__ = type(kind.__name__, (kind,), body)
    return made


def _named(outputs: Any) -> Mapping[str, Any]:
    """Outputs by name: of a tuple by their numbers, one alone as "output"."""
    if isinstance(outputs, Mapping):
        return outputs
    if isinstance(outputs, (tuple, list)):
        return {str(number): value for number, value in enumerate(outputs)}
    return {"output": outputs}
