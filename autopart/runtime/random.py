"""Random numbers that depend on the element's place in the whole batch, not on the rank that draws them.

A number is a hash of the seed, the step, the stream's name and the element's place in the whole batch. A mask is
therefore the same under any sharding, in any stage, for any micro-batch size, and when a block is recomputed. No mask
is saved: backward draws it again.

The hash of an element is one round of a 32-bit mixer (C. Wellons' lowbias32, public domain, 2018) over its place in the
last dim plus one round over its place in all other dims. Words are int32 tensors, whose products wrap around as those
of unsigned integers do.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autopart.kernels import dropout as kernel
from autopart.kernels.attention import attention
from autopart.kernels.dropout import SIGN, by_blocks, mixed
from autopart.kernels.residual_dropout import residual_dropout as residual_kernel
from autopart.kernels.residual_dropout import stochastic_depth as depth_kernel
from autopart.runtime.groups import Groups
from autopart.runtime.shards import shard

GOLDEN = 0x9E3779B9
Split = Any
"""The dim that an axis splits; for a dim in parts, (dim, sizes)."""


@dataclass
class Stream:
    """A source of random numbers: one place in the model that draws."""

    groups: Groups
    name: str

    def root(self) -> tuple[int, int]:
        """Two words that depend on seed, step and name."""
        rng = self.groups.rng
        text = f"{rng.seed} {rng.step} {self.name}"
        return struct.unpack("<2i", hashlib.blake2b(text.encode(), digest_size=8).digest())


def stream(groups: Groups, name: str) -> Stream:
    """The stream of a place in the model."""
    return Stream(groups, name)


def _words(source: Stream, whole: Sequence[int], batch: int | None, axes: dict[str, Split]) -> Tensor:
    """32 random bits (in int32) for every element of this rank's share of a tensor.

    whole  the tensor's size over all ranks
    batch  the dim that counts the samples of one micro-batch
    axes   the dim that each axis splits
    """
    rows, columns = _hashes(source, whole, batch, axes)
    drawn = mixed(rows[..., None] + columns)
    return drawn if whole else drawn[0]


def _hashes(source: Stream, whole: Sequence[int], batch: int | None, axes: dict[str, Split]) -> tuple[Tensor, Tensor]:
    """A word for every place in all dims but the last, and one for every place in the last. An element's hash mixes
    their sum."""
    *leading, last = (_places(source, dim, size, batch, axes) for dim, size in enumerate(whole or [1]))
    row = torch.zeros([len(p) for p in leading], dtype=torch.int64, device=source.groups.device)
    stride = 1
    for dim in sorted(range(len(leading)), key=lambda d: (d == batch, -d)):
        row += (leading[dim] * stride).reshape([-1 if d == dim else 1 for d in range(len(leading))])
        stride *= whole[dim]
    one, other = source.root()
    high = (row >> 32).mul_(GOLDEN).to(torch.int32)
    return mixed(mixed(row.to(torch.int32) ^ one).add_(high).add_(other)), last.mul_(GOLDEN).to(torch.int32)


def _places(source: Stream, dim: int, size: int, batch: int | None, axes: dict[str, Split]) -> Tensor:
    """The places of this rank's part of a dim in the whole batch."""
    first = source.groups.rng.micro_batch * size if dim == batch else 0
    places = torch.arange(first, first + size, device=source.groups.device)
    for axis, split in axes.items():
        at, parts = split if isinstance(split, (tuple, list)) else (split, ())
        if at == dim:
            group = source.groups.along(axis)
            places = shard(places, 0, parts, group.size, group.rank)
    return places


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, source: Stream, whole: Any, batch: Any, axes: Any) -> Tensor:
        rng = source.groups.rng
        ctx.again = p, source, whole, batch, axes, rng.step, rng.micro_batch
        return _masked(x, p, source, whole, batch, axes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        p, source, whole, batch, axes, step, micro_batch = ctx.again
        rng = source.groups.rng
        assert (rng.step, rng.micro_batch) == (step, micro_batch), "backward of another micro-batch"
        return _masked(gradients[0], p, source, whole, batch, axes), None, None, None, None, None


def _masked(
    x: Tensor, p: float, source: Stream, whole: Sequence[int], batch: int | None, axes: dict[str, Split]
) -> Tensor:
    if p >= 1.0:
        return torch.zeros_like(x)
    rows, columns = _hashes(source, whole, batch, axes)
    flat, threshold, scale = x.reshape(rows.numel(), len(columns)).contiguous(), int(p * 2**32) - SIGN, 1.0 / (1.0 - p)
    masked = kernel.masked if kernel.applies(flat) else by_blocks
    result = masked(flat, rows.flatten(), columns, threshold, scale).view(x.shape)
    return result if x.is_contiguous() else torch.empty_like(x).copy_(result)


def dropout(x: Tensor, p: float, source: Stream, whole: Sequence[int], batch: int | None, **axes: Split) -> Tensor:
    """Zero a share `p` of the elements of `x` and scale the others by 1 / (1 - p). Backward draws the mask again.

    whole  the size of `x` over all ranks
    batch  the dim of `x` that counts samples
    axes   the dim that each axis splits
    """
    dropped: Tensor = _Dropout.apply(x, p, source, list(whole), batch, axes)
    return dropped


def residual_dropout(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    p: float,
    source: Stream,
    whole: Sequence[int],
    batch: int | None,
    **axes: Split,
) -> Tensor:
    """residual + dropout(x + bias), with the mask of `dropout`. Arguments as `dropout`."""
    hashes = dropout_hashes(p, source, whole, batch, **axes)
    return residual_kernel(x, bias, residual, *hashes)


def stochastic_depth(
    x: Tensor,
    residual: Tensor,
    p: float,
    source: Stream,
    whole: Sequence[int],
    batch: int | None,
    **axes: Split,
) -> Tensor:
    """residual + x, of which a share `p` of the samples (dim 0) is zeroed and the others are scaled by 1 / (1 - p). A
    sample's draw is that of its place in the whole batch. Arguments as `dropout`."""
    of_samples = {axis: split for axis, split in axes.items() if split in (0, (0, []))}
    hashes = dropout_hashes(p, source, [whole[0], 1], batch, **of_samples)
    return depth_kernel(x, residual, *hashes)


def dropout_hashes(
    p: float, source: Stream, whole: Sequence[int], batch: int | None, **axes: Split
) -> tuple[Tensor, Tensor, int, float]:
    """rows, columns, threshold and scale by which kernels drop what `dropout` drops.

    rows has the size of this rank's share without the last dim, columns that of the last dim. Arguments as `dropout`;
    for attention, those of the scores (samples, heads, queries, keys).
    """
    rows, columns = _hashes(source, whole, batch, axes)
    if p >= 1.0:
        return rows, columns, SIGN - 1, 0.0
    return rows, columns, int(p * 2**32) - SIGN, 1.0 / (1.0 - p)


def uniform(
    source: Stream, whole: Sequence[int], batch: int | None, dtype: torch.dtype = torch.float32, **axes: Split
) -> Tensor:
    """This rank's share of uniform numbers between 0 and 1, neither included. Arguments as `dropout`."""
    odd = (_words(source, whole, batch, axes) >> 8) & 0xFFFFFF | 1
    wide = odd.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return wide.mul_(2.0**-24).to(dtype).clamp_(max=1 - torch.finfo(dtype).eps / 2)


def dropout_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    p: float,
    source: Stream,
    whole: Sequence[int],
    batch: int | None,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
    bias: Tensor | None = None,
    relative: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    window: int = 0,
    cap: float = 0.0,
    even: bool = False,
    **axes: Split,
) -> Tensor:
    """Attention (b, h, q, e) of this rank's query (b, h, q, d), key (b, g, k, d) and value (b, g, k, e), with dropout
    of its softmax.

    p       share of the softmax that is dropped, as `autopart.runtime.random.dropout` drops it
    source  of random numbers
    whole   the size of the scores (samples, heads, queries, keys) over all ranks
    batch   the dim that counts samples
    mask    as of `autopart.kernels.attention.attention`; with a gradient if it requires one
    axes    the dim of the scores that each axis splits

    Other arguments as of `autopart.kernels.attention.attention`.
    """
    rows, columns, threshold, dropout_scale = dropout_hashes(p, source, whole, batch, **axes)
    if mask is not None and mask.requires_grad:
        bias = mask if bias is None else bias + mask
        mask = None
    places = scale, causal, window, cap, even
    drawn = rows, columns, threshold, dropout_scale
    return attention(query, key, value, mask, padding, bias, relative, sinks, *places, *drawn)
