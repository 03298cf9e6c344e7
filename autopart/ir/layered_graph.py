"""The layered graph: the nodes in segments that stay together in a stage, with equal segments known as one class."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import fx

from autopart.ir.fingerprint import Fingerprints, is_own, is_own_name, parameter_token
from autopart.ir.graph import Traced, info, is_pick


@dataclass
class Segment:
    """Consecutive nodes that stay together in a stage: those of one numbered block, or of what is between blocks."""

    label: str
    nodes: list[fx.Node]
    segment_class: int = 0
    """The class: segments with equal numbers compute the same."""
    externals: tuple[fx.Node, ...] = ()
    """The values from outside of the segment, in order of first use."""


@dataclass(eq=False)
class LayeredGraph:
    """The graph in segments, and the model as a row of positions.

    segments        the traced segments, in order
    free            nodes without gradient that need no segment's values, such as masks: every stage computes its own.
                    What one block alone reads and makes is in the block's segment
    same            node or parameter -> its representative, the first of its class; for equal iterations of a loop, the
                    last of the first ones (`passes.loop_iterations`)
    count           representative -> how many nodes of the model it stands for
    keys            representative -> its name in plans: "model.layers.0.mlp.up_proj/linear", or the parameter's name
    sequence        the model as a row of positions: the index of the segment at each. A block that was traced once or
                    twice may stand at many positions.
    labels          the label of every position
    repeated        position of a block that was not traced -> the segments of the period before the one that stands
                    for it
    handed_on       position of a block, in lists of mixed kinds -> which externals of its segment are the value that
                    the block before hands on, and (position, index in the segment) of the node that makes it
    traced_in_full  why lists of equal blocks were traced in full, in words; "" where they were not
    """

    traced: Traced
    segments: list[Segment]
    free: list[fx.Node]
    same: dict[fx.Node, fx.Node]
    count: Counter[fx.Node]
    keys: dict[fx.Node, str]
    sequence: tuple[int, ...]
    labels: tuple[str, ...]
    repeated: dict[int, range] = field(default_factory=dict)
    handed_on: dict[int, tuple[frozenset[int], tuple[int, int]]] = field(default_factory=dict)
    traced_in_full: str = ""

    def segment_of(self) -> dict[fx.Node, int]:
        """Node -> the index of its segment."""
        return {n: i for i, segment in enumerate(self.segments) for n in segment.nodes}

    def representatives(self) -> list[fx.Node]:
        """The representatives in graph order, without picks of outputs: the nodes that take a strategy."""
        return [n for n in self.traced.graph.nodes if n in self.same and self.same[n] is n and not is_pick(n)]

    @cached_property
    def by_name(self) -> dict[str, fx.Node]:
        """The nodes of the graph by their names in it, which `Info.root` and `Info.saves` tell."""
        return {node.name: node for node in self.traced.graph.nodes}

    @cached_property
    def savers(self) -> dict[str, set[int]]:
        """Name of a node -> the segments that save its memory for their backward."""
        savers: dict[str, set[int]] = {}
        for node, segment in self.segment_of().items():
            for root in info(node).saves:
                savers.setdefault(root, set()).add(segment)
        return savers

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter of the model."""
        return self.traced.parameters

    @property
    def operators(self) -> int:
        """How many operators the whole model has."""
        return sum(times for node, times in self.count.items() if info(node).kind == "op")

    def parameter_at(self, position: int, node: fx.Node) -> str:
        """The name, at a position, of a parameter that the segment there reads."""
        label, name = self.segments[self.sequence[position]].label, info(node).name
        return self.labels[position] + name[len(label) :] if is_own_name(name, label) else name

    @cached_property
    def readers(self) -> dict[str, list[int]]:
        """Name of a parameter -> the positions that read it."""
        found = defaultdict[str, list[int]](list)
        for position, segment in enumerate(self.sequence):
            for name in dict.fromkeys(self.parameter_at(position, n) for n in used_parameters(self.segments[segment])):
                found[name].append(position)
        return found

    @cached_property
    def locations(self) -> dict[fx.Node, tuple[int, int]]:
        """Node -> the index of its segment, and its own index in the segment."""
        return {node: (i, k) for i, segment in enumerate(self.segments) for k, node in enumerate(segment.nodes)}

    @cached_property
    def latest(self) -> dict[int, int]:
        """Index of a segment -> the last position at which it stands."""
        return {segment: position for position, segment in enumerate(self.sequence)}

    def earlier(self, position: int, node: fx.Node) -> fx.Node:
        """The node that stands for a node of the segment at a position as to who reads its value: where the segment
        stands for blocks behind the position too, the same node of the period before, whose readers were traced."""
        index, place = self.locations[node]
        behind = [p for p in self.repeated if self.sequence[p] == index]
        if position == self.latest[index] or not behind:
            return node
        return self.segments[index - len(self.repeated[behind[0]])].nodes[place]

    def readers_of(self, node: fx.Node) -> set[int | None]:
        """The segments that read a node's values; None for nodes of no segment."""
        users = [reader for user in node.users for reader in (user.users if is_pick(user) else [user])]
        return {self.locations[user][0] if user in self.locations else None for user in users}

    def sources(self, position: int) -> tuple[tuple[int, int] | None, ...]:
        """For each external of the segment at a position: the position that makes the value, and the node's index in
        the segment there; None for what no segment makes."""
        return self._sources[position]

    @cached_property
    def _sources(self) -> list[tuple[tuple[int, int] | None, ...]]:
        latest: dict[int, int] = {}
        found = []
        for position, index in enumerate(self.sequence):
            before = self.repeated.get(position, range(0))
            locations = [self.locations.get(node) for node in self.segments[index].externals]
            row = []
            for location in locations:
                made = location and location[0] + (len(before) if location[0] in before else 0)
                row.append(None if location is None or made is None else (latest[made], location[1]))
            places, maker = self.handed_on.get(position, (frozenset[int](), None))
            found.append(tuple(maker if k in places else source for k, source in enumerate(row)))
            latest[index] = position
        return found

    @cached_property
    def hash(self) -> str:
        """A hash of what the whole model computes. It is the same for every size of a micro-batch, and whether or not
        equal blocks were left out of the trace."""
        prints = Fingerprints(self.traced.graph, self.traced.micro_batch)
        ranks = [self._ranks(segment) for segment in self.segments]
        texts = [_text(segment, prints, rank) for segment, rank in zip(self.segments, ranks, strict=True)]
        kinds: dict[int, int] = {}
        latest: dict[int, int] = {}
        total = hashlib.sha256()
        for position, index in enumerate(self.sequence):
            segment, label = self.segments[index], self.labels[position]
            outside = [
                (source[0], ranks[self.sequence[source[0]]][source[1]])
                if source
                else prints.outside(node, segment.label)
                for node, source in zip(segment.externals, self.sources(position), strict=True)
            ]
            number = kinds.setdefault(segment.segment_class, len(kinds))
            total.update(repr((label, number, texts[index], outside)).encode())
            latest[index] = position
        for node in self.traced.graph.output_node().all_input_nodes:
            location = self.locations.get(node)
            made = (
                prints.outside(node, "") if location is None else (latest[location[0]], ranks[location[0]][location[1]])
            )
            total.update(repr(made).encode())
        total.update(repr((self.parameters(), self.traced.updated)).encode())
        return total.hexdigest()[:16]

    def _ranks(self, segment: Segment) -> list[int]:
        """Of every node of a segment, the number of the node that stands for it in a loop, or its own, among the nodes
        that do."""
        places = [self.locations[self.same[node]][1] for node in segment.nodes]
        numbers = {place: number for number, place in enumerate(p for i, p in enumerate(places) if p == i)}
        return [numbers[place] for place in places]


