"""Attention with dropout of its scores, which are made by no kernel as a whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autopart.kernels.attention import attention
from autopart.runtime.random import Split, Stream, dropout_hashes

Tensor = torch.Tensor


def dropout_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    p: float,
    causal: bool,
    scale: float,
    source: Stream,
    whole: Sequence[int],
    batch: int | None,
    **axes: Split,
) -> Tensor:
    """Attention of this rank's query (b, h, q, d), key (b, g, k, d) and value (b, g, k, e): (b, h, q, e).

    mask    boolean, true where a query sees a key, or added to the scores; with a gradient if it requires one
    p       share of the scores that is dropped, as `autopart.runtime.random.dropout` drops them
    scale   of the products
    source  of random numbers
    whole   the size of the scores (samples, heads, queries, keys) over all ranks
    batch   the dim that counts samples
    axes    the dim of the scores that each axis splits
    """
    rows, columns, threshold, dropout_scale = dropout_hashes(p, source, whole, batch, **axes)
    bias = mask if mask is not None and mask.requires_grad else None
    given = None if bias is not None else mask
    constants = scale, causal, 0, 0.0, threshold, dropout_scale
    return attention(query, key, value, given, None, None, bias, rows, columns, *constants)
