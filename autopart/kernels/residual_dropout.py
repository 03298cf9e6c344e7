"""A residual plus what dropout leaves of a bias and an output: y = residual + dropout(x + bias), and stochastic depth.

The mask is that of `autopart.kernels.dropout`, a hash of each element's row and column, so that nothing is kept for
backward but one int32 word for each row and each column. With z(i, j) = 1 where an element stays, else 0,

    y = residual + scale z (x + bias),    dx = scale z dy,    dbias = sum of dx over rows,    dresidual = dy

Every step is rounded to its dtype as by separate operators, so that the results are equal bit for bit, but for dbias.
Stochastic depth has one mask for each sample, whose word is that of its row and of column 0.

For x of n = rows x d elements of ``itemsize`` bytes the least traffic in bytes is

    forward   itemsize (3 n + d) + 4 (rows + d)     read x and residual, write y, read bias and the words
    backward  itemsize (2 n + d) + 4 (rows + d)     read dy, write dx and dbias, read the words

of which d is left out without a bias. The partial sums of dbias do not grow with n and are left out.

Sources: Srivastava et al., JMLR 15 (2014), dropout; Huang et al., arXiv 1603.09382, stochastic depth.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from autopart.kernels import dropout
from autopart.kernels.ahead import Usage, compile_kernels
from autopart.kernels.dropout import dropped, stays
from autopart.kernels.kernel import Bytes, Kernel
from autopart.kernels.launch import TRITON_NAMES, jit, launch, power_of_two, processors, runs_on, triton_op

tl: Any = None  # triton.language, which jit binds

ELEMENTS = 2048
"""Elements of x that a Triton program takes at a time."""
MAX_COLUMNS = 256
"""Columns of x that a Triton program takes at a time."""

Optional = Tensor | None


def reference(
    x: Tensor, bias: Optional, residual: Tensor, rows: Tensor, columns: Tensor, threshold: int, scale: float
) -> Tensor:
    """`residual_dropout` by separate operators."""
    h = x if bias is None else x + bias
    return residual + dropped(h, rows, columns, threshold, scale)


def residual_dropout(
    x: Tensor, bias: Optional, residual: Tensor, rows: Tensor, columns: Tensor, threshold: int, scale: float
) -> Tensor:
    """residual + dropout(x + bias): shape (..., d).

    x, residual   (..., d)
    bias          (d,), or None for 0
    rows          (...), int32: the word of every row
    columns       (d,), int32: the word of every column
    threshold     -2^31 + p 2^32 for a share p that is dropped, at most 2^31 - 1
    scale         1 / (1 - p)

    By the Triton kernels where they apply, else by ``reference``.
    """
    if _kernels_apply(x, bias, residual, rows, columns):
        return torch.ops.autopart.residual_dropout(x, bias, residual, rows, columns, threshold, float(scale), False)
    return reference(x, bias, residual, rows, columns, threshold, scale)


def depth_reference(x: Tensor, residual: Tensor, rows: Tensor, columns: Tensor, threshold: int, scale: float) -> Tensor:
    """`stochastic_depth` by separate operators."""
    ones = x.new_ones(len(x), 1, dtype=torch.promote_types(x.dtype, torch.float32))
    noise = dropout.by_blocks(ones, rows, columns, threshold, scale)
    return residual + (x * noise.view([len(x), *[1] * (x.dim() - 1)])).to(x.dtype)


def stochastic_depth(
    x: Tensor, residual: Tensor, rows: Tensor, columns: Tensor, threshold: int, scale: float
) -> Tensor:
    """residual + x noise: shape (samples, ...). The noise of a sample is 0, or else ``scale``, in float32 at least.

    x, residual   (samples, ...)
    rows          (samples,), int32: the word of every sample
    columns       (1,), int32: the word of column 0

    Other arguments as `residual_dropout`. By the Triton kernels where they apply, else by ``depth_reference``.
    """
    if _kernels_apply(x, None, residual, rows, columns):
        return torch.ops.autopart.residual_dropout(x, None, residual, rows, columns, threshold, float(scale), True)
    return depth_reference(x, residual, rows, columns, threshold, scale)


def bytes_moved(x: Tensor, bias: Optional, residual: Tensor, *rest: Any) -> Bytes:
    rows, columns = rest[:2]
    vectors = (0 if bias is None else x.itemsize * len(columns)) + 4 * (rows.numel() + len(columns))
    return Bytes(
        forward=x.numel() * (x.itemsize + 2 * residual.itemsize) + vectors,
        backward=2 * x.itemsize * x.numel() + vectors,
    )


def kept(arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The words of rows and columns."""
    return tuple(t for t in arguments if isinstance(t, Tensor) and t.dtype == torch.int32)


