"""What the compiler knows of `autopart.kernels.attention`: splits, FLOPs, bytes, and what is kept for backward."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from autopart.kernels.kernel import Bytes

TENSORS = ("query", "key", "value", "mask", "padding", "bias", "relative", "sinks")
"""The tensors among a graph's arguments, in order; constants follow."""
CAUSAL, WINDOW = 9, 10
"""Places of these arguments."""


def rule(args: tuple[Any, ...], outputs: Sequence[Sequence[int]]) -> str:
    """How the tensors of a call may be split, in the notation of `autopart.sharding.notation`, for masks and biases of
    any shape. Queries are split where neither `causal`, `window` nor a bias by relative place counts them.

    args  the call's arguments, with the shapes of tensors in their place and None for what is left out
    """
    given = dict(zip(TENSORS, (*args, *[None] * 8), strict=False))
    query, key = given["query"], given["key"]
    heads = "(h g)" if query[1] > key[1] > 1 else "h"
    q = "q!" if any(args[CAUSAL : WINDOW + 1]) or given["relative"] is not None else "q"
    names = ("b", heads, q, "k!")

    def added(name: str) -> str:
        shape = given[name] or (1,)
        return " ".join("1" if n == 1 else letter for n, letter in zip(shape, names[-len(shape) :], strict=True))

    texts = {
        "query": f"b {heads} {q} d!", "key": "b h k! d!", "value": "b h k! e!", "mask": added("mask"),
        "padding": "b k!", "bias": added("bias"), "relative": f"{heads} r!", "sinks": heads,
    }  # fmt: skip
    inputs = ("-" if given[name] is None else texts[name] for name in TENSORS)
    return f"{', '.join(inputs)} -> b {heads} {q} e!"


def flops(args: tuple[Any, ...], outputs: Sequence[Sequence[int]]) -> float:
    """Both products of every query with the keys that its places let it see."""
    batch, heads, queries, d = args[0]
    return 2.0 * batch * heads * pairs(queries, args[1][2], *_places(args)) * (d + args[2][3])


def keys_seen(args: tuple[Any, ...]) -> tuple[float, bool]:
    """The keys of a query, and whether half of them are masked: of a window the mean number of keys."""
    queries, keys, (causal, window) = args[0][2], args[1][2], _places(args)
    return (pairs(queries, keys, causal, window) / queries, False) if window else (keys, causal)


def _places(args: tuple[Any, ...]) -> tuple[bool, int]:
    causal, window = (*args, *[None] * 11)[CAUSAL : WINDOW + 1]
    return bool(causal), window or 0


@lru_cache
def pairs(queries: int, keys: int, causal: bool, window: int) -> float:
    """Pairs of a query and a key that it sees. Without a window a causal mask counts as half of all."""
    if not window:
        return queries * keys * (0.5 if causal else 1.0)
    middle = torch.arange(keys - queries, keys)
    last = (middle if causal else middle + window - 1).clamp(max=keys - 1)
    return float((last - (middle - window + 1).clamp(min=0) + 1).clamp(min=0).sum())


def bytes_moved(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Bytes:
    batch, heads, queries, d = query.shape
    e = value.shape[-1]
    wide = query.itemsize * batch * (heads * queries * (d + e) + key.shape[1] * key.shape[2] * (d + e))
    tensors = [t for t in others if isinstance(t, Tensor)]
    read = sum(t.untyped_storage().nbytes() for t in tensors)
    written = sum(t.numel() * t.itemsize for t in tensors if t.requires_grad)
    lse = 4 * batch * heads * queries
    return Bytes(forward=wide + lse + read, backward=2 * wide + lse + read + written)


def kept(arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Query, key, value, masks, biases, hashes, the output, and for each query a log-sum-exp in float32."""
    query = arguments[0]
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    return *(t for t in arguments if isinstance(t, Tensor)), outputs[0], lse
