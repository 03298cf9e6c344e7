"""Triton kernels of group normalisation: see `group_norm` for the formulas."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from autopart.kernels.ahead import Usage, compile_kernel
from autopart.kernels.launch import TRITON_NAMES, jit, power_of_two

tl: Any = None  # triton.language, which jit binds

WHOLE = 16384
"""Elements of the largest group that is one Triton program, its channels and its pixels rounded up to powers of two.
Half as many where 16 does not divide the pixels, since their addresses take registers."""

TILE = 4096
"""Elements of a larger group in one Triton program."""

MAX_PARTS = 64
"""The most programs that take the statistics of one group."""

MOMENTS_WARPS = 8
"""Warps of the programs that take statistics."""

MAX_WIDTH = 16384
"""Channels of the widest group that the kernels take."""


class Sizes(NamedTuple):
    """Sizes of x (N, C, *).

    groups  of all samples, N G
    width   channels of a group, D
    pixels  P
    """

    groups: int
    width: int
    pixels: int

    @property
    def tile(self) -> tuple[int, int]:
        """Channels and pixels in one Triton program, powers of two."""
        width, pixels = power_of_two(self.width), power_of_two(self.pixels)
        if self.whole:
            return width, pixels
        channels = min(width, TILE // min(pixels, 1024))
        return channels, min(pixels, TILE // channels)

    @property
    def whole(self) -> bool:
        """Whether a group is one program."""
        most = WHOLE if self.pixels % 16 == 0 else WHOLE // 2
        return power_of_two(self.width) * power_of_two(self.pixels) <= most

    @property
    def options(self) -> dict[str, Any]:
        """How the forward and the backward are launched: 16 elements a thread."""
        channels, pixels = self.tile
        warps = min(max(channels * pixels // 512, 1), 32)
        return {"CHANNELS": channels, "PIXELS": pixels, "num_warps": warps, "enable_fp_fusion": True}

    @property
    def across(self) -> int:
        """Programs side by side over the pixels of a channel."""
        return -(-self.pixels // self.tile[1])

    @property
    def programs(self) -> int:
        """Of the forward and of the backward."""
        return self.groups * -(-self.width // self.tile[0]) * self.across


def sizes_of(x: torch.Tensor, groups: int) -> Sizes:
    """The sizes of x (N, C, *) in ``groups`` groups a sample."""
    return Sizes(x.shape[0] * groups, x.shape[1] // groups, math.prod(x.shape[2:]))


def compile_ahead(
    capability: int,
    channels: int = 320,
    pixels: int = 4096,
    groups: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    silu: bool = False,
) -> dict[str, Usage]:
    """Compile the kernels that contiguous x (N, ``channels``, ``pixels``) needs, with weight and bias, for compute
    capability ``capability`` (90 for 9.0).

    The backward of a group that takes more than one program is compiled twice: as it takes sums, and as it uses them.
    """
    sizes = Sizes(groups, channels // groups, pixels)
    types = dict.fromkeys(("x", "weight", "bias", "y", "dy", "dx"), TRITON_NAMES[dtype])
    types |= dict.fromkeys(("statistics", "partial", "sums"), "fp32")
    integers = {"width": sizes.width, "pixels": pixels, "groups": groups, "size": sizes.width * pixels}
    signature = {name: f"*{value}" for name, value in types.items()}
    signature |= dict.fromkeys((*integers, "parts", "length"), "i32") | {"eps": "fp32"}
    aligned = {*types, "length", *(name for name, value in integers.items() if value % 16 == 0)}

    def usage(kernel: Any, **constexprs: Any) -> Usage:
        options = sizes.options | constexprs | {"SILU": silu, "PARTS": MAX_PARTS, "BLOCK": TILE}
        options |= {"WIDTH": power_of_two(sizes.width)} | {name: 1 for name, value in integers.items() if value == 1}
        warps = MOMENTS_WARPS if kernel is moments else options["num_warps"]
        return compile_kernel(kernel, signature, options, capability, warps, aligned - constexprs.keys())

    if sizes.whole:
        first = {"partial": None, "parts": None, "length": None}
        return {"forward": usage(forward, **first), "backward": usage(backward, sums=None)}
    return {
        "moments": usage(moments),
        "forward": usage(forward),
        "backward sums": usage(backward, sums=None, dx=None),
        "backward": usage(backward, partial=None),
    }


@jit
def moments(x, partial, size, parts, length, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The mean of every part of a group, and the sum of its squared deviations from it."""
    group = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    end = min((part + 1) * length, size)
    count, mean, squares = 0.0, 0.0, 0.0
    for start in range(part * length, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        h = tl.load(x + group * size + at, mask=at < end, other=0.0).to(tl.float32)
        new = min(end - start, BLOCK) * 1.0
        total = count + new
        shift = tl.sum(h) / new - mean
        h = tl.where(at < end, h - (mean + shift), 0.0)
        mean += shift * (new / total)
        squares += tl.sum(h * h) + shift * shift * (count * new / total)
        count = total
    out = partial + (group * parts + part) * 2
    tl.store(out, mean)
    tl.store(out + 1, squares)


@jit
def forward(  # type: ignore[no-untyped-def]
    x, weight, bias, y, statistics, partial, width, pixels, groups, parts, length, eps,
    SILU: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(pixels, PIXELS)
    tiles = tl.cdiv(width, CHANNELS) * across
    group = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    channel = tile // across * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    pixel = tile % across * PIXELS + tl.arange(0, PIXELS)[None, :]
    inside = (channel < width) & (pixel < pixels)
    size = width * pixels
    at = channel * pixels + pixel
    h = tl.load(x + group * size + at, mask=inside, other=0.0).to(tl.float32)
    if partial is None:
        mean = tl.sum(h) / size
        h = tl.where(inside, h - mean, 0.0)
        squares = tl.sum(h * h)
    else:
        part = tl.arange(0, PARTS)
        out = partial + (group * parts + part) * 2
        means = tl.load(out, mask=part < parts, other=0.0)
        count = tl.maximum(tl.minimum(size - part * length, length), 0).to(tl.float32)
        mean = tl.sum(means * count) / size
        squares = tl.sum(tl.load(out + 1, mask=part < parts, other=0.0))
        squares += tl.sum(tl.where(part < parts, count * (means - mean) * (means - mean), 0.0))
        h -= mean
    r = tl.rsqrt(squares / size + tl.cast(eps, tl.float32))
    tl.store(statistics + group, r, mask=tile == 0)
    tl.store(statistics + tl.num_programs(0) // tiles + group, mean, mask=tile == 0)
    h *= r
    vector = group % groups * width + channel
    if weight is not None:
        h *= tl.load(weight + vector, mask=channel < width, other=0.0).to(tl.float32)
    if bias is not None:
        h += tl.load(bias + vector, mask=channel < width, other=0.0).to(tl.float32)
    if SILU:
        h *= tl.sigmoid(h)
    tl.store(y + group * size + at, h.to(y.dtype.element_ty), mask=inside)


@jit
def backward(  # type: ignore[no-untyped-def]
    dy, x, weight, bias, statistics, dx, partial, sums, width, pixels, groups,
    SILU: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """dx, where it is given, and the sums over pixels of dz h and dz, (2, programs across, channels of all samples) in
    ``partial``, where that is given. Those of all pixels are in ``sums``, or taken where a group is one program."""
    across = tl.cdiv(pixels, PIXELS)
    tiles = tl.cdiv(width, CHANNELS) * across
    count = (tl.num_programs(0) // tiles).to(tl.int64)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    channel = tile // across * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    pixel = tile % across * PIXELS + tl.arange(0, PIXELS)[None, :]
    real = channel < width
    inside = real & (pixel < pixels)
    size = width * pixels
    at = channel * pixels + pixel
    r = tl.load(statistics + group)
    h = tl.load(x + group * size + at, mask=inside, other=0.0).to(tl.float32)
    h = tl.where(inside, (h - tl.load(statistics + count + group)) * r, 0.0)
    g = tl.load(dy + group * size + at, mask=inside, other=0.0).to(tl.float32)
    vector = group % groups * width
    if weight is not None:
        w = tl.load(weight + vector + channel, mask=real, other=0.0).to(tl.float32)
    if SILU:
        z = h
        if weight is not None:
            z *= w
        if bias is not None:
            z += tl.load(bias + vector + channel, mask=real, other=0.0).to(tl.float32)
        s = tl.sigmoid(z)
        g *= s * (1.0 + z * (1.0 - s))
    if sums is None:
        along = tl.sum(g * h, 1, keep_dims=True)
        level = tl.sum(g, 1, keep_dims=True)
        out = partial + (tile % across) * count * width + group * width + channel
        tl.store(out, along, mask=real)
        tl.store(out + across * count * width, level, mask=real)
        if weight is not None:
            along *= w
            level *= w
    else:
        every = tl.arange(0, WIDTH)
        along = tl.load(sums + group * width + every, mask=every < width, other=0.0)
        level = tl.load(sums + (count + group) * width + every, mask=every < width, other=0.0)
        if weight is not None:
            each = tl.load(weight + vector + every, mask=every < width, other=0.0).to(tl.float32)
            along *= each
            level *= each
    if dx is not None:
        if weight is not None:
            g *= w
        g = (g - (h * tl.sum(along) + tl.sum(level)) / size) * r
        tl.store(dx + group * size + at, g.to(dx.dtype.element_ty), mask=inside)
