"""Products of rows with the weights of their experts: rows sorted by expert, one weight for each expert.

For x (s, k), whose rows offsets[e]:offsets[e + 1] belong to expert e, and weight (experts, n, k)

    forward    y[r] = weight[e] x[r]                     for every row r of expert e
    backward   dx[r] = dy[r] weight[e],   dweight[e] = sum over the rows of e of the outer products dy[r] x[r]

Rows from offsets[experts] on belong to no expert here: they give zeros, and have zero gradients. The sizes of groups
are not read on the host: as many programs start as tiles there can be, and each finds its tile among the offsets. The
order of a sum depends on nothing but the offsets.

For ``itemsize`` bytes of an element the least traffic in bytes is

    forward    itemsize (s k + s n + experts n k)            read x and weight, write y
    backward   itemsize (2 s k + s n + 2 experts n k)        read dy, x and weight, write dx and dweight

Sources: Gale et al., arXiv 2211.15841, for groups of uneven sizes without padding; the order of tiles is that of
Triton's tutorial on matrix products.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from autopart.kernels.ahead import Usage, compile_kernel
from autopart.kernels.kernel import Bytes, Kernel
from autopart.kernels.launch import TRITON_NAMES, interprets, jit, launch, power_of_two, runs_on, triton_op

tl: Any = None  # triton.language, which jit binds

MAX_EXPERTS = 1023
HEIGHT = 8
"""Tiles of rows whose programs run one after the other for all columns, so that weights stay in the cache."""


def reference(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """`grouped_matmul` by one product for each expert that has rows."""
    out: torch.Tensor = _Loop.apply(x, weight, offsets)
    return out


def grouped_matmul(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Every row of x times the weight of its expert: (s, n).

    x        (s, k), rows sorted by expert
    weight   (experts, n, k), of any strides: a transposed view of (experts, k, n) is taken as it is
    offsets  (experts + 1,), int32 or int64, rising from 0: the rows offsets[e]:offsets[e + 1] are expert e's

    By the Triton kernels where they apply, else by ``reference``. Products of float32 are exact to float32, unless
    `torch.get_float32_matmul_precision` allows TensorFloat-32.
    """
    if _kernels_apply(x, weight, offsets):
        return torch.ops.autopart.grouped_matmul(x, weight, offsets)
    return reference(x, weight, offsets)


