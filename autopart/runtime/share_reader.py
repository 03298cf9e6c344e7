"""A rank's share of a tensor, read from where the whole tensor lies without reading the rest of it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from autopart.runtime.flat_slices import slice_length
from autopart.runtime.groups import Groups
from autopart.runtime.parameters import Origin
from autopart.runtime.shards import shard


class Sliceable(Protocol):
    """A tensor, or a slice object of safetensors."""

    def __getitem__(self, at: Any, /) -> Tensor: ...


def fill_from(shares: Iterable[Any], groups: Groups, find: Callable[[str], Sliceable]) -> None:
    """Fill a rank's shares of weights and buffers, in the order of names.

    find  a tensor's name -> the whole tensor
    """
    with torch.no_grad():
        for share in sorted(shares, key=lambda each: each.origin.name):
            share.copy_(read_share(find(share.origin.name), share.origin, groups))


def read_share(whole: Sliceable, origin: Origin, groups: Groups) -> Tensor:
    """This rank's share; of a flat slice over dp only the rows that have it are read."""
    index = [torch.arange(size) for size in origin.whole]
    for axis, placement in origin.placed.items():
        group = groups.along(axis)
        if placement.kind == "S":
            index[placement.dim] = shard(index[placement.dim], 0, placement.parts, group.size, group.rank)
    if not origin.sliced:
        return _read(whole, [_runs(each) for each in index])
    elements, row = 1, 1
    for each in index:
        elements *= len(each)
    length = slice_length(elements, groups.shard.size)
    start, stop = (min(length * (groups.shard.rank + k), elements) for k in (0, 1))
    first = 0
    if index and start < stop:
        row = elements // len(index[0])
        first = start // row
        index[0] = index[0][first : -(-stop // row)]
    flat = _read(whole, [_runs(each) for each in index]).reshape(-1)[start - first * row : stop - first * row]
    return F.pad(flat, (0, length - len(flat)))


def _runs(index: Tensor) -> list[slice]:
    """Increasing indices as ranges."""
    breaks = (index.diff() != 1).nonzero().flatten().add(1).tolist()
    return [
        slice(int(index[start]), int(index[stop - 1]) + 1)
        for start, stop in zip([0, *breaks], [*breaks, len(index)], strict=True)
        if start < stop
    ]


def _read(whole: Sliceable, runs: Sequence[Sequence[slice]]) -> Tensor:
    """The part of a tensor that lies in some ranges of every dim."""
    for dim, some in enumerate(runs):
        if len(some) != 1:
            if not some:
                return _read(whole, [*runs[:dim], [slice(0, 0)], *runs[dim + 1 :]])
            return torch.cat([_read(whole, [*runs[:dim], [one], *runs[dim + 1 :]]) for one in some], dim)
    return whole[tuple(some[0] for some in runs)]
