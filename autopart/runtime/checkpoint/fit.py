"""Whether a checkpoint is of the model and the optimizer that are to be loaded."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from autopart.errors import PartitionError, few
from autopart.runtime.checkpoint.contents import OPTIMIZER
from autopart.runtime.checkpoint.optimizer_states import matched
from autopart.runtime.checkpoint.record import Record

Shapes = Mapping[str, Sequence[int]]


def check_model(saved: Shapes, here: Shapes) -> None:
    """Raise PartitionError, naming the first differences, where names or shapes of parameters differ."""
    differences = [
        f"{name} {_told(saved.get(name))} in the checkpoint and {_told(here.get(name))} in the model"
        for name in dict.fromkeys((*here, *saved))
        if name not in saved or name not in here or list(saved[name]) != list(here[name])
    ]
    if differences:
        raise PartitionError("the checkpoint is of another model", few(differences, joint="; "), "the model it is of")


def check_tensors(saved: Shapes, here: Shapes) -> None:
    """Raise PartitionError where the checkpoint lacks tensors that this rank needs."""
    check_model({name: shape for name, shape in saved.items() if name in here}, here)


def _told(shape: Sequence[int] | None) -> str:
    return "does not exist" if shape is None else f"has shape {list(shape)}"


def has_states(record: Record, stored: Mapping[str, Any]) -> bool:
    """Whether there are states of an optimizer in a checkpoint."""
    return bool(record["optimizer"]["scalars"]) or any(name.startswith(f"{OPTIMIZER}/") for name in stored)


def takes_optimizer(
    record: Record,
    stored: Mapping[str, Any],
    optimizer: torch.optim.Optimizer | None,
    names: Sequence[Sequence[str]],
) -> bool:
    """Whether the optimizer takes what was saved of one. Raises PartitionError where another optimizer has states in
    the checkpoint, and where the optimizer has other param groups.

    names  of the weights of every param group, on all ranks
    """
    if optimizer is None or record["optimizer"] is None:
        return False
    saved, here = record["optimizer"]["class"], type(optimizer).__qualname__
    if saved != here:
        if has_states(record, stored):
            raise PartitionError(
                f"the checkpoint has states of {saved}, and the optimizer is {here}",
                "states of one optimizer mean nothing to another",
                f"compiled.optimizer with {saved}, or compiled.load before compiled.optimizer to start without states",
            )
        return False
    matched(record["optimizer"]["groups"], names)
    return True


def check_scheduler(record: Record, scheduler: Any) -> None:
    """Raise PartitionError where a scheduler was given and none of its class was saved."""
    saved, here = (record["scheduler"] or {}).get("class"), type(scheduler).__qualname__
    if scheduler is not None and saved != here:
        raise PartitionError(
            f"the checkpoint has {'no scheduler' if saved is None else f'a {saved}'}, and a {here} is to be loaded",
            try_="the scheduler that was saved, or load without scheduler=",
        )


def not_loaded(record: Record, optimizer: torch.optim.Optimizer | None, scheduler: Any) -> list[str]:
    """Sentences on what is in a checkpoint and nobody asked for."""
    told = []
    if record["optimizer"] is not None and optimizer is None:
        told.append("the optimizer's states were not loaded; call compiled.optimizer first, then compiled.load")
    if record["scheduler"] is not None and scheduler is None:
        told.append("the scheduler's state was not loaded; compiled.load(folder, scheduler=scheduler) does so")
    return told
