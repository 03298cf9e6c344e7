"""Rotary position embedding of queries or of keys (arXiv 2104.09864).

The first r of the d elements of a head are r / 2 pairs (a, b), each of which is turned; the others pass through:

    a' = a cos_a - b sin_a,    b' = b cos_b + a sin_b
    da = da' cos_a + db' sin_b,    db = db' cos_b - da' sin_a

``rotary`` pairs elements i and i + r / 2, as Llama does; ``rotary_interleaved`` pairs 2 i and 2 i + 1, as GPT-J does;
``rotary_deinterleaved`` reads pairs 2 i and 2 i + 1 and writes them to i and i + r / 2, as DeepSeek-V3 does. The tables
have r columns, or r / 2 where both elements of a pair have the same angle. They get no gradient, and backward keeps
nothing else.

For x of n elements, and tables of t elements together, each of ``itemsize`` bytes, the least traffic in bytes is

    itemsize (2 n + t)      forward: read x and the tables, write y; and backward the same
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autopart.kernels import on_cpu
from autopart.kernels.ahead import Usage, compile_kernel
from autopart.kernels.kernel import Bytes, Kernel
from autopart.kernels.launch import TRITON_NAMES, launch, power_of_two, runs_on, triton_op
from autopart.kernels.rotary_kernel import rotary_kernel

ELEMENTS = 2048
"""Elements of x in one tile."""
SHARED = 4
"""Rows of x with one row of the tables, at least, where a program loads that row once."""

Dtype = torch.dtype | None
Turn = Callable[[Tensor, Tensor, Tensor], Tensor]


def _rotate_halves(x: Tensor) -> Tensor:
    """(-b, a) of pairs whose elements are half of the last dim apart."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _rotate_adjacent(x: Tensor) -> Tensor:
    """(-b, a) of pairs whose elements are side by side."""
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def _turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos) + (_rotate_halves(x) * sin)


def _turn_chunks(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = torch.chunk(x, 2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _turn_adjacent(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos) + (_rotate_adjacent(x) * sin)


def _turn_repeated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _turn_adjacent(x, cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1))


def _turned(turn: Turn, x: Tensor, cos: Tensor, sin: Tensor, half_width: bool, before: Dtype, behind: Dtype) -> Tensor:
    """``turn`` on the first r elements of the last dim, cast to a dtype before and to one behind."""
    r = cos.shape[-1] * (2 if half_width else 1)
    h = x if r == x.shape[-1] else x[..., :r]
    h = turn(h if before is None else h.to(before), cos, sin)
    h = h if behind is None else h.to(behind)
    return h if r == x.shape[-1] else torch.cat((h, x[..., r:]), dim=-1)


def reference(
    x: Tensor, cos: Tensor, sin: Tensor, half_width: bool = False, compute_dtype: Dtype = None, dtype: Dtype = None
) -> Tensor:
    """As ``rotary``, in plain PyTorch."""
    return _turned(_turn_chunks if half_width else _turn_halves, x, cos, sin, half_width, compute_dtype, dtype)


def interleaved_reference(
    x: Tensor, cos: Tensor, sin: Tensor, half_width: bool = False, compute_dtype: Dtype = None, dtype: Dtype = None
) -> Tensor:
    """As ``rotary_interleaved``, in plain PyTorch."""
    return _turned(_turn_repeated if half_width else _turn_adjacent, x, cos, sin, half_width, compute_dtype, dtype)


def deinterleaved_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As ``rotary_deinterleaved``, in plain PyTorch."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, half_width: bool = False, compute_dtype: Dtype = None, dtype: Dtype = None
) -> Tensor:
    """x (..., d) with its first r elements turned, as pairs i and i + r / 2: shape (..., d). By the Triton kernel where
    it applies, by `on_cpu.TurnHalves` for whole heads on CPUs, else by ``reference``.

    cos and sin are (..., r), or (..., r / 2) with ``half_width``; their other dims broadcast to those of x. x is cast
    to ``compute_dtype`` before, and what was turned to ``dtype`` behind, where these are given. The kernel computes in
    float32. It reads and writes any strides of dims but the last one without a copy: the dims of the result are in the
    same order in memory as those of ``reference``'s, and the gradient's as those of x.
    """
    if _kernel_applies(x, cos, sin, half_width, compute_dtype, dtype):
        return _call("halves", "halves", x, cos, sin, half_width, compute_dtype, dtype)
    whole = not half_width and {compute_dtype, dtype} <= {None, x.dtype}
    if whole and on_cpu.turns(x, cos, sin):
        y: Tensor = on_cpu.TurnHalves.apply(x, cos, sin)
        return y
    return reference(x, cos, sin, half_width, compute_dtype, dtype)


