"""Where a rank stands: its group along every mesh axis, and its share of every weight."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from autopart.errors import PartitionError
from autopart.notation import Placement
from autopart.runtime.gathered import Slicing
from autopart.runtime.random import Draws
from autopart.runtime.shards import shard
from autopart.runtime.slices import rows, slice_length

AXES = ("pp", "dp", "tp")
"""From the outermost to the innermost: ranks next to each other share a tensor-parallel group."""


class Work(Protocol):
    """A message on its way."""

    def wait(self) -> Any: ...

    def is_completed(self) -> bool: ...


@dataclass(frozen=True)
class Group:
    """Ranks that work together, and this rank's place among them; `runtime.simulated` has one without processes."""

    axis: str
    size: int
    rank: int
    handle: dist.ProcessGroup | None = None

    @property
    def scatters(self) -> bool:
        """Whether reduce-scatter and all-to-all are there for every dtype: gloo lacks them."""
        return self.handle is not None and dist.get_backend(self.handle) == "nccl"

    def all_reduce(self, x: torch.Tensor, op: str = "sum") -> None:
        """Sum (or "max") in place."""
        dist.all_reduce(x, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], group=self.handle)

    def start_all_reduce(self, x: torch.Tensor) -> Work:
        """Sum in place without waiting; `x` must live until the work is done."""
        work = dist.all_reduce(x, group=self.handle, async_op=True)
        assert work is not None
        return work

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's `x`, in order."""
        shares = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(shares, x, group=self.handle)
        return shares

    def reduce_scatter(self, shares: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's shares[rank]."""
        mine = torch.empty_like(shares[0])
        dist.reduce_scatter_tensor(_real(mine), _real(shares), group=self.handle)
        return mine

    def start_reduce_scatter(self, shares: torch.Tensor) -> tuple[torch.Tensor, Work]:
        """`reduce_scatter` without waiting: the sum is there, and `shares` is free, once the work is done."""
        mine = torch.empty_like(shares[0])
        work = dist.reduce_scatter_tensor(_real(mine), _real(shares), group=self.handle, async_op=True)
        assert work is not None
        return mine, work

    def all_to_all(self, shares: list[torch.Tensor]) -> list[torch.Tensor]:
        """From every rank, the share it has for this one."""
        mine = [torch.empty_like(share) for share in shares]
        dist.all_to_all(mine, shares, group=self.handle)
        return mine

    def broadcast(self, x: torch.Tensor, source: int) -> None:
        """The value of rank `source` of this group, in place."""
        dist.broadcast(x, group_src=source, group=self.handle)

    def send(self, x: torch.Tensor, to: int) -> Work:
        """Send without waiting; `x` must live until the work is done."""
        work = dist.isend(x, group_dst=to, group=self.handle)
        assert work is not None
        return work

    def receive(self, x: torch.Tensor, source: int) -> Work:
        """Be ready for a message, which is in `x` once the work is done."""
        work = dist.irecv(x, group_src=source, group=self.handle)
        assert work is not None
        return work

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable value, on rank 0; [] elsewhere."""
        if self.size == 1:
            return [value]
        everyone: list[Any] = [None] * self.size
        dist.gather_object(value, everyone if self.rank == 0 else None, group_dst=0, group=self.handle)
        return [] if self.rank else everyone


def _real(x: torch.Tensor) -> torch.Tensor:
    """A complex tensor as pairs of real numbers, which torch makes of it in other collectives."""
    return torch.view_as_real(x) if x.is_complex() else x


@dataclass(frozen=True)
class Groups:
    """This rank's group along every axis, its device, the groups that are no axis, and what belongs to a rank besides.

    activations, gradients   all ranks, one group for each direction of a pipeline
    host                     all ranks, for values on the CPU
    draws                    what random numbers depend on
    """

    pp: Group
    dp: Group
    tp: Group
    device: torch.device
    activations: Group
    gradients: Group
    host: Group
    draws: Draws = field(default_factory=Draws, kw_only=True)

    def along(self, axis: str) -> Group:
        """The group of an axis by its name."""
        group: Group = getattr(self, axis)
        return group

    def rank_at(self, stage: int) -> int:
        """The global rank with this rank's coordinates in another stage."""
        return (stage * self.dp.size + self.dp.rank) * self.tp.size + self.tp.rank

    @property
    def rank(self) -> int:
        """This rank among all."""
        return self.rank_at(self.pp.rank)

    def tied(self, stages: Sequence[int]) -> Group | None:
        """The ranks with this rank's coordinates in each of `stages`; None on others. Every rank must call it."""
        mine = None
        for place in range(self.dp.size * self.tp.size):
            ranks = [stage * self.dp.size * self.tp.size + place for stage in stages]
            handle = dist.new_group(ranks)
            if self.rank in ranks:
                mine = Group("tied", len(ranks), ranks.index(self.rank), handle)
        return mine

    def apart(self) -> Group:
        """The ranks along dp with a channel of their own. Every rank must call it."""
        mine = self.dp
        for pp, tp in itertools.product(range(self.pp.size), range(self.tp.size)):
            handle = dist.new_group([(pp * self.dp.size + dp) * self.tp.size + tp for dp in range(self.dp.size)])
            if (pp, tp) == (self.pp.rank, self.tp.rank):
                mine = replace(self.dp, handle=handle)
        return mine


def start_processes(size: int) -> None:
    """Join the other processes (nccl and gloo on GPUs, gloo elsewhere), as torchrun's environment says.

    Raises PartitionError where they are not `size`.
    """
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) == size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    if world != size:
        raise PartitionError(
            f"the mesh has {size} devices, and {world} of the processes it needs are there",
            "every device is driven by one process",
            f"torchrun --nproc-per-node {size} (in all), or a mesh of {world}",
        )


