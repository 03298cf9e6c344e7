"""Cross-entropy of rows of logits, by one pass over the vocabulary, in float32 without a float32 copy of the logits.

For row i of n with logits x (v,), target t and u = softcap tanh(x scale / divisor / softcap), or u = x scale / divisor
without a soft-cap, the loss and its gradient are

    lse        = log sum_j exp(u_j)
    loss_i     = lse - (1 - e) u_t - e / v sum_j u_j + z lse^2
    dloss/du_j = (1 + 2 z lse) exp(u_j - lse) - (1 - e) [j = t] - e / v
    dloss/dx_j = dloss/du_j scale / divisor (1 - (u_j / softcap)^2)

with label smoothing e (Szegedy et al., arXiv 1512.00567) and weight z of the z-loss (Chowdhery et al., arXiv
2204.02311). Rows whose target is ``ignore_index`` count as 0. The forward keeps a running maximum and a sum relative to
it (Milakov and Gimelshein, arXiv 1805.02867), and saves the logits as they are and lse.

Where the vocabulary is split over ranks, each rank takes the statistics of its own columns: the maximum, the sum of
exponentials relative to it, the target's logit if it is there, the sum of logits. Two reductions over ranks combine
them (Shoeybi et al., arXiv 1909.08053, section 3).

For logits of `itemsize` bytes the least traffic in bytes is

    forward   itemsize n v + 8 n + 16 n       read logits and int64 targets, write four float32 statistics
    backward  2 itemsize n v + 8 n + 4 n      read logits, write their gradient, read targets and float32 lse
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autopart.kernels.ahead import Usage, compile_kernels
from autopart.kernels.cross_entropy_rows import (
    Reduction,
    Terms,
    columns,
    combined,
    gradient,
    gradient_kernel,
    identity,
    kernels_apply,
    losses,
    statistics,
    statistics_kernel,
    terms_of,
    warps,
)
from autopart.kernels.kernel import Bytes, Kernel
from autopart.kernels.launch import TRITON_NAMES, triton_op


def scaled(logits: Tensor, compute_dtype: torch.dtype | None, softcap: float, scale: float, divisor: float) -> Tensor:
    """Logits after scale, divisor and soft-cap in their own dtype, in ``compute_dtype``."""
    if scale != 1:
        logits = logits * scale
    if divisor != 1:
        logits = logits / divisor
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    return logits if compute_dtype is None else logits.to(compute_dtype)


def reference(
    logits: Tensor,
    targets: Tensor,
    valid: float,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    scale: float = 1.0,
    divisor: float = 1.0,
) -> Tensor:
    """The sum of the losses of logits (n, v) and targets (n,) over ``valid``, in ``compute_dtype``, or in the dtype of
    the logits when that is None."""
    h = scaled(logits, compute_dtype, softcap, scale, divisor)
    total = F.cross_entropy(h, targets, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing)
    if z_loss:
        lse = torch.where(targets != ignore_index, torch.logsumexp(h, -1), 0)
        total = total + z_loss * lse.square().sum()
    return total / valid


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    valid: float,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    scale: float = 1.0,
    divisor: float = 1.0,
) -> Tensor:
    """The sum of the losses of logits (n, v) and targets (n,) over ``valid``: a scalar. By the Triton kernels where
    they apply, else by ``reference``.

    The kernels compute in float32, whatever the dtype of the logits, and round the result to the dtype that the
    reference has. A target that is neither a column nor ``ignore_index`` gives NaN.
    """
    if kernels_apply(logits, targets) and compute_dtype in (None, torch.float32):
        terms = terms_of(logits, ignore_index, label_smoothing, z_loss, softcap, scale, divisor)
        total: Tensor = torch.ops.autopart.cross_entropy(logits, targets, terms)[0]
        return total.to(compute_dtype or logits.dtype) / valid
    return reference(
        logits, targets, valid, ignore_index, label_smoothing, compute_dtype, z_loss, softcap, scale, divisor
    )


def vocab_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    valid: float,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    scale: float = 1.0,
    divisor: float = 1.0,
    first: int = 0,
    classes: int = 0,
    reduce_max: Reduction = identity,
    reduce_sum: Reduction = identity,
) -> Tensor:
    """`cross_entropy` of logits (n, v / ranks), this rank's columns from ``first`` of the ``classes`` columns of the
    vocabulary, 0 for those given. Every rank gets the same loss.

    ``reduce_max`` of (n,) and ``reduce_sum`` of (3, n) are collectives over the ranks. Math is in float32, in float64
    for float64 logits.
    """
    terms = terms_of(logits, ignore_index, label_smoothing, z_loss, softcap, scale, divisor, first, classes)
    total: Tensor = _VocabCrossEntropy.apply(logits, targets, terms, reduce_max, reduce_sum)
    return total.to(compute_dtype or logits.dtype) / valid


def bytes_moved(logits: Tensor, targets: Tensor, *constants: object) -> Bytes:
    size, each = logits.itemsize * logits.numel(), targets.itemsize * targets.numel()
    return Bytes(forward=size + each + 16 * len(targets), backward=2 * size + each + 4 * len(targets))


def kept(arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Logits, targets, and for each row lse in float32."""
    logits, targets, *_ = arguments
    return logits, targets, logits.new_empty(len(logits), dtype=torch.float32)


