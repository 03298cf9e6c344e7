"""What `autopart.kernels.cross_entropy` does by row of logits, for a whole vocabulary or for one rank's columns of it.

Its Triton kernels and the same in plain PyTorch: statistics of every row, the loss from them, and the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autopart.kernels.launch import TRITON_NAMES, as_rows, jit, launch, power_of_two, runs_on, triton_op

tl: Any = None  # triton.language, which jit binds

BLOCK = 4096
"""The most columns that a Triton program holds at once: 16 for each thread of its 8 warps."""

Reduction = Callable[[Tensor], Tensor]
"""An elementwise reduction over ranks. It may work in place; its result is what it returns."""


class Terms(NamedTuple):
    """The constants of a loss.

    ignore_index     the target of rows that do not count
    label_smoothing  e;  z_loss: z;  softcap: 0 for none;  factor: scale / divisor
    first            the column of the whole vocabulary that is the first of the given logits
    classes          columns of the whole vocabulary
    """

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    factor: float
    first: int
    classes: int

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Terms:
        """The constants from a list of floats, as operators take them."""
        ignored, smoothing, z_loss, softcap, factor, first, classes = numbers
        return cls(int(ignored), smoothing, z_loss, softcap, factor, int(first), int(classes))


def identity(x: Tensor) -> Tensor:
    """x: the reduction over one rank."""
    return x


def terms_of(
    logits: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    scale: float,
    divisor: float,
    first: int = 0,
    classes: int = 0,
) -> Terms:
    """The constants, as the kernels take them, of a loss of logits, or of a weight whose dim -1 are the columns."""
    factor = float(scale) / divisor
    terms = (ignore_index, float(label_smoothing), float(z_loss), float(softcap), factor)
    return Terms(*terms, first, classes or logits.shape[-1])


def statistics(logits: Tensor, targets: Tensor, terms: Terms) -> Tensor:
    """(4, n) of logits (n, v), in float32, or in float64 of float64: their maximum, the sum of their exponentials
    relative to it, the target's logit or 0 where it is not here, and the sum of the logits; all after factor and
    soft-cap. The sum of the logits is left out, as any number, where there is no label smoothing."""
    if kernels_apply(logits, targets):
        found: Tensor = torch.ops.autopart.cross_entropy_statistics(logits, targets, terms)
        return found
    u = _transformed(logits, terms)
    local, here = _local(targets, logits.shape[-1], terms)
    wanted = torch.where(here, u.gather(1, local[:, None])[:, 0], 0)
    highest = u.amax(-1)
    total = u.sum(-1) if terms.label_smoothing else torch.zeros_like(highest)
    shift = torch.where(highest == -torch.inf, 0, highest)[:, None]
    each = (u - shift if u is logits else u.sub_(shift)).exp_()
    return torch.stack([highest, each.sum(-1), wanted, total])


def combined(found: Tensor, reduce_max: Reduction, reduce_sum: Reduction) -> tuple[Tensor, ...]:
    """lse, the target's logit and the sum of logits of every row over all ranks, each (n,), from a rank's (4, n)."""
    highest = reduce_max(found[0].clone())
    sums, wanted, total = reduce_sum(torch.stack([found[1] * torch.exp(found[0] - highest), found[2], found[3]]))
    return highest + sums.log(), wanted, total


def losses(lse: Tensor, wanted: Tensor, total: Tensor, targets: Tensor, terms: Terms) -> Tensor:
    """The loss of every row (n,): NaN where the target is neither a column of the vocabulary nor to be ignored."""
    inside = (targets >= 0) & (targets < terms.classes)
    each = torch.where(inside, lse, torch.nan) - (1 - terms.label_smoothing) * wanted
    if terms.label_smoothing:
        each = each - terms.label_smoothing / terms.classes * total
    if terms.z_loss:
        each = each + terms.z_loss * lse.square()
    return torch.where(targets != terms.ignore_index, each, 0)


def gradient(logits: Tensor, targets: Tensor, lse: Tensor, dloss: Tensor, terms: Terms) -> Tensor:
    """``dloss`` times the gradient of the sum of losses by the logits (n, v)."""
    if kernels_apply(logits, targets):
        found: Tensor = torch.ops.autopart.cross_entropy_backward(logits, targets, lse, dloss, terms)
        return found
    return _plain_gradient(logits, targets, lse, terms, False).mul_(dloss).to(logits.dtype)


def gradient_(logits: Tensor, targets: Tensor, lse: Tensor, terms: Terms) -> Tensor:
    """The gradient of the sum of losses, written over the logits (n, v), whose stride is 1 along a row."""
    if kernels_apply(logits, targets):
        torch.ops.autopart.cross_entropy_backward_(logits, targets, lse, terms)
        return logits
    found = _plain_gradient(logits, targets, lse, terms, True)
    return logits if found is logits else logits.copy_(found)


def kernels_apply(logits: Tensor, targets: Tensor) -> bool:
    """Whether the Triton kernels take these logits (n, v) and targets (n,)."""
    return (
        logits.dtype in TRITON_NAMES
        and targets.dtype in (torch.int64, torch.int32)
        and logits.dim() == 2
        and targets.shape == logits.shape[:1]
        and runs_on(logits, targets)
    )


@jit
def tanh(x):  # type: ignore[no-untyped-def]
    e = tl.exp(-2 * tl.abs(x))
    return tl.where(x < 0, e - 1, 1 - e) / (1 + e)


@jit
def statistics_kernel(  # type: ignore[no-untyped-def]
    logits, targets, found, stride, rows, v, first, ignored, factor, cap,
    CAP: tl.constexpr, TOTAL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    factor, cap = tl.cast(factor, tl.float32), tl.cast(cap, tl.float32)
    target = tl.load(targets + row)
    end = tl.where(target == ignored, 0, v)
    local = (target - first).to(tl.int64)
    wanted = tl.load(logits + row * stride + local, mask=(local >= 0) & (local < end), other=0.0)
    wanted = wanted.to(tl.float32) * factor
    if CAP:
        wanted = cap * tanh(wanted / cap)
    highest = -float("inf")
    sums = tl.zeros((COLUMNS,), tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, end, COLUMNS):
        cols = start + tl.arange(0, COLUMNS)
        u = tl.load(logits + row * stride + cols, mask=cols < v, other=0.0).to(tl.float32) * factor
        if CAP:
            u = cap * tanh(u / cap)
        if TOTAL:
            total += u
        u = tl.where(cols < v, u, -float("inf"))
        higher = tl.maximum(highest, tl.max(u, 0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        sums = sums * tl.exp(highest - shift) + tl.exp(u - shift)
        highest = higher
    tl.store(found + row, highest)
    tl.store(found + rows + row, tl.sum(sums, 0))
    tl.store(found + 2 * rows + row, wanted)
    tl.store(found + 3 * rows + row, tl.sum(total, 0))


@jit
def gradient_kernel(  # type: ignore[no-untyped-def]
    logits, targets, lse, dloss, dlogits, stride, out_stride, v, first, ignored, factor, cap, hit, each, z,
    CAP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    factor, cap = tl.cast(factor, tl.float32), tl.cast(cap, tl.float32)
    hit, each, z = tl.cast(hit, tl.float32), tl.cast(each, tl.float32), tl.cast(z, tl.float32)
    target = tl.load(targets + row)
    local = (target - first).to(tl.int64)
    counted = target != ignored
    scale = tl.load(dloss).to(tl.float32) * factor
    level = tl.load(lse + row)
    for start in range(0, v, COLUMNS):
        cols = start + tl.arange(0, COLUMNS)
        u = tl.load(logits + row * stride + cols, mask=(cols < v) & counted, other=0.0).to(tl.float32) * factor
        slope = scale
        if CAP:
            e = tl.exp(-2 * tl.abs(u / cap))
            slope = scale * 4 * e / ((1 + e) * (1 + e))  # 1 - tanh(u / cap)^2, without cancellation
            u = cap * tanh(u / cap)
        d = tl.exp(u - level) * (1 + 2 * z * level) - each
        d = tl.where(cols == local, d - hit, d)
        d = tl.where(counted, d * slope, 0.0)
        tl.store(dlogits + row * out_stride + cols, d.to(dlogits.dtype.element_ty), mask=cols < v)


@triton_op("autopart::cross_entropy_statistics", mutates_args=())
def row_statistics(logits: Tensor, targets: Tensor, terms: Sequence[float]) -> Tensor:
    """(4, n), as `statistics`."""
    given = Terms.of(terms)
    x, t = as_rows(logits), targets.contiguous()
    n, v = x.shape
    found = torch.empty(4, n, dtype=torch.float32, device=x.device)
    arguments = (x, t, found, x.stride(0), n, v, given.first, given.ignore_index, given.factor, given.softcap)
    launch(statistics_kernel, n, *arguments, TOTAL=given.label_smoothing != 0, **options(v, given.softcap))
    return found


def write_gradient(logits: Tensor, targets: Tensor, lse: Tensor, dloss: Tensor, terms: Terms, out: Tensor) -> None:
    """Write the gradient to ``out``, which may be the logits, by the Triton kernel."""
    n, v = logits.shape
    hit, each = 1 - terms.label_smoothing, terms.label_smoothing / terms.classes
    constants = (terms.first, terms.ignore_index, terms.factor, terms.softcap, hit, each, terms.z_loss)
    arguments = (logits, targets.contiguous(), lse, dloss, out, logits.stride(0), out.stride(0), v, *constants)
    launch(gradient_kernel, n, *arguments, **options(v, terms.softcap))


@triton_op("autopart::cross_entropy_backward", mutates_args=())
def row_gradient(logits: Tensor, targets: Tensor, lse: Tensor, dloss: Tensor, terms: Sequence[float]) -> Tensor:
    """``dloss`` times the gradient of the sum of losses by the logits (n, v)."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    write_gradient(as_rows(logits), targets, lse, dloss, Terms.of(terms), out)
    return out


