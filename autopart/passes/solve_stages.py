"""The ILP of all stages of a pipeline at once, each with strategies of its own."""

from collections.abc import Iterable, Mapping, Sequence

import highspy
import numpy as np

from autopart.cost.compute import Array
from autopart.passes.solve import INTEGRAL, Solver, load, unit_of


class PipelineSolver:
    """One ILP for all stages of a pipeline: the constraints of `solver` once for each stage, with splits of its own.

    Rows that link stages: each stage makes the values that pass between stages in the same placements, and takes
    partial sums in the same placements.
    """

    def __init__(self, solver: Solver, stages: int, agreeing: Sequence[Sequence[int]]) -> None:
        """`agreeing`: sets of strategies of one node; the sum of a set's variables is equal in all stages."""
        self.solver, self.stages, columns, column_of = solver, stages, len(solver.used), solver.column_of
        sets = [column_of[[*each]] for each in (*agreeing, *([move] for move in solver.partial_sum_moves))]
        counts = np.array([len(variables) for variables, *_ in solver.rows])
        index = column_of[np.concatenate([variables for variables, *_ in solver.rows])]
        value = np.concatenate([numbers for _, numbers, *_ in solver.rows])
        links = [
            ([*variables, *(v + stage * columns for v in variables)], [1.0] * len(variables) + [-1.0] * len(variables))
            for stage in range(1, stages)
            for variables in sets
        ]
        lower, upper = ([row[side] for row in solver.rows] * stages + [0.0] * len(links) for side in (2, 3))
        lengths = np.concatenate([np.tile(counts, stages), [len(variables) for variables, _ in links]])
        self.highs = load(
            stages * columns,
            lengths,
            np.concatenate([index + stage * columns for stage in range(stages)] + [v for v, _ in links]),
            np.concatenate([value] * stages + [numbers for _, numbers in links]),
            np.array(lower),
            np.array(upper),
        )

    def relax(
        self, costs: Sequence[Array], allowed: Mapping[int, Iterable[int]]
    ) -> tuple[float, list[tuple[int, ...]]]:
        """Lower bound on the sum of all stages' costs, infinite where there is no choice; the choice of every stage,
        where the relaxation is integral."""
        solver = self.solver
        unit = unit_of(solver.sizes, np.sum(costs, axis=0))
        objective = np.concatenate([solver.scaled_columns(each, unit) for each in costs])
        every = np.arange(len(objective), dtype=np.int32)
        self.highs.changeColsCost(len(objective), every, objective)
        upper = np.ones(len(solver.used))
        for node, options in solver.restricted_to(allowed).items():
            mine = solver.column_of[solver.options(node)]
            upper[mine] = 0.0
            upper[mine[options]] = 1.0
        self.highs.changeColsBounds(len(objective), every, np.zeros(len(objective)), np.tile(upper, self.stages))
        self.highs.run()
        status = self.highs.getModelStatus()
        if status != highspy.HighsModelStatus.kOptimal:  # what was not solved to its end bounds nothing
            return float("inf") if status == highspy.HighsModelStatus.kInfeasible else 0.0, []
        bound = self.highs.getInfo().objective_function_value / unit
        values = np.array(self.highs.getSolution().col_value).reshape(self.stages, -1)
        strategies = values[:, : solver.strategies]
        whole = np.abs(strategies - strategies.round()).max(initial=0.0) <= INTEGRAL
        return bound, [solver.solution_of(row, 0.0, 0.0).chosen for row in values] if whole else []
