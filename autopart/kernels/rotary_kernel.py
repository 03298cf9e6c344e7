"""The Triton kernel of `autopart.kernels.rotary`."""

from __future__ import annotations

from typing import Any

from autopart.kernels.launch import jit

tl: Any = None  # triton.language, which jit binds


@jit
def load_pairs(  # type: ignore[no-untyped-def]
    at, inside, half, LAYOUT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    if LAYOUT == "adjacent":
        column = tl.arange(0, 2 * WIDTH)[None, :]
        both = tl.load(at + column, mask=inside & (column < 2 * half), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, (ROWS, WIDTH, 2)))
    else:
        column = tl.arange(0, WIDTH)[None, :]
        a = tl.load(at + column, mask=inside & (column < half), other=0.0).to(tl.float32)
        b = tl.load(at + half + column, mask=inside & (column < half), other=0.0).to(tl.float32)
    return a, b


@jit
def store_pairs(at, a, b, inside, half, LAYOUT: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    if LAYOUT == "adjacent":
        column = tl.arange(0, 2 * WIDTH)[None, :]
        both = tl.interleave(a, b).to(at.dtype.element_ty)
        tl.store(at + column, both, mask=inside & (column < 2 * half))
    else:
        column = tl.arange(0, WIDTH)[None, :]
        tl.store(at + column, a.to(at.dtype.element_ty), mask=inside & (column < half))
        tl.store(at + half + column, b.to(at.dtype.element_ty), mask=inside & (column < half))


@jit
def rotary_kernel(  # type: ignore[no-untyped-def]
    x, cos, sin, y, x_a, x_b, x_row, y_a, y_b, y_row, table_a, table_b, table_row, count, rows, d, half,
    READS: tl.constexpr, WRITES: tl.constexpr, HALF_WIDTH: tl.constexpr, INVERSE: tl.constexpr,
    TABLE_ROWS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(rows, ROWS)
    first, b = (tl.program_id(0) % tiles).to(tl.int64) * ROWS, (tl.program_id(0) // tiles).to(tl.int64)
    a, b = b // count, b % count
    row = (first + tl.arange(0, ROWS))[:, None]
    inside = row < rows
    x += a * x_a + b * x_b + row * x_row
    y += a * y_a + b * y_b + row * y_row
    table = (first + tl.arange(0, TABLE_ROWS))[:, None]
    there = table < rows
    table = a * table_a + b * table_b + table * table_row
    if HALF_WIDTH:
        column = tl.arange(0, WIDTH)[None, :]
        cos_a = tl.load(cos + table + column, mask=there & (column < half), other=0.0).to(tl.float32)
        sin_a = tl.load(sin + table + column, mask=there & (column < half), other=0.0).to(tl.float32)
        cos_b, sin_b = cos_a, sin_a
    else:
        cos_a, cos_b = load_pairs(cos + table, there, half, READS, TABLE_ROWS, WIDTH)
        sin_a, sin_b = load_pairs(sin + table, there, half, READS, TABLE_ROWS, WIDTH)
    if INVERSE:
        sin_a, sin_b = -sin_b, -sin_a
    left, right = load_pairs(x, inside, half, READS, ROWS, WIDTH)
    store_pairs(y, left * cos_a - right * sin_a, right * cos_b + left * sin_b, inside, half, WRITES, WIDTH)
    if REST > 0:
        column = 2 * half + tl.arange(0, REST)[None, :]
        value = tl.load(x + column, mask=inside & (column < d), other=0.0)
        tl.store(y + column, value.to(y.dtype.element_ty), mask=inside & (column < d))
