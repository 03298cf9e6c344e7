"""Triton kernels that normalise rows: what `rms_norm` and `layer_norm` share.

For a row x of ``d`` elements, with m = mean(x) where the norm is centred and 0 elsewhere:

    s = x + residual              where a residual is given
    r = rsqrt(mean((s - m)^2) + eps)
    h = (s - m) r
    y = h weight + bias           with 1 + weight for weight where the norm has a unit offset

and for g = dy weight, with mean(g) only where the norm is centred:

    ds      = (g - h mean(g h) - mean(g)) r  +  the gradient that s gets elsewhere
    dweight = sum over rows of dy h
    dbias   = sum over rows of dy

Statistics and sums are in float32. The least traffic is

    forward   read x [and residual, write s], write y, read weight and bias, write r [and m] as float32
    backward  read s and dy [and the gradient of s], write ds, read weight, write dweight and dbias, read r [and m]

The partial sums of dweight and dbias, one float32 row for each Triton program, are left out: they do not grow with the
number of rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from autopart.kernels.ahead import Usage, compile_kernels
from autopart.kernels.launch import TRITON_NAMES, jit, power_of_two, processors

tl: Any = None  # triton.language, which jit binds

MAX_BLOCK = 65536
"""Elements of the longest row that the kernels take. The backward spills registers in rows of more than 16384, with a
bias in those of more than 8192, and in long rows that 16 does not divide."""

TILE = 1024
"""Elements in one Triton program, at the least: short rows share a program."""


class Form(NamedTuple):
    """Which norm.

    centred      subtract the mean of the row
    unit_offset  scale by 1 + weight
    round_first  round h to the dtype of s before the product with weight; y then has the wider dtype of s and weight.
                 Else y is rounded once, to the dtype of s
    """

    centred: bool = False
    unit_offset: bool = False
    round_first: bool = False

    @property
    def constexprs(self) -> dict[str, Any]:
        """The fields by the names of the kernels' arguments."""
        return {name.upper(): value for name, value in self._asdict().items()}


PLAIN = Form()


def compile_ahead(
    capability: int,
    d: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    *,
    form: Form = PLAIN,
    absent: tuple[str, ...] = (),
) -> dict[str, Usage]:
    """Compile both kernels for contiguous rows of ``d`` elements and compute capability ``capability`` (90 for 9.0).

    ``absent`` names those of "residual", "weight" and "bias" that are not given.
    """
    types = dict.fromkeys(("x", "residual", "weight", "bias", "total", "y", "dy", "dtotal", "dx"), TRITON_NAMES[dtype])
    types |= dict.fromkeys(("statistics", "partial"), "fp32")
    lengths = ("x_stride", "residual_stride", "dy_stride", "dtotal_stride", "d")
    signature = {name: f"*{value}" for name, value in types.items()} | dict.fromkeys((*lengths, "rows"), "i32")
    signature["eps"] = "fp32"
    missing = {*absent, *(("total", "dtotal") if "residual" in absent else ())}
    constexprs: dict[str, Any] = dict.fromkeys(missing) | {"ROWS": height(d), "BLOCK": power_of_two(d)}
    constexprs |= {"DWEIGHT": "weight" not in absent, "DBIAS": "bias" not in absent} | form.constexprs
    constexprs |= dict.fromkeys(lengths, 1) if d == 1 else {}
    aligned = {*types, *(lengths if d % 16 == 0 else ())} - missing
    return compile_kernels((forward, backward), signature, constexprs, capability, _warps(d), aligned)


@jit
def forward(  # type: ignore[no-untyped-def]
    x, residual, weight, bias, total, y, statistics, x_stride, residual_stride, rows, d, eps,
    CENTRED: tl.constexpr, UNIT_OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    across = cols < d
    mask = (row < rows) & across
    h = tl.load(x + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        h += tl.load(residual + row * residual_stride + cols, mask=mask, other=0.0).to(tl.float32)
        rounded = h.to(total.dtype.element_ty)
        tl.store(total + row * d + cols, rounded, mask=mask)
        h = rounded.to(tl.float32)
    if CENTRED:
        mean = tl.sum(h, 1, keep_dims=True) / d
        tl.store(statistics + rows + row, mean, mask=row < rows)
        h = tl.where(across, h - mean, 0.0)
    r = tl.rsqrt(tl.sum(h * h, 1, keep_dims=True) / d + tl.cast(eps, tl.float32))
    tl.store(statistics + row, r, mask=row < rows)
    h *= r
    if ROUND_FIRST and residual is not None:
        h = h.to(total.dtype.element_ty).to(tl.float32)
    elif ROUND_FIRST:
        h = h.to(x.dtype.element_ty).to(tl.float32)
    if weight is not None:
        w = tl.load(weight + cols, mask=across, other=0.0).to(tl.float32)
        h *= (1.0 + w) if UNIT_OFFSET else w
    if bias is not None:
        h += tl.load(bias + cols, mask=across, other=0.0).to(tl.float32)
    tl.store(y + row * d + cols, h.to(y.dtype.element_ty), mask=mask)


@jit
def backward(  # type: ignore[no-untyped-def]
    dy, dtotal, x, weight, statistics, dx, partial, dy_stride, dtotal_stride, x_stride, rows, d,
    CENTRED: tl.constexpr, UNIT_OFFSET: tl.constexpr, DWEIGHT: tl.constexpr, DBIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)[None, :]
    across = cols < d
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & across
        h = tl.load(x + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
        if CENTRED:
            h -= tl.load(statistics + rows + row, mask=row < rows, other=0.0)
        r = tl.load(statistics + row, mask=row < rows, other=0.0)
        h *= r
        g = tl.load(dy + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
        if DWEIGHT:
            dw += g * h
        if DBIAS:
            db += g
        if weight is not None:
            w = tl.load(weight + cols, mask=across, other=0.0).to(tl.float32)
            g *= (1.0 + w) if UNIT_OFFSET else w
        along = h * (tl.sum(g * h, 1, keep_dims=True) / d)
        if CENTRED:
            along += tl.sum(g, 1, keep_dims=True) / d
        g = (g - along) * r
        if dtotal is not None:
            g += tl.load(dtotal + row * dtotal_stride + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + row * d + cols, g.to(dx.dtype.element_ty), mask=mask)
    at = tl.arange(0, BLOCK)
    if DWEIGHT:
        tl.store(partial + program * d + at, tl.sum(dw, 0), mask=at < d)
    if DBIAS:
        program += tl.num_programs(0) * DWEIGHT
        tl.store(partial + program * d + at, tl.sum(db, 0), mask=at < d)


def height(d: int) -> int:
    """Rows of ``d`` elements in a Triton program."""
    return max(TILE // power_of_two(d), 1)


def _warps(d: int) -> int:
    """Warps of a program: from 4 on as many as have 16 elements a thread, and 32 for rows of more than 8192."""
    return 32 if d > 8192 else max(power_of_two(d) // 512, 4)


def options(d: int) -> dict[str, Any]:
    """Constants of the kernels for rows of ``d`` elements, and their warps."""
    return {"ROWS": height(d), "BLOCK": power_of_two(d), "num_warps": _warps(d), "enable_fp_fusion": True}


def programs(rows: int, d: int, device: torch.device) -> int:
    """Programs of the backward: on each multiprocessor as many as hold 16384 elements of x, at least 1."""
    tile = max(power_of_two(d), TILE)
    each = max(16384 // tile, 1) if device.type == "cuda" else 1
    return min(-(-rows // height(d)), processors(device) * each)
