"""Routers of mixtures of experts that give every expert a score, the sigmoid of the k greatest logits, in one kernel.

For logits l (t, experts), in float32, in float64 of float64

    s[i]  = 1 / (1 + exp(-l[i]))           of the k greatest logits of a row,  and 0 of all others
    dl[i] = ds[i] s[i] (1 - s[i])          of these, and 0 of all others

Logits and scores are kept, of which the latter say which are chosen. s is computed again, and 1 - s as the sigmoid of
-l, since 1 less a rounded s has no digits. Of equal logits the expert of the lowest number is chosen. For ``itemsize``
bytes of a logit the least traffic in bytes is

    forward   2 itemsize t experts      read logits, write scores
    backward  4 itemsize t experts      read ds, scores and logits, write dl

Source: Meta, The Llama 4 herd, 2025, and its published code.
"""

from __future__ import annotations

from typing import Any

import torch

from autopart.kernels.ahead import Usage
from autopart.kernels.kernel import Bytes, Kernel
from autopart.kernels.launch import as_rows, jit, launch, runs_on, triton_op
from autopart.kernels.router_rows import best_of, block, compile_rows, kernels_apply, sortable, wide

tl: Any = None  # triton.language, which jit binds


def reference(logits: torch.Tensor, k: int) -> torch.Tensor:
    """`route_dense` by separate operators, as Llama 4 writes it."""
    values, ids = torch.topk(logits, k, dim=1)
    scores = torch.full_like(logits, float("-inf")).scatter(1, ids, values)
    return torch.nn.functional.sigmoid(scores.to(wide(logits))).to(scores.dtype)


def route_dense(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Scores of logits (t, experts), of their shape and dtype: sigmoids of the k greatest of a row, 0 of the others.

    By the Triton kernels where they apply, else by ``reference``. Of equal logits others than torch.topk's may be
    chosen.
    """
    if logits.dim() == 2 and kernels_apply(logits, k) and runs_on(logits):
        return torch.ops.autopart.route_dense(logits, k)
    return reference(logits, k)


def bytes_moved(logits: torch.Tensor, k: int) -> Bytes:
    return Bytes(2 * logits.nbytes, 4 * logits.nbytes)


def compile_ahead(
    capability: int, experts: int = 16, k: int = 1, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Usage]:
    """Compile both kernels for compute capability ``capability`` (90 for 9.0)."""
    functions = route_dense_kernel, route_dense_backward_kernel
    return compile_rows(functions, capability, experts, k, dtype)


@jit
def route_dense_kernel(  # type: ignore[no-untyped-def]
    logits, scores, stride, rows, experts, K: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS)
    here = (row < rows)[:, None] & (expert < experts)[None, :]
    value = tl.load(logits + row[:, None] * stride + expert[None, :], mask=here, other=0.0).to(tl.float32)
    left = tl.where(expert[None, :] < experts, sortable(value), -(2**31))
    for _ in range(K):
        hit = expert[None, :] == best_of(left, expert, EXPERTS)[:, None]
        left = tl.where(hit, -(2**31), left)
    score = tl.where(left == -(2**31), tl.sigmoid(value), 0.0)
    tl.store(scores + row[:, None] * experts + expert[None, :], score.to(scores.dtype.element_ty), mask=here)


@jit
def route_dense_backward_kernel(  # type: ignore[no-untyped-def]
    dscores, scores, logits, dlogits, stride, rows, experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS)
    here = (row < rows)[:, None] & (expert < experts)[None, :]
    at = row[:, None] * experts + expert[None, :]
    chosen = tl.load(scores + at, mask=here, other=0.0) != 0.0
    value = tl.load(logits + row[:, None] * stride + expert[None, :], mask=here, other=0.0).to(tl.float32)
    g = tl.load(dscores + at, mask=here, other=0.0).to(tl.float32) * tl.sigmoid(value) * tl.sigmoid(-value)
    tl.store(dlogits + at, tl.where(chosen, g, 0.0).to(dlogits.dtype.element_ty), mask=here)


@triton_op("autopart::route_dense", mutates_args=())
def _route_dense(logits: torch.Tensor, k: int) -> torch.Tensor:
    h, tile = as_rows(logits), block(logits.shape[1])
    scores = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    arguments = h, scores, h.stride(0), *h.shape
    launch(route_dense_kernel, -(-len(h) // tile["ROWS"]), *arguments, K=k, **tile)
    return scores


@triton_op("autopart::route_dense_backward", mutates_args=())
def _route_dense_backward(dscores: torch.Tensor, scores: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    h, tile = as_rows(logits), block(scores.shape[1])
    dlogits = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    arguments = dscores.contiguous(), scores, h, dlogits, h.stride(0), *scores.shape
    launch(route_dense_backward_kernel, -(-len(scores) // tile["ROWS"]), *arguments, **tile)
    return dlogits


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(output, inputs[0])


def _gradients(ctx: Any, dscores: torch.Tensor) -> tuple[torch.Tensor, None]:
    return torch.ops.autopart.route_dense_backward(dscores, *ctx.saved_tensors), None


_route_dense.register_autograd(_gradients, setup_context=_save)


KERNEL = Kernel(
    function=route_dense,
    reference=reference,
    rule="... e! -> ... e!",
    kept=lambda arguments, outputs: (*outputs, arguments[0]),
    bytes_moved=bytes_moved,
    ahead=compile_ahead,
    shapes={"Llama-4-Scout": {"experts": 16, "k": 1}, "Llama-4-Maverick": {"experts": 128, "k": 1}},
    on_cpu=False,
)
