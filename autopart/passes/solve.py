"""StrategyTable, costs -> the cheapest choice of strategies, through HiGHS.

The constraint matrix of a table is passed to HiGHS once. It is then solved for one objective after another, each time
from the last basis. The linear relaxation comes first. It is integral for most models; where it is not, the strategies
are made binary and HiGHS branches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import highspy
import numpy as np

from autopart.cost.compute import Array
from autopart.cost.sizes import Sizes
from autopart.passes.constraint_matrix import ConstraintMatrix, Entries, Integers
from autopart.passes.split_problem import Capacity, SplitProblem

HIGHS = "highs"
"""The name of this solver, among those that a plan may be asked for with."""

UNIT, DEAREST = 1e3, 1e2
"""About what a solution costs in the solver's unit, and how many times that a single price may be."""

CHOOSE, DUAL = 0, 1
"""Simplex strategies. After another objective the last basis still is a vertex, from which HiGHS chooses to go on; the
best basis for an objective stays as good as it allows when options are narrowed, which is for the dual one."""

NODES = 200
"""Of a branch-and-bound tree; where it is not done by then, the bound says how far it is off."""

CUTS, CLOSE = 4, 1e-3
"""How often, and how near, `Solver.maximize_dual` looks for a maximum."""

WARM, FREE = 0.1, 1000
"""The simplex iterations after which a last basis is given up for HiGHS's own start: such a share of what the first
relaxation took, and no fewer than so many. Far from the optimum it takes several times as long."""

INTEGRAL = 1e-6
"""How far from a whole number a solution may be."""


@dataclass(frozen=True)
class Solution:
    """The index of every node's option, the objective, the proven bound below it, and the problem that it solves."""

    chosen: tuple[int, ...]
    objective: float
    bound: float
    problem: SplitProblem | None = None


def unit_of(sizes: Sizes, costs: Array) -> float:
    """What to multiply costs by, so that a solution costs about UNIT."""
    usual = float(np.minimum.reduceat(costs[: sizes.first[-1]], sizes.first[:-1]).sum())
    return UNIT / (usual or float(costs.max(initial=0.0)) or 1.0)


class Quiet(highspy.Highs):
    """HiGHS without its banner, which it prints on stdout as soon as it enables callbacks."""

    def enableCallbacks(self) -> None:
        self.setOptionValue("output_flag", False)
        super().enableCallbacks()


class Solver(ConstraintMatrix):
    """The constraints of a table in HiGHS, solved for one objective after another.

    iterations  simplex iterations of the first relaxation
    narrowed    the nodes of which some strategies are ruled out at present
    bases       the best basis of every objective, by the hash of its costs: a start where strategies are ruled out
    worth       of every relaxation that was solved, A'y without the rows that choose strategies: what the constraints
                save each variable
    """

    def __init__(self, sizes: Sizes, group: int | None = None) -> None:
        super().__init__(sizes, group)
        self.highs = load(
            len(self.used),
            np.array([len(variables) for variables, *_ in self.rows]),
            self.place[np.concatenate([variables for variables, *_ in self.rows])],
            np.concatenate([coefficients for _, coefficients, *_ in self.rows]),
            np.array([lower for *_, lower, _ in self.rows]),
            np.array([upper for *_, upper in self.rows]),
        )
        self.iterations = 0
        self.narrowed: list[int] = []
        self.bases: dict[int, highspy.HighsBasis] = {}
        self.worth: list[Array] = []

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

    def dual_bound(self, costs: Array) -> float:
        """A bound below `relax`'s in a small part of its time: the best by weak duality with the multipliers of
        relaxations solved before, each variable at most one and each node one strategy."""
        if not self.worth:
            return 0.0
        left = self._priced(costs) - np.array(self.worth)
        chosen = np.minimum.reduceat(left[:, : self.strategies], self.sizes.first[:-1], axis=1).sum(1)
        return float((chosen + np.minimum(left[:, self.strategies :], 0.0).sum(1)).max()) / self.scale

    def maximize_dual(self, costs: Array, more: Array) -> float:
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
        self, costs: Array, allowed: Mapping[int, Iterable[int]], capacity: Capacity
    ) -> Solution | None:
        """`minimise` with the rows of one stage's memory: equations (9) to (11) of `autopart.passes.ilp`."""
        highs, rows, held, unit = self.highs, self.highs.getNumRow(), capacity.held, max(capacity.room, 1.0)
        self._largest(capacity.sync, self._unit(costs), 1.0)
        last = self._largest(capacity.peak, 1 / unit, 0.0)
        given = np.flatnonzero(held)
        _, index, value = self._spread(0 * given, given, held[given] / unit)
        highs.addRow(-highspy.kHighsInf, capacity.room / unit, len(index) + 1, [*index, last], [*value, 1.0])
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
        return unit_of(self.sizes, costs)

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


def load(columns: int, lengths: Integers, index: Integers, value: Array, lower: Array, upper: Array) -> highspy.Highs:
    """HiGHS with the constraints lower <= A x <= upper on `columns` variables between 0 and 1, and no objective yet.

    A is given row by row: `lengths` of the rows, and of their entries the variable (`index`) and the coefficient
    (`value`).
    """
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = columns, len(lengths)
    model.col_cost_, model.col_lower_, model.col_upper_ = np.zeros(columns), np.zeros(columns), np.ones(columns)
    model.row_lower_, model.row_upper_ = lower, upper
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    model.a_matrix_.index_, model.a_matrix_.value_ = index.astype(np.int32), value
    highs = Quiet()
    settings = {
        "threads": 1, "mip_rel_gap": 1e-6, "mip_max_nodes": NODES, "simplex_strategy": CHOOSE,
    }  # fmt: skip
    for name, setting in settings.items():
        highs.setOptionValue(name, setting)
    highs.passModel(model)
    return highs
