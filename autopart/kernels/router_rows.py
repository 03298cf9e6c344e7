"""What the kernels of routers and of loads share: tiles of rows of logits, and Triton functions of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from autopart.kernels.ahead import Usage, compile_kernels
from autopart.kernels.launch import TRITON_NAMES, jit, power_of_two

tl: Any = None  # triton.language, which jit binds

MAX_EXPERTS = 1024
ELEMENTS = 512
"""Logits that a Triton program takes at a time."""


def wide(logits: torch.Tensor) -> torch.dtype:
    """The dtype of chances: float32, or float64 of such logits."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def block(experts: int) -> dict[str, int]:
    """Rows and experts in a Triton program."""
    among = power_of_two(experts)
    return {"ROWS": max(ELEMENTS // among, 1), "EXPERTS": among}


def kernels_apply(logits: torch.Tensor, k: int) -> bool:
    """Whether the kernels take logits of this dtype and so many experts."""
    return logits.dtype in TRITON_NAMES and 0 < k <= logits.shape[-1] <= MAX_EXPERTS


def compile_rows(
    functions: Iterable[Any], capability: int, experts: int, k: int, dtype: torch.dtype, **options: int
) -> dict[str, Usage]:
    """Compile kernels whose arguments have the names of the router's. Options are constants that take the place of the
    router's: the rows of a program are those of the larger tile."""
    signature = dict.fromkeys(("logits", "dlogits", "scores", "dscores"), f"*{TRITON_NAMES[dtype]}") | {"ids": "*i64"}
    signature |= dict.fromkeys(("weights", "dweights", "mask", "partial", "dchances", "bias"), "*fp32")
    aligned = set(signature)
    signature |= dict.fromkeys(("eps", "scale"), "fp32")
    signature |= dict.fromkeys(("rows", "experts", "stride"), "i32")
    constexprs = {**block(experts), "K": k, "TOP": power_of_two(k), "RENORMALISE": True, "MASK": True, **options}
    return compile_kernels(functions, signature, constexprs, capability, aligned=aligned)


@jit
def probabilities(logits, stride, row, expert, rows, experts):  # type: ignore[no-untyped-def]
    """Softmax in float32, of zeros in rows that are not there."""
    here = (row < rows)[:, None] & (expert < experts)[None, :]
    other = tl.where(expert < experts, 0.0, -float("inf"))[None, :]
    value = tl.load(logits + row[:, None] * stride + expert[None, :], mask=here, other=0.0).to(tl.float32) + other
    value = tl.exp(value - tl.max(value, 1)[:, None])
    return value / tl.sum(value, 1)[:, None]


@jit
def best_of(left, expert, EXPERTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The lowest number among the greatest elements of every row."""
    return tl.min(tl.where(left == tl.max(left, 1)[:, None], expert[None, :], EXPERTS), 1)


@jit
def sortable(value):  # type: ignore[no-untyped-def]
    """Whole numbers above -2**31 in the order of float32 values; those of nan are the greatest."""
    bits = tl.where(value == value, value + 0.0, float("inf")).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
