"""Routers of mixtures of experts: softmax, top k and renormalisation in one kernel.

For logits l (t, experts), p = softmax(l) in float32, and the numbers i_1 ... i_k of the greatest p

    w_j = p[i_j],  or p[i_j] / (p[i_1] + ... + p[i_k]) where ``renormalise``
    dl  = p (g - sum over experts of g p),  g[i_j] = dw_j and else 0

where in dl with ``renormalise`` p is divided by the k experts' sum, and 0 for all others. Only logits and numbers are
kept; p is computed again. Of equal p the expert of the lowest number is chosen. For t rows, ``itemsize`` bytes of a
logit and w bytes of a weight the least traffic in bytes is

    forward   itemsize t experts + (w + 8) t k      read logits, write weights and numbers
    backward  2 itemsize t experts + (w + 8) t k    read dw, logits and numbers, write dl

Source: Jiang et al., arXiv 2401.04088 (Mixtral's router).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from autopart.kernels.ahead import Usage, compile_kernels
from autopart.kernels.kernel import Bytes, Kernel
from autopart.kernels.launch import TRITON_NAMES, as_rows, jit, launch, power_of_two, runs_on, triton_op

tl: Any = None  # triton.language, which jit binds

MAX_EXPERTS = 1024
ELEMENTS = 512
"""Logits that a Triton program takes at a time."""


def reference(
    logits: torch.Tensor, k: int, renormalise: bool, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`route` by separate operators, as Mixtral (dtype None) and Qwen3-MoE (the logits' dtype) write it."""
    chances = torch.nn.functional.softmax(logits, dim=-1, dtype=wide(logits))
    weights, ids = torch.topk(chances, k, dim=-1)
    if renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights if dtype is None else weights.to(dtype), ids


def wide(logits: torch.Tensor) -> torch.dtype:
    """The dtype of chances: float32, or float64 of such logits."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def route(
    logits: torch.Tensor, k: int, renormalise: bool, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (..., k) and numbers (..., k), int64, of the k experts of logits (..., experts).

    The weights fall. They are of ``dtype``, or float32 where that is None. By the Triton kernels where they apply, else
    by ``reference``. Numbers of experts with equal chances may be others than torch.topk's.
    """
    given = torch.float32 if dtype is None else dtype
    if given in TRITON_NAMES and kernels_apply(logits, k) and runs_on(logits):
        return torch.ops.autopart.route(logits, k, renormalise, given)
    return reference(logits, k, renormalise, dtype)


