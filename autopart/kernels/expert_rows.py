"""Rows of tokens gathered in the order of their experts, and summed back with weights, without atomics.

A router gives each of t tokens k experts. The s = t k pairs (token, expert) are sorted by expert: order[p] is the pair
in sorted place p, place[i] is the sorted place of pair i (see `autopart.kernels.expert_sort`).

    permute     rows[p] = x[order[p] // k]                           dx[t] = sum over j of drows[place[t k + j]]
    unpermute   y[t] = sum over j of w[t, j] rows[place[t k + j]]    drows[p] = w[order[p]] dy[order[p] // k]
                                                                     dw[i] = rows[place[i]] . dy[i // k]

Sums are in float32, in the order of j. For rows of d elements of ``itemsize`` bytes the least traffic in bytes is

    permute     forward and backward   itemsize (t d + s d) + 8 s
    unpermute   forward                itemsize (s d + t d) + (8 + w) s
                backward               itemsize (2 s d + t d) + (8 + 2 w) s

where w is the itemsize of the weights. Every row is read once, and the places.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from autopart.kernels.ahead import Usage, compile_kernels
from autopart.kernels.kernel import Bytes, Kernel
from autopart.kernels.launch import TRITON_NAMES, jit, launch, power_of_two, runs_on, triton_op

tl: Any = None  # triton.language, which jit binds

COLUMNS = 1024
"""Columns that a Triton program takes at a time."""


def permute_reference(x: torch.Tensor, order: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """`permute` by indexing."""
    return x[order // (len(order) // max(len(x), 1))]


def permute(x: torch.Tensor, order: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Rows (s, d) of x (t, d) sorted by expert; order and place (s,) are those of `sort_by_expert`.

    By the Triton kernels where they apply, else by ``permute_reference``.
    """
    if x.dtype in TRITON_NAMES and x.dim() == 2 and runs_on(x, order, place):
        return torch.ops.autopart.permute(x, order, place)
    return permute_reference(x, order, place)


def unpermute_reference(
    rows: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, place: torch.Tensor
) -> torch.Tensor:
    """`unpermute` by separate operators: times the weights, back in the order of the pairs, summed."""
    product = rows * weights.reshape(-1)[order][:, None]
    return product[place].view(*weights.shape, rows.shape[-1]).sum(1).to(rows.dtype)


