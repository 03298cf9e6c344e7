"""Lion in one pass over memory: a flat shard of float32 master weights with its gradient and moment.

With f the factor of the gradients (clipping and the inverse of the loss scale), g = f gradient, and d the decay of an
element's group, the elements are updated as

    w = (1 - lr weight_decay d) w - lr sign(beta1 m + (1 - beta1) g)
    m = beta2 m + (1 - beta2) g

and w is also written in the dtype that the model computes in. The sign of 0 and of nan is 0, as torch.sign has it. For
n elements the least traffic is

    n (gradient + weight + 16) bytes:  read gradient, w, m, write w, m, and the weight

where ``gradient`` and ``weight`` are itemsizes, 0 for a weight that is left out.

Source: Chen et al., arXiv 2302.06675.
"""

import functools
from typing import Any, NamedTuple

import torch

from autopart.kernels import optimizer
from autopart.kernels.ahead import Usage
from autopart.kernels.kernel import Bytes, Kernel
from autopart.kernels.launch import triton_op
from autopart.kernels.optimizer import Optional, compile_step, decay, kept, kernels_apply, launch_step, scaled

tl: Any  # bound by kernels(): Triton's interpreter looks for its language among a kernel's globals
decayed: Any


class Kernels(NamedTuple):
    """The ``triton.jit`` function."""

    step: Any


def reference(
    gradient: torch.Tensor,
    master: torch.Tensor,
    mean: torch.Tensor,
    weight: Optional,
    factor: Optional,
    found_inf: Optional,
    starts: Optional,
    decays: Optional,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> None:
    """`lion` in plain torch."""
    if found_inf is not None and found_inf.item():
        return
    with torch.no_grad():
        g = scaled(gradient, master, factor)
        decay(master, starts, decays, lr, weight_decay)
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
    found_inf: Optional,
    starts: Optional,
    decays: Optional,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> None:
    """One step of Lion, in place: master, mean (m) and weight change. Arguments as `adamw`."""
    state = (gradient, master, mean)
    if kernels_apply(state, weight, (factor, found_inf, starts, decays)):
        with torch.no_grad():
            scalars = (lr, beta1, beta2, weight_decay)
            torch.ops.autopart.lion(*state, weight, factor, found_inf, starts, decays, *map(float, scalars))
    else:
        reference(*state, weight, factor, found_inf, starts, decays, lr, beta1, beta2, weight_decay)


def bytes_moved(gradient: torch.Tensor, master: torch.Tensor, *rest: Any) -> Bytes:
    """As `Kernel.bytes_moved`; the formula is on top of this file."""
    weight = rest[1]
    return Bytes(master.numel() * (gradient.itemsize + 16 + (0 if weight is None else weight.itemsize)), 0)


def compile_ahead(
    capability: int, n: int = 4096 * 4096, dtype: torch.dtype = torch.bfloat16, groups: int = 2
) -> dict[str, Usage]:
    """Compile the kernel. Arguments as `autopart.kernels.optimizer.compile_ahead`."""
    return {"step": compile_step(kernels().step, capability, n, dtype, groups)}


@functools.cache
def kernels() -> Kernels:
    """The ``triton.jit`` function. The first call imports Triton, which reads TRITON_INTERPRET from the environment
    then."""
    global tl, decayed
    import triton
    import triton.language as tl

    decayed = optimizer.kernels().decayed

    @triton.jit
    def lion(  # type: ignore[no-untyped-def]
        gradient, master, mean, weight, factor, found_inf, starts, decays, n, lr, beta1, rest1, beta2, rest2, decay,
        GROUPS: tl.constexpr, WEIGHT: tl.constexpr, FACTOR: tl.constexpr, FOUND_INF: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        if FOUND_INF:
            n = tl.where(tl.load(found_inf) == 0, n, 0)
        here = place < n
        g = tl.load(gradient + place, mask=here, other=0.0).to(tl.float32)
        if FACTOR:
            g *= tl.load(factor).to(tl.float32)
        w = tl.load(master + place, mask=here, other=0.0)
        m = tl.load(mean + place, mask=here, other=0.0)
        towards = beta1 * m + rest1 * g
        w = decayed(w, place, starts, decays, lr * decay, GROUPS)
        w -= lr * tl.where(towards > 0, 1.0, tl.where(towards < 0, -1.0, 0.0))
        tl.store(master + place, w, mask=here)
        tl.store(mean + place, beta2 * m + rest2 * g, mask=here)
        if WEIGHT:
            tl.store(weight + place, w.to(weight.dtype.element_ty), mask=here)

    return Kernels(lion)


@triton_op("autopart::lion", mutates_args={"master", "mean", "weight"})
def _lion(
    gradient: torch.Tensor,
    master: torch.Tensor,
    mean: torch.Tensor,
    weight: torch.Tensor | None,
    factor: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    starts: torch.Tensor | None,
    decays: torch.Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> None:
    tensors = gradient.contiguous(), master, mean, master if weight is None else weight
    scalars = (lr, beta1, 1 - beta1, beta2, 1 - beta2, weight_decay)
    launch_step(kernels().step, tensors, weight, factor, found_inf, starts, decays, scalars)


KERNEL = Kernel(
    function=lion,
    reference=reference,
    rule="..., ..., ..., ..., , , g!, g! -> -",
    kept=kept,
    bytes_moved=bytes_moved,
    ahead=compile_ahead,
    shapes=optimizer.KERNEL.shapes,
)
