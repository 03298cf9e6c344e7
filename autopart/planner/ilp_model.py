"""A table of strategies with its solvers, and the number of positions that pay for each of its variables."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import chain

import numpy as np
import numpy.typing as npt

from autopart.cost.compute import Array
from autopart.cost.sizes import Sizes
from autopart.passes.solve import Solver
from autopart.passes.solve_stages import PipelineSolver
from autopart.planner.allowed_choices import Options, both
from autopart.sharding.strategy_table import Placements, StrategyTable, ValueUses

Interface = tuple[Placements | None, ...]
Integers = npt.NDArray[np.int64]


class Places:
    """Of each of several things, the places where it is paid for; each place is of one or more positions."""

    def __init__(self, things: Sequence[Sequence[Sequence[int]]]) -> None:
        places = [place for thing in things for place in thing]
        self.things = len(things)
        self.thing = np.repeat(np.arange(len(things)), np.array([len(thing) for thing in things], dtype=int))
        self.place = np.repeat(np.arange(len(places)), np.array([len(place) for place in places], dtype=int))
        self.positions = np.array([position for place in places for position in place], dtype=int)

    def inside(self, i: int, j: int) -> Integers:
        """[things]: number of its places with any of the positions i..j-1."""
        paid = np.unique(self.place[(self.positions >= i) & (self.positions < j)])
        return np.bincount(self.thing[paid], minlength=self.things)

    def within(self, i: int, j: int) -> Integers:
        """[things]: number of its places with no position but i..j-1."""
        outside = np.unique(self.place[(self.positions < i) | (self.positions >= j)])
        whole = np.setdiff1d(self.place, outside)
        return np.bincount(self.thing[whole], minlength=self.things)


class Model:
    """A table of strategies, one for all stages of the model.

    Priced variables are strategies, reshards and saved tensors, in the order of `Sizes`.

    counts           [variables]: number of positions that pay for the variable
    segment_classes  [variables]: the class of the segments that pay; -1 for what a stage pays once
    """

    def __init__(self, table: StrategyTable) -> None:
        self.table = table
        self.sizes = Sizes(table)
        self.class_solvers: dict[int, Solver] = {}
        self.pipelines: dict[int, PipelineSolver] = {}
        self.counts, self.segment_classes = self.counts_in(0, len(table.labels)), np.array(self._segment_classes())

    def _segment_classes(self) -> list[int]:
        table, state = self.table, self.table.state
        nodes = [
            table.segment_classes[state[n][0][0]] if n in state else node.segment_class
            for n, node in enumerate(table.nodes)
        ]
        classes = np.repeat(nodes, np.diff(self.sizes.first)).tolist()
        for index, have, _ in self.sizes.reshards:
            used = table.value_uses[index]
            at = used.producers[0] if is_partial(have) else -1 if used.several else used.consumers[0][0]
            classes.append(table.segment_classes[at] if at >= 0 else -1)
        for index, _ in self.sizes.saved_index:
            tensor = table.saved_tensors[index]
            classes.append(table.segment_classes[tensor.places[0][0]] if not tensor.several else -1)
        return classes

    def counts_in(self, i: int, j: int) -> Array:
        """[variables]: number of the positions i..j-1 that pay. A parameter or a saved tensor that several positions
        read is paid once, and so is the reshard of a value at each place of the value."""
        positions = np.array(self.table.segment_classes)[i:j]
        nodes = self._held.inside(i, j) + (self._classes[:, None] == positions).sum(1)
        reshards, which = self._reshards
        counts = (
            np.repeat(nodes, np.diff(self.sizes.first)),
            reshards.inside(i, j)[which],
            self._saved.inside(i, j)[[index for index, _ in self.sizes.saved_index]],
        )
        return np.concatenate(counts).astype(float)

    def least_counts_in(self, i: int, j: int) -> Array:
        """`counts_in` for a lower bound: without the reshards of a value that positions outside of i..j-1 take too.
        One choice of placements stands for all positions, so that the others may be the ones that need the reshard."""
        counts, (places, which) = self.counts_in(i, j), self._reshards
        several = np.array([self.table.value_uses[index].several for index, *_ in self.sizes.reshards], dtype=bool)
        first = self.sizes.first[-1]
        reshards = counts[first : first + len(which)]
        reshards[several] = places.within(i, j)[which][several]
        return counts

    @cached_property
    def _classes(self) -> Integers:
        """[nodes]: the class whose positions pay for the node; -1 for a parameter, and for a node of no segment."""
        return np.array([-1 if n.kind == "parameter" else n.segment_class for n in self.table.nodes])

    @cached_property
    def _held(self) -> Places:
        """The places of parameters and of what no segment makes; none of other nodes."""
        table = self.table
        return Places(
            [
                (table.state if node.kind == "parameter" else table.shared).get(n, ())
                for n, node in enumerate(table.nodes)
            ]
        )

    @cached_property
    def _reshards(self) -> tuple[Places, Integers]:
        """The places that pay for the reshards of each value, of its partial sums apart; and [reshards]: which of these
        pay for the reshard."""
        numbers: dict[tuple[int, bool], int] = {}
        keys = ((index, is_partial(have)) for index, have, _ in self.sizes.reshards)
        which = [numbers.setdefault(key, len(numbers)) for key in keys]
        every = []
        for index, partial in numbers:
            used = self.table.value_uses[index]
            pays = zip(used.producers, used.dependents, strict=True)
            every.append([(at,) if partial and at >= 0 else tuple(chain(*needs)) for at, needs in pays])
        return Places(every), np.array(which, dtype=int)

    @cached_property
    def _saved(self) -> Places:
        """The places of saved tensors."""
        return Places([tensor.places for tensor in self.table.saved_tensors])

    @cached_property
    def counts_alone(self) -> Array:
        """[positions, variables]: 1 where the position pays for the variable and shares it with no other position."""
        table, sizes, classes = self.table, self.sizes, np.array(self.table.segment_classes)
        found = np.zeros((len(classes), len(self.counts)))
        for n, node in enumerate(table.nodes):
            mine = sizes.holders[n][0] if n in sizes.holders else np.flatnonzero(classes == node.segment_class)
            found[mine, sizes.first[n] : sizes.first[n + 1]] = 1.0
        for i, (index, have, _) in enumerate(sizes.reshards, start=int(sizes.first[-1])):
            used = table.value_uses[index]
            producers, consumers = used.ends
            mine = producers if is_partial(have) else consumers
            if mine[0] >= 0 and (is_partial(have) or not used.several):
                np.add.at(found[:, i], mine, 1.0)
        return found

    @cached_property
    def solver(self) -> Solver:
        """The ILP of the whole model."""
        return Solver(self.sizes)

    def class_solver(self, segment_class: int) -> Solver:
        """The ILP of one segment class alone."""
        if segment_class not in self.class_solvers:
            self.class_solvers[segment_class] = Solver(self.sizes, segment_class)
        return self.class_solvers[segment_class]

    def pipeline(self, stages: int) -> PipelineSolver:
        """The ILP of a number of stages, each with its own splits; the splits agree on `interface_values`."""
        if stages not in self.pipelines:
            equal: dict[object, list[int]] = {}
            for n, output in self.interface_values:
                for option in range(len(self.table.nodes[n].options)):
                    key = n, output, self.table.nodes[n].given(option, output)
                    equal.setdefault(key, []).append(int(self.sizes.first[n]) + option)
            self.pipelines[stages] = PipelineSolver(self.solver, stages, list(equal.values()))
        return self.pipelines[stages]

    @cached_property
    def blocks(self) -> list[int]:
        """The classes of numbered blocks."""
        return sorted({g for g, b in zip(self.table.segment_classes, self.table.block, strict=True) if b})

    @cached_property
    def interface_values(self) -> list[tuple[int, int]]:
        """(node, output) of the values that all stages of a plan make in the same placements: values that pass between
        positions, parameters that several positions read, inputs."""
        outside = {(f.source, f.output) for f in self.table.value_uses if not all(f.inside) and max(f.producers) >= 0}
        outside |= {(i, 0) for i, readers in self.table.state.items() if any(len(p) > 1 for p in readers)}
        return sorted(outside | {(i, 0) for i, n in enumerate(self.table.nodes) if n.kind == "input"})

    @cached_property
    def interface_sums(self) -> list[tuple[ValueUses, list[tuple[int, int]]]]:
        """The values that pass between positions and may be partial sums, each with its uses at other positions. These
        uses all take a partial sum in the same placement."""
        crossing = [f for f in self.table.value_uses if not all(f.inside) and max(f.producers) >= 0]
        sums = [f for f in crossing if any(is_partial(have) for have, _ in f.chains)]
        return [(f, [use for use, inside in zip(f.uses, f.inside, strict=True) if not inside]) for f in sums]

    def interface(self, chosen: Sequence[int]) -> Interface:
        """The placements on which all stages of a plan agree, under a choice: of `interface_values` as made, and of
        `interface_sums` as taken, None where the value is no partial sum."""
        nodes = self.table.nodes
        given = [nodes[n].given(chosen[n], output) for n, output in self.interface_values]
        taken = [
            nodes[n].taken(chosen[n], operand) if is_partial(have) else None
            for used, ((n, operand), *_) in self.interface_sums
            for have in [nodes[used.source].given(chosen[used.source], used.output)]
        ]
        return tuple([*given, *taken])

    def agreeing(self, interface: Interface) -> Options:
        """The options of nodes that agree with an interface."""
        given, taken = interface[: len(self.interface_values)], interface[len(self.interface_values) :]
        wanted = [(n, output, False, placed) for (n, output), placed in zip(self.interface_values, given, strict=True)]
        for (_, uses), placed in zip(self.interface_sums, taken, strict=True):
            wanted += [(n, operand, True, placed) for n, operand in uses if placed is not None]
        left: Options = {}
        for n, i, takes, placed in wanted:
            node = self.table.nodes[n]
            placement = node.taken if takes else node.given
            left = both(left, {n: tuple(o for o in range(len(node.options)) if placement(o, i) == placed)})
        return left


def is_partial(placements: Placements) -> bool:
    """Whether a value in these placements is a partial sum along any axis."""
    return any(p.kind == "P" for p in placements)
