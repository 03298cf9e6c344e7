"""All ranks of a mesh as threads of one process.

They run the same programs, with collectives that exchange values in memory. This checks a plan where its devices are
not there; it is slow.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from autopart.runtime.groups import Groups
from autopart.runtime.process_group import Group

T = TypeVar("T")
PATIENCE = 120.0
"""Seconds after which a rank that waits for another gives up."""


class World:
    """Where the threads of one simulation exchange values."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.meetings: dict[tuple[Any, ...], _Meeting] = {}
        self.mail: dict[tuple[Any, ...], queue.Queue[Tensor | None]] = defaultdict(queue.Queue)
        self.failed = False

    def meeting(self, key: tuple[Any, ...], size: int) -> _Meeting:
        with self.lock:
            if self.failed:
                raise threading.BrokenBarrierError
            return self.meetings.setdefault(key, _Meeting(threading.Barrier(size), [None] * size))

    def box(self, key: tuple[Any, ...]) -> queue.Queue[Tensor | None]:
        with self.lock:
            if self.failed:
                raise threading.BrokenBarrierError
            return self.mail[key]

    def abort(self) -> None:
        """Wake every rank that waits."""
        with self.lock:
            self.failed = True
            for meeting in self.meetings.values():
                meeting.barrier.abort()
            for box in self.mail.values():
                box.put(None)


@dataclass
class _Meeting:
    barrier: threading.Barrier
    brought: list[Any]

    def exchange(self, rank: int, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        self.brought[rank] = value
        self.barrier.wait(PATIENCE)
        everyone = list(self.brought)
        self.barrier.wait(PATIENCE)
        self.brought[rank] = None
        return everyone


class _Sent:
    def wait(self) -> None:
        """Returns at once: ranks that exchange values in memory have exchanged them."""

    def is_completed(self) -> bool:
        return True


@dataclass(frozen=True)
class _Received:
    world: World
    key: tuple[Any, ...]
    into: Tensor

    def wait(self) -> None:
        message = self.world.box(self.key).get(timeout=PATIENCE)
        if message is None or self.world.failed:
            raise threading.BrokenBarrierError
        self.into.copy_(message)

    def is_completed(self) -> bool:
        return False


@dataclass(frozen=True)
class SimulatedGroup(Group):
    """A group whose ranks are threads; `key` tells it from other groups of its world."""

    world: World = field(default_factory=World)
    key: tuple[Any, ...] = ()

    def _exchange(self, value: T) -> list[T]:
        return self.world.meeting(self.key, self.size).exchange(self.rank, value)

    def all_reduce(self, x: Tensor, op: str = "sum") -> None:
        everyone = torch.stack(self._exchange(x.detach().clone()))
        x.detach().copy_(everyone.sum(0) if op == "sum" else everyone.amax(0))

    def start_all_reduce(self, x: Tensor) -> _Sent:
        self.all_reduce(x)
        return _Sent()

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x.detach().clone()))

    def start_all_gather(self, x: Tensor, everyone: Tensor) -> _Sent:
        for row, share in zip(everyone, self._exchange(x.detach().clone()), strict=True):
            row.copy_(share)
        return _Sent()

    def reduce_scatter(self, shares: Tensor) -> Tensor:
        return torch.stack([each[self.rank] for each in self._exchange(shares.detach().clone())]).sum(0)

    def start_reduce_scatter(self, shares: Tensor) -> Callable[[], Tensor]:
        mine = self.reduce_scatter(shares)
        return lambda: mine

    def all_to_all(self, shares: Tensor) -> Tensor:
        return torch.stack([each[self.rank] for each in self._exchange(shares.detach().clone())])

    def broadcast(self, x: Tensor, source: int) -> None:
        x.copy_(self._exchange(x.clone())[source])

    def send(self, x: Tensor, to: int) -> _Sent:
        self.world.box((*self.key, self.rank, to)).put(x.detach().clone())
        return _Sent()

    def receive(self, x: Tensor, source: int) -> _Received:
        return _Received(self.world, (*self.key, source, self.rank), x)

    def gather(self, value: Any) -> list[Any]:
        everyone = self._exchange(copy.deepcopy(value))  # its sender may change what it has sent, as between processes
        return [] if self.rank else everyone


@dataclass(frozen=True)
class SimulatedGroups(Groups):
    """A simulated rank's groups."""

    world: World = field(default_factory=World)

    def tied(self, stages: Sequence[int]) -> Group | None:
        if self.pp.rank not in stages:
            return None
        key = ("tied", *stages, self.dp.rank, self.tp.rank)
        return SimulatedGroup("tied", len(stages), list(stages).index(self.pp.rank), None, self.world, key)

    def apart(self) -> Group:
        return self.shard


def simulated_groups(world: World, pp: int, dp: int, tp: int, rank: int, shard_size: int = 0) -> SimulatedGroups:
    """`make_groups` for one simulated rank."""
    place = {"pp": rank // (dp * tp), "dp": rank // tp % dp, "tp": rank % tp}

    def along(axis: str, size: int) -> Group:
        others = tuple(at for name, at in place.items() if name != axis)
        return SimulatedGroup(axis, size, place[axis], None, world, (axis, *others))

    def everyone(name: str) -> Group:
        return SimulatedGroup(name, pp * dp * tp, rank, None, world, (name,))

    def part(name: str, size: int, at: int, number: int) -> Group:
        return SimulatedGroup(name, size, at, None, world, (name, place["pp"], place["tp"], number))

    axes = (along("pp", pp), along("dp", dp), along("tp", tp))
    channels = (everyone("activations"), everyone("gradients"), everyone("host"))
    divided = shard_size or dp
    replica, at = divmod(place["dp"], divided)
    shard = axes[1] if divided == dp else part("shard", divided, at, replica)
    replicas = part("replicas", dp // divided, replica, at)
    return SimulatedGroups(*axes, torch.device("cpu"), *channels, world, shard=shard, replicas=replicas)


def run_simulated(pp: int, dp: int, tp: int, run: Callable[[Groups], T], shard_size: int = 0) -> list[T]:
    """Call `run` for every rank in a thread; the results in the order of ranks. The first failure ends all and is
    raised."""
    world = World()

    def one(rank: int) -> T:
        try:
            return run(simulated_groups(world, pp, dp, tp, rank, shard_size))
        except BaseException:
            world.abort()
            raise

    size = pp * dp * tp
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(one, rank) for rank in range(size)]
    errors = [e for f in futures if (e := f.exception()) is not None]
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return [f.result() for f in futures]
