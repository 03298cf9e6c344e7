"""A finished search -> the summary of it in its plan: its record, the runner-up, the resource that limits the plan."""

from collections import Counter
from dataclasses import replace

from autopart.cost.intervals import NEVER
from autopart.plan.search_summary import ENDS, RunnerUp, SearchedPoint, SearchSummary
from autopart.planner.branch_and_bound import Search, Step
from autopart.planner.candidate import TOLERANCE, SearchResult
from autopart.planner.search_points import SearchPoint
from autopart.planner.zero_levels import offloads

SMALL_BUBBLE = 0.05
"""Share of the step below which a pipeline's bubble is no reason to call the batch what limits a plan."""

COMPARED = 60
"""Search points that a plan remembers one by one."""

LAST: dict[int, str] = {
    0: "fastest strategies",
    Step.LP_BOUND: "linear relaxation",
    Step.CAPACITY: "capacity",
    Step.STAGE_CUT: "splits",
    Step.LAGRANGIAN: "memory multipliers",
    Step.REFINE: "refined",
}
"""The last step of a point, 0 for none -> how the search was done with the point."""


def summarize(search: Search, found: SearchResult) -> SearchSummary:
    """The summary of a finished search with its result."""
    ends = _ends(search, found)
    counts, order = Counter(ends.values()), list(ENDS)
    return SearchSummary(
        max(1, len(search.pushed)),
        _runner_up(search, found),
        _limit(search, found),
        search.history.thinned(),
        {end: counts[end] for end in sorted(counts, key=order.index)},
        _compared(search, ends),
    )


def _ends(search: Search, found: SearchResult) -> dict[SearchPoint, str]:
    """How the search was done with each of its points."""
    last = search.history.last_step
    ends = {point: LAST[last.get(point, 0)] for point in search.pushed}
    least = found.seconds * (1 - TOLERANCE)
    ends |= {point: "unfinished" for bound, _, point in search.queue if bound < least}
    ends |= dict.fromkeys(search.state_exceeds_memory, "state")
    return ends | {found.point: "chosen"}


def _compared(search: Search, ends: dict[SearchPoint, str]) -> tuple[SearchedPoint, ...]:
    """The points that the plan remembers one by one."""
    rows = []
    for point, bound in search.pushed.items():
        plans = search.plans.get(point)
        made = plans if plans and plans.best_seconds < NEVER else None
        seconds, nbytes = (made.best_seconds, made.best_bytes) if made else (None, None)
        if bound < NEVER:
            where = (*point.degrees, point.micro_batch, point.zero)
            offload, size = point.offload, point.shard_size
            rows.append(SearchedPoint(*where, seconds, bound, nbytes, ends[point], offload=offload, shard_size=size))

    def order(row: SearchedPoint) -> tuple[bool, float]:
        return row.seconds is None, row.bound_seconds if row.seconds is None else row.seconds

    return tuple(sorted(rows, key=order)[:COMPARED])


def _runner_up(search: Search, result: SearchResult) -> RunnerUp | None:
    """The point of other degrees with the fastest plan; where none has a plan, the point with the least bound. The
    bound of the whole search holds for all of them."""
    chosen, impossible = result.point, set(search.state_exceeds_memory)
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
    bound = min(max(min(bounds.values()), result.bound), *seconds.values(), NEVER)
    where = (*best.degrees, best.micro_batch, best.zero)
    return RunnerUp(*where, seconds.get(best), float(bound), offload=best.offload, shard_size=best.shard_size)


def _limit(search: Search, found: SearchResult) -> str:
    space, point = search.space, found.point
    if space.request.must_fit:
        if point.offload and False in offloads(space):
            return "memory"
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
