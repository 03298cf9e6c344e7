"""What a folded graph computes, as text that is the same for every batch size, and however much of it was traced."""

from __future__ import annotations

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

LARGE = 8.0
"""From here on a whole number among the arguments is taken for a count."""

PLACED = frozenset(f"aten.{name}" for name in BY_PLACE)


@dataclass(frozen=True)
class Token:
    """Stands for a node among the arguments of a call."""

    what: tuple[Any, ...]


def parameter_token(record: Info, label: str) -> tuple[Any, ...]:
    """A parameter as a run of this label sees it: by its name in the block, if it is the block's own."""
    return ("parameter", own_name(record.name, label), record.shapes, record.dtypes, record.grad)


def own_name(name: str, label: str) -> str:
    """The name told from the block on, if the tensor is the block's own."""
    return name.removeprefix(label + ".") if is_own_name(name, label) else f"/{name}"


def is_own_name(name: str, label: str) -> bool:
    """Whether a tensor of this name is the block's own."""
    return bool(label) and name.startswith(label + ".")


def is_own(node: fx.Node, label: str) -> bool:
    """Whether a value that is made in no run belongs to the block of this label alone: its buffers, and what it makes
    of inputs."""
    record = info(node)
    return is_own_name(record.name, label) if record.kind == "buffer" else bool(label) and record.layer == label


class Fingerprints:
    """Texts of values and calls without sizes that depend on the batch's."""

    def __init__(self, graph: fx.Graph, samples: int) -> None:
        self.samples = samples
        self.constant: set[fx.Node] = set()
        """Operators that no input, buffer or parameter reaches: positions, masks, zeros."""
        for node in calls(graph):
            if self.constant.issuperset(node.all_input_nodes):
                self.constant.add(node)
        self.known: dict[tuple[fx.Node, str], str] = {}

    def outside(self, node: fx.Node, label: str) -> str:
        """Of a value that is made in no run, as a run of this label sees it."""
        found = self.known.get((node, label))
        if found is None:
            record = info(node)
            if record.kind == "op":
                text = self.call(node, {n: ("outside", self.outside(n, label)) for n in node.all_input_nodes}, label)
            else:
                name = own_name(record.name, label) if record.kind == "buffer" else record.name
                text = repr((record.kind, name, self.sizes(node), record.dtypes))
            found = self.known[node, label] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return found

    def call(self, node: fx.Node, tokens: Mapping[fx.Node, tuple[Any, ...]], label: str) -> str:
        """Of an operator's call, its operands called by their tokens, and the row by which it may be split: what is
        copied once a sample has as many segments as there are samples."""
        record = info(node)
        given = tuple(map(_without_counts, _without_sizes(record.name, tuple(node.args))))
        args, kwargs = fx.map_arg((given, node.kwargs), lambda n: Token(tokens[n]))  # type: ignore[arg-type,return-value]
        about = (
            *(record.name, relative(args, label), kwargs, self.sizes(node), record.dtypes, record.grad),
            row_of(record.name, shape_args(node), record.shapes),
        )
        return repr(about)

    def sizes(self, node: fx.Node) -> Any:
        """What the shape tells that no batch size changes: of a buffer all, of attention all but the samples; of other
        values the rank, and the elements of a sample where a dim counts samples. Which dim it is may depend on the
        sizes, where tokens are counted with samples; whether there is one does, in constants: as many heads as samples
        look like samples."""
        record = info(node)
        if record.kind == "buffer":
            return record.shapes
        if len(record.shapes) != 1:
            return len(record.shapes)
        if record.name == "aten.scaled_dot_product_attention":
            return record.shape[1:]
        elements = math.prod(record.shape)
        counted = record.batch is not None and node not in self.constant and elements % self.samples == 0
        each = elements // self.samples if counted else None
        return len(record.shape), each


def _without_sizes(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A call's arguments without those that are sizes of its output."""
    rule = RULES.get(name)
    if rule is None or callable(rule.resize) or name in PLACED:
        return tuple(_without_numbers(a) for a in args)
    return args if rule.resize is None else replaced(args, rule.resize, "size")


def _without_counts(value: Any) -> Any:
    """A large whole number is a count, as of the tokens that a mean divides by, and grows with the batch."""
    return "count" if isinstance(value, float) and value.is_integer() and abs(value) >= LARGE else value


def _without_numbers(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_without_numbers(v) for v in value]
    return "number" if type(value) is int else value
