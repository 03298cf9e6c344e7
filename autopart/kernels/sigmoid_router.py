"""Routers of mixtures of experts with sigmoid scores, a bias of the choice, and groups of experts, in one kernel.

For logits l (t, experts), a bias b (experts,), s = sigmoid(l), and groups of neighbouring experts

    c       = s + b, and -inf outside of the ``limit`` groups whose two greatest c have the greatest sum
    i       = the numbers i_1 ... i_k of the greatest c
    w_j     = a s[i_j] / D,  D = s[i_1] + ... + s[i_k] + eps, or D = 1 where not ``renormalise``
    dl[i_j] = a s (1 - s) (dw_j - sum over the k experts of dw s / D) / D at i_j,  and 0 for all others

where without ``renormalise`` the sum is left out. The bias has no gradient. Only logits and numbers are kept; s is
computed again. Of equal c the expert of the lowest number is chosen, and of equal groups the first. For t rows and
``itemsize`` bytes of a logit and of a weight the least traffic in bytes is

    forward   itemsize (t experts + t k) + 8 t k + b      read logits and bias, write weights and numbers
    backward  itemsize (2 t experts + t k) + 8 t k        read dw, logits and numbers, write dl

Sources: DeepSeek-AI, arXiv 2412.19437, equations 12 to 16, for scores and bias; arXiv 2405.04434, section 2.1.3, for
groups.
"""

from __future__ import annotations

from typing import Any

import torch

from autopart.kernels.ahead import Usage
from autopart.kernels.kernel import Bytes, Kernel
from autopart.kernels.launch import as_rows, jit, launch, power_of_two, runs_on, triton_op
from autopart.kernels.router import ELEMENTS, MAX_EXPERTS, best_of, block, compile_rows, kernels_apply, sortable

tl: Any = None  # triton.language, which jit binds


