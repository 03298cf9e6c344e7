"""The table of operators: one row each, in the notation of `autopart.sharding.notation`.

A new operator takes one row in the file of its family; where the row depends on shapes it is a function. The tests
prove every row: they split the inputs, run the operator on the shards and put the results together.
Open `base.py` first, then `pointwise.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from autopart.sharding.binding import Bound, bind, letter_groups, split_letter
from autopart.sharding.notation import C, Dim, M, P, Placement, R, RowError, S, Shape, Strategy, parse, splits
from autopart.sharding.rules import (
    attention,
    contractions,
    factories,
    indexing,
    kernels,
    losses,
    pointwise,
    recurrent,
    reductions,
    shapes,
    splitting,
    vision,
)
from autopart.sharding.rules.base import Args, Linear, Local, Rule, Sizes, opaque, replaced

FAMILIES = (
    attention, contractions, factories, indexing, kernels, losses, pointwise, recurrent, reductions, shapes, splitting,
    vision,
)  # fmt: skip
RULES: dict[str, Rule] = {name: rule for family in FAMILIES for name, rule in family.RULES.items()}

for _name, _rule in RULES.items():
    if isinstance(_rule.row, str):
        try:
            parse(_rule.row)
        except RowError as error:
            raise RowError(f"rule {_name}: {error}") from error


def op_name(target: Any) -> str:
    """The table's name of a call target: ``"aten.linear"`` for the default overload of an operator of torch,
    ``"autopart.rms_norm"`` for a function."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return f"autopart.{getattr(target, '__name__', target)}"


def has_rule(name: str) -> bool:
    """Whether the operator has a row. An operator without one runs whole on every rank."""
    return name in RULES


def flatten(args: Args) -> list[Any]:
    """An operator's arguments as the operands of its row: a list of tensors is as many operands."""
    flat: list[Any] = []
    for arg in args:
        tensors = isinstance(arg, (list, tuple)) and not isinstance(arg, torch.Size)
        if tensors and any(not isinstance(a, (int, float, bool, type(None))) for a in arg):
            flat += arg
        else:
            flat.append(arg)
    return flat


def row_of(name: str, args: Args, outputs: Sequence[Shape]) -> str:
    """The row of an operator for these arguments and output shapes, as text."""
    row = RULES[name].row if name in RULES else opaque
    return row if isinstance(row, str) else row(args, outputs)


def _operands(args: Args) -> tuple[Shape | None, ...]:
    """The shapes of an operator's operands; None of one that is no tensor."""
    return tuple(tuple(a) if isinstance(a, torch.Size) else None for a in flatten(args))


def _bound(text: str, operands: Sequence[Shape | None], outputs: Sequence[Shape]) -> Bound:
    row = parse(text)
    row = replace(row, inputs=row.inputs[: len(operands)], outputs=row.outputs[: len(outputs)])
    return bind(row, operands, outputs)


def strategies(
    name: str,
    args: Args,
    outputs: Sequence[Shape],
    shards: int,
    hints: Sequence[Placement] = (),
) -> list[Strategy]:
    """Every way to run an operator along one axis of `shards` ranks.

    `hints` are placements in which users of the first output would take it. A hint S with parts gives a strategy that
    splits the dim part by part, where the dim is one letter. A hint M gives a strategy on rows of a rank's own experts.
    """
    rule = RULES.get(name, Rule(opaque))
    local = rule.local(args) if callable(rule.local) else rule.local
    linear = rule.linear(args) if callable(rule.linear) else rule.linear
    shapes = tuple(map(tuple, outputs))
    return list(
        _strategies(
            row_of(name, args, outputs), _operands(args), shapes, shards, tuple(hints), linear, tuple(local.items())
        )
    )


@lru_cache(maxsize=8192)
def _strategies(
    row: str,
    operands: tuple[Shape | None, ...],
    outputs: tuple[Shape, ...],
    shards: int,
    hints: tuple[Placement, ...],
    linear: Linear,
    on_shards: tuple[tuple[str, Local], ...],
) -> tuple[Strategy, ...]:
    """`strategies` from all that they depend on. A model's blocks, and iterations of its loops, ask for the same again
    and again."""
    bound, local_of = _bound(row, operands, outputs), dict(on_shards)
    tensors = [operand is not None for operand in operands]
    count = sum(tensors)

    def all_inputs(placement: Placement) -> tuple[Placement | None, ...]:
        return tuple(placement if t else None for t in tensors)

    result = [Strategy(p.kind, all_inputs(p), (p,) * len(outputs)) for p in (R, C)]
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
        local = local_of.get(strategy.name)
        if local is None and all(o == P for o in strategy.outputs):
            local = local_of.get("*")
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
            and splits(hint, outputs[0], shards)
        ]
    return tuple(result)


