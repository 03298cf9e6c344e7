"""The ranks along one mesh axis, and the collectives and messages between them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""What torch 2.13 calls these two; older versions have the second names alone, which warn there."""

_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Into one tensor; by its name from torch 2.13 on, or the one before."""


class Work(Protocol):
    """Communication that was started: `wait` returns when it has ended."""

    def wait(self) -> Any: ...

    def is_completed(self) -> bool: ...


@dataclass(frozen=True)
class Group:
    """Ranks that communicate, and this rank's place among them. `runtime.simulated` has a subclass without
    processes."""

    axis: str
    size: int
    rank: int
    handle: dist.ProcessGroup | None = None

    @property
    def over_nccl(self) -> bool:
        """Whether NCCL runs the collectives."""
        return self.handle is not None and "nccl" in dist.get_backend(self.handle)

    def all_reduce(self, x: torch.Tensor, op: str = "sum") -> None:
        """Sum (or "max") in place."""
        dist.all_reduce(x, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], group=self.handle)

    def start_all_reduce(self, x: torch.Tensor) -> Work:
        """Sum in place without waiting. `x` must live until the work has ended."""
        return _started(dist.all_reduce(x, group=self.handle, async_op=True))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's `x` (...), in the order of ranks: (ranks, ...)."""
        everyone = x.new_empty(self.size, *x.shape)
        _GATHER(everyone.view(-1), x.contiguous().view(-1), group=self.handle)
        return everyone

    def start_all_gather(self, x: torch.Tensor, everyone: torch.Tensor) -> Work:
        """Write every rank's `x`, which may be its row there, into the rows of `everyone` without waiting. Both must
        live until the work has ended."""
        rows = _real(everyone.flatten(0, 1))
        return _started(_ALL_GATHER(rows, _real(x), group=self.handle, async_op=True))

    def reduce_scatter(self, shares: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of shares[rank]."""
        return self.start_reduce_scatter(shares)()

    def start_reduce_scatter(self, shares: torch.Tensor) -> Callable[[], torch.Tensor]:
        """`reduce_scatter` without waiting: the function that is returned waits, and gives the sum.

        gloo's own takes longer than its all-reduce. Its all-to-all, with a sum on every rank, takes half as long.
        """
        if not self.over_nccl:
            everyone, work = self._start_all_to_all(shares)
            return lambda: (work.wait(), everyone.sum(0, dtype=shares.dtype))[1]
        mine = torch.empty_like(shares[0])
        work = _started(_SCATTER(_real(mine), _real(shares), group=self.handle, async_op=True))
        return lambda: (work.wait(), mine)[1]

    def all_to_all(self, shares: torch.Tensor) -> torch.Tensor:
        """From every rank, shares[rank]; (ranks, ...) to (ranks, ...)."""
        everyone, work = self._start_all_to_all(shares)
        work.wait()
        return everyone

    def _start_all_to_all(self, shares: torch.Tensor) -> tuple[torch.Tensor, Work]:
        """`all_to_all` without waiting. The result is valid, and `shares` may be freed, once the work has ended."""
        everyone = torch.empty_like(shares)
        return everyone, _started(dist.all_to_all_single(everyone, shares, group=self.handle, async_op=True))

    def broadcast(self, x: torch.Tensor, source: int) -> None:
        """The value of rank `source` of this group, in place."""
        dist.broadcast(x, group_src=source, group=self.handle)

    def send(self, x: torch.Tensor, to: int) -> Work:
        """Send without waiting. `x` must live until the work has ended."""
        return _started(dist.isend(x, group_dst=to, group=self.handle))

    def receive(self, x: torch.Tensor, source: int) -> Work:
        """Post a receive. The message is in `x` once the work has ended."""
        return _started(dist.irecv(x, group_src=source, group=self.handle))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable value, on rank 0; [] elsewhere."""
        if self.size == 1:
            return [value]
        everyone: list[Any] = [None] * self.size
        dist.gather_object(value, everyone if self.rank == 0 else None, group_dst=0, group=self.handle)
        return [] if self.rank else everyone

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's picklable value, on every rank."""
        if self.size == 1:
            return [value]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value, group=self.handle)
        return everyone


def _started(work: Work | None) -> Work:
    """What torch returns on a rank that is in the group."""
    assert work is not None
    return work


def _real(x: torch.Tensor) -> torch.Tensor:
    """A complex tensor as pairs of real numbers, which torch makes of it in other collectives."""
    return torch.view_as_real(x) if x.is_complex() else x
