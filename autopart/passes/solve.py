"""StrategyTable, costs -> the cheapest choice of strategies, through HiGHS.

The constraint matrix of a table is passed to HiGHS once. It is then solved for one objective after another, each time
from the basis of the most similar objective. The linear relaxation comes first, which is integral for most models. A
fractional one is rounded if that costs next to nothing; otherwise the strategies are made binary, and HiGHS branches.
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
from autopart.passes.warm_starts import WarmStarts

HIGHS = "highs"
"""The name of this solver, among those that a plan may be asked for with."""

OBJECTIVE_SCALE, MAX_COST_RATIO = 1e3, 1e2
"""The objective of a typical solution in the solver's unit; the largest cost of one variable, as a multiple of it."""

CHOOSE, DUAL = 0, 1
"""HiGHS's `simplex_strategy`: 0 lets HiGHS choose, 1 is the dual simplex. After a change of costs the last basis is
primal feasible: HiGHS chooses. After a change of bounds the last basis is dual feasible: the dual simplex."""

MAX_NODES = 200
"""Limit on nodes of HiGHS's branch-and-bound tree (`mip_max_nodes`). At the limit a gap to the dual bound is left."""

DUAL_STEPS, DUAL_TOLERANCE = 4, 1e-3
"""Of `Solver.maximize_dual`: the most steps, and the relative error at which it stops."""

WARM_START_SHARE, WARM_START_ITERATIONS = 0.1, 1000
"""A warm start is given up after max(WARM_START_SHARE x iterations of the first relaxation, WARM_START_ITERATIONS)
simplex iterations. HiGHS then starts from its own basis: a start far from the optimum takes several times as long."""

INTEGRAL = 1e-6
"""Largest distance of a variable from an integer at which it counts as one."""

LARGE = 5_000
"""Variables of a large problem. Its relaxation is rounded, without branching. `bound` takes the dual simplex: 29 solves
of 65,000 variables, those of a block of Qwen3-Next with its scan, take 3 s instead of 61."""

ROUNDING = 1e-5
"""How much more a rounded relaxation of a large problem may cost, relative. To branch in the 18,603 variables of T5-11B
takes over a second, and saves 2e-6 to 5e-6."""


@dataclass(frozen=True)
class Solution:
    """A choice of strategies.

    chosen     the index of every node's option
    objective  of the choice, in the unit of the costs
    bound      a proven lower bound on the objective of every choice
    problem    the problem that the choice solves
    """

    chosen: tuple[int, ...]
    objective: float
    bound: float
    problem: SplitProblem | None = None


def unit_of(sizes: Sizes, costs: Array) -> float:
    """The factor that makes the cost of a solution about OBJECTIVE_SCALE."""
    usual = float(np.minimum.reduceat(costs[: sizes.first[-1]], sizes.first[:-1]).sum())
    return OBJECTIVE_SCALE / (usual or float(costs.max(initial=0.0)) or 1.0)


class Quiet(highspy.Highs):
    """HiGHS without its banner, which it prints on stdout as soon as it enables callbacks."""

    def enableCallbacks(self) -> None:
        self.setOptionValue("output_flag", False)
        super().enableCallbacks()


