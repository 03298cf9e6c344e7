"""Layer normalisation over the last dim, of x or of x + residual.

    layer_norm          ``torch.nn.functional.layer_norm`` with one normalised dim
    add_layer_norm      the same of x + residual, which is returned too
    layer_norm_float32  as Cohere's models write it out: in float32, without bias

The formulas and the least traffic are those of `norm_rows`.

Source: Ba, Kiros and Hinton, Layer Normalization, 2016.
"""

import torch
from torch.nn import functional as F

from autopart.kernels.norm_operators import add_norm, applies, norm, norm_kernel, of_sum
from autopart.kernels.norm_rows import Form

CENTRED = Form(centred=True)


def reference(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Centre and normalise x (..., d), scale by weight (d,), add bias (d,)."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


add_reference = of_sum(reference)


def float32_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Centre and normalise x (..., d) and scale by weight, in float32."""
    h = x.to(torch.float32)
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    h = (h - mean) * torch.rsqrt(variance + eps)
    h = weight.to(torch.float32) * h
    return h.to(x.dtype)


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x (..., d) centred, normalised, scaled by weight (d,) and shifted by bias (d,): shape and dtype of x.

    By the Triton kernels where they apply, else by ``reference``. Tensor subclasses, such as fake tensors, take
    ``reference``.
    """
    if _mixed(x.dtype, weight, bias) and applies(x, None, weight, bias):
        return norm(x, weight, bias, eps, CENTRED)
    return reference(x, weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + residual, and that centred, normalised, scaled by weight (d,) and shifted by bias (d,): both (..., d), in the
    dtype of the sum. As ``layer_norm``."""
    if _mixed(torch.promote_types(x.dtype, residual.dtype), weight, bias) and applies(x, residual, weight, bias):
        return add_norm(x, residual, weight, bias, eps, CENTRED)
    return add_reference(x, residual, weight, bias, eps)


def layer_norm_float32(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (..., d) centred, normalised and scaled by weight (d,): shape and dtype of x. By the Triton kernels where they
    apply, else by ``float32_reference``, which also takes a weight for every head, (heads, d)."""
    if applies(x, None, weight):
        return norm(x, weight, None, eps, CENTRED)
    return float32_reference(x, weight, eps)


def _mixed(dtype: torch.dtype, *vectors: torch.Tensor | None) -> bool:
    """Whether torch takes weight and bias of these dtypes with an input of ``dtype``: its own, or float32."""
    return all(v is None or v.dtype in (dtype, torch.float32) for v in vectors)


WITHOUT_VECTORS = {"d": 4096, "absent": ("residual", "weight", "bias")}
SUM_SHAPES = {"GPT-2 XL": {"d": 1600}, "BERT-large": {"d": 1024}, "BLOOM-7B1": {"d": 4096}}

KERNELS = (
    norm_kernel(layer_norm, reference, CENTRED, {"GPT-2 XL": {"d": 1600}, "OLMo-7B": WITHOUT_VECTORS}, biased=True),
    norm_kernel(add_layer_norm, add_reference, CENTRED, SUM_SHAPES, adds=True, biased=True),
    norm_kernel(layer_norm_float32, float32_reference, CENTRED, {"Command-R": {"d": 8192}}),
)
