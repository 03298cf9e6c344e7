"""Operators that are measured: for each kind, what stands for it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

WIDTH = 1024
"""Elements of the dim that operators normalise or sum over."""


Made = tuple[Callable[[], Tensor], list[Tensor]]


def _rows(randn: Any, nbytes: float, dtype: torch.dtype, width: int = WIDTH) -> Tensor:
    """A tensor of `nbytes` bytes with gradients, in rows of `width` elements or one shorter row."""
    elements = max(8, int(nbytes / dtype.itemsize))
    wide = min(width, elements)
    tensor: Tensor = randn(elements // wide, wide, dtype=dtype, grad=True)
    return tensor


def _unary(function: Callable[[Tensor], Tensor], share: float = 0.5) -> Callable[..., Made]:
    """An operator of one tensor, whose bytes are `share` of those that it reads and writes."""

    def make(randn: Any, nbytes: int, dtype: torch.dtype) -> Made:
        x = _rows(randn, nbytes * share, dtype)
        return lambda: function(x), [x]

    return make


def _stream(randn: Any, nbytes: int, dtype: torch.dtype) -> Made:
    x = _rows(randn, nbytes / 3, dtype)
    y = torch.ones_like(x)
    return lambda: x * y, [x]


def _norm(randn: Any, nbytes: int, dtype: torch.dtype) -> Made:
    x = _rows(randn, nbytes / 2, dtype)
    weight, bias = (randn(x.shape[1], dtype=dtype, grad=True) for _ in range(2))
    return lambda: F.layer_norm(x, x.shape[1:], weight, bias), [x, weight, bias]


def _cross_entropy(randn: Any, nbytes: int, dtype: torch.dtype) -> Made:
    """Of logits over 4096 words, as the runtime computes it."""
    x = _rows(randn, nbytes, dtype, 4096)
    targets = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    return lambda: F.cross_entropy(x, targets, reduction="sum"), [x]


def _embedding(randn: Any, nbytes: int, dtype: torch.dtype) -> Made:
    """A quarter as many words looked up as the table has rows."""
    table = _rows(randn, nbytes * 0.8, dtype, 512)
    ids = torch.arange(max(1, table.shape[0] // 4), device=table.device) * 4 % table.shape[0]
    return lambda: F.embedding(ids, table), [table]


OPERATORS: Mapping[str, Callable[..., Made]] = {
    "stream": _stream,
    "sum": _unary(lambda x: x.sum(-1), 1.0),
    "tanh": _unary(torch.tanh),
    "gelu": _unary(F.gelu),
    "silu": _unary(F.silu),
    "softmax": _unary(lambda x: x.softmax(-1)),
    "norm": _norm,
    "cross_entropy": _cross_entropy,
    "embedding": _embedding,
}
"""Kind, of `autopart.cost.measured_tables.KINDS`, -> what stands for it."""