def _text(segment: Segment, prints: Fingerprints, ranks: Iterable[int]) -> str:
    """A hash of what a segment computes, with local numbers, `ranks`, in place of names. Of equal iterations of a loop
    one counts."""
    tokens: dict[fx.Node, tuple[Any, ...]] = {node: ("external", i) for i, node in enumerate(segment.externals)}
    total = hashlib.sha256()
    last = -1
    for rank, node in zip(ranks, segment.nodes, strict=True):
        tokens[node] = ("node", rank)
        if rank <= last:
            continue
        last = rank
        tokens |= {p: parameter_token(info(p), segment.label) for p in parameters_of(node)}
        total.update(prints.call(node, tokens, segment.label).encode())
    return total.hexdigest()


def node_keys(nodes: Iterable[fx.Node]) -> dict[fx.Node, str]:
    """Node -> a name of its own: of a parameter its name, of an operator "module/operator", numbered where it
    repeats."""
    keys: dict[fx.Node, str] = {}
    seen: Counter[str] = Counter()
    for node in nodes:
        record = info(node)
        name = record.name if record.kind != "op" else f"{record.module}/{record.name.rpartition('aten.')[2]}"
        seen[name] += 1
        keys[node] = name if seen[name] == 1 else f"{name}#{seen[name]}"
    return keys


def own_values(segment: Segment) -> list[fx.Node]:
    """What belongs to a segment's block alone but is made in no segment: the block's parameters and buffers, and what
    it makes of them and of inputs without a gradient."""
    found = dict.fromkeys(p for p in used_parameters(segment) if is_own_name(info(p).name, segment.label))
    todo = [n for n in segment.externals if n not in set(segment.nodes)]
    while todo:
        node = todo.pop()
        if info(node).kind != "parameter" and is_own(node, segment.label) and not info(node).grad and node not in found:
            found[node] = None
            todo += node.all_input_nodes
    return list(found)


def parameters_of(node: fx.Node) -> list[fx.Node]:
    """The parameters that an operator reads, in order."""
    return [n for n in node.all_input_nodes if info(n).kind == "parameter"]


def used_parameters(segment: Segment) -> list[fx.Node]:
    """The parameters that a segment reads, each once."""
    return list(dict.fromkeys(p for n in segment.nodes for p in parameters_of(n)))
