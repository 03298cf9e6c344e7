"""The last step of the search, for small models: the exact splits of single intervals that fit in memory.

For an interval that memory makes slower than its lower bound, `exact_refinement` solves the ILP with peak memory as
constraints: once for every known interface between stages, and every number of blocks in each checkpointing mode. The
limits count intervals, not seconds, so that every machine makes the same plan.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from autopart.cost.compute import Array
from autopart.cost.intervals import NEVER, interval_ends
from autopart.planner.allowed_choices import Options, both
from autopart.planner.candidate import TOLERANCE, CandidateSet
from autopart.planner.exact_refinement import fastest_that_fit
from autopart.planner.ilp_model import Interface
from autopart.planner.search_points import SearchPoint
from autopart.planner.search_space import StageKey
from autopart.planner.stage_bounds import Effort

SMALL = 12, 2500
"""The most positions of a small model, and the most variables of its ILP."""

EXACT_LIMIT, LIMIT = 500, 24
"""The most intervals that one search refines: where the request is `exact`, and otherwise."""

MIN_GAP = 0.01
"""Without `exact` an interval is refined only if the gap is more than this share of the step."""

MAX_SOLVES = 4
"""The most ILPs of one interval, each with a lower limit on bytes than the one before."""


def may_refine(found: CandidateSet, bound: float, memory_binds: bool) -> bool:
    """Whether to refine a point with this lower bound: its model is small, the bound is below the incumbent, and either
    the request is `exact` or memory binds with a gap above MIN_GAP."""
    incumbent, exact = found.incumbent.seconds, found.space.request.exact
    if not is_small(found) or bound >= min(incumbent, found.best_seconds):
        return False
    return exact or (memory_binds and bound < incumbent * (1 - MIN_GAP))


def is_small(found: CandidateSet) -> bool:
    """Whether a point's model is small."""
    positions, variables = SMALL
    return len(found.space.layered.labels) <= positions and len(found.space.model(found.point).solver.used) <= variables


def refine_intervals(found: CandidateSet, bounds: Mapping[StageKey, Array], effort: Effort) -> None:
    """Add the exact splits of all intervals that are slower than their bounds; `bounds` are by key of a stage.
    First every interval by itself, then again for each interface, so that the stages of a plan agree."""
    _refine_stages(found, None, bounds, effort)
    if found.point.pp > 1:
        for interface in dict.fromkeys(c.interface for c in found.candidates):
            _refine_stages(found, interface, bounds, effort)
    found.best_plan()


def _refine_stages(
    found: CandidateSet, interface: Interface | None, bounds: Mapping[StageKey, Array], effort: Effort
) -> None:
    """Refine the intervals of every stage, with one interface or any."""
    space, point = found.space, found.point
    model, n = space.model(point), len(space.layered.labels)
    intervals, allowed = np.transpose(interval_ends(n)), space.options(point)
    if interface is not None:
        allowed = both(allowed, model.agreeing(interface))
    limit = EXACT_LIMIT if space.request.exact else LIMIT
    for stage in range(point.pp):
        at, key = space.at(point, stage), space.stage_key(point, stage)
        same = [c for c in found.candidates if interface in (None, c.interface)]
        known, least = found.fastest(same, [key], NEVER)[key], bounds[key]
        slower = (least < found.incumbent.seconds) & (known > least * (1 + TOLERANCE)) & space.stages(point)[stage]
        for i, j in intervals[slower].tolist():
            if (i == 0) != (stage == 0) or (j == n) != (stage == point.pp - 1):
                continue
            for counts in _mode_counts(model.table.segment_classes[i:j], model.blocks, space.modes):
                if effort.refined >= limit:
                    effort.refining_stopped = True
                    return
                effort.refined += 1
                _refine_interval(found, at, (i, j), counts, key[1], allowed)


def _refine_interval(
    found: CandidateSet,
    point: SearchPoint,
    interval: tuple[int, int],
    counts: Mapping[int, Mapping[str, int]],
    in_flight: int,
    allowed: Options,
) -> None:
    """Add the fastest splits of an interval that fit a stage of the point's kind. The ILP leaves out some bytes of the
    prelude: where a solution exceeds the device, the ILP is solved again with its limit lowered by the excess."""
    space, limit = found.space, found.space.limit(point)
    for _ in range(MAX_SOLVES):
        solution = fastest_that_fit(space, point, interval, limit, counts, in_flight, allowed)
        if solution is None:
            return
        found.add(solution)
        (costs,) = (c.costs[point.kind] for c in found.candidates if c.solution.chosen == solution.chosen)
        excess = costs.shortfall(in_flight, space.limit(point), space.modes)[costs.index(*interval)]
        if excess <= 0:
            return
        limit -= excess


def _mode_counts(
    segment_classes: Sequence[int], blocks: Sequence[int], modes: Sequence[str]
) -> Iterator[dict[int, dict[str, int]]]:
    """Every assignment of modes to the blocks of some positions: segment class -> mode -> number of blocks."""
    blocks_of = {c: segment_classes.count(c) for c in blocks if c in segment_classes}
    picks = (itertools.combinations_with_replacement(modes, count) for count in blocks_of.values())
    for chosen in itertools.product(*picks):
        yield {c: {mode: pick.count(mode) for mode in set(pick)} for c, pick in zip(blocks_of, chosen, strict=True)}
