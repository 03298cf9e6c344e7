"""How much the experts of a mixture are used, and the load-balancing loss of it.

For logits l (t, experts), p = softmax(l), and m a row's mask, or 1,

    tokens[e]  = sum over rows of m [e is among the k experts of the greatest p]
    chances[e] = sum over rows of m p[e]
    dl = m p (dchances - sum over experts of dchances p)

Only logits and mask are kept; p is computed again. Of equal p the expert of the lowest number counts. The loss of the
rows of all layers together is

    loss = experts sum over e of (tokens[e] / rows) (chances[e] / rows)

For t rows and ``itemsize`` bytes of a logit the least traffic in bytes, with m = 4 t for a mask, is

    forward   itemsize t experts + m + 8 experts      read logits and mask, write tokens and chances
    backward  2 itemsize t experts + m + 4 experts    read logits, mask and dchances, write dl

The partial sums, two float32 rows for each Triton program, are left out: they do not grow with t.

Source: Fedus et al., arXiv 2101.03961, equations 4 to 6, in the form of transformers' load_balancing_loss_func.
"""

from __future__ import annotations

from typing import Any

import torch

from autopart.kernels import router
from autopart.kernels.ahead import Usage
from autopart.kernels.kernel import Bytes, Kernel
from autopart.kernels.launch import as_rows, jit, launch, processors, runs_on, triton_op
from autopart.kernels.router_rows import best_of, block, compile_rows, kernels_apply, probabilities, wide

tl: Any = None  # triton.language, which jit binds


def reference(logits: torch.Tensor, mask: torch.Tensor | None, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`expert_load` by separate operators, as transformers' load_balancing_loss_func writes it."""
    chances = torch.nn.functional.softmax(logits, dim=-1)
    experts = logits.shape[-1]
    _, ids = torch.topk(chances, k, dim=-1)
    if mask is None:
        kind = torch.int32 if logits.is_cuda else torch.float32
        tokens = torch.histc(ids.reshape(-1).to(kind), bins=experts, min=0, max=experts).float()
        return tokens, chances.to(wide(logits)).sum(dim=0)
    tokens = torch.zeros(experts, dtype=torch.float32, device=logits.device)
    tokens = tokens.scatter_add(0, ids.reshape(-1), mask.repeat_interleave(k))
    return tokens, (chances.to(wide(logits)) * mask.unsqueeze(-1)).sum(dim=0)


def expert_load(logits: torch.Tensor, mask: torch.Tensor | None, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (experts,) and chances (experts,), float32, of logits (t, experts) and a mask (t,), float32.

    The chances are those of a softmax in the logits' dtype. By the Triton kernels where they apply, else by
    ``reference``.
    """
    given = (logits,) if mask is None else (logits, mask)
    masked = mask is None or (mask.dtype == torch.float32 and mask.shape == logits.shape[:1])
    if logits.dim() == 2 and masked and kernels_apply(logits, k) and runs_on(*given):
        return torch.ops.autopart.expert_load(logits, mask, k)
    return reference(logits, mask, k)


def bytes_moved(logits: torch.Tensor, mask: torch.Tensor | None, k: int) -> Bytes:
    rows, experts = 0 if mask is None else mask.nbytes, logits.shape[-1]
    return Bytes(logits.nbytes + rows + 8 * experts, 2 * logits.nbytes + rows + 4 * experts)


def compile_ahead(
    capability: int, experts: int = 8, k: int = 2, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Usage]:
    """Compile both kernels with a mask, for compute capability ``capability`` (90 for 9.0)."""
    return compile_rows((load, load_backward), capability, experts, k, dtype)


@jit
def load(  # type: ignore[no-untyped-def]
    logits, mask, partial, stride, rows, experts, K: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
):  # fmt: skip
    """Every program's sums for its rows; partial is (programs, 2, experts)."""
    program, expert = tl.program_id(0), tl.arange(0, EXPERTS)
    tokens, chances = tl.zeros((EXPERTS,), tl.float32), tl.zeros((EXPERTS,), tl.float32)
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        m = tl.where(row < rows, 1.0, 0.0)
        if MASK:
            m = tl.load(mask + row, mask=row < rows, other=0.0)
        p = probabilities(logits, stride, row, expert, rows, experts)
        p = p.to(logits.dtype.element_ty).to(tl.float32)
        left = tl.where(expert[None, :] < experts, tl.where(p == p, p, 2.0), -1.0)
        for _ in range(K):
            hit = expert[None, :] == best_of(left, expert, EXPERTS)[:, None]
            left = tl.where(hit, -1.0, left)
        tokens += tl.sum(tl.where((left < 0) & (expert < experts)[None, :], m[:, None], 0.0), 0)
        chances += tl.sum(tl.where((row < rows)[:, None], p * m[:, None], 0.0), 0)
    at = partial + program * 2 * experts + expert
    tl.store(at, tokens, mask=expert < experts)
    tl.store(at + experts, chances, mask=expert < experts)


@jit
def load_backward(  # type: ignore[no-untyped-def]
    dchances, logits, mask, dlogits, stride, rows, experts, MASK: tl.constexpr, ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS)
    p = probabilities(logits, stride, row, expert, rows, experts)
    g = tl.load(dchances + expert, mask=expert < experts, other=0.0)[None, :]
    if MASK:
        g = g * tl.load(mask + row, mask=row < rows, other=0.0)[:, None]
    g = p * (g - tl.sum(g * p, 1)[:, None])
    here = (row < rows)[:, None] & (expert < experts)[None, :]
    at = dlogits + row[:, None] * experts + expert[None, :]
    tl.store(at, g.to(dlogits.dtype.element_ty), mask=here)


@triton_op("autopart::expert_load", mutates_args=())
def _forward(logits: torch.Tensor, mask: torch.Tensor | None, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    h, experts, tile = as_rows(logits), logits.shape[-1], block(logits.shape[-1])
    programs = min(-(-len(h) // tile["ROWS"]), processors(logits.device) * 2)
    partial = torch.empty(programs, 2, experts, dtype=torch.float32, device=logits.device)
    arguments = h, h if mask is None else mask.contiguous(), partial, h.stride(0), len(h), experts
    launch(load, programs, *arguments, K=k, MASK=mask is not None, **tile)
    return partial[:, 0].sum(0), partial[:, 1].sum(0)


@triton_op("autopart::expert_load_backward", mutates_args=())
def _backward(dchances: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    h, experts, tile = as_rows(logits), logits.shape[-1], block(logits.shape[-1])
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    m = h if mask is None else mask.contiguous()
    arguments = dchances.contiguous(), h, m, dlogits, h.stride(0), len(h), experts
    launch(load_backward, -(-len(h) // tile["ROWS"]), *arguments, MASK=mask is not None, **tile)
    return dlogits


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.mark_non_differentiable(output[0])


def _gradients(ctx: Any, _: torch.Tensor, dchances: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return torch.ops.autopart.expert_load_backward(dchances, *ctx.saved_tensors), None, None


_forward.register_autograd(_gradients, setup_context=_save)


KERNEL = Kernel(
    function=expert_load,
    reference=reference,
    rule="t e!, t -> e!, e!",
    kept=lambda arguments, outputs: tuple(t for t in arguments[:2] if t is not None),
    bytes_moved=bytes_moved,
    ahead=compile_ahead,
    shapes=router.KERNEL.shapes,
    no_gradient=(1,),
    on_cpu=False,
)
