"""Expressions with their precedence, and the names that are in use in a function."""

import builtins
import itertools
import keyword
import re
from collections.abc import Callable, Container
from dataclasses import dataclass, field

from torch import fx, nn

from autopart import runtime
from autopart.kernels.table import KERNELS

RESERVED = {*keyword.kwlist, *dir(builtins), *runtime.__all__, "torch", "nn", "F", "layer", *KERNELS, "self",
            "groups", "name"}  # fmt: skip
"""Names that emitted functions use for something other than a value."""

ATTRIBUTES = {*keyword.kwlist, *dir(nn.Module()), "dp", "tp", "device", "valid", "inputs", "received", "sent",
              "gathers_again", "count_valid"}  # fmt: skip
"""Attributes of emitted modules that are no weight, no buffer and no list of blocks, and words that are none."""

ATOM, UNARY, BINARY = 3, 2, 1
"""Precedence of an expression: the greater, the tighter it binds."""


@dataclass(frozen=True)
class Expression:
    """An expression as source text, with its precedence."""

    code: str
    binds: int = ATOM

    def within(self, binds: int) -> str:
        """The expression as an operand that must bind so tightly: in parentheses where it binds less."""
        return self.code if self.binds >= binds else f"({self.code})"


def free_name(wanted: str, taken: Container[str], separator: str = "_") -> str:
    """`wanted` as an identifier, with a number behind it where that is taken."""
    wanted = re.sub(r"\W|^(?=\d)", "_", wanted)
    numbered = (f"{wanted}{separator}{i}" for i in itertools.count(2))
    return next(name for name in itertools.chain([wanted], numbered) if name not in taken)


@dataclass
class Scope:
    """One function that is being written, of a module of its own.

    names       node -> the expression that stands for it
    holders     name in use -> the node whose value it has now; None for a name that is reserved
    lines       of the function so far
    attributes  of the module that are taken
    """

    names: dict[fx.Node, Expression] = field(default_factory=dict)
    holders: dict[str, fx.Node | None] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    attributes: set[str] = field(default_factory=lambda: set(ATTRIBUTES))

    def attribute(self, wanted: str) -> str:
        """A free attribute of the module, taken from now on: `wanted`, or `wanted` with a number."""
        name = free_name(wanted, self.attributes)
        self.attributes.add(name)
        return name

    def name(self, node: fx.Node, wanted: str, is_dead: Callable[[fx.Node], bool] = lambda _: False) -> str:
        """Name a node `wanted`, or `wanted` with a number where another value has that name. Returns the name.

        The name of a dead value, which no later line reads, is free.
        """
        wanted = re.sub(r"\W", "_", wanted) or "value"
        wanted = f"_{wanted}" if wanted[0].isdigit() else wanted
        numbered = (f"{wanted}_{i}" for i in itertools.count(2))
        name = wanted
        while name in RESERVED or (name in self.holders and not self._is_given_away(name, is_dead)):
            name = next(numbered)
        self.holders[name] = node
        self.names[node] = Expression(name)
        return name

    def _is_given_away(self, name: str, is_dead: Callable[[fx.Node], bool]) -> bool:
        holder = self.holders[name]
        return holder is not None and is_dead(holder)

    def reserve(self, name: str) -> None:
        """Reserve a name for something that is no value of the graph."""
        self.holders[name] = None

    def is_inline(self, node: fx.Node) -> bool:
        """Whether a written node has no name, but is part of another node's expression."""
        return node in self.names and self.names[node].code not in self.holders
