"""The ILP of all stages of a pipeline at once, each with strategies of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import highspy
import numpy as np

from autopart.cost.compute import Array
from autopart.passes.solve import INTEGRAL, MAX_COST_RATIO, OBJECTIVE_SCALE, Solver, load


class Coupled:
    """The equations of a solver once for every stage of a pipeline, each with splits of its own that agree on what
    passes between stages, and on how they take partial sums."""

    def __init__(self, solver: Solver, stages: int, agreeing: Sequence[Sequence[int]]) -> None:
        """Every one of `agreeing` are strategies of one node: all stages take them as often."""
        self.solver, self.stages, columns = solver, stages, solver.columns
        agreeing = [*agreeing, *([move] for move in solver.partial_sum_moves)]
        counts = np.array([len(variables) for variables, *_ in solver.rows])
        index = np.concatenate([variables for variables, *_ in solver.rows])
        value = np.concatenate([numbers for _, numbers, *_ in solver.rows])
        links = [
            ([*variables, *(v + stage * columns for v in variables)], [1.0] * len(variables) + [-1.0] * len(variables))
            for stage in range(1, stages)
            for variables in agreeing
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
        """A bound below what all stages cost together, infinite where there is no choice; and every stage's choice,
        where the relaxation is one."""
        solver = self.solver
        unit = solver._unit(np.sum(costs, axis=0))
        objective = np.concatenate(
            [np.minimum(solver._moved(each) * unit, OBJECTIVE_SCALE * MAX_COST_RATIO) for each in costs]
        )
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
