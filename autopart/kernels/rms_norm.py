"""RMS normalisation over the last dimension, as Llama and T5 models write it.

With ``rows`` rows of ``d`` elements of ``itemsize`` bytes, the least traffic is

* forward: read x, write y, read weight, write rstd: ``itemsize * (2 * rows * d + d) + 4 * rows``
* backward: read x and dy, write dx, read weight, write dweight, read rstd:
  ``itemsize * (3 * rows * d + 2 * d) + 4 * rows``

The partial sums of dweight (float32, one row a program) are left out: they do not grow with ``rows``.
"""

import functools
import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from autopart.kernels.ahead import Usage, compile_kernel

tl: Any  # bound by kernels(): Triton's interpreter looks for its language among a kernel's globals

MAX_BLOCK = 65536
"""Elements of the longest row the kernels take; past 16384 of them the backward spills registers."""

FORWARD_FLOPS = 4
"""Operations an element: square, add, two multiplications."""

BACKWARD_FLOPS = 9
"""Operations an element: w*dy, x*rstd, their dot product (2), subtract c*xhat (2), *rstd, dweight (2)."""

REFERENCE_GRADIENTS = 5
"""Tensors of x's shape, in the dtype it computes in, that exist at once in the backward of ``reference``, besides what
autograd keeps: counted on torch 2.13, at the product with x in the gradient of the square."""

_TRITON_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Bytes(NamedTuple):
    """Device memory traffic in bytes."""

    forward: int
    backward: int


class Kernels(NamedTuple):
    """The two ``triton.jit`` functions."""

    forward: Any
    backward: Any


def reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, compute_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Normalise x (..., d) and scale by weight (d,), in ``compute_dtype``, or in x's when that is None."""
    h = x if compute_dtype is None else x.to(compute_dtype)
    v = h.pow(2).mean(-1, keepdim=True)
    h = h * torch.rsqrt(v + eps)
    return weight * (h if compute_dtype is None else h.to(x.dtype))


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, compute_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """``reference`` through the Triton kernels where they apply: x (..., d), weight (d,), result (..., d).

    The kernels compute in float32, so a half-precision x with ``compute_dtype`` None comes out more
    accurate than from ``reference``. Tensor subclasses, fake tensors among them, take the reference.
    """
    if _kernels_apply(x, weight, compute_dtype):
        return _RmsNorm.apply(x, weight, float(eps))
    return reference(x, weight, eps, compute_dtype)


def bytes_moved(shape: tuple[int, ...], itemsize: int) -> Bytes:
    """Least traffic for x and weight of ``itemsize`` bytes an element, x of ``shape`` (..., d)."""
    *leading, d = shape
    rows = functools.reduce(int.__mul__, leading, 1)
    return Bytes(
        forward=itemsize * (2 * rows * d + d) + 4 * rows,
        backward=itemsize * (3 * rows * d + 2 * d) + 4 * rows,
    )


def compile_ahead(capability: int, d: int = 4096, dtype: torch.dtype = torch.bfloat16) -> dict[str, Usage]:
    """Compile both kernels for contiguous rows of ``d`` elements on ``capability`` (90 for 9.0)."""
    data = f"*{_TRITON_NAMES[dtype]}"
    types = dict.fromkeys(("x", "weight", "y", "dy", "dx"), data)
    types |= dict.fromkeys(("rstd", "partial"), "*fp32")
    lengths = dict.fromkeys(("x_stride", "dy_stride", "d"), "i32")
    aligned = {*types, *(lengths if d % 16 == 0 else ())}
    signature = types | lengths | {"rows": "i32", "eps": "fp32"}
    constexprs = {"BLOCK": _block(d)}
    return {
        name: compile_kernel(kernel, signature, constexprs, capability, _warps(d), aligned)
        for name, kernel in kernels()._asdict().items()
    }


