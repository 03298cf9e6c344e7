"""Lion in one pass over memory: float32 master weights with their gradients and moments, of many tensors at once.

With f the factor of the gradients (clipping and the inverse of the loss scale) and g = f gradient, the elements are
updated as

    w = (1 - lr decay) w - lr sign(beta1 m + (1 - beta1) g)
    m = beta2 m + (1 - beta2) g

and w is also written in the dtype that the model computes in. The sign of 0 and of nan is 0, as torch.sign has it. For
n elements the least traffic is

    n (gradient + weight + 16) bytes:  read gradient, w, m, write w, m, and the weight

where ``gradient`` and ``weight`` are itemsizes, 0 for a weight that is left out. lr and decay are a tensor's own, the
betas are those of all.

Source: Chen et al., arXiv 2302.06675.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from autopart.kernels import optimizer
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

SCALARS = ("beta1", "rest1", "beta2", "rest2")


class Rates(NamedTuple):
    """What a tensor's step has of its own: the learning rate and the decay."""

    lr: float
    decay: float


def reference(
    gradient: torch.Tensor,
    master: torch.Tensor,
    mean: torch.Tensor,
    weight: Optional,
    factor: Optional,
    lr: float,
    beta1: float,
    beta2: float,
    decay: float,
) -> None:
    """`lion` in plain torch."""
    with torch.no_grad():
        g = scaled(gradient, master, factor)
        if decay:
            master.mul_(1 - lr * decay)
        master.add_((mean * beta1).add_(g, alpha=1 - beta1).sign_(), alpha=-lr)
        mean.mul_(beta2).add_(g, alpha=1 - beta2)
        if weight is not None:
            weight.copy_(master)


def lion(
    gradient: torch.Tensor,
    master: torch.Tensor,
    mean: torch.Tensor,
    weight: Optional,
    factor: Optional,
    lr: float,
    beta1: float,
    beta2: float,
    decay: float,
) -> None:
    """One step of Lion of one tensor, in place: master, mean (m) and weight change. Arguments as of `adamw`."""
    shard = Shard(gradient, (master, mean), weight)
    if kernels_apply(shard, factor):
        lion_together([shard], [Rates(lr, decay)], factor, beta1, beta2)
    else:
        reference(gradient, master, mean, weight, factor, lr, beta1, beta2, decay)


def lion_together(
    shards: Sequence[Shard], rates: Sequence[Rates], factor: Optional, beta1: float, beta2: float
) -> None:
    """One step of Lion of shards that the kernel takes (`kernels_apply`), whose states are master and mean."""
    numbers = [(1 - r.lr * r.decay, r.lr) for r in rates]
    launch_over(lion_kernel, shards, numbers, factor, (beta1, 1 - beta1, beta2, 1 - beta2))


def bytes_moved(gradient: torch.Tensor, master: torch.Tensor, *rest: Any) -> Bytes:
    weight = rest[1]
    return Bytes(master.numel() * (gradient.itemsize + 16 + (0 if weight is None else weight.itemsize)), 0)


@jit
def lion_kernel(  # type: ignore[no-untyped-def]
    table, rates, factor, tensors, beta1, rest1, beta2, rest2, GRADIENT: tl.constexpr, WEIGHT: tl.constexpr,
    FACTOR: tl.constexpr, ALIGNMENT: tl.constexpr, TENSORS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, n, start, end = shard_of(table, tensors, ALIGNMENT, TENSORS, BLOCKS, BLOCK)
    gradient = operand(table, 0, tensors, at, GRADIENT, ALIGNMENT)
    master = operand(table, 1, tensors, at, tl.float32, ALIGNMENT)
    mean = operand(table, 2, tensors, at, tl.float32, ALIGNMENT)
    keep, rate = tl.load(rates + at), tl.load(rates + tensors + at)
    if FACTOR:
        scale = tl.load(factor).to(tl.float32)
    if WEIGHT is not None:
        weight = operand(table, 3, tensors, at, WEIGHT, ALIGNMENT)
    for block in range(start, end):
        place = block * BLOCK + tl.arange(0, BLOCK)
        here = place < n
        g = tl.load(gradient + place, mask=here, other=0.0).to(tl.float32)
        if FACTOR:
            g *= scale
        w = tl.load(master + place, mask=here, other=0.0)
        m = tl.load(mean + place, mask=here, other=0.0)
        towards = beta1 * m + rest1 * g
        w = w * keep - rate * tl.where(towards > 0, 1.0, tl.where(towards < 0, -1.0, 0.0))
        tl.store(master + place, w, mask=here)
        tl.store(mean + place, beta2 * m + rest2 * g, mask=here)
        if WEIGHT is not None:
            tl.store(weight + place, w.to(WEIGHT), mask=here)


KERNEL = Kernel(
    function=lion,
    reference=reference,
    rule="..., ..., ..., ..., -> -",
    kept=optimizer.KERNEL.kept,
    bytes_moved=bytes_moved,
    ahead=partial(compile_step, lion_kernel, SCALARS),
    shapes=optimizer.KERNEL.shapes,
)
