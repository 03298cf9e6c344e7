"""One way to split everything, with what every range of positions costs under it."""

from __future__ import annotations

from dataclasses import dataclass

from autopart.passes.solve import Solution
from autopart.planner.interval_costs import Ranges, ranges
from autopart.planner.request import Point
from autopart.planner.search_space import Interface, Space


@dataclass(frozen=True)
class Way:
    """A solution of the equations; `interface` is what the ways of a plan's stages must agree on."""

    solution: Solution
    ranges: Ranges
    interface: Interface


def way_of(space: Space, point: Point, solution: Solution) -> Way:
    """Price a solution at every range of positions."""
    model = space.model(point)
    weighed, m = space.weigh(point, solution.chosen), space.micro_batches(point)
    priced = ranges(weighed, model.table.group, model.table.block, m, space.turns(point), space.allowed_modes)
    return Way(solution, priced, model.interface(solution.chosen))
