"""The groups of a rank: one along every mesh axis, and those that are no axis."""

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from autopart.errors import PartitionError
from autopart.runtime.process_group import Group

AXES = ("pp", "dp", "tp")
"""From the outermost to the innermost: neighbouring ranks share a tensor-parallel group."""


@dataclass
class RngState:
    """What random numbers depend on besides the place of their element. The executor sets step and micro-batch."""

    seed: int = 0
    step: int = 0
    micro_batch: int = 0


@dataclass(frozen=True)
class AxisPlace:
    """A rank's place along one axis of the mesh.

    size   ranks along the axis: the world size of this kind of parallelism
    rank   this rank's number among them, from 0
    ranks  the global ranks along the axis that this rank communicates with, itself included, in order
    """

    size: int
    rank: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class RankMesh:
    """How many ranks a mesh has for each kind of parallelism, and this rank's place in each.

    pipeline, data, model  the axes pp, dp and tp
    rank, size             this rank among all ranks, and their number
    """

    pipeline: AxisPlace
    data: AxisPlace
    model: AxisPlace
    rank: int
    size: int

    def __str__(self) -> str:
        axes = {"pipeline": self.pipeline, "data": self.data, "model": self.model}
        places = ", ".join(f"{name} {axis.rank} of {axis.size}" for name, axis in axes.items())
        return f"rank {self.rank} of {self.size}: {places}"


@dataclass(frozen=True)
class Groups:
    """This rank's group along every axis, its device, and the groups that are no axis.

    shard        the neighbouring ranks of dp that ZeRO divides among: all of dp, or one of several equal parts of it
    replicas     the ranks of dp with this rank's place in each of these parts, which have the same slices
    activations  all ranks: messages of activations between stages
    gradients    all ranks: messages of gradients between stages
    host         all ranks: values on the CPU
    rng          the seed, step and micro-batch that random numbers depend on
    returned     shards of the outputs of an evaluation: see `runtime.outputs`
    """

    pp: Group
    dp: Group
    tp: Group
    device: torch.device
    activations: Group
    gradients: Group
    host: Group
    shard: Group = field(kw_only=True)
    replicas: Group = field(kw_only=True)
    rng: RngState = field(default_factory=RngState, kw_only=True)
    returned: list[object] = field(default_factory=list, kw_only=True)

    def along(self, axis: str) -> Group:
        """The group of an axis by its name."""
        group: Group = getattr(self, axis)
        return group

    def holders(self, sliced: bool, axis: str) -> Group:
        """The ranks along an axis that hold the same of a tensor which the axis does not split; `sliced`: which lies in
        slices over `shard`."""
        return self.replicas if sliced and axis == "dp" else self.along(axis)

    def size_over(self, axes: Iterable[str]) -> int:
        """Number of ranks over some axes together."""
        return math.prod(self.along(axis).size for axis in axes)

    def rank_at(self, stage: int) -> int:
        """The global rank with this rank's coordinates in another stage."""
        return (stage * self.dp.size + self.dp.rank) * self.tp.size + self.tp.rank

    @property
    def rank(self) -> int:
        """This rank among all."""
        return self.rank_at(self.pp.rank)

    def mesh(self) -> RankMesh:
        """The sizes of all axes and this rank's place in each."""
        strides = {"tp": 1, "dp": self.tp.size, "pp": self.dp.size * self.tp.size}

        def place(axis: str) -> AxisPlace:
            group, stride = self.along(axis), strides[axis]
            first = self.rank - group.rank * stride
            return AxisPlace(group.size, group.rank, tuple(first + i * stride for i in range(group.size)))

        return RankMesh(place("pp"), place("dp"), place("tp"), self.rank, self.size_over(AXES))

    def tied(self, stages: Sequence[int]) -> Group | None:
        """The ranks with this rank's coordinates in each of `stages`; None on other stages. Every rank must call it."""
        mine = None
        for place in range(self.dp.size * self.tp.size):
            ranks = [stage * self.dp.size * self.tp.size + place for stage in stages]
            handle = dist.new_group(ranks)
            if self.rank in ranks:
                mine = Group("tied", len(ranks), ranks.index(self.rank), handle)
        return mine

    def apart(self) -> Group:
        """The group `shard`, on a communicator of its own. Every rank must call it."""
        parts = shard_parts(self.dp.size, self.shard.size)
        return parts_of_dp(self.shard.axis, (self.pp.size, self.dp.size, self.tp.size), self.rank, parts)


