"""What is told of all ranges of n positions: a row of n (n + 1) / 2 numbers, in the order of `spans`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopart.cost.compute import Array

NEVER = float("inf")


@lru_cache(maxsize=64)
def spans(n: int) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """All ranges i..j-1 of n positions: every i, every j."""
    starts, ends = np.triu_indices(n + 1, 1)
    return starts, ends


def place(i: Any, j: Any, n: int) -> Any:
    """Where the range i..j-1 stands among all; of arrays of them likewise."""
    return i * n - i * (i - 1) // 2 + j - i - 1


def sums(values: Array) -> Array:
    """The sum of every range."""
    starts, ends = spans(len(values))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return total[ends] - total[starts]


def maxima(values: Array) -> Array:
    """The maximum of every range."""
    return np.concatenate([np.maximum.accumulate(values[i:]) for i in range(len(values))])


def following(positions: Iterable[int], n: int) -> NDArray[np.int_]:
    """Of n places and the end the first of some positions that is there or follows; n where there is none."""
    found = np.full(n + 1, n)
    for p in sorted(positions, reverse=True):
        found[: p + 1] = p
    return found


def has(positions: Iterable[int], n: int) -> NDArray[np.bool_]:
    """Whether a range has one of the positions."""
    starts, ends = spans(n)
    return following(positions, n)[starts] < ends
