"""Dropout whose mask is a hash of each element's row and column. No mask is saved: backward computes it again.

Forward and backward are the same kernel, on x and on the gradient. Its result equals that of `by_blocks` in plain torch
bit for bit. For x of n = rows x d elements of `itemsize` bytes the least traffic is

    2 itemsize n + 4 (rows + d) bytes:  read x, write y, read the int32 hashes of rows and of columns
"""

from __future__ import annotations

from typing import Any

import torch

from autopart.kernels.ahead import Usage, compile_kernel
from autopart.kernels.launch import TRITON_NAMES, jit, launch, runs_on

tl: Any = None  # triton.language, which jit binds

ELEMENTS = 2048
"""Elements of x in one Triton program."""
SIGN = 2**31
CACHED = 2**17
"""Elements that the CPU computes at a time, so that intermediate values stay in its cache."""
WHOLE_NUMBERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By their size in bytes."""


def applies(x: torch.Tensor) -> bool:
    """Whether the kernel applies to `x`: a plain tensor with elements, of a dtype of the kernel, on a device where
    Triton runs."""
    return x.dtype in TRITON_NAMES and runs_on(x)


def masked(x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, threshold: int, scale: float) -> torch.Tensor:
    """x (rows, d), contiguous, after dropout:

        y[i, j] = scale x[i, j]  if  hash(rows[i] + columns[j]) ^ 0x80000000 >= threshold  else  0

    rows (rows,) and columns (d,) are int32; the hash is compared as int32.
    """
    y = torch.empty_like(x)
    count, d = x.shape
    height, width = _block(d)
    programs = -(-count // height) * -(-d // width)
    launch(dropout, programs, x, rows, columns, y, count, d, threshold, scale, ROWS=height, COLUMNS=width)
    return y


def mixed(x: torch.Tensor) -> torch.Tensor:
    """Mix the words of `x` in place, so that each bit depends on all bits."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def by_blocks(x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, threshold: int, scale: float) -> torch.Tensor:
    """`masked` in plain torch."""
    result = x * scale
    if threshold == -SIGN:
        return result
    whole_numbers = result.view(WHOLE_NUMBERS[x.element_size()])
    height = max(1, CACHED // max(1, len(columns)) if x.device.type == "cpu" else len(rows))
    for i in range(0, len(rows), height):
        drawn = mixed(rows[i : i + height, None] + columns).bitwise_xor_(-SIGN)
        kept = (threshold - 1) - drawn.clamp_(threshold - 1, threshold)
        whole_numbers[i : i + height] &= kept
    return result


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
    return by_blocks(flat, rows.reshape(-1), columns, threshold, scale).view(x.shape)


def compile_ahead(capability: int, d: int = 4096, dtype: torch.dtype = torch.bfloat16) -> Usage:
    """Compile the kernel for rows of ``d`` elements and compute capability ``capability`` (90 for 9.0)."""
    types = dict.fromkeys(("x", "y"), f"*{TRITON_NAMES[dtype]}") | dict.fromkeys(("rows", "columns"), "*i32")
    signature = types | dict.fromkeys(("count", "d", "threshold"), "i32") | {"scale": "fp32"}
    height, width = _block(d)
    constexprs = {"ROWS": height, "COLUMNS": width}
    return compile_kernel(dropout, signature, constexprs, capability, 4, {*types, *(("d",) if d % 16 == 0 else ())})


@jit
def stays(rows, columns, threshold):  # type: ignore[no-untyped-def]
    """Whether elements stay: the words of their rows and columns are mixed and compared as int32."""
    u = rows.to(tl.uint32, bitcast=True) + columns.to(tl.uint32, bitcast=True)
    u ^= u >> 16
    u *= 0x7FEB352D
    u ^= u >> 15
    u *= 0x846CA68B
    u ^= u >> 16
    return (u ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold


@jit
def dropout(  # type: ignore[no-untyped-def]
    x, rows, columns, y, count, d, threshold, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    across = tl.cdiv(d, COLUMNS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    here = (row < count)[:, None] & (column < d)[None, :]
    of_rows = tl.load(rows + row, mask=row < count, other=0)[:, None]
    kept = stays(of_rows, tl.load(columns + column, mask=column < d, other=0)[None, :], threshold)
    at = row[:, None] * d + column[None, :]
    value = tl.load(x + at, mask=here, other=0.0).to(tl.float32) * tl.cast(scale, tl.float32)
    tl.store(y + at, tl.where(kept, value, 0.0).to(y.dtype.element_ty), mask=here)


def _block(d: int) -> tuple[int, int]:
    """Rows and columns of x in one Triton program."""
    width = min(1 << (d - 1).bit_length(), ELEMENTS)
    return ELEMENTS // width, width
