"""Gated units of rows sorted by expert: columns of gate and up in turns, a bias for each expert, both clamped.

For x (s, 2 f), whose row r is of expert e, and bias (experts, 2 f): h = x[r] + bias[e],

    g = min(h[0::2], limit),   u = min(max(h[1::2], -limit), limit),   p = sigmoid(alpha g)
    y      = g p (u + 1)
    dg     = dy (u + 1) p (1 + alpha g (1 - p))  where h[0::2] <= limit, else 0
    du     = dy g p                              where -limit <= h[1::2] <= limit, else 0
    dbias  = for each expert the sum of its rows of dx

Backward keeps x alone and makes h again. For ``itemsize`` bytes of an element the least traffic in bytes, without the
biases and the numbers of experts, is

    forward   3 itemsize s f      read x, write y
    backward  7 itemsize s f      read dy and x, write dx; read dx for the sums

Source: OpenAI, arXiv 2508.10925 (gpt-oss), and its published code for the clamps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autopart.kernels.ahead import Usage, compile_kernels
from autopart.kernels.launch import TRITON_NAMES, jit, launch, power_of_two, runs_on, triton_op

tl: Any = None  # triton.language, which jit binds

PAIRS = 512
"""Most pairs of a gate and an up that a Triton program takes of a row."""
ROWS = 4
SUMMED = 16
"""Rows that a Triton program adds at a time."""


def gate_reference(h: Tensor, alpha: float, limit: float) -> Tensor:
    """y (..., f) of h (..., 2 f), as gpt-oss writes it."""
    gate, up = h[..., ::2], h[..., 1::2]
    gate = gate.clamp(min=None, max=limit)
    up = up.clamp(min=-limit, max=limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


def clamped_gate(x: Tensor, bias: Tensor, number: Tensor, alpha: float, limit: float) -> Tensor:
    """y (s, f), in the dtype of rows x (s, 2 f).

    bias    (experts, 2 f)
    number  (s,), int64: each row's expert. Rows of a number that is none of 0 ... experts - 1 have no bias

    By the Triton kernel where it applies, else by ``gate_reference``. Its gradients are `gradients`.
    """
    if _kernels_apply(x, bias) and runs_on(x, bias, number):
        return torch.ops.autopart.clamped_gate(x, bias, number, alpha, limit)
    return gate_reference(x + _by_row(bias, number), alpha, limit).to(x.dtype)


def gradients(dy: Tensor, x: Tensor, bias: Tensor, number: Tensor, alpha: float, limit: float) -> Tensor:
    """The gradient of x, for dy (s, f). By the Triton kernel where it applies."""
    if _kernels_apply(x, bias) and runs_on(dy, x, bias, number):
        return torch.ops.autopart.clamped_gate_backward(dy, x, bias, number, alpha, limit)
    with torch.enable_grad():
        h = (x + _by_row(bias, number)).detach().requires_grad_()
        (dx,) = torch.autograd.grad(gate_reference(h, alpha, limit), h, dy.to(h.dtype))
    return dx.to(x.dtype)


def sums_by_expert(dx: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """(experts, n): for every expert e the sum of the rows offsets[e]:offsets[e + 1] of dx (s, n), in their order. By
    the Triton kernel where it applies."""
    if {dx.dtype, dtype} <= TRITON_NAMES.keys() and runs_on(dx, offsets):
        return torch.ops.autopart.sums_by_expert(dx, offsets, dtype)
    spans = zip(offsets.tolist(), offsets.tolist()[1:], strict=False)
    return torch.stack([dx[start:end].sum(0) for start, end in spans]).to(dtype)


def _by_row(bias: Tensor, number: Tensor) -> Tensor:
    """The bias of every row's expert; zeros for a number that no expert has."""
    known = (number >= 0) & (number < len(bias))
    return torch.where(known[:, None], bias[torch.where(known, number, 0)], 0.0)


def _kernels_apply(x: Tensor, bias: Tensor) -> bool:
    return {x.dtype, bias.dtype} <= TRITON_NAMES.keys() and x.dim() == 2 and x.is_contiguous()


def compile_ahead(capability: int, f: int = 2880, dtype: torch.dtype = torch.bfloat16) -> dict[str, Usage]:
    """Compile the three kernels for experts of width ``f`` and compute capability ``capability`` (90 for 9.0)."""
    signature = dict.fromkeys(("x", "bias", "y", "dy", "dx", "out"), f"*{TRITON_NAMES[dtype]}")
    signature |= {"number": "*i64", "offsets": "*i64"}
    aligned = {*signature, *(("f", "n") if f % 16 == 0 else ())}
    signature |= dict.fromkeys(("rows", "experts", "f", "n"), "i32") | {"alpha": "fp32", "limit": "fp32"}
    gate = gate_forward, gate_backward
    found = compile_kernels(gate, signature, _tile(f), capability, aligned=aligned)
    return found | compile_kernels((row_sums,), signature, _sum_tile(2 * f), capability, aligned=aligned)