class Solver(ConstraintMatrix):
    """The constraints of a table in HiGHS, solved for one objective after another.

    iterations  simplex iterations of the first relaxation
    restricted  the nodes whose upper bounds rule out some strategies at present
    starts      the optimal bases of relaxations with all strategies
    dual_activities  A'y of every relaxation that was solved, with y the dual values and A the constraint matrix without
                the rows that choose one strategy of each node
    """

    def __init__(self, sizes: Sizes, segment_class: int | None = None) -> None:
        super().__init__(sizes, segment_class)
        self.highs = load(
            len(self.used),
            np.array([len(variables) for variables, *_ in self.rows]),
            self.column_of[np.concatenate([variables for variables, *_ in self.rows])],
            np.concatenate([coefficients for _, coefficients, *_ in self.rows]),
            np.array([lower for *_, lower, _ in self.rows]),
            np.array([upper for *_, upper in self.rows]),
        )
        self._starts = np.cumsum([0, *np.diff(sizes.first)[self.nodes]])[:-1]
        """Of each of `nodes`, the index of its first strategy among the variables that are used."""
        self.iterations = 0
        self.restricted: list[int] = []
        self.starts = WarmStarts(self.highs)
        self.dual_activities: list[Array] = []

    def bound(self, costs: Array, allowed: Mapping[int, Iterable[int]] | None = None) -> float:
        """Lower bound on the cost of every choice: the LP relaxation; infinite where there is no choice."""
        self._restrict(allowed or {})
        self._set_objective(costs)
        self.highs.setOptionValue("simplex_strategy", DUAL if self.highs.getNumCol() > LARGE else CHOOSE)
        self.highs.run()
        if self.highs.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
            return float("inf")
        return float(self.highs.getInfo().objective_function_value) / self.scale

    def relax(self, costs: Array, allowed: Mapping[int, Iterable[int]] | None = None) -> tuple[float, Solution | None]:
        """The LP relaxation: a lower bound on the cost of every choice, infinite where there is no choice; and the best
        choice, None where the relaxation is fractional. `allowed`: node -> the options that it may take; nodes that are
        not named may take all."""
        bound, found = self._relax(costs, allowed)
        if bound < float("inf"):
            self._record_duals()
        return bound, found

    def _relax(self, costs: Array, allowed: Mapping[int, Iterable[int]] | None) -> tuple[float, Solution | None]:
        self._restrict(allowed or {})
        self._set_objective(costs)
        same = self.starts.start(self.objective, bool(allowed))
        self.highs.setOptionValue("simplex_strategy", DUAL if same and allowed else CHOOSE)
        self._run()
        if self.highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return float("inf"), None
        if not allowed:
            self.starts.record(self.objective)
        values = np.array(self.highs.getSolution().col_value)
        objective = self.highs.getInfo().objective_function_value
        strategies = values[: self.strategies]
        whole = np.abs(strategies - strategies.round()).max(initial=0.0) <= INTEGRAL
        return objective / self.scale, self.solution_of(values, objective, objective) if whole else None

    def _run(self) -> None:
        """Solve from the basis that HiGHS has; after too many iterations, from HiGHS's own start."""
        limit = max(WARM_START_ITERATIONS, round(WARM_START_SHARE * self.iterations))
        if self.iterations:
            self.highs.setOptionValue("simplex_iteration_limit", limit)
        self.highs.run()
        self.highs.setOptionValue("simplex_iteration_limit", highspy.kHighsIInf)
        if self.highs.getModelStatus() == highspy.HighsModelStatus.kIterationLimit:
            self.highs.clearSolver()
            self.highs.run()
        self.iterations = self.iterations or self.highs.getInfo().simplex_iteration_count

    def dual_bound(self, costs: Array) -> float:
        """Lower bound on the bound of `relax`, by weak duality: the largest, over A'y in `dual_activities`, of this
        sum, with c the costs and N the nodes:

            sum over N of min over strategies of (c - A'y)  +  sum over other variables of min(c - A'y, 0)
        """
        if not self.dual_activities:
            return 0.0
        left = self._scaled_costs(costs) - np.array(self.dual_activities)
        chosen = np.minimum.reduceat(left[:, : self.strategies], self._starts, axis=1).sum(1)
        return float((chosen + np.minimum(left[:, self.strategies :], 0.0).sum(1)).max()) / self.scale

    def maximize_dual(self, costs: Array, more: Array) -> float:
        """The weight w in [0, 1] that maximises, up to DUAL_TOLERANCE,

            min over relaxed choices x of (costs + w more) x

        which is concave and piecewise linear in w. 0 at once where no choice of strategies has `more` above 0."""
        if np.maximum.reduceat(more[: self.sizes.first[-1]], self.sizes.first[:-1]).sum() <= 0:
            return 0.0
        moved = self.column_costs(more)

        def at(weight: float) -> tuple[float, float, float]:
            """The weight, the minimum there, and its slope in the weight."""
            best, _ = self._relax(costs + weight * more, None)
            return weight, best, float(moved @ np.array(self.highs.getSolution().col_value))

        left = at(0.0)
        if left[2] <= 0:
            return 0.0
        right = at(1.0)
        for _ in range(DUAL_STEPS if right[2] < 0 else 0):
            (low, low_cost, low_slope), (high, high_cost, high_slope) = left, right
            found = at((high_cost - low_cost + low_slope * low - high_slope * high) / (low_slope - high_slope))
            left, right = (found, right) if found[2] > 0 else (left, found)
            if low_cost + low_slope * (found[0] - low) <= found[1] * (1 + DUAL_TOLERANCE):
                break
        return max(left, right, key=lambda point: point[1])[0]

    def minimise(
        self, costs: Array, allowed: Mapping[int, Iterable[int]] | None = None, branch: bool = True
    ) -> Solution | None:
        """The choice of least cost. None where there is no choice, or where the relaxation is fractional and the solver
        is not to `branch`."""
        bound, found = self._relax(costs, allowed)
        if found is None and branch and bound < float("inf"):
            self.starts.last = None
            return self._rounded(allowed or {}) or self.solution_of(*self._branch())
        return found

    def _rounded(self, allowed: Mapping[int, Iterable[int]]) -> Solution | None:
        """A choice with the objective of the relaxation that was solved last, or in a large problem about that; None
        where none is found. One fractional node after another is fixed to its strategy of largest value."""
        best, fixed, found = self.highs.getInfo().objective_function_value, list[int](), None
        most = best + (ROUNDING * best if self.highs.getNumCol() > LARGE else INTEGRAL)
        self.highs.setOptionValue("simplex_strategy", DUAL)
        while self.highs.getInfo().objective_function_value <= most:
            values = np.array(self.highs.getSolution().col_value)
            loose = np.flatnonzero(np.abs(values - values.round())[: self.strategies] > INTEGRAL)
            if not len(loose):
                found = self.solution_of(values, self.highs.getInfo().objective_function_value, best)
                break
            node = self.nodes[int(np.searchsorted(self._starts, loose[0], "right")) - 1]
            self._set_options(node, [int(np.argmax(values[self.column_of[self.options(node)]]))])
            fixed.append(node)
            self.highs.run()
            if self.highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
                break
        left = self.restricted_to(allowed)
        for node in fixed:
            self._set_options(node, left.get(node, range(len(self.table.nodes[node].options))))
        return found

    def solution_of(self, values: Array, objective: float, bound: float) -> Solution:
        chosen = tuple(int(np.argmax(values[self.column_of[self.options(n)]])) for n in range(len(self.table.nodes)))
        return Solution(chosen, objective / self.scale, bound / self.scale)

    def minimise_with_capacity(
        self, costs: Array, allowed: Mapping[int, Iterable[int]], capacity: Capacity
    ) -> Solution | None:
        """`minimise` with the rows of one stage's memory: equations (9) to (11) of `autopart.passes.ilp`."""
        highs, rows, baseline, unit = self.highs, self.highs.getNumRow(), capacity.baseline, max(capacity.limit, 1.0)
        self._add_maximum(capacity.sync, unit_of(self.sizes, costs), 1.0)
        last = self._add_maximum(capacity.peak, 1 / unit, 0.0)
        given = np.flatnonzero(baseline)
        _, index, value = self._spread(0 * given, given, baseline[given] / unit)
        variables = [*self.column_of[index], last]
        highs.addRow(-highspy.kHighsInf, capacity.limit / unit, len(variables), variables, [*value, 1.0])
        highs.setOptionValue("mip_max_nodes", 100 * MAX_NODES)
        found = self.minimise(costs, allowed)
        highs.setOptionValue("mip_max_nodes", MAX_NODES)
        highs.deleteRows(highs.getNumRow() - rows, np.arange(rows, highs.getNumRow(), dtype=np.int32))
        highs.deleteCols(2, np.array([last - 1, last], dtype=np.int32))
        return found

    def _add_maximum(self, sums: Entries, unit: float, cost: float) -> int:
        """Add a column >= 0 and >= unit x each row of `sums`, with a cost in the objective; the index of the column."""
        last = self.highs.getNumCol()
        self.highs.addCol(cost, 0.0, highspy.kHighsInf, 0, [], [])
        row, index, value = self._spread(*sums[:2], sums[2] * unit)
        every = np.arange(row.max(initial=-1) + 1)
        row = np.concatenate([every, row])
        order = np.argsort(row, kind="stable")
        index = np.concatenate([np.full(len(every), last), self.column_of[index]])[order].astype(np.int32)
        value = np.concatenate([np.ones(len(every)), -value])[order]
        starts, infinite = np.searchsorted(row[order], every).astype(np.int32), np.full(len(every), highspy.kHighsInf)
        self.highs.addRows(len(every), np.zeros(len(every)), infinite, len(index), starts, index, value)
        return last

    def _record_duals(self) -> None:
        """Append A'y of the relaxation that was solved last, costs - reduced costs, to `dual_activities`."""
        solution = self.highs.getSolution()
        dual_activities = self.objective - np.array(solution.col_dual)
        choose = np.array(solution.row_dual[: len(self.nodes)])
        dual_activities[: self.strategies] -= np.repeat(choose, np.diff([*self._starts, self.strategies]))
        self.dual_activities.append(dual_activities)

    def _set_objective(self, costs: Array) -> None:
        self.objective = self._scaled_costs(costs)
        self.highs.changeColsCost(len(self.objective), np.arange(len(self.objective), dtype=np.int32), self.objective)

    def _scaled_costs(self, costs: Array) -> Array:
        """The objective in a unit in which a solution costs about OBJECTIVE_SCALE, so that costs stay far above HiGHS's
        tolerance. Costs are at most OBJECTIVE_SCALE x MAX_COST_RATIO: no solution pays a higher one."""
        self.scale = unit_of(self.sizes, costs)
        return self.scaled_columns(costs, self.scale)

    def scaled_columns(self, costs: Array, unit: float) -> Array:
        """`unit` x the cost of every used variable, at most OBJECTIVE_SCALE x MAX_COST_RATIO."""
        return np.minimum(self.column_costs(costs) * unit, OBJECTIVE_SCALE * MAX_COST_RATIO)

    def column_costs(self, costs: Array) -> Array:
        """The cost of every used variable; a move has the cost of the reshard that it substitutes."""
        every = np.zeros(self.columns)
        every[: self.priced] = np.bincount(self.shared, costs, self.priced)
        np.add.at(every, self.moves, every[self.reshards])
        every[self.reshards] = 0.0
        return every[self.used]

    def _branch(self) -> tuple[Array, float, float]:
        """Solve with binary strategies."""
        self._set_integrality(highspy.HighsVarType.kInteger)
        self.highs.run()
        info = self.highs.getInfo()
        found = np.array(self.highs.getSolution().col_value), info.objective_function_value, info.mip_dual_bound
        self._set_integrality(highspy.HighsVarType.kContinuous)
        return found

    def _set_integrality(self, kind: highspy.HighsVarType) -> None:
        indices = np.arange(self.strategies, dtype=np.int32)
        self.highs.changeColsIntegrality(len(indices), indices, np.full(len(indices), int(kind), dtype=np.uint8))

    def _restrict(self, allowed: Mapping[int, Iterable[int]]) -> None:
        for node in self.restricted:
            self._set_options(node, range(len(self.table.nodes[node].options)))
        left = self.restricted_to(allowed)
        for node, options in left.items():
            self._set_options(node, options)
        self.restricted = list(left)

    def _set_options(self, node: int, options: Iterable[int]) -> None:
        variables = self.column_of[self.options(node)].astype(np.int32)
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
        "threads": 1, "mip_rel_gap": 1e-6, "mip_max_nodes": MAX_NODES, "mip_root_presolve_only": True,
        "simplex_strategy": CHOOSE,
    }  # fmt: skip
    for name, setting in settings.items():
        highs.setOptionValue(name, setting)
    highs.passModel(model)
    return highs
