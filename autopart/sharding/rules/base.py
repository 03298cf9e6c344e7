"""What a row of the table is, and what its functions share."""

from __future__ import annotations

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
    """What runs on a shard in place of the operator when a letter is split: a name that `partition` and the
    emitter know, the placement of the output where it is not the one the row says, and whether each rank's part of
    the sum is rows of its own, which may go on as such from one of these operators to the next (placement M)."""

    name: str
    output: Placement | None = None
    chained: bool = False


class Sizes(NamedTuple):
    """`batch` matrix products of m x k by k x n. In attention, `batch` counts samples and heads, m queries, n keys and
    k elements of a query; `value` are the elements of a value, 0 in other operators, and `causal` says whether half
    the pairs are masked."""

    batch: float
    m: float
    n: float
    k: float
    value: float = 0.0
    causal: bool = False


@dataclass(frozen=True)
class Rule:
    """How an operator may be split, and what it costs.

    row          the notation, or a function (args, output shapes) -> notation
    linear       the operands that partial sums pass through together, the others whole, by their places; or how
                 many tensors it must have for partial sums to pass through all of them (0: never, -1: any)
    local        letter -> what runs instead on a shard (`*`: every letter that only the inputs have), or a
                 function args -> such a dict
    resize       which argument is the output's size, or a function (args, local output shapes) -> args on a shard
    flops        (args, output shapes) -> FLOPs of the forward pass; default: see `flops`
    contraction  whether matrix units do the work
    sizes        (args, output shapes) -> the sizes of the products of the first two operands, where the letters do not
                 tell (see `product_of`)
    groups       letters that count products, even if not all operands have them: experts, heads
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
    """The argument in place `at`; `default` where it is left out or None."""
    return default if len(args) <= at or args[at] is None else args[at]


def is_tensor(value: Any) -> bool:
    """Whether an argument stands for a tensor."""
    return isinstance(value, torch.Size)


def replaced(args: Args, at: int, value: Any) -> Args:
    """The arguments with another one in place `at`."""
    return (*args[:at], value, *args[at + 1 :])


def letters(count: int, prefix: str = "d") -> list[str]:
    """`count` letters."""
    return [f"{prefix}{i}" for i in range(count)]


def dims_of(dims: Any, rank: int) -> list[int]:
    """Dims counted from the left; None means all of them."""
    if dims is None:
        return list(range(rank))
    return [d % max(rank, 1) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]


def spelled(shape: Shape, fixed: Collection[int] = (), mark: str = "") -> list[str]:
    """A letter a dim, shared by all operands, and for the dims `fixed` one of the operand's own that stays whole."""
    return [f"{n}{mark}!" if i in fixed else n for i, n in enumerate(letters(len(shape)))]


def row(inputs: Sequence[Sequence[str] | None], outputs: Sequence[Sequence[str]]) -> str:
    """The notation of operands given dim by dim; None is no tensor."""
    left = ", ".join("-" if dims is None else " ".join(dims) for dims in inputs)
    return f"{left} -> {', '.join(' '.join(dims) for dims in outputs)}"


def opaque(args: Args, outputs: Sequence[Shape]) -> str:
    """Never split: what an operator without a row gets."""
    return row([], [spelled(shape, range(len(shape)), f"o{k}") for k, shape in enumerate(outputs)])


def whole_dims(args: Args, outputs: Sequence[Shape], fixed: Collection[int]) -> str:
    """Every dim passes but those `fixed`, whose sizes are each tensor's own; all tensors have the same rank."""
    rank = len(args[0])
    if any(len(o) != rank for o in outputs):
        return opaque(args, outputs)
    inputs = [spelled(a, fixed, "abc"[k]) if is_tensor(a) else None for k, a in enumerate(args[:3])]
    return row(inputs, [spelled(o, fixed, f"z{k}") for k, o in enumerate(outputs)])


def whole_at(at: int, default: Any = 0) -> Text:
    """Every dim passes but those in argument `at`, which stay whole."""

    def text(args: Args, outputs: Sequence[Shape]) -> str:
        return whole_dims(args, outputs, dims_of(argument(args, at, default), len(args[0])))

    return text


def whole_last(count: int) -> Text:
    """Every dim passes but the last `count`, which stay whole."""

    def text(args: Args, outputs: Sequence[Shape]) -> str:
        rank = len(args[0])
        return whole_dims(args, outputs, range(rank - count, rank))

    return text
