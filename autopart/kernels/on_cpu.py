"""What CPUs run in the place of some kernels' references: the same functions, forward and backward in fewer passes over
memory than autograd takes for the reference's operators, and with less saved.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DTYPES = (torch.float32, torch.float64)


def normalises(x: Tensor, weight: Tensor) -> bool:
    """Whether `RmsNorm` takes x (..., d) and weight (d,)."""
    return _on_cpu(x, weight) and x.dim() > 0 and weight.shape == x.shape[-1:]


def turns(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `TurnHalves` takes x (..., d) and tables (..., d), which must need no gradient and not widen x."""
    plain = not (cos.requires_grad or sin.requires_grad) and cos.shape[-1] == sin.shape[-1] == x.shape[-1]
    return plain and _on_cpu(x, cos, sin) and torch.broadcast_shapes(x.shape, cos.shape, sin.shape) == x.shape


def _on_cpu(*tensors: Tensor) -> bool:
    """Whether tensors are on a CPU, or stand for such tensors, in one dtype of DTYPES."""
    return all(t.device.type in ("cpu", "meta") and t.dtype == tensors[0].dtype in DTYPES for t in tensors)


class RmsNorm(torch.autograd.Function):
    """weight h, of h = x r and r = 1 / sqrt(mean(x^2) + eps), of x (..., d) and weight (d,) in one dtype.

    With g = weight dy, backward is dx = r (g - h mean(g h)) and dweight = sum of dy h over the rows. It saves h and r.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        h = x * r
        ctx.save_for_backward(h, r, weight)
        return h * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        h, r, weight = ctx.saved_tensors
        product = dy * h
        mean = (product @ weight).div_(len(weight)).unsqueeze(-1)
        dweight = product.reshape(-1, len(weight)).sum(0) if ctx.needs_input_grad[1] else None
        del product
        return (dy * weight).addcmul_(h, mean, value=-1).mul_(r), dweight, None


class TurnHalves(torch.autograd.Function):
    """`rotary` of all elements of x (..., d), with tables cos and sin that broadcast to x. It saves the tables."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        (a, b), (sin_a, sin_b), y = x.chunk(2, -1), sin.chunk(2, -1), x * cos
        first, second = y.chunk(2, -1)
        first.addcmul_(b, sin_a, value=-1)
        second.addcmul_(a, sin_b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        cos, sin = ctx.saved_tensors
        (da, db), (sin_a, sin_b), dx = dy.chunk(2, -1), sin.chunk(2, -1), dy * cos
        first, second = dx.chunk(2, -1)
        first.addcmul_(db, sin_b)
        second.addcmul_(da, sin_a, value=-1)
        return dx, None, None
