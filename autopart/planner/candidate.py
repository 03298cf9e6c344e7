"""One way to split everything, with what every range of positions costs under it."""

from __future__ import annotations

from dataclasses import dataclass

from autopart.passes.solve import Solution
from autopart.planner.interval_costs import IntervalCosts, ranges
from autopart.planner.request import SearchPoint
from autopart.planner.search_space import Interface, SearchSpace


@dataclass(frozen=True)
class Candidate:
    """A solution of the equations; `interface` is what the ways of a plan's stages must agree on."""

    solution: Solution
    ranges: IntervalCosts
    interface: Interface


def way_of(space: SearchSpace, point: SearchPoint, solution: Solution) -> Candidate:
    """Price a solution at every range of positions."""
    model = space.model(point)
    weighed, m = space.weigh(point, solution.chosen), space.micro_batches(point)
    priced = ranges(weighed, model.table.group, model.table.block, m, space.turns(point), space.allowed_modes)
    return Candidate(solution, priced, model.interface(solution.chosen))
