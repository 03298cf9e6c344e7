"""Routers of mixtures of experts that softmax the k greatest logits alone, in one kernel.

For logits l (t, experts), and the numbers i_1 ... i_k of the greatest, in float32

    w       = softmax(l[i_1], ..., l[i_k])
    dl[i_j] = w_j (dw_j - sum over the k experts of dw w),  and 0 for all others

Weights and numbers are kept, which the experts behind a router keep too, and no logits. Of equal logits the expert of
the lowest number is chosen. For t rows, ``itemsize`` bytes of a logit and w bytes of a weight the least traffic in
bytes is

    forward   itemsize t experts + (w + 8) t k      read logits, write weights and numbers
    backward  itemsize t experts + (2 w + 8) t k    read dw, weights and numbers, write dl

Sources: Shazeer et al., arXiv 1701.06538, equations 3 and 5; OpenAI, arXiv 2508.10925 (gpt-oss).
"""

from __future__ import annotations

from typing import Any

import torch

from autopart.kernels.ahead import Usage
from autopart.kernels.kernel import Bytes, Kernel
from autopart.kernels.launch import TRITON_NAMES, as_rows, jit, launch, power_of_two, runs_on, triton_op
from autopart.kernels.router_rows import best_of, block, compile_rows, kernels_apply, sortable

tl: Any = None  # triton.language, which jit binds


def reference(
    logits: torch.Tensor, k: int, inner: torch.dtype | None = None, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`route_topk` by separate operators, as gpt-oss (no dtype) and Granite-MoE (``dtype``: the model's) write it."""
    values, ids = torch.topk(logits, k, dim=-1)
    weights = torch.nn.functional.softmax(values, dim=-1, dtype=inner)
    return weights if dtype is None else weights.to(dtype), ids


def route_topk(
    logits: torch.Tensor, k: int, inner: torch.dtype | None = None, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (..., k), which fall, and numbers (..., k), int64, of the k greatest logits (..., experts).

    The softmax is of ``inner`` and the weights are of ``dtype``; where these are None, of the dtype before. By the
    Triton kernels where they apply, which round once, to the weights' dtype; else by ``reference``. Numbers of experts
    with equal logits may be others than torch.topk's.
    """
    given = dtype or inner or logits.dtype
    if given in TRITON_NAMES and inner != torch.float64 and kernels_apply(logits, k) and runs_on(logits):
        return torch.ops.autopart.route_topk(logits, k, given)
    return reference(logits, k, inner, dtype)


def bytes_moved(
    logits: torch.Tensor, k: int, inner: torch.dtype | None = None, dtype: torch.dtype | None = None
) -> Bytes:
    pairs, wide = k * (logits.numel() // logits.shape[-1]), (dtype or inner or logits.dtype).itemsize
    return Bytes(logits.nbytes + (wide + 8) * pairs, logits.nbytes + (2 * wide + 8) * pairs)


def compile_ahead(
    capability: int, experts: int = 128, k: int = 4, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Usage]:
    """Compile both kernels, for float32 weights and compute capability ``capability`` (90 for 9.0)."""
    return compile_rows((route_topk_kernel, route_topk_backward_kernel), capability, experts, k, dtype)


@jit
def route_topk_kernel(  # type: ignore[no-untyped-def]
    logits, weights, ids, stride, rows, experts, K: tl.constexpr, TOP: tl.constexpr, ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert, place = tl.arange(0, EXPERTS), tl.arange(0, TOP)
    here = (row < rows)[:, None] & (expert < experts)[None, :]
    value = tl.load(logits + row[:, None] * stride + expert[None, :], mask=here, other=0.0).to(tl.float32)
    left = tl.where(expert[None, :] < experts, sortable(value), -(2**31))
    chosen = tl.full((ROWS, TOP), -float("inf"), tl.float32)
    for j in range(K):
        best = best_of(left, expert, EXPERTS)
        hit = expert[None, :] == best[:, None]
        left = tl.where(hit, -(2**31), left)
        chosen = tl.where(place[None, :] == j, tl.sum(tl.where(hit, value, 0.0), 1)[:, None], chosen)
        tl.store(ids + row * K + j, best.to(tl.int64), mask=row < rows)
    chosen = tl.exp(chosen - tl.max(chosen, 1)[:, None])
    chosen = chosen / tl.sum(chosen, 1)[:, None]
    here = (row < rows)[:, None] & (place < K)[None, :]
    tl.store(weights + row[:, None] * K + place[None, :], chosen.to(weights.dtype.element_ty), mask=here)


@jit
def route_topk_backward_kernel(  # type: ignore[no-untyped-def]
    dweights, weights, ids, dlogits, rows, experts, K: tl.constexpr, TOP: tl.constexpr, ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert, place = tl.arange(0, EXPERTS), tl.arange(0, TOP)
    here = (row < rows)[:, None] & (place < K)[None, :]
    at = row[:, None] * K + place[None, :]
    w = tl.load(weights + at, mask=here, other=0.0).to(tl.float32)
    g = tl.load(dweights + at, mask=here, other=0.0).to(tl.float32)
    g = w * (g - tl.sum(g * w, 1)[:, None])
    out = tl.zeros((ROWS, EXPERTS), tl.float32)
    for j in range(K):
        number = tl.load(ids + row * K + j, mask=row < rows, other=0)
        value = tl.sum(tl.where(place[None, :] == j, g, 0.0), 1)
        out += tl.where(expert[None, :] == number[:, None], value[:, None], 0.0)
    here = (row < rows)[:, None] & (expert < experts)[None, :]
    tl.store(dlogits + row[:, None] * experts + expert[None, :], out.to(dlogits.dtype.element_ty), mask=here)


@triton_op("autopart::route_topk", mutates_args=())
def _route_topk(logits: torch.Tensor, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    h, (*leading, experts), tile = as_rows(logits), logits.shape, block(logits.shape[-1])
    weights = torch.empty(*leading, k, dtype=dtype, device=logits.device)
    ids = torch.empty(*leading, k, dtype=torch.int64, device=logits.device)
    arguments = h, weights, ids, h.stride(0), len(h), experts
    launch(route_topk_kernel, -(-len(h) // tile["ROWS"]), *arguments, K=k, TOP=power_of_two(k), **tile)
    return weights, ids


@triton_op("autopart::route_topk_backward", mutates_args=())
def _route_topk_backward(
    dweights: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, experts: int, dtype: torch.dtype
) -> torch.Tensor:
    (*leading, k), tile = weights.shape, block(experts)
    dlogits = torch.empty(*leading, experts, dtype=dtype, device=weights.device)
    rows = weights.numel() // k
    arguments = dweights.contiguous(), weights, ids, dlogits, rows, experts
    launch(route_topk_backward_kernel, -(-rows // tile["ROWS"]), *arguments, K=k, TOP=power_of_two(k), **tile)
    return dlogits


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*output)
    ctx.experts, ctx.dtype = inputs[0].shape[-1], inputs[0].dtype
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dweights: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return torch.ops.autopart.route_topk_backward(dweights, *ctx.saved_tensors, ctx.experts, ctx.dtype), None, None


_route_topk.register_autograd(_gradients, setup_context=_save)


KERNEL = Kernel(
    function=route_topk,
    reference=reference,
    rule="... e! -> ... k!, ... k!",
    kept=lambda arguments, outputs: outputs,
    bytes_moved=bytes_moved,
    ahead=compile_ahead,
    shapes={"gpt-oss-120b": {"experts": 128, "k": 4}, "Granite-3.1-3B-A800M": {"experts": 40, "k": 8}},
    on_cpu=False,
)
