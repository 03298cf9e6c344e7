"""The Triton functions of `autopart.kernels.attention`.

Scores are in units of log2(e), so that the chances are powers of two. Positions: sample b, head h, query i, key j.
Results, gradients and statistics are laid out as (samples, queries, heads, width), statistics as (samples, heads,
queries).
"""

from __future__ import annotations

from typing import Any

from autopart.kernels.attention_scores import (
    chances,
    dropped,
    key_range,
    product,
    query_range,
    scored,
    tile,
    with_all_values,
)
from autopart.kernels.launch import jit

tl: Any = None  # triton.language, which jit binds


@jit
def forward(  # type: ignore[no-untyped-def]
    q, k, v, out, lse, bias, mask, padding, relative, sinks, rows, columns, q_b, q_h, q_i, k_b, k_h, k_j, v_b, v_h, v_j,
    bias_b, bias_h, bias_i, bias_j, mask_b, mask_h, mask_i, mask_j, heads, group, queries, keys, window, scale, cap,
    threshold, share, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr,
    MASK: tl.constexpr, PADDING: tl.constexpr, RELATIVE: tl.constexpr, SINKS: tl.constexpr, EVEN: tl.constexpr,
    DROPOUT: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    FLOAT: tl.constexpr,
):  # fmt: skip
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    h, b, share = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.cast(share, tl.float32)
    i = start + tl.arange(0, QUERIES)
    x = tile(q + b * q_b + h * q_h, i, q_i, queries, D, BLOCK_D)
    k += b * k_b + h // group * k_h
    v += b * v_b + h // group * v_h
    bias += b * bias_b + h * bias_h
    mask += b * mask_b + h * mask_h
    at = (b * heads + h) * queries + i
    row = tl.load(rows + at, mask=i < queries, other=0)[:, None] if DROPOUT else 0
    most = tl.full((QUERIES,), 0.0 if SINKS else float("-inf"), tl.float32)
    total = tl.full((QUERIES,), 1.0 if SINKS else 0.0, tl.float32)
    if SINKS:
        most += tl.maximum(tl.load(sinks + h).to(tl.float32) * 1.4426950408889634, -3e38)
    sums = tl.zeros((QUERIES, BLOCK_E), tl.float32)
    offset = keys - queries
    first, middle, last = key_range(start, offset, window, keys, CAUSAL, WINDOW, QUERIES, KEYS)
    for edge in tl.static_range(1 - SPLIT, 2):
        for n in tl.range(middle if edge and SPLIT else first, last if edge else middle, KEYS, num_stages=STAGES):
            j = n + tl.arange(0, KEYS)
            y = tile(k, j, k_j, keys, D, BLOCK_D)
            s = product(x, tl.trans(y), tl.zeros((QUERIES, KEYS), tl.float32), PRECISION, FLOAT)
            s, _ = scored(
                s, i[:, None], j[None, :], queries, keys, offset, window, scale, cap, bias, bias_i, bias_j,
                mask, mask_i, mask_j, padding + b * keys, relative + h * (queries + keys - 1), CAUSAL, WINDOW, CAP,
                BIAS, MASK, PADDING, RELATIVE, edge,
            )  # fmt: skip
            now = tl.maximum(most, tl.max(s, 1))
            shift = tl.where(now == float("-inf"), 0.0, now)
            fading = tl.exp2(most - shift)
            p = tl.exp2(s - shift[:, None])
            total = total * fading + tl.sum(p, 1)
            most = now
            if DROPOUT:
                p = dropped(p, row, tl.load(columns + j, mask=j < keys, other=0)[None, :], threshold)
            y = tile(v, j, v_j, keys, E, BLOCK_E)
            sums = product(p.to(v.dtype.element_ty), y, sums * fading[:, None], PRECISION, FLOAT)
    whole = tl.where(total == 0.0, 1.0, total)
    statistic = tl.where((total == 0.0) | (most < -1e38), float("inf"), most + tl.log2(whole))
    if EVEN:
        blind = (total == 0.0) & (i < queries)
        sums = with_all_values(
            sums, blind, row, columns, v, v_j, keys, threshold, DROPOUT, E, BLOCK_E, KEYS, STAGES, PRECISION, FLOAT
        )
        whole = tl.where(blind, tl.cast(keys, tl.float32), whole)
        statistic = tl.where(blind, float("-inf"), statistic)
    tl.store(lse + at, statistic, mask=i < queries)
    e = tl.arange(0, BLOCK_E)[None, :]
    to = out + ((b * queries + i) * heads + h)[:, None] * E + e
    tl.store(to, (sums * (share / whole)[:, None]).to(out.dtype.element_ty), mask=(i < queries)[:, None] & (e < E))