def compile_ahead(
    capability: int, d: int = 4096, dtype: torch.dtype = torch.bfloat16, bias: bool = True, samples: bool = False
) -> dict[str, Usage]:
    """Compile both kernels for rows of ``d`` elements and compute capability ``capability`` (90 for 9.0)."""
    types = dict.fromkeys(("x", "bias", "residual", "y", "dy", "dx"), f"*{TRITON_NAMES[dtype]}")
    types |= {"rows": "*i32", "columns": "*i32", "partial": "*fp32"}
    signature = types | dict.fromkeys(("count", "d", "threshold"), "i32") | {"scale": "fp32"}
    constexprs = {"BIAS": bias, "SAMPLES": samples} | _block(d)
    aligned = {*types, *(("d",) if d % 16 == 0 else ())}
    return compile_kernels((forward, backward), signature, constexprs, capability, aligned=aligned)


@jit
def drawn(  # type: ignore[no-untyped-def]
    rows, columns, row, column, count, d, threshold, SAMPLES: tl.constexpr
):
    """Whether elements stay; those of a sample stay together."""
    of_rows = tl.load(rows + row, mask=row < count, other=0)[:, None]
    at = column * 0 if SAMPLES else column
    return stays(of_rows, tl.load(columns + at, mask=column < d, other=0)[None, :], threshold)


