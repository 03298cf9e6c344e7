"""This rank's share of every weight and buffer: how it is made, and how it is filled."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autopart.errors import PartitionError
from autopart.runtime.flat_slices import as_slices, slice_length
from autopart.runtime.gathered import Slicing
from autopart.runtime.groups import Groups
from autopart.runtime.shards import shard
from autopart.sharding.notation import Placement


@dataclass(frozen=True)
class Origin:
    """Where a rank's tensor comes from: the model's name and whole shape, the placement along every axis, and whether
    the tensor is a slice over `Groups.shard` of what lies there.
    """

    name: str
    whole: tuple[int, ...]
    placed: Mapping[str, Placement]
    sliced: bool = False


_SHARED: ContextVar[Mapping[str, Any]] = ContextVar("shares of another stage", default={})  # noqa: B039


@contextmanager
def shared_with(stage: nn.Module) -> Iterator[None]:
    """A stage that is made in this context has the weights of another."""
    token = _SHARED.set({share.origin.name: share for _, share in _weights(stage)})
    try:
        yield
    finally:
        _SHARED.reset(token)


def _weights(stage: nn.Module) -> Iterable[tuple[str, Any]]:
    return stage.named_parameters()


def _shared(origin: Origin) -> Any:
    """The share of a context's other stage; None outside of one, and for buffers of other names."""
    share = _SHARED.get().get(origin.name)
    if share is not None and share.origin != origin:
        raise PartitionError(
            f"{origin.name} lies otherwise in this program", f"as {origin.placed}, not {share.origin.placed}"
        )
    return share


def weight(
    groups: Groups,
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = True,
    **placed: str,
) -> nn.Parameter:
    """This rank's share, uninitialised, of the model's parameter `name` of `shape`.

    placed  axis -> "S0" (split along dim 0), "R" or "C" (whole)
    """
    origin = Origin(name, tuple(shape), {axis: Placement.parse(text) for axis, text in placed.items()})
    if (known := _shared(origin)) is not None:
        return known
    share = nn.Parameter(torch.empty(_local(origin, groups), dtype=dtype, device=groups.device), requires_grad)
    share.origin = origin  # type: ignore[attr-defined]
    return share


def weight_slice(
    groups: Groups,
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    used: torch.dtype | None = None,
    **placed: str,
) -> nn.Parameter:
    """This rank's flat slice over `Groups.shard`, uninitialised, of what `weight` returns. The gathered weight has the
    dtype `used`."""
    origin = Origin(name, tuple(shape), {axis: Placement.parse(text) for axis, text in placed.items()}, sliced=True)
    if (known := _shared(origin)) is not None:
        return known
    local = torch.Size(_local(origin, groups))
    length = slice_length(local.numel(), groups.shard.size)
    share: Any = nn.Parameter(torch.empty(length, dtype=dtype, device=groups.device))
    share.origin, share.slicing = origin, Slicing(local, used or dtype, groups.shard)
    mine: nn.Parameter = share
    return mine


def buffer(
    groups: Groups, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32, **placed: str
) -> torch.Tensor:
    """This rank's share, uninitialised, of the model's buffer `name`. Arguments as `weight`."""
    origin = Origin(name, tuple(shape), {axis: Placement.parse(text) for axis, text in placed.items()})
    share = nn.Buffer(torch.empty(_local(origin, groups), dtype=dtype, device=groups.device))
    share.origin = origin  # type: ignore[attr-defined]
    return share


def _local(origin: Origin, groups: Groups) -> list[int]:
    local = list(origin.whole)
    for axis, placement in origin.placed.items():
        if placement.kind == "S":
            local[placement.dim] //= groups.along(axis).size
    return local


def origins(stage: nn.Module) -> dict[str, Origin]:
    """Every weight and buffer of a stage, by its path there -> where it comes from. Of a new stage: a buffer that has
    been updated has forgotten."""
    shares: list[tuple[str, Any]] = [*stage.named_parameters(), *stage.named_buffers()]
    return {path: share.origin for path, share in shares}


def fill(shares: Iterable[Any], groups: Groups, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill a rank's shares of weights and buffers from the model's own, which are whole, by name."""
    with torch.no_grad():
        for share in shares:
            share.copy_(share_of(tensors[share.origin.name], share.origin, groups))


def share_of(whole: torch.Tensor, origin: Origin, groups: Groups) -> torch.Tensor:
    """This rank's share of a whole tensor, a view where it can be one."""
    for axis, placement in origin.placed.items():
        group = groups.along(axis)
        if placement.kind == "S":
            whole = shard(whole, placement.dim, placement.parts, group.size, group.rank)
    return as_slices(whole, groups.shard.size)[groups.shard.rank] if origin.sliced else whole


def tensors_of(model: nn.Module, constants: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """A model's own weights, buffers and constants of the trace, by name; without those that have no value."""
    known = {name: value for name, value in constants.items() if value is not None}
    return {**known, **dict(model.named_parameters())}
