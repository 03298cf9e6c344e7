"""Arrays by interval: for the n (n + 1) / 2 intervals of n positions a number each, in the order of `interval_ends`."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopart.cost.compute import Array

NEVER = float("inf")


@lru_cache(maxsize=64)
def interval_ends(n: int) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """All intervals [i, j) of n positions: every i, every j."""
    starts, ends = np.triu_indices(n + 1, 1)
    return starts, ends


def interval_index(i: Any, j: Any, n: int) -> Any:
    """The index of the interval [i, j) among all; elementwise where i and j are arrays."""
    return i * n - i * (i - 1) // 2 + j - i - 1


def interval_sums(values: Array) -> Array:
    """[intervals]: the sum of the values in each."""
    starts, ends = interval_ends(len(values))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return total[ends] - total[starts]


def interval_maxima(values: Array) -> Array:
    """[intervals]: the maximum of the values in each."""
    return np.concatenate([np.maximum.accumulate(values[i:]) for i in range(len(values))])


def next_at(positions: Iterable[int], n: int) -> NDArray[np.int_]:
    """[n + 1]: for each place the first of some positions at or after it; n where there is none."""
    found = np.full(n + 1, n)
    for p in sorted(positions, reverse=True):
        found[: p + 1] = p
    return found


def contains_any(positions: Iterable[int], n: int) -> NDArray[np.bool_]:
    """[intervals]: whether each has one of the positions."""
    starts, ends = interval_ends(n)
    return next_at(positions, n)[starts] < ends
