"""Table -> choice, through HiGHS. The only module that knows the solver.

The matrix of a table depends on no price: it is passed once, in bulk, and solved again and again for other objectives,
each from the last one's basis. The linear relaxation comes first; it is integral for most models, and only where it is
not are the strategies made binary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import highspy
import numpy as np
import numpy.typing as npt

from autopart.cost.compute import Array
from autopart.cost.sizes import Sizes, paths
from autopart.sharding.strategy_table import Placements, ValueUses

UNIT, DEAREST = 1e3, 1e2
"""About what a solution costs in the solver's unit, and how many times that a single price may be."""

CHOOSE, DUAL = 0, 1
"""Simplex strategies. After another objective the last basis still is a vertex, from which HiGHS chooses to go on; the
best basis for an objective stays as good as it allows when options are narrowed, which is for the dual one."""

Integers = npt.NDArray[np.int64]
Entries = tuple[Integers, Integers, Array]
"""Row, variable and number of a matrix's entries; what is given for one place twice adds up."""

NODES = 200
"""Of a branch-and-bound tree; where it is not done by then, the bound says how far it is off."""

CUTS, CLOSE = 4, 1e-3
"""How often, and how near, `Solver.share` looks for a maximum."""

WARM, FREE = 0.1, 1000
"""The simplex iterations after which a last basis is given up for HiGHS's own start: such a share of what the first
relaxation took, and no fewer than so many. Far from the optimum it takes several times as long."""

INTEGRAL = 1e-6
"""How far from a whole number a solution may be."""


@dataclass(frozen=True)
class Solution:
    """The index of every node's option, the objective, and the proven bound below it."""

    chosen: tuple[int, ...]
    objective: float
    bound: float


class Quiet(highspy.Highs):
    """HiGHS without its banner, which it prints on stdout as soon as it enables callbacks."""

    def enableCallbacks(self) -> None:
        self.setOptionValue("output_flag", False)
        super().enableCallbacks()


