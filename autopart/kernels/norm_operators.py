"""The operators of torch.library that run the kernels of `norm_rows`, and what is known of them."""

from typing import Any

import torch

from autopart.kernels.kernel import Bytes
from autopart.kernels.launch import TRITON_NAMES, as_rows, runs_on, triton_op
from autopart.kernels.norm_rows import MAX_BLOCK, Form, launch_backward, launch_forward


def applies(x: torch.Tensor, residual: torch.Tensor | None, *vectors: torch.Tensor | None) -> bool:
    """Whether the kernels take x (..., d), residual (..., d), and weight and bias (d,)."""
    tensors = [t for t in (x, residual, *vectors) if t is not None]
    return (
        all(t.dtype in TRITON_NAMES for t in tensors)
        and (residual is None or residual.shape == x.shape)
        and all(v is None or v.shape == x.shape[-1:] for v in vectors)
        and x.dim() > 0
        and x.shape[-1] <= MAX_BLOCK
        and runs_on(*tensors)
    )


def bytes_moved(form: Form, x: torch.Tensor, residual: torch.Tensor | None, *vectors: torch.Tensor | None) -> Bytes:
    """As `Kernel.bytes_moved`, of what `norm_rows` reads and writes, all of it in the dtype of x but the statistics."""
    n, d = x.numel(), x.shape[-1]
    given, weights = sum(v is not None for v in vectors), int(vectors[0] is not None)
    statistics = 4 * (1 + form.centred) * n // d
    return Bytes(
        forward=x.itemsize * ((2 if residual is None else 4) * n + given * d) + statistics,
        backward=x.itemsize * ((3 if residual is None else 4) * n + (weights + given) * d) + statistics,
    )


def kept(form: Form, total: torch.Tensor, weight: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The normalised input, the weight, and the statistics of every row in float32."""
    statistics = total.new_empty((1 + form.centred, *total.shape[:-1]), dtype=torch.float32)
    return (total, statistics) if weight is None else (total, weight, statistics)


def norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, form: Form
) -> torch.Tensor:
    """y (..., d), by the kernels, of x (..., d)."""
    y: torch.Tensor = torch.ops.autopart.norm_rows(x, weight, bias, float(eps), *form)[0]
    return y


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    form: Form,
) -> tuple[torch.Tensor, torch.Tensor]:
    """s and y (..., d), by the kernels, of x and residual (..., d)."""
    total, y, _ = torch.ops.autopart.add_norm_rows(x, residual, weight, bias, float(eps), *form)
    return total, y


@triton_op("autopart::norm_rows", mutates_args=())
def _norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    centred: bool,
    unit_offset: bool,
    round_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (..., d) and the statistics of every row, (1 or 2, rows) in float32: r, and m where the norm is centred."""
    form = Form(centred, unit_offset, round_first)
    y, statistics = _results(x, x.dtype, weight, form)
    launch_forward(as_rows(x), None, weight, bias, None, y, statistics, eps, form)
    return y, statistics


@triton_op("autopart::add_norm_rows", mutates_args=())
def _add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    centred: bool,
    unit_offset: bool,
    round_first: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """s (..., d), and the results of ``autopart::norm_rows`` on it."""
    form = Form(centred, unit_offset, round_first)
    total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    y, statistics = _results(x, total.dtype, weight, form)
    launch_forward(as_rows(x), as_rows(residual), weight, bias, total, y, statistics, eps, form)
    return total, y, statistics


def _results(
    x: torch.Tensor, dtype: torch.dtype, weight: torch.Tensor | None, form: Form
) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty y and statistics for s of the shape of x and of ``dtype``."""
    wide = torch.promote_types(dtype, weight.dtype) if form.round_first and weight is not None else dtype
    return (
        torch.empty(x.shape, dtype=wide, device=x.device),
        torch.empty(1 + form.centred, x.numel() // x.shape[-1], dtype=torch.float32, device=x.device),
    )


@triton_op("autopart::norm_rows_backward", mutates_args=())
def _backward(
    dy: torch.Tensor,
    dtotal: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    statistics: torch.Tensor,
    unit_offset: bool,
    dweight: bool,
    dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of x, which is s where a residual was added, and those asked for of weight and bias, (0 to 2, d) in
    float32."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    t = None if dtotal is None else as_rows(dtotal)
    partial = launch_backward(as_rows(dy), t, as_rows(x), weight, statistics, dx, unit_offset, dweight, dbias)
    return dx, partial.sum(1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, weight, bias, _, _, unit_offset, _ = inputs
    ctx.save_for_backward(tensors[0] if len(tensors) == 1 else output[0], weight, output[-1])
    ctx.mark_non_differentiable(output[-1])
    ctx.set_materialize_grads(False)
    ctx.unit_offset = unit_offset
    ctx.dtypes = [None if t is None else t.dtype for t in (*tensors, weight, bias)]


def _gradients(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the arguments of ``autopart::norm_rows``, or of ``autopart::add_norm_rows``, whose first result is
    s."""
    *summed, dy, _ = grads
    dtotal = summed[0] if summed else None
    asked = ctx.needs_input_grad[len(ctx.dtypes) - 2 : len(ctx.dtypes)]
    vectors: list[torch.Tensor | None] = [None, None]
    dx = dtotal
    if dy is not None:
        x, weight, statistics = ctx.saved_tensors
        dx, found = torch.ops.autopart.norm_rows_backward(dy, dtotal, x, weight, statistics, ctx.unit_offset, *asked)
        gradients = iter(found)
        vectors = [next(gradients) if wanted else None for wanted in asked]
    each = [*[dx] * (len(summed) + 1), *vectors]
    cast = [None if g is None else g.to(dtype) for g, dtype in zip(each, ctx.dtypes, strict=True)]
    return *cast, None, None, None, None


_norm.register_autograd(_gradients, setup_context=_save)
_add_norm.register_autograd(_gradients, setup_context=_save)


def same_shape(x: torch.Tensor, residual: torch.Tensor, *rest: object) -> bool:
    """Whether the residual is no bias and does not broadcast, as `Kernel.pays` of what adds it."""
    return x.shape == residual.shape
