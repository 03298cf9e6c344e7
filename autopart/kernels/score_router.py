"""Routers of mixtures of experts by scores, with a bias of the choice, and groups of experts, in one kernel.

For logits l (t, experts), s = sigmoid(l) or softmax(l), a bias b (experts,), and groups of neighbouring experts

    c       = s + b, and -inf outside of the ``limit`` groups whose greatest c, or two greatest, have the greatest sum
    i       = the numbers i_1 ... i_k of the greatest c
    w_j     = a s[i_j] / D,  S = s[i_1] + ... + s[i_k],  D = S + eps or max(S, eps), or D = 1 where not ``renormalise``
    ds[i_j] = a (dw_j - sum over the k experts of dw s / D) / D,  and 0 for all others
    dl      = ds s (1 - s),  of a softmax s (ds - sum over experts of ds s)

where the first sum is left out without ``renormalise``, and where max(S, eps) is eps. The bias has no gradient. Only
logits and numbers are kept; s is computed again. Of equal c the expert of the lowest number is chosen, and of equal
groups the first. For t rows and ``itemsize`` bytes of a logit and of a weight the least traffic in bytes is

    forward   itemsize (t experts + t k) + 8 t k + b      read logits and bias, write weights and numbers
    backward  itemsize (2 t experts + t k) + 8 t k        read dw, logits and numbers, write dl

Sources: DeepSeek-AI, arXiv 2412.19437, equations 12 to 16, for scores and bias; arXiv 2405.04434, section 2.1.3, for
groups; Baidu, ERNIE 4.5 Technical Report, 2025, for a bias of softmaxes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from autopart.kernels.ahead import Usage
from autopart.kernels.kernel import Bytes, Kernel
from autopart.kernels.launch import as_rows, jit, launch, power_of_two, runs_on, triton_op
from autopart.kernels.router_rows import (
    ELEMENTS,
    MAX_EXPERTS,
    best_of,
    block,
    compile_rows,
    kernels_apply,
    probabilities,
    sortable,
)

tl: Any = None  # triton.language, which jit binds


class Style(NamedTuple):
    """How a model writes its router.

    soft      whether scores are a softmax, not sigmoids
    lead      how many of a group's greatest scores are its sum: 1 or 2
    fill      the score of experts outside of the best groups
    gathered  whether weights are gathered from scores, not the greatest values themselves
    clamped   whether a sum below eps counts as eps, where others add eps
    """

    soft: bool = False
    lead: int = 2
    fill: float = float("-inf")
    gathered: bool = True
    clamped: bool = False


STYLES = {
    "deepseek_v3": Style(),
    "deepseek_v2": Style(soft=True, lead=1, fill=0.0, gathered=False),
    "mistral4": Style(soft=True, fill=0.0),
    "ernie4_5": Style(soft=True, clamped=True),
}
"""Model of transformers -> how it writes its router. Where scores outside of the best groups are 0, an expert there is
chosen only beside others whose scores are 0 too: then its weight is 0."""


def reference(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    k: int,
    groups: int | None,
    limit: int | None,
    renormalise: bool,
    eps: float,
    scale: float,
    style: str = "deepseek_v3",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`route_scores` by separate operators, as models write it; without groups as MiniMax-M2."""
    wanted = STYLES[style]
    scores = logits.softmax(-1) if wanted.soft else logits.sigmoid()
    choice = scores if bias is None else scores + bias
    if groups is not None and limit is not None:
        choice = _within_groups(choice, groups, limit, wanted)
    values, ids = torch.topk(choice, k, dim=-1)
    weights = scores.gather(-1, ids) if wanted.gathered else values
    if renormalise:
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / (torch.clamp(total, min=eps) if wanted.clamped else total + eps if eps else total)
    return weights if scale == 1.0 else weights * scale, ids


