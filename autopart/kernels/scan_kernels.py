"""The Triton kernels of `autopart.kernels.scan`.

For one head and chunk, with u = t x, s the sums of log decays, M_lm = exp(s_l - s_m) for m <= l, the state S before the
chunk, the gradient R of the state behind it, and dots over p or n written as products of matrices

    states   S' = exp(s_q) S + (exp(s_q - s) u)^T b       from the first chunk on
             R' = exp(s_q) R + (exp(s) dy)^T c            from the last chunk back
    output   y  = (M c b^T) u + exp(s) c S^T + skip x
    inputs   du = (M c b^T)^T dy + exp(s_q - s) b R^T
    sides    dc = (M dy u^T) b + exp(s) dy S,   db = (M dy u^T)^T c + exp(s_q - s) u R

A program of ``states`` takes a head; those of the others a head and a chunk.
"""

from __future__ import annotations

from typing import Any

from autopart.kernels.launch import jit, power_of_two

tl: Any = None  # triton.language, which jit binds

CHUNK, EXACT_CHUNK = 64, 16
"""Positions that a Triton program takes at a time, and where products of float32 are exact, which takes registers."""


def tile(p: int, n: int, length: int, exact: bool) -> dict[str, int]:
    """Positions of a chunk, and sizes of a state: a matrix product has 16 at least. ``exact``: products of float32."""
    return {
        "Q": min(max(power_of_two(length), 16), EXACT_CHUNK if exact else CHUNK),
        "P": max(power_of_two(p), 16),
        "N": max(power_of_two(n), 16),
    }


def warps(p: int, n: int, exact: bool) -> int:
    """Warps of a program: a thread holds at most 64 elements of a state of 64 rows, fewer where addresses are not known
    to be aligned."""
    return 8 if exact or n > 64 or p % 16 or n % 16 else 4


