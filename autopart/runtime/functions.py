"""Functions that run on a shard where the plain operator would be wrong."""

import torch
from torch import Tensor

from autopart.kernels import cross_entropy
from autopart.kernels.cross_entropy_rows import Reduction
from autopart.kernels.embedding import embedding
from autopart.kernels.linear_cross_entropy import linear_cross_entropy
from autopart.runtime.process_group import Group


def mean_cross_entropy(
    logits: Tensor, targets: Tensor, valid: float, ignore_index: int = -100, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of this rank's targets over `valid`, the number of targets of an average micro-batch that are
    not `ignore_index`. logits (b, v), targets (b,)."""
    return cross_entropy.cross_entropy(logits, targets, valid, ignore_index, label_smoothing)


def vocab_cross_entropy(logits: Tensor, targets: Tensor, valid: float, ignore_index: int, group: Group) -> Tensor:
    """`mean_cross_entropy` of logits (b, v / ranks) whose vocabulary is split over `group`; every rank gets the same
    loss (Shoeybi et al., Megatron-LM, arXiv 1909.08053, section 3)."""
    constants = 0.0, None, 0.0, 0.0, 1.0, 1.0
    return cross_entropy.vocab_cross_entropy(
        logits, targets, valid, ignore_index, *constants, *_share(logits.shape[-1], group)
    )


def _share(columns: int, group: Group) -> tuple[int, int, Reduction, Reduction]:
    """The first of a rank's columns of the vocabulary, how many there are, and maximum and sum over the ranks."""

    def reduced(operation: str) -> Reduction:
        def reduce(x: Tensor) -> Tensor:
            x = x.contiguous()
            group.all_reduce(x, operation)
            return x

        return reduce

    return group.rank * columns, group.size * columns, reduced("max"), reduced("sum")


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
    constants = ignore_index, label_smoothing, compute_dtype, 0.0, softcap, scale, divisor
    rows = hidden.flatten(0, -2)
    return linear_cross_entropy(rows, weight, targets, bias, valid, *constants, *_share(len(weight), group))


def vocab_embedding(ids: Tensor, weight: Tensor, group: Group, padding_idx: int = -1) -> Tensor:
    """Rows of a table (v / ranks, d) whose vocabulary is split over `group`: zeros for rows of other ranks, so that
    the ranks' results sum to the whole."""
    return embedding(ids, weight, padding_idx, group.rank * len(weight))
