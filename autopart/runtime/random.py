"""Random numbers that do not know where they are drawn.

A number is a hash of the seed, the step, the stream's name and the element's place in the whole batch. So a mask is the
same split over any axes, in any stage, for any size of micro-batch, and again when a block is run again; it is never
kept, but drawn a second time for backward. The hash of an element is one round of a 32-bit mixer (C. Wellons'
lowbias32, public domain, 2018) over the place in the last dim, on top of one of the place in all others.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from autopart.runtime.groups import Groups

from autopart.runtime.shards import shard

Tensor = torch.Tensor
LOW = 0xFFFFFFFF
GOLDEN = 0x9E3779B9
Split = Any
"""The dim that an axis splits; where it has parts, (dim, sizes)."""


@dataclass
class Draws:
    """What every stream depends on; the executor keeps the step and the micro-batch."""

    seed: int = 0
    step: int = 0
    micro_batch: int = 0


@dataclass
class Stream:
    """A source of random numbers, of one place in the model."""

    groups: Groups
    name: str
    key: int = field(init=False)

    def __post_init__(self) -> None:
        self.key = zlib.crc32(self.name.encode())

    def root(self) -> int:
        """The hash of seed, step and name."""
        draws = self.groups.draws
        root = self.key
        for word in (draws.seed & LOW, draws.seed >> 32 & LOW, draws.step & LOW):
            root = int(mixed(torch.tensor(root ^ (word * GOLDEN & LOW))))
        return root


def stream(groups: Groups, name: str) -> Stream:
    """The stream of a place in the model."""
    return Stream(groups, name)


def mixed(x: Tensor) -> Tensor:
    """32 bits (in int64) mixed so that each depends on all."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & LOW
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & LOW
    return x ^ (x >> 16)


def bits(source: Stream, whole: Sequence[int], batch: int | None, axes: dict[str, Split]) -> Tensor:
    """32 random bits (in int64) for every element of this rank's share of a tensor of size `whole`, whose dim `batch`
    counts the samples of one micro-batch. `axes` says which dim each axis splits."""
    places = [_places(source, dim, whole, batch, axes) for dim in range(len(whole))]
    if not places:
        return mixed(torch.tensor(source.root(), device=source.groups.device))
    order = sorted(range(len(whole) - 1), key=lambda d: (d != batch, d))
    row = torch.zeros((), dtype=torch.int64, device=source.groups.device)
    stride = 1
    for dim in reversed(order):
        row = row + (places[dim] * stride).reshape([-1 if d == dim else 1 for d in range(len(whole) - 1)])
        stride *= whole[dim]
    row = mixed((row & LOW) ^ mixed((row >> 32) ^ source.root()))
    return mixed((row[..., None] + places[-1] * GOLDEN) & LOW)


def _places(source: Stream, dim: int, whole: Sequence[int], batch: int | None, axes: dict[str, Split]) -> Tensor:
    """Where this rank's part of a dim lies in the whole batch."""
    first = source.groups.draws.micro_batch * whole[dim] if dim == batch else 0
    places = torch.arange(first, first + whole[dim], device=source.groups.device)
    for axis, split in axes.items():
        at, parts = split if isinstance(split, (tuple, list)) else (split, ())
        if at == dim:
            group = source.groups.along(axis)
            places = shard(places, 0, parts, group.size, group.rank)
    return places


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, source: Stream, whole: Any, batch: Any, axes: Any) -> Tensor:
        draws = source.groups.draws
        ctx.again = p, source, whole, batch, axes, draws.step, draws.micro_batch
        return _masked(x, p, source, whole, batch, axes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        p, source, whole, batch, axes, step, micro_batch = ctx.again
        draws = source.groups.draws
        assert (draws.step, draws.micro_batch) == (step, micro_batch), "backward of another micro-batch"
        return _masked(gradients[0], p, source, whole, batch, axes), None, None, None, None, None


def _masked(
    x: Tensor, p: float, source: Stream, whole: Sequence[int], batch: int | None, axes: dict[str, Split]
) -> Tensor:
    kept = bits(source, whole, batch, axes) >= int(p * 2**32)
    return torch.where(kept, x * (1.0 / (1.0 - p)), 0.0)


def dropout(x: Tensor, p: float, source: Stream, whole: Sequence[int], batch: int | None, **axes: Split) -> Tensor:
    """Zero a share `p` of the elements and scale the others. `whole` is the size of `x` over all ranks, `batch` its dim
    that counts samples, `axes` the dim that each axis splits. Backward draws the mask again: none is kept."""
    dropped: Tensor = _Dropout.apply(x, p, source, list(whole), batch, axes)
    return dropped


def uniform(
    source: Stream, whole: Sequence[int], batch: int | None, dtype: torch.dtype = torch.float32, **axes: Split
) -> Tensor:
    """This rank's share of uniform numbers between 0 and 1, neither included, in 24 bits; arguments as `dropout`."""
    drawn = (bits(source, whole, batch, axes) >> 8).to(torch.float64)
    return ((drawn + 0.5) * 2.0**-24).clamp(max=1 - math.ldexp(1, -25)).to(dtype)