@jit
def place_of(which, chunk, length, heads, groups, Q: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first row of a chunk of a head, as an index to (batch, length, heads) and to (batch, length, groups)."""
    head = which % heads
    first = (which // heads).to(tl.int64) * length + chunk * Q
    return head, first * heads + head, first * groups + head // (heads // groups)


@jit
def decays(log, here, heads, Q: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sums of a chunk's log decays, and their total."""
    a = tl.load(log + tl.arange(0, Q) * heads, mask=here, other=0.0)
    return tl.cumsum(a, 0), tl.sum(a, 0)


@jit
def steps(scales, here, heads, Q: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scales of a chunk as a column, float32."""
    return tl.load(scales + tl.arange(0, Q) * heads, mask=here, other=0.0).to(tl.float32)[:, None]


@jit
def product(a, b, total, WIDE: tl.constexpr, PRECISION: tl.constexpr, kind: tl.constexpr):  # type: ignore[no-untyped-def]
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a.to(kind), b.to(kind), total, input_precision=PRECISION)


@jit
def states(  # type: ignore[no-untyped-def]
    x, scales, log, keys, out, length, heads, groups, p, n, SCALES: tl.constexpr, REVERSE: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state before every chunk, (batch x heads, chunks, P, N); the gradient of that behind it with REVERSE."""
    place, of_p, of_n = tl.arange(0, Q), tl.arange(0, P), tl.arange(0, N)
    chunks = tl.cdiv(length, Q)
    state = tl.zeros((P, N), tl.float32)
    for done in tl.range(0, chunks, num_stages=1):
        chunk = chunks - 1 - done if REVERSE else done
        at = (tl.program_id(0).to(tl.int64) * chunks + chunk) * P * N
        tl.store(out + at + of_p[:, None] * N + of_n[None, :], state)
        here = chunk * Q + place < length
        _, of_head, of_group = place_of(tl.program_id(0), chunk, length, heads, groups, Q)
        s, total = decays(log + of_head, here, heads, Q)
        at = (place * heads)[:, None] * p + of_p[None, :]
        u = tl.load(x + of_head * p + at, mask=here[:, None] & (of_p < p)[None, :], other=0.0).to(tl.float32)
        if SCALES:
            u *= steps(scales + of_head, here, heads, Q)
        u *= tl.exp(s if REVERSE else total - s)[:, None]
        at = (place * groups)[:, None] * n + of_n[None, :]
        b = tl.load(keys + of_group * n + at, mask=here[:, None] & (of_n < n)[None, :], other=0.0)
        state = product(tl.trans(u), b, state * tl.exp(total), WIDE, PRECISION, keys.dtype.element_ty)


@jit
def output(  # type: ignore[no-untyped-def]
    x, scales, log, keys, queries, skip, states, y, length, heads, groups, p, n, SCALES: tl.constexpr,
    SKIP: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    place, of_p, of_n = tl.arange(0, Q), tl.arange(0, P), tl.arange(0, N)
    chunks = tl.cdiv(length, Q)
    chunk = tl.program_id(0) % chunks
    head, of_head, of_group = place_of(tl.program_id(0) // chunks, chunk, length, heads, groups, Q)
    here = chunk * Q + place < length
    s, _ = decays(log + of_head, here, heads, Q)
    kind: tl.constexpr = keys.dtype.element_ty
    at = of_group * n + (place * groups)[:, None] * n + of_n[None, :]
    there = here[:, None] & (of_n < n)[None, :]
    c = tl.load(queries + at, mask=there, other=0.0)
    at_state = tl.program_id(0).to(tl.int64) * P * N + of_p[None, :] * N + of_n[:, None]
    out = tl.zeros((Q, P), tl.float32)
    out = product(c, tl.load(states + at_state), out, WIDE, PRECISION, kind) * tl.exp(s)[:, None]
    b = tl.load(keys + at, mask=there, other=0.0)
    g = product(c, tl.trans(b), tl.zeros((Q, Q), tl.float32), WIDE, PRECISION, kind)
    apart = tl.where(place[:, None] >= place[None, :], s[:, None] - s[None, :], -float("inf"))
    g *= tl.exp(apart)
    if SCALES:
        g *= tl.trans(steps(scales + of_head, here, heads, Q))
    at = of_head * p + (place * heads)[:, None] * p + of_p[None, :]
    there = here[:, None] & (of_p < p)[None, :]
    value = tl.load(x + at, mask=there, other=0.0)
    out = product(g, value, out, WIDE, PRECISION, kind)
    if SKIP:
        out += tl.load(skip + head).to(tl.float32) * value.to(tl.float32)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=there)


@jit
def inputs(  # type: ignore[no-untyped-def]
    dy, x, scales, log, keys, queries, skip, dstates, dx, dscales, dskip, length, heads, groups, p, n,
    SCALES: tl.constexpr, SKIP: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    place, of_p, of_n = tl.arange(0, Q), tl.arange(0, P), tl.arange(0, N)
    chunks = tl.cdiv(length, Q)
    chunk = tl.program_id(0) % chunks
    head, of_head, of_group = place_of(tl.program_id(0) // chunks, chunk, length, heads, groups, Q)
    here = chunk * Q + place < length
    s, total = decays(log + of_head, here, heads, Q)
    kind: tl.constexpr = keys.dtype.element_ty
    at = of_group * n + (place * groups)[:, None] * n + of_n[None, :]
    there = here[:, None] & (of_n < n)[None, :]
    b = tl.load(keys + at, mask=there, other=0.0)
    at_state = tl.program_id(0).to(tl.int64) * P * N + of_p[None, :] * N + of_n[:, None]
    du = tl.zeros((Q, P), tl.float32)
    du = product(b, tl.load(dstates + at_state), du, WIDE, PRECISION, kind) * tl.exp(total - s)[:, None]
    c = tl.load(queries + at, mask=there, other=0.0)
    g = product(b, tl.trans(c), tl.zeros((Q, Q), tl.float32), WIDE, PRECISION, kind)
    apart = tl.where(place[:, None] <= place[None, :], s[None, :] - s[:, None], -float("inf"))
    g *= tl.exp(apart)
    at = of_head * p + (place * heads)[:, None] * p + of_p[None, :]
    there = here[:, None] & (of_p < p)[None, :]
    given = tl.load(dy + at, mask=there, other=0.0).to(tl.float32)
    du = product(g, given, du, WIDE, PRECISION, kind)
    value = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    if SCALES:
        tl.store(dscales + of_head + place * heads, tl.sum(du * value, 1), mask=here)
        du *= steps(scales + of_head, here, heads, Q)
    if SKIP:
        tl.store(dskip + tl.program_id(0), tl.sum(tl.sum(given * value, 1), 0))
        du += tl.load(skip + head).to(tl.float32) * given
    tl.store(dx + at, du.to(dx.dtype.element_ty), mask=there)


@jit
def sides(  # type: ignore[no-untyped-def]
    dy, x, scales, log, keys, states, out, length, heads, groups, p, n, SCALES: tl.constexpr,
    REVERSE: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of queries, from keys and states; with REVERSE that of keys, from queries and the gradients of
    states. Both are (batch, length, heads, n)."""
    place, of_p, of_n = tl.arange(0, Q), tl.arange(0, P), tl.arange(0, N)
    chunks = tl.cdiv(length, Q)
    chunk = tl.program_id(0) % chunks
    _, of_head, of_group = place_of(tl.program_id(0) // chunks, chunk, length, heads, groups, Q)
    here = chunk * Q + place < length
    s, total = decays(log + of_head, here, heads, Q)
    kind: tl.constexpr = keys.dtype.element_ty
    at = of_head * p + (place * heads)[:, None] * p + of_p[None, :]
    there = here[:, None] & (of_p < p)[None, :]
    given = tl.load(dy + at, mask=there, other=0.0)
    u = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    if SCALES:
        u *= steps(scales + of_head, here, heads, Q)
    if REVERSE:
        left, right, decay = u, given, tl.exp(total - s)
        apart = tl.where(place[:, None] <= place[None, :], s[None, :] - s[:, None], -float("inf"))
    else:
        left, right, decay = given, u, tl.exp(s)
        apart = tl.where(place[:, None] >= place[None, :], s[:, None] - s[None, :], -float("inf"))
    e = product(left, tl.trans(right), tl.zeros((Q, Q), tl.float32), WIDE, PRECISION, kind) * tl.exp(apart)
    state = tl.load(states + tl.program_id(0).to(tl.int64) * P * N + of_p[:, None] * N + of_n[None, :])
    total_n = product(left, state, tl.zeros((Q, N), tl.float32), WIDE, PRECISION, kind) * decay[:, None]
    at = of_group * n + (place * groups)[:, None] * n + of_n[None, :]
    there = here[:, None] & (of_n < n)[None, :]
    total_n = product(e, tl.load(keys + at, mask=there, other=0.0), total_n, WIDE, PRECISION, kind)
    at = of_head * n + (place * heads)[:, None] * n + of_n[None, :]
    tl.store(out + at, total_n, mask=there)