@functools.cache
def kernels() -> Kernels:
    """Decorate the kernels; the first call imports Triton and settles whether they are interpreted."""
    global tl
    import triton
    import triton.language as tl

    @triton.jit
    def forward(x, weight, y, rstd, x_stride, d, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        cols = tl.arange(0, BLOCK)
        mask = cols < d
        h = tl.load(x + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(h * h, 0) / d + eps)
        tl.store(rstd + row, r)
        h = (h * r).to(x.dtype.element_ty).to(tl.float32)
        tl.store(y + row * d + cols, (w * h).to(y.dtype.element_ty), mask=mask)

    @triton.jit
    def backward(  # type: ignore[no-untyped-def]
        dy, x, weight, rstd, dx, partial, dy_stride, x_stride, rows, d, BLOCK: tl.constexpr
    ):
        program = tl.program_id(0).to(tl.int64)
        cols = tl.arange(0, BLOCK)
        mask = cols < d
        dw = tl.zeros((BLOCK,), tl.float32)
        for row in range(program, rows, tl.num_programs(0)):
            r = tl.load(rstd + row)
            h = tl.load(x + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32) * r
            g = tl.load(dy + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
            dw += g * h
            w = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
            g *= w
            g = (g - h * (tl.sum(g * h, 0) / d)) * r
            tl.store(dx + row * d + cols, g.to(dx.dtype.element_ty), mask=mask)
        tl.store(partial + program * d + cols, dw, mask=mask)

    return Kernels(forward, backward)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        d = x.shape[-1]
        h = _as_rows(x)
        w = weight.contiguous()
        y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
        rstd = torch.empty(len(h), dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            kernels().forward[(len(h),)](h, w, y, rstd, h.stride(0), d, eps, **_options(d))
        ctx.save_for_backward(h, w, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        h, w, rstd = ctx.saved_tensors
        rows, d = h.shape
        g = _as_rows(dy)
        dx = torch.empty_like(h, memory_format=torch.contiguous_format)
        programs = _backward_programs(rows, d, h.device)
        partial = torch.empty(programs, d, dtype=torch.float32, device=h.device)
        with torch.cuda.device_of(h):
            arguments = (g, h, w, rstd, dx, partial, g.stride(0), h.stride(0), rows, d)
            kernels().backward[(programs,)](*arguments, **_options(d))
        return dx.view(dy.shape), partial.sum(0).to(w.dtype), None


def _kernels_apply(x: torch.Tensor, weight: torch.Tensor, compute_dtype: torch.dtype | None) -> bool:
    plain = (torch.Tensor, torch.nn.Parameter)
    return (
        type(x) in plain
        and type(weight) in plain
        and x.dtype in _TRITON_NAMES
        and weight.dtype in _TRITON_NAMES
        and compute_dtype in (None, torch.float32)
        and weight.shape == x.shape[-1:]
        and weight.device == x.device
        and x.numel() > 0
        and x.shape[-1] <= MAX_BLOCK
        and _triton_runs_on(x)
    )


def _triton_runs_on(x: torch.Tensor) -> bool:
    names = ("TRITON_INTERPRET", "AUTOPART_FORCE_TRITON")
    wanted = x.is_cuda or all(os.environ.get(name) == "1" for name in names)
    return wanted and importlib.util.find_spec("triton") is not None


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """View x (..., d) as (rows, d) with adjacent elements in a row, copying only when it must."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _block(d: int) -> int:
    return 1 << (d - 1).bit_length()


def _warps(d: int) -> int:
    """Sixteen elements a thread, more past 8192: the backward of rows whose length 16 divides spills nothing up to
    16384."""
    return 32 if _block(d) > 16384 else min(max(_block(d) // 512, 1), 16)


def _options(d: int) -> dict[str, Any]:
    return {"BLOCK": _block(d), "num_warps": _warps(d), "enable_fp_fusion": True}


def _backward_programs(rows: int, d: int, device: torch.device) -> int:
    """Enough programs to keep about 16384 elements of x and of dy in flight on every multiprocessor."""
    if device.type != "cuda":
        return min(rows, 4)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(rows, processors * min(max(16384 // _block(d), 1), 16))
