"""Seconds of kernels by interpolation in measured tables.

Interpolation is linear in the logarithms of sizes and seconds. Outside the measured sizes products and attention keep
the rate of the nearest measured size, streams the rate of the largest. Sizes are those of `rules.Sizes`; bytes and
FLOPs are numbers or arrays; results are seconds.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopart.cost.collectives import measured_seconds
from autopart.hardware.measured import Measured, Rows, Tables

Floats = NDArray[np.float64]

STREAM = "stream"
"""The kind of operators that read and write bytes and compute next to nothing."""

KINDS: Mapping[str, tuple[str, ...]] = {
    STREAM: (),
    "sum": ("sum.dim_IntList", "mean.dim", "sum", "mean", "var.correction", "amax", "cumsum"),
    "tanh": ("tanh", "sigmoid", "exp", "log", "sin", "cos", "erf", "softplus"),
    "gelu": ("gelu",),
    "silu": ("silu", "mish", "hardswish"),
    "softmax": ("softmax.int", "_softmax", "log_softmax.int", "_log_softmax", "_safe_softmax"),
    "norm": ("layer_norm", "native_layer_norm", "rms_norm", "group_norm", "native_group_norm", "batch_norm"),
    "cross_entropy": ("cross_entropy_loss",),
    "embedding": ("embedding",),
}
"""Kind of operators that take the same seconds for the same bytes -> its operators; all others are streams."""

KIND_OF: Mapping[str, int] = {
    f"{library}.{name}": index
    for index, names in enumerate(KINDS.values())
    for name in names
    for library in ("aten", "autopart")
}
"""Operator -> index of its kind in KINDS. An operator that is missing is a stream, kind 0."""


@dataclass(frozen=True)
class Grid:
    """Logarithms of positive values at every combination of the axes' values; `axes` holds the logarithms of these."""

    axes: tuple[Floats, ...]
    values: Floats

    def at(self, *sizes: Any) -> Any:
        """The value at these sizes, linear in the logarithms; outside the grid, the value at the nearest edge."""
        places = []
        for axis, size in zip(self.axes, sizes, strict=True):
            place = np.interp(np.log(np.maximum(size, 1.0)), axis, np.arange(len(axis)))
            low = np.minimum(place.astype(int), max(0, len(axis) - 2))
            places.append((low, place - low))
        found: Any = 0.0
        for corner in itertools.product((0, 1), repeat=len(places)):
            weight, index = 1.0, []
            for up, (low, share), axis in zip(corner, places, self.axes, strict=True):
                weight = weight * (share if up else 1 - share)
                index.append(np.minimum(low + up, len(axis) - 1))
            found = found + weight * self.values[tuple(index)]
        return np.exp(found)


def grid_of(points: Floats, values: Floats) -> Grid:
    """The grid of `values` measured at `points` (rows of sizes). A combination that was not measured takes the value of
    the nearest measured one, in the logarithms of the sizes.
    """
    where = np.log(np.maximum(points, 1.0))
    axes = tuple(np.unique(column) for column in where.T)
    corners = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    distances = np.abs(corners[..., None, :] - where).sum(-1)
    return Grid(axes, np.log(values)[distances.argmin(-1)])


@lru_cache(maxsize=64)
def _rates(rows: Rows) -> Grid:
    """FLOP/s of products."""
    m, n, k, seconds, _ = np.array(rows).T
    return grid_of(np.stack([m, n, k], 1), 2 * m * n * k / seconds)


@lru_cache(maxsize=64)
def _attention(rows: Rows) -> tuple[Grid, Grid]:
    """Seconds of a FLOP, forward and backward, by sequence, elements of a head and whether causal."""
    sequence, head, causal, forward, backward, _ = np.array(rows).T
    sizes = np.stack([sequence, head, 1 + causal], 1)
    return grid_of(sizes, forward), grid_of(sizes, backward)


def table_of(tables: Tables, flops: Mapping[str, float], peak: float) -> tuple[Rows, float]:
    """The rows for the dtype in `flops` whose peak is nearest to `peak`, and the factor by which a device of this peak
    is faster.
    """
    measured = [name for name in tables if name in flops] or list(tables)
    nearest = min(measured, key=lambda name: abs(np.log(flops.get(name, peak) / peak)))
    return tables[nearest], peak / flops.get(nearest, peak)


def product_seconds(
    batch: Any, m: Any, n: Any, k: Any, peak: Any, flops: Mapping[str, float], measured: Measured
) -> Any:
    """Seconds of `batch` products of m x k by k x n, of the dtype with this peak in `flops`."""
    batch, m, n, k = np.broadcast_arrays(*(np.atleast_1d(np.asarray(size, dtype=float)) for size in (batch, m, n, k)))
    work = 2.0 * batch * m * n * k

    def of(rows: Rows, at: Any) -> Any:
        return work[..., at] / _rates(rows).at(m[..., at], n[..., at], k[..., at])

    return _by_dtype(work, peak, measured.products, flops, of) * measured.pace


def attention_seconds(sizes: Floats, peak: Any, flops: Mapping[str, float], measured: Measured) -> tuple[Any, Any]:
    """Seconds of attention forward and backward; `sizes` in columns batch, queries, keys, head, value, causal."""
    batch, queries, keys, head, value, causal = sizes
    work = 2.0 * batch * queries * keys * (head + value) * np.where(causal, 0.5, 1.0)

    def of(back: int) -> Callable[[Rows, Any], Any]:
        return lambda rows, at: (
            work[at] * _attention(rows)[back].at(np.sqrt(queries * keys)[at], ((head + value) / 2)[at], 1 + causal[at])
        )

    forward, backward = (_by_dtype(work, peak, measured.attention, flops, of(back)) * measured.pace for back in (0, 1))
    return forward, backward


def _by_dtype(
    like: Any, peak: Any, tables: Tables, flops: Mapping[str, float], seconds: Callable[[Rows, Any], Any]
) -> Any:
    """`seconds` of the rows of each dtype for what (the last dim) has its peak; FLOPs over the peak where no dtype was
    measured."""
    peaks = np.broadcast_to(peak, like.shape[-1:])
    found = like / peaks
    for one in np.unique(peaks) if tables else ():
        at = np.flatnonzero(peaks == one)
        rows, faster = table_of(tables, flops, float(one))
        found[..., at] = seconds(rows, at) / faster
    return found


def operator_seconds(kind: Any, nbytes: Any, measured: Measured) -> tuple[Any, Any]:
    """Seconds, forward and backward, of calls of operators by the index of their kind and the bytes they move."""
    kinds, nbytes = np.broadcast_arrays(np.asarray(kind, dtype=int), np.asarray(nbytes, dtype=float))
    forward, backward = np.empty(nbytes.shape), np.empty(nbytes.shape)
    names = list(KINDS)
    for index in np.unique(kinds):
        at = kinds == index
        rows = np.array(measured.operators.get(names[index], measured.operators.get(STREAM)))
        forward[at] = measured_seconds(nbytes[at], rows[:, :2]) * measured.pace
        backward[at] = measured_seconds(nbytes[at], rows[:, [0, 2]]) * measured.pace
    return forward, backward
