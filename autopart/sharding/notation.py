"""The rule notation: one line of einsum-like letters says how an operator may be split.

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
    on both sides    each rank computes its part
    left side only   the output is a partial sum
    right side only  each rank makes its part
    in some inputs   the other inputs are whole, and their gradients partial sums

In a product only the factor behind the literals splits: ``(h d)`` splits h, ``(3 n)`` splits n in each of
the three segments. The letters of ``(q+k+v)`` split together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one tensor lies along one mesh axis, together with where its gradient lies.

    R  whole on every rank, gradient whole on every rank
    C  whole on every rank, gradient a partial sum ("copied" into a split region)
    G  like C, made from a split tensor, of which each rank keeps its part alone: gathered again for backward
    S  split along `dim`; gradient split alike. `parts`, if given, are the sizes of the segments
       the dim consists of; each segment is split on its own
    P  a partial sum, gradient whole on every rank
    M  every rank holds all of it, but only its share of the places along `dim` means anything, and only they have a
       gradient: rows that belong to experts of its own
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
    """Each rank's own places along `dim` mean something."""
    return Placement("M", dim)


def S(dim: int, parts: Sequence[int] = ()) -> Placement:
    """Split along `dim`, each of `parts` on its own."""
    return Placement("S", dim, tuple(parts) if len(parts) > 1 else ())


AGAIN = "+again"
"""Behind the name of a strategy that keeps a part of an operand it takes whole."""


def kept_as(placement: Placement) -> Placement:
    """How memory lies that is kept for backward, told apart by the bytes it takes: a part, or the whole."""
    return Placement("S") if placement.kind in "SG" else R


def splits(placement: Placement, shape: Shape, shards: int) -> bool:
    """Whether `shape` can be split evenly as `placement` says."""
    return placement.kind != "S" or all(p % shards == 0 for p in placement.parts or (shape[placement.dim],))


@dataclass(frozen=True, slots=True)
class Factor:
    name: str
    fixed: bool
    size: int | None = None


@dataclass(frozen=True, slots=True)
class Dim:
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
    """A row that does not parse, or does not fit the shapes it is used with."""


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
    """Read one row. Raises RowError with the row and the reason."""
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
    """One way to run one operator along one mesh axis: what it takes and what it gives.

    `name` is the split letter, or R, C or P where nothing is split; AGAIN behind it says that of an operand a part is
    kept, which is gathered again for backward. `local` names the function that replaces the operator on a shard, where
    the plain operator would be wrong. `shards_work` says whether each rank does a share of the work (else all of it).
    """

    name: str
    inputs: tuple[Placement | None, ...]
    outputs: tuple[Placement, ...]
    local: str = ""
    shards_work: bool = False

    @property
    def split(self) -> str:
        """The name without what is kept of operands."""
        return self.name.removesuffix(AGAIN)