@jit
def load_gate(x, bias, number, row, first, rows, experts, f, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gates and ups before they are clamped, from column `first` of a row's pairs on."""
    column = 2 * first + tl.arange(0, 2 * WIDTH)
    here = (row < rows)[:, None] & (column < 2 * f)[None, :]
    expert = tl.load(number + row, mask=row < rows, other=-1)
    known = here & ((expert >= 0) & (expert < experts))[:, None]
    h = tl.load(x + row[:, None] * 2 * f + column[None, :], mask=here, other=0.0).to(tl.float32)
    h += tl.load(bias + expert[:, None] * 2 * f + column[None, :], mask=known, other=0.0).to(tl.float32)
    g, u = tl.split(tl.reshape(h, (ROWS, WIDTH, 2)))
    return g, u


@jit
def gate_forward(  # type: ignore[no-untyped-def]
    x, bias, number, y, rows, experts, f, alpha, limit, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    across = tl.cdiv(f, WIDTH)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) % across * WIDTH
    alpha, limit = tl.cast(alpha, tl.float32), tl.cast(limit, tl.float32)
    g, u = load_gate(x, bias, number, row, first, rows, experts, f, ROWS, WIDTH)
    g = tl.where(g > limit, limit, g)
    u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
    value = g * tl.sigmoid(alpha * g) * (u + 1)
    column = first + tl.arange(0, WIDTH)
    here = (row < rows)[:, None] & (column < f)[None, :]
    tl.store(y + row[:, None] * f + column[None, :], value.to(y.dtype.element_ty), mask=here)


@jit
def gate_backward(  # type: ignore[no-untyped-def]
    dy, x, bias, number, dx, rows, experts, f, alpha, limit, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    across = tl.cdiv(f, WIDTH)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) % across * WIDTH
    alpha, limit = tl.cast(alpha, tl.float32), tl.cast(limit, tl.float32)
    gate, up = load_gate(x, bias, number, row, first, rows, experts, f, ROWS, WIDTH)
    column = first + tl.arange(0, WIDTH)
    here = (row < rows)[:, None] & (column < f)[None, :]
    d = tl.load(dy + row[:, None] * f + column[None, :], mask=here, other=0.0).to(tl.float32)
    g = tl.where(gate > limit, limit, gate)
    u = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    p = tl.sigmoid(alpha * g)
    dgate = tl.where(gate <= limit, d * (u + 1) * p * (1 + alpha * g * (1 - p)), 0.0)
    dup = tl.where((up >= -limit) & (up <= limit), d * g * p, 0.0)
    both = tl.interleave(dgate, dup).to(dx.dtype.element_ty)
    column = 2 * first + tl.arange(0, 2 * WIDTH)
    here = (row < rows)[:, None] & (column < 2 * f)[None, :]
    tl.store(dx + row[:, None] * 2 * f + column[None, :], both, mask=here)


@jit
def row_sums(dx, offsets, out, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    across = tl.cdiv(n, COLUMNS)
    expert = tl.program_id(0) // across
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    start, end = tl.load(offsets + expert).to(tl.int32), tl.load(offsets + expert + 1).to(tl.int32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(start, end, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        here = (row < end)[:, None] & (column < n)[None, :]
        total += tl.load(dx + row[:, None] * n + column[None, :], mask=here, other=0.0).to(tl.float32)
    at = out + expert.to(tl.int64) * n + column
    tl.store(at, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < n)


@triton_op("autopart::clamped_gate", mutates_args=())
def _forward(x: Tensor, bias: Tensor, number: Tensor, alpha: float, limit: float) -> Tensor:
    rows, f = len(x), x.shape[1] // 2
    y = torch.empty(rows, f, dtype=x.dtype, device=x.device)
    arguments = x, bias.contiguous(), number, y, rows, len(bias), f, alpha, limit
    launch(gate_forward, _programs(rows, f), *arguments, **_tile(f))
    return y


@triton_op("autopart::clamped_gate_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, bias: Tensor, number: Tensor, alpha: float, limit: float) -> Tensor:
    rows, f = len(x), x.shape[1] // 2
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    arguments = dy.contiguous(), x, bias.contiguous(), number, dx, rows, len(bias), f, alpha, limit
    launch(gate_backward, _programs(rows, f), *arguments, **_tile(f))
    return dx


@triton_op("autopart::sums_by_expert", mutates_args=())
def _sums(dx: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    experts, n = len(offsets) - 1, dx.shape[1]
    out = torch.empty(experts, n, dtype=dtype, device=dx.device)
    tile = _sum_tile(n)
    launch(row_sums, experts * -(-n // tile["COLUMNS"]), dx.contiguous(), offsets.contiguous(), out, n, **tile)
    return out


def _tile(f: int) -> dict[str, int]:
    return {"ROWS": ROWS, "WIDTH": min(power_of_two(f), PAIRS)}


def _sum_tile(n: int) -> dict[str, int]:
    return {"ROWS": SUMMED, "COLUMNS": min(power_of_two(n), PAIRS // 4)}


def _programs(rows: int, f: int) -> int:
    return -(-rows // ROWS) * -(-f // _tile(f)["WIDTH"])
