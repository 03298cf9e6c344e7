"""The Triton functions of `autopart.kernels.attention`.

Scores are in units of log2(e), so that the chances are powers of two. Positions: sample b, head h, query i, key j.
Results, gradients and statistics are laid out as (samples, queries, heads, width), statistics as (samples, heads,
queries).
"""

import functools
from typing import Any, NamedTuple

tl: Any  # bound by helpers(), as the helpers are: Triton's interpreter looks for them among a kernel's globals
tile: Any
product: Any
dropped: Any
scored: Any
first_and_last: Any


class Kernels(NamedTuple):
    """The ``triton.jit`` functions. `query` is to run before `key` and `bias`, which read what it writes in delta."""

    forward: Any
    query: Any
    key: Any
    bias: Any


@functools.cache
def kernels() -> Kernels:
    """The ``triton.jit`` functions. The first call imports Triton, which reads TRITON_INTERPRET from the environment
    then."""
    _operands()
    _scores()
    return Kernels(_forward(), _query(), _key(), _bias())


def _operands() -> None:
    """Bind what loads, multiplies and drops tiles."""
    global tl, tile, product, dropped
    import triton
    import triton.language as tl

    @triton.jit
    def tile(x, at, stride, count, DIM: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """Rows `at` of x (count, DIM), zeros outside."""
        d = tl.arange(0, BLOCK)
        here = (at < count)[:, None] & (d < DIM)[None, :]
        return tl.load(x + at.to(tl.int64)[:, None] * stride + d[None, :], mask=here, other=0.0)

    @triton.jit
    def product(a, b, sums, PRECISION: tl.constexpr, FLOAT: tl.constexpr):  # type: ignore[no-untyped-def]
        """sums + a b; FLOAT where the interpreter multiplies, which cannot in bfloat16."""
        if FLOAT:
            return tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
        return tl.dot(a, b, sums, input_precision=PRECISION)

    @triton.jit
    def dropped(x, rows, columns, threshold):  # type: ignore[no-untyped-def]
        """x, with 0 where `autopart.kernels.dropout` drops."""
        u = rows.to(tl.uint32, bitcast=True) + columns.to(tl.uint32, bitcast=True)
        u ^= u >> 16
        u *= 0x7FEB352D
        u ^= u >> 15
        u *= 0x846CA68B
        u ^= u >> 16
        return tl.where((u ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold, x, 0.0)


def _scores() -> None:
    """Bind what makes scores of products, and what bounds the positions that see each other."""
    global scored, first_and_last
    import triton

    @triton.jit
    def scored(  # type: ignore[no-untyped-def]
        s, i, j, queries, keys, offset, window, scale, cap, bias, bias_i, bias_j, mask, mask_i, mask_j, padding, slope,
        CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
        PADDING: tl.constexpr, SLOPES: tl.constexpr,
    ):  # fmt: skip
        """(scores, their derivatives by the scaled products) of the products s at queries i and keys j."""
        here = (i < queries) & (j < keys)
        s *= scale
        derivative = s
        if CAP:
            t = 1.0 - 2.0 / (tl.exp2(s) + 1.0)
            derivative = 1.0 - t * t
            s = cap * t
        if SLOPES:
            s += slope * (j - i - offset).to(tl.float32)
        low = -3e38
        log2e = 1.4426950408889634
        if BIAS:
            x = tl.load(bias + i.to(tl.int64) * bias_i + j * bias_j, mask=here, other=0.0).to(tl.float32)
            s += tl.where(x == float("-inf"), x, tl.maximum(x * log2e, low))
        if MASK == 1:
            x = tl.load(mask + i.to(tl.int64) * mask_i + j * mask_j, mask=here, other=0.0).to(tl.float32)
            s += tl.where(x == float("-inf"), x, tl.maximum(x * log2e, low))
        seen = j < keys
        if MASK == 2:
            seen &= tl.load(mask + i.to(tl.int64) * mask_i + j * mask_j, mask=here, other=0) != 0
        if PADDING:
            seen &= tl.load(padding + j, mask=j < keys, other=0) != 0
        if CAUSAL:
            seen &= j <= i + offset
        if WINDOW:
            seen &= (i + offset - j < window) & (j - i - offset < window)
        return tl.where(seen, s, float("-inf")), derivative

    @triton.jit
    def first_and_last(  # type: ignore[no-untyped-def]
        start, end, ahead, behind, count, AHEAD: tl.constexpr, BEHIND: tl.constexpr, BLOCK: tl.constexpr
    ):
        """The range of positions below `count`, in whole blocks at its start, that those from `start` to below `end`
        see: from `behind` before `start` on if BEHIND, to `ahead` after the last one if AHEAD."""
        first = 0
        last = count
        if BEHIND:
            first = tl.maximum(start - behind, 0) // BLOCK * BLOCK
        if AHEAD:
            last = tl.minimum(end + ahead, count)
        return first, last


def _forward() -> Any:
    import triton

    @triton.jit
    def forward(  # type: ignore[no-untyped-def]
        q, k, v, out, lse, bias, mask, padding, slopes, rows, columns, q_b, q_h, q_i, k_b, k_h, k_j, v_b, v_h, v_j,
        bias_b, bias_h, bias_i, bias_j, mask_b, mask_h, mask_i, mask_j, heads, group, queries, keys, window, scale, cap,
        threshold, share, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr,
        MASK: tl.constexpr, PADDING: tl.constexpr, SLOPES: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr,
        E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
        STAGES: tl.constexpr, PRECISION: tl.constexpr, FLOAT: tl.constexpr,
    ):  # fmt: skip
        start = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
        h = tl.program_id(1).to(tl.int64)
        b = tl.program_id(2).to(tl.int64)
        i = start + tl.arange(0, QUERIES)
        x = tile(q + b * q_b + h * q_h, i, q_i, queries, D, BLOCK_D)
        k += b * k_b + h // group * k_h
        v += b * v_b + h // group * v_h
        bias += b * bias_b + h * bias_h
        mask += b * mask_b + h * mask_h
        slope = tl.load(slopes + h).to(tl.float32) * 1.4426950408889634 if SLOPES else 0.0
        at = (b * heads + h) * queries + i
        row = tl.load(rows + at, mask=i < queries, other=0)[:, None] if DROPOUT else 0
        most = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        sums = tl.zeros((QUERIES, BLOCK_E), tl.float32)
        offset = keys - queries
        ahead = 0 if CAUSAL else window - 1
        first, last = first_and_last(
            start + offset, start + QUERIES + offset, ahead, window - 1, keys, CAUSAL or WINDOW, WINDOW, KEYS
        )
        for n in tl.range(first, last, KEYS, num_stages=STAGES):
            j = n + tl.arange(0, KEYS)
            y = tile(k, j, k_j, keys, D, BLOCK_D)
            s = product(x, tl.trans(y), tl.zeros((QUERIES, KEYS), tl.float32), PRECISION, FLOAT)
            s, _ = scored(
                s, i[:, None], j[None, :], queries, keys, offset, window, scale, cap, bias, bias_i, bias_j,
                mask, mask_i, mask_j, padding + b * keys, slope, CAUSAL, WINDOW, CAP, BIAS, MASK, PADDING, SLOPES,
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
        low = (total == 0.0) | (most < -1e38)
        tl.store(lse + at, tl.where(low, float("inf"), most + tl.log2(whole)), mask=i < queries)
        e = tl.arange(0, BLOCK_E)
        to = out + ((b * queries + i) * heads + h)[:, None] * E + e[None, :]
        here = (i < queries)[:, None] & (e < E)[None, :]
        tl.store(to, (sums * (share / whole)[:, None]).to(out.dtype.element_ty), mask=here)

    return forward


def _query() -> Any:
    import triton

    @triton.jit
    def query(  # type: ignore[no-untyped-def]
        q, k, v, out, dout, lse, delta, dq, bias, mask, padding, slopes, rows, columns, q_b, q_h, q_i, k_b, k_h, k_j,
        v_b, v_h, v_j, dout_b, dout_h, dout_i, bias_b, bias_h, bias_i, bias_j, mask_b, mask_h, mask_i, mask_j, heads,
        group, queries, keys, window, scale, cap, threshold, share, factor, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
        CAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, PADDING: tl.constexpr, SLOPES: tl.constexpr,
        DROPOUT: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
        QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, FLOAT: tl.constexpr,
    ):  # fmt: skip
        start = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
        h = tl.program_id(1).to(tl.int64)
        b = tl.program_id(2).to(tl.int64)
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
        slope = tl.load(slopes + h).to(tl.float32) * 1.4426950408889634 if SLOPES else 0.0
        row = tl.load(rows + at, mask=i < queries, other=0)[:, None] if DROPOUT else 0
        sums = tl.zeros((QUERIES, BLOCK_D), tl.float32)
        offset = keys - queries
        ahead = 0 if CAUSAL else window - 1
        first, last = first_and_last(
            start + offset, start + QUERIES + offset, ahead, window - 1, keys, CAUSAL or WINDOW, WINDOW, KEYS
        )
        for n in tl.range(first, last, KEYS, num_stages=STAGES):
            j = n + tl.arange(0, KEYS)
            nothing = tl.zeros((QUERIES, KEYS), tl.float32)
            z = tile(k, j, k_j, keys, D, BLOCK_D)
            s, derivative = scored(
                product(x, tl.trans(z), nothing, PRECISION, FLOAT), i[:, None], j[None, :], queries, keys, offset,
                window, scale, cap, bias, bias_i, bias_j, mask, mask_i, mask_j, padding + b * keys, slope, CAUSAL,
                WINDOW, CAP, BIAS, MASK, PADDING, SLOPES,
            )  # fmt: skip
            y = tile(v, j, v_j, keys, E, BLOCK_E)
            dp = product(g, tl.trans(y), nothing, PRECISION, FLOAT) * share
            if DROPOUT:
                dp = dropped(dp, row, tl.load(columns + j, mask=j < keys, other=0)[None, :], threshold)
            ds = tl.exp2(s - norm[:, None]) * (dp - mean[:, None])
            ds = ds * derivative if CAP else ds
            sums = product(ds.to(k.dtype.element_ty), z, sums, PRECISION, FLOAT)
        d = tl.arange(0, BLOCK_D)
        to = dq + ((b * queries + i) * heads + h)[:, None] * D + d[None, :]
        here = (i < queries)[:, None] & (d < D)[None, :]
        tl.store(to, (sums * factor).to(dq.dtype.element_ty), mask=here)

    return query


def _key() -> Any:
    import triton

    @triton.jit
    def key(  # type: ignore[no-untyped-def]
        q, k, v, dout, lse, delta, dk, dv, bias, mask, padding, slopes, rows, columns, q_b, q_h, q_i, k_b, k_h, k_j,
        v_b, v_h, v_j, dout_b, dout_h, dout_i, bias_b, bias_h, bias_i, bias_j, mask_b, mask_h, mask_i, mask_j, heads,
        group, queries, keys, window, scale, cap, threshold, share, factor, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
        CAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, PADDING: tl.constexpr, SLOPES: tl.constexpr,
        DROPOUT: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
        QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, FLOAT: tl.constexpr,
    ):  # fmt: skip
        start = tl.program_id(0) * KEYS
        b = tl.program_id(2).to(tl.int64)
        j = start + tl.arange(0, KEYS)
        x = tile(k + b * k_b + tl.program_id(1).to(tl.int64) * k_h, j, k_j, keys, D, BLOCK_D)
        y = tile(v + b * v_b + tl.program_id(1).to(tl.int64) * v_h, j, v_j, keys, E, BLOCK_E)
        column = tl.load(columns + j, mask=j < keys, other=0)[:, None] if DROPOUT else 0
        k_sums = tl.zeros((KEYS, BLOCK_D), tl.float32)
        v_sums = tl.zeros((KEYS, BLOCK_E), tl.float32)
        offset = keys - queries
        behind = 0 if CAUSAL else window - 1
        first, last = first_and_last(
            start - offset, start + KEYS - offset, window - 1, behind, queries, WINDOW, CAUSAL or WINDOW, QUERIES
        )
        for member in range(group):
            h = tl.program_id(1).to(tl.int64) * group + member
            slope = tl.load(slopes + h).to(tl.float32) * 1.4426950408889634 if SLOPES else 0.0
            for n in tl.range(first, last, QUERIES, num_stages=STAGES):
                i = n + tl.arange(0, QUERIES)
                at = (b * heads + h) * queries + i
                nothing = tl.zeros((KEYS, QUERIES), tl.float32)
                z = tile(q + b * q_b + h * q_h, i, q_i, queries, D, BLOCK_D)
                s, derivative = scored(
                    product(x, tl.trans(z), nothing, PRECISION, FLOAT), i[None, :], j[:, None], queries, keys, offset,
                    window, scale, cap, bias + b * bias_b + h * bias_h, bias_i, bias_j, mask + b * mask_b + h * mask_h,
                    mask_i, mask_j, padding + b * keys, slope, CAUSAL, WINDOW, CAP, BIAS, MASK, PADDING, SLOPES,
                )  # fmt: skip
                p = tl.exp2(s - tl.load(lse + at, mask=i < queries, other=float("inf"))[None, :])
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
        base = (b * keys + j) * (heads // group) + tl.program_id(1)
        d = tl.arange(0, BLOCK_D)
        to = dk + base[:, None] * D + d[None, :]
        tl.store(to, (k_sums * factor).to(dk.dtype.element_ty), mask=(j < keys)[:, None] & (d < D)[None, :])
        e = tl.arange(0, BLOCK_E)
        to = dv + base[:, None] * E + e[None, :]
        tl.store(to, (v_sums * share).to(dv.dtype.element_ty), mask=(j < keys)[:, None] & (e < E)[None, :])

    return key


def _bias() -> Any:
    import triton

    @triton.jit
    def bias_gradient(  # type: ignore[no-untyped-def]
        q, k, v, dout, lse, delta, dbias, bias, mask, padding, slopes, rows, columns, q_b, q_h, q_i, k_b, k_h, k_j,
        v_b, v_h, v_j, dout_b, dout_h, dout_i, bias_b, bias_h, bias_i, bias_j, mask_b, mask_h, mask_i, mask_j, heads,
        group, queries, keys, window, scale, cap, threshold, share, over_b, over_h, CAUSAL: tl.constexpr,
        WINDOW: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, PADDING: tl.constexpr,
        SLOPES: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
        BLOCK_E: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
        PRECISION: tl.constexpr, FLOAT: tl.constexpr,
    ):  # fmt: skip
        i = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
        j = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
        place = tl.program_id(2)
        offset = keys - queries
        column = tl.load(columns + j, mask=j < keys, other=0)[None, :] if DROPOUT else 0
        sums = tl.zeros((QUERIES, KEYS), tl.float32)
        count = over_b * over_h
        if CAUSAL:
            count = tl.where(tl.program_id(1) * KEYS < (tl.program_id(0) + 1) * QUERIES + offset, count, 0)
        for n in tl.range(0, count, num_stages=STAGES):
            h = (place % (heads // over_h) + n % over_h).to(tl.int64)
            b = (place // (heads // over_h) + n // over_h).to(tl.int64)
            slope = tl.load(slopes + h).to(tl.float32) * 1.4426950408889634 if SLOPES else 0.0
            at = (b * heads + h) * queries + i
            nothing = tl.zeros((QUERIES, KEYS), tl.float32)
            x = tile(q + b * q_b + h * q_h, i, q_i, queries, D, BLOCK_D)
            y = tile(k + b * k_b + h // group * k_h, j, k_j, keys, D, BLOCK_D)
            s, _ = scored(
                product(x, tl.trans(y), nothing, PRECISION, FLOAT), i[:, None], j[None, :], queries, keys, offset,
                window, scale, cap, bias + b * bias_b + h * bias_h, bias_i, bias_j, mask + b * mask_b + h * mask_h,
                mask_i, mask_j, padding + b * keys, slope, CAUSAL, WINDOW, CAP, BIAS, MASK, PADDING, SLOPES,
            )  # fmt: skip
            p = tl.exp2(s - tl.load(lse + at, mask=i < queries, other=float("inf"))[:, None])
            g = tile(dout + b * dout_b + h * dout_h, i, dout_i, queries, E, BLOCK_E)
            z = tile(v + b * v_b + h // group * v_h, j, v_j, keys, E, BLOCK_E)
            dp = product(g, tl.trans(z), nothing, PRECISION, FLOAT) * share
            if DROPOUT:
                dp = dropped(dp, tl.load(rows + at, mask=i < queries, other=0)[:, None], column, threshold)
            sums += p * (dp - tl.load(delta + at, mask=i < queries, other=0.0)[:, None])
        to = dbias + (place.to(tl.int64) * queries + i[:, None]) * keys + j[None, :]
        tl.store(to, sums.to(dbias.dtype.element_ty), mask=(i < queries)[:, None] & (j < keys)[None, :])

    return bias_gradient
