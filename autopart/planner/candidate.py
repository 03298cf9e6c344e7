"""One way to split everything, with what every range of positions costs under it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autopart.passes.solve import Solution
from autopart.planner.interval_costs import IntervalCosts, interval_costs
from autopart.planner.request import SearchPoint
from autopart.planner.search_space import Interface, SearchSpace


@dataclass(frozen=True)
class Candidate:
    """A solution of the equations; `interface` is what the ways of a plan's stages must agree on."""

    solution: Solution
    costs: IntervalCosts
    interface: Interface


def way_of(space: SearchSpace, point: SearchPoint, solution: Solution) -> Candidate:
    """Price a solution at every range of positions."""
    costs = costs_of(space, point, solution.chosen, space.allowed_modes)
    return Candidate(solution, costs, space.model(point).interface(solution.chosen))


def costs_of(
    space: SearchSpace, point: SearchPoint, chosen: tuple[int, ...], allowed: Sequence[tuple[str, ...]]
) -> IntervalCosts:
    """All intervals of a choice, whose positions may use the checkpointing modes of `allowed`."""
    table, m = space.model(point).table, space.micro_batches(point)
    costs = space.position_costs(point, chosen)
    return interval_costs(costs, table.group, table.block, m, space.amortization(point), allowed)
