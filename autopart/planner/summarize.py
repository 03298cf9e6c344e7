"""A finished search -> the summary of it in its plan: the runner-up, and the resource that limits the plan."""

from dataclasses import replace

from autopart.cost.intervals import NEVER
from autopart.plan.search_summary import RunnerUp, SearchSummary
from autopart.planner.branch_and_bound import Search
from autopart.planner.candidate import TOLERANCE, SearchResult
from autopart.planner.search_points import SearchPoint

SMALL_BUBBLE = 0.05
"""Share of the step below which a pipeline's bubble is no reason to call the batch what limits a plan."""


def summarize(search: Search, found: SearchResult) -> SearchSummary:
    """The summary of a finished search with its result."""
    return SearchSummary(max(1, len(search.pushed)), _runner_up(search, found.point), _limit(search, found))


def _runner_up(search: Search, chosen: SearchPoint) -> RunnerUp | None:
    """The point of other degrees with the fastest plan; where none has a plan, the point with the least bound."""
    impossible = set(search.state_exceeds_memory)
    bounds = {
        point: bound
        for point, bound in search.pushed.items()
        if point.degrees != chosen.degrees and point not in impossible
    }
    if not bounds:
        return None
    seconds = {p: found.best_seconds for p, found in search.plans.items() if p in bounds and found.best_seconds < NEVER}
    table = seconds or bounds
    best = min(table, key=lambda point: (table[point], point))
    bound = min(min(bounds.values()), *seconds.values()) if seconds else min(bounds.values())
    return RunnerUp(*best.degrees, best.micro_batch, best.zero, seconds.get(best), float(bound))


def _limit(search: Search, found: SearchResult) -> str:
    space, point = search.space, found.point
    if space.request.must_fit:
        lower = {replace(point, zero=zero) for zero in range(point.zero)} if point.zero >= 2 else set()
        if lower & set(search.state_exceeds_memory):
            return "memory"
        if any(each.unlimited_seconds() < found.seconds * (1 - TOLERANCE) for each in search.plans.values()):
            return "memory"
    m, stages = space.micro_batches(point), point.pp
    idle = (stages - 1) / (m + stages - 1)
    no_smaller = point.micro_batch == point.dp
    if no_smaller and (idle > SMALL_BUBBLE or (m == 1 and stages == 1 and point.tp > 1)):
        return "batch"
    return "devices"
