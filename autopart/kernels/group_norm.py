"""Group normalisation of images, alone or with SiLU behind it.

The C channels of x (N, C, *) are G groups of D = C / G channels of P pixels. For x of a group, with its mean m:

    r = rsqrt(mean((x - m)^2) + eps)
    h = (x - m) r
    z = h weight + bias             weight and bias of the channel
    y = z,  or  z sigmoid(z)        the second with SiLU

and with dz the gradient of z, which is dy, or dy s (1 + z (1 - s)) for s = sigmoid(z), and means over a group:

    dx      = (dz weight - h mean(dz weight h) - mean(dz weight)) r
    dweight = sum over samples and pixels of dz h
    dbias   = sum over samples and pixels of dz

Statistics and sums are in float32. A group of at most `group_norm_kernels.WHOLE` elements is one Triton program, which
reads it once. A larger group is read once for its statistics and once more to be normalised; in backward, once for its
sums and once for dx. For x of n elements of ``itemsize`` bytes, with p parameters in weight and bias, the least traffic
in bytes is

    forward   itemsize (2 n + p) + 8 N G        read x, write y, read weight and bias, write r and m (float32)
              itemsize (3 n + p) + 8 N G        of larger groups
    backward  itemsize (3 n + 2 p) + 8 N G      read x and dy, write dx, read the parameters, write their gradients
              itemsize (5 n + 2 p) + 8 N G      of larger groups

Partial statistics and sums, at most 1 % of that, are left out.

Source: Wu and He, Group Normalization, 2018.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autopart.kernels.group_norm_kernels import (
    MAX_PARTS,
    MAX_WIDTH,
    MOMENTS_WARPS,
    TILE,
    backward,
    compile_ahead,
    forward,
    moments,
    sizes_of,
)
from autopart.kernels.kernel import Bytes, Kernel
from autopart.kernels.launch import TRITON_NAMES, launch, power_of_two, processors, runs_on, triton_op


def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> Tensor:
    """Centre and normalise every group of x (N, C, *), scale by weight (C,), add bias (C,)."""
    return F.group_norm(x, groups, weight, bias, eps)


def silu_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> Tensor:
    """SiLU of ``reference``."""
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


def group_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> Tensor:
    """Every group of x (N, C, *) centred, normalised, scaled by weight (C,) and shifted by bias (C,): shape and dtype
    of x. By the Triton kernels where they apply, else by ``reference``."""
    if _applies(x, weight, bias, groups):
        return torch.ops.autopart.group_norm(x, weight, bias, groups, float(eps), False)[0]
    return reference(x, weight, bias, groups, eps)


def group_norm_silu(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> Tensor:
    """SiLU of ``group_norm``. The Triton kernels keep x alone for backward, and round once."""
    if _applies(x, weight, bias, groups):
        return torch.ops.autopart.group_norm(x, weight, bias, groups, float(eps), True)[0]
    return silu_reference(x, weight, bias, groups, eps)


def bytes_moved(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, *constants: object) -> Bytes:
    sizes = sizes_of(x, groups)
    parameters = sum(v.numel() for v in (weight, bias) if v is not None)
    n, statistics, again = x.numel(), 8 * sizes.groups, int(not sizes.whole)
    return Bytes(
        forward=x.itemsize * ((2 + again) * n + parameters) + statistics,
        backward=x.itemsize * ((3 + 2 * again) * n + 2 * parameters) + statistics,
    )


def kept(arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Input, weight, and for each group a reciprocal root and a mean in float32."""
    x, weight, _, groups, *_ = arguments
    statistics = x.new_empty((2, x.shape[0] * groups), dtype=torch.float32)
    return (x, statistics) if weight is None else (x, weight, statistics)


