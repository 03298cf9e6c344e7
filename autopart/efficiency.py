"""Seconds of kernels on a device, from their shapes and a few physical constants of the device.

A matrix product of m x k by k x n is cut into output tiles, one to a multiprocessor at a time:

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
`benchmarks/fit.py` fits the constants to published measurements and prints their errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
"""Output tiles that libraries of tensor-core products are built of (rows, columns)."""

SPLITS = (1, 2, 4, 8)
"""Parts that k may be cut into, whose partial sums are written and added up in float32."""

STEP = 32
"""Elements of k that a tile advances by at least."""

RAMP = 120.0
"""Elements of k that starting and finishing a tile costs. Fitted on 183 products of an A100 80GB PCIe, and held for all
other devices, on which the form then errs as little: `benchmarks/data/simumax_gemm_sdp_efficiency.csv`."""

FEED = 60.0
"""Intensity tm tn / (tm + tn) of the tile that is fed half as fast as an endless one computes. Fitted with RAMP."""

MEMORY = 0.813
"""Share of the memory bandwidth that streaming kernels reach. Fitted on 4768 operators of a V100, and held for all
other devices: `benchmarks/data/aceso_v100_gpt_op_profile.csv`."""

KERNEL_SECONDS = 2.8e-6
"""Of a kernel that does nothing, on the device. Fitted with MEMORY."""


@dataclass(frozen=True)
class Silicon:
    """The physical constants of one kind of device.

    processors      multiprocessors: datasheet
    issue           share of the peak that the inner loop of the largest tile reaches
    sustained       share of the peak that all multiprocessors together sustain under the power limit
    attention       share of `issue` that fused attention reaches, forward and backward: its exponentials run between
                    its products
    rows            queries that one block of fused attention takes
    ramp, feed, memory, kernel_seconds
                    see RAMP, FEED, MEMORY and KERNEL_SECONDS
    tiles           output tiles of products
    """

    processors: int
    issue: float
    sustained: float
    attention: tuple[float, float]
    rows: int = 128
    ramp: float = RAMP
    feed: float = FEED
    memory: float = MEMORY
    kernel_seconds: float = KERNEL_SECONDS
    tiles: tuple[tuple[int, int], ...] = TILES


def product_bytes(batch: Any, m: Any, n: Any, k: Any, itemsize: Any) -> Any:
    """Bytes of both operands and the result, each moved once."""
    return batch * (m * k + k * n + m * n) * itemsize


def product_seconds(
    batch: Any, m: Any, n: Any, k: Any, nbytes: Any, peak: Any, bandwidth: float, silicon: Silicon
) -> Any:
    """Seconds of `batch` products of m x k by k x n that move `nbytes` (see `product_bytes`) on a device of `peak`
    FLOP/s and `bandwidth` bytes/s."""
    batch, m, n, k = (np.asarray(size, dtype=float) for size in (batch, m, n, k))
    streamed = bandwidth * silicon.memory
    best = np.inf
    for tm, tn in silicon.tiles:
        blocks = batch * np.ceil(m / tm) * np.ceil(n / tn)
        rate = peak * silicon.issue * _fed(tm, tn, silicon) / silicon.processors
        for splits in SPLITS:
            deep = np.ceil(k / (splits * STEP)) * STEP if splits > 1 else k
            waves = np.ceil(blocks * splits / silicon.processors)
            sums = 8.0 * splits * batch * m * n / streamed if splits > 1 else 0.0
            best = np.minimum(best, waves * 2.0 * tm * tn * (deep + silicon.ramp) / rate + sums)
    compute = np.maximum(best, 2.0 * batch * m * n * k / (peak * silicon.sustained))
    return np.hypot(compute, nbytes / streamed) + silicon.kernel_seconds


def attention_seconds(
    batch: Any,
    heads: Any,
    queries: Any,
    keys: Any,
    head: Any,
    value: Any,
    causal: bool,
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
    work = batch * heads * queries * keys * deep * (0.5 if causal else 1.0)
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


def _fed(tm: int, tn: int, silicon: Silicon) -> float:
    """What a tile's rate is to that of the largest one."""
    most = max(a * b / (a + b) for a, b in silicon.tiles)
    own = tm * tn / (tm + tn)
    return own / (own + silicon.feed) * (most + silicon.feed) / most


_A100_PCIE = Silicon(108, 0.80, 0.744, (0.71, 0.60))
_A100 = replace(_A100_PCIE, sustained=0.80)
_H100 = replace(_A100_PCIE, processors=132)

SILICON: Mapping[str, Silicon] = {
    "cpu": Silicon(1, 0.7, 0.7, (0.7, 0.6), ramp=0.0, feed=0.0, memory=0.8, kernel_seconds=0.0, tiles=((16, 16),)),
    "v100-32gb": Silicon(80, 0.845, 0.845, _A100.attention),
    "a100-40gb": _A100,
    "a100-80gb": _A100,
    "a100-80gb-pcie": _A100_PCIE,
    "h100-80gb": _H100,
    "h200": _H100,
    "b200": Silicon(148, 0.80, 0.494, (0.60, 0.53), rows=256),
}
"""Constants by device name.

Multiprocessors are from NVIDIA's white papers of the architectures. Fitted on measurements: v100-32gb, a100-80gb-pcie
and b200; see `benchmarks/fit.py`. The power limit shows on the PCIe A100 (300 W) and the B200, not on the V100. The
other A100s (400 W) are taken for the PCIe one without it, because that foretells measured layers of Llama-7B within
2 %. Nothing was measured on the H100 and the H200: the PCIe A100's shares. "cpu" is an assumption.
"""
