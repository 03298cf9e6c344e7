"""Which rectangles of a whole tensor a rank's share holds."""

import itertools
import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from autopart.runtime.flat_slices import slice_length
from autopart.runtime.groups import Groups
from autopart.runtime.parameters import Origin

Run = tuple[int, int]
"""A run of indices of a dim of the whole tensor: the first, and how many."""
Rectangle = tuple[tuple[int, ...], Tensor]
"""Offsets in the whole tensor, and the values from there on."""


def rectangles(share: Tensor, origin: Origin, groups: Groups) -> list[Rectangle]:
    """The rectangles of the whole tensor that this rank's share holds. Their values are views of `share`.

    A shard in parts has one rectangle a part; a flat slice of n dims has up to 2 n - 1 for each of the shard.
    """
    runs = [[(0, size)] for size in origin.whole]
    for axis, placement in origin.placed.items():
        if placement.kind == "S":
            group = groups.along(axis)
            runs[placement.dim] = _sharded(runs[placement.dim], placement.parts, group.size, group.rank)
    shard = [sum(length for _, length in dim) for dim in runs]
    if not origin.sliced:
        return list(_in_whole(share.detach(), [0] * len(shard), runs))
    length = slice_length(math.prod(shard), groups.shard.size)
    start = length * groups.shard.rank
    stop = min(start + length, math.prod(shard))
    return [
        rectangle
        for at, sizes in flat_boxes(shard, start, stop)
        for rectangle in _in_whole(_next(share.detach(), shard, start, at, sizes), at, runs)
    ]


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[list[int], list[int]]]:
    """Offsets and sizes of the boxes that elements `start` to `stop` of a flat tensor make of its shape, in order."""
    if start >= stop:
        return
    if not shape:
        yield [], []
        return
    row = math.prod(shape[1:])
    (first, before), (last, after) = divmod(start, row), divmod(stop, row)
    if first == last:
        yield from _in_row(first, shape, before, after)
        return
    if before:
        yield from _in_row(first, shape, before, row)
        first += 1
    if first < last:
        yield [first, *[0] * (len(shape) - 1)], [last - first, *shape[1:]]
    yield from _in_row(last, shape, 0, after)


def _in_row(index: int, shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[list[int], list[int]]]:
    for at, sizes in flat_boxes(shape[1:], start, stop):
        yield [index, *at], [1, *sizes]


def _next(piece: Tensor, shape: Sequence[int], start: int, at: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """The box at `at` of a tensor of `shape` of which `piece` has the flat elements from `start` on."""
    first = sum(i * math.prod(shape[dim + 1 :]) for dim, i in enumerate(at)) - start
    return piece[first : first + math.prod(sizes)].view(sizes)


def _in_whole(box: Tensor, at: Sequence[int], runs: Sequence[Sequence[Run]]) -> Iterator[Rectangle]:
    """The rectangles of the whole tensor in a box of the shard, which begins at `at`.

    runs  for each dim of the shard, the indices of the whole tensor that it has, in order
    """
    dims = [list(_within(run, first, length)) for run, first, length in zip(runs, at, box.shape, strict=True)]
    for pieces in itertools.product(*dims):
        values = box
        for dim, (_, first, length) in enumerate(pieces):
            values = values.narrow(dim, first, length)
        yield tuple(offset for offset, _, _ in pieces), values


def _within(runs: Sequence[Run], first: int, length: int) -> Iterator[tuple[int, int, int]]:
    """The runs among the indices `first` to `first + length` of a dim: the first index in the whole tensor, the first
    from `first` on, and how many."""
    at = 0
    for offset, count in runs:
        begin, end = max(first, at), min(first + length, at + count)
        if begin < end or length == 0 == count:
            yield offset + begin - at, begin - first, end - begin
        at += count


def _sharded(runs: Sequence[Run], parts: Sequence[int], size: int, rank: int) -> list[Run]:
    """The runs of a rank's shard of a dim over `size` ranks; each of `parts` is split by itself."""
    found, at = [], 0
    for part in parts or [sum(length for _, length in runs)]:
        length = part // size
        found += [(offset, count) for offset, _, count in _within(runs, at + rank * length, length)]
        at += part
    return found