def silu_kept(arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As ``kept``, and the bias."""
    bias = arguments[2]
    return kept(arguments, outputs) if bias is None else (*kept(arguments, outputs), bias)


@triton_op("autopart::group_norm", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """y (N, C, *), contiguous, and r and m of every group, (2, N G) in float32."""
    sizes, h = sizes_of(x, groups), x.contiguous()
    size = sizes.width * sizes.pixels
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    statistics = torch.empty(2, sizes.groups, dtype=torch.float32, device=x.device)
    partial, parts, length = None, 0, 0
    if not sizes.whole:
        wanted = min(-(-8 * processors(x.device) // sizes.groups), MAX_PARTS)
        length = -(-size // (wanted * TILE)) * TILE
        parts = -(-size // length)
        partial = torch.empty(sizes.groups, parts, 2, dtype=torch.float32, device=x.device)
        options = {"BLOCK": TILE, "num_warps": MOMENTS_WARPS}
        launch(moments, sizes.groups * parts, h, partial, size, parts, length, **options)
    vectors = _flat(weight), _flat(bias)
    arguments = (h, *vectors, y, statistics, partial, sizes.width, sizes.pixels, groups, parts, length, eps)
    launch(forward, sizes.programs, *arguments, SILU=silu, PARTS=MAX_PARTS, **sizes.options)
    return y, statistics


@triton_op("autopart::group_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and those of weight and bias, (2, C) in float32."""
    sizes = sizes_of(x, groups)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(2, sizes.across, sizes.groups * sizes.width, dtype=torch.float32, device=x.device)
    integers = (sizes.width, sizes.pixels, groups)
    options = sizes.options | {"SILU": silu, "WIDTH": power_of_two(sizes.width)}
    inputs = (dy.contiguous(), x.contiguous(), _flat(weight), _flat(bias), statistics)
    launch(backward, sizes.programs, *inputs, dx if sizes.whole else None, partial, None, *integers, **options)
    sums = partial.sum(1)
    if not sizes.whole:
        launch(backward, sizes.programs, *inputs, dx, None, sums, *integers, **options)
    return dx, sums.view(2, *x.shape[:2]).sum(1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, groups, _, silu = inputs
    ctx.save_for_backward(x, weight, bias if silu else None, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.options = groups, silu
    ctx.dtypes = [None if v is None else v.dtype for v in (weight, bias)]


def _gradients(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dx, vectors = torch.ops.autopart.group_norm_backward(dy, *ctx.saved_tensors, *ctx.options)
    cast = [None if dtype is None else v.to(dtype) for v, dtype in zip(vectors, ctx.dtypes, strict=True)]
    return dx, *cast, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)


def _flat(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _applies(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int) -> bool:
    vectors = [v for v in (weight, bias) if v is not None]
    return (
        x.dtype in TRITON_NAMES
        and all(v.dtype in (x.dtype, torch.float32) for v in vectors)
        and x.dim() > 1
        and all(v.shape == x.shape[1:2] for v in vectors)
        and x.shape[1] % groups == 0
        and x.shape[1] // groups <= MAX_WIDTH
        and x.numel() < 2**30 * x.shape[0] * groups
        and runs_on(x, *vectors)
    )


SHAPES = {
    "Stable Diffusion 1.5, 64 x 64": {"channels": 320, "pixels": 4096},
    "Stable Diffusion 1.5, 16 x 16": {"channels": 1280, "pixels": 256},
    "Stable Diffusion 1.5, 8 x 8": {"channels": 1280, "pixels": 64},
    "Stable Diffusion's decoder, 512 x 512": {"channels": 128, "pixels": 262144},
}


def _kernel(function: Any, reference: Any, silu: bool) -> Kernel:
    return Kernel(
        function=function,
        reference=reference,
        rule="b c! h! w!, c!, c! -> b c! h! w!",
        kept=silu_kept if silu else kept,
        bytes_moved=bytes_moved,
        ahead=functools.partial(compile_ahead, silu=silu),
        shapes=SHAPES,
    )


KERNELS = (_kernel(group_norm, reference, False), _kernel(group_norm_silu, silu_reference, True))