def _within_groups(choice: torch.Tensor, groups: int, limit: int, style: Style) -> torch.Tensor:
    """Choice (t, experts), and the style's fill outside of the groups of the greatest sums."""
    rows, experts = choice.shape
    parts = choice.view(rows, groups, experts // groups)
    sums = parts.max(dim=-1).values if style.lead == 1 else parts.topk(2, dim=-1)[0].sum(dim=-1)
    _, best = torch.topk(sums, limit, dim=-1)
    chosen = torch.zeros_like(sums).scatter(1, best, 1).unsqueeze(-1)
    chosen = chosen.expand(-1, groups, experts // groups).reshape(rows, experts)
    return choice.masked_fill(~chosen.bool(), style.fill)


def route_scores(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    k: int,
    groups: int | None,
    limit: int | None,
    renormalise: bool,
    eps: float,
    scale: float,
    style: str = "deepseek_v3",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (..., k) in the logits' dtype and numbers (..., k), int64, of the k experts of logits (..., experts).

    bias         (experts,), added to scores for the choice alone; None: none
    groups       of experts, of which a row chooses from ``limit``; None: all experts are one group
    renormalise  whether weights are divided by their sum and ``eps``
    scale        what weights are multiplied by
    style        of `STYLES`: which scores, and how groups and sums are made

    Scores plus bias fall. By the Triton kernels where they apply, else by ``reference``. Numbers of experts with equal
    scores may be others than torch.topk's.
    """
    wanted = STYLES[style]
    if _kernels_apply(logits, bias, k, groups, wanted.lead) and runs_on(logits, *(() if bias is None else (bias,))):
        tile = groups or 1, limit or 1
        constants = (renormalise, eps, wanted.clamped, scale, False, logits.dtype)
        return torch.ops.autopart.route_scores(logits, bias, k, *tile, wanted.soft, wanted.lead, *constants)
    return reference(logits, bias, k, groups, limit, renormalise, eps, scale, style)


def _kernels_apply(logits: torch.Tensor, bias: torch.Tensor | None, k: int, groups: int | None, lead: int) -> bool:
    """Whether the kernels take these dtypes, so many experts, and these groups."""
    experts, count = logits.shape[-1], groups or 1
    even = experts % count == 0 and (count == 1 or experts // count >= lead)
    known = kernels_apply(logits, k) and (bias is None or (bias.dtype == torch.float32 and bias.shape == (experts,)))
    return known and even and power_of_two(count) * power_of_two(experts // count) <= MAX_EXPERTS


def bytes_moved(logits: torch.Tensor, bias: torch.Tensor | None, k: int, *constants: object) -> Bytes:
    chosen = (8 + logits.itemsize) * k * (logits.numel() // logits.shape[-1])
    return Bytes(logits.nbytes + (0 if bias is None else bias.nbytes) + chosen, 2 * logits.nbytes + chosen)


def compile_ahead(
    capability: int, experts: int = 256, k: int = 8, groups: int = 8, limit: int = 4,
    dtype: torch.dtype = torch.float32, soft: bool = False, lead: int = 2,
) -> dict[str, Usage]:  # fmt: skip
    """Compile both kernels with renormalisation, for compute capability ``capability`` (90 for 9.0)."""
    return compile_scores(capability, experts, k, dtype, soft, groups, limit, lead)


def compile_scores(
    capability: int, experts: int, k: int, dtype: torch.dtype, soft: bool, groups: int = 1, limit: int = 1,
    lead: int = 2,
) -> dict[str, Usage]:  # fmt: skip
    """`compile_ahead`; of a softmax without a bias."""
    functions, tile = (route_scores_kernel, route_scores_backward_kernel), _grouped(experts, groups)
    flags = {"SOFT": soft, "LEAD": lead, "BIAS": not soft, "CLAMP": False, "WIDE": soft}
    return compile_rows(functions, capability, experts, k, dtype, LIMIT=limit, **flags, **tile)


@jit
def of_best_groups(  # type: ignore[no-untyped-def]
    choice, GROUPS, LIMIT, LEAD: tl.constexpr, ROWS: tl.constexpr, ACROSS: tl.constexpr, WITHIN: tl.constexpr
):
    """1 for the experts of the LIMIT groups whose LEAD greatest elements have the greatest sum, else 0."""
    among = tl.reshape(choice, (ROWS, ACROSS, WITHIN))
    inside, group = tl.arange(0, WITHIN), tl.arange(0, ACROSS)
    total = tl.max(among, 2)
    if LEAD == 2:
        lead = tl.min(tl.where(among == total[:, :, None], inside[None, None, :], WITHIN), 2)
        total += tl.max(tl.where(inside[None, None, :] == lead[:, :, None], -float("inf"), among), 2)
    left = tl.where(group[None, :] < GROUPS, sortable(total), -(2**31))
    chosen = tl.zeros((ROWS, ACROSS), tl.float32)
    for _ in range(LIMIT):
        hit = group[None, :] == best_of(left, group, ACROSS)[:, None]
        left = tl.where(hit, -(2**31), left)
        chosen = tl.where(hit, 1.0, chosen)
    return tl.reshape(tl.broadcast_to(chosen[:, :, None], (ROWS, ACROSS, WITHIN)), (ROWS, ACROSS * WITHIN))


@jit
def route_scores_kernel(  # type: ignore[no-untyped-def]
    logits, bias, weights, ids, stride, rows, eps, scale, K: tl.constexpr, TOP: tl.constexpr,
    RENORMALISE: tl.constexpr, GROUPS: tl.constexpr, LIMIT: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    ACROSS: tl.constexpr, WITHIN: tl.constexpr, SOFT: tl.constexpr, LEAD: tl.constexpr, BIAS: tl.constexpr,
    CLAMP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """SIZE experts a group: element a WITHIN + b of a row is expert a SIZE + b. WIDE: scores are not rounded."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    eps, scale = tl.cast(eps, tl.float32), tl.cast(scale, tl.float32)
    at, place = tl.arange(0, ACROSS * WITHIN), tl.arange(0, TOP)
    expert = at // WITHIN * SIZE + at % WITHIN
    there = (at // WITHIN < GROUPS) & (at % WITHIN < SIZE)
    here = (row < rows)[:, None] & there[None, :]
    value = tl.load(logits + row[:, None] * stride + expert[None, :], mask=here, other=0.0).to(tl.float32)
    if SOFT:
        value += tl.where(there, 0.0, -float("inf"))[None, :]
        value = tl.exp(value - tl.max(value, 1)[:, None])
        score = value / tl.sum(value, 1)[:, None]
    else:
        score = tl.sigmoid(value)
    score = score if WIDE else score.to(logits.dtype.element_ty).to(tl.float32)
    choice = score + tl.load(bias + expert, mask=there, other=0.0)[None, :] if BIAS else score
    choice = tl.where(there[None, :], tl.where(choice == choice, choice, float("inf")), -float("inf"))
    if LIMIT < GROUPS:
        choice = tl.where(of_best_groups(choice, GROUPS, LIMIT, LEAD, ROWS, ACROSS, WITHIN) > 0, choice, -float("inf"))
    left = tl.where(there[None, :], sortable(choice), -(2**31))
    chosen = tl.zeros((ROWS, TOP), tl.float32)
    for j in range(K):
        best = best_of(left, expert, GROUPS * SIZE)
        hit = (expert[None, :] == best[:, None]) & there[None, :]
        left = tl.where(hit, -(2**31), left)
        chosen = tl.where(place[None, :] == j, tl.sum(tl.where(hit, score, 0.0), 1)[:, None], chosen)
        tl.store(ids + row * K + j, best.to(tl.int64), mask=row < rows)
    if RENORMALISE:
        total = tl.sum(chosen, 1)[:, None]
        chosen = chosen / (tl.where(total < eps, eps, total) if CLAMP else total + eps)
    here = (row < rows)[:, None] & (place < K)[None, :]
    out = weights + row[:, None] * K + place[None, :]
    tl.store(out, (chosen * scale).to(weights.dtype.element_ty), mask=here)


@jit
def route_scores_backward_kernel(  # type: ignore[no-untyped-def]
    dweights, logits, ids, dlogits, stride, rows, experts, eps, scale, K: tl.constexpr, RENORMALISE: tl.constexpr,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, SOFT: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    eps, scale = tl.cast(eps, tl.float32), tl.cast(scale, tl.float32)
    expert = tl.arange(0, EXPERTS)
    g, chosen = tl.zeros((ROWS, EXPERTS), tl.float32), tl.zeros((ROWS, EXPERTS), tl.float32)
    for j in range(K):
        number = tl.load(ids + row * K + j, mask=row < rows, other=0)
        hit = expert[None, :] == number[:, None]
        given = tl.load(dweights + row * K + j, mask=row < rows, other=0.0).to(tl.float32)
        g += tl.where(hit, given[:, None], 0.0)
        chosen += tl.where(hit, 1.0, 0.0)
    here = (row < rows)[:, None] & (expert < experts)[None, :]
    if SOFT:
        score = probabilities(logits, stride, row, expert, rows, experts)
    else:
        value = tl.load(logits + row[:, None] * stride + expert[None, :], mask=here, other=0.0).to(tl.float32)
        score = tl.sigmoid(value)
    rest = tl.sum(g * score, 1)[:, None]
    if RENORMALISE:
        total = tl.sum(tl.where(chosen > 0, score, 0.0), 1)[:, None]
        divisor = tl.where(total < eps, eps, total) if CLAMP else total + eps
        live = tl.where(total < eps, 0.0, 1.0) if CLAMP else 1.0
        g = (g - live * rest / divisor) / divisor
        rest = rest / divisor * (1.0 - live * total / divisor)
    g = tl.where(chosen > 0, g, 0.0)
    g = scale * (score * (g - rest) if SOFT else g * score * (1 - score))
    tl.store(dlogits + row[:, None] * experts + expert[None, :], g.to(dlogits.dtype.element_ty), mask=here)


@triton_op("autopart::route_scores", mutates_args=())
def _route_scores(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    k: int,
    groups: int,
    limit: int,
    soft: bool,
    lead: int,
    renormalise: bool,
    eps: float,
    clamped: bool,
    scale: float,
    wide: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    h, (*leading, experts) = as_rows(logits), logits.shape
    weights = torch.empty(*leading, k, dtype=dtype, device=logits.device)
    ids = torch.empty(*leading, k, dtype=torch.int64, device=logits.device)
    tile = _grouped(experts, groups)
    options = {"K": k, "TOP": power_of_two(k), "RENORMALISE": renormalise, "LIMIT": limit, **tile}
    options |= {"SOFT": soft, "LEAD": lead, "BIAS": bias is not None, "CLAMP": clamped, "WIDE": wide}
    arguments = h, h if bias is None else bias.contiguous(), weights, ids, h.stride(0), len(h), eps, scale
    launch(route_scores_kernel, -(-len(h) // tile["ROWS"]), *arguments, **options)
    return weights, ids


@triton_op("autopart::route_scores_backward", mutates_args=())
def _route_scores_backward(
    dweights: torch.Tensor,
    logits: torch.Tensor,
    ids: torch.Tensor,
    soft: bool,
    renormalise: bool,
    eps: float,
    clamped: bool,
    scale: float,
) -> torch.Tensor:
    h, experts, k = as_rows(logits), logits.shape[-1], ids.shape[-1]
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    arguments = dweights.contiguous(), h, ids, dlogits, h.stride(0), len(h), experts, eps, scale
    options = {"K": k, "RENORMALISE": renormalise, "SOFT": soft, "CLAMP": clamped, **block(experts)}
    launch(route_scores_backward_kernel, -(-len(h) // options["ROWS"]), *arguments, **options)
    return dlogits


def _grouped(experts: int, groups: int) -> dict[str, int]:
    """Groups, experts in each, and rows, groups and experts of a group in a Triton program."""
    across, within = power_of_two(groups), power_of_two(experts // groups)
    rows = max(ELEMENTS // (across * within), 1)
    return {"GROUPS": groups, "SIZE": experts // groups, "ROWS": rows, "ACROSS": across, "WITHIN": within}


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.constants = inputs[5], *inputs[7:11]
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dweights: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return torch.ops.autopart.route_scores_backward(dweights, *ctx.saved_tensors, *ctx.constants), *[None] * 12


_route_scores.register_autograd(_gradients, setup_context=_save)


def rule(args: tuple[Any, ...], outputs: object) -> str:
    """The row, with a bias or without."""
    return f"... e!, {'-' if args[1] is None else 'e!'} -> ... k!, ... k!"


KERNEL = Kernel(
    function=route_scores,
    reference=reference,
    rule=rule,
    kept=lambda arguments, outputs: (arguments[0], outputs[1]),
    bytes_moved=bytes_moved,
    ahead=compile_ahead,
    shapes={
        "DeepSeek-V3": {"experts": 256, "k": 8, "groups": 8, "limit": 4},
        "GLM-4.5": {"experts": 160, "k": 8, "groups": 1, "limit": 1},
        "DeepSeek-V2": {"experts": 160, "k": 6, "groups": 8, "limit": 3, "soft": True, "lead": 1},
    },
    no_gradient=(1,),
    on_cpu=False,
)
