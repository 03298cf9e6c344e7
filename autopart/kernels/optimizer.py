"""AdamW in one pass over memory: a flat shard of float32 master weights with its gradient and moments.

With f the factor of the gradients (clipping and the inverse of the loss scale), g = f gradient, t the number of the
step from 1, and d the decay of an element's group, the elements are updated as

    m = m + (1 - beta1)(g - m),  v = beta2 v + (1 - beta2) g^2
    w = (1 - lr weight_decay d) w - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

and w is also written in the dtype that the model computes in. For n elements the least traffic is

    n (gradient + weight + 24) bytes:  read gradient, w, m, v, write w, m, v, and the weight

where ``gradient`` and ``weight`` are itemsizes, 0 for a weight that is left out. Separate operators read and write
about three times as much.

Sources: Loshchilov & Hutter, arXiv 1711.05101; torch.optim.AdamW for the order of the operations and the place of eps.
"""

import functools
import math
from typing import Any, NamedTuple

import torch

from autopart.kernels.ahead import Usage, compile_kernel
from autopart.kernels.kernel import Bytes, Kernel
from autopart.kernels.launch import TRITON_NAMES, launch, runs_on, triton_op

tl: Any  # bound by kernels(): Triton's interpreter looks for its language among a kernel's globals
one_less_power: Any
decayed: Any

BLOCK = 1024
"""Elements of one Triton program."""

Optional = torch.Tensor | None


class Kernels(NamedTuple):
    """The ``triton.jit`` functions: a kernel, and what the kernels of other optimizers share with it."""

    step: Any
    one_less_power: Any
    decayed: Any


