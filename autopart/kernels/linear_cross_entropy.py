"""The last linear map with its cross-entropy, in chunks of rows, so that the logits never exist as a whole.

Hsu et al., Liger Kernel, arXiv 2410.10989, section 3.2. For a chunk of c rows of hidden states H (c, d), a weight
W (v, d) and a bias b (v,), the forward computes

    X = H W^T + b           logits of the chunk, in the dtype of H
    losses, D = dloss/dX    by `autopart.kernels.cross_entropy_rows`, in float32; D takes the place of X
    dH = D W                of these rows
    dW = dW + D^T H         summed over the chunks
    db = db + sum_i D_i     summed over the chunks, in float32

and the backward scales dH, dW and db by the gradient of the sum of losses. In float32 and float64 the products dH and
dW have the factor 1 / valid of a mean already, where valid is a number or on a CPU. There the backward scales nothing
where that gradient is 1. In half precision numbers as small as D / valid would be rounded to 0, which the gradient of a
scaled loss would have prevented. Without gradients only the losses are computed.

dW is summed in the dtype of W, by the matrix product itself. Of a half-precision W a float32 sum would take 4 v d bytes
more, and it would be read and written once a chunk by an operator of its own. The sums of k equal chunks are rounded k
times. This adds a relative error of about sqrt(k / 3) u to that of one product, with u the unit roundoff of the dtype.
`chunk_rows` keeps k small: k <= ceil(n / ROWS). Elements of D are about 1 in size at the most, and n
times that of H bounds dW: in float16 the sum for a very frequent token may overflow.

For elements of `itemsize` bytes and k chunks the least traffic in bytes is

    forward   itemsize (3 n d + 2 k v d + (2 k - 1) v d + 6 n v) + 8 n
              read H twice, write dH, read W twice a chunk, read and write dW; write X, read X, read X and write D,
              read D twice; read int64 targets
    backward  2 itemsize (n d + v d)        read and write dH and dW

A bias adds v elements a chunk, which are left out.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autopart.kernels import cross_entropy
from autopart.kernels.cross_entropy_rows import (
    Reduction,
    Terms,
    combined,
    gradient_,
    identity,
    losses,
    statistics,
    terms_of,
)
from autopart.kernels.kernel import Bytes, Kernel

ROWS = 1024
"""The fewest rows of a chunk, where there are so many. The products with fewer rows take longer to move W and dW than
to compute: they have 6 c v d FLOPs and move 8 v d bytes in half precision."""


def chunk_rows(n: int, v: int, d: int) -> int:
    """Rows of a chunk of n rows: n / ceil(v / d), so that a chunk of logits is about as large as the hidden states, and
    at least ``ROWS``.

    The logits of a chunk have at most max(n d + v, ROWS v) elements.
    """
    return max(-(-n // -(-v // d)), ROWS)


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, valid: Any, *constants: Any, **named: Any
) -> Tensor:
    """`cross_entropy.reference`, with its constants, of the whole logits of hidden (n, d), weight (v, d) and bias (v,).
    This is the pattern and the oracle; a CPU runs `linear_cross_entropy`, which is in chunks on every device."""
    return cross_entropy.reference(F.linear(hidden, weight, bias), targets, valid, *constants, **named)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    valid: float | Tensor,
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
    """The sum of the losses of hidden (n, d), weight (v, d), targets (n,) and bias (v,) over ``valid``: a scalar of
    ``compute_dtype``, or of the dtype of hidden when that is None. The softmax is in float32, in float64 of float64.

    Where the vocabulary is split over ranks, weight (v / ranks, d) and bias (v / ranks,) are this rank's from column
    ``first`` of the ``classes`` columns, and ``reduce_max`` and ``reduce_sum`` are collectives over the ranks, called
    once a chunk each, in the forward only. Every rank gets the same loss. Its gradient of hidden is a partial sum over
    the ranks, which the caller reduces.

    Gradients are computed in the forward where gradients are enabled, and scaled in place by the backward, which can
    thus run only once.
    """
    if not hidden.numel():
        constants = ignore_index, label_smoothing, compute_dtype, z_loss, softcap, scale, divisor
        return reference(hidden, weight, targets, bias, valid, *constants)
    terms = terms_of(weight.t(), ignore_index, label_smoothing, z_loss, softcap, scale, divisor, first, classes)
    number = _number(valid) if {hidden.dtype, weight.dtype} <= {torch.float32, torch.float64} else None
    inside, outside = (number, 1.0) if number else (1.0, valid)
    total: Tensor = _LinearCrossEntropy.apply(
        hidden, weight, targets, bias, inside, terms, torch.is_grad_enabled(), reduce_max, reduce_sum
    )
    return total.to(compute_dtype or hidden.dtype) / outside


def bytes_moved(hidden: Tensor, weight: Tensor, targets: Tensor, *rest: object) -> Bytes:
    n, (v, d) = len(hidden), weight.shape
    k = -(-n // chunk_rows(n, v, d))
    each = targets.itemsize * n
    return Bytes(
        forward=hidden.itemsize * (3 * n * d + 2 * k * v * d + (2 * k - 1) * v * d + 6 * n * v) + each,
        backward=hidden.itemsize * 2 * (n * d + v * d),
    )


def kept(arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients of hidden, of weight, and in float32 of bias."""
    hidden, weight, _, bias, *_ = arguments
    gradients = torch.empty_like(hidden), torch.empty_like(weight)
    return gradients if bias is None else (*gradients, torch.empty_like(bias, dtype=torch.float32))


