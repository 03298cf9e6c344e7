"""Functions that run on a shard where the plain operator would be wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from autopart.kernels.linear_cross_entropy import linear_cross_entropy
from autopart.runtime.process_group import Group

Tensor = torch.Tensor


def mean_cross_entropy(
    logits: Tensor, targets: Tensor, valid: float, ignore_index: int = -100, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of this rank's targets over `valid`, the number of targets of an average micro-batch that are
    not `ignore_index`. logits (b, v), targets (b,)."""
    total = F.cross_entropy(
        logits, targets, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing
    )
    return total / valid


class _VocabCrossEntropy(torch.autograd.Function):
    """Vocabulary-parallel cross-entropy (Shoeybi et al., Megatron-LM, arXiv 1909.08053, section 3)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int, group: Group) -> Tensor:
        first = group.rank * logits.shape[-1]
        highest = logits.max(dim=-1).values
        group.all_reduce(highest, "max")
        shifted = logits - highest[:, None]
        here = (targets >= first) & (targets < first + logits.shape[-1])
        local = torch.where(here, targets - first, 0)
        wanted = torch.where(here, shifted.gather(1, local[:, None])[:, 0], 0.0)
        each = shifted.exp_()
        both = torch.stack([each.sum(dim=-1), wanted])
        group.all_reduce(both)
        total, wanted = both
        counted = targets != ignore_index
        ctx.save_for_backward(each, total, local, here & counted, counted)
        return torch.where(counted, total.log() - wanted, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        each, total, local, here, counted = ctx.saved_tensors
        gradient = each / total[:, None]
        gradient.scatter_add_(1, local[:, None], -here[:, None].to(gradient.dtype))
        return gradient.mul_((counted * gradients[0])[:, None]), None, None, None


def vocab_cross_entropy(logits: Tensor, targets: Tensor, valid: float, ignore_index: int, group: Group) -> Tensor:
    """`mean_cross_entropy` of logits (b, v / ranks) whose vocabulary is split over `group`; every rank gets the same
    loss."""
    total: Tensor = _VocabCrossEntropy.apply(logits, targets, ignore_index, group)
    return total / valid


def mean_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    valid: float,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    softcap: float = 0.0,
    scale: float = 1.0,
    divisor: float = 1.0,
) -> Tensor:
    """`mean_cross_entropy` of hidden (..., d) weight (v, d)^T + bias (v,), without logits of all rows at once."""
    constants = ignore_index, label_smoothing, compute_dtype, 0.0, softcap, scale, divisor
    return linear_cross_entropy(hidden.flatten(0, -2), weight, targets, bias, valid, *constants)


def vocab_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    valid: float,
    group: Group,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    softcap: float = 0.0,
    scale: float = 1.0,
    divisor: float = 1.0,
) -> Tensor:
    """`mean_linear_loss` of a vocabulary that is split over `group`: weight (v / ranks, d), bias (v / ranks,). Every
    rank gets the same loss, and as gradient of hidden a partial sum."""

    def reduced(operation: str) -> Callable[[Tensor], Tensor]:
        def reduce(x: Tensor) -> Tensor:
            x = x.contiguous()
            group.all_reduce(x, operation)
            return x

        return reduce

    constants = ignore_index, label_smoothing, compute_dtype, 0.0, softcap, scale, divisor
    place = group.rank * len(weight), group.size * len(weight)
    reductions = reduced("max"), reduced("sum")
    return linear_cross_entropy(hidden.flatten(0, -2), weight, targets, bias, valid, *constants, *place, *reductions)


def vocab_embedding(ids: Tensor, weight: Tensor, group: Group, padding_idx: int = -1) -> Tensor:
    """Rows of a table (v / ranks, d) whose vocabulary is split over `group`: zeros for rows of other ranks, so that
    the ranks' results sum to the whole."""
    first = group.rank * weight.shape[0]
    here = (ids >= first) & (ids < first + weight.shape[0])
    padding = padding_idx - first if first <= padding_idx < first + weight.shape[0] else None
    rows = F.embedding(torch.where(here, ids - first, 0), weight, padding)
    return rows * here[..., None]