def rotary_interleaved(
    x: Tensor, cos: Tensor, sin: Tensor, half_width: bool = False, compute_dtype: Dtype = None, dtype: Dtype = None
) -> Tensor:
    """As ``rotary``, of pairs 2 i and 2 i + 1."""
    if _kernel_applies(x, cos, sin, half_width, compute_dtype, dtype):
        return _call("adjacent", "adjacent", x, cos, sin, half_width, compute_dtype, dtype)
    return interleaved_reference(x, cos, sin, half_width, compute_dtype, dtype)


def rotary_deinterleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs 2 i and 2 i + 1 of x (..., d), turned and written to i and i + d / 2, with tables of d / 2 columns."""
    if 2 * cos.shape[-1] == x.shape[-1] and _kernel_applies(x, cos, sin, True, None, None):
        return _call("adjacent", "halves", x, cos, sin, True, None, None)
    return deinterleaved_reference(x, cos, sin)


def bytes_moved(x: Tensor, cos: Tensor, sin: Tensor, *constants: object) -> Bytes:
    size = 2 * x.itemsize * x.numel() + cos.itemsize * cos.numel() + sin.itemsize * sin.numel()
    return Bytes(forward=size, backward=size)


def compile_ahead(
    capability: int,
    d: int = 128,
    heads: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    r: int | None = None,
    reads: str = "halves",
    writes: str = "halves",
    half_width: bool = False,
) -> dict[str, Usage]:
    """Compile forward and backward for compute capability ``capability`` (90 for 9.0), for x of shape (batch, tokens,
    ``heads``, ``d``) that has its dims in this order in memory."""
    half = (d if r is None else r) // 2
    types = dict.fromkeys(("x", "cos", "sin", "y"), f"*{TRITON_NAMES[dtype]}")
    strides = dict.fromkeys((f"{t}_{dim}" for t in ("x", "y", "table") for dim in ("a", "b", "row")), "i32")
    signature = types | strides | dict.fromkeys(("count", "rows", "d", "half"), "i32")
    aligned = {*types, *(("d",) if d % 16 == 0 else ()), *(("half",) if half % 16 == 0 else ())}
    aligned |= {name for name in strides if (half if name.startswith("table") else d) % 16 == 0}

    def compiled(reads: str, writes: str, inverse: bool) -> Usage:
        options = _options(heads if heads >= SHARED else ELEMENTS, d, half, heads >= SHARED)
        warps = options.pop("num_warps")
        options |= {"READS": reads, "WRITES": writes, "HALF_WIDTH": half_width, "INVERSE": inverse}
        return compile_kernel(rotary_kernel, signature, options, capability, warps, aligned)

    return {"forward": compiled(reads, writes, False), "backward": compiled(writes, reads, True)}


@triton_op("autopart::rotary", mutates_args=())
def _turn(
    x: Tensor, cos: Tensor, sin: Tensor, reads: str, writes: str, half_width: bool, inverse: bool, dtype: torch.dtype,
    order: Sequence[int],
) -> Tensor:  # fmt: skip
    """x (..., d) turned, or with ``inverse`` its gradient, in ``dtype``; its dims lie in ``order`` in memory."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    y = torch.empty([x.shape[dim] for dim in order], dtype=dtype, device=x.device)
    y = y.permute([order.index(dim) for dim in range(x.dim())])
    tables = cos.expand(*x.shape[:-1], -1)
    sizes = [1] * (4 - x.dim()) + list(x.shape[:-1])
    shared = [dim for dim in range(3) if _strides(tables)[dim] == 0 and sizes[dim] >= SHARED]
    at = min(shared, key=_strides(x).__getitem__) if shared else max(range(3), key=sizes.__getitem__)
    a, b = (dim for dim in range(3) if dim != at)
    strides = [_strides(t)[dim] for t in (x, y, tables) for dim in (a, b, at)]
    d, half = x.shape[-1], cos.shape[-1] // (1 if half_width else 2)
    options = _options(sizes[at], d, half, bool(shared))
    options |= {"READS": reads, "WRITES": writes, "HALF_WIDTH": half_width, "INVERSE": inverse}
    programs = sizes[a] * sizes[b] * -(-sizes[at] // options["ROWS"])
    launch(rotary_kernel, programs, x, cos, sin, y, *strides, sizes[b], sizes[at], d, half, **options)
    return y


def _strides(x: Tensor) -> list[int]:
    """Strides of the three dims before the last one; 0 of dims of one element, and of those that x lacks."""
    return [0] * (4 - x.dim()) + [0 if n == 1 else s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True)]