def _by_owner(strategy: Strategy, hint: Placement) -> Strategy | None:
    """The strategy with M in place of S: every rank computes all indices along the dim, of which its own have meaning.

    The rank saves no work and moves no data. None where an operand's placement is neither C nor S without parts.
    """
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
    """The strategy with every split taken part by part; None where the letter shares a dim with another."""
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
    """FLOPs of the forward pass: the rule's own count; else for a contraction 2 x the product of all letters' sizes (a
    multiplication and an addition each), and for other operators 1 for every element of the outputs."""
    rule = RULES.get(name)
    if rule is not None and rule.flops is not None:
        return rule.flops(args, outputs)
    if is_contraction(name):
        bound = _bound(row_of(name, args, outputs), _operands(args), outputs)
        return 2.0 * math.prod(bound.sizes.values())
    return float(sum(math.prod(o) for o in outputs))


def is_contraction(name: str) -> bool:
    """Whether matrix units do the work."""
    rule = RULES.get(name)
    return rule is not None and rule.contraction


def sums_up(name: str, args: Args, outputs: Sequence[Shape]) -> bool:
    """Whether a contraction sums over a letter. One that does not, an einsum of "bq,bk->bqk", multiplies element by
    element, which needs no matrix units and has every dtype."""
    rule = RULES[name]
    if rule.flops or rule.sizes:
        return True
    bound = _bound(row_of(name, args, outputs), _operands(args), outputs)
    given = {f.name for dims in bound.outputs for dim in dims or () if dim for f in dim.factors}
    return not given.issuperset(bound.sizes)


ROLES = ("batch", "m", "n", "k")
"""The first four sizes of a matrix product, by their names in `Sizes`."""


@dataclass(frozen=True)
class Product:
    """The matrix product that an operator is.

    sizes    its sizes on one device
    roles    (letter of its row, index of the size in ROLES that the letter is part of)
    factors  the indices of the operands that are its factors
    grows    for each of ROLES, whether the size grows with the samples
    """

    sizes: Sizes
    roles: tuple[tuple[str, int], ...]
    factors: tuple[int, ...]
    grows: tuple[bool, bool, bool, bool]

    def role(self, strategy: Strategy) -> int | None:
        """The index in ROLES of the size that a strategy splits; None where it splits none."""
        return dict(self.roles)[strategy.name.partition("+")[0]] if strategy.shards_work else None


def product_of(name: str, args: Args, outputs: Sequence[Shape], counted: Sequence[int | None]) -> Product | None:
    """The matrix product that an operator is; `counted` has for every operand the dim that counts samples.

    A letter that the output does not have is part of k; where the output has none, as a loss that sums up the rows and
    columns of its product, only if every factor has the letter. Other letters are part of `batch` where every factor
    has them, of m where the first factor has them, else of n. The factors are the operands that have a letter of k; a
    bias has none. None for an operator that is no contraction, is several products (a recurrent layer), sums nothing
    up, or has m = n = 1.
    """
    rule = RULES.get(name)
    if rule is None or not rule.contraction or (rule.flops and not rule.sizes):
        return None
    bound = _bound(row_of(name, args, outputs), _operands(args), outputs)

    def letters_of(dims: Sequence[Dim | None] | None) -> set[str]:
        return {f.name for dim in dims or () if dim for f in dim.factors if f.size is None}

    read, given = [letters_of(dims) for dims in bound.inputs], set[str]().union(*map(letters_of, bound.outputs))
    factors = (0, 1) if rule.sizes else tuple(i for i, names in enumerate(read) if names - given)
    if len(factors) < 2:
        return None
    first, *behind = (read[i] for i in factors)

    def role(letter: str) -> int:
        if letter in rule.groups:
            return 0
        shared = letter in first.intersection(*behind)
        if letter not in given and (shared or given):
            return 3
        return 0 if shared else 1 if letter in first else 2

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
    """The shape that a rank holds of a tensor."""
    sizes = list(shape)
    if placement.kind == "S":
        sizes[placement.dim] //= shards
    return tuple(sizes)


def local_args(name: str, args: Args, local_outputs: Sequence[Shape]) -> Args:
    """The operator's arguments on a rank: sizes among them are those of the rank's outputs."""
    rule = RULES.get(name)
    if rule is None or rule.resize is None:
        return tuple(args)
    if callable(rule.resize):
        return rule.resize(tuple(args), local_outputs)
    return replaced(args, rule.resize, list(local_outputs[0]))
