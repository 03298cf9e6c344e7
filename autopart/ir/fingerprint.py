"""Fingerprints: text of what a graph computes, the same for every batch size and for every number of traced blocks."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from autopart.ir.graph import Info, calls, info, shape_args
from autopart.ir.random_ops import relative
from autopart.sharding.rules import RULES, row_of
from autopart.sharding.rules.base import replaced
from autopart.sharding.rules.factories import BY_PLACE

EXACT = frozenset({"aten.pow.Tensor_Scalar", "aten.pow.Scalar"})
"""Operators of which a float argument decides what is computed, and what autograd saves."""

PLACES = {"aten.select.int": 2}
"""Operators that take one of equal parts of a tensor -> the argument that says which part."""

PLACED = frozenset(f"aten.{name}" for name in BY_PLACE)


@dataclass(frozen=True)
class Token:
    """What stands for a node among the arguments of a call."""

    what: tuple[Any, ...]


def parameter_token(record: Info, label: str) -> tuple[Any, ...]:
    """A parameter as a segment of this label reads it: by its name in the block, if it is the block's own."""
    return ("parameter", own_name(record.name, label), record.shapes, record.dtypes, record.grad)


def own_name(name: str, label: str) -> str:
    """The name of a tensor in its block, if it is the block's own; else "/" and the whole name."""
    return name.removeprefix(label + ".") if is_own_name(name, label) else f"/{name}"


def is_own_name(name: str, label: str) -> bool:
    """Whether a tensor of this name is in the block of this label."""
    return bool(label) and name.startswith(label + ".")


def is_own(node: fx.Node, label: str) -> bool:
    """Whether a value that no segment makes belongs to the block of this label alone: it is a buffer or a constant of
    the block, or made in the block from buffers and inputs."""
    record = info(node)
    return is_own_name(record.name, label) or (bool(label) and record.layer == label)


class Fingerprints:
    """Texts of values and calls, without the sizes that depend on the batch size."""

    def __init__(self, graph: fx.Graph, samples: int) -> None:
        self.samples = samples
        self.constant: set[fx.Node] = set()
        """Operators that no input, buffer or parameter reaches, such as positions and masks."""
        for node in calls(graph):
            if self.constant.issuperset(node.all_input_nodes):
                self.constant.add(node)
        self.known: dict[tuple[fx.Node, str], str] = {}

    def outside(self, node: fx.Node, label: str) -> str:
        """The fingerprint of a value that no segment makes, as a segment of this label reads it."""
        found = self.known.get((node, label))
        if found is None:
            record = info(node)
            if record.kind == "op":
                text = self.call(node, {n: ("outside", self.outside(n, label)) for n in node.all_input_nodes}, label)
            else:
                name = own_name(record.name, label) if record.kind == "buffer" else record.name
                name = "a constant" if record.kind == "buffer" and record.layer == label != "" else name
                text = repr((record.kind, name, self.sizes(node), record.dtypes))
            found = self.known[node, label] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return found

    def call(self, node: fx.Node, tokens: Mapping[fx.Node, tuple[Any, ...]], label: str) -> str:
        """The text of an operator's call, with tokens in place of its operands, and of the row by which it may be
        split.

        The row counts: a tensor that is copied once for every sample has as many parts as there are samples.
        """
        record = info(node)
        given = without_values(record.name, _without_sizes(record.name, tuple(node.args)), node.kwargs)
        args, kwargs = fx.map_arg(given, lambda n: Token(tokens[n]))  # type: ignore[arg-type,return-value]
        about = (
            *(record.name, relative(args, label), kwargs, self.sizes(node), record.dtypes, record.grad),
            row_of(record.name, shape_args(node), record.shapes),
        )
        return repr(about)

    def sizes(self, node: fx.Node) -> Any:
        """The part of a value's shape that no batch size changes.

        This is all of a buffer's shape, and all of attention's but the samples. Of another value it is the rank and, if
        a dim counts samples, the elements of one sample. Which dim that is may depend on the sizes, where samples and
        tokens are one dim. Constants are told by the rank alone: a dim of as many heads as there are samples would be
        taken for samples.
        """
        record = info(node)
        if record.kind == "buffer":
            return record.shapes
        if len(record.shapes) != 1:
            return len(record.shapes)
        if record.name.endswith("attention"):
            return record.shape[1:]
        elements = math.prod(record.shape)
        counted = record.batch is not None and node not in self.constant and elements % self.samples == 0
        each = elements // self.samples if counted else None
        return len(record.shape), each


def _without_sizes(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A call's arguments without the sizes of its output."""
    rule = RULES.get(name)
    if rule is None or callable(rule.resize) or name in PLACED:
        return tuple(_without_numbers(a) for a in args)
    return args if rule.resize is None else replaced(args, rule.resize, "size")


def without_values(name: str, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A call's arguments with a word in place of numbers whose value changes no cost: floats, as a factor that depends
    on a block's depth or the number of tokens that a mean divides by, of which 0, 1 and infinities are told apart; and
    which of the equal parts of a tensor is taken, as by each block its own."""
    if name in EXACT:
        return args, dict(kwargs)
    if name in PLACES:
        return type(args)("part" if i == PLACES[name] else value for i, value in enumerate(args)), dict(kwargs)

    def word(value: Any) -> Any:
        return "float" if type(value) is float and math.isfinite(value) and value not in (0.0, 1.0) else value

    return type(args)(map(word, args)), {key: word(value) for key, value in kwargs.items()}


def _without_numbers(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_without_numbers(v) for v in value]
    return "number" if type(value) is int else value
