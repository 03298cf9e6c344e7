"""Weights that `autopart.compile` was given besides the model: a folder's, or the model's own initialisation."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from autopart.errors import PartitionError
from autopart.frontend.initial_values import InitialValues, on_meta
from autopart.ir.graph import Traced, info, placeholders
from autopart.runtime.share_reader import Sliceable
from autopart.runtime.weight_folder import WeightFolder

INIT = "init"


@dataclass
class GivenWeights:
    """Where tensors come from.

    model    a copy of the user's model to trace: its parameters on meta, its buffers with their values
    initial  the model's own initialisation
    folder   None: parameters are initialised
    """

    model: nn.Module
    initial: InitialValues
    folder: WeightFolder | None

    def find(self, name: str) -> Sliceable:
        """A parameter, by its first name, of which a part may be taken."""
        return self.initial.find(name) if self.folder is None else self.folder.find(name)

    def loading(self, buffers: Mapping[str, torch.Tensor | None], seed: int) -> Callable[[str], Sliceable]:
        """Where every tensor comes from: a buffer that the trace has or a parameter, by its first name. Raises
        PartitionError where a tensor of the trace has no value."""
        self.initial.seed = seed
        if lacking := [name for name, value in buffers.items() if value is None]:
            raise PartitionError(
                f"{lacking[0]}, which the forward pass reads, has no value",
                "it is on the meta device and neither a parameter nor a buffer of the model",
                "a buffer (register_buffer), or the model on the CPU",
            )
        known = {name: value for name, value in buffers.items() if value is not None}
        return lambda name: known[name] if name in known else self.find(name)

    def like(self, model: nn.Module) -> nn.Module:
        """The copy, in the training modes that the user's model has now."""
        for mine, other in zip(self.model.modules(), model.modules(), strict=True):
            mine.training = other.training
        return self.model

    def unused(self, used: Container[str]) -> dict[str, torch.Tensor]:
        """All buffers, and the parameters that no stage computes with."""
        found = dict(self.model.named_buffers())
        for name, parameter in self.model.named_parameters():
            if name not in used:
                found[name] = self.find(name)[...].to(parameter.dtype).clone()
        return found


def given_weights(model: nn.Module, weights: str | PathLike[str], seed: int) -> GivenWeights:
    """The weights in a folder, or with "init" the model's own initialisation.

    Buffers have their values at once: those of the folder, else the model's own, else what initialises or makes them.
    Raises PartitionError where a folder does not fit the model, and where a buffer has no value.
    """
    copied = on_meta(model, buffers=False)
    folder = None if weights == INIT else WeightFolder(Path(weights), model)
    given = GivenWeights(copied, InitialValues(model, seed), folder)
    values: dict[int, torch.Tensor] = {}
    for name, buffer in copied.named_buffers():
        if folder is not None and name in folder:
            values[id(buffer)] = folder.find(name)[...].to(buffer.dtype).clone()
        elif buffer.is_meta:
            values[id(buffer)] = given.initial.find(name).to(buffer.dtype)
    for module in copied.modules():
        module._buffers.update({key: values[id(b)] for key, b in module._buffers.items() if id(b) in values})
    return given


def used_parameters(traced: Traced) -> set[str]:
    """The parameters that the forward pass computes with."""
    return {info(node).name for node in placeholders(traced.graph, "parameter") if node.users}


def check_has_weights(model: nn.Module) -> None:
    """Raise PartitionError for a model on meta."""
    if any(p.is_meta for p in model.parameters()):
        raise PartitionError(
            "the model is on the meta device",
            "it has shapes but no weights to train",
            'weights=folder, of safetensors; weights="init"; or the model on the CPU',
        )
