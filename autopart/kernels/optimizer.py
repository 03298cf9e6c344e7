"""AdamW in one pass over memory: float32 master weights with their gradients and moments, of many tensors at once.

With f the factor of the gradients (clipping and the inverse of the loss scale), g = f gradient, and t the number of the
step from 1, the elements are updated as

    m = m + (1 - beta1)(g - m),  v = beta2 v + (1 - beta2) g^2
    w = (1 - lr decay) w - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

and w is also written in the dtype that the model computes in. For n elements the least traffic is

    n (gradient + weight + 24) bytes:  read gradient, w, m, v, write w, m, v, and the weight

where ``gradient`` and ``weight`` are itemsizes, 0 for a weight that is left out. Separate operators read and write
about three times as much. t, lr and decay are a tensor's own, the betas and eps are those of all.

Sources: Loshchilov & Hutter, arXiv 1711.05101; torch.optim.AdamW for the order of the operations and the place of eps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from autopart.kernels.kernel import Bytes, Kernel
from autopart.kernels.launch import jit
from autopart.kernels.many_tensors import (
    Optional,
    Shard,
    compile_step,
    kernels_apply,
    launch_over,
    operand,
    scaled,
    shard_of,
)

tl: Any = None  # triton.language, which jit binds

SCALARS = ("beta1", "rest1", "beta2", "rest2", "eps")


class Rates(NamedTuple):
    """What a tensor's step has of its own: its number t from 1, the learning rate and the decay."""

    t: float
    lr: float
    decay: float


def reference(
    gradient: torch.Tensor,
    master: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    weight: Optional,
    factor: Optional,
    t: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> None:
    """`adamw` in plain torch. Without a factor it is the step of torch.optim.AdamW, bit for bit on a CPU."""
    with torch.no_grad():
        g = scaled(gradient, master, factor)
        if decay:
            master.mul_(1 - lr * decay)
        mean.lerp_(g, 1 - beta1)
        square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = (square.sqrt() / (1 - beta2**t) ** 0.5).add_(eps)
        master.addcdiv_(mean, denominator, value=-(lr / (1 - beta1**t)))
        if weight is not None:
            weight.copy_(master)


def adamw(
    gradient: torch.Tensor,
    master: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    weight: Optional,
    factor: Optional,
    t: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> None:
    """One step of AdamW of one tensor, in place: master, mean (m), square (v) and weight change.

    gradient, master, mean, square, weight   of one shape; without a weight only the master is written
    factor                                   one element that the gradient is multiplied by, or None for 1

    No tensor is read on the host. By the Triton kernel for contiguous tensors and a float32 master, else by
    ``reference``.
    """
    shard = Shard(gradient, (master, mean, square), weight)
    if kernels_apply(shard, factor):
        adamw_together([shard], [Rates(t, lr, decay)], factor, beta1, beta2, eps)
    else:
        reference(gradient, master, mean, square, weight, factor, t, lr, beta1, beta2, eps, decay)


def adamw_together(
    shards: Sequence[Shard], rates: Sequence[Rates], factor: Optional, beta1: float, beta2: float, eps: float
) -> None:
    """One step of AdamW of shards that the kernel takes (`kernels_apply`), whose states are master, mean and square."""
    numbers = [(1 - r.lr * r.decay, r.lr / (1 - beta1**r.t), (1 - beta2**r.t) ** 0.5) for r in rates]
    launch_over(adamw_kernel, shards, numbers, factor, (beta1, 1 - beta1, beta2, 1 - beta2, eps))


def bytes_moved(gradient: torch.Tensor, master: torch.Tensor, *rest: Any) -> Bytes:
    weight = rest[2]
    return Bytes(master.numel() * (gradient.itemsize + 24 + (0 if weight is None else weight.itemsize)), 0)


@jit
def adamw_kernel(  # type: ignore[no-untyped-def]
    table, rates, factor, tensors, beta1, rest1, beta2, rest2, eps, GRADIENT: tl.constexpr, WEIGHT: tl.constexpr,
    FACTOR: tl.constexpr, ALIGNMENT: tl.constexpr, TENSORS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, n, start, end = shard_of(table, tensors, ALIGNMENT, TENSORS, BLOCKS, BLOCK)
    gradient = operand(table, 0, tensors, at, GRADIENT, ALIGNMENT)
    master = operand(table, 1, tensors, at, tl.float32, ALIGNMENT)
    mean = operand(table, 2, tensors, at, tl.float32, ALIGNMENT)
    square = operand(table, 3, tensors, at, tl.float32, ALIGNMENT)
    keep, rate = tl.load(rates + at), tl.load(rates + tensors + at)
    root = tl.load(rates + 2 * tensors + at)
    if FACTOR:
        scale = tl.load(factor).to(tl.float32)
    if WEIGHT is not None:
        weight = operand(table, 4, tensors, at, WEIGHT, ALIGNMENT)
    for block in range(start, end):
        place = block * BLOCK + tl.arange(0, BLOCK)
        here = place < n
        g = tl.load(gradient + place, mask=here, other=0.0).to(tl.float32)
        if FACTOR:
            g *= scale
        w = tl.load(master + place, mask=here, other=0.0)
        m = tl.load(mean + place, mask=here, other=0.0)
        v = tl.load(square + place, mask=here, other=0.0)
        m = tl.where(rest1 < 0.5, m + rest1 * (g - m), g - beta1 * (g - m))
        v = v * beta2 + rest2 * g * g
        w = w * keep - rate * m / (tl.sqrt_rn(v) / root + eps)
        tl.store(master + place, w, mask=here)
        tl.store(mean + place, m, mask=here)
        tl.store(square + place, v, mask=here)
        if WEIGHT is not None:
            tl.store(weight + place, w.to(WEIGHT), mask=here)


KERNEL = Kernel(
    function=adamw,
    reference=reference,
    rule="..., ..., ..., ..., ..., -> -",
    kept=lambda arguments, outputs: (),  # an optimizer has no backward
    bytes_moved=bytes_moved,
    ahead=partial(compile_step, adamw_kernel, SCALARS),
    shapes={"Llama-3-8B": {"tensors": 291}, "GPT-2 XL": {"tensors": 580}},
)