class Solver:
    """The equations (1) to (4) of a table, ready for any objective.

    Variables are the strategies, then the changes of placement, then the kept memory, in the order of `Sizes` (the
    ones with a price), then the moves of equation (2).
    """

    def __init__(self, sizes: Sizes, group: int | None = None) -> None:
        """With `group`, only what a class of runs decides: enough to bound what it costs, where all else costs
        nothing."""
        self.sizes, self.table = sizes, sizes.table
        held = self._held(group)
        self.strategies = int(sizes.first[-1])
        self.priced = self.strategies + len(sizes.changes) + len(sizes.kept)
        self.columns = self.priced
        self.rows: list[tuple[list[int], list[float], float, float]] = []
        self.paid: list[tuple[int, int]] = []
        """(move, change) where a value has one use, so that its moves are priced themselves."""
        self.awaited: list[int] = []
        """A move for every way to take a partial sum that passes from run to run."""
        for node in sorted(held):
            self.rows.append((self.options(node), [1.0] * len(self.options(node)), 1.0, 1.0))
        for tied in self.table.tied:
            for node in tied[1:]:
                for here, there in zip(self.options(tied[0]), self.options(node), strict=True) if node in held else ():
                    self._equal([here], [there])
        for index, flow in enumerate(self.table.flows):
            if flow.source in held and all(node in held for node, _ in flow.uses):
                self._moves(index, flow)
        self._kept(held)
        self.moves, self.changes = np.array(self.paid, dtype=np.int64).reshape(-1, 2).T
        own = np.setdiff1d(np.arange(self.priced), self.changes)
        priced, stand = np.concatenate([own, self.changes]), np.concatenate([own, self.moves])
        self.stand = stand[np.argsort(priced, kind="stable")]
        """The variables that stand for the first priced one, for the second, and so on; where each's begin:"""
        self.first = np.searchsorted(np.sort(priced), np.arange(self.priced + 1))
        self.used = np.arange(self.columns) if group is None else np.unique(np.concatenate([c for c, *_ in self.rows]))
        self.place = np.full(self.columns, -1)
        self.place[self.used] = np.arange(len(self.used))
        self.highs = self._pass()
        self.iterations = 0
        """Simplex iterations of the first relaxation."""
        self.narrowed: list[int] = []
        self.bases: dict[int, highspy.HighsBasis] = {}
        """Best bases by a hash of the costs, to begin with where options are narrowed."""
        self.worth: list[Array] = []
        """Of relaxations solved before what the equations save every variable (A'y, without those that choose)."""

    def options(self, node: int) -> list[int]:
        """The variables of a node."""
        return list(range(int(self.sizes.first[node]), int(self.sizes.first[node + 1])))

    def _held(self, group: int | None) -> set[int]:
        """The nodes of a class of runs with those that exchange values with them; all if there is none."""
        nodes = range(len(self.table.nodes))
        if group is None:
            return set(nodes)
        inside = {n for n in nodes if self.table.nodes[n].group == group}
        ends = [{f.source, *(node for node, _ in f.uses)} for f in self.table.flows]
        near = inside.union(*(e for e in ends if e & inside))
        return near.union(*(set(t) for t in self.table.tied if near & set(t)))

    def bound(self, costs: Array, allowed: Mapping[int, Iterable[int]] | None = None) -> float:
        """A bound below every choice's cost: the linear relaxation; infinite where there is no choice."""
        self._narrow(allowed or {})
        self._price(costs)
        self.highs.run()
        if self.highs.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
            return float("inf")
        return float(self.highs.getInfo().objective_function_value) / self.scale

    def relax(self, costs: Array, allowed: Mapping[int, Iterable[int]] | None = None) -> tuple[float, Solution | None]:
        """The linear relaxation: a bound below every choice's cost, infinite where there is no choice; and the best
        choice, where the relaxation is one. `allowed` narrows the options of some nodes."""
        bound, found = self._relax(costs, allowed)
        if bound < float("inf"):
            self._learn()
        return bound, found

    def _relax(self, costs: Array, allowed: Mapping[int, Iterable[int]] | None) -> tuple[float, Solution | None]:
        self._narrow(allowed or {})
        self._price(costs)
        known = hash(costs.tobytes())
        narrowed = bool(allowed) and known in self.bases
        if narrowed:
            self.highs.setBasis(self.bases[known])
        self.highs.setOptionValue("simplex_strategy", DUAL if narrowed else CHOOSE)
        self._run()
        if self.highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return float("inf"), None
        if not allowed:
            self.bases[known] = self.highs.getBasis()
        values = np.array(self.highs.getSolution().col_value)
        objective = self.highs.getInfo().objective_function_value
        strategies = values[: self.strategies]
        whole = np.abs(strategies - strategies.round()).max(initial=0.0) <= INTEGRAL
        return objective / self.scale, self._solution(values, objective, objective) if whole else None

    def _run(self) -> None:
        """Solve from the last basis, or from none where that is far from the optimum."""
        limit = max(FREE, round(WARM * self.iterations))
        if self.iterations:
            self.highs.setOptionValue("simplex_iteration_limit", limit)
        self.highs.run()
        self.highs.setOptionValue("simplex_iteration_limit", highspy.kHighsIInf)
        if self.highs.getModelStatus() == highspy.HighsModelStatus.kIterationLimit:
            self.highs.clearSolver()
            self.highs.run()
        self.iterations = self.iterations or self.highs.getInfo().simplex_iteration_count

    def below(self, costs: Array) -> float:
        """A bound below `relax`'s in a small part of its time: the best by weak duality with the multipliers of
        relaxations solved before, each variable at most one and each node one strategy."""
        if not self.worth:
            return 0.0
        left = self._priced(costs) - np.array(self.worth)
        chosen = np.minimum.reduceat(left[:, : self.strategies], self.sizes.first[:-1], axis=1).sum(1)
        return float((chosen + np.minimum(left[:, self.strategies :], 0.0).sum(1)).max()) / self.scale

    def share(self, costs: Array, more: Array) -> float:
        """Between 0 and 1, the share of some more costs with which the relaxation's best choice costs most, but for a
        few per mille: it is a concave function of the share, made of straight lines. At 0 at once where no choice has
        more costs above 0."""
        if np.maximum.reduceat(more[: self.strategies], self.sizes.first[:-1]).sum() <= 0:
            return 0.0
        moved = self._moved(more)

        def at(share: float) -> tuple[float, float, float]:
            """The share, what the best choice costs, and how much more with a larger share."""
            best, _ = self._relax(costs + share * more, None)
            return share, best, float(moved @ np.array(self.highs.getSolution().col_value))

        left = at(0.0)
        if left[2] <= 0:
            return 0.0
        right = at(1.0)
        for _ in range(CUTS if right[2] < 0 else 0):
            (low, below, rising), (high, above, falling) = left, right
            found = at((above - below + rising * low - falling * high) / (rising - falling))
            left, right = (found, right) if found[2] > 0 else (left, found)
            if below + rising * (found[0] - low) <= found[1] * (1 + CLOSE):
                break
        return max(left, right, key=lambda point: point[1])[0]

    def minimise(
        self, costs: Array, allowed: Mapping[int, Iterable[int]] | None = None, branch: bool = True
    ) -> Solution | None:
        """The best choice for a cost of every priced variable; None where there is none, or it takes branching to find
        and is not to `branch`."""
        bound, found = self._relax(costs, allowed)
        if found is None and branch and bound < float("inf"):
            return self._rounded(allowed or {}) or self._solution(*self._branch())
        return found

    def _rounded(self, allowed: Mapping[int, Iterable[int]]) -> Solution | None:
        """A choice as good as the relaxation that was solved last, found by giving one node after another the option it
        has most of; None where that costs anything."""
        best, fixed, found = self.highs.getInfo().objective_function_value, list[int](), None
        self.highs.setOptionValue("simplex_strategy", DUAL)
        while self.highs.getInfo().objective_function_value <= best + INTEGRAL:
            values = np.array(self.highs.getSolution().col_value)
            loose = np.flatnonzero(np.abs(values - values.round())[: self.strategies] > INTEGRAL)
            if not len(loose):
                found = self._solution(values, self.highs.getInfo().objective_function_value, best)
                break
            node = int(np.searchsorted(self.sizes.first, loose[0], "right")) - 1
            self._bound(node, [int(np.argmax(values[self.options(node)]))])
            fixed.append(node)
            self.highs.run()
            if self.highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
                break
        for node in fixed:
            self._bound(node, allowed.get(node, range(len(self.table.nodes[node].options))))
        return found

    def _solution(self, values: Array, objective: float, bound: float) -> Solution:
        chosen = tuple(int(np.argmax(values[self.options(n)])) for n in range(len(self.table.nodes)))
        return Solution(chosen, objective / self.scale, bound / self.scale)

    def minimise_in_room(
        self, costs: Array, late: Entries, allowed: Mapping[int, Iterable[int]], peak: Entries, held: Array, room: float
    ) -> Solution | None:
        """`minimise` with the largest of some sums, the rows of `late`, among the costs, where held * v + the largest
        of others, the rows of `peak`, <= room."""
        highs, rows, unit = self.highs, self.highs.getNumRow(), max(room, 1.0)
        self._largest(late, self._unit(costs), 1.0)
        last = self._largest(peak, 1 / unit, 0.0)
        given = np.flatnonzero(held)
        _, index, value = self._spread(0 * given, given, held[given] / unit)
        highs.addRow(-highspy.kHighsInf, room / unit, len(index) + 1, [*index, last], [*value, 1.0])
        highs.setOptionValue("mip_max_nodes", 100 * NODES)
        found = self.minimise(costs, allowed)
        highs.setOptionValue("mip_max_nodes", NODES)
        highs.deleteRows(highs.getNumRow() - rows, np.arange(rows, highs.getNumRow(), dtype=np.int32))
        highs.deleteCols(2, np.array([last - 1, last], dtype=np.int32))
        return found

    def _largest(self, sums: Entries, unit: float, cost: float) -> int:
        """Add a variable that is at least 0 and each of some sums, times a unit; its place."""
        last = self.highs.getNumCol()
        self.highs.addCol(cost, 0.0, highspy.kHighsInf, 0, [], [])
        row, index, value = self._spread(*sums[:2], sums[2] * unit)
        every = np.arange(row.max(initial=-1) + 1)
        row = np.concatenate([every, row])
        order = np.argsort(row, kind="stable")
        index = np.concatenate([np.full(len(every), last), index])[order].astype(np.int32)
        value = np.concatenate([np.ones(len(every)), -value])[order]
        starts, infinite = np.searchsorted(row[order], every).astype(np.int32), np.full(len(every), highspy.kHighsInf)
        self.highs.addRows(len(every), np.zeros(len(every)), infinite, len(index), starts, index, value)
        return last

    def _spread(self, row: Integers, priced: Integers, number: Array) -> Entries:
        """Entries over the variables that stand for priced ones, moves for the changes of values with one use: sorted,
        and one for each place."""
        count = self.first[priced + 1] - self.first[priced]
        entry = np.repeat(np.arange(len(row)), count)
        turn = np.arange(len(entry)) - np.repeat(np.cumsum(count) - count, count)
        places = row[entry] * self.columns + self.stand[self.first[priced[entry]] + turn]
        places, same = np.unique(places, return_inverse=True)
        total = np.bincount(same, number[entry]).astype(np.float64)
        return places // self.columns, places % self.columns, total

    def _learn(self) -> None:
        """Keep the multipliers of the relaxation that was solved last."""
        solution = self.highs.getSolution()
        worth = self.objective - np.array(solution.col_dual)
        choose = np.array(solution.row_dual[: len(self.table.nodes)])
        worth[: self.strategies] -= np.repeat(choose, np.diff(self.sizes.first))
        self.worth.append(worth)

    def _price(self, costs: Array) -> None:
        """Set the objective."""
        self.objective = self._priced(costs)
        self.highs.changeColsCost(len(self.objective), np.arange(len(self.objective), dtype=np.int32), self.objective)

    def _unit(self, costs: Array) -> float:
        """What to multiply costs by, so that a solution costs about UNIT."""
        usual = float(np.minimum.reduceat(costs[: self.strategies], self.sizes.first[:-1]).sum())
        return UNIT / (usual or float(costs.max(initial=0.0)) or 1.0)

    def _priced(self, costs: Array) -> Array:
        """What every variable costs, in a unit in which a solution costs about UNIT: what costs far more is never
        taken, and what is far below HiGHS's tolerance would not be seen."""
        self.scale = self._unit(costs)
        return np.minimum(self._moved(costs) * self.scale, UNIT * DEAREST)

    def _moved(self, costs: Array) -> Array:
        """What every variable costs, moves where they stand for changes."""
        every = np.zeros(self.columns)
        every[: self.priced] = costs
        np.add.at(every, self.moves, costs[self.changes])
        every[self.changes] = 0.0
        return every[self.used]

    def _branch(self) -> tuple[Array, float, float]:
        """Solve with binary strategies."""
        self._integral(highspy.HighsVarType.kInteger)
        self.highs.run()
        info = self.highs.getInfo()
        found = np.array(self.highs.getSolution().col_value), info.objective_function_value, info.mip_dual_bound
        self._integral(highspy.HighsVarType.kContinuous)
        return found

    def _integral(self, kind: highspy.HighsVarType) -> None:
        indices = np.arange(self.strategies, dtype=np.int32)
        self.highs.changeColsIntegrality(len(indices), indices, np.full(len(indices), int(kind), dtype=np.uint8))

    def _narrow(self, allowed: Mapping[int, Iterable[int]]) -> None:
        for node in self.narrowed:
            self._bound(node, range(len(self.table.nodes[node].options)))
        for node, options in allowed.items():
            self._bound(node, options)
        self.narrowed = list(allowed)

    def _bound(self, node: int, options: Iterable[int]) -> None:
        variables = self.place[self.options(node)].astype(np.int32)
        if variables[0] < 0:
            return
        upper = np.zeros(len(variables))
        upper[list(options)] = 1.0
        self.highs.changeColsBounds(len(variables), variables, np.zeros(len(variables)), upper)

    def _equal(self, left: Sequence[int], right: Sequence[int]) -> None:
        self.rows.append(([*left, *right], [1.0] * len(left) + [-1.0] * len(right), 0.0, 0.0))

    def _covers(self, column: int, variables: Sequence[int]) -> None:
        """column >= sum(variables)."""
        self.rows.append(([column, *variables], [1.0] + [-1.0] * len(variables), 0.0, highspy.kHighsInf))

    def _moves(self, index: int, flow: ValueUses) -> None:
        """Equations (2) and (3) of one flow; all uses outside of a run take a partial sum in the same placement."""
        source = self.table.nodes[flow.source]
        give: dict[Placements, list[int]] = defaultdict(list)
        for option, variable in enumerate(self.options(flow.source)):
            give[source.given(option, flow.output)].append(variable)
        outside: dict[tuple[Placements, Placements], list[int]] = defaultdict(list)
        uses: dict[tuple[int, int], bool] = {}
        for use, inside in zip(flow.uses, flow.inside, strict=True):
            uses[use] = uses.get(use, True) and inside
        for (node, operand), inside in uses.items():
            take: dict[Placements, list[int]] = defaultdict(list)
            for option, variable in enumerate(self.options(node)):
                take[self.table.nodes[node].taken(option, operand)].append(variable)
            leaving: dict[Placements, list[int]] = defaultdict(list)
            arriving: dict[Placements, list[int]] = defaultdict(list)
            paying: dict[int, list[int]] = defaultdict(list)
            for have, want in ((h, w) for h in give for w in take if (h, w) in flow.chains):
                move, self.columns = self.columns, self.columns + 1
                leaving[have].append(move)
                arriving[want].append(move)
                for key in paths(flow.chains[have, want]):
                    change = self.strategies + self.sizes.change_index[index, have, key]
                    if len(uses) == 1:
                        self.paid.append((move, change))
                    else:
                        paying[change].append(move)
                if any(p.kind == "P" for p in have) and not inside:
                    outside[have, want].append(move)
            for have, variables in give.items():
                self._equal(variables, leaving[have])
            for want, variables in take.items():
                self._equal(variables, arriving[want])
            for change, moves in paying.items():
                self._covers(change, moves)
        users = sum(not inside for inside in uses.values())
        if max(flow.homes, default=-1) >= 0:
            self.awaited += [moves[0] for moves in outside.values()]
        for moves in outside.values():
            for other in moves[1:]:
                self._equal([moves[0]], [other])
            if len(moves) < users:
                self.rows.append(([moves[0]], [1.0], 0.0, 0.0))

    def _kept(self, held: set[int]) -> None:
        """Equation (4)."""
        start = self.strategies + len(self.sizes.changes)
        for index, keep in enumerate(self.table.keeps):
            keepers = dict.fromkeys(keep.keepers) if keep.root in held else {}
            for keeper, (node, operand) in enumerate(keepers):
                by: dict[Placements, list[int]] = defaultdict(list)
                if node not in held:
                    continue
                options = self.options(keep.root if operand == -2 else node)
                for placed, variable in zip(self.sizes.keeps[index][keeper], options, strict=True):
                    by[placed].append(variable)
                for placed, variables in by.items():
                    self._covers(start + self.sizes.kept[index, placed], variables)

    def _pass(self) -> highspy.Highs:
        model = highspy.HighsLp()
        columns = len(self.used)
        model.num_col_, model.num_row_ = columns, len(self.rows)
        model.col_cost_ = np.zeros(columns)
        model.col_lower_, model.col_upper_ = np.zeros(columns), np.ones(columns)
        model.row_lower_ = np.array([lower for _, _, lower, _ in self.rows])
        model.row_upper_ = np.array([upper for _, _, _, upper in self.rows])
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = np.cumsum([0, *(len(c) for c, _, _, _ in self.rows)]).astype(np.int32)
        model.a_matrix_.index_ = self.place[np.concatenate([c for c, _, _, _ in self.rows])].astype(np.int32)
        model.a_matrix_.value_ = np.concatenate([v for _, v, _, _ in self.rows])
        return _highs(model)


