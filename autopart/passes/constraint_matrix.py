"""StrategyTable -> the ILP's constraint matrix, as arrays.

The constraints are equations (2) to (8) of `autopart.passes.ilp`. The matrix of a table depends on no price.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from autopart.cost.compute import Array
from autopart.cost.sizes import Sizes, reshard_paths
from autopart.sharding.strategy_table import Placements, ValueUses

Integers = npt.NDArray[np.int64]
Entries = tuple[Integers, Integers, Array]
"""Row, variable and coefficient of a matrix's entries. Coefficients of the same row and variable add up."""

INFINITE = float("inf")


class ConstraintMatrix:
    """The constraints on the variables of a table.

    The variables are, in this order: the strategies x[v, s], the reshards c[f, w] and the saved tensors k[m, p], each
    in the order of `Sizes`, and the moves e[f, u, p, q]. All but the moves have a price.

    strategies       number of strategy variables
    priced           number of priced variables
    columns          number of all variables
    rows             of every constraint: (variables, coefficients, lower bound, upper bound)
    moves, reshards  pairs of a move and a reshard, for values with one use: the move has the reshard's price, and the
                     reshard's own variable is in no constraint
    substitutes, substitute_start
                     priced variable i is the sum of the variables
                     substitutes[substitute_start[i]:substitute_start[i + 1]]
    partial_sum_moves  one move for every pair of placements of a partial sum that passes from segment to segment
    used             the variables in any constraint
    column_of        variable -> its index in `used`; -1 for a variable in no constraint
    """

    def __init__(self, sizes: Sizes, segment_class: int | None = None) -> None:
        """With `segment_class`, the constraints are those of the nodes of that class and of the nodes that exchange
        values with these. They bound the cost of the class where all other costs are 0."""
        self.sizes, self.table = sizes, sizes.table
        nodes = self._neighbourhood(segment_class)
        self.strategies = int(sizes.first[-1])
        self.priced = self.strategies + len(sizes.reshards) + len(sizes.saved_index)
        self.columns = self.priced
        self.rows: list[tuple[list[int], list[float], float, float]] = []
        self.partial_sum_moves: list[int] = []
        self._move_reshards: list[tuple[int, int]] = []
        for node in sorted(nodes):
            self.rows.append((self.options(node), [1.0] * len(self.options(node)), 1.0, 1.0))
        for tied in self.table.tied:
            for node in tied[1:]:
                for here, there in zip(self.options(tied[0]), self.options(node), strict=True) if node in nodes else ():
                    self._equal([here], [there])
        for index, used in enumerate(self.table.value_uses):
            if used.source in nodes and all(node in nodes for node, _ in used.uses):
                self._moves(index, used)
        self._saved_once(nodes)
        self._number(segment_class)

    def _number(self, segment_class: int | None) -> None:
        """Fill `substitutes`, `used` and `column_of`."""
        self.moves, self.reshards = np.array(self._move_reshards, dtype=np.int64).reshape(-1, 2).T
        own = np.setdiff1d(np.arange(self.priced), self.reshards)
        priced, substitutes = np.concatenate([own, self.reshards]), np.concatenate([own, self.moves])
        self.substitutes = substitutes[np.argsort(priced, kind="stable")]
        self.substitute_start = np.searchsorted(np.sort(priced), np.arange(self.priced + 1))
        self.used = (
            np.arange(self.columns) if segment_class is None else np.unique(np.concatenate([c for c, *_ in self.rows]))
        )
        self.column_of = np.full(self.columns, -1)
        self.column_of[self.used] = np.arange(len(self.used))

    def options(self, node: int) -> list[int]:
        """The variables of a node: one for each of its strategies."""
        return list(range(int(self.sizes.first[node]), int(self.sizes.first[node + 1])))

    def _spread(self, row: Integers, priced: Integers, number: Array) -> Entries:
        """Entries over substitutes, from entries over priced variables.

        The result is sorted, with one entry for each pair of row and variable.
        """
        count = self.substitute_start[priced + 1] - self.substitute_start[priced]
        entry = np.repeat(np.arange(len(row)), count)
        offset = np.arange(len(entry)) - np.repeat(np.cumsum(count) - count, count)
        places = row[entry] * self.columns + self.substitutes[self.substitute_start[priced[entry]] + offset]
        places, same = np.unique(places, return_inverse=True)
        total = np.bincount(same, number[entry]).astype(np.float64)
        return places // self.columns, places % self.columns, total

    def _neighbourhood(self, segment_class: int | None) -> set[int]:
        """The nodes of a segment class with those that exchange values with them; all nodes where it is None."""
        nodes = range(len(self.table.nodes))
        if segment_class is None:
            return set(nodes)
        inside = {n for n in nodes if self.table.nodes[n].segment_class == segment_class}
        ends = [{f.source, *(node for node, _ in f.uses)} for f in self.table.value_uses]
        near = inside.union(*(e for e in ends if e & inside))
        return near.union(*(set(t) for t in self.table.tied if near & set(t)))

    def _equal(self, left: Sequence[int], right: Sequence[int]) -> None:
        """sum(left) = sum(right)."""
        self.rows.append(([*left, *right], [1.0] * len(left) + [-1.0] * len(right), 0.0, 0.0))

    def _at_least(self, column: int, variables: Sequence[int]) -> None:
        """column >= sum(variables)."""
        self.rows.append(([column, *variables], [1.0] + [-1.0] * len(variables), 0.0, INFINITE))

    def _moves(self, index: int, used: ValueUses) -> None:
        """Equations (4) to (7) of one value."""
        source = self.table.nodes[used.source]
        give: dict[Placements, list[int]] = defaultdict(list)
        for option, variable in enumerate(self.options(used.source)):
            give[source.given(option, used.output)].append(variable)
        outside: dict[tuple[Placements, Placements], list[int]] = defaultdict(list)
        uses: dict[tuple[int, int], bool] = {}
        for use, inside in zip(used.uses, used.inside, strict=True):
            uses[use] = uses.get(use, True) and inside
        for (node, operand), inside in uses.items():
            take: dict[Placements, list[int]] = defaultdict(list)
            for option, variable in enumerate(self.options(node)):
                take[self.table.nodes[node].taken(option, operand)].append(variable)
            leaving: dict[Placements, list[int]] = defaultdict(list)
            arriving: dict[Placements, list[int]] = defaultdict(list)
            paying: dict[int, list[int]] = defaultdict(list)
            for have, want in ((h, w) for h in give for w in take if (h, w) in used.chains):
                move, self.columns = self.columns, self.columns + 1
                leaving[have].append(move)
                arriving[want].append(move)
                for key in reshard_paths(used.chains[have, want]):
                    reshard = self.strategies + self.sizes.reshard_index[index, have, key]
                    if len(uses) == 1:
                        self._move_reshards.append((move, reshard))
                    else:
                        paying[reshard].append(move)
                if any(p.kind == "P" for p in have) and not inside:
                    outside[have, want].append(move)
            for have, variables in give.items():
                self._equal(variables, leaving[have])
            for want, variables in take.items():
                self._equal(variables, arriving[want])
            for reshard, moves in paying.items():
                self._at_least(reshard, moves)
        self._partial_sums(used, outside, sum(not inside for inside in uses.values()))

    def _partial_sums(
        self, used: ValueUses, outside: Mapping[tuple[Placements, Placements], list[int]], users: int
    ) -> None:
        """All uses in other segments than the one that makes a partial sum take it in the same placement.

        `outside` has the moves of partial sums to the uses in other segments, by the placements before and after;
        `users` is the number of these uses.
        """
        if max(used.producers, default=-1) >= 0:
            self.partial_sum_moves += [moves[0] for moves in outside.values()]
        for moves in outside.values():
            for other in moves[1:]:
                self._equal([moves[0]], [other])
            if len(moves) < users:
                self.rows.append(([moves[0]], [1.0], 0.0, 0.0))

    def _saved_once(self, nodes: set[int]) -> None:
        """Equation (8) of every saved tensor."""
        start = self.strategies + len(self.sizes.reshards)
        for index, tensor in enumerate(self.table.saved_tensors):
            savers = dict.fromkeys(tensor.savers) if tensor.root in nodes else {}
            for saver, (node, operand) in enumerate(savers):
                by: dict[Placements, list[int]] = defaultdict(list)
                if node not in nodes:
                    continue
                options = self.options(tensor.root if operand == -2 else node)
                for placed, variable in zip(self.sizes.saved_placements[index][saver], options, strict=True):
                    by[placed].append(variable)
                for placed, variables in by.items():
                    self._at_least(start + self.sizes.saved_index[index, placed], variables)
