"""Call targets that stand for random operators in a traced graph; `autopart.runtime.random` has what runs.

Each takes the name of a stream of random numbers. A number depends on the seed, the step, the stream and the place of
the element in the whole batch, so that it is the same on whichever rank, in whichever order it is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Stream(str):
    """The name of a stream of random numbers: the module that draws them, and a number where it draws again."""

    __slots__ = ()


def relative(value: object, label: str) -> object:
    """Arguments with the names of streams told from `label` on, so that equal blocks draw alike."""
    if isinstance(value, Stream):
        return Stream(value.removeprefix(label))
    if isinstance(value, (list, tuple)):
        return type(value)(relative(v, label) for v in value)
    return value


def dropout(x: torch.Tensor, p: float, stream: Stream) -> torch.Tensor:
    """Zero a share `p` of the elements, scale the others by 1 / (1 - p)."""
    return x * 1.0


def uniform(like: torch.Tensor, stream: Stream, dtype: torch.dtype) -> torch.Tensor:
    """Between 0 and 1, neither included, in the shape of `like`."""
    return torch.empty_like(like, dtype=dtype)


def uniform_of(size: Sequence[int], dtype: torch.dtype, stream: Stream) -> torch.Tensor:
    """`uniform` of a size."""
    return torch.empty(size, dtype=dtype, device="meta")
