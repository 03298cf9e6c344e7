"""Changes of placement along one axis: each a collective forward and its conjugate backward.

The names say what happens forward; `autopart.sharding.resharding` lists both directions. `group` is one of the fields
of `autopart.runtime.Groups`, `dim` a tensor dim, `parts` the sizes of the segments that are split each on its own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autopart.runtime.gathered import DeferredGather
from autopart.runtime.process_group import Group
from autopart.runtime.shards import shard, unshard

Parts = Sequence[int]


def _sum(x: Tensor, group: Group) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    group.all_reduce(total)
    return total


def _gather(x: Tensor, group: Group, dim: int, parts: Parts = ()) -> Tensor:
    everyone = group.all_gather(x)
    return everyone.flatten(0, 1) if dim == 0 and not parts else unshard(list(everyone), dim, parts)


def _slice(x: Tensor, group: Group, dim: int, parts: Parts = ()) -> Tensor:
    return shard(x, dim, parts, group.size, group.rank)


def _sum_slice(x: Tensor, group: Group, dim: int, parts: Parts = ()) -> Tensor:
    return group.reduce_scatter(torch.stack([shard(x, dim, parts, group.size, r) for r in range(group.size)]))


def _all_to_all(x: Tensor, group: Group, have: int, want: int) -> Tensor:
    """All-to-all: from split along `have` to split along `want`."""
    return torch.cat(list(group.all_to_all(torch.stack(x.chunk(group.size, want)))), have)


def _same(x: Tensor, group: Group) -> Tensor:
    return x.view_as(x)


def _share(x: Tensor, group: Group) -> Tensor:
    return x / group.size


Move = Callable[..., Tensor]


class _Move(torch.autograd.Function):
    """One function forward, another backward, with the same arguments."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Move, backward: Move, group: Group, args: tuple[Any, ...]) -> Tensor:
        ctx.backward_of = backward, group, args
        return forward(x, group, *args)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        backward, group, args = ctx.backward_of
        return backward(gradients[0], group, *args), None, None, None, None


def _move(x: Tensor, forward: Move, backward: Move, group: Group, *args: Any) -> Tensor:
    moved: Tensor = _Move.apply(x, forward, backward, group, args)
    return moved


def copy_to(x: Tensor, group: Group) -> Tensor:
    """Into a region where ranks do different work: backward sums their gradients."""
    return _move(x, _same, _sum, group)


def reduce_from(x: Tensor, group: Group) -> Tensor:
    """Sum the ranks' partial sums."""
    return _move(x, _sum, _same, group)


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Sum the ranks' partial sums, and their gradients backward."""
    return _move(x, _sum, _sum, group)


def share_gradient(x: Tensor, group: Group) -> Tensor:
    """Out of a region of partial gradients: backward gives each rank an equal part."""
    return _move(x, _same, _share, group)


def scatter_to(x: Tensor, group: Group, dim: int, parts: Parts = ()) -> Tensor:
    """Keep this rank's share; backward gathers the gradients."""
    return _move(x, _slice, _gather, group, dim, parts)


def slice_of(x: Tensor, group: Group, dim: int, parts: Parts = ()) -> Tensor:
    """Keep this rank's share; backward leaves zeros for the others', as a partial sum."""
    return _slice(x, group, dim, parts)


def gather_from(x: Tensor, group: Group, dim: int, parts: Parts = ()) -> Tensor:
    """All-gather the ranks' parts; backward keeps this rank's part of the gradient, which is whole on every rank."""
    return _move(x, _gather, _slice, group, dim, parts)


def all_gather(x: Tensor, group: Group, dim: int, parts: Parts = ()) -> Tensor:
    """All-gather the ranks' parts for different work on each rank; backward reduce-scatters the partial gradients."""
    return _move(x, _gather, _sum_slice, group, dim, parts)


class _AllGatherAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int, parts: Parts) -> Tensor:
        ctx.back = group, dim, parts
        share = x.detach()
        (whole,) = DeferredGather(1, lambda _: [_gather(share, group, dim, parts)]).forward()
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _sum_slice(gradients[0], *ctx.back), None, None, None


def all_gather_again(x: Tensor, group: Group, dim: int, parts: Parts = ()) -> Tensor:
    """`all_gather` whose result is not saved: backward runs the all-gather again, and `x` alone is saved."""
    whole: Tensor = _AllGatherAgain.apply(x, group, dim, parts)
    return whole


def reduce_scatter_to(x: Tensor, group: Group, dim: int, parts: Parts = ()) -> Tensor:
    """Reduce-scatter the ranks' partial sums, so that each rank has its part of the sum; backward all-gathers."""
    return _move(x, _sum_slice, _gather, group, dim, parts)


def all_to_all(x: Tensor, group: Group, have: int, want: int) -> Tensor:
    """All-to-all: from split along dim `have` to split along dim `want`; backward runs it the other way."""
    return _move(x, _all_to_all, lambda gradient, *_: _all_to_all(gradient, group, want, have), group, have, want)
