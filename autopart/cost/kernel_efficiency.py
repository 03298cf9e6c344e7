"""Seconds of kernels on a device, from their shapes and a few physical constants of the device.

A matrix product of m x k by k x n is computed as output tiles of tm x tn, one to a multiprocessor at a time:

    tiles    = batch ceil(m / tm) ceil(n / tn) splits,  of 2 tm tn (k / splits + ramp) FLOPs
    waves    = ceil(tiles / processors)                 the last wave costs as much as a full one
    rate     = peak issue f(tm, tn) / processors        f: smaller tiles are fed with more bytes a FLOP
    compute  = max(waves tile / rate, flops / (peak sustained))
    seconds  = (compute^2 + (bytes / (bandwidth memory))^2)^(1/2) + kernel_seconds

with the tile and the number of splits of k that take least. Sources of the form: tile and wave quantisation are
described in NVIDIA's "Matrix Multiplication Background User's Guide"; splitting k in Osama et al., arXiv 2301.03598;
the roofline is Williams, Waterman and Patterson, CACM 52(4), 2009. `sustained` is the rate that the power limit allows
with all multiprocessors busy; a kernel that leaves some idle runs at the full clock.

Everything is vectorised over numpy arrays: sizes may be numbers or arrays. Sizes count elements, rates are per second.
`benchmarks/accuracy/fit.py` fits the constants to published measurements and prints their errors.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopart.hardware.rows import Silicon

Floats = NDArray[np.float64]

TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
"""Output tiles that libraries of tensor-core products are built of (rows, columns)."""

SPLITS = (1, 2, 4, 8)
"""Numbers of parts that k may be split into. The partial sums are written and added up in float32."""

STEP = 32
"""The least number of elements of k that a tile advances by."""


def product_bytes(batch: Any, m: Any, n: Any, k: Any, itemsize: Any) -> Any:
    """Bytes of both factors and the result, each moved once."""
    return batch * (m * k + k * n + m * n) * itemsize


def product_seconds(
    batch: Any, m: Any, n: Any, k: Any, nbytes: Any, peak: Any, bandwidth: float, silicon: Silicon
) -> Any:
    """Seconds of `batch` products of m x k by k x n that move `nbytes` (see `product_bytes`) on a device of `peak`
    FLOP/s and `bandwidth` bytes/s."""
    batch, m, n, k = np.broadcast_arrays(*(np.asarray(size, dtype=float) for size in (batch, m, n, k)))
    streamed, empty = bandwidth * silicon.memory, (1,) * batch.ndim
    high, wide, fed, splits = (x.reshape(*x.shape, *empty) for x in (*_tiles(silicon.feed), np.array(SPLITS)))
    blocks = batch * _whole(m / high) * _whole(n / wide)
    rate = peak * silicon.issue * fed / silicon.processors
    deep = np.where(splits > 1, _whole(k / (splits * STEP)) * STEP, k)
    sums = np.where(splits > 1, 8.0 * splits * batch * m * n / streamed, 0.0)
    waves = _whole(blocks * splits / silicon.processors)
    best = (waves * (2.0 * high * wide * (deep + silicon.ramp) / rate) + sums).min((0, 1))
    compute = np.maximum(best, 2.0 * batch * m * n * k / (peak * silicon.sustained))
    return np.hypot(compute, nbytes / streamed) + silicon.kernel_seconds


def attention_seconds(
    batch: Any,
    heads: Any,
    queries: Any,
    keys: Any,
    head: Any,
    value: Any,
    causal: Any,
    nbytes: Any,
    peak: Any,
    bandwidth: float,
    silicon: Silicon,
    backward: bool = False,
) -> Any:
    """Seconds of attention in one fused kernel: `heads` of `head` elements (`value` of the values) each.

    Two products forward and five backward (Dao, arXiv 2307.08691, section 3.1); a causal mask halves both. Blocks take
    `rows` queries forward and half as many keys backward. The time is midway between a perfect spread of the blocks
    and the worst that starting the longest one last gives, work / p + (1 - 1 / p) longest (Graham, SIAM J. Appl. Math.
    17(2), 1969), and no less than the longest.
    """
    deep = 2.0 * (3.0 * head + 2.0 * value if backward else head + value)
    work = batch * heads * queries * keys * deep * np.where(causal, 0.5, 1.0)
    taken = np.minimum(silicon.rows / 2, keys) * queries if backward else np.minimum(silicon.rows, queries) * keys
    longest = np.minimum(taken * deep, work)
    rate = peak * silicon.issue * silicon.attention[backward]
    spread = work + 0.5 * (silicon.processors - 1) * longest
    compute = np.maximum(spread, silicon.processors * longest) / rate
    return np.hypot(compute, nbytes / (bandwidth * silicon.memory)) + silicon.kernel_seconds


def memory_seconds(nbytes: Any, bandwidth: float, silicon: Silicon, kernels: Any = 1) -> Any:
    """Seconds of `kernels` kernels that read and write `nbytes` together and compute next to nothing. The bandwidth
    reached, n / (n + n0), has n0 = kernel_seconds x bandwidth x memory."""
    return nbytes / (bandwidth * silicon.memory) + kernels * silicon.kernel_seconds


def _whole(number: Any) -> Any:
    """The next whole number; a number that is above a whole one by rounding alone is rounded down."""
    return np.ceil(number * (1 - 1e-12))


@lru_cache
def _tiles(feed: float) -> tuple[Floats, Floats, Floats]:
    """Rows and columns of every tile, and its rate relative to the largest tile's; a column, to broadcast over splits
    of k."""
    high, wide = np.array(TILES, dtype=float).T[:, :, None]
    own = high * wide / (high + wide)
    return high, wide, own / (own + feed) * (own.max() + feed) / own.max()
