"""Mixtures of experts: products of tokens with the weights of the experts that a router gave the tokens to."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autopart.kernels.clamped_experts import clamped_experts
from autopart.kernels.experts import experts
from autopart.runtime.process_group import Group

ALIGNMENT = 16
"""torch's grouped product takes rows that start at multiples of so many bytes."""


def own_experts(
    x: Tensor, up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, name: str, transposed: bool, group: Group
) -> Tensor:
    """`autopart.kernels.experts.experts` where `group` splits the experts: the terms of a rank's own experts, which the
    ranks sum to the whole. Its gradients of x and of weights are partial sums too."""
    return experts(x, up, down, weights, ids, name, transposed, group.rank * len(up))


def shared_experts(
    x: Tensor, up: Tensor, down: Tensor, up_bias: Tensor, down_bias: Tensor, weights: Tensor, ids: Tensor,
    alpha: float, limit: float, own: Group | None, narrow: Group | None,
) -> Tensor:  # fmt: skip
    """`autopart.kernels.clamped_experts.clamped_experts` where `own` splits the experts, or `narrow` the width of each:
    terms that the ranks sum to the whole. The first rank of `narrow` adds the bias of the experts' outputs."""
    first, biased = own.rank * len(up) if own else 0, narrow is None or narrow.rank == 0
    return clamped_experts(x, up, down, up_bias, down_bias, weights, ids, alpha, limit, first, biased)


def grouped_linear(x: Tensor, weight: Tensor, ids: Tensor, transposed: bool, group: Group | None = None) -> Tensor:
    """Every row of x (s, k) times the weight of the expert that ids (s,) names: (s, n).

    The weights are (e, n, k), or (e, k, n) where `transposed`. Where `group` splits the experts, rows of experts
    elsewhere give zeros, and zero gradients: over the ranks they sum to the whole.
    """
    weight = weight if transposed else weight.transpose(1, 2)
    own = ids if group is None else ids - group.rank * len(weight)
    own = torch.where((own >= 0) & (own < len(weight)), own, len(weight))
    order = own.argsort(stable=True)
    ends = torch.searchsorted(own[order], torch.arange(len(weight), device=ids.device), right=True)
    mine = (torch.arange(len(ids), device=ids.device) < ends[-1])[:, None]
    rows = torch.where(mine, x[order], 0.0)  # rows of no expert are left as they were, forward and backward
    product = F.grouped_mm(rows, weight, offs=ends.int()) if _fits(x, weight) else _Loop.apply(rows, weight, ends)
    return torch.zeros_like(product).index_copy(0, order, torch.where(mine, product, 0.0))


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped product takes these tensors."""
    sizes = (weight.shape[1] * x.itemsize, weight.shape[2] * x.itemsize)
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and not any(s % ALIGNMENT for s in sizes)


class _Loop(torch.autograd.Function):
    """One product for each expert that has rows: rows ends[e - 1]:ends[e] times weight[e], (k, n)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.spans = list(zip([0, *ends.tolist()], ends.tolist(), strict=False))
        out = x.new_zeros(x.shape[0], weight.shape[-1])
        for expert, (start, end) in enumerate(ctx.spans):
            out[start:end] = x[start:end] @ weight[expert]
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        given = gradients[0]
        of_x, of_weight = torch.zeros_like(x), torch.zeros_like(weight)
        for expert, (start, end) in enumerate(ctx.spans):
            of_x[start:end] = given[start:end] @ weight[expert].t()
            of_weight[expert] = x[start:end].t() @ given[start:end]
        return of_x, of_weight, None