def make_groups(pp: int, dp: int, tp: int) -> Groups:
    """Make every group of a plan with these degrees; all ranks call it. PartitionError as `start_processes`."""
    size = pp * dp * tp
    start_processes(size)
    device = _device()
    if size == 1:
        pp_, dp_, tp_, *others = (Group(name, 1, 0) for name in (*AXES, "activations", "gradients", "host"))
        return Groups(pp_, dp_, tp_, device, *others)
    mesh = init_device_mesh(device.type, (pp, dp, tp), mesh_dim_names=AXES)
    pp_, dp_, tp_ = (Group(a, mesh[a].size(), mesh.get_local_rank(a), mesh.get_group(a)) for a in AXES)
    rank = dist.get_rank()
    activations, gradients = (
        Group(name, size, rank, dist.new_group() if pp > 1 else None) for name in ("activations", "gradients")
    )
    host = Group("host", size, rank, dist.new_group(backend="gloo"))
    return Groups(pp_, dp_, tp_, device, activations, gradients, host)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


@dataclass(frozen=True)
class Origin:
    """Where a rank's tensor comes from: its name and whole shape in the model, its placement along every axis, and
    whether it is a slice, over dp, of what lies there."""

    name: str
    whole: tuple[int, ...]
    placed: Mapping[str, Placement]
    sliced: bool = False


def weight(
    groups: Groups,
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = True,
    **placed: str,
) -> nn.Parameter:
    """This rank's share, not yet filled, of the model's parameter `name` of `shape`; `placed` says, per axis, where it
    lies: "S0" (split along dim 0), "R" or "C" (whole)."""
    origin = Origin(name, tuple(shape), {axis: Placement.parse(text) for axis, text in placed.items()})
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
    """This rank's slice over dp, flat and not yet filled, of what `weight` gives; its whole is of the dtype `used`."""
    origin = Origin(name, tuple(shape), {axis: Placement.parse(text) for axis, text in placed.items()}, sliced=True)
    local = torch.Size(_local(origin, groups))
    length = slice_length(local.numel(), groups.dp.size)
    share: Any = nn.Parameter(torch.empty(length, dtype=dtype, device=groups.device))
    share.origin, share.slicing = origin, Slicing(local, used or dtype, groups.dp)
    mine: nn.Parameter = share
    return mine


def buffer(
    groups: Groups, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32, **placed: str
) -> torch.Tensor:
    """This rank's share, not yet filled, of the model's buffer `name`; otherwise as `weight`."""
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


def load(shares: Iterable[Any], groups: Groups, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill a rank's shares of weights and buffers, as they were made, from the model's own, by name."""
    with torch.no_grad():
        for share in shares:
            whole = tensors[share.origin.name]
            for axis, placement in share.origin.placed.items():
                group = groups.along(axis)
                if placement.kind == "S":
                    whole = shard(whole, placement.dim, placement.parts, group.size, group.rank)
            if share.origin.sliced:
                whole = rows(whole, groups.dp.size)[groups.dp.rank]
            share.copy_(whole)
