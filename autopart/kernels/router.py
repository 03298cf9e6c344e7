"""Routers of mixtures of experts: softmax, top k and renormalisation, by the kernels of
`autopart.kernels.score_router`.

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

import torch

from autopart.kernels.ahead import Usage
from autopart.kernels.kernel import Bytes, Kernel
from autopart.kernels.launch import TRITON_NAMES, runs_on
from autopart.kernels.router_rows import kernels_apply, wide
from autopart.kernels.score_router import compile_scores


def reference(
    logits: torch.Tensor, k: int, renormalise: bool, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`route` by separate operators, as Mixtral (dtype None) and Qwen3-MoE (the logits' dtype) write it."""
    chances = torch.nn.functional.softmax(logits, dim=-1, dtype=wide(logits))
    weights, ids = torch.topk(chances, k, dim=-1)
    if renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights if dtype is None else weights.to(dtype), ids


def route(
    logits: torch.Tensor, k: int, renormalise: bool, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (..., k) and numbers (..., k), int64, of the k experts of logits (..., experts).

    The weights fall. They are of ``dtype``, or float32 where that is None. By the Triton kernels where they apply, else
    by ``reference``. Numbers of experts with equal chances may be others than torch.topk's.
    """
    given = torch.float32 if dtype is None else dtype
    if given in TRITON_NAMES and kernels_apply(logits, k) and runs_on(logits):
        constants = (1, 1, True, 1, renormalise, 0.0, False, 1.0, True, given)
        return torch.ops.autopart.route_scores(logits, None, k, *constants)
    return reference(logits, k, renormalise, dtype)


def bytes_moved(logits: torch.Tensor, k: int, renormalise: bool, dtype: torch.dtype | None = None) -> Bytes:
    chosen = (8 + (dtype or torch.float32).itemsize) * k * (logits.numel() // logits.shape[-1])
    return Bytes(logits.nbytes + chosen, 2 * logits.nbytes + chosen)


def compile_ahead(
    capability: int, experts: int = 8, k: int = 2, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Usage]:
    """Compile both kernels with renormalisation, for float32 weights and compute capability ``capability`` (90 for
    9.0)."""
    return compile_scores(capability, experts, k, dtype, True)


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
