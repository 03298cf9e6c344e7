"""A table of strategies with its solvers, and the number of positions that pay for each of its variables."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain

import numpy as np

from autopart.cost.compute import Array
from autopart.cost.sizes import Sizes
from autopart.passes.solve import Solver
from autopart.passes.solve_stages import PipelineSolver
from autopart.planner.allowed_choices import Options, both
from autopart.sharding.strategy_table import Placements, StrategyTable, ValueUses

Interface = tuple[Placements | None, ...]


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
        table = self.table

        def inside(positions: Iterable[int]) -> bool:
            return any(i <= p < j for p in positions)

        in_class = {g: table.segment_classes[i:j].count(g) for g in set(table.segment_classes)}
        nodes = [
            sum(map(inside, table.state.get(n, ()))) if node.kind == "parameter"
            else in_class.get(node.segment_class, sum(map(inside, table.shared.get(n, ()))))
            for n, node in enumerate(table.nodes)
        ]  # fmt: skip
        counts = np.repeat(nodes, np.diff(self.sizes.first)).tolist()
        paid: dict[tuple[int, bool], int] = {}
        for index, have, _ in self.sizes.reshards:
            used, key = table.value_uses[index], (index, is_partial(have))
            if key not in paid:
                pays = zip(used.producers, used.dependents, strict=True)
                paid[key] = sum(inside([h] if is_partial(have) and h >= 0 else chain(*needs)) for h, needs in pays)
            counts.append(paid[key])
        saved = [sum(map(inside, tensor.places)) for tensor in table.saved_tensors]
        counts += [saved[index] for index, _ in self.sizes.saved_index]
        return np.array(counts, dtype=float)

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