def compile_ahead(
    capability: int,
    v: int = 128256,
    dtype: torch.dtype = torch.bfloat16,
    softcap: bool = False,
    smoothing: bool = False,
) -> dict[str, Usage]:
    """Compile both kernels for contiguous rows of ``v`` logits and compute capability ``capability`` (90 for 9.0)."""
    types = dict.fromkeys(("logits", "dlogits"), f"*{TRITON_NAMES[dtype]}") | {"targets": "*i64"}
    types |= dict.fromkeys(("found", "lse", "dloss"), "*fp32")
    lengths = dict.fromkeys(("stride", "out_stride", "v"), "i32")
    aligned = {*types, *(lengths if v % 16 == 0 else ())}
    floats = dict.fromkeys(("factor", "cap", "hit", "each", "z"), "fp32")
    signature = types | lengths | floats | dict.fromkeys(("rows", "first", "ignored"), "i32")
    constexprs = {"CAP": softcap, "COLUMNS": columns(v), "TOTAL": smoothing}
    kernels = statistics_kernel, gradient_kernel
    return compile_kernels(kernels, signature, constexprs, capability, warps(v), aligned)


@triton_op("autopart::cross_entropy", mutates_args=())
def _forward(logits: Tensor, targets: Tensor, terms: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The sum of the losses and lse (n,), float32."""
    found = torch.ops.autopart.cross_entropy_statistics(logits, targets, terms)
    lse, wanted, total = combined(found, identity, identity)
    return losses(lse, wanted, total, targets, Terms.of(terms)).sum(), lse


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, ctx.terms = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    logits, targets, lse = ctx.saved_tensors
    dlogits = torch.ops.autopart.cross_entropy_backward(logits, targets, lse, dloss, ctx.terms)
    return dlogits, None, None


_forward.register_autograd(_gradients, setup_context=_save)


class _VocabCrossEntropy(torch.autograd.Function):
    """The sum of the losses where the vocabulary is split over ranks."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, terms: Terms, reduce_max: Reduction, reduce_sum: Reduction
    ) -> Tensor:
        lse, wanted, total = combined(statistics(logits, targets, terms), reduce_max, reduce_sum)
        ctx.save_for_backward(logits, targets, lse)
        ctx.terms = terms
        return losses(lse, wanted, total, targets, terms).sum()

    @staticmethod
    def backward(ctx: Any, *dloss: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, lse = ctx.saved_tensors
        return gradient(logits, targets, lse, dloss[0], ctx.terms), None, None, None, None


SHAPES = {
    "Llama-3-8B": {"v": 128256},
    "GPT-2 XL": {"v": 50257},
    "Mixtral-8x7B": {"v": 32000},
    "T5-11B": {"v": 32128},
    "Gemma-2-9B": {"v": 256000, "softcap": True},
}

KERNELS = tuple(
    Kernel(
        function=function,
        reference=reference,
        rule=rule,
        kept=kept,
        bytes_moved=bytes_moved,
        ahead=compile_ahead,
        shapes=SHAPES,
    )
    for function, rule in ((cross_entropy, "b v!, b -> "), (vocab_cross_entropy, "b v, b -> "))
)
