"""The folded graph: runs of nodes that stay together, equal runs known as one class."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import fx

from autopart.ir.fingerprint import Fingerprints, is_own, is_own_name, parameter_token
from autopart.ir.graph import Traced, info, is_pick, value_of


@dataclass
class Segment:
    """Consecutive nodes that stay together."""

    label: str
    nodes: list[fx.Node]
    kind: int = 0
    """The class: equal numbers, equal structure."""
    externals: tuple[fx.Node, ...] = ()
    """Values from other runs, in order of first use."""


@dataclass(eq=False)
class LayeredGraph:
    """The graph in runs.

    free      nodes that carry no gradient and need no run's values: recomputed wherever they are needed
    same      node or parameter -> the one that stands for its class
    count     how many nodes of the model each representative stands for
    keys      representative -> its name in plans: "model.layers.0.mlp.up_proj/linear", or the parameter's own
    sequence  the model as a row of positions, each the index of its run: a block that was traced once or twice may
              stand at many positions;  labels: of every position
    repeated  position of a block that was not traced -> the runs of the period before the one that stands for it
    walked    why lists of equal blocks were traced whole, in words; "" where they were not, or there are none
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
    traced_in_full: str = ""

    def segment_of(self) -> dict[fx.Node, int]:
        """Node -> index of its run."""
        return {n: i for i, segment in enumerate(self.segments) for n in segment.nodes}

    def representatives(self) -> list[fx.Node]:
        """The nodes to decide about, in graph order; picks of outputs are none of them."""
        return [n for n in self.traced.graph.nodes if n in self.same and self.same[n] is n and not is_pick(n)]

    @cached_property
    def by_name(self) -> dict[str, fx.Node]:
        """The nodes of the graph by their names in it, which `Info.root` and `Info.keeps` tell."""
        return {node.name: node for node in self.traced.graph.nodes}

    @cached_property
    def keepers(self) -> dict[str, set[int]]:
        """Node -> the runs that keep its memory for their backward."""
        keepers: dict[str, set[int]] = {}
        for node, segment in self.segment_of().items():
            for root in info(node).keeps:
                keepers.setdefault(root, set()).add(segment)
        return keepers

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter of the model."""
        return self.traced.parameters

    @property
    def operators(self) -> int:
        """How many operators the whole model has."""
        return sum(times for node, times in self.count.items() if info(node).kind == "op")

    def parameter_at(self, position: int, node: fx.Node) -> str:
        """What a parameter that the run at a position reads is called there."""
        label, name = self.segments[self.sequence[position]].label, info(node).name
        return self.labels[position] + name[len(label) :] if is_own_name(name, label) else name

    @cached_property
    def readers(self) -> dict[str, list[int]]:
        """Parameter -> the positions that read it."""
        found = defaultdict[str, list[int]](list)
        for position, segment in enumerate(self.sequence):
            for name in dict.fromkeys(self.parameter_at(position, n) for n in used_parameters(self.segments[segment])):
                found[name].append(position)
        return found

    @cached_property
    def locations(self) -> dict[fx.Node, tuple[int, int]]:
        """Node -> index of its run, and its own in there."""
        return {node: (i, k) for i, segment in enumerate(self.segments) for k, node in enumerate(segment.nodes)}

    def sources(self, position: int) -> tuple[tuple[int, int] | None, ...]:
        """For each external of the run at a position: the position that makes the value and the index of the node
        there; None for what is made in no run."""
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
            found.append(tuple(row))
            latest[index] = position
        return found

    @cached_property
    def hash(self) -> str:
        """Identifies what the whole model computes: the same for every size of a micro-batch, and for a graph of which
        only a part was traced."""
        prints = Fingerprints(self.traced.graph, self.traced.micro_batch)
        texts = [_text(segment, prints) for segment in self.segments]
        kinds: dict[int, int] = {}
        latest: dict[int, int] = {}
        total = hashlib.sha256()
        for position, index in enumerate(self.sequence):
            segment, label = self.segments[index], self.labels[position]
            outside = [
                source or prints.outside(node, segment.label)
                for node, source in zip(segment.externals, self.sources(position), strict=True)
            ]
            number = kinds.setdefault(segment.kind, len(kinds))
            total.update(repr((label, number, texts[index], outside)).encode())
            latest[index] = position
        for node in self.traced.graph.output_node().all_input_nodes:
            location = self.locations.get(node)
            made = prints.outside(node, "") if location is None else (latest[location[0]], location[1])
            total.update(repr(made).encode())
        total.update(repr((self.parameters(), self.traced.updated)).encode())
        return total.hexdigest()[:16]


def _text(segment: Segment, prints: Fingerprints) -> str:
    """What a run computes, with local numbers for names."""
    tokens: dict[fx.Node, tuple[Any, ...]] = {node: ("external", i) for i, node in enumerate(segment.externals)}
    total = hashlib.sha256()
    for i, node in enumerate(segment.nodes):
        tokens |= {p: parameter_token(info(p), segment.label) for p in parameters_of(node)}
        total.update(prints.call(node, tokens, segment.label).encode())
        tokens[node] = ("node", i)
    return total.hexdigest()


def node_keys(nodes: Iterable[fx.Node]) -> dict[fx.Node, str]:
    """A name of its own for every node, which does not depend on what else the graph holds."""
    keys: dict[fx.Node, str] = {}
    seen: Counter[str] = Counter()
    for node in nodes:
        record = info(node)
        name = record.name if record.kind != "op" else f"{record.module}/{record.name.rpartition('aten.')[2]}"
        seen[name] += 1
        keys[node] = name if seen[name] == 1 else f"{name}#{seen[name]}"
    return keys


def own_values(segment: Segment) -> list[fx.Node]:
    """What belongs to a run's block alone but is made in no run: its parameters, its buffers, what it makes of them
    and of inputs."""
    found = dict.fromkeys(p for p in used_parameters(segment) if is_own_name(info(p).name, segment.label))
    todo = [n for n in segment.externals if n not in set(segment.nodes)]
    while todo:
        node = todo.pop()
        if info(node).kind != "parameter" and is_own(node, segment.label) and not info(node).grad and node not in found:
            found[node] = None
            todo += node.all_input_nodes
    return list(found)


def parameters_of(node: fx.Node) -> list[fx.Node]:
    """The parameters an operator reads, in order."""
    return [n for n in node.all_input_nodes if info(n).kind == "parameter"]


def crossing(layered: LayeredGraph) -> list[list[tuple[fx.Node, int]]]:
    """For every place between run i-1 and run i: the values made before it that are needed after it."""
    segment_of = layered.segment_of()
    last: dict[tuple[fx.Node, int], int] = {}
    for node, index in segment_of.items():
        for source in node.all_input_nodes:
            if source in segment_of:
                value = value_of(source)
                last[value] = max(last.get(value, 0), index)
    return [
        [value for value, end in last.items() if segment_of[value[0]] < location <= end]
        for location in range(len(layered.segments) + 1)
    ]


def used_parameters(segment: Segment) -> list[fx.Node]:
    """The parameters a run reads, each once."""
    return list(dict.fromkeys(p for n in segment.nodes for p in parameters_of(n)))
