"""LayeredGraph -> the positions where values are made, used and saved. They are the same for every degree.

A place is one occurrence of a value in the model. Places where the same nodes use a value in the same pattern are one
`ValueUses`, so that equal blocks have one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import fx

from autopart.ir.fingerprint import is_own
from autopart.ir.graph import info, is_pick, loss_of, made_by, operands, updates_of, value_of
from autopart.ir.layered_graph import LayeredGraph
from autopart.passes.loop_iterations import loop_iterations
from autopart.sharding.notation import Strategy
from autopart.sharding.strategy_table import SavedTensor, ValueUses


@dataclass(frozen=True)
class Write:
    """The write of a buffer's new value, one for all buffers of equal blocks.

    buffer         the buffer's node
    taken          (node, output) of the new value
    segment_class  the class of the segment that makes the new value; -1 for the prelude, which every stage computes
    """

    buffer: int
    taken: tuple[int, int]
    segment_class: int


@dataclass(frozen=True)
class ValuePositions:
    """The parts of a `StrategyTable` that are the same for every degree of parallelism.

    nodes       the representatives. `StrategyTable.nodes` has the writes behind them, and a node that takes the loss
    index       representative -> its index in `nodes`
    value_uses  the values without their reshards
    times       node -> how many times it runs at a position, where it is of a loop
    iterations  the nodes of every operator that a loop repeats, in order (`loop_iterations`)
    saved_tensors, state, shared  as in `StrategyTable`
    """

    nodes: list[fx.Node]
    index: dict[fx.Node, int]
    value_uses: list[ValueUses]
    saved_tensors: list[SavedTensor]
    writes: list[Write]
    state: dict[int, list[tuple[int, ...]]]
    shared: dict[int, list[tuple[int, ...]]]
    times: Counter[fx.Node]
    iterations: list[list[int]] = field(default_factory=list)
    samples: dict[fx.Node, list[Strategy]] = field(default_factory=dict)
    """Node -> its strategies along the data-parallel axis, as far as they were asked for."""


_KNOWN: WeakKeyDictionary[LayeredGraph, ValuePositions] = WeakKeyDictionary()


def value_positions(layered: LayeredGraph) -> ValuePositions:
    """The positions of a layered graph, found once for each graph."""
    if layered not in _KNOWN:
        _KNOWN[layered] = _Finder(layered).find()
    return _KNOWN[layered]


@dataclass(frozen=True)
class _Use:
    """One use of a value at one place.

    node, operand  the index of the node that uses the value, and which operand it is
    position       the position of the use; -1 for a use in the prelude
    by             of a use in the prelude: the operator that uses the value
    written        of a use in the prelude: the position of the module whose buffer the value is written to
    """

    node: int
    operand: int
    position: int
    by: fx.Node | None = None
    written: int = -1


JOINS = ("aten.stack", "aten.cat")
"""Operators that take all their operands in one placement."""

Place = tuple[int, tuple[int, ...], tuple[tuple[int, ...], ...]]
"""Producer, consumers and dependents of a value, as in `ValueUses`."""

Used = dict[tuple[fx.Node, int, int, str], list[_Use]]
"""(node, output, position that makes the value, `_Finder._name`) -> the uses of the value at one place."""


class _Finder:
    """Finds the positions of all values, saved tensors and parameters of a layered graph.

    last        index of a segment -> the last position where it stands
    region      index of a segment that stands at several positions -> the first segment that repeats with it
    """

    def __init__(self, layered: LayeredGraph) -> None:
        self.layered = layered
        self.nodes = layered.representatives()
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.segment_of = layered.segment_of()
        self.last = {segment: position for position, segment in enumerate(layered.sequence)}
        self.region = _regions(layered.repeated.values())
        self.times = self._times()
        self.readers: dict[fx.Node, set[int]] = defaultdict(set)
        """Node -> the segments that read its value; -1 for a reader outside of all segments."""
        for node in layered.traced.graph.nodes:
            if node.op == "call_function" and not is_pick(node):
                for source in node.all_input_nodes:
                    self.readers[value_of(source)[0]].add(self.segment_of.get(node, -1))
        self.places: dict[tuple[Any, ...], Counter[Place]] = defaultdict(Counter)
        """Source, output, uses and whether each is inside -> how many times the value is made so at each place."""
        self.writes: list[Write] = []
        self.needed: dict[fx.Node, set[int]] = {}
        self.made_at: dict[fx.Node, set[int]] = defaultdict(set)
        """Node outside of all segments -> the positions of modules whose buffers its value is written to."""
        self.written: dict[int, list[int]] = defaultdict(list)
        """Index of a write of such a value -> the position of the module, for each buffer of its class."""

    def find(self) -> ValuePositions:
        """The fields of `ValuePositions`."""
        used = self._used()
        self._updates(used)
        self.needed = self._needed(used)
        for (source, output, home, _), uses in used.items():
            self._value(source, output, home, uses)
        source, output = value_of(loss_of(self.layered.traced.graph))
        home = self.last[self.segment_of[source]]
        self._value(source, output, home, [_Use(len(self.nodes) + len(self.writes), 0, home)])
        value_uses, saved, state = self._value_uses(), self._saved_tensors(), self._state()
        shared, iterations = self._shared(), self._iterations()
        return ValuePositions(
            self.nodes, self.index, value_uses, saved, self.writes, state, shared, self.times, iterations
        )

    def _times(self) -> Counter[fx.Node]:
        times = Counter({node: info(node).times for node in self.layered.free})
        for i, segment in enumerate(self.layered.segments):
            for node in segment.nodes:
                representative = self.layered.same[node]
                times[representative] += info(node).times * (self.segment_of[representative] == i)
        return times

    def _iterations(self) -> list[list[int]]:
        mine = [[n for n in segment.nodes if n in self.index] for segment in self.layered.segments]
        return [[self.index[node] for node in alike] for nodes in mine for alike in loop_iterations(nodes)]

    def _position(self, source: fx.Node, segment: int, position: int) -> int:
        """The position that makes a value which a node of `segment` reads at `position`.

        -1 for a value that every stage makes for itself.
        """
        made = self.segment_of.get(source)
        if made is None or made == segment:
            return -1 if made is None else position
        first = self.region.get(segment)
        return position - (segment - made) if first is not None and made >= first else self.last[made]

    def _handed_on(self, position: int) -> tuple[set[fx.Node], fx.Node | None, int]:
        """The nodes that stand, in the trace, for the value which the block before hands on to a block of a list of
        mixed kinds; the node that makes this value, and its position."""
        if position not in self.layered.handed_on:
            return set(), None, -1
        places, (home, place) = self.layered.handed_on[position]
        segments, sequence = self.layered.segments, self.layered.sequence
        externals = segments[sequence[position]].externals
        return {externals[k] for k in places}, segments[sequence[home]].nodes[place], home

    def _name(self, source: fx.Node, position: int) -> str:
        """The name of a place of a value that no segment makes: a parameter's name at the position; the position, of a
        value that one block alone reads; "" for other values, which have one place."""
        if position < 0 or source in self.segment_of:
            return ""
        if info(source).kind == "parameter":
            return self.layered.parameter_at(position, source)
        segment = self.layered.sequence[position]
        own = is_own(source, self.layered.segments[segment].label) and self.readers[source] == {segment}
        return str(position) if own else ""

    def _used(self) -> Used:
        """Every value at every place, with its uses."""
        used: Used = defaultdict(list)
        places = [
            (n, segment, p)
            for p, segment in enumerate(self.layered.sequence)
            for n in self.layered.segments[segment].nodes
        ]
        handed = {p: self._handed_on(p) for p in range(-1, len(self.layered.sequence))}
        for node, segment, position in [*places, *((n, -1, -1) for n in self.layered.free)]:
            stand_ins, made, before = handed[position]
            seen: dict[fx.Node, int] = {}
            for operand, argument in enumerate(operands(node)) if not is_pick(node) else ():
                if argument is not None:
                    source, output = value_of(made if made and argument in stand_ins else argument)
                    home = before if argument in stand_ins else self._position(source, segment, position)
                    if self.times[self.layered.same[source]] > 1 and info(node).name in JOINS:
                        operand = seen.setdefault(self.layered.same[source], operand)
                    key = source, output, home, self._name(source, position)
                    use = _Use(self.index[self.layered.same[node]], operand, position, node)
                    if use not in used[key][-1:]:
                        used[key].append(use)
        return used

    def _value(self, source: fx.Node, output: int, home: int, uses: Sequence[_Use]) -> None:
        index = self.index[self.layered.same[source]]
        inside = tuple(u.position == home for u in uses)
        several = len({u.position for u in uses}) > 1
        pairs = tuple((u.node, u.operand) for u in uses)
        place = home, tuple(u.position for u in uses), tuple(self._dependents(u) for u in uses)
        self.places[index, output, pairs, inside, several][place] += info(source).times

    def _value_uses(self) -> list[ValueUses]:
        """The values, apart where they are made another number of times at a place."""
        found: dict[tuple[Any, ...], ValueUses] = {}
        for key, places in self.places.items():
            source, output, uses, inside, _ = key
            for (producer, consumers, dependents), times in places.items():
                used = found.setdefault((key, times), ValueUses(source, output, uses, inside, times=times))
                used.producers.append(producer)
                used.consumers.append(consumers)
                used.dependents.append(dependents)
        return list(found.values())

    def _dependents(self, use: _Use) -> tuple[int, ...]:
        """The positions whose stages compute a use."""
        if use.position >= 0:
            return (use.position,)
        return tuple(sorted(self.needed[use.by])) if use.by is not None else (use.written,)

    def _updates(self, used: Used) -> None:
        """Add the writes of buffers, one for each class of buffers, as uses of the new values."""
        buffers = {info(n).name: n for n in self.layered.same if info(n).kind == "buffer"}
        modules = {info(n).module: self.last[segment] for n, segment in self.segment_of.items()}
        known: dict[tuple[int, int, int], int] = {}
        for name, node in updates_of(self.layered.traced).items():
            source, output = value_of(node)
            buffer, segment = self.index[self.layered.same[buffers[name]]], self.segment_of.get(source)
            taken = self.index[self.layered.same[source]], output
            if (buffer, *taken) not in known:
                known[buffer, *taken] = len(self.nodes) + len(self.writes)
                self.writes.append(
                    Write(buffer, taken, -1 if segment is None else self.layered.segments[segment].segment_class)
                )
            home, module = -1 if segment is None else self.last[segment], modules.get(name.rpartition(".")[0], 0)
            use = _Use(known[buffer, *taken], 1, home, written=module)
            others = used.get((source, output, home, ""), [])
            alone = home < 0 or any(u.position != home for u in others)
            used[source, output, home, name if alone else ""].append(use)
            if segment is None:
                self.made_at[source].add(module)
                self.written[use.node].append(module)

    def _saved_tensors(self) -> list[SavedTensor]:
        """The saved tensors, with the nodes that save them at every place."""
        by_name = {n.name: n for n in self.layered.traced.graph.nodes}
        kept: dict[tuple[str, int], list[_Use]] = defaultdict(list)
        for position, segment in enumerate(self.layered.sequence):
            stand_ins, made, before = self._handed_on(position)
            roots = {info(n).root: info(made).root for n in stand_ins if made}
            for node in self.layered.segments[segment].nodes:
                for read in () if is_pick(node) else info(node).saves:
                    through = [i for i, n in enumerate(operands(node)) if n is not None and info(n).root == read]
                    root = roots.get(read, read)
                    maker, _ = made_by(root)
                    operand = -1 if maker == node.name else next(iter(through), -2)
                    home = before if read in roots else self._position(by_name[maker], segment, position)
                    kept[root, home].append(_Use(self.index[self.layered.same[node]], operand, position))
        every: dict[tuple[Any, ...], Counter[tuple[int, ...]]] = defaultdict(Counter)
        for (root, _), uses in kept.items():
            savers = tuple((u.node, u.operand) for u in uses)
            several = len({u.position for u in uses}) > 1
            maker, output = made_by(root)
            rep = self.index[self.layered.same[value_of(by_name[maker])[0]]]
            every[rep, output, savers, several][tuple(u.position for u in uses)] += info(by_name[maker]).times
        found: dict[tuple[Any, ...], SavedTensor] = {}
        for key, counts in every.items():
            maker, output, savers, _ = key
            for place, times in counts.items():
                found.setdefault((key, times), SavedTensor(maker, output, savers, times=times)).places.append(place)
        return list(found.values())

    def _state(self) -> dict[int, list[tuple[int, ...]]]:
        """Node of a parameter -> for each parameter of its class, the positions that read it."""
        where: dict[tuple[int, str], dict[int, None]] = defaultdict(dict)
        for position, segment in enumerate(self.layered.sequence):
            for node in self.layered.segments[segment].nodes:
                for parameter in node.all_input_nodes:
                    if info(parameter).kind == "parameter":
                        name = self._name(parameter, position)
                        where[self.index[self.layered.same[parameter]], name][position] = None
        state: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for (index, _), positions in where.items():
            state[index].append(tuple(positions))
        return dict(state)

    def _needed(self, used: Used) -> dict[fx.Node, set[int]]:
        """Node that every stage computes for itself -> the positions that need its value, directly or not."""
        needed: dict[fx.Node, set[int]] = defaultdict(set)
        for source, positions in self.made_at.items():
            needed[source] |= positions
        for (source, _, home, _), uses in used.items():
            if home == -1:
                needed[source] |= {u.position for u in uses if u.position >= 0}
        for node in reversed(self.layered.free):
            for source in node.all_input_nodes:
                needed[value_of(source)[0]] |= needed[value_of(node)[0]]
        return needed

    def _shared(self) -> dict[int, list[tuple[int, ...]]]:
        """Node that every stage computes for itself -> the positions that need it, for each node of its class."""
        shared: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for node in self.layered.free:
            if not is_pick(node):
                shared[self.index[self.layered.same[node]]].append(tuple(sorted(self.needed[node])))
        for update, places in self.written.items():
            shared[update] += [(p,) for p in places]
        return dict(shared)


def _regions(periods: Iterable[range]) -> dict[int, int]:
    """Index of a segment of a period that stands for others -> the first segment of the period before it."""
    return {i: before.start for before in set(periods) for i in range(before.stop, before.stop + len(before))}