def gradients(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x (s, k) and weight (experts, n, k) of `grouped_matmul`, for dy (s, n). By the Triton kernels where
    they apply, else by one product for each expert that has rows."""
    if _kernels_apply(x, weight, offsets) and runs_on(dy):
        return torch.ops.autopart.grouped_matmul_backward(dy, x, weight, offsets)
    return _loop_gradients(dy, x, weight, _spans(offsets))


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.spans = _spans(offsets)
        out = x.new_zeros(len(x), weight.shape[1])
        for expert, start, end in ctx.spans:
            if start < end:
                torch.mm(x[start:end], weight[expert].t(), out=out[start:end])
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return *_loop_gradients(gradients[0], x, weight, ctx.spans), None


def _spans(offsets: torch.Tensor) -> list[tuple[int, int, int]]:
    """Every expert with the first of its rows, and the first behind them."""
    return [(e, start, end) for e, (start, end) in enumerate(itertools.pairwise(offsets.tolist()))]


def _loop_gradients(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, spans: list[tuple[int, int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    of_x, of_weight = torch.zeros_like(x), torch.zeros_like(weight)
    for expert, start, end in spans:
        if start < end:
            of_x[start:end] = dy[start:end] @ weight[expert]
            of_weight[expert] = dy[start:end].t() @ x[start:end]
    return of_x, of_weight


def bytes_moved(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> Bytes:
    outputs = len(x) * weight.shape[1]
    return Bytes(
        forward=x.itemsize * (x.numel() + outputs + weight.numel()),
        backward=x.itemsize * (2 * x.numel() + outputs + 2 * weight.numel()),
    )


def compile_ahead(
    capability: int,
    s: int = 8192,
    n: int = 28672,
    k: int = 4096,
    experts: int = 8,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Usage]:
    """Compile the kernels for y, dx and dweight of contiguous tensors and compute capability ``capability`` (90 for
    9.0)."""
    pointers = dict.fromkeys(("x", "weight", "y", "dy", "dweight"), f"*{TRITON_NAMES[dtype]}") | {"offsets": "*i64"}
    integers = ("s", "n", "k", "experts", "x_stride", "dy_stride", "stride_e", "stride_n", "stride_k")
    signature = pointers | dict.fromkeys(integers, "i32")
    made = {}
    for name, inner, swapped in (("forward", k, "stride_k"), ("dx", n, "stride_n"), ("dweight", 0, "")):
        kernel = rows if inner else weights
        sizes = {"s": s, "n": n, "k": k, "x_stride": k, "dy_stride": n, "stride_e": n * k}
        sizes |= {"stride_k": n, "stride_n": k}
        aligned = {*pointers, *(key for key, value in sizes.items() if value % 16 == 0 and key != swapped)}
        tile = _tile(s, experts, n, k, dtype)
        constexprs = {**tile, "WIDE": False, "PRECISION": "ieee"} | ({swapped: 1} if swapped else {})
        if inner:
            constexprs |= {"EXPERTS": power_of_two(experts + 1), "HEIGHT": HEIGHT, "EVEN": inner % tile["K"] == 0}
        made[name] = compile_kernel(kernel, signature, constexprs, capability, _warps(tile, dtype), aligned)
    return made


@jit
def rows(  # type: ignore[no-untyped-def]
    x, weight, offsets, y, s, n, k, experts, x_stride, stride_e, stride_n, stride_k, EXPERTS: tl.constexpr,
    HEIGHT: tl.constexpr, EVEN: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[r] = weight[e] x[r] by tiles of M rows of one expert and N columns."""
    across = tl.cdiv(n, N)
    first = tl.program_id(0) // (HEIGHT * across) * HEIGHT
    within = tl.program_id(0) % (HEIGHT * across)
    height = tl.minimum(tl.num_programs(0) // across - first, HEIGHT)
    tile = first + within % height
    e = tl.arange(0, EXPERTS)
    starts = tl.load(offsets + e, mask=e <= experts, other=s).to(tl.int32)
    ends = tl.load(offsets + e + 1, mask=e < experts, other=s).to(tl.int32)
    tiles = (ends - starts + M - 1) // M
    before = tl.cumsum(tiles, 0) - tiles
    mine = (before <= tile) & (tile < before + tiles)
    expert = tl.sum(tl.where(mine, e, 0), 0)
    end = tl.sum(tl.where(mine, ends, 0), 0)
    row = tl.sum(tl.where(mine, starts + (tile - before) * M, 0), 0) + tl.arange(0, M)
    column = within // height * N + tl.arange(0, N)
    inner = tl.arange(0, K)
    wide_row = row.to(tl.int64)[:, None]
    a = x + wide_row * x_stride + inner[None, :]
    b = weight + expert.to(tl.int64) * stride_e + inner[:, None] * stride_k + column[None, :].to(tl.int64) * stride_n
    total = tl.zeros((M, N), tl.float32)
    here, there = (row < end)[:, None], (column < n)[None, :]
    for done in range(0, tl.where((expert < experts) & (end > 0), k, 0), K):
        if EVEN:
            left = tl.load(a, mask=here, other=0.0)
            right = tl.load(b, mask=there, other=0.0)
        else:
            left = tl.load(a, mask=here & (inner < k - done)[None, :], other=0.0)
            right = tl.load(b, mask=there & (inner < k - done)[:, None], other=0.0)
        if WIDE:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        a += K
        b += K * stride_k
    tl.store(y + wide_row * n + column[None, :], total.to(y.dtype.element_ty), mask=here & there)


@jit
def weights(  # type: ignore[no-untyped-def]
    dy, x, offsets, dweight, n, k, dy_stride, x_stride, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dweight[e] by tiles of N x M elements, summed over K rows at a time."""
    expert = tl.program_id(1)
    across = tl.cdiv(k, M)
    of_n = tl.program_id(0) // across * N + tl.arange(0, N)
    of_k = tl.program_id(0) % across * M + tl.arange(0, M)
    start = tl.load(offsets + expert).to(tl.int32)
    end = tl.load(offsets + expert + 1).to(tl.int32)
    total = tl.zeros((N, M), tl.float32)
    for first in range(start, end, K):
        row = first + tl.arange(0, K)
        wide_row = row.to(tl.int64)
        at = wide_row[None, :] * dy_stride + of_n[:, None]
        left = tl.load(dy + at, mask=(of_n < n)[:, None] & (row < end)[None, :], other=0.0)
        at = wide_row[:, None] * x_stride + of_k[None, :]
        right = tl.load(x + at, mask=(row < end)[:, None] & (of_k < k)[None, :], other=0.0)
        if WIDE:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    at = (expert.to(tl.int64) * n + of_n[:, None]) * k + of_k[None, :]
    tl.store(dweight + at, total.to(dweight.dtype.element_ty), mask=(of_n < n)[:, None] & (of_k < k)[None, :])


@triton_op("autopart::grouped_matmul", mutates_args=())
def _forward(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return _rows(x, weight, offsets)


@triton_op("autopart::grouped_matmul_backward", mutates_args=())
def _backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and of weight."""
    experts, n, k = weight.shape
    g, h = _unit(dy), _unit(x)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    tile = _tile(len(x), experts, n, k, x.dtype)
    programs = -(-n // tile["N"]) * -(-k // tile["M"]), experts
    arguments = g, h, offsets, dweight, n, k, g.stride(0), h.stride(0)
    launch(weights, programs, *arguments, **tile, **_precision(), num_warps=_warps(tile, x.dtype))
    return _rows(g, weight.transpose(1, 2), offsets), dweight


def _rows(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    experts, n, k = weight.shape
    h = _unit(x)
    y = torch.empty(len(x), n, dtype=x.dtype, device=x.device)
    tile = _tile(len(x), experts, n, k, x.dtype)
    tiles = len(x) // tile["M"] + experts + 1
    options = {"EXPERTS": power_of_two(experts + 1), "HEIGHT": HEIGHT, "EVEN": k % tile["K"] == 0, **tile}
    arguments = h, weight, offsets, y, len(x), n, k, experts, h.stride(0), *weight.stride()
    programs = tiles * -(-n // tile["N"])
    launch(rows, programs, *arguments, **options, **_precision(), num_warps=_warps(tile, x.dtype))
    return y


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    return *torch.ops.autopart.grouped_matmul_backward(dy, *ctx.saved_tensors), None


_forward.register_autograd(_gradients, setup_context=_save)


def _kernels_apply(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> bool:
    return (
        x.dtype in TRITON_NAMES
        and weight.dtype == x.dtype
        and x.dim() == 2
        and len(weight) <= MAX_EXPERTS
        and offsets.is_contiguous()
        and runs_on(x, weight, offsets)
    )


def _unit(x: torch.Tensor) -> torch.Tensor:
    """x with stride 1 along a row: itself, or a copy."""
    return x if x.stride(1) == 1 else x.contiguous()


def _tile(s: int, experts: int, n: int, k: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows, columns and summands of a tile: at most as many rows as two groups have on average. Tiles are small where
    addresses are not known to be aligned, which takes registers."""
    even = n % 16 == 0 and k % 16 == 0
    rows = min(max(power_of_two(max(2 * s // experts, 1)), 16), 128 if even else 64)
    return {"M": rows, "N": 128 if even else 64, "K": 64 if even and dtype != torch.float32 else 32}


def _warps(tile: dict[str, int], dtype: torch.dtype) -> int:
    return 8 if tile["M"] == 128 or dtype == torch.float32 else 4


def _precision() -> dict[str, Any]:
    """How products of float32 are made; whether they are of float32 in any case, as Triton's interpreter needs it."""
    allowed = torch.get_float32_matmul_precision() != "highest"
    return {"PRECISION": "tf32" if allowed else "ieee", "WIDE": interprets()}


KERNEL = Kernel(
    function=grouped_matmul,
    reference=reference,
    rule="s! k, e! n k, o! -> s! n",
    kept=lambda arguments, outputs: arguments,
    bytes_moved=bytes_moved,
    ahead=compile_ahead,
    shapes={
        "Mixtral-8x7B": {"s": 8192, "n": 28672, "k": 4096, "experts": 8},
        "Qwen3-30B-A3B": {"s": 32768, "n": 1536, "k": 2048, "experts": 128},
    },
)
