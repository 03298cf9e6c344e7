"""Rows of an embedding table, whole or of one rank's part of the vocabulary.

For ids (n,) and this rank's rows weight (v, d) from row `first` of the table,

    y_i   = weight[ids_i - first]  if first <= ids_i < first + v  else  0
    dW_r  = sum of dy_i over the i with ids_i = first + r

so that the ranks' results sum to the rows of the whole table (Shoeybi et al., arXiv 1909.08053, section 3).

The backward sorts the ids. A Triton program adds the rows of dy of one id, at most ``PIECE`` of them, in the order of i
and in float32. Of an id with more rows, a second kernel adds the sums of the pieces. The result is the same in every
run, and no atomics are used.

For elements of `itemsize` bytes the least traffic in bytes is

    forward   2 itemsize n d + 8 n          read rows, write y, read int64 ids
    backward  itemsize (n d + v d) + 8 n    read dy, write dW, read ids

The sort of n ids, the zeros that are written to dW before its sums, and the sums of pieces are left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from autopart.kernels.ahead import Usage, compile_kernels
from autopart.kernels.kernel import Bytes, Kernel
from autopart.kernels.launch import TRITON_NAMES, as_rows, jit, launch, power_of_two, runs_on, triton_op

tl: Any = None  # triton.language, which jit binds

ELEMENTS = 1024
"""Elements of y in one Triton program of the forward: 8 for each thread of its 4 warps."""

PIECE = 128
"""The most rows of dy that one Triton program adds."""

SUMMED = 8
"""Rows that a Triton program of the backward adds at once."""

SUMMED_COLUMNS = 512
"""The most columns of one Triton program of the backward."""


def reference(ids: torch.Tensor, weight: torch.Tensor, padding_idx: int = -1, first: int | None = None) -> torch.Tensor:
    """Rows ids (...) of a table whose rows from ``first`` are weight (v, d): shape (..., d), zeros for other rows. With
    ``first`` None the table is whole. The row ``padding_idx``, -1 for none, gets no gradient."""
    if first is None:
        return F.embedding(ids, weight, padding_idx if padding_idx >= 0 else None)
    v = weight.shape[0]
    here = (ids >= first) & (ids < first + v)
    padding = padding_idx - first if first <= padding_idx < first + v else None
    return F.embedding(torch.where(here, ids - first, 0), weight, padding) * here[..., None]


def embedding(ids: torch.Tensor, weight: torch.Tensor, padding_idx: int = -1, first: int | None = None) -> torch.Tensor:
    """Rows ids (...) of a table whose rows from ``first`` are weight (v, d): shape (..., d). By the Triton kernels
    where they apply, else by ``reference``.

    With ``first`` None the table is whole, and the kernels give NaN for an id that has no row.
    """
    if _kernels_apply(ids, weight):
        found: torch.Tensor = torch.ops.autopart.embedding(ids, weight, padding_idx, first or 0, first is None)
        return found
    return reference(ids, weight, padding_idx, first)


def bytes_moved(ids: torch.Tensor, weight: torch.Tensor, *constants: object) -> Bytes:
    size, each = weight.itemsize * ids.numel() * weight.shape[1], ids.itemsize * ids.numel()
    return Bytes(forward=2 * size + each, backward=size + weight.itemsize * weight.numel() + each)


def compile_ahead(capability: int, d: int = 4096, dtype: torch.dtype = torch.bfloat16) -> dict[str, Usage]:
    """Compile the kernels for contiguous rows of ``d`` elements and compute capability ``capability`` (90 for 9.0)."""
    types = dict.fromkeys(("weight", "y", "dy", "dweight"), f"*{TRITON_NAMES[dtype]}")
    types |= dict.fromkeys(("ids", "rows", "order", "starts", "ends", "heads"), "*i64") | {"partial": "*fp32"}
    lengths = dict.fromkeys(("stride", "d"), "i32")
    aligned = {*types, *(lengths if d % 16 == 0 else ())}
    signature = types | lengths | dict.fromkeys(("n", "v", "first"), "i32") | {"missing": "fp32"}
    found = compile_kernels((forward,), signature, _block(d), capability, aligned=aligned)
    return found | compile_kernels((pieces, totals), signature, _tile(d), capability, aligned=aligned)


@jit
def forward(  # type: ignore[no-untyped-def]
    ids, weight, y, n, stride, v, d, first, missing, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.load(ids + place, mask=place < n, other=-1).to(tl.int64) - first
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = ((row >= 0) & (row < v))[:, None]
    h = tl.load(weight + row[:, None] * stride + cols[None, :], mask=(cols < d)[None, :] & here, other=0.0)
    h = tl.where(here, h, tl.cast(missing, h.dtype))
    tl.store(y + place[:, None] * d + cols[None, :], h, mask=(place < n)[:, None] & (cols < d)[None, :])


@jit
def pieces(  # type: ignore[no-untyped-def]
    rows, order, starts, ends, dy, dweight, partial, heads, stride, v, d,
    PIECE: tl.constexpr, SUMMED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + place).to(tl.int64)
    first = tl.load(starts + place)
    if (row < v) & ((place - first) % PIECE == 0):
        last = tl.load(ends + place)
        end = tl.minimum(place + PIECE, last)
        cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros((SUMMED, COLUMNS), tl.float32)
        for start in range(place, end, SUMMED):
            places = start + tl.arange(0, SUMMED)
            source = tl.load(order + places, mask=places < end, other=0)
            mask = (places < end)[:, None] & (cols < d)[None, :]
            total += tl.load(dy + source[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        h = tl.sum(total, 0)
        if last - first <= PIECE:
            tl.store(dweight + row * d + cols, h.to(dweight.dtype.element_ty), mask=cols < d)
        else:
            window = place // PIECE
            tl.store(partial + (2 * window + (place == first)) * d + cols, h, mask=cols < d)
            tl.store(heads + window, place, mask=place == first)


@jit
def totals(  # type: ignore[no-untyped-def]
    rows, ends, dweight, partial, heads, d, PIECE: tl.constexpr, SUMMED: tl.constexpr, COLUMNS: tl.constexpr
):
    window = tl.program_id(0).to(tl.int64)
    place = tl.load(heads + window)
    if place >= 0:
        row = tl.load(rows + place).to(tl.int64)
        end = tl.cdiv(tl.load(ends + place) - place, PIECE)
        cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros((SUMMED, COLUMNS), tl.float32)
        for start in range(0, end, SUMMED):
            piece = start + tl.arange(0, SUMMED)
            source = 2 * (window + piece) + (piece == 0)
            mask = (piece < end)[:, None] & (cols < d)[None, :]
            total += tl.load(partial + source[:, None] * d + cols[None, :], mask=mask, other=0.0)
        tl.store(dweight + row * d + cols, tl.sum(total, 0).to(dweight.dtype.element_ty), mask=cols < d)


@triton_op("autopart::embedding", mutates_args=())
def _forward(ids: torch.Tensor, weight: torch.Tensor, padding_idx: int, first: int, whole: bool) -> torch.Tensor:
    """y (..., d). ``whole``: rows that are not there are NaN, else 0."""
    w, i = as_rows(weight), ids.contiguous()
    v, d = w.shape
    y = torch.empty(*ids.shape, d, dtype=w.dtype, device=w.device)
    missing = float("nan") if whole else 0.0
    n, block = ids.numel(), _block(d)
    grid = -(-n // block["ROWS"]), -(-d // block["COLUMNS"])
    launch(forward, grid, i, w, y, n, w.stride(0), v, d, first, missing, **block, num_warps=4)
    return y


@triton_op("autopart::embedding_backward", mutates_args=())
def _backward(dy: torch.Tensor, ids: torch.Tensor, v: int, padding_idx: int, first: int) -> torch.Tensor:
    """The gradient of weight (v, d).

    The partial sum of a piece whose first place is p is in row 2 floor(p / PIECE), or in the next row where the piece
    is the first of its id. No two pieces share a row: the pieces of an id are PIECE places apart, and an id with
    several pieces takes more than PIECE places.
    """
    g, i = as_rows(dy), ids.reshape(-1)
    d = g.shape[1]
    here = (i >= first) & (i < first + v) & (i != padding_idx)
    rows, order = torch.sort(torch.where(here, i - first, v), stable=True)
    starts, ends = (torch.searchsorted(rows, rows, right=right) for right in (False, True))
    windows = -(-len(i) // PIECE)
    dweight = torch.zeros(v, d, dtype=dy.dtype, device=dy.device)
    partial = torch.empty(2 * windows, d, dtype=torch.float32, device=dy.device)
    heads = torch.full((windows,), -1, device=dy.device)
    tile = _tile(d)
    across = -(-d // tile["COLUMNS"])
    arguments = (rows, order, starts, ends, g, dweight, partial, heads, g.stride(0), v, d)
    launch(pieces, (len(i), across), *arguments, **tile, num_warps=4)
    launch(totals, (windows, across), rows, ends, dweight, partial, heads, d, **tile, num_warps=4)
    return dweight


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ids, weight, padding_idx, first, _ = inputs
    ctx.save_for_backward(ids)
    ctx.constants = len(weight), padding_idx, first


def _gradients(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    return None, torch.ops.autopart.embedding_backward(dy, ids, *ctx.constants), None, None, None


_forward.register_autograd(_gradients, setup_context=_save)


def _kernels_apply(ids: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        weight.dtype in TRITON_NAMES
        and ids.dtype in (torch.int64, torch.int32)
        and weight.dim() == 2
        and runs_on(ids, weight)
    )


def _block(d: int) -> dict[str, int]:
    """Rows and columns of a Triton program of the forward."""
    columns = min(power_of_two(d), ELEMENTS)
    return {"ROWS": ELEMENTS // columns, "COLUMNS": columns}


def _tile(d: int) -> dict[str, int]:
    """Constants of the kernels of the backward."""
    return {"PIECE": PIECE, "SUMMED": SUMMED, "COLUMNS": min(power_of_two(d), SUMMED_COLUMNS)}


KERNEL = Kernel(
    function=embedding,
    reference=reference,
    rule="..., v d -> ... d",
    kept=lambda arguments, outputs: arguments[:1],
    bytes_moved=bytes_moved,
    ahead=compile_ahead,
    shapes={"Llama-3-8B": {"d": 4096}, "GPT-2 XL": {"d": 1600}, "Mixtral-8x7B": {"d": 4096}, "T5-11B": {"d": 1024}},
)
"""Split by v, the function is given ``first``."""
