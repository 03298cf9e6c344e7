"""StrategyTable -> the ILP's constraint matrix, as arrays.

The constraints are equations (2) to (8) of `autopart.passes.ilp`. The matrix of a table depends on no price.

What the iterations of an unrolled loop have in common has one variable, with the sum of the costs: the strategies of
nodes that are tied in `StrategyTable.iterations`, and the moves, reshards and saved tensors that these decide. Equation
(3) of such nodes is substituted, and the rows of one iteration are those of all.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from autopart.cost.compute import Array
from autopart.cost.sizes import Sizes
from autopart.sharding.strategy_table import Placements, ValueUses

Integers = npt.NDArray[np.int64]
Entries = tuple[Integers, Integers, Array]
"""Row, variable and coefficient of a matrix's entries. Coefficients of the same row and variable add up."""

INFINITE = float("inf")


class ConstraintMatrix:
    """The constraints on the variables of a table.

    The variables are, in this order: the strategies x[v, s], the reshards c[f, w] and the saved tensors k[m, p], each
    in the order of `Sizes`, and the moves e[f, u, p, q]. All but the moves have a price.

    priced           number of priced variables
    columns          number of all variables
    shared           [priced]: the variable that stands for the priced variable: another one's for a variable of a later
                     iteration of a loop, else its own
    nodes            the nodes that have variables of their own, in order: `rows` begin with theirs
    strategies       number of their strategy variables
    rows             of every constraint: (variables, coefficients, lower bound, upper bound)
    moves, reshards  pairs of a move and a reshard, for values with one use: the move has the reshard's price, and the
                     reshard's own variable is in no constraint
    substitutes, substitute_start
                     priced variable i is the sum of the variables
                     substitutes[substitute_start[i]:substitute_start[i + 1]]
    partial_sum_moves  one move for every pair of placements of a partial sum that passes from segment to segment
    used             the variables in any constraint
    column_of        variable -> the index in `used` of the one that stands for it; -1 for a variable in no constraint
    """

    def __init__(self, sizes: Sizes, segment_class: int | None = None) -> None:
        """With `segment_class`, the constraints are those of the nodes of that class and of the nodes that exchange
        values with these. They bound the cost of the class where all other costs are 0."""
        self.sizes, self.table = sizes, sizes.table
        self.first_node = np.arange(len(self.table.nodes))
        for alike in self.table.iterations:
            self.first_node[alike] = alike[0]
        self._looped = {node for alike in self.table.iterations for node in alike}
        nodes = {int(self.first_node[node]) for node in self._neighbourhood(segment_class)}
        self.nodes = sorted(nodes)
        self.strategies = int(np.diff(sizes.first)[self.nodes].sum())
        self.priced = int(sizes.first[-1]) + len(sizes.reshards) + len(sizes.saved_index)
        self.columns = self.priced
        self.shared = np.arange(self.priced)
        for alike in self.table.iterations:
            for node in alike[1:]:
                self.shared[sizes.first[node] : sizes.first[node + 1]] = self.options(node)
        self.rows: list[tuple[list[int], list[float], float, float]] = []
        self.partial_sum_moves: list[int] = []
        self._move_reshards: list[tuple[int, int]] = []
        for node in self.nodes:
            self.rows.append((self.options(node), [1.0] * len(self.options(node)), 1.0, 1.0))
        for tied in self.table.tied:
            for node in tied[1:]:
                for here, there in zip(self.options(tied[0]), self.options(node), strict=True) if node in nodes else ():
                    self._equal([here], [there])
        self._values(nodes)
        self._saved_once(nodes)
        self._number(segment_class)

    def _number(self, segment_class: int | None) -> None:
        """Fill `substitutes`, `used` and `column_of`."""
        self.moves, self.reshards = np.array(self._move_reshards, dtype=np.int64).reshape(-1, 2).T
        own = np.flatnonzero(np.bincount(self.reshards, minlength=self.priced) == 0)
        priced, substitutes = np.concatenate([own, self.reshards]), np.concatenate([own, self.moves])
        self.substitutes = substitutes[np.argsort(priced, kind="stable")]
        self.substitute_start = np.searchsorted(np.sort(priced), np.arange(self.priced + 1))
        if segment_class is None:
            self.used = np.concatenate([np.unique(self.shared), np.arange(self.priced, self.columns)])
        else:
            self.used = np.unique(np.concatenate([c for c, *_ in self.rows]))
        self.column_of = np.full(self.columns, -1)
        self.column_of[self.used] = np.arange(len(self.used))
        self.column_of[: self.priced] = self.column_of[self.shared]

    def options(self, node: int) -> list[int]:
        """The variables of a node: one for each of its strategies."""
        node = self.first_node[node]
        return list(range(int(self.sizes.first[node]), int(self.sizes.first[node + 1])))

    def restricted_to(self, allowed: Mapping[int, Iterable[int]]) -> dict[int, list[int]]:
        """Node with variables of its own -> the options that it may take, from those of all nodes that share these."""
        found: dict[int, list[int]] = {}
        for node, options in allowed.items():
            first = int(self.first_node[node])
            found[first] = [o for o in options if first not in found or o in found[first]]
        return found

    def _spread(self, row: Integers, priced: Integers, number: Array) -> Entries:
        """Entries over substitutes, from entries over priced variables.

        The result is sorted, with one entry for each pair of row and variable.
        """
        priced = self.shared[priced]
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

    def _values(self, nodes: set[int]) -> None:
        """Equations (4) to (7) of all values between `nodes`. Values that nodes with the same variables make and take
        have the same variables."""
        first: dict[object, int] = {}
        for index, used in enumerate(self.table.value_uses):
            source, users = int(self.first_node[used.source]), self.first_node[[node for node, _ in used.uses]].tolist()
            if source not in nodes or not nodes.issuperset(users):
                continue
            if self._looped.isdisjoint({used.source, *(node for node, _ in used.uses)}):
                self._moves(index, used)
                continue
            uses = zip(users, (operand for _, operand in used.uses), used.inside, strict=True)
            grad = self.table.nodes[used.source].values[used.output].grad
            known = first.setdefault((source, used.output, grad, frozenset(uses), frozenset(used.chains)), index)
            if known == index:
                self._moves(index, used)
            else:
                self._share_reshards(index, known)

    def _share_reshards(self, index: int, known: int) -> None:
        """Give a value's reshards the variables of another's."""
        numbers, start = self.sizes.chain_reshards, int(self.sizes.first[-1])
        for ends, reshards in numbers[index].items():
            for here, there in zip(reshards, numbers[known][ends], strict=True):
                self.shared[start + here] = start + there

    def _moves(self, index: int, used: ValueUses) -> None:
        """Equations (4) to (7) of one value."""
        source, start = self.table.nodes[used.source], int(self.sizes.first[-1])
        reshards_between = self.sizes.chain_reshards[index]
        give: dict[Placements, list[int]] = defaultdict(list)
        for option, variable in enumerate(self.options(used.source)):
            give[source.given(option, used.output)].append(variable)
        outside: dict[tuple[Placements, Placements], list[int]] = defaultdict(list)
        uses: dict[tuple[int, int], bool] = {}
        for (node, operand), inside in zip(used.uses, used.inside, strict=True):
            use = int(self.first_node[node]), operand
            uses[use] = uses.get(use, True) and inside
        for (node, operand), inside in uses.items():
            take: dict[Placements, list[int]] = defaultdict(list)
            for option, variable in enumerate(self.options(node)):
                take[self.table.nodes[node].taken(option, operand)].append(variable)
            leaving: dict[Placements, list[int]] = defaultdict(list)
            arriving: dict[Placements, list[int]] = defaultdict(list)
            paying: dict[int, list[int]] = defaultdict(list)
            for have, want in ((h, w) for h in give for w in take):
                reshards = reshards_between.get((have, want))
                if reshards is None:
                    continue
                move, self.columns = self.columns, self.columns + 1
                leaving[have].append(move)
                arriving[want].append(move)
                for reshard in (start + number for number in reshards):
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
        """Equation (8) of every saved tensor. Tensors of a loop that nodes with the same variables save have the same
        variables."""
        start, number = int(self.sizes.first[-1]) + len(self.sizes.reshards), self.sizes.saved_index
        first: dict[object, int] = {}
        for index, tensor in enumerate(self.table.saved_tensors):
            root, pairs = int(self.first_node[tensor.root]), list(dict.fromkeys(tensor.savers))
            if root not in nodes:
                continue
            placements = self.sizes.saved_placements[index]
            savers = {
                (int(self.first_node[node]), operand): placed
                for (node, operand), placed in zip(pairs, placements, strict=True)
            }
            looped = not self._looped.isdisjoint({tensor.root, *(node for node, _ in pairs)})
            known = first.setdefault((root, frozenset(savers)), index) if looped else index
            if known != index:
                for placed in {p for options in placements for p in options}:
                    self.shared[start + number[index, placed]] = start + number[known, placed]
                continue
            for (node, operand), options in savers.items():
                by: dict[Placements, list[int]] = defaultdict(list)
                if node not in nodes:
                    continue
                for placed, variable in zip(options, self.options(root if operand == -2 else node), strict=True):
                    by[placed].append(variable)
                for placed, variables in by.items():
                    self._at_least(start + number[index, placed], variables)