@jit
def forward(  # type: ignore[no-untyped-def]
    x, bias, residual, rows, columns, y, count, d, threshold, scale, BIAS: tl.constexpr, SAMPLES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(d, COLUMNS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    here = (row < count)[:, None] & (column < d)[None, :]
    at = row[:, None] * d + column[None, :]
    scale = tl.cast(scale, tl.float32)
    h = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    if BIAS:
        h += tl.load(bias + column, mask=column < d, other=0.0).to(tl.float32)[None, :]
        h = h.to(x.dtype.element_ty).to(tl.float32)
    z = drawn(rows, columns, row, column, count, d, threshold, SAMPLES)
    if SAMPLES:
        h *= tl.where(z, scale, 0.0)
    else:
        h = tl.where(z, h * scale, 0.0)
    h = h.to(x.dtype.element_ty).to(tl.float32)
    h = tl.load(residual + at, mask=here, other=0.0).to(tl.float32) + h
    tl.store(y + at, h.to(y.dtype.element_ty), mask=here)


@jit
def backward(  # type: ignore[no-untyped-def]
    dy, rows, columns, dx, partial, count, d, threshold, scale, BIAS: tl.constexpr, SAMPLES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(d, COLUMNS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    scale = tl.cast(scale, tl.float32)
    program = (tl.program_id(0) // across).to(tl.int64)
    for block in range(program, tl.cdiv(count, ROWS), tl.num_programs(0) // across):
        row = block * ROWS + tl.arange(0, ROWS)
        here = (row < count)[:, None] & (column < d)[None, :]
        at = row[:, None] * d + column[None, :]
        g = tl.load(dy + at, mask=here, other=0.0).to(dx.dtype.element_ty).to(tl.float32)
        z = drawn(rows, columns, row, column, count, d, threshold, SAMPLES)
        if SAMPLES:
            g *= tl.where(z, scale, 0.0)
        else:
            g = tl.where(z, g * scale, 0.0)
        g = g.to(dx.dtype.element_ty)
        tl.store(dx + at, g, mask=here)
        if BIAS:
            total += tl.sum(tl.where(here, g.to(tl.float32), 0.0), 0)
    if BIAS:
        tl.store(partial + program * d + column, total, mask=column < d)


@triton_op("autopart::residual_dropout", mutates_args=())
def _forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    rows: Tensor,
    columns: Tensor,
    threshold: int,
    scale: float,
    samples: bool,
) -> Tensor:
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    count, d = rows.numel(), x.numel() // rows.numel()
    h, b = x.contiguous(), (x if bias is None else bias.contiguous())
    block = _block(d)
    programs = -(-count // block["ROWS"]) * -(-d // block["COLUMNS"])
    tensors = h, b, residual.contiguous(), rows.contiguous(), columns.contiguous(), y
    options = {"BIAS": bias is not None, "SAMPLES": samples, "enable_fp_fusion": False}
    launch(forward, programs, *tensors, count, d, threshold, scale, **block, **options)
    return y


@triton_op("autopart::residual_dropout_backward", mutates_args=())
def _backward(
    dy: Tensor,
    rows: Tensor,
    columns: Tensor,
    threshold: int,
    scale: float,
    samples: bool,
    dtype: torch.dtype,
    bias: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of x in its dtype, and that of the bias, of no elements where there is none."""
    count = rows.numel()
    d = dy.numel() // count
    dx = torch.empty(dy.shape, dtype=dtype, device=dy.device)
    block = _block(d)
    across = -(-d // block["COLUMNS"])
    down = min(-(-count // block["ROWS"]), -(-processors(dy.device) * 8 // across) if bias else 2**30)
    partial = torch.empty((down, d) if bias else (1, 0), dtype=torch.float32, device=dy.device)
    tensors = dy.contiguous(), rows.contiguous(), columns.contiguous(), dx, partial
    options = {"BIAS": bias, "SAMPLES": samples, "enable_fp_fusion": False}
    launch(backward, down * across, *tensors, count, d, threshold, scale, **block, **options)
    return dx, partial.sum(0).to(dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, residual, rows, columns, threshold, scale, samples = inputs
    ctx.save_for_backward(rows, columns)
    ctx.constants = threshold, scale, samples, x.dtype, bias is not None
    ctx.residual_dtype = residual.dtype


def _gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    rows, columns = ctx.saved_tensors
    of_residual = dy.to(ctx.residual_dtype) if ctx.needs_input_grad[2] else None
    if not any(ctx.needs_input_grad[:2]):
        return None, None, of_residual, *[None] * 5
    dx, dbias = torch.ops.autopart.residual_dropout_backward(dy, rows, columns, *ctx.constants)
    return dx, dbias if ctx.constants[-1] else None, of_residual, *[None] * 5


_forward.register_autograd(_gradients, setup_context=_save)


def _kernels_apply(x: Tensor, bias: Optional, residual: Tensor, rows: Tensor, columns: Tensor) -> bool:
    given = (x, residual) if bias is None else (x, residual, bias)
    return (
        all(t.dtype in TRITON_NAMES for t in given)
        and (bias is None or (bias.dtype == x.dtype and bias.shape == x.shape[-1:]))
        and residual.shape == x.shape
        and runs_on(*given, rows, columns)
    )


def _block(d: int) -> dict[str, int]:
    """Rows and columns of x that a Triton program takes at a time."""
    columns = min(power_of_two(d), MAX_COLUMNS)
    return {"ROWS": ELEMENTS // columns, "COLUMNS": columns}


KERNELS = (
    Kernel(
        function=residual_dropout,
        reference=reference,
        rule="... d, d, ... d, ..., d -> ... d",
        kept=kept,
        bytes_moved=bytes_moved,
        ahead=compile_ahead,
        shapes={"GPT-2 XL": {"d": 1600, "bias": False}, "T5-11B": {"d": 1024, "bias": False}},
        everywhere=True,
    ),
    Kernel(
        function=stochastic_depth,
        reference=depth_reference,
        rule="n ..., n ..., n, 1 -> n ...",
        kept=kept,
        bytes_moved=lambda x, *rest: bytes_moved(x, None, *rest),
        ahead=functools.partial(compile_ahead, bias=False, samples=True),
        shapes={"ViT-L/16": {"d": 197 * 1024}, "Swin-T": {"d": 3136 * 96}},
    ),
)