@jit
def query(  # type: ignore[no-untyped-def]
    q, k, v, out, dout, lse, delta, dq, bias, mask, padding, relative, rows, columns, q_b, q_h, q_i, k_b, k_h, k_j,
    v_b, v_h, v_j, dout_b, dout_h, dout_i, bias_b, bias_h, bias_i, bias_j, mask_b, mask_h, mask_i, mask_j, heads,
    group, queries, keys, window, scale, cap, threshold, share, factor, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    CAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, PADDING: tl.constexpr, RELATIVE: tl.constexpr,
    EVEN: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    h, b, share = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.cast(share, tl.float32)
    i = start + tl.arange(0, QUERIES)
    x = tile(q + b * q_b + h * q_h, i, q_i, queries, D, BLOCK_D)
    g = tile(dout + b * dout_b + h * dout_h, i, dout_i, queries, E, BLOCK_E)
    o = tile(out + (b * queries * heads + h) * E, i, heads * E, queries, E, BLOCK_E)
    at = (b * heads + h) * queries + i
    mean = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    tl.store(delta + at, mean, mask=i < queries)
    norm = tl.load(lse + at, mask=i < queries, other=float("inf"))
    k += b * k_b + h // group * k_h
    v += b * v_b + h // group * v_h
    bias += b * bias_b + h * bias_h
    mask += b * mask_b + h * mask_h
    row = tl.load(rows + at, mask=i < queries, other=0)[:, None] if DROPOUT else 0
    sums = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    offset = keys - queries
    first, middle, last = key_range(start, offset, window, keys, CAUSAL, WINDOW, QUERIES, KEYS)
    if EVEN:
        blind = tl.max((norm == float("-inf")).to(tl.int32), 0) > 0
        first = tl.where(blind, 0, first)
        middle = tl.where(blind, 0, middle)
        last = tl.where(blind, keys, last)
    for edge in tl.static_range(1 - SPLIT, 2):
        for n in tl.range(middle if edge and SPLIT else first, last if edge else middle, KEYS, num_stages=STAGES):
            j = n + tl.arange(0, KEYS)
            nothing = tl.zeros((QUERIES, KEYS), tl.float32)
            z = tile(k, j, k_j, keys, D, BLOCK_D)
            s, derivative = scored(
                product(x, tl.trans(z), nothing, PRECISION, FLOAT), i[:, None], j[None, :], queries, keys, offset,
                window, scale, cap, bias, bias_i, bias_j, mask, mask_i, mask_j, padding + b * keys,
                relative + h * (queries + keys - 1), CAUSAL, WINDOW, CAP, BIAS, MASK, PADDING, RELATIVE, edge,
            )  # fmt: skip
            y = tile(v, j, v_j, keys, E, BLOCK_E)
            dp = product(g, tl.trans(y), nothing, PRECISION, FLOAT) * share
            if DROPOUT:
                dp = dropped(dp, row, tl.load(columns + j, mask=j < keys, other=0)[None, :], threshold)
            p = chances(s, norm[:, None], j[None, :], keys, EVEN)
            ds = p * (dp - mean[:, None])
            ds = ds * derivative if CAP else ds
            sums = product(ds.to(k.dtype.element_ty), z, sums, PRECISION, FLOAT)
    d = tl.arange(0, BLOCK_D)
    to = dq + ((b * queries + i) * heads + h)[:, None] * D + d[None, :]
    here = (i < queries)[:, None] & (d < D)[None, :]
    tl.store(to, (sums * tl.cast(factor, tl.float32)).to(dq.dtype.element_ty), mask=here)


@jit
def key(  # type: ignore[no-untyped-def]
    q, k, v, dout, lse, delta, dk, dv, bias, mask, padding, relative, unseen, rows, columns, q_b, q_h, q_i, k_b, k_h,
    k_j, v_b, v_h, v_j, dout_b, dout_h, dout_i, bias_b, bias_h, bias_i, bias_j, mask_b, mask_h, mask_i, mask_j, heads,
    group, queries, keys, window, scale, cap, threshold, share, factor, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    CAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, PADDING: tl.constexpr, RELATIVE: tl.constexpr,
    EVEN: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * KEYS
    b, share, factor = tl.program_id(2).to(tl.int64), tl.cast(share, tl.float32), tl.cast(factor, tl.float32)
    j = start + tl.arange(0, KEYS)
    x = tile(k + b * k_b + tl.program_id(1).to(tl.int64) * k_h, j, k_j, keys, D, BLOCK_D)
    y = tile(v + b * v_b + tl.program_id(1).to(tl.int64) * v_h, j, v_j, keys, E, BLOCK_E)
    column = tl.load(columns + j, mask=j < keys, other=0)[:, None] if DROPOUT else 0
    k_sums = tl.zeros((KEYS, BLOCK_D), tl.float32)
    v_sums = tl.zeros((KEYS, BLOCK_E), tl.float32)
    offset = keys - queries
    first, middle, last = query_range(start, offset, window, queries, CAUSAL, WINDOW, QUERIES, KEYS)
    if EVEN:
        blind = tl.load(unseen + b) != 0
        first = tl.where(blind, 0, first)
        middle = tl.where(blind, queries, middle)
        last = tl.where(blind, queries, last)
    for member in range(group):
        h = tl.program_id(1).to(tl.int64) * group + member
        for inner in tl.static_range(1 + SPLIT):
            for n in tl.range(
                middle if inner else first, middle if SPLIT and not inner else last, QUERIES, num_stages=STAGES
            ):
                i = n + tl.arange(0, QUERIES)
                at = (b * heads + h) * queries + i
                nothing = tl.zeros((KEYS, QUERIES), tl.float32)
                z = tile(q + b * q_b + h * q_h, i, q_i, queries, D, BLOCK_D)
                s, derivative = scored(
                    product(x, tl.trans(z), nothing, PRECISION, FLOAT), i[None, :], j[:, None], queries, keys,
                    offset, window, scale, cap, bias + b * bias_b + h * bias_h, bias_i, bias_j,
                    mask + b * mask_b + h * mask_h, mask_i, mask_j, padding + b * keys,
                    relative + h * (queries + keys - 1), CAUSAL, WINDOW, CAP, BIAS, MASK, PADDING, RELATIVE,
                    inner == 0,
                )  # fmt: skip
                norm = tl.load(lse + at, mask=i < queries, other=float("inf"))[None, :]
                p = chances(s, norm, j[:, None], keys, EVEN)
                g = tile(dout + b * dout_b + h * dout_h, i, dout_i, queries, E, BLOCK_E)
                dp = product(y, tl.trans(g), nothing, PRECISION, FLOAT) * share
                kept = p
                if DROPOUT:
                    row = tl.load(rows + at, mask=i < queries, other=0)[None, :]
                    dp = dropped(dp, row, column, threshold)
                    kept = dropped(p, row, column, threshold)
                v_sums = product(kept.to(dout.dtype.element_ty), g, v_sums, PRECISION, FLOAT)
                ds = p * (dp - tl.load(delta + at, mask=i < queries, other=0.0)[None, :])
                ds = ds * derivative if CAP else ds
                k_sums = product(ds.to(q.dtype.element_ty), z, k_sums, PRECISION, FLOAT)
    base = ((b * keys + j) * (heads // group) + tl.program_id(1))[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(dk + base * D + d, (k_sums * factor).to(dk.dtype.element_ty), mask=(j < keys)[:, None] & (d < D))
    e = tl.arange(0, BLOCK_E)[None, :]
    tl.store(dv + base * E + e, (v_sums * share).to(dv.dtype.element_ty), mask=(j < keys)[:, None] & (e < E))
