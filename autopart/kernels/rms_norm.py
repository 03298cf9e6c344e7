"""RMS normalisation over the last dim, of x or of x + residual.

    rms_norm          as Llama and T5 models write it: rounded to the dtype of x before the product with weight
    rms_norm_float32  as Gemma, OLMo 2, GPT-OSS and Llama 4 models write it: rounded at the end only

``add_rms_norm`` and ``add_rms_norm_float32`` are the same of x + residual, and return that sum too. The formulas and
the least traffic are those of `norm_rows`.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
"""

from typing import Any

import torch

from autopart.kernels import on_cpu
from autopart.kernels.norm_operators import add_norm, applies, norm, norm_kernel, of_sum
from autopart.kernels.norm_rows import PLAIN, Form

ROUND_FIRST = Form(round_first=True)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    compute_dtype: torch.dtype | None = None,
    square_only: bool = False,
) -> torch.Tensor:
    """Normalise x (..., d) and scale by weight (d,), in ``compute_dtype``, or in x's when that is None.

    With ``square_only``, as T5 writes it, x itself is multiplied by the reciprocal root, to whose dtype it is promoted.
    The result is the same. The gradient of x is then a sum of two terms that are each rounded to its dtype.
    """
    h = x if compute_dtype is None else x.to(compute_dtype)
    v = h.pow(2).mean(-1, keepdim=True)
    h = (x if square_only else h) * torch.rsqrt(v + eps)
    return weight * (h if compute_dtype is None else h.to(x.dtype))


def float32_reference(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, unit_offset: bool = False, by_power: bool = False
) -> torch.Tensor:
    """Normalise x (..., d) and scale by weight (d,), or by 1 + weight with ``unit_offset``, in float32.

    The reciprocal root is a ``pow`` with ``by_power``, as Gemma 3n and Gemma 4 write it, else a ``rsqrt``.
    """
    h = x.float()
    v = h.pow(2).mean(-1, keepdim=True) + eps
    h = h * (torch.pow(v, -0.5) if by_power else torch.rsqrt(v))
    if weight is not None:
        h = h * (1.0 + weight.float() if unit_offset else weight.float())
    return h.type_as(x)


add_reference, add_float32_reference = of_sum(reference), of_sum(float32_reference)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    compute_dtype: torch.dtype | None = None,
    square_only: bool = False,
) -> torch.Tensor:
    """x (..., d) normalised and scaled by weight (d,): shape (..., d). By the Triton kernels where they apply, by
    `on_cpu.RmsNorm` on CPUs, else by ``reference``.

    The kernels compute in float32 and take no notice of ``square_only``. A half-precision x with ``compute_dtype`` None
    is more accurate by the kernels than by ``reference``. Fake tensors take what a CPU takes.
    """
    if compute_dtype in (None, torch.float32) and applies(x, None, weight):
        return norm(x, weight, None, eps, ROUND_FIRST)
    return _without_triton(x, weight, eps, compute_dtype, square_only)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    compute_dtype: torch.dtype | None = None,
    square_only: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + residual, and that normalised and scaled by weight (d,): both (..., d). As ``rms_norm``."""
    if compute_dtype in (None, torch.float32) and applies(x, residual, weight):
        return add_norm(x, residual, weight, None, eps, ROUND_FIRST)
    total = x + residual
    return total, _without_triton(total, weight, eps, compute_dtype, square_only)


def _without_triton(
    x: torch.Tensor, weight: torch.Tensor, eps: float, compute_dtype: torch.dtype | None, square_only: bool
) -> torch.Tensor:
    if compute_dtype in (None, x.dtype) and on_cpu.normalises(x, weight):
        y: torch.Tensor = on_cpu.RmsNorm.apply(x, weight, eps)
        return y
    return reference(x, weight, eps, compute_dtype, square_only)


def rms_norm_float32(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, unit_offset: bool = False, by_power: bool = False
) -> torch.Tensor:
    """x (..., d) normalised and scaled by weight (d,), or by 1 + weight with ``unit_offset``: shape and dtype of x.

    By the Triton kernels where they apply, else by ``float32_reference``. The kernels take no notice of ``by_power``.
    """
    if applies(x, None, weight):
        return norm(x, weight, None, eps, Form(unit_offset=unit_offset))
    return float32_reference(x, weight, eps, unit_offset, by_power)


def add_rms_norm_float32(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    unit_offset: bool = False,
    by_power: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + residual, and that normalised and scaled by weight (d,): both (..., d). As ``rms_norm_float32``."""
    if applies(x, residual, weight):
        return add_norm(x, residual, weight, None, eps, Form(unit_offset=unit_offset))
    return add_float32_reference(x, residual, weight, eps, unit_offset, by_power)


SHAPES = {"Llama-3-8B": {"d": 4096}, "Mixtral-8x7B": {"d": 4096}, "T5-11B": {"d": 1024}}
GEMMA = {"d": 3072, "form": Form(unit_offset=True)}
FLOAT32_SHAPES: dict[str, dict[str, Any]] = {
    "Gemma-7B": GEMMA,
    "Gemma-3-27B's heads": {"d": 128, "form": Form(unit_offset=True)},
    "OLMo-2-7B": {"d": 4096},
    "Llama-4's heads": {"d": 128, "absent": ("residual", "weight", "bias")},
}
SUM_SHAPES: dict[str, dict[str, Any]] = {"Gemma-7B": GEMMA, "GPT-OSS-20B": {"d": 2880}}

KERNELS = (
    norm_kernel(rms_norm, reference, ROUND_FIRST, {**SHAPES, "Qwen3's heads": {"d": 128}}),
    norm_kernel(add_rms_norm, add_reference, ROUND_FIRST, SHAPES, adds=True),
    norm_kernel(rms_norm_float32, float32_reference, PLAIN, FLOAT32_SHAPES),
    norm_kernel(add_rms_norm_float32, add_float32_reference, PLAIN, SUM_SHAPES, adds=True),
)
