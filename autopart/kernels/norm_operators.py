"""The operators of torch.library that run the kernels of `norm_rows`, and what is known of them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autopart.kernels.kernel import Bytes, Kernel, always
from autopart.kernels.launch import TRITON_NAMES, as_rows, launch, runs_on, triton_op
from autopart.kernels.norm_rows import MAX_BLOCK, Form, backward, compile_ahead, forward, height, options, programs


def of_sum(reference: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """x (..., d), residual (..., d), ... -> x + residual, and the reference of it and what follows."""

    def add_reference(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        total = x + residual
        return total, reference(total, *rest)

    return add_reference


def applies(x: Tensor, residual: Tensor | None, *vectors: Tensor | None) -> bool:
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


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, form: Form) -> Tensor:
    """y (..., d), by the kernels, of x (..., d)."""
    y: Tensor = torch.ops.autopart.norm_rows(x, None, weight, bias, float(eps), *form)[1]
    return y


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, form: Form
) -> tuple[Tensor, Tensor]:
    """s and y (..., d), by the kernels, of x and residual (..., d)."""
    total, y, _ = torch.ops.autopart.norm_rows(x, residual, weight, bias, float(eps), *form)
    return total, y


@triton_op("autopart::norm_rows", mutates_args=())
def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool,
    unit_offset: bool, round_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """s (..., d), of no elements where there is no residual; y (..., d); and the statistics of every row, (1 or 2,
    rows) in float32: r, and m where the norm is centred."""
    form, h = Form(centred, unit_offset, round_first), as_rows(x)
    rows, d = h.shape
    r = None if residual is None else as_rows(residual)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    total = torch.empty(0 if residual is None else x.shape, dtype=dtype, device=x.device)
    wide = torch.promote_types(dtype, weight.dtype) if round_first and weight is not None else dtype
    y = torch.empty(x.shape, dtype=wide, device=x.device)
    statistics = torch.empty(1 + centred, rows, dtype=torch.float32, device=x.device)
    vectors = [None if v is None else v.contiguous() for v in (weight, bias)]
    tensors = (h, r, *vectors, None if r is None else total, y, statistics)
    sizes = (h.stride(0), 0 if r is None else r.stride(0), rows, d, eps)
    launch(forward, -(-rows // height(d)), *tensors, *sizes, **form.constexprs, **options(d))
    return total, y, statistics


@triton_op("autopart::norm_rows_backward", mutates_args=())
def _backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor | None, statistics: Tensor, unit_offset: bool,
    dweight: bool, dbias: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient of x, which is s where a residual was added, and those asked for of weight and bias, (0 to 2, d) in
    float32."""
    g, h = as_rows(dy), as_rows(x)
    t = None if dtotal is None else as_rows(dtotal)
    rows, d = h.shape
    count = programs(rows, d, x.device)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial_sums = torch.empty(dweight + dbias, count, d, dtype=torch.float32, device=x.device)
    tensors = (g, t, h, None if weight is None else weight.contiguous(), statistics, dx, partial_sums)
    sizes = (g.stride(0), 0 if t is None else t.stride(0), h.stride(0), rows, d)
    flags = {"CENTRED": len(statistics) == 2, "UNIT_OFFSET": unit_offset, "DWEIGHT": dweight, "DBIAS": dbias}
    launch(backward, count, *tensors, *sizes, **flags, **options(d))
    return dx, partial_sums.sum(1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _, _, ctx.unit_offset, _ = inputs
    total, _, statistics = output
    ctx.save_for_backward(x if residual is None else total, weight, statistics)
    ctx.mark_non_differentiable(statistics, *([total] if residual is None else []))
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if t is None else t.dtype for t in (x, residual, weight, bias)]


def _gradients(ctx: Any, dtotal: Tensor | None, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    asked = ctx.needs_input_grad[2:4]
    vectors: list[Tensor | None] = [None, None]
    dx = dtotal
    if dy is not None:
        x, weight, statistics = ctx.saved_tensors
        dx, found = torch.ops.autopart.norm_rows_backward(dy, dtotal, x, weight, statistics, ctx.unit_offset, *asked)
        gradients = iter(found)
        vectors = [next(gradients) if wanted else None for wanted in asked]
    each = zip((dx, dx, *vectors), ctx.dtypes, strict=True)
    return *(None if g is None or dtype is None else g.to(dtype) for g, dtype in each), None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)


def same_shape(x: Tensor, residual: Tensor, *rest: object) -> bool:
    """Whether the residual is no bias and does not broadcast, as `Kernel.pays` of what adds it."""
    return x.shape == residual.shape


def norm_kernel(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    form: Form,
    shapes: Mapping[str, Mapping[str, Any]],
    adds: bool = False,
    biased: bool = False,
) -> Kernel:
    """The record of a norm of x (..., d), or of x + residual if it ``adds``, by weight (d,), and bias (d,) if it is
    ``biased``."""
    rows, vectors = ["... d!"] * (1 + adds), ["d!"] * (1 + biased)
    absent = tuple(name for name, given in (("residual", adds), ("bias", biased)) if not given)

    def kept(arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The normalised input, the weight, and the statistics of every row in float32."""
        total, weight = outputs[0] if adds else arguments[0], arguments[1 + adds]
        statistics = total.new_empty((1 + form.centred, *total.shape[:-1]), dtype=torch.float32)
        return (total, statistics) if weight is None else (total, weight, statistics)

    def bytes_moved(x: Tensor, *rest: Any) -> Bytes:
        """What `norm_rows` reads and writes, all of it in the dtype of x but the statistics."""
        n, d = x.numel(), x.shape[-1]
        given = sum(v is not None for v in rest[adds : adds + 1 + biased])
        weights, statistics = int(rest[adds] is not None), 4 * (1 + form.centred) * n // d
        return Bytes(
            forward=x.itemsize * ((4 if adds else 2) * n + given * d) + statistics,
            backward=x.itemsize * ((4 if adds else 3) * n + (weights + given) * d) + statistics,
        )

    return Kernel(
        function=function,
        reference=reference,
        rule=f"{', '.join(rows + vectors)} -> {', '.join(rows)}",
        kept=kept,
        bytes_moved=bytes_moved,
        ahead=partial(compile_ahead, form=form, absent=absent),
        shapes=shapes,
        pays=same_shape if adds else always,
    )
