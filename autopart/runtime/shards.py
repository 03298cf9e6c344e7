"""Shards of a tensor along one dim, in parts or whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def shard(x: torch.Tensor, dim: int, parts: Sequence[int], size: int, rank: int) -> torch.Tensor:
    """Rank `rank`'s share of `x` split along `dim` over `size` ranks, each of `parts` on its own."""
    if not parts:
        return x.chunk(size, dim)[rank]
    return torch.cat([part.chunk(size, dim)[rank] for part in x.split(list(parts), dim)], dim)


def unshard(shares: Sequence[torch.Tensor], dim: int, parts: Sequence[int]) -> torch.Tensor:
    """The whole of what `shard` gave to each rank."""
    if not parts:
        return torch.cat(list(shares), dim)
    local = [p // len(shares) for p in parts]
    pieces = [share.split(local, dim) for share in shares]
    return torch.cat([piece[k] for k in range(len(parts)) for piece in pieces], dim)