def unpermute(rows: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Every token's sum of its experts' rows, times their weights: (t, d), in the dtype of rows.

    rows           (s, d), sorted by expert
    weights        (t, k)
    order, place   (s,), those of `sort_by_expert`

    By the Triton kernels where they apply, else by ``unpermute_reference``. The kernels round once, at the end.
    """
    known = rows.dtype in TRITON_NAMES and weights.dtype in TRITON_NAMES
    if known and rows.dim() == 2 and runs_on(rows, weights, order, place):
        return torch.ops.autopart.unpermute(rows, weights, order, place)
    return unpermute_reference(rows, weights, order, place)


def sum_by_token(rows: torch.Tensor, place: torch.Tensor, k: int) -> torch.Tensor:
    """Every token's sum of its k rows: (t, d), the gradient of `permute`'s x. By Triton where it applies."""
    if rows.dtype in TRITON_NAMES and runs_on(rows, place):
        return torch.ops.autopart.sum_of_places(rows, place, k)
    return rows[place].view(-1, k, rows.shape[1]).sum(1)


def scaled_gradients(dy: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of rows (s, d) and weights (s, 1) of their product, for dy (s, d). By the Triton kernels where they
    apply."""
    known = {dy.dtype, rows.dtype, weights.dtype} <= TRITON_NAMES.keys()
    if known and runs_on(dy, rows, weights):
        order = torch.arange(len(rows), device=rows.device)
        return torch.ops.autopart.unpermute_backward(dy, rows, weights, order)
    return (dy * weights).to(rows.dtype), (dy * rows).sum(1, keepdim=True).to(weights.dtype)


def permute_bytes_moved(x: torch.Tensor, order: torch.Tensor, place: torch.Tensor) -> Bytes:
    once = x.itemsize * (x.numel() + len(order) * x.shape[1]) + 8 * len(order)
    return Bytes(once, once)


def unpermute_bytes_moved(rows: torch.Tensor, weights: torch.Tensor, *places: torch.Tensor) -> Bytes:
    s, tokens = rows.numel(), len(weights) * rows.shape[1]
    return Bytes(
        forward=rows.itemsize * (s + tokens) + (8 + weights.itemsize) * len(rows),
        backward=rows.itemsize * (2 * s + tokens) + (8 + 2 * weights.itemsize) * len(rows),
    )


def compile_ahead(
    capability: int, d: int = 4096, k: int = 2, dtype: torch.dtype = torch.bfloat16, weighted: bool = True
) -> dict[str, Usage]:
    """Compile the kernels of `unpermute`, or else those of `permute`, for contiguous rows of ``d`` elements, float32
    weights and compute capability ``capability`` (90 for 9.0)."""
    signature = dict.fromkeys(("x", "rows", "out"), f"*{TRITON_NAMES[dtype]}") | dict.fromkeys(
        ("order", "place"), "*i64"
    )
    signature |= dict.fromkeys(("weights", "dweights"), "*fp32")
    lengths = dict.fromkeys(("d", "x_stride", "rows_stride"), "i32")
    aligned = {*signature, *(lengths if d % 16 == 0 else ())}
    constexprs = {"WEIGHTED": weighted, "COLUMNS": min(power_of_two(d), COLUMNS), "TOP": k}
    return compile_kernels((spread, combine), signature | lengths, constexprs, capability, aligned=aligned)


@jit
def spread(  # type: ignore[no-untyped-def]
    x, rows, weights, order, out, dweights, d, x_stride, rows_stride, TOP: tl.constexpr, WEIGHTED: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[p] = x[order[p] // TOP], times the pair's weight where WEIGHTED, which also gives the weight's gradient:
    the product of x's row and rows[p]."""
    p = tl.program_id(0).to(tl.int64)
    pair = tl.load(order + p)
    if WEIGHTED:
        weight = tl.load(weights + pair).to(tl.float32)
        product = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, d, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        here = column < d
        value = tl.load(x + pair // TOP * x_stride + column, mask=here, other=0.0)
        if WEIGHTED:
            value = value.to(tl.float32)
            product += value * tl.load(rows + p * rows_stride + column, mask=here, other=0.0).to(tl.float32)
            value = (value * weight).to(out.dtype.element_ty)
        tl.store(out + p * d + column, value, mask=here)
    if WEIGHTED:
        tl.store(dweights + pair, tl.sum(product, 0).to(dweights.dtype.element_ty))


@jit
def combine(  # type: ignore[no-untyped-def]
    rows, weights, place, out, d, rows_stride, TOP: tl.constexpr, WEIGHTED: tl.constexpr, COLUMNS: tl.constexpr
):
    """out[t] = sum over j of rows[place[t TOP + j]], times the pair's weight where WEIGHTED."""
    across = tl.cdiv(d, COLUMNS)
    token = (tl.program_id(0) // across).to(tl.int64)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for j in range(TOP):
        p = tl.load(place + token * TOP + j)
        value = tl.load(rows + p * rows_stride + column, mask=column < d, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + token * TOP + j).to(tl.float32)
        total += value
    tl.store(out + token * d + column, total.to(out.dtype.element_ty), mask=column < d)


@triton_op("autopart::permute", mutates_args=())
def _permute(x: torch.Tensor, order: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(order), x.shape[1], dtype=x.dtype, device=x.device)
    h, top = _unit(x), len(order) // len(x)
    arguments = h, h, h, order, out, h, x.shape[1], h.stride(0), 0
    launch(spread, len(order), *arguments, WEIGHTED=False, **_options(x, top))
    return out


@triton_op("autopart::sum_of_places", mutates_args=())
def _sum_of_places(rows: torch.Tensor, place: torch.Tensor, top: int) -> torch.Tensor:
    """(t, d): the sum of every ``top`` neighbouring places' rows (s, d)."""
    return _combined(rows, None, place, top)


@triton_op("autopart::unpermute", mutates_args=())
def _unpermute(rows: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    return _combined(rows, weights.contiguous(), place, weights.shape[1])


@triton_op("autopart::unpermute_backward", mutates_args=())
def _unpermute_backward(
    dy: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of rows and of weights."""
    g, h, w = _unit(dy), _unit(rows), weights.contiguous()
    drows = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    dweights = torch.empty(weights.shape, dtype=weights.dtype, device=rows.device)
    arguments = g, h, w, order, drows, dweights, rows.shape[1], g.stride(0), h.stride(0)
    launch(spread, len(rows), *arguments, WEIGHTED=True, **_options(rows, weights.shape[1]))
    return drows, dweights


def _combined(rows: torch.Tensor, weights: torch.Tensor | None, place: torch.Tensor, top: int) -> torch.Tensor:
    h, (s, d) = _unit(rows), rows.shape
    out = torch.empty(s // top, d, dtype=rows.dtype, device=rows.device)
    options = _options(rows, top)
    programs = s // top * -(-d // options["COLUMNS"])
    arguments = h, h if weights is None else weights, place, out, d, h.stride(0)
    launch(combine, programs, *arguments, WEIGHTED=weights is not None, **options)
    return out


def _options(rows: torch.Tensor, top: int) -> dict[str, int]:
    return {"TOP": top, "COLUMNS": min(power_of_two(rows.shape[1]), COLUMNS)}


def _unit(x: torch.Tensor) -> torch.Tensor:
    """x with stride 1 along a row: itself, or a copy."""
    return x if x.stride(1) == 1 else x.contiguous()


def _save_place(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[2])
    ctx.top = len(inputs[1]) // len(inputs[0])


def _permute_gradients(ctx: Any, drows: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return torch.ops.autopart.sum_of_places(drows, *ctx.saved_tensors, ctx.top), None, None


def _save_all(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _unpermute_gradients(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *torch.ops.autopart.unpermute_backward(dy, *ctx.saved_tensors), None, None


_permute.register_autograd(_permute_gradients, setup_context=_save_place)
_unpermute.register_autograd(_unpermute_gradients, setup_context=_save_all)


KERNELS = (
    Kernel(
        function=permute,
        reference=permute_reference,
        rule="t! d, s!, s! -> s! d",
        kept=lambda arguments, outputs: arguments[2:],  # the places: backward sums rows
        bytes_moved=permute_bytes_moved,
        ahead=functools.partial(compile_ahead, weighted=False),
        shapes={"Mixtral-8x7B": {"d": 4096, "k": 2}, "Qwen3-30B-A3B": {"d": 2048, "k": 8}},
    ),
    Kernel(
        function=unpermute,
        reference=unpermute_reference,
        rule="s! d, t! k!, s!, s! -> t! d",
        kept=lambda arguments, outputs: arguments[:3],
        bytes_moved=unpermute_bytes_moved,
        ahead=compile_ahead,
        shapes={"Mixtral-8x7B": {"d": 4096, "k": 2}, "Qwen3-30B-A3B": {"d": 2048, "k": 8}},
    ),
)
