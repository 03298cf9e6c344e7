"""RMS normalisation over the last dim, as Llama and T5 models write it.

For x of ``rows`` rows of ``d`` elements of ``itemsize`` bytes, the least traffic in bytes is

    forward   itemsize (2 rows d + d) + 4 rows      read x, write y, read weight, write rstd (float32)
    backward  itemsize (3 rows d + 2 d) + 4 rows    read x and dy, write dx, read weight, write dweight, read rstd

The partial sums of dweight, one float32 row for each Triton program, are left out: they do not grow with ``rows``.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch.library import triton_op

from autopart.kernels.ahead import Usage, compile_kernel
from autopart.kernels.kernel import Bytes, Kernel, example, meta
from autopart.kernels.launch import TRITON_NAMES, as_rows, launch, power_of_two, processors, runs_on

tl: Any  # bound by kernels(): Triton's interpreter looks for its language among a kernel's globals

MAX_BLOCK = 65536
"""Elements of the longest row that the kernels take. In rows of more than 16384 the backward spills registers."""


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
        return torch.ops.autopart.rms_norm(x, weight, float(eps))[0]
    return reference(x, weight, eps, compute_dtype)


def bytes_moved(x: torch.Tensor, weight: torch.Tensor, *constants: object) -> Bytes:
    """As `Kernel.bytes_moved`; the formulas are on top of this file."""
    d = x.shape[-1]
    rows = x.numel() // d
    return Bytes(
        forward=x.itemsize * (2 * rows * d + d) + 4 * rows,
        backward=x.itemsize * (3 * rows * d + 2 * d) + 4 * rows,
    )


def kept(arguments: tuple[Any, ...], outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Input, weight, and for each row a reciprocal root in float32."""
    x, weight, *_ = arguments
    return x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32)


def compile_ahead(capability: int, d: int = 4096, dtype: torch.dtype = torch.bfloat16) -> dict[str, Usage]:
    """Compile both kernels for contiguous rows of ``d`` elements and compute capability ``capability`` (90 for 9.0)."""
    data = f"*{TRITON_NAMES[dtype]}"
    types = dict.fromkeys(("x", "weight", "y", "dy", "dx"), data)
    types |= dict.fromkeys(("rstd", "partial"), "*fp32")
    lengths = dict.fromkeys(("x_stride", "dy_stride", "d"), "i32")
    aligned = {*types, *(lengths if d % 16 == 0 else ())}
    signature = types | lengths | {"rows": "i32", "eps": "fp32"}
    constexprs = {"BLOCK": power_of_two(d)}
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


@triton_op("autopart::rms_norm", mutates_args=())
def _forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """y (..., d) and the reciprocal root of every row, float32."""
    d = x.shape[-1]
    h = as_rows(x)
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    rstd = torch.empty(len(h), dtype=torch.float32, device=x.device)
    launch(kernels().forward, len(h), h, weight.contiguous(), y, rstd, h.stride(0), d, eps, **_options(d))
    return y, rstd


@triton_op("autopart::rms_norm_backward", mutates_args=())
def _backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and of weight."""
    h, g, w = as_rows(x), as_rows(dy), weight.contiguous()
    rows, d = h.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs = _backward_programs(rows, d, x.device)
    partial = torch.empty(programs, d, dtype=torch.float32, device=x.device)
    arguments = (g, h, w, rstd, dx, partial, g.stride(0), h.stride(0), rows, d)
    launch(kernels().backward, programs, *arguments, **_options(d))
    return dx, partial.sum(0).to(w.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dy: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    x, weight, rstd = ctx.saved_tensors
    return *torch.ops.autopart.rms_norm_backward(dy, x, weight, rstd), None


_forward.register_autograd(_gradients, setup_context=_save)


def _kernels_apply(x: torch.Tensor, weight: torch.Tensor, compute_dtype: torch.dtype | None) -> bool:
    return (
        x.dtype in TRITON_NAMES
        and weight.dtype in TRITON_NAMES
        and compute_dtype in (None, torch.float32)
        and weight.shape == x.shape[-1:]
        and x.shape[-1] <= MAX_BLOCK
        and runs_on(x, weight)
    )


def _warps(d: int) -> int:
    """Warps of a program: 16 elements for each thread, at most 16 warps; 32 warps for rows of more than 16384. So the
    backward spills nothing up to 16384 elements, if 16 divides them."""
    block = power_of_two(d)
    return 32 if block > 16384 else min(max(block // 512, 1), 16)


def _options(d: int) -> dict[str, Any]:
    return {"BLOCK": power_of_two(d), "num_warps": _warps(d), "enable_fp_fusion": True}


def _backward_programs(rows: int, d: int, device: torch.device) -> int:
    """Programs of the backward: on each multiprocessor as many as hold 16384 elements of x, at most 16."""
    each = min(max(16384 // power_of_two(d), 1), 16) if device.type == "cuda" else 1
    return min(rows, processors(device) * each)


KERNEL = Kernel(
    function=rms_norm,
    reference=reference,
    rule="... d!, d! -> ... d!",
    examples=(
        example("aten.rsqrt", meta(2, 3, 8), meta(8), 0.0123, None),
        example("aten.rsqrt", meta(2, 3, 8, dtype=torch.bfloat16), meta(8), 0.0123, torch.float32),
    ),
    kept=kept,
    bytes_moved=bytes_moved,
    ahead=compile_ahead,
    shapes={"Llama-3-8B": {"d": 4096}, "Mixtral-8x7B": {"d": 4096}, "T5-11B": {"d": 1024}, "Qwen3's heads": {"d": 128}},
)
