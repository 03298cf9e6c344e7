"""Softmax over the keys of attention's scores: scaled, masked by places, or of the largest scores of each row alone.

    masked_softmax   y = softmax(cap tanh(scale x / cap)) over the keys that a query sees; no mask is made
    topk_softmax     y = softmax(x) over the x that are at least the k-th largest of their row: explicit sparse
                     attention (Zhao et al. 2019)

The k-th largest is found bit by bit: float32 numbers are in the order of integers made from their bits, and each of 32
counts of a row decides one bit. The backward of both is dx = y (dy - sum(y dy)), times the derivative of the scaling.
For n scores of `itemsize` bytes the least traffic in bytes is

    forward   2 itemsize n      read x, write y
    backward  3 itemsize n      read y and dy, write dx; with a cap also read x
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


def masked_reference(
    scores: Tensor, padding: Tensor | None = None, scale: float = 1.0, causal: bool = False, window: int = 0,
    cap: float = 0.0, compute_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`masked_softmax` as models write it, with a softmax in ``compute_dtype``, or in the scores' when that is None."""
    queries, keys = scores.shape[-2:]
    scores = scores * scale
    if cap:
        scores = torch.tanh(scores / cap) * cap
    seen = None if padding is None else padding[:, None, None]
    if causal or window:
        places = torch.arange(keys, device=scores.device)
        ahead = places - torch.arange(keys - queries, keys, device=scores.device)[:, None]
        near = ahead <= 0 if causal else ahead < window
        near = near & (ahead > -window) if window else near
        seen = near if seen is None else seen & near
    if seen is not None:
        scores = torch.where(seen, scores, float("-inf"))
    if padding is not None or queries > keys:
        return torch.ops.aten._safe_softmax(scores.to(compute_dtype or scores.dtype), -1).to(scores.dtype)
    return torch.softmax(scores, -1, dtype=compute_dtype).to(scores.dtype)


