"""Products of tokens with the weights of the experts they were given to."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from autopart.runtime.groups import Group

Tensor = torch.Tensor


def expert_linear(x: Tensor, weight: Tensor, ids: Tensor, transposed: bool, group: Group | None = None) -> Tensor:
    """Every row of x (s, k) times the weight of the expert that ids (s,) names: (s, n).

    The weights are (e, n, k), or (e, k, n) where `transposed`. Where `group` splits the experts, rows of experts
    elsewhere give zeros, and zero gradients: over the ranks they sum to the whole.
    """
    first = group.rank * weight.shape[0] if group is not None else 0
    order = ids.argsort(stable=True)
    ends = torch.searchsorted(ids[order], torch.arange(first, first + len(weight) + 1, device=ids.device))
    product: Tensor = _Grouped.apply(x, weight if transposed else weight.transpose(1, 2), order, ends.tolist())
    return product


class _Grouped(torch.autograd.Function):
    """One product for each expert that has rows: rows order[ends[e]:ends[e + 1]] times weight[e], (k, n)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, order: Tensor, ends: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight, order)
        ctx.ends = ends
        out = x.new_zeros(x.shape[0], weight.shape[-1])
        for expert, rows in _rows(order, ends):
            out[rows] = x[rows] @ weight[expert]
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, order = ctx.saved_tensors
        given = gradients[0]
        of_x, of_weight = torch.zeros_like(x), torch.zeros_like(weight)
        for expert, rows in _rows(order, ctx.ends):
            of_x[rows] = given[rows] @ weight[expert].t()
            of_weight[expert] = x[rows].t() @ given[rows]
        return of_x, of_weight, None, None


def _rows(order: Tensor, ends: list[int]) -> list[tuple[int, Tensor]]:
    return [(expert, order[start:end]) for expert, (start, end) in enumerate(pairwise(ends)) if end > start]
