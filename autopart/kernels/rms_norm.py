"""RMS normalisation over the last dim, as Llama and T5 models write it.

For x of ``rows`` rows of ``d`` elements of ``itemsize`` bytes, the least traffic in bytes is

    forward   itemsize (2 rows d + d) + 4 rows      read x, write y, read weight, write rstd (float32)
    backward  itemsize (3 rows d + 2 d) + 4 rows    read x and dy, write dx, read weight, write dweight, read rstd

The partial sums of dweight, one float32 row for each Triton program, are left out: they do not grow with ``rows``.
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
"""Elements of the longest row that the kernels take. In rows of more than 16384 the backward spills registers."""


REFERENCE_GRADIENTS = 5
"""The most tensors of x's shape, in the compute dtype, that are alive at once in the backward of ``reference``, without
those that autograd saved. Counted on torch 2.13: the peak is at the product with x in the gradient of the square."""

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
    """x (..., d) normalised and scaled by weight (d,): shape (..., d). By the Triton kernels where they apply, else by
    ``reference``.

    The kernels compute in float32. A half-precision x with ``compute_dtype`` None is more accurate by the kernels than
    by ``reference``. Tensor subclasses, such as fake tensors, take ``reference``.
    """
    if _kernels_apply(x, weight, compute_dtype):
        return _RmsNorm.apply(x, weight, float(eps))
    return reference(x, weight, eps, compute_dtype)


def bytes_moved(shape: tuple[int, ...], itemsize: int) -> Bytes:
    """Least bytes that the kernels read and write, for x of ``shape`` (..., d) and elements of ``itemsize`` bytes."""
    *leading, d = shape
    rows = functools.reduce(int.__mul__, leading, 1)
    return Bytes(
        forward=itemsize * (2 * rows * d + d) + 4 * rows,
        backward=itemsize * (3 * rows * d + 2 * d) + 4 * rows,
    )


def compile_ahead(capability: int, d: int = 4096, dtype: torch.dtype = torch.bfloat16) -> dict[str, Usage]:
    """Compile both kernels for contiguous rows of ``d`` elements and compute capability ``capability`` (90 for 9.0)."""
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
    """The ``triton.jit`` functions. The first call imports Triton, which reads TRITON_INTERPRET from the environment
    then."""
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
    """x (..., d) as (rows, d) with stride 1 along a row: a view, or a copy where x has another stride."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _block(d: int) -> int:
    return 1 << (d - 1).bit_length()


def _warps(d: int) -> int:
    """Warps of a program: 16 elements for each thread, at most 16 warps; 32 warps for rows of more than 16384. So the
    backward spills nothing up to 16384 elements, if 16 divides them."""
    return 32 if _block(d) > 16384 else min(max(_block(d) // 512, 1), 16)


def _options(d: int) -> dict[str, Any]:
    return {"BLOCK": _block(d), "num_warps": _warps(d), "enable_fp_fusion": True}


def _backward_programs(rows: int, d: int, device: torch.device) -> int:
    """Programs of the backward: on each multiprocessor as many as hold 16384 elements of x, at most 16."""
    if device.type != "cuda":
        return min(rows, 4)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(rows, processors * min(max(16384 // _block(d), 1), 16))