def _number(value: float | Tensor) -> float | None:
    """The value, or None where it has to be read from a device or is not there, as in a traced tensor."""
    if not isinstance(value, Tensor):
        return value
    here = type(value) is Tensor and value.is_cpu and not torch.compiler.is_compiling()
    return value.item() if here else None


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of the losses over ``valid``, which computes its gradients in the forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, valid: float,
        terms: Terms, train: bool, reduce_max: Reduction, reduce_sum: Reduction,
    ) -> Tensor:  # fmt: skip
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        wanted = [train and ctx.needs_input_grad[i] for i in (0, 1, 3)]
        dhidden = torch.empty_like(hidden) if wanted[0] else None
        dweight = torch.empty_like(weight) if wanted[1] else None
        dbias = torch.zeros(len(weight), dtype=dtype, device=weight.device) if wanted[2] else None
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        rows = chunk_rows(len(hidden), *weight.shape)
        for start in range(0, len(hidden), rows):
            h, t = hidden[start : start + rows], targets[start : start + rows]
            logits = F.linear(h, weight, bias)
            lse, target, sums = combined(statistics(logits, t, terms), reduce_max, reduce_sum)
            total += losses(lse, target, sums, t, terms).sum()
            if not any(wanted):
                continue
            dlogits = gradient_(logits, t, lse, terms)
            if dhidden is not None:
                dhidden[start : start + rows].addmm_(dlogits, weight, beta=0, alpha=1 / valid)
            if dweight is not None:
                dweight.addmm_(dlogits.t(), h, beta=1 if start else 0, alpha=1 / valid)
            if dbias is not None:
                dbias += dlogits.sum(0, dtype=dtype)
            del logits, dlogits
        if dbias is not None:
            dbias /= valid
        ctx.save_for_backward(dhidden, dweight, dbias)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return total / valid

    @staticmethod
    def backward(ctx: Any, *dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight, dbias = saved = ctx.saved_tensors
        gradients = [g for g in saved if g is not None]
        if _number(dloss[0]) == 1:
            torch.autograd.graph.increment_version(gradients)  # as scaling would, for they are the caller's from here
        else:
            for gradient in gradients:
                gradient.mul_(dloss[0].view([1] * gradient.dim()))
        return dhidden, dweight, None, dbias if dbias is None else dbias.to(ctx.bias_dtype), *[None] * 5


KERNEL = Kernel(
    function=linear_cross_entropy,
    reference=reference,
    rule="b d!, v d!, b, v -> ",
    kept=kept,
    bytes_moved=bytes_moved,
    ahead=cross_entropy.compile_ahead,
    shapes=cross_entropy.SHAPES,
)
"""Split by v, the function is given ``first``, ``classes`` and the reductions, and its result is whole on every rank
(placement R). Without a bias the last operand of the rule falls away."""
