"""Shards of a tensor along one dim."""

from collections.abc import Sequence

import torch


def shard(x: torch.Tensor, dim: int, parts: Sequence[int], size: int, rank: int) -> torch.Tensor:
    """Rank `rank`'s shard of `x` along `dim` over `size` ranks; each of `parts` is split by itself."""
    if not parts:
        return x.chunk(size, dim)[rank]
    return torch.cat([part.chunk(size, dim)[rank] for part in x.split(list(parts), dim)], dim)


def unshard(shares: Sequence[torch.Tensor], dim: int, parts: Sequence[int]) -> torch.Tensor:
    """The whole tensor of the shards of all ranks, as `shard` made them."""
    if not parts:
        return torch.cat(list(shares), dim)
    local = [p // len(shares) for p in parts]
    pieces = [share.split(local, dim) for share in shares]
    return torch.cat([piece[k] for k in range(len(parts)) for piece in pieces], dim)
