"""Attention in plain PyTorch, as models write it: what the kernels of `autopart.kernels.attention` are held against."""

import torch
from torch import Tensor

from autopart.kernels.dropout import dropped


def reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, padding: Tensor | None = None,
    bias: Tensor | None = None, relative: Tensor | None = None, sinks: Tensor | None = None, scale: float = 1.0,
    causal: bool = False, window: int = 0, cap: float = 0.0, even: bool = False, rows: Tensor | None = None,
    columns: Tensor | None = None, threshold: int = 0, dropout_scale: float = 1.0,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Attention as models write it, with a softmax in ``compute_dtype``, or in query's dtype when that is None.
    Arguments as `autopart.kernels.attention.attention`."""
    scores = torch.matmul(query, _repeated(key, query).transpose(-1, -2)) * scale
    if cap:
        scores = torch.tanh(scores / cap) * cap
    added = [] if bias is None else [bias]
    added += [] if relative is None else [_by_place(relative, query.shape[2], key.shape[2])]
    added += [] if mask is None or mask.dtype == torch.bool else [mask]
    seen = _seen(query, key, mask, padding, causal, window)
    if even and seen is not None:
        whole = sum(added, scores.new_zeros(()))
        scores = scores + torch.where(seen, whole, torch.finfo(scores.dtype).min)
    else:
        for term in added:
            scores = scores + term
        scores = scores if seen is None else torch.where(seen, scores, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)], -1)
    unseen = mask is not None or padding is not None or bias is not None or query.shape[2] > key.shape[2]
    if unseen and not even:
        chances = torch.ops.aten._safe_softmax(scores.to(compute_dtype or scores.dtype), -1).to(query.dtype)
    else:
        chances = torch.softmax(scores, -1, dtype=compute_dtype).to(query.dtype)
    chances = chances if sinks is None else chances[..., :-1]
    if rows is not None and columns is not None:
        chances = dropped(chances, rows, columns, threshold, dropout_scale)
    return torch.matmul(chances, _repeated(value, query))


def _repeated(x: Tensor, query: Tensor) -> Tensor:
    """x (samples, heads, n, d) with each head as often as it serves heads of query."""
    batch, heads, n, d = x.shape
    if heads == query.shape[1]:
        return x
    return x[:, :, None].expand(batch, heads, query.shape[1] // heads, n, d).reshape(batch, query.shape[1], n, d)


def _by_place(relative: Tensor, queries: int, keys: int) -> Tensor:
    """(1, heads, queries, keys) of a bias by relative place (heads, queries + keys - 1)."""
    away = torch.arange(keys, device=relative.device) - torch.arange(queries, device=relative.device)[:, None]
    return relative[:, away + queries - 1][None]


def _seen(
    query: Tensor, key: Tensor, mask: Tensor | None, padding: Tensor | None, causal: bool, window: int
) -> Tensor | None:
    """Which keys every query sees, by boolean masks and by places; None where it sees all."""
    seen = mask if mask is not None and mask.dtype == torch.bool else None
    if padding is not None:
        seen = padding[:, None, None] if seen is None else seen & padding[:, None, None]
    queries, keys = query.shape[2], key.shape[2]
    if causal or window:
        ahead = torch.arange(keys, device=key.device) - torch.arange(keys - queries, keys, device=key.device)[:, None]
        near = ahead <= 0 if causal else ahead < window
        near = near & (ahead > -window) if window else near
        seen = near if seen is None else seen & near
    return seen