def reference(
    gradient: torch.Tensor,
    master: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    weight: Optional,
    step: torch.Tensor,
    factor: Optional,
    found_inf: Optional,
    starts: Optional,
    decays: Optional,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """`adamw` in plain torch. Without a factor it is the step of torch.optim.AdamW, bit for bit on a CPU."""
    if found_inf is not None and found_inf.item():
        return
    with torch.no_grad():
        g = scaled(gradient, master, factor)
        decay(master, starts, decays, lr, weight_decay)
        mean.lerp_(g, 1 - beta1)
        square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        t = step.item()
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
    step: torch.Tensor,
    factor: Optional,
    found_inf: Optional,
    starts: Optional,
    decays: Optional,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step of AdamW, in place: master, mean (m), square (v) and weight change, unless ``found_inf`` is not zero.

    gradient, master, mean, square, weight   of one shape; without a weight only the master is written
    step                                     the number t of this step from 1, one element
    factor                                   one element that the gradients are multiplied by, or None for 1
    found_inf                                one element, or None for 0
    starts, decays                           (groups,): the flat elements from starts[i] on have decay decays[i]; starts
                                             is int64, rises, and begins with 0. None: all elements have decay 1

    No tensor is read on the host. By the Triton kernel for contiguous tensors and a float32 master, else by
    ``reference``.
    """
    state = (gradient, master, mean, square)
    if kernels_apply(state, weight, (step, factor, found_inf, starts, decays)):
        with torch.no_grad():
            scalars = (lr, beta1, beta2, eps, weight_decay)
            torch.ops.autopart.adamw(*state, weight, step, factor, found_inf, starts, decays, *map(float, scalars))
    else:
        reference(*state, weight, step, factor, found_inf, starts, decays, lr, beta1, beta2, eps, weight_decay)


def bytes_moved(gradient: torch.Tensor, master: torch.Tensor, *rest: Any) -> Bytes:
    """As `Kernel.bytes_moved`; the formula is on top of this file."""
    weight = rest[2]
    return Bytes(master.numel() * (gradient.itemsize + 24 + (0 if weight is None else weight.itemsize)), 0)


def kept(arguments: tuple[Any, ...], outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Nothing: an optimizer has no backward."""
    return ()


def compile_ahead(
    capability: int, n: int = 4096 * 4096, dtype: torch.dtype = torch.bfloat16, groups: int = 2
) -> dict[str, Usage]:
    """Compile the kernel with gradients and weights of ``dtype``, a factor, ``found_inf`` and groups of decays, for n
    elements and compute capability ``capability`` (90 for 9.0)."""
    return {"step": compile_step(kernels().step, capability, n, dtype, groups)}


def compile_step(kernel: Any, capability: int, n: int, dtype: torch.dtype, groups: int) -> Usage:
    """Compile the kernel of an optimizer, whose arguments have the names of AdamW's."""
    pointers = dict.fromkeys(("gradient", "weight"), f"*{TRITON_NAMES[dtype]}")
    pointers |= dict.fromkeys(("master", "mean", "square", "step", "factor", "found_inf", "decays"), "*fp32")
    scalars = ("lr", "beta1", "rest1", "log1", "beta2", "rest2", "log2", "eps", "decay")
    signature = pointers | {"starts": "*i64", "n": "i32"} | dict.fromkeys(scalars, "fp32")
    constexprs = {"GROUPS": groups, "WEIGHT": True, "FACTOR": True, "FOUND_INF": True, "BLOCK": BLOCK}
    aligned = {*pointers, "starts", *(("n",) if n % 16 == 0 else ())}
    return compile_kernel(kernel, signature, constexprs, capability, 4, aligned)


@functools.cache
def kernels() -> Kernels:
    """The ``triton.jit`` functions. The first call imports Triton, which reads TRITON_INTERPRET from the environment
    then."""
    global tl, one_less_power, decayed
    import triton
    import triton.language as tl

    @triton.jit
    def one_less_power(t, log):  # type: ignore[no-untyped-def]
        """1 - exp(t log), by its series where the difference would cancel: 1 - beta^t for small t."""
        x = t * log
        series = 1.0 + x / 7 * (1.0 + x / 8)
        series = 1.0 + x / 4 * (1.0 + x / 5 * (1.0 + x / 6 * series))
        return tl.where(x > -0.5, -x * (1.0 + x / 2 * (1.0 + x / 3 * series)), 1.0 - tl.exp(x))

    @triton.jit
    def decayed(w, place, starts, decays, rate, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
        if GROUPS == 0:
            return w * (1.0 - rate)
        else:
            d = tl.zeros_like(w)
            for group in range(GROUPS):
                d = tl.where(place >= tl.load(starts + group), tl.load(decays + group).to(tl.float32), d)
            return w * (1.0 - rate * d)

    @triton.jit
    def adamw(  # type: ignore[no-untyped-def]
        gradient, master, mean, square, weight, step, factor, found_inf, starts, decays, n, lr, beta1, rest1, log1,
        beta2, rest2, log2, eps, decay, GROUPS: tl.constexpr, WEIGHT: tl.constexpr, FACTOR: tl.constexpr,
        FOUND_INF: tl.constexpr, BLOCK: tl.constexpr,
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
        v = tl.load(square + place, mask=here, other=0.0)
        m = tl.where(rest1 < 0.5, m + rest1 * (g - m), g - beta1 * (g - m))
        v = v * beta2 + rest2 * g * g
        t = tl.load(step).to(tl.float32)
        w = decayed(w, place, starts, decays, lr * decay, GROUPS)
        w -= lr / one_less_power(t, log1) * m / (tl.sqrt_rn(v) / tl.sqrt_rn(one_less_power(t, log2)) + eps)
        tl.store(master + place, w, mask=here)
        tl.store(mean + place, m, mask=here)
        tl.store(square + place, v, mask=here)
        if WEIGHT:
            tl.store(weight + place, w.to(weight.dtype.element_ty), mask=here)

    return Kernels(adamw, one_less_power, decayed)


@triton_op("autopart::adamw", mutates_args={"master", "mean", "square", "weight"})
def _adamw(
    gradient: torch.Tensor,
    master: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    weight: torch.Tensor | None,
    step: torch.Tensor,
    factor: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    starts: torch.Tensor | None,
    decays: torch.Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    tensors = gradient.contiguous(), master, mean, square, master if weight is None else weight, step
    scalars = (lr, beta1, 1 - beta1, _log(beta1), beta2, 1 - beta2, _log(beta2), eps, weight_decay)
    launch_step(kernels().step, tensors, weight, factor, found_inf, starts, decays, scalars)


def kernels_apply(state: tuple[torch.Tensor, ...], weight: Optional, others: tuple[Optional, ...]) -> bool:
    """Whether the kernel of an optimizer takes (gradient, master, moments...), a weight and tensors of few elements."""
    gradient, master, *_ = state
    same = state if weight is None else (*state, weight)
    changed = same[1:]
    return (
        gradient.dtype in TRITON_NAMES
        and (weight is None or weight.dtype in TRITON_NAMES)
        and all(t.dtype == torch.float32 for t in state[1:])
        and all(t.shape == master.shape for t in same)
        and all(t.is_contiguous() for t in changed)
        and runs_on(*same, *(t for t in others if t is not None))
    )


def launch_step(
    kernel: Any,
    tensors: tuple[torch.Tensor, ...],
    weight: Optional,
    factor: Optional,
    found_inf: Optional,
    starts: Optional,
    decays: Optional,
    scalars: tuple[float, ...],
) -> None:
    """Launch the kernel of an optimizer over all elements. An argument that is None is not read."""
    gradient, n = tensors[0], tensors[0].numel()
    others = [gradient if t is None else t for t in (factor, found_inf, starts, decays)]
    present = {"WEIGHT": weight is not None, "FACTOR": factor is not None, "FOUND_INF": found_inf is not None}
    groups = 0 if starts is None else len(starts)
    launch(kernel, -(-n // BLOCK), *tensors, *others, n, *scalars, GROUPS=groups, **present, BLOCK=BLOCK)


def scaled(gradient: torch.Tensor, master: torch.Tensor, factor: Optional) -> torch.Tensor:
    """The gradient in the master's dtype, times the factor."""
    g = gradient.to(master.dtype)
    return g if factor is None else g * factor.reshape(())


def decay(master: torch.Tensor, starts: Optional, decays: Optional, lr: float, weight_decay: float) -> None:
    """Multiply the master by 1 - lr weight_decay d, in place."""
    if weight_decay == 0:
        return
    if starts is None or decays is None:
        master.mul_(1 - lr * weight_decay)
        return
    flat, bounds = master.view(-1), [*starts.tolist(), master.numel()]
    for start, end, d in zip(bounds, bounds[1:], decays.tolist(), strict=False):
        flat[start:end].mul_(1 - lr * weight_decay * d)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


KERNEL = Kernel(
    function=adamw,
    reference=reference,
    rule="..., ..., ..., ..., ..., , , , g!, g! -> -",
    kept=kept,
    bytes_moved=bytes_moved,
    ahead=compile_ahead,
    shapes={
        "Llama-3-8B": {"n": 4096 * 14336},
        "GPT-2 XL": {"n": 1600 * 6400},
        "Mixtral-8x7B": {"n": 8 * 4096 * 14336},
        "T5-11B": {"n": 1024 * 65536},
    },
)
