"""Dropout by hashes of rows and columns (`autopart.kernels.dropout`) in plain PyTorch, with a gradient."""

from typing import Any

import torch

from autopart.kernels import dropout

SIGN = 2**31
CACHED = 2**17
"""Elements that a CPU computes at a time, so that intermediate values stay in its cache."""
WHOLE_NUMBERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By their size in bytes."""


def dropped(x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, threshold: int, scale: float) -> torch.Tensor:
    """x (..., d) after dropout:

        y[i, j] = scale x[i, j]  if  hash(rows[i] + columns[j]) ^ 0x80000000 >= threshold  else  0

    rows (...) and columns (d,) are int32; the hash is compared as int32. Autograd saves rows and columns alone.
    """
    result: torch.Tensor = _Dropped.apply(x, rows, columns, threshold, scale)
    return result


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, *constants: Any) -> torch.Tensor:
        ctx.save_for_backward(rows, columns)
        ctx.constants = constants
        return _masked(x, rows, columns, *constants)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _masked(gradients[0], *ctx.saved_tensors, *ctx.constants), None, None, None, None


def _masked(x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, threshold: int, scale: float) -> torch.Tensor:
    flat = x.reshape(-1, len(columns)).contiguous()
    masked = dropout.masked if dropout.applies(flat) else _by_blocks
    return masked(flat, rows.reshape(-1).contiguous(), columns, threshold, scale).view(x.shape)


def _by_blocks(
    x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, threshold: int, scale: float
) -> torch.Tensor:
    """Clear the bits of what is dropped. The comparison is a clamp to threshold - 1 or threshold, which differs from
    threshold - 1 by 0 or 1: all bits of its negative are equal."""
    result = x * scale
    if threshold == -SIGN:
        return result
    whole_numbers = result.view(WHOLE_NUMBERS[x.element_size()])
    height = max(1, CACHED // max(1, len(columns)) if x.device.type == "cpu" else len(rows))
    for first in range(0, len(rows), height):
        hashes = _mixed(rows[first : first + height, None] + columns).bitwise_xor_(-SIGN)
        whole_numbers[first : first + height] &= (threshold - 1) - hashes.clamp_(threshold - 1, threshold)
    return result


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """The hash of int32 words, in place, as of unsigned ones: lowbias32 (C. Wellons, public domain, 2018)."""
    words ^= (words >> 16).bitwise_and_(0xFFFF)
    words *= 0x7FEB352D
    words ^= (words >> 15).bitwise_and_(0x1FFFF)
    words *= 0x846CA68B - 2**32
    words ^= (words >> 16).bitwise_and_(0xFFFF)
    return words
