"""States and settings of an optimizer over a rank's shares, by the names of the whole weights."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autopart.errors import PartitionError, few

Optimizer = torch.optim.Optimizer
NOT_SETTINGS = ("params", "param_names")
"""Of a param group: what is of its parameters."""


def shares_of(group: Mapping[str, Any]) -> list[Any]:
    """The shares in a param group; an optimizer of no parameters has one that is no share."""
    return [share for share in group["params"] if hasattr(share, "origin")]


def settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a param group, such as the learning rate."""
    return {key: value for key, value in group.items() if key not in NOT_SETTINGS}


def groups_record(optimizer: Optimizer, names: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """The settings of every param group with the names of its weights on all ranks."""
    groups = zip(optimizer.param_groups, names, strict=True)
    return [{"settings": settings(group), "names": list(each)} for group, each in groups]


def of_share_shape(optimizer: Optimizer) -> Iterator[tuple[str, Any, Tensor]]:
    """The states that lie as the shares do: the state's name, the share, its value."""
    for share, key, value in _states(optimizer):
        if _lies_as(value, share, key):
            yield key, share, value


def scalars(optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """All other states, by weight and state: numbers and tensors of no dim. Raises PartitionError for another state."""
    found: dict[str, dict[str, Any]] = {}
    for share, key, value in _states(optimizer):
        if _lies_as(value, share, key):
            continue
        if isinstance(value, Tensor) and value.dim():
            raise PartitionError(
                f"the state {key} of {type(optimizer).__name__} cannot be saved",
                f"it has shape {list(value.shape)}, which is not that of {share.origin.name}, {list(share.shape)}",
                "an optimizer whose states have the shapes of the weights, such as AdamW",
            )
        kept = value.detach().cpu().clone() if isinstance(value, Tensor) else value
        found.setdefault(share.origin.name, {})[key] = kept
    return found


def _states(optimizer: Optimizer) -> Iterator[tuple[Any, str, Any]]:
    for group in optimizer.param_groups:
        for share in shares_of(group):
            for key, value in optimizer.state.get(share, {}).items():
                yield share, key, value


def _lies_as(value: Any, share: Tensor, key: str) -> bool:
    """Whether a state has an element for each of the share's; a step is a scalar of a weight of no dim too."""
    return isinstance(value, Tensor) and value.shape == share.shape and key != "step"


def restore(
    optimizer: Optimizer,
    saved: Mapping[str, Any],
    tensors: Mapping[tuple[str, str], Tensor],
    names: Sequence[Sequence[str]],
) -> None:
    """Give an optimizer what was saved.

    saved    the record's optimizer
    tensors  (state, weight) -> this rank's share
    names    the names of the weights of every param group, those of other ranks included
    """
    numbers = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    states = {name: dict(scalars) for name, scalars in saved["scalars"].items()}
    for (key, name), value in tensors.items():
        states.setdefault(name, {})[key] = value
    shares = [share for group in optimizer.param_groups for share in shares_of(group)]
    state = {numbers[id(share)]: states[share.origin.name] for share in shares if share.origin.name in states}
    groups = [
        {**settings(group), **new, "params": [numbers[id(p)] for p in group["params"]]}
        for group, new in zip(optimizer.param_groups, matched(saved["groups"], names), strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def matched(groups: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]]) -> list[Mapping[str, Any]]:
    """The saved settings of the weights of every param group; {} for a group of which nothing was saved. Raises
    PartitionError where weights of one group had different settings."""
    owner = {name: index for index, group in enumerate(groups) for name in group["names"]}
    found: list[Mapping[str, Any]] = []
    for each in names:
        of = {owner[name]: name for name in each if name in owner}
        first, *others = [groups[index]["settings"] for index in of] or [{}]
        if any(other != first for other in others):
            raise PartitionError(
                "the optimizer has other param groups than the checkpoint",
                f"{few(list(of.values()))} were in groups of different settings, and are in one",
                "an optimizer with the groups of the one that was saved",
            )
        found.append(first)
    return found
