"""Triton functions that the kernels of `autopart.kernels.attention_triton` call."""

from __future__ import annotations

from typing import Any

from autopart.kernels.dropout import stays
from autopart.kernels.launch import jit

tl: Any = None  # triton.language, which jit binds


@jit
def tile(x, at, stride, count, DIM: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows `at` of x (count, DIM), zeros outside."""
    d = tl.arange(0, BLOCK)
    here = (at < count)[:, None] & (d < DIM)[None, :]
    return tl.load(x + at.to(tl.int64)[:, None] * stride + d[None, :], mask=here, other=0.0)


@jit
def product(a, b, sums, PRECISION: tl.constexpr, FLOAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """sums + a b; FLOAT where the interpreter multiplies, which cannot in bfloat16."""
    if FLOAT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@jit
def dropped(x, rows, columns, threshold):  # type: ignore[no-untyped-def]
    """x, with 0 where `autopart.kernels.dropout` drops."""
    return tl.where(stays(rows, columns, threshold), x, 0.0)


@jit
def scored(  # type: ignore[no-untyped-def]
    s, i, j, queries, keys, offset, window, scale, cap, bias, bias_i, bias_j, mask, mask_i, mask_j, padding, relative,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    PADDING: tl.constexpr, RELATIVE: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """(scores, their derivatives by the scaled products) of the products s at queries i and keys j.
    Unless EDGE, all of the queries see all of the keys but for masks."""
    here = (i < queries) & (j < keys)
    s *= tl.cast(scale, tl.float32)
    derivative = s
    if CAP:
        t = 1.0 - 2.0 / (tl.exp2(s) + 1.0)
        derivative = 1.0 - t * t
        s = tl.cast(cap, tl.float32) * t
    low = -3e38
    log2e = 1.4426950408889634
    if BIAS:
        x = tl.load(bias + i.to(tl.int64) * bias_i + j * bias_j, mask=here, other=0.0).to(tl.float32)
        s += tl.where(x == float("-inf"), x, tl.maximum(x * log2e, low))
    if RELATIVE:
        x = tl.load(relative + (j - i + queries - 1), mask=here, other=0.0).to(tl.float32)
        s += tl.where(x == float("-inf"), x, tl.maximum(x * log2e, low))
    if MASK == 1:
        x = tl.load(mask + i.to(tl.int64) * mask_i + j * mask_j, mask=here, other=0.0).to(tl.float32)
        s += tl.where(x == float("-inf"), x, tl.maximum(x * log2e, low))
    seen = j < keys
    if MASK == 2:
        seen &= tl.load(mask + i.to(tl.int64) * mask_i + j * mask_j, mask=here, other=0) != 0
    if PADDING:
        seen &= tl.load(padding + j, mask=j < keys, other=0) != 0
    if EDGE and CAUSAL:
        seen &= j <= i + offset
    if EDGE and WINDOW:
        seen &= (i + offset - j < window) & (j - i - offset < window)
    if EDGE or MASK == 2 or PADDING:
        s = tl.where(seen, s, float("-inf"))
    return s, derivative


@jit
def chances(s, norm, j, keys, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The softmax of scores s at keys j. `norm` is log2 of the sum of each query; where EVEN, a query whose `norm` is
    -inf weighs all keys alike."""
    p = tl.exp2(s - norm)
    if EVEN:
        p = tl.where(norm == float("-inf"), tl.where(j < keys, 1.0 / keys, 0.0), p)
    return p


@jit
def with_all_values(  # type: ignore[no-untyped-def]
    sums, blind, row, columns, v, v_j, keys, threshold, DROPOUT: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """sums, to which the values of all keys are added where a query is `blind`."""
    every = tl.where(tl.max(blind.to(tl.int32), 0) > 0, keys, 0)
    for n in tl.range(0, every, KEYS, num_stages=STAGES):
        j = n + tl.arange(0, KEYS)
        p = tl.where(blind[:, None] & (j < keys)[None, :], 1.0, 0.0)
        if DROPOUT:
            p = dropped(p, row, tl.load(columns + j, mask=j < keys, other=0)[None, :], threshold)
        sums = product(p.to(v.dtype.element_ty), tile(v, j, v_j, keys, E, BLOCK_E), sums, PRECISION, FLOAT)
    return sums


@jit
def key_range(  # type: ignore[no-untyped-def]
    start, offset, window, keys, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """first, middle, last: queries from `start` on may see the blocks of keys from `first` to below `last`. All of
    the queries see all of the keys below `middle`."""
    first = 0
    last = keys
    middle = keys // KEYS * KEYS
    if CAUSAL:
        last = tl.minimum(start + offset + QUERIES, keys)
        middle = tl.minimum(tl.maximum(start + offset + 1, 0) // KEYS * KEYS, middle)
    if WINDOW:
        first = tl.maximum(start + offset - window + 1, 0) // KEYS * KEYS
        last = tl.minimum(start + offset + QUERIES - 1 + window, last)
        middle = first
    return first, middle, last


@jit
def query_range(  # type: ignore[no-untyped-def]
    start, offset, window, queries, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """first, middle, last: the blocks of queries from `first` to below `last` may see keys from `start` on. Those
    from `middle` on see all of the keys."""
    first = 0
    last = queries
    middle = 0
    if CAUSAL:
        first = tl.maximum(start - offset, 0) // QUERIES * QUERIES
        middle = tl.maximum(start - offset + KEYS - 1 + QUERIES - 1, 0) // QUERIES * QUERIES
    if WINDOW:
        first = tl.maximum(start - offset - window + 1, first) // QUERIES * QUERIES
        last = tl.minimum(start - offset + KEYS - 1 + window, queries)
    if CAUSAL or WINDOW:
        middle = last if WINDOW else tl.minimum(middle, last)
    return first, middle, last