def reference(
    logits: torch.Tensor,
    bias: torch.Tensor,
    k: int,
    groups: int | None,
    limit: int | None,
    renormalise: bool,
    eps: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`route_sigmoid` by separate operators, as DeepSeek-V3 writes it, or MiniMax-M2 where ``groups`` is None."""
    scores = logits.sigmoid()
    choice = scores + bias
    if groups is not None and limit is not None:
        choice = _within_groups(choice, groups, limit)
    _, ids = torch.topk(choice, k, dim=-1)
    weights = scores.gather(-1, ids)
    if renormalise:
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / (total + eps if eps else total)
    return weights if scale == 1.0 else weights * scale, ids


def _within_groups(choice: torch.Tensor, groups: int, limit: int) -> torch.Tensor:
    """Choice (t, experts), and -inf outside of the groups of the greatest sums of two."""
    rows, experts = choice.shape
    sums = choice.view(rows, groups, experts // groups).topk(2, dim=-1)[0].sum(dim=-1)
    _, best = torch.topk(sums, limit, dim=-1)
    chosen = torch.zeros_like(sums).scatter(1, best, 1).unsqueeze(-1)
    chosen = chosen.expand(-1, groups, experts // groups).reshape(rows, experts)
    return choice.masked_fill(~chosen.bool(), float("-inf"))


def route_sigmoid(
    logits: torch.Tensor,
    bias: torch.Tensor,
    k: int,
    groups: int | None,
    limit: int | None,
    renormalise: bool,
    eps: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (..., k) in the logits' dtype and numbers (..., k), int64, of the k experts of logits (..., experts).

    bias         (experts,), added to scores for the choice alone
    groups       of experts, of which a row chooses from ``limit``; None: all experts are one group
    renormalise  whether weights are divided by their sum and ``eps``
    scale        what weights are multiplied by

    Scores plus bias fall. By the Triton kernels where they apply, else by ``reference``. Numbers of experts with equal
    scores may be others than torch.topk's.
    """
    if _kernels_apply(logits, bias, k, groups) and runs_on(logits, bias):
        return torch.ops.autopart.route_sigmoid(logits, bias, k, groups or 1, limit or 1, renormalise, eps, scale)
    return reference(logits, bias, k, groups, limit, renormalise, eps, scale)


def _kernels_apply(logits: torch.Tensor, bias: torch.Tensor, k: int, groups: int | None) -> bool:
    """Whether the kernels take these dtypes, so many experts, and these groups."""
    experts, count = logits.shape[-1], groups or 1
    even = experts % count == 0 and (count == 1 or experts // count > 1)
    known = kernels_apply(logits, k) and bias.dtype == torch.float32 and bias.shape == (experts,)
    return known and even and power_of_two(count) * power_of_two(experts // count) <= MAX_EXPERTS


def bytes_moved(logits: torch.Tensor, bias: torch.Tensor, k: int, *constants: object) -> Bytes:
    chosen = (8 + logits.itemsize) * k * (logits.numel() // logits.shape[-1])
    return Bytes(logits.nbytes + bias.nbytes + chosen, 2 * logits.nbytes + chosen)


def compile_ahead(
    capability: int, experts: int = 256, k: int = 8, groups: int = 8, limit: int = 4, dtype: torch.dtype = torch.float32
) -> dict[str, Usage]:
    """Compile both kernels with renormalisation, for compute capability ``capability`` (90 for 9.0)."""
    functions, tile = (route_sigmoid_kernel, route_sigmoid_backward_kernel), _grouped(experts, groups)
    return compile_rows(functions, capability, experts, k, dtype, LIMIT=limit, **tile)


@jit
def of_best_groups(choice, GROUPS, LIMIT, ROWS: tl.constexpr, ACROSS: tl.constexpr, WITHIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """1 for the experts of the LIMIT groups whose two greatest elements have the greatest sum, else 0."""
    among = tl.reshape(choice, (ROWS, ACROSS, WITHIN))
    inside, group = tl.arange(0, WITHIN), tl.arange(0, ACROSS)
    first = tl.max(among, 2)
    lead = tl.min(tl.where(among == first[:, :, None], inside[None, None, :], WITHIN), 2)
    second = tl.max(tl.where(inside[None, None, :] == lead[:, :, None], -float("inf"), among), 2)
    left = tl.where(group[None, :] < GROUPS, sortable(first + second), -(2**31))
    chosen = tl.zeros((ROWS, ACROSS), tl.float32)
    for _ in range(LIMIT):
        hit = group[None, :] == best_of(left, group, ACROSS)[:, None]
        left = tl.where(hit, -(2**31), left)
        chosen = tl.where(hit, 1.0, chosen)
    return tl.reshape(tl.broadcast_to(chosen[:, :, None], (ROWS, ACROSS, WITHIN)), (ROWS, ACROSS * WITHIN))


@jit
def route_sigmoid_kernel(  # type: ignore[no-untyped-def]
    logits, bias, weights, ids, stride, rows, eps, scale, K: tl.constexpr, TOP: tl.constexpr,
    RENORMALISE: tl.constexpr, GROUPS: tl.constexpr, LIMIT: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    ACROSS: tl.constexpr, WITHIN: tl.constexpr,
):  # fmt: skip
    """SIZE experts a group: element a WITHIN + b of a row is expert a SIZE + b."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at, place = tl.arange(0, ACROSS * WITHIN), tl.arange(0, TOP)
    expert = at // WITHIN * SIZE + at % WITHIN
    there = (at // WITHIN < GROUPS) & (at % WITHIN < SIZE)
    here = (row < rows)[:, None] & there[None, :]
    value = tl.load(logits + row[:, None] * stride + expert[None, :], mask=here, other=0.0).to(tl.float32)
    score = tl.sigmoid(value).to(logits.dtype.element_ty).to(tl.float32)
    choice = score + tl.load(bias + expert, mask=there, other=0.0)[None, :]
    choice = tl.where(there[None, :], tl.where(choice == choice, choice, float("inf")), -float("inf"))
    if LIMIT < GROUPS:
        choice = tl.where(of_best_groups(choice, GROUPS, LIMIT, ROWS, ACROSS, WITHIN) > 0, choice, -float("inf"))
    left = tl.where(there[None, :], sortable(choice), -(2**31))
    chosen = tl.zeros((ROWS, TOP), tl.float32)
    for j in range(K):
        best = best_of(left, expert, GROUPS * SIZE)
        hit = (expert[None, :] == best[:, None]) & there[None, :]
        left = tl.where(hit, -(2**31), left)
        chosen = tl.where(place[None, :] == j, tl.sum(tl.where(hit, score, 0.0), 1)[:, None], chosen)
        tl.store(ids + row * K + j, best.to(tl.int64), mask=row < rows)
    if RENORMALISE:
        chosen = chosen / (tl.sum(chosen, 1)[:, None] + eps)
    here = (row < rows)[:, None] & (place < K)[None, :]
    out = weights + row[:, None] * K + place[None, :]
    tl.store(out, (chosen * scale).to(weights.dtype.element_ty), mask=here)


@jit
def route_sigmoid_backward_kernel(  # type: ignore[no-untyped-def]
    dweights, logits, ids, dlogits, stride, rows, experts, eps, scale, K: tl.constexpr, RENORMALISE: tl.constexpr,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS)
    g, chosen = tl.zeros((ROWS, EXPERTS), tl.float32), tl.zeros((ROWS, EXPERTS), tl.float32)
    for j in range(K):
        number = tl.load(ids + row * K + j, mask=row < rows, other=0)
        hit = expert[None, :] == number[:, None]
        given = tl.load(dweights + row * K + j, mask=row < rows, other=0.0).to(tl.float32)
        g += tl.where(hit, given[:, None], 0.0)
        chosen += tl.where(hit, 1.0, 0.0)
    here = (row < rows)[:, None] & (expert < experts)[None, :]
    value = tl.load(logits + row[:, None] * stride + expert[None, :], mask=here, other=0.0).to(tl.float32)
    score = tl.sigmoid(value)
    if RENORMALISE:
        total = (tl.sum(tl.where(chosen > 0, score, 0.0), 1) + eps)[:, None]
        g = (g - tl.sum(g * score, 1)[:, None] / total) / total
    g = tl.where(chosen > 0, scale * g * score * (1 - score), 0.0)
    tl.store(dlogits + row[:, None] * experts + expert[None, :], g.to(dlogits.dtype.element_ty), mask=here)


@triton_op("autopart::route_sigmoid", mutates_args=())
def _route_sigmoid(
    logits: torch.Tensor,
    bias: torch.Tensor,
    k: int,
    groups: int,
    limit: int,
    renormalise: bool,
    eps: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    h, (*leading, experts) = as_rows(logits), logits.shape
    weights = torch.empty(*leading, k, dtype=logits.dtype, device=logits.device)
    ids = torch.empty(*leading, k, dtype=torch.int64, device=logits.device)
    tile = _grouped(experts, groups)
    options = {"K": k, "TOP": power_of_two(k), "RENORMALISE": renormalise, "LIMIT": limit, **tile}
    arguments = h, bias.contiguous(), weights, ids, h.stride(0), len(h), eps, scale
    launch(route_sigmoid_kernel, -(-len(h) // tile["ROWS"]), *arguments, **options)
    return weights, ids


@triton_op("autopart::route_sigmoid_backward", mutates_args=())
def _route_sigmoid_backward(
    dweights: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor, renormalise: bool, eps: float, scale: float
) -> torch.Tensor:
    h, experts, k = as_rows(logits), logits.shape[-1], ids.shape[-1]
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    tile = block(experts)
    arguments = dweights.contiguous(), h, ids, dlogits, h.stride(0), len(h), experts, eps, scale
    programs = -(-len(h) // tile["ROWS"])
    launch(route_sigmoid_backward_kernel, programs, *arguments, K=k, RENORMALISE=renormalise, **tile)
    return dlogits


def _grouped(experts: int, groups: int) -> dict[str, int]:
    """Groups, experts in each, and rows, groups and experts of a group in a Triton program."""
    across, within = power_of_two(groups), power_of_two(experts // groups)
    rows = max(ELEMENTS // (across * within), 1)
    return {"GROUPS": groups, "SIZE": experts // groups, "ROWS": rows, "ACROSS": across, "WITHIN": within}


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.constants = inputs[5:]
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dweights: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return torch.ops.autopart.route_sigmoid_backward(dweights, *ctx.saved_tensors, *ctx.constants), *[None] * 7


_route_sigmoid.register_autograd(_gradients, setup_context=_save)


KERNEL = Kernel(
    function=route_sigmoid,
    reference=reference,
    rule="... e!, e! -> ... k!, ... k!",
    kept=lambda arguments, outputs: (arguments[0], outputs[1]),
    bytes_moved=bytes_moved,
    ahead=compile_ahead,
    shapes={
        "DeepSeek-V3": {"experts": 256, "k": 8, "groups": 8, "limit": 4},
        "GLM-4.5": {"experts": 160, "k": 8, "groups": 1, "limit": 1},
    },
    no_gradient=(1,),
    on_cpu=False,
)