def _options(rows: int, d: int, half: int, shared: bool) -> dict[str, Any]:
    """Sizes of a tile of up to ``ELEMENTS`` elements of x, and its warps: one for 512 elements, at most 4."""
    width, rest = power_of_two(int(half)), int(d - 2 * half)
    rest = power_of_two(rest) if rest else 0
    most = 1 << (max(ELEMENTS // (2 * width + rest), 1).bit_length() - 1)
    height = most if rows >= most else power_of_two(int(rows))
    sizes = {"ROWS": height, "TABLE_ROWS": 1 if shared else height, "WIDTH": width, "REST": rest}
    return sizes | {"num_warps": min(power_of_two(max(height * (2 * width + rest) // 512, 1)), 4)}


def _call(
    reads: str, writes: str, x: Tensor, cos: Tensor, sin: Tensor, half_width: bool, before: Dtype, behind: Dtype
) -> Tensor:
    """Call the operator. Where ``reference`` ends in a concatenation, the result is contiguous."""
    dtype = behind or functools.reduce(torch.promote_types, (cos.dtype, sin.dtype), before or x.dtype)
    passes = cos.shape[-1] * (2 if half_width else 1) < x.shape[-1]
    order = list(range(x.dim())) if passes or (half_width and writes == "halves") else _order(x)
    return torch.ops.autopart.rotary(x, cos, sin, reads, writes, half_width, False, dtype, order)


def _order(x: Tensor) -> list[int]:
    """The dims of x from the one of the greatest stride on, the last dim last. They are in order if x is expanded."""
    strides, last = x.stride(), x.dim() - 1
    return [*sorted(range(last), key=lambda dim: 0 if 0 in strides else -strides[dim]), last]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cos, sin, reads, writes, half_width, inverse, _, _ = inputs
    ctx.save_for_backward(cos, sin)
    ctx.constants = writes, reads, half_width, not inverse, x.dtype, _order(x)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.autopart.rotary(dy, *ctx.saved_tensors, *ctx.constants), *(None,) * 8


_turn.register_autograd(_gradients, setup_context=_save)


def _kernel_applies(x: Tensor, cos: Tensor, sin: Tensor, half_width: bool, compute_dtype: Dtype, dtype: Dtype) -> bool:
    r = cos.shape[-1] * (2 if half_width else 1)
    lead, of_table = x.shape[-2::-1], cos.shape[-2::-1]
    return (
        all(t.dtype in TRITON_NAMES for t in (x, cos, sin))
        and compute_dtype in (None, torch.float32)
        and dtype in (None, x.dtype)
        and not (cos.requires_grad or sin.requires_grad)
        and cos.shape == sin.shape
        and r % 2 == 0
        and r <= x.shape[-1] <= ELEMENTS
        and cos.dim() <= x.dim() <= 4
        and all(n in (1, size) for n, size in zip(of_table, lead, strict=False))
        and runs_on(x, cos, sin)
    )


def _record(function: Any, pattern: Any, shapes: dict[str, dict[str, Any]], **layout: Any) -> Kernel:
    return Kernel(
        function=function,
        reference=pattern,
        rule="... d!, ... r!, ... r! -> ... d!",
        no_gradient=(1, 2),
        kept=lambda arguments, outputs: arguments[1:3],
        bytes_moved=bytes_moved,
        ahead=functools.partial(compile_ahead, **layout),
        shapes=shapes,
    )


KERNELS = (
    _record(rotary, reference, {"Llama-3-8B": {}, "Mixtral-8x7B": {}, "GPT-NeoX-20B": {"d": 96, "heads": 64, "r": 24}}),
    _record(
        rotary_interleaved,
        interleaved_reference,
        {"GPT-J-6B": {"d": 256, "heads": 16, "r": 64}, "Command R": {"heads": 64}},
        reads="adjacent",
        writes="adjacent",
    ),
    _record(
        rotary_deinterleaved,
        deinterleaved_reference,
        {"DeepSeek-V3": {"d": 64, "heads": 128}, "DeepSeek-V3's keys": {"d": 64, "heads": 1}},
        reads="adjacent",
        writes="halves",
        half_width=True,
    ),
)
