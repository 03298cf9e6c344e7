"""The place of a rank, and the collectives of tensor parallelism as autograd functions.

Hidden states are (sequence, batch, width), so that shares of the sequence are contiguous. Under sequence parallelism
what lies between two products is split along the sequence: an all-gather stands for the identity that has an
all-reduce backward (Megatron's f), a reduce-scatter for the all-reduce that has the identity backward (its g).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


@dataclass(frozen=True)
class Place:
    """A rank: stage `stage` of `pp`, share `share` of `tp`; ranks of a stage are neighbours."""

    pp: int
    tp: int
    rank: int
    sequence: bool
    tensor: Any
    """The process group of the stage."""
    ends: Any
    """The process group of this share's first and last stage."""

    @staticmethod
    def of(pp: int, tp: int, sequence: bool) -> Place:
        """This process's place; every process makes all groups."""
        rank = dist.get_rank()
        tensor = [dist.new_group(range(stage * tp, (stage + 1) * tp)) for stage in range(pp)]
        ends = [dist.new_group([share, (pp - 1) * tp + share]) if pp > 1 else None for share in range(tp)]
        return Place(pp, tp, rank, sequence and tp > 1, tensor[rank // tp], ends[rank % tp])

    @property
    def stage(self) -> int:
        """The number of the stage."""
        return self.rank // self.tp

    @property
    def share(self) -> int:
        """The number of the share of every split weight."""
        return self.rank % self.tp

    @property
    def first(self) -> bool:
        """Whether the stage has the embedding."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether the stage has the head and the loss."""
        return self.stage == self.pp - 1

    def part(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """This rank's share of a weight along a dim."""
        return tensor.chunk(self.tp, dim)[self.share].contiguous()


def gathered(x: Tensor, place: Place) -> Tensor:
    """All shares of the sequence, (s / tp, ...) to (s, ...)."""
    whole = x.new_empty((x.shape[0] * place.tp, *x.shape[1:]))
    dist.all_gather_into_tensor(whole, x.contiguous(), group=place.tensor)
    return whole


def scattered_sum(x: Tensor, place: Place, async_op: bool = False) -> tuple[Tensor, Any]:
    """This rank's share of the sequence of the sum over ranks, (s, ...) to (s / tp, ...), and what to wait for."""
    share = x.new_empty((x.shape[0] // place.tp, *x.shape[1:]))
    return share, dist.reduce_scatter_tensor(share, x.contiguous(), group=place.tensor, async_op=async_op)


class ColumnProduct(Function):
    """x W^T + b, of which each rank has some columns; x is whole or, under sequence parallelism, gathered.

    Backward sums the gradient of x over ranks while the gradient of W is computed.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None, place: Place) -> Tensor:
        """(s, b, n) or (s / tp, b, n) to (s, b, m / tp)."""
        whole = gathered(x, place) if place.sequence else x
        context.save_for_backward(whole, weight)
        context.place, context.biased = place, bias is not None
        return torch.nn.functional.linear(whole, weight, bias)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        """The gradients of x, W and b."""
        whole, weight = context.saved_tensors
        place = context.place
        of_x, waits = gradient @ weight, None
        if place.sequence:
            of_x, waits = scattered_sum(of_x, place, async_op=True)
        elif place.tp > 1:
            waits = dist.all_reduce(of_x, group=place.tensor, async_op=True)
        rows = gradient.flatten(0, -2)
        of_weight = rows.t() @ whole.flatten(0, -2)
        of_bias = rows.sum(0) if context.biased else None
        if waits is not None:
            waits.wait()
        return of_x, of_weight, of_bias, None


class SumOfShares(Function):
    """The sum over ranks of partial sums, whole or, under sequence parallelism, split along the sequence."""

    @staticmethod
    def forward(context: Any, x: Tensor, place: Place) -> Tensor:
        """(s, b, n) to (s, b, n) or (s / tp, b, n)."""
        context.place = place
        if place.sequence:
            return scattered_sum(x, place)[0]
        if place.tp == 1:
            return x.view_as(x)
        summed = x.clone()
        dist.all_reduce(summed, group=place.tensor)
        return summed

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient of every share."""
        return gathered(gradient, context.place) if context.place.sequence else gradient, None
