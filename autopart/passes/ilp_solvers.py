"""The ILP of splits through the solvers that PuLP knows: CBC, SCIP, Gurobi, CPLEX, GLPK, ..."""

import inspect
from typing import Any

import numpy as np
import pulp

from autopart.cost.sizes import Sizes
from autopart.errors import PartitionError, closest
from autopart.passes.ilp import state
from autopart.passes.solve import HIGHS, MAX_COST_RATIO, OBJECTIVE_SCALE, Solution, unit_of
from autopart.passes.split_problem import SplitProblem

GAP = 1e-10
"""Relative gap to which solvers prove an optimum, where PuLP passes it on: less than the search tells apart."""


def find_solver(name: str) -> Any:
    """PuLP's solver of a name: that of PuLP in any case ("PULP_CBC_CMD"), or without what stands around it ("cbc").

    Raises PartitionError for a name that PuLP does not know, and for a solver that is not on this machine.
    """
    wanted, known = name.lower(), list(dict.fromkeys(pulp.listSolvers()))
    named = [each for each in known if wanted in (each.lower(), short_name(each))]
    for each in named:
        solver = pulp.getSolver(each, msg=False)
        if solver.available():
            accepts = inspect.signature(type(solver).__init__).parameters
            return pulp.getSolver(each, msg=False, gapRel=GAP) if "gapRel" in accepts else solver
    here = ", ".join(dict.fromkeys([HIGHS, *map(short_name, pulp.listSolvers(onlyAvailable=True))]))
    if named:
        raise PartitionError(
            f"solver={name!r} is not available",
            f"PuLP knows {' and '.join(named)}, but finds no such program or package on this machine",
            f"one that is available: {here}",
        )
    near = closest(name, dict.fromkeys(map(short_name, known)))
    raise PartitionError(
        f"solver={name!r} is not known", f"available are {here}", " or ".join(f"solver={each!r}" for each in near)
    )


def short_name(name: str) -> str:
    """``"cbc"`` of PuLP's ``"PULP_CBC_CMD"``."""
    return name.lower().removeprefix("pulp_").partition("_")[0]


def minimise(sizes: Sizes, asked: SplitProblem, name: str) -> Solution | None:
    """The best choice by the solver of a name; None where there is none.

    The bound is the objective less the gap to which the solver proves it. Raises PartitionError where the solver fails
    or stops without a proof.
    """
    unit = unit_of(sizes, asked.costs)
    scaled = asked.scaled(unit, "units", OBJECTIVE_SCALE * MAX_COST_RATIO)
    ilp = state(sizes, scaled)
    try:
        ilp.problem.solve(find_solver(name))
    except (pulp.PulpSolverError, OSError) as error:
        raise PartitionError(f"the solver {name} fails on this machine", str(error), f"solver={HIGHS!r}") from error
    if ilp.problem.status == pulp.LpStatusInfeasible:
        return None
    if ilp.problem.sol_status != pulp.LpSolutionOptimal:
        told = pulp.LpStatus[ilp.problem.status]
        raise PartitionError(f"the solver {name} does not prove an optimum", f"it says {told!r}", f"solver={HIGHS!r}")
    chosen = tuple(int(np.argmax([x.varValue or 0.0 for x in options])) for options in ilp.x)
    z = np.array([z.varValue or 0.0 for z in ilp.z])
    objective = (float(scaled.costs @ z.round()) + (ilp.t.varValue or 0.0)) / unit
    return Solution(chosen, objective, objective - GAP * abs(objective), asked)
