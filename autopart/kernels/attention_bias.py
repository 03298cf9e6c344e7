"""The Triton functions of `autopart.kernels.attention` for the gradients of biases, and the sum along diagonals.

Positions are those of `autopart.kernels.attention_triton`. A bias by relative place has a value for every j - i: its
gradient is the sum of the scores' gradients along diagonals. Tiles whose diagonals are the same are added up first.
"""

from __future__ import annotations

from typing import Any

import torch

from autopart.kernels.attention_scores import chances, dropped, product, scored, tile
from autopart.kernels.launch import jit

tl: Any = None  # triton.language, which jit binds


@jit
def score_gradient(  # type: ignore[no-untyped-def]
    q, k, v, dout, lse, delta, bias, mask, padding, relative, rows, columns, q_b, q_h, q_i, k_b, k_h, k_j, v_b, v_h,
    v_j, dout_b, dout_h, dout_i, bias_b, bias_h, bias_i, bias_j, mask_b, mask_h, mask_i, mask_j, heads, group, queries,
    keys, window, scale, cap, threshold, share, b, h, i, j, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    CAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, PADDING: tl.constexpr, RELATIVE: tl.constexpr,
    EVEN: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """The gradient of what is added to the scores of queries i and keys j, of sample b and head h."""
    at = (b * heads + h) * queries + i
    nothing = tl.zeros((QUERIES, KEYS), tl.float32)
    x = tile(q + b * q_b + h * q_h, i, q_i, queries, D, BLOCK_D)
    y = tile(k + b * k_b + h // group * k_h, j, k_j, keys, D, BLOCK_D)
    s, _ = scored(
        product(x, tl.trans(y), nothing, PRECISION, FLOAT), i[:, None], j[None, :], queries, keys, keys - queries,
        window, scale, cap, bias + b * bias_b + h * bias_h, bias_i, bias_j, mask + b * mask_b + h * mask_h,
        mask_i, mask_j, padding + b * keys, relative + h * (queries + keys - 1), CAUSAL, WINDOW, CAP, BIAS, MASK,
        PADDING, RELATIVE, True,
    )  # fmt: skip
    norm = tl.load(lse + at, mask=i < queries, other=float("inf"))
    if EVEN:
        norm = tl.where(norm == float("-inf"), float("inf"), norm)
    p = chances(s, norm[:, None], j[None, :], keys, False)
    g = tile(dout + b * dout_b + h * dout_h, i, dout_i, queries, E, BLOCK_E)
    z = tile(v + b * v_b + h // group * v_h, j, v_j, keys, E, BLOCK_E)
    dp = product(g, tl.trans(z), nothing, PRECISION, FLOAT) * tl.cast(share, tl.float32)
    if DROPOUT:
        row = tl.load(rows + at, mask=i < queries, other=0)[:, None]
        dp = dropped(dp, row, tl.load(columns + j, mask=j < keys, other=0)[None, :], threshold)
    return p * (dp - tl.load(delta + at, mask=i < queries, other=0.0)[:, None])


@jit
def bias_gradient(  # type: ignore[no-untyped-def]
    q, k, v, dout, lse, delta, dbias, bias, mask, padding, relative, rows, columns, q_b, q_h, q_i, k_b, k_h, k_j,
    v_b, v_h, v_j, dout_b, dout_h, dout_i, bias_b, bias_h, bias_i, bias_j, mask_b, mask_h, mask_i, mask_j, heads,
    group, queries, keys, window, scale, cap, threshold, share, over_b, over_h, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, PADDING: tl.constexpr,
    RELATIVE: tl.constexpr, EVEN: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    j = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    place = tl.program_id(2)
    sums = tl.zeros((QUERIES, KEYS), tl.float32)
    count = over_b * over_h
    if CAUSAL:
        count = tl.where(tl.program_id(1) * KEYS < (tl.program_id(0) + 1) * QUERIES + keys - queries, count, 0)
    for n in tl.range(0, count, num_stages=STAGES):
        h = (place % (heads // over_h) + n % over_h).to(tl.int64)
        b = (place // (heads // over_h) + n // over_h).to(tl.int64)
        sums += score_gradient(
            q, k, v, dout, lse, delta, bias, mask, padding, relative, rows, columns, q_b, q_h, q_i, k_b, k_h, k_j,
            v_b, v_h, v_j, dout_b, dout_h, dout_i, bias_b, bias_h, bias_i, bias_j, mask_b, mask_h, mask_i, mask_j,
            heads, group, queries, keys, window, scale, cap, threshold, share, b, h, i, j, CAUSAL, WINDOW, CAP, BIAS,
            MASK, PADDING, RELATIVE, EVEN, DROPOUT, D, E, BLOCK_D, BLOCK_E, QUERIES, KEYS, PRECISION, FLOAT,
        )  # fmt: skip
    to = dbias + (place.to(tl.int64) * queries + i[:, None]) * keys + j[None, :]
    tl.store(to, sums.to(dbias.dtype.element_ty), mask=(i < queries)[:, None] & (j < keys)[None, :])


@jit
def relative_gradient(  # type: ignore[no-untyped-def]
    q, k, v, dout, lse, delta, sums_of_tiles, bias, mask, padding, relative, rows, columns, q_b, q_h, q_i, k_b, k_h,
    k_j, v_b, v_h, v_j, dout_b, dout_h, dout_i, bias_b, bias_h, bias_i, bias_j, mask_b, mask_h, mask_i, mask_j, heads,
    group, queries, keys, window, scale, cap, threshold, share, samples, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, PADDING: tl.constexpr,
    RELATIVE: tl.constexpr, EVEN: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """The sums over samples of the square tiles whose keys are `away` tiles from their queries, of a head."""
    away = tl.program_id(0) - (queries + QUERIES - 1) // QUERIES + 1
    h = tl.program_id(1).to(tl.int64)
    first = tl.maximum(-away, 0)
    tiles = tl.minimum((queries + QUERIES - 1) // QUERIES, (keys + KEYS - 1) // KEYS - away) - first
    count = samples * tiles
    least = away * KEYS - QUERIES + 1 - keys + queries
    if CAUSAL:
        count = tl.where(least <= 0, count, 0)
    if WINDOW:
        count = tl.where((least < window) & (least + KEYS + QUERIES - 2 > -window), count, 0)
    sums = tl.zeros((QUERIES, KEYS), tl.float32)
    for n in tl.range(0, count, num_stages=STAGES):
        b = (n // tiles).to(tl.int64)
        i = (first + n % tiles) * QUERIES + tl.arange(0, QUERIES)
        j = (first + n % tiles + away) * KEYS + tl.arange(0, KEYS)
        sums += score_gradient(
            q, k, v, dout, lse, delta, bias, mask, padding, relative, rows, columns, q_b, q_h, q_i, k_b, k_h, k_j,
            v_b, v_h, v_j, dout_b, dout_h, dout_i, bias_b, bias_h, bias_i, bias_j, mask_b, mask_h, mask_i, mask_j,
            heads, group, queries, keys, window, scale, cap, threshold, share, b, h, i, j, CAUSAL, WINDOW, CAP, BIAS,
            MASK, PADDING, RELATIVE, EVEN, DROPOUT, D, E, BLOCK_D, BLOCK_E, QUERIES, KEYS, PRECISION, FLOAT,
        )  # fmt: skip
    to = sums_of_tiles + (h * tl.num_programs(0) + tl.program_id(0)) * QUERIES * KEYS
    tl.store(to + tl.arange(0, QUERIES)[:, None] * KEYS + tl.arange(0, KEYS)[None, :], sums)


def along_diagonals(sums: torch.Tensor, queries: int, keys: int) -> torch.Tensor:
    """Sums of tiles (heads, N, t, t) of scores as sums along diagonals, (heads, queries + keys - 1). The keys of tile n
    are n + 1 - ceil(queries / t) tiles from its queries."""
    heads, count, t, _ = sums.shape
    rows = torch.nn.functional.pad(sums.flip(2), (0, t)).flatten(2)[..., :-t]
    diagonals = torch.nn.functional.pad(rows.view(heads, count, t, 2 * t - 1).sum(2), (0, 1))
    whole = sums.new_zeros(heads, count + 1, t)
    whole[:, :-1] += diagonals[..., :t]
    whole[:, 1:] += diagonals[..., t:]
    first = -queries % t
    return whole.flatten(1)[:, first : first + queries + keys - 1]