def bytes_moved(logits: torch.Tensor, k: int, renormalise: bool, dtype: torch.dtype | None = None) -> Bytes:
    chosen = (8 + (dtype or torch.float32).itemsize) * k * (logits.numel() // logits.shape[-1])
    return Bytes(logits.nbytes + chosen, 2 * logits.nbytes + chosen)


def compile_ahead(
    capability: int, experts: int = 8, k: int = 2, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Usage]:
    """Compile both kernels with renormalisation, for float32 weights and compute capability ``capability`` (90 for
    9.0)."""
    return compile_rows((route_kernel, route_backward_kernel), capability, experts, k, dtype)


def compile_rows(
    functions: Iterable[Any], capability: int, experts: int, k: int, dtype: torch.dtype, **options: int
) -> dict[str, Usage]:
    """Compile kernels whose arguments have the names of the router's. Options are constants that take the place of the
    router's: the rows of a program are those of the larger tile."""
    signature = dict.fromkeys(("logits", "dlogits"), f"*{TRITON_NAMES[dtype]}") | {"ids": "*i64"}
    signature |= dict.fromkeys(("weights", "dweights", "mask", "partial", "dchances", "bias"), "*fp32")
    aligned = set(signature)
    signature |= dict.fromkeys(("eps", "scale"), "fp32")
    signature |= dict.fromkeys(("rows", "experts", "stride"), "i32")
    constexprs = {**block(experts), "K": k, "TOP": power_of_two(k), "RENORMALISE": True, "MASK": True, **options}
    return compile_kernels(functions, signature, constexprs, capability, aligned=aligned)


@jit
def probabilities(logits, stride, row, expert, rows, experts):  # type: ignore[no-untyped-def]
    """Softmax in float32, of zeros in rows that are not there."""
    here = (row < rows)[:, None] & (expert < experts)[None, :]
    other = tl.where(expert < experts, 0.0, -float("inf"))[None, :]
    value = tl.load(logits + row[:, None] * stride + expert[None, :], mask=here, other=0.0).to(tl.float32) + other
    value = tl.exp(value - tl.max(value, 1)[:, None])
    return value / tl.sum(value, 1)[:, None]


@jit
def best_of(left, expert, EXPERTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The lowest number among the greatest elements of every row."""
    return tl.min(tl.where(left == tl.max(left, 1)[:, None], expert[None, :], EXPERTS), 1)


@jit
def sortable(value):  # type: ignore[no-untyped-def]
    """Whole numbers above -2**31 in the order of float32 values; those of nan are the greatest."""
    bits = tl.where(value == value, value + 0.0, float("inf")).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@jit
def route_kernel(  # type: ignore[no-untyped-def]
    logits, weights, ids, stride, rows, experts, K: tl.constexpr, TOP: tl.constexpr, RENORMALISE: tl.constexpr,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert, place = tl.arange(0, EXPERTS), tl.arange(0, TOP)
    p = probabilities(logits, stride, row, expert, rows, experts)
    left = tl.where(expert[None, :] < experts, tl.where(p == p, p, 2.0), -1.0)  # rows of nan choose 0, 1, ...
    chosen = tl.zeros((ROWS, TOP), tl.float32)
    for j in range(K):
        best = best_of(left, expert, EXPERTS)
        hit = expert[None, :] == best[:, None]
        left = tl.where(hit, -1.0, left)
        value = tl.sum(tl.where(hit, p, 0.0), 1)
        chosen = tl.where(place[None, :] == j, value[:, None], chosen)
        tl.store(ids + row * K + j, best.to(tl.int64), mask=row < rows)
    if RENORMALISE:
        chosen = chosen / tl.sum(chosen, 1)[:, None]
    here = (row < rows)[:, None] & (place < K)[None, :]
    tl.store(weights + row[:, None] * K + place[None, :], chosen.to(weights.dtype.element_ty), mask=here)


@jit
def route_backward_kernel(  # type: ignore[no-untyped-def]
    dweights, logits, ids, dlogits, stride, rows, experts, K: tl.constexpr, RENORMALISE: tl.constexpr,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS)
    p = probabilities(logits, stride, row, expert, rows, experts)
    g, chosen = tl.zeros((ROWS, EXPERTS), tl.float32), tl.zeros((ROWS, EXPERTS), tl.float32)
    for j in range(K):
        best = tl.load(ids + row * K + j, mask=row < rows, other=0)
        hit = expert[None, :] == best[:, None]
        g += tl.where(hit, tl.load(dweights + row * K + j, mask=row < rows, other=0.0).to(tl.float32)[:, None], 0.0)
        chosen += tl.where(hit, 1.0, 0.0)
    if RENORMALISE:
        p = tl.where(chosen > 0, p, 0.0)
        p = p / tl.sum(p, 1)[:, None]
    g = p * (g - tl.sum(g * p, 1)[:, None])
    here = (row < rows)[:, None] & (expert < experts)[None, :]
    at = dlogits + row[:, None] * experts + expert[None, :]
    tl.store(at, g.to(dlogits.dtype.element_ty), mask=here)


@triton_op("autopart::route", mutates_args=())
def _route(logits: torch.Tensor, k: int, renormalise: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    h, (*leading, experts) = as_rows(logits), logits.shape
    weights = torch.empty(*leading, k, dtype=dtype, device=logits.device)
    ids = torch.empty(*leading, k, dtype=torch.int64, device=logits.device)
    tile = block(experts)
    options = {"K": k, "TOP": power_of_two(k), "RENORMALISE": renormalise}
    programs = -(-len(h) // tile["ROWS"])
    launch(route_kernel, programs, h, weights, ids, h.stride(0), len(h), experts, **options, **tile)
    return weights, ids


@triton_op("autopart::route_backward", mutates_args=())
def _route_backward(dweights: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor, renormalise: bool) -> torch.Tensor:
    h, experts, k = as_rows(logits), logits.shape[-1], ids.shape[-1]
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    tile = block(experts)
    arguments = dweights.contiguous(), h, ids, dlogits, h.stride(0), len(h), experts
    launch(route_backward_kernel, -(-len(h) // tile["ROWS"]), *arguments, K=k, RENORMALISE=renormalise, **tile)
    return dlogits


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.renormalise = inputs[2]
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dweights: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    return torch.ops.autopart.route_backward(dweights, *ctx.saved_tensors, ctx.renormalise), None, None, None


_route.register_autograd(_gradients, setup_context=_save)


def block(experts: int) -> dict[str, int]:
    """Rows and experts in a Triton program."""
    among = power_of_two(experts)
    return {"ROWS": max(ELEMENTS // among, 1), "EXPERTS": among}


def kernels_apply(logits: torch.Tensor, k: int) -> bool:
    """Whether the kernels take logits of this dtype and so many experts."""
    return logits.dtype in TRITON_NAMES and 0 < k <= logits.shape[-1] <= MAX_EXPERTS


KERNEL = Kernel(
    function=route,
    reference=reference,
    rule="... e! -> ... k!, ... k!",
    kept=lambda arguments, outputs: (arguments[0], outputs[1]),
    bytes_moved=bytes_moved,
    ahead=compile_ahead,
    shapes={"Mixtral-8x7B": {"experts": 8, "k": 2}, "Qwen3-30B-A3B": {"experts": 128, "k": 8}},
    on_cpu=False,
)
