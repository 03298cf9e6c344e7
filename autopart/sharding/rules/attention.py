"""Attention: torch's, and the fused kernel's (`autopart.kernels.attention`) with and without dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autopart.kernels import attention_facts
from autopart.sharding.notation import Shape
from autopart.sharding.rules.base import Args, Rule, Sizes, argument


def _attention(args: Args, outputs: Sequence[Shape]) -> str:
    """(query, key, value, mask, dropout, causal). Queries are split only without a causal mask, which counts them. With
    fewer key heads than query heads, a key head serves a group of g query heads (`enable_gqa`)."""
    q = "q!" if len(args) > 5 and args[5] else "q"
    size = args[3] if len(args) > 3 else None
    if len(args[0]) != 4:
        mask = "" if size is None else f", ... {q} k!"
        return f"... {q} d!, ... k! d!, ... k! e!{mask} -> ... {q} e!"
    heads = "(h g)" if args[0][1] > args[1][1] > 1 else "h"
    mask = ""
    if size is not None:
        names = ["b", heads, q, "k!"][-len(size) :]
        mask = ", " + " ".join("1" if s == 1 else n for n, s in zip(names, size, strict=True))
    return f"b {heads} {q} d!, b h k! d!, b h k! e!{mask} -> b {heads} {q} e!"


def _attention_flops(args: Args, outputs: Sequence[Shape]) -> float:
    *batch, q, d = args[0]
    causal = len(args) > 5 and bool(args[5])
    return 2.0 * math.prod(batch) * q * args[1][-2] * (d + args[2][-1]) * (0.5 if causal else 1.0)


def _attention_sizes(args: Args, outputs: Sequence[Shape]) -> Sizes:
    *batch, q, d = args[0]
    return Sizes(math.prod(batch), q, args[1][-2], d, args[2][-1], bool(argument(args, 5, False)))


def _fused_attention_sizes(args: Args, outputs: Sequence[Shape]) -> Sizes:
    batch, heads, queries, d = args[0]
    keys, causal = attention_facts.keys_seen(args)
    return Sizes(batch * heads, queries, keys, d, args[2][3], causal)


GROUPS = ("b", "h", "g")
FUSED = Rule(
    attention_facts.rule, flops=attention_facts.flops, contraction=True, sizes=_fused_attention_sizes, groups=GROUPS
)
RULES: dict[str, Rule] = {
    "aten.scaled_dot_product_attention": Rule(
        _attention, flops=_attention_flops, contraction=True, sizes=_attention_sizes, groups=GROUPS
    ),
    "autopart.attention": FUSED,
    "autopart.dropout_attention": FUSED,
}