class Coupled:
    """The equations of a solver once for every stage of a pipeline, each with splits of its own that agree on what
    passes between stages, and on how they take partial sums."""

    def __init__(self, solver: Solver, stages: int, agreeing: Sequence[Sequence[int]]) -> None:
        """Every one of `agreeing` are strategies of one node: all stages take them as often."""
        self.solver, self.stages, columns = solver, stages, solver.columns
        agreeing = [*agreeing, *([move] for move in solver.awaited)]
        counts = np.array([len(variables) for variables, *_ in solver.rows])
        index = np.concatenate([variables for variables, *_ in solver.rows])
        value = np.concatenate([numbers for _, numbers, *_ in solver.rows])
        links = [
            ([*variables, *(v + stage * columns for v in variables)], [1.0] * len(variables) + [-1.0] * len(variables))
            for stage in range(1, stages)
            for variables in agreeing
        ]
        lower, upper = ([row[side] for row in solver.rows] * stages + [0.0] * len(links) for side in (2, 3))
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = stages * columns, len(lower)
        model.col_cost_ = np.zeros(stages * columns)
        model.col_lower_, model.col_upper_ = np.zeros(stages * columns), np.ones(stages * columns)
        model.row_lower_, model.row_upper_ = np.array(lower), np.array(upper)
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lengths = np.concatenate([np.tile(counts, stages), [len(variables) for variables, _ in links]])
        model.a_matrix_.start_ = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        rows = [index + stage * columns for stage in range(stages)]
        model.a_matrix_.index_ = np.concatenate([*rows, *(variables for variables, _ in links)]).astype(np.int32)
        model.a_matrix_.value_ = np.concatenate([*([value] * stages), *(numbers for _, numbers in links)])
        self.highs = _highs(model)

    def relax(
        self, costs: Sequence[Array], allowed: Mapping[int, Iterable[int]]
    ) -> tuple[float, list[tuple[int, ...]]]:
        """A bound below what all stages cost together, infinite where there is no choice; and every stage's choice,
        where the relaxation is one."""
        solver = self.solver
        unit = solver._unit(np.sum(costs, axis=0))
        objective = np.concatenate([np.minimum(solver._moved(each) * unit, UNIT * DEAREST) for each in costs])
        every = np.arange(len(objective), dtype=np.int32)
        self.highs.changeColsCost(len(objective), every, objective)
        upper = np.ones(solver.columns)
        for node, options in allowed.items():
            upper[solver.options(node)] = 0.0
            upper[solver.options(node)[0] + np.array(list(options), dtype=int)] = 1.0
        self.highs.changeColsBounds(len(objective), every, np.zeros(len(objective)), np.tile(upper, self.stages))
        self.highs.run()
        status = self.highs.getModelStatus()
        if status != highspy.HighsModelStatus.kOptimal:  # what was not solved to its end bounds nothing
            return float("inf") if status == highspy.HighsModelStatus.kInfeasible else 0.0, []
        bound = self.highs.getInfo().objective_function_value / unit
        values = np.array(self.highs.getSolution().col_value).reshape(self.stages, -1)
        strategies = values[:, : solver.strategies]
        whole = np.abs(strategies - strategies.round()).max(initial=0.0) <= INTEGRAL
        return bound, [solver._solution(row, 0.0, 0.0).chosen for row in values] if whole else []


def _highs(model: highspy.HighsLp) -> highspy.Highs:
    """The solver of a model, with the settings that all have."""
    highs = Quiet()
    settings = {
        "threads": 1, "mip_rel_gap": 1e-6, "mip_max_nodes": NODES, "simplex_strategy": CHOOSE,
    }  # fmt: skip
    for name, setting in settings.items():
        highs.setOptionValue(name, setting)
    highs.passModel(model)
    return highs
