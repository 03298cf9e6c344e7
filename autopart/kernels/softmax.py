"""Softmax of the largest scores of each row alone: explicit sparse attention (Zhao et al. 2019).

    y = softmax(x) over the x that are at least the k-th largest of their row, else 0
    dx = y (dy - sum(y dy))

The k-th largest is found bit by bit: float32 numbers are in the order of integers made from their bits, and each of 32
counts of a row decides one bit. For n scores of `itemsize` bytes the least traffic in bytes is

    forward   2 itemsize n      read x, write y
    backward  3 itemsize n      read y and dy, write dx
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autopart.kernels.ahead import Usage, compile_kernels
from autopart.kernels.kernel import Bytes, Kernel
from autopart.kernels.launch import TRITON_NAMES, as_rows, jit, launch, power_of_two, runs_on, triton_op

tl: Any = None  # triton.language, which jit binds

MAX_KEYS = 16384
"""Keys of the longest row that the kernels take."""
ELEMENTS = 4096
"""Scores of a Triton program whose rows are shorter."""


def reference(
    scores: Tensor, k: int, compute_dtype: torch.dtype | None = None, selected: bool = False, where: bool = False
) -> Tensor:
    """`topk_softmax` as models write it, with a softmax in ``compute_dtype``, or in the scores' when that is None; with
    the k-th largest ``selected`` in place of sliced, and scores left out by `torch.where` or by `masked_fill`."""
    values = torch.topk(scores, min(k, scores.shape[-1]), dim=-1).values
    least, inf = values[..., -1].unsqueeze(-1) if selected else values[..., -1:], float("inf")
    left = torch.where(scores >= least, scores, -inf) if where else scores.masked_fill(scores < least, -inf)
    return torch.softmax(left, -1, dtype=compute_dtype).to(scores.dtype)


def topk_softmax(
    scores: Tensor, k: int, compute_dtype: torch.dtype | None = None, selected: bool = False, where: bool = False
) -> Tensor:
    """Softmax of scores (..., K) over those of each row that are at least its k-th largest, which is 0 elsewhere. Equal
    scores are kept or left out together. By the Triton kernels where they apply, else by ``reference``, of which
    ``selected`` and ``where`` are spellings."""
    if scores.dim() > 0 and k > 0 and _kernels_apply(scores):
        return torch.ops.autopart.topk_softmax(scores, k)
    return reference(scores, k, compute_dtype, selected, where)


def _kernels_apply(scores: Tensor) -> bool:
    return scores.dtype in TRITON_NAMES and scores.shape[-1] <= MAX_KEYS and runs_on(scores)


@jit
def topk(x, y, x_stride, rows, keys, k, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, BLOCK)[None, :]
    here = (row < rows)[:, None] & (j < keys)
    s = tl.load(x + row[:, None] * x_stride + j, mask=here, other=float("-inf")).to(tl.float32)
    s = tl.where(s == s, s, float("nan"))
    bits = s.to(tl.uint32, bitcast=True)
    order = tl.where(here, tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000), 0)
    least = tl.zeros((ROWS,), tl.uint32)
    for step in range(32):
        tried = least | (tl.full((ROWS,), 0x80000000, tl.uint32) >> step)
        least = tl.where(tl.sum((order >= tried[:, None]).to(tl.int32), 1) >= k, tried, least)
    bound = tl.where(least >> 31 != 0, least & 0x7FFFFFFF, least ^ 0xFFFFFFFF).to(tl.float32, bitcast=True)
    s = tl.where(s < bound[:, None], float("-inf"), s)
    p = tl.exp(s - tl.max(s, 1)[:, None])
    tl.store(y + row[:, None] * keys + j, (p / tl.sum(p, 1)[:, None]).to(y.dtype.element_ty), mask=here)


@jit
def backward(dy, y, dx, dy_stride, rows, keys, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, BLOCK)[None, :]
    here = (row < rows)[:, None] & (j < keys)
    p = tl.load(y + row[:, None] * keys + j, mask=here, other=0.0).to(tl.float32)
    seen = here & (p != 0.0)
    g = tl.load(dy + row[:, None] * dy_stride + j, mask=seen, other=0.0).to(tl.float32)
    g = p * (g - tl.sum(p * g, 1)[:, None])
    tl.store(dx + row[:, None] * keys + j, tl.where(seen, g, 0.0).to(dx.dtype.element_ty), mask=here)


@triton_op("autopart::topk_softmax", mutates_args=())
def _forward(scores: Tensor, k: int) -> Tensor:
    h = as_rows(scores)
    rows, keys = h.shape
    y = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    options = _options(keys)
    launch(topk, -(-rows // options["ROWS"]), h, y, h.stride(0), rows, keys, min(k, keys), **options)
    return y


@triton_op("autopart::topk_softmax_backward", mutates_args=())
def _backward(dy: Tensor, y: Tensor) -> Tensor:
    g = as_rows(dy)
    rows, keys = g.shape
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    options = _options(keys)
    launch(backward, -(-rows // options["ROWS"]), g, y, dx, g.stride(0), rows, keys, **options)
    return dx


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return torch.ops.autopart.topk_softmax_backward(dy, ctx.saved_tensors[0]), None


_forward.register_autograd(_gradients, setup_context=_save)


def _options(keys: int) -> dict[str, Any]:
    """Rows and keys of a program, of 16 scores a thread in 4 to 32 warps."""
    block = power_of_two(keys)
    rows = max(1, min(ELEMENTS // block, 16))
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(max(rows * block // 512, 4), 32)}


def compile_ahead(capability: int, keys: int = 1024, dtype: torch.dtype = torch.bfloat16) -> dict[str, Usage]:
    """Compile the kernels for rows of ``keys`` scores and compute capability ``capability`` (90 for 9.0)."""
    types = dict.fromkeys(("x", "y", "dy", "dx"), f"*{TRITON_NAMES[dtype]}")
    lengths = dict.fromkeys(("x_stride", "dy_stride", "keys"), "i32")
    options = _options(keys)
    warps = options.pop("num_warps")
    aligned = {*types, *(lengths if keys % 16 == 0 else ())}
    signature = types | lengths | {"rows": "i32", "k": "i32"}
    return compile_kernels((topk, backward), signature, options, capability, warps, aligned)


def bytes_moved(scores: Tensor, *constants: Any) -> Bytes:
    n = scores.numel() * scores.itemsize
    return Bytes(forward=2 * n, backward=3 * n)


def kept(arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The output."""
    return outputs[:1]


KERNEL = Kernel(
    function=topk_softmax,
    reference=reference,
    rule="... k! -> ... k!",
    kept=kept,
    bytes_moved=bytes_moved,
    ahead=compile_ahead,
    shapes={"1024 keys": {"keys": 1024}, "8192 keys": {"keys": 8192}},
    on_cpu=False,
)
