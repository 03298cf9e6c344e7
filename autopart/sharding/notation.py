"""Placements of a tensor along a mesh axis, and the notation of rules: one line of letters, in the manner of einsum,
says how an operator may be split.

Grammar
-------
    row      := operands "->" operands          operands := operand ("," operand)*  | nothing
    operand  := "-"                             an argument that is no tensor
              | dim*                            (no dim at all: a scalar tensor)
    dim      := factor | "(" factor+ ")"        a dim made of several, the first one major
              | "(" factor ("+" factor)+ ")"    a dim laid out as parts, one after the other
              | "..."                           as many dims as there are left, aligned right, broadcasting
    factor   := letter | letter "!"             "!": never split
              | number                          a literal size, never split

Meaning, for a letter split over n ranks:
    on both sides    each rank computes its part of the output
    left side only   the output is a partial sum (P)
    right side only  each rank makes its part of the output
    in some inputs   the inputs without the letter are whole, and their gradients partial sums (C)

In a product of factors only the first factor behind the literals splits: ``(h d)`` splits h, and ``(3 n)`` splits n in
each of the three parts. The letters of ``(q+k+v)`` split together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """What a rank holds of a tensor along one mesh axis, and what it holds of the tensor's gradient.

    R  replicated (`Replicate` in DTensor). The gradient is whole on every rank.
    S  split along `dim` (`Shard`). The gradient is split alike. `parts` are the sizes of the parts that the dim is
       made of, each of which is split on its own; () where the dim is one part.
    P  a partial sum (`Partial`): the tensor is the sum over the ranks. The gradient is whole on every rank.
    C  replicated with a partial gradient, as behind Megatron-LM's *f*: the gradient is the sum over the ranks.
    G  as C, gathered from S. A rank saves only its part for backward, which gathers the tensor again: Megatron-LM's
       sequence parallelism.
    M  of full size on every rank, of which a rank's share of the indices along `dim` has meaning and a gradient: the
       rows of a rank's own experts.
    """

    kind: str
    dim: int = -1
    parts: tuple[int, ...] = ()
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((ord(self.kind), self.dim, self.parts)))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        parts = f"[{'+'.join(map(str, self.parts))}]" if self.parts else ""
        return f"{self.kind}{self.dim if self.kind in 'SM' else ''}{parts}"

    @staticmethod
    def parse(text: str) -> Placement:
        """The inverse of ``str``: ``"S1[64+64]"``."""
        match = re.fullmatch(r"([RCPG])|([SM])(\d+)(?:\[(\d+(?:\+\d+)*)\])?", text)
        if match is None:
            raise ValueError(f"not a placement: {text!r}")
        if match[1]:
            return Placement(match[1])
        return Placement(match[2], int(match[3]), tuple(map(int, match[4].split("+"))) if match[4] else ())


R, C, P, G = Placement("R"), Placement("C"), Placement("P"), Placement("G")


def M(dim: int) -> Placement:
    """Of full size, of which a rank's own indices along `dim` have meaning."""
    return Placement("M", dim)


def S(dim: int, parts: Sequence[int] = ()) -> Placement:
    """Split along `dim`, each of `parts` on its own."""
    return Placement("S", dim, tuple(parts) if len(parts) > 1 else ())


AGAIN = "+again"
"""Behind the name of a strategy that takes an operand whole and saves a part of it for backward (placement G)."""


def saved_as(placement: Placement) -> Placement:
    """The placement in which a tensor is saved for backward: S for a part of its bytes, R for all of them."""
    return Placement("S") if placement.kind in "SG" else R


def splits(placement: Placement, shape: Shape, shards: int) -> bool:
    """Whether a placement splits a shape evenly over `shards` ranks."""
    return placement.kind != "S" or all(p % shards == 0 for p in placement.parts or (shape[placement.dim],))


@dataclass(frozen=True, slots=True)
class Factor:
    """A letter or a literal size of a dim; `fixed` factors are never split."""

    name: str
    fixed: bool
    size: int | None = None


@dataclass(frozen=True, slots=True)
class Dim:
    """A dim of an operand: one factor, a product of factors ("*"), or parts one after the other ("+")."""

    factors: tuple[Factor, ...]
    joined: str = "*"  # "*" a product, "+" parts one after the other


Operand = tuple[Dim, ...] | None


@dataclass(frozen=True)
class Row:
    """A parsed row: operands left and right of the arrow; None stands for ``-``."""

    text: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]


class RowError(ValueError):
    """A row that does not parse, or that does not fit the shapes of a call."""


TOKEN = re.compile(r"\s*(\.\.\.|[A-Za-z_]\w*!?|\d+|[()+-])")


def _factor(token: str, text: str) -> Factor:
    if token.isdigit():
        return Factor(token, True, int(token))
    if not re.fullmatch(r"[A-Za-z_]\w*!?", token):
        raise RowError(f"row {text!r}: expected a letter, found {token!r}")
    return Factor(token.rstrip("!"), token.endswith("!"))


def _operand(text: str, row: str) -> Operand:
    tokens, at = [], 0
    stripped = text.rstrip()
    while at < len(stripped):
        match = TOKEN.match(stripped, at)
        if match is None:
            raise RowError(f"row {row!r}: cannot read {stripped[at:].strip()!r}")
        tokens.append(match[1])
        at = match.end()
    if tokens == ["-"]:
        return None
    dims: list[Dim] = []
    while tokens:
        token = tokens.pop(0)
        if token == "...":
            dims.append(Dim((Factor("...", False),)))
        elif token == "(":
            if ")" not in tokens:
                raise RowError(f"row {row!r}: '(' without ')'")
            end = tokens.index(")")
            inner, tokens = tokens[:end], tokens[end + 1 :]
            joined = "+" if "+" in inner else "*"
            names = inner[::2] if joined == "+" else inner
            if (joined == "+" and (len(inner) % 2 == 0 or set(inner[1::2]) != {"+"})) or not names:
                raise RowError(f"row {row!r}: {' '.join(inner)!r} is neither a product nor a sum of parts")
            dims.append(Dim(tuple(_factor(name, row) for name in names), joined))
        else:
            dims.append(Dim((_factor(token, row),)))
    return tuple(dims)


@lru_cache(maxsize=4096)
def parse(text: str) -> Row:
    """Read one row. Raises RowError, with the row and the reason, where it breaks the grammar."""
    if text.count("->") != 1:
        raise RowError(f"row {text!r}: needs exactly one '->'")
    left, right = text.split("->")
    inputs = tuple(_operand(o, text) for o in left.split(",")) if left.strip() else ()
    outputs = tuple(_operand(o, text) for o in right.split(","))
    for operand in (*inputs, *outputs):
        if operand and sum(d.factors[0].name == "..." for d in operand) > 1:
            raise RowError(f"row {text!r}: '...' twice in one operand")
    return Row(text, inputs, outputs)


@dataclass(frozen=True)
class Strategy:
    """One way to run an operator along one mesh axis.

    name         the letter that is split, or R, C or P where none is; with AGAIN behind it where an operand is saved in
                 part and gathered again for backward
    inputs       the placement in which every operand is taken; None for what is no tensor
    outputs      the placement in which every output is made
    local        the function that runs on a shard where the operator itself would be wrong; "" for the operator
    shards_work  whether each rank does a share of the work; else every rank does all of it
    """

    name: str
    inputs: tuple[Placement | None, ...]
    outputs: tuple[Placement, ...]
    local: str = ""
    shards_work: bool = False

    @property
    def split(self) -> str:
        """The name without AGAIN."""
        return self.name.removesuffix(AGAIN)
