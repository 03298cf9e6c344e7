"""The table of op rules: one row an operator, in the notation of `autopart.sharding.notation`.

A new operator takes one row in the file of its family; a function where the row depends on shapes. Every row is
proven by the tests, which split the inputs, run the operator on the shards and put the result together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from autopart.sharding.binding import Bound, bind, letter_groups, split_letter
from autopart.sharding.notation import C, Dim, M, P, Placement, R, RowError, S, Shape, Strategy, parse, splits
from autopart.sharding.rules import (
    contractions,
    factories,
    indexing,
    losses,
    pieces,
    pointwise,
    recurrent,
    reductions,
    shapes,
    vision,
)
from autopart.sharding.rules.base import Args, Local, Rule, Sizes, opaque, replaced
from autopart.sharding.rules.pointwise import BINARY, LINEAR_BINARY, POINTWISE

__all__ = [
    "BINARY",
    "LINEAR_BINARY",
    "POINTWISE",
    "RULES",
    "Args",
    "Local",
    "Product",
    "Rule",
    "Shape",
    "Sizes",
    "Strategy",
    "flatten",
    "flops",
    "has_rule",
    "is_contraction",
    "local_args",
    "local_shape",
    "op_name",
    "product_of",
    "row_of",
    "strategies",
]

FAMILIES = (contractions, factories, indexing, losses, pieces, pointwise, recurrent, reductions, shapes, vision)
RULES: dict[str, Rule] = {name: rule for family in FAMILIES for name, rule in family.RULES.items()}

for _name, _rule in RULES.items():
    if isinstance(_rule.row, str):
        try:
            parse(_rule.row)
        except RowError as error:
            raise RowError(f"rule {_name}: {error}") from error


def op_name(target: Any) -> str:
    """The table's name of a call target: ``aten.linear`` for the default overload."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return f"autopart.{getattr(target, '__name__', target)}"


def has_rule(name: str) -> bool:
    """Whether the operator has a row of its own; without one it is replicated."""
    return name in RULES


def flatten(args: Args) -> list[Any]:
    """An operator's arguments as operands of its row: lists of tensors are spelt out."""
    flat: list[Any] = []
    for arg in args:
        tensors = isinstance(arg, (list, tuple)) and not isinstance(arg, torch.Size)
        if tensors and any(not isinstance(a, (int, float, bool, type(None))) for a in arg):
            flat += arg
        else:
            flat.append(arg)
    return flat


def row_of(name: str, args: Args, outputs: Sequence[Shape]) -> str:
    """The row of an operator's call."""
    row = RULES[name].row if name in RULES else opaque
    return row if isinstance(row, str) else row(args, outputs)


def _bound(name: str, args: Args, outputs: Sequence[Shape]) -> tuple[Rule, Bound]:
    rule = RULES.get(name, Rule(opaque))
    operands = [tuple(a) if isinstance(a, torch.Size) else None for a in flatten(args)]
    row = parse(row_of(name, args, outputs))
    row = replace(row, inputs=row.inputs[: len(operands)], outputs=row.outputs[: len(outputs)])
    return rule, bind(row, operands, outputs)


def strategies(
    name: str,
    args: Args,
    outputs: Sequence[Shape],
    shards: int,
    hints: Sequence[Placement] = (),
) -> list[Strategy]:
    """Every way to run an operator along one axis of `shards` ranks.

    `hints` are placements that a consumer would like the first output to have: with parts, where a letter that owns
    the dim alone is split part by part; or M, rows of this rank's own experts.
    """
    rule, bound = _bound(name, args, outputs)
    tensors = [isinstance(a, torch.Size) for a in flatten(args)]
    count = sum(tensors)
    instead = rule.local(args) if callable(rule.local) else rule.local

    def all_inputs(placement: Placement) -> tuple[Placement | None, ...]:
        return tuple(placement if t else None for t in tensors)

    result = [Strategy(p.kind, all_inputs(p), (p,) * len(outputs)) for p in (R, C)]
    linear = rule.linear(args) if callable(rule.linear) else rule.linear
    if isinstance(linear, int):
        linear = tuple(i for i, t in enumerate(tensors) if t) if linear in (-1, count) else ()
    if linear and all(tensors[i] for i in linear):
        passing = tuple((P if i in linear else C) if t else None for i, t in enumerate(tensors))
        result.append(Strategy("P", passing, (P,) * len(outputs)))
    for letters in letter_groups(bound):
        strategy = split_letter(bound, letters, shards)
        if strategy is None:
            continue
        inputs = tuple(p or (C if t else None) for p, t in zip(strategy.inputs, tensors, strict=True))
        local = instead.get(strategy.name)
        if local is None and all(o == P for o in strategy.outputs):
            local = instead.get("*")
        given = local.output if local and local.output else None
        strategy = Strategy(
            strategy.name,
            inputs,
            tuple(given or o for o in strategy.outputs),
            local.name if local else "",
            True,
        )
        result.append(strategy)
        if local and local.chained:
            result += [replace(strategy, inputs=(M(0), *inputs[1:]))]
            result += [replace(s, outputs=(M(0),)) for s in result[-2:] if M(0) in hints]
            continue
        result += [again for hint in hints if (again := _by_owner(strategy, hint)) is not None]
        result += [
            again
            for hint in hints
            if len(letters) == 1
            and hint.parts
            and (again := _with_parts(strategy, hint, bound, next(iter(letters)))) is not None
            and splits(hint, tuple(outputs[0]), shards)
        ]
    return result