def masked_softmax(
    scores: Tensor, padding: Tensor | None = None, scale: float = 1.0, causal: bool = False, window: int = 0,
    cap: float = 0.0, compute_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Softmax of scores (B, H, Q, K) over the keys that each query sees, 0 elsewhere: shape (B, H, Q, K). By the Triton
    kernels where they apply, else by ``masked_reference``.

    padding  (B, K) boolean, true where a sample has a key
    causal   query i sees the keys up to i + K - Q
    window   if positive, query i sees keys less than `window` away from i + K - Q
    cap      if positive, scaled scores are cap tanh(s / cap) (Gemma 2)

    With padding, and with more queries than keys, a query that sees no key has zeros. The kernels compute in float32.
    Tensor subclasses, such as fake tensors, take ``masked_reference``.
    """
    if scores.dim() == 4 and _kernels_apply(scores, *(() if padding is None else (padding,))):
        constants = (float(scale), causal, window, float(cap))
        return torch.ops.autopart.masked_softmax(scores, padding, *constants)
    return masked_reference(scores, padding, scale, causal, window, cap, compute_dtype)


def topk_reference(
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
    scores are kept or left out together. By the Triton kernels where they apply, else by ``topk_reference``, of which
    ``selected`` and ``where`` are spellings."""
    if scores.dim() > 0 and k > 0 and _kernels_apply(scores):
        return torch.ops.autopart.topk_softmax(scores, k)
    return topk_reference(scores, k, compute_dtype, selected, where)


def _kernels_apply(scores: Tensor, *given: Tensor) -> bool:
    return scores.dtype in TRITON_NAMES and scores.shape[-1] <= MAX_KEYS and runs_on(scores, *given)


@jit
def masked(  # type: ignore[no-untyped-def]
    x, padding, y, x_stride, rows, each, queries, keys, scale, cap, window, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, PADDING: tl.constexpr, SAFE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, BLOCK)[None, :]
    here = (row < rows)[:, None] & (j < keys)
    ahead = j - (row % queries + (keys - queries)).to(tl.int32)[:, None]
    seen = here
    if CAUSAL:
        seen &= ahead <= 0
    if WINDOW:
        seen &= (ahead < window) & (ahead > -window)
    if PADDING:
        seen &= tl.load(padding + (row // each)[:, None] * keys + j, mask=here, other=0) != 0
    s = tl.load(x + row[:, None] * x_stride + j, mask=seen, other=0.0).to(tl.float32) * scale
    if CAP:
        s = cap - 2.0 * cap / (tl.exp(2.0 * s / cap) + 1.0)
    s = tl.where(seen, s, float("-inf"))
    most = tl.max(s, 1)
    most = tl.where(most == float("-inf"), 0.0, most) if SAFE else most
    p = tl.exp(s - most[:, None])
    total = tl.sum(p, 1)
    total = tl.where(total == 0.0, 1.0, total) if SAFE else total
    tl.store(y + row[:, None] * keys + j, (p / total[:, None]).to(y.dtype.element_ty), mask=here)


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
def backward(  # type: ignore[no-untyped-def]
    dy, y, x, dx, dy_stride, x_stride, rows, keys, scale, cap, CAP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, BLOCK)[None, :]
    here = (row < rows)[:, None] & (j < keys)
    p = tl.load(y + row[:, None] * keys + j, mask=here, other=0.0).to(tl.float32)
    seen = here & (p != 0.0)
    g = tl.load(dy + row[:, None] * dy_stride + j, mask=seen, other=0.0).to(tl.float32)
    g = p * (g - tl.sum(p * g, 1)[:, None]) * scale
    if CAP:
        s = tl.load(x + row[:, None] * x_stride + j, mask=seen, other=0.0).to(tl.float32) * scale
        t = 1.0 - 2.0 / (tl.exp(2.0 * s / cap) + 1.0)
        g *= 1.0 - t * t
    tl.store(dx + row[:, None] * keys + j, tl.where(seen, g, 0.0).to(dx.dtype.element_ty), mask=here)


@triton_op("autopart::masked_softmax", mutates_args=())
def _masked_forward(
    scores: Tensor, padding: Tensor | None, scale: float, causal: bool, window: int, cap: float
) -> Tensor:
    h = as_rows(scores)
    _, heads, queries, keys = scores.shape
    y = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    sizes = (h.stride(0), len(h), heads * queries, queries, keys, scale, cap, window)
    flags = {"CAUSAL": causal, "WINDOW": window > 0, "CAP": cap > 0, "PADDING": padding is not None}
    flags["SAFE"] = padding is not None or queries > keys
    given = h if padding is None else padding.contiguous()
    options = _options(keys)
    launch(masked, -(-len(h) // options["ROWS"]), h, given, y, *sizes, **flags, **options)
    return y


@triton_op("autopart::topk_softmax", mutates_args=())
def _topk_forward(scores: Tensor, k: int) -> Tensor:
    h = as_rows(scores)
    rows, keys = h.shape
    y = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    options = _options(keys)
    launch(topk, -(-rows // options["ROWS"]), h, y, h.stride(0), rows, keys, min(k, keys), **options)
    return y


@triton_op("autopart::softmax_backward", mutates_args=())
def _backward(dy: Tensor, y: Tensor, scores: Tensor | None, scale: float, cap: float) -> Tensor:
    """Gradient of the scores, which are needed for a cap alone."""
    g, h = as_rows(dy), as_rows(y if scores is None else scores)
    rows, keys = g.shape
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    sizes = (g.stride(0), h.stride(0), rows, keys, scale, cap)
    options = _options(keys)
    programs = -(-rows // options["ROWS"])
    launch(backward, programs, g, y, h, dx, *sizes, CAP=scores is not None, **options)
    return dx


def _save_masked(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    scores, _, ctx.scale, _, _, ctx.cap = inputs
    ctx.save_for_backward(output, scores if ctx.cap > 0 else None)


def _masked_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    y, scores = ctx.saved_tensors
    return torch.ops.autopart.softmax_backward(dy, y, scores, ctx.scale, ctx.cap), None, None, None, None, None


def _save_topk(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _topk_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return torch.ops.autopart.softmax_backward(dy, ctx.saved_tensors[0], None, 1.0, 0.0), None


_masked_forward.register_autograd(_masked_gradients, setup_context=_save_masked)
_topk_forward.register_autograd(_topk_gradients, setup_context=_save_topk)


def _options(keys: int) -> dict[str, Any]:
    """Rows and keys of a program, of 16 scores a thread in 4 to 32 warps."""
    block = power_of_two(keys)
    rows = max(1, min(ELEMENTS // block, 16))
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(max(rows * block // 512, 4), 32)}


def compile_ahead(
    capability: int, keys: int = 1024, dtype: torch.dtype = torch.bfloat16, causal: bool = True, window: bool = False,
    cap: bool = False, padding: bool = False,
) -> dict[str, Usage]:  # fmt: skip
    """Compile the kernels for rows of ``keys`` scores and compute capability ``capability`` (90 for 9.0)."""
    types = dict.fromkeys(("x", "y", "dy", "dx"), f"*{TRITON_NAMES[dtype]}") | {"padding": "*i1"}
    lengths = dict.fromkeys(("x_stride", "dy_stride", "keys"), "i32")
    signature = types | lengths | dict.fromkeys(("rows", "each", "queries", "window", "k"), "i32")
    signature |= {"scale": "fp32", "cap": "fp32"}
    flags = {"CAUSAL": causal, "WINDOW": window, "CAP": cap, "PADDING": padding, "SAFE": padding}
    options = _options(keys)
    warps = options.pop("num_warps")
    aligned = {*types, *(lengths if keys % 16 == 0 else ())}
    return compile_kernels((masked, topk, backward), signature, flags | options, capability, warps, aligned)


def masked_bytes(scores: Tensor, *others: Any) -> Bytes:
    n = scores.numel() * scores.itemsize
    read = sum(t.numel() * t.itemsize for t in others if isinstance(t, Tensor))
    capped = len(others) > 4 and others[4] > 0
    return Bytes(forward=2 * n + read, backward=(4 if capped else 3) * n)


def topk_bytes(scores: Tensor, *constants: Any) -> Bytes:
    n = scores.numel() * scores.itemsize
    return Bytes(forward=2 * n, backward=3 * n)


def masked_kept(arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The output, and with a cap the scores."""
    return (outputs[0], arguments[0]) if len(arguments) > 5 and arguments[5] > 0 else outputs[:1]


def topk_kept(arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The output."""
    return outputs[:1]


SHAPES: dict[str, dict[str, Any]] = {
    "GPT-2 XL": {"keys": 1024},
    "Llama-3-8B": {"keys": 8192},
    "Mixtral-8x7B": {"keys": 4096, "window": True},
    "T5-11B": {"keys": 512, "causal": False, "padding": True},
}
KERNELS = (
    Kernel(
        masked_softmax,
        masked_reference,
        "b h q! k!, b k! -> b h q! k!",
        masked_kept,
        masked_bytes,
        compile_ahead,
        SHAPES,
    ),
    Kernel(
        topk_softmax,
        topk_reference,
        "... k! -> ... k!",
        topk_kept,
        topk_bytes,
        compile_ahead,
        SHAPES,
        on_cpu=False,
    ),
)