def shard_parts(dp: int, shard_size: int) -> list[range]:
    """The parts of dp that ZeRO divides among, by their ranks along dp: neighbours."""
    return [range(first, first + shard_size) for first in range(0, dp, shard_size)]


def replica_parts(dp: int, shard_size: int) -> list[range]:
    """The ranks along dp that have the same place in each of `shard_parts`."""
    return [range(place, dp, shard_size) for place in range(shard_size)]


def parts_of_dp(name: str, degrees: tuple[int, int, int], rank: int, parts: Sequence[range]) -> Group:
    """The group of a rank among those that parts of dp make. Every rank must call it, all with the same parts.

    degrees  (pp, dp, tp)
    parts    ranks along dp; each rank is in one part
    """
    pp, dp, tp = degrees
    found = []
    for stage, place, part in itertools.product(range(pp), range(tp), parts):
        ranks = [(stage * dp + at) * tp + place for at in part]
        handle = dist.new_group(ranks)
        if rank in ranks:
            found.append(Group(name, len(ranks), ranks.index(rank), handle))
    (mine,) = found
    return mine


def start_processes(size: int) -> None:
    """Join the other processes (nccl and gloo on GPUs, gloo elsewhere), as torchrun's environment says.

    Raises PartitionError where there are not `size` processes.
    """
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) == size > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store = _store_of_restart(os.environ)
        rank, world_size = (int(os.environ["RANK"]), size) if store else (-1, -1)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    if world != size:
        raise PartitionError(
            f"the mesh has {size} devices, and {world} of the processes it needs are there",
            "every device is driven by one process",
            f"torchrun --nproc-per-node {size} (in all), or a mesh of {world}",
        )


def _store_of_restart(environment: Mapping[str, str]) -> dist.Store | None:
    """Where restarted processes of one host meet; None: where torch says.

    torchrun's agent keeps one store for all restarts, in which torch would find the addresses of ranks that are gone
    (pytorch/pytorch#135712). Agents of several hosts do not count restarts alike: they are told to let rank 0 host a
    new store each time, by TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    """
    restarts = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    one_host = environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE")
    if restarts == "0" or not one_host or environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(f"restart {restarts}", store)


def make_groups(pp: int, dp: int, tp: int, shard_size: int = 0) -> Groups:
    """Make every group of a plan with these degrees; `shard_size` is that of the plan. All ranks must call it. Raises
    PartitionError as `start_processes`."""
    size = pp * dp * tp
    start_processes(size)
    device = _device()
    if size == 1:
        pp_, dp_, tp_, *others = (Group(name, 1, 0) for name in (*AXES, "activations", "gradients", "host"))
        return Groups(pp_, dp_, tp_, device, *others, shard=dp_, replicas=Group("replicas", 1, 0))
    mesh = init_device_mesh(device.type, (pp, dp, tp), mesh_dim_names=AXES)
    pp_, dp_, tp_ = (Group(a, mesh[a].size(), mesh.get_local_rank(a), mesh.get_group(a)) for a in AXES)
    rank = dist.get_rank()
    activations, gradients = (
        Group(name, size, rank, dist.new_group() if pp > 1 else None) for name in ("activations", "gradients")
    )
    host = Group("host", size, rank, dist.new_group(backend="gloo"))
    shard, replicas = dp_, Group("replicas", 1, 0)
    if shard_size not in (0, dp):
        shard, replicas = (
            parts_of_dp(name, (pp, dp, tp), rank, parts(dp, shard_size))
            for name, parts in (("shard", shard_parts), ("replicas", replica_parts))
        )
    return Groups(pp_, dp_, tp_, device, activations, gradients, host, shard=shard, replicas=replicas)


def tied_groups(tied: Mapping[str, tuple[int, ...]], groups: Groups) -> dict[str, Group]:
    """Parameter of this rank -> the group of the ranks that hold the same parameter on other stages."""
    made = {stages: groups.tied(stages) for stages in sorted(set(tied.values()))}
    return {name: group for name, stages in tied.items() if (group := made[stages]) is not None}


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank = int(os.environ.get("RANK", 0))  # without torchrun's LOCAL_RANK, ranks fill hosts one after the other
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank % torch.cuda.device_count())))
    torch.cuda.set_device(device)
    return device