def _by_owner(strategy: Strategy, hint: Placement) -> Strategy | None:
    """The same split where the places along a dim are not cut but owned: nothing is saved, and nothing moves."""
    if hint.kind != "M" or strategy.outputs[0] != S(hint.dim) or strategy.local:
        return None
    placements = [p for p in (*strategy.inputs, *strategy.outputs) if p is not None]
    if any(p.parts or p.kind not in "SC" for p in placements) or not any(p and p.kind == "S" for p in strategy.inputs):
        return None

    def owned(placement: Placement | None) -> Placement | None:
        return M(placement.dim) if placement and placement.kind == "S" else placement

    inputs, outputs = tuple(map(owned, strategy.inputs)), tuple(M(o.dim) for o in strategy.outputs)
    return Strategy(f"{strategy.name} owned", inputs, outputs)


def _with_parts(strategy: Strategy, hint: Placement, bound: Bound, letter: str) -> Strategy | None:
    """The same split, taken part by part, where every operand's dim is this letter and nothing else."""
    if strategy.outputs[0] != S(hint.dim) or strategy.local or sum(hint.parts) != bound.sizes[letter]:
        return None
    for dims in [*bound.inputs, *bound.outputs]:
        for dim in dims or ():
            if dim and len(dim.factors) > 1 and letter in {f.name for f in dim.factors}:
                return None

    def parted(placement: Placement | None) -> Placement | None:
        return S(placement.dim, hint.parts) if placement and placement.kind == "S" else placement

    return Strategy(
        strategy.name,
        tuple(map(parted, strategy.inputs)),
        tuple(S(o.dim, hint.parts) for o in strategy.outputs),
        shards_work=True,
    )


def flops(name: str, args: Args, outputs: Sequence[Shape]) -> float:
    """FLOPs of the forward pass: 2 x the product of the letters for contractions (one multiply, one add),
    one per output element otherwise."""
    rule = RULES.get(name)
    if rule is not None and rule.flops is not None:
        return rule.flops(args, outputs)
    if is_contraction(name):
        _, bound = _bound(name, args, outputs)
        return 2.0 * math.prod(bound.sizes.values())
    return float(sum(math.prod(o) for o in outputs))


def is_contraction(name: str) -> bool:
    """Whether matrix units do the work."""
    rule = RULES.get(name)
    return rule is not None and rule.contraction


ROLES = ("batch", "m", "n", "k")
"""The first four of `Sizes`."""


@dataclass(frozen=True)
class Product:
    """The matrix product that an operator is.

    sizes    of all of it
    roles    every letter of its row -> which of the sizes counts it
    factors  its operands, by their places: the first factor, and what is behind it
    grows    of ROLES, whether it counts samples
    """

    sizes: Sizes
    roles: tuple[tuple[str, int], ...]
    factors: tuple[int, ...]
    grows: tuple[bool, bool, bool, bool]

    def role(self, strategy: Strategy) -> int | None:
        """Which of the sizes a strategy splits."""
        return dict(self.roles)[strategy.name.partition("+")[0]] if strategy.shards_work else None


def product_of(name: str, args: Args, outputs: Sequence[Shape], counted: Sequence[int | None]) -> Product | None:
    """The matrix product that an operator is; `counted` tells for every operand which dim counts samples.

    A letter of the output is `batch` where every factor has it, m where the first has it, else n; one that the output
    does not have is k. Factors are the operands that have such a letter: a bias has none. None for what matrix units
    do not do or do in several products (recurrent layers), for products of numbers in place of matrices (no letter of
    their own) and for those that sum nothing up.
    """
    rule = RULES.get(name)
    if rule is None or not rule.contraction or (rule.flops and not rule.sizes):
        return None
    _, bound = _bound(name, args, outputs)

    def letters_of(dims: Sequence[Dim | None] | None) -> set[str]:
        return {f.name for dim in dims or () if dim for f in dim.factors if f.size is None}

    held, given = [letters_of(dims) for dims in bound.inputs], set[str]().union(*map(letters_of, bound.outputs))
    factors = (0, 1) if rule.sizes else tuple(i for i, names in enumerate(held) if names - given)
    if len(factors) < 2:
        return None
    first, *behind = (held[i] for i in factors)

    def role(letter: str) -> int:
        if letter in rule.groups:
            return 0
        if letter not in given:
            return 3
        return 0 if letter in first.intersection(*behind) else 1 if letter in first else 2

    roles = {letter: role(letter) for letter in bound.sizes}
    if rule.sizes:
        sizes = rule.sizes(args, outputs)
    else:
        batch, m, n, k = (math.prod(s for x, s in bound.sizes.items() if roles[x] == at) for at in range(len(ROLES)))
        sizes = Sizes(batch, m, n, k)
    if max(sizes.m, sizes.n) <= 1:
        return None
    grows = {
        roles[dim.factors[0].name]
        for dims, at in zip(bound.inputs, counted, strict=True)
        if dims and at is not None and (dim := dims[at]) and dim.factors[0].name in roles
    }
    grows |= {0} if not grows and any(at is not None for at in counted) else set()
    return Product(sizes, tuple(roles.items()), factors, tuple(at in grows for at in range(4)))  # type: ignore[arg-type]


def local_shape(shape: Sequence[int], placement: Placement, shards: int) -> Shape:
    """The shape of one rank's shard."""
    sizes = list(shape)
    if placement.kind == "S":
        sizes[placement.dim] //= shards
    return tuple(sizes)


def local_args(name: str, args: Args, local_outputs: Sequence[Shape]) -> Args:
    """The operator's arguments on a shard: literal sizes follow the shard's output."""
    rule = RULES.get(name)
    if rule is None or rule.resize is None:
        return tuple(args)
    if callable(rule.resize):
        return rule.resize(tuple(args), local_outputs)
    return replaced(args, rule.resize, list(local_outputs[0]))