@triton_op("autopart::cross_entropy_backward_", mutates_args={"logits"})
def row_gradient_(logits: Tensor, targets: Tensor, lse: Tensor, terms: Sequence[float]) -> None:
    """The gradient of the sum of losses, written over the logits (n, v), whose stride is 1 along a row."""
    write_gradient(logits, targets, lse, torch.ones((), device=logits.device), Terms.of(terms), logits)


def _transformed(logits: Tensor, terms: Terms) -> Tensor:
    """u of logits x, in float32, or in float64 of float64."""
    u = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if terms.factor != 1:
        u = u * terms.factor
    return (u / terms.softcap).tanh_().mul_(terms.softcap) if terms.softcap else u


def _local(targets: Tensor, v: int, terms: Terms) -> tuple[Tensor, Tensor]:
    """The column of every target among the given ones, 0 where it is not there, and whether it is there and counts."""
    local = targets.long() - terms.first
    here = (local >= 0) & (local < v) & (targets != terms.ignore_index)
    return torch.where(here, local, 0), here


def _plain_gradient(logits: Tensor, targets: Tensor, lse: Tensor, terms: Terms, overwrite: bool) -> Tensor:
    """The gradient of the sum of losses in plain PyTorch, in float32, or in float64 of float64. The logits may be
    overwritten if ``overwrite``. The lse of a row that does not count is taken as infinite, so that its gradient is
    exp(-inf) = 0, or NaN where its logits are not finite, as PyTorch's is: a mask would be a pass over all rows."""
    u = _transformed(logits, terms)
    counted = targets != terms.ignore_index
    level = torch.where(counted, lse, torch.inf)[:, None]
    local, here = _local(targets, logits.shape[-1], terms)
    needed = bool(terms.softcap) or (u is logits and not overwrite)
    d = (u - level if needed else u.sub_(level)).exp_()
    if terms.z_loss:
        d *= (1 + 2 * terms.z_loss * lse)[:, None]
    if terms.label_smoothing:
        d -= counted.to(d.dtype)[:, None] * (terms.label_smoothing / terms.classes)
    d.scatter_add_(1, local[:, None], -(1 - terms.label_smoothing) * here.to(d.dtype)[:, None])
    if terms.softcap:
        d *= u.div_(terms.softcap).square_().neg_().add_(1)
    if terms.factor != 1:
        d *= terms.factor
    return d


def columns(v: int) -> int:
    """Columns that a Triton program holds at once."""
    return min(power_of_two(v), BLOCK)


def warps(v: int) -> int:
    """Warps of a program: 16 columns for each thread."""
    return min(max(columns(v) // 512, 1), 8)


def options(v: int, softcap: float) -> dict[str, Any]:
    """What the kernels are specialised for, and their warps."""
    return {"CAP": softcap != 0, "COLUMNS": columns(v), "num_warps": warps(v), "enable_fp_fusion": True}
