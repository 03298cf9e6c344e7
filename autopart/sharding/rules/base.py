"""The record of a row of the table, and helpers for rows that depend on shapes."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from autopart.sharding.notation import Placement, Shape

Args = tuple[Any, ...]
"""An operator's positional arguments, each tensor replaced by its `torch.Size`."""

Text = Callable[[Args, Sequence[Shape]], str]
"""(arguments, output shapes) -> a row in the notation."""

Linear = int | tuple[int, ...]


@dataclass(frozen=True)
class Local:
    """What runs on a shard in place of the operator when a letter is split.

    name     "mean", for a division by the number of shards, or a key of `autopart.passes.sharded_calls`
    output   the placement of the output, where it is not the one that the row says
    chained  whether a rank's term of the sum is rows of its own, which the next such operator may take as they are
             (placement M)
    """

    name: str
    output: Placement | None = None
    chained: bool = False


class Sizes(NamedTuple):
    """The sizes of `batch` matrix products of (m, k) by (k, n).

    In attention `batch` is samples x heads, m the queries, n the keys, k the elements of a query, `value` the elements
    of a value, and `causal` says whether half of the m x n pairs are masked. Other operators have value 0.
    """

    batch: float
    m: float
    n: float
    k: float
    value: float = 0.0
    causal: bool = False


@dataclass(frozen=True)
class Rule:
    """How an operator may be split, and what it costs.

    row          the row in the notation, or a function (args, output shapes) -> row
    linear       the indices of the operands in which the operator is linear together, so that partial sums pass through
                 it while the other operands are whole; or a number of tensors: partial sums pass through all of them
                 where there are so many (0: never, -1: always)
    local        letter -> what runs on a shard in place of the operator, with "*" for every letter that only inputs
                 have; or a function args -> such a dict
    resize       the index of the argument that is the output's size, or a function (args, local output shapes) -> args
    flops        (args, output shapes) -> FLOPs of the forward pass, where `flops` would count others
    contraction  whether matrix units do the work
    sizes        (args, output shapes) -> the sizes of the product of the first two operands, where `product_of` would
                 find others
    groups       letters that number products, though not every operand has them: experts, heads
    """

    row: str | Text
    linear: Linear | Callable[[Args], Linear] = 0
    local: dict[str, Local] | Callable[[Args], dict[str, Local]] = field(default_factory=dict)
    resize: int | Callable[[Args, Sequence[Shape]], Args] | None = None
    flops: Callable[[Args, Sequence[Shape]], float] | None = None
    contraction: bool = False
    sizes: Callable[[Args, Sequence[Shape]], Sizes] | None = None
    groups: tuple[str, ...] = ()


def argument(args: Args, at: int, default: Any = None) -> Any:
    """The argument of index `at`; `default` where it is left out or None."""
    return default if len(args) <= at or args[at] is None else args[at]


def is_tensor(value: Any) -> bool:
    """Whether an argument stands for a tensor."""
    return isinstance(value, torch.Size)


def replaced(args: Args, at: int, value: Any) -> Args:
    """The arguments with another value at index `at`."""
    return (*args[:at], value, *args[at + 1 :])


def letters(count: int, prefix: str = "d") -> list[str]:
    """`count` letters: ``["d0", "d1", ...]``."""
    return [f"{prefix}{i}" for i in range(count)]


def dims_of(dims: Any, rank: int) -> list[int]:
    """The dims of an argument that names one or several, counted from the left; all dims for None."""
    if dims is None:
        return list(range(rank))
    return [d % max(rank, 1) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]


def spelled(shape: Shape, fixed: Collection[int] = (), mark: str = "") -> list[str]:
    """A letter for every dim of an operand: shared with the other operands, but for the dims in `fixed`, whose letter
    is never split and the operand's own if `mark` is."""
    return [f"{n}{mark}!" if i in fixed else n for i, n in enumerate(letters(len(shape)))]


def row(inputs: Sequence[Sequence[str] | None], outputs: Sequence[Sequence[str]]) -> str:
    """The row of operands that are given dim by dim; None stands for what is no tensor."""
    left = ", ".join("-" if dims is None else " ".join(dims) for dims in inputs)
    return f"{left} -> {', '.join(' '.join(dims) for dims in outputs)}"


def opaque(args: Args, outputs: Sequence[Shape]) -> str:
    """The row of an operator that is never split, such as one that is not in the table."""
    return row([], [spelled(shape, range(len(shape)), f"o{k}") for k, shape in enumerate(outputs)])


def whole_dims(args: Args, outputs: Sequence[Shape], fixed: Collection[int]) -> str:
    """The row in which every dim is split alike in all tensors, but for the dims in `fixed`, which are never split.

    Never split at all where a tensor has another rank than the first.
    """
    rank = len(args[0])
    if any(len(o) != rank for o in outputs):
        return opaque(args, outputs)
    inputs = [spelled(a, fixed, "abc"[k]) if is_tensor(a) else None for k, a in enumerate(args[:3])]
    return row(inputs, [spelled(o, fixed, f"z{k}") for k, o in enumerate(outputs)])


def whole_at(at: int, default: Any = 0) -> Text:
    """Rows in which every dim is split alike in all tensors, but for the dims that argument `at` names."""

    def text(args: Args, outputs: Sequence[Shape]) -> str:
        return whole_dims(args, outputs, dims_of(argument(args, at, default), len(args[0])))

    return text


def whole_last(count: int) -> Text:
    """Rows in which every dim is split alike in all tensors, but for the last `count`."""

    def text(args: Args, outputs: Sequence[Shape]) -> str:
        rank = len(args[0])
        return whole_dims(args, outputs, range(rank - count, rank))

    return text
