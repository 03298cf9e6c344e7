"""Lower bounds on single stages and single cuts of small models, by linear relaxations of their own; memory unlimited.

`lower_bounds` relaxes every segment class by itself. Here operators of different positions of a stage depend on
each other, and the stage's messages have a price. For the stage of positions i..j-1

    f(i, j)            >=  min over splits of  seconds of i..j-1 + messages + exposed gradient sync

Each stage of a plan has splits of its own. The splits of two stages agree on the placements of the values that pass
between them. The bound of one stage takes the best placement of each such value. All stages of one cut together have
the higher bound

    sum over stages f  >=  min over splits that agree of the sum of the right-hand sides

The best cut by the bounds so far is relaxed, again and again, until the best cut was relaxed already. The relaxations
of the best cuts give candidates.
"""

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autopart.cost.collectives import p2p_seconds
from autopart.cost.compute import Array
from autopart.cost.intervals import NEVER, interval_index
from autopart.cost.prices import Prices
from autopart.hardware.rows import Link
from autopart.passes.solve import Solution
from autopart.passes.split_problem import SplitProblem
from autopart.planner.allowed_choices import Options, both
from autopart.planner.candidate import CandidateSet, stage_columns
from autopart.planner.cuts import best_cut, spans_of
from autopart.planner.ilp_model import Model, is_partial
from autopart.planner.search_points import SearchPoint
from autopart.planner.search_space import SearchSpace, StageKey

MAX_VARIABLES = 200_000
"""Solver variables in all relaxations of one search together."""

MAX_CUTS = 2000
"""Cuts of a model that are listed."""

Span = tuple[int, int]
Stage = tuple[SearchPoint, Span]
"""A point of the stage's kind, and the stage's positions."""
Starts = tuple[int, ...]


@dataclass
class Effort:
    """The work that a search has spent of its limits. They count work, not seconds: every machine makes the same plan.

    variables         solver variables in relaxations of stages and cuts, at most MAX_VARIABLES
    refined           number of intervals whose exact splits were solved
    refining_stopped  whether the limit on `refined` left other intervals
    """

    variables: int = 0
    refined: int = 0
    refining_stopped: bool = False

    def spend(self, variables: int, relaxations: int, reserve: int) -> bool:
        """Count a number of relaxations of `variables` each. False, and nothing is counted, where the limit does not
        leave room for `reserve` of them."""
        if self.variables + reserve * variables > MAX_VARIABLES:
            return False
        self.variables += relaxations * variables
        return True


def few_cuts(space: SearchSpace, point: SearchPoint) -> bool:
    """Whether all cuts of a point can be listed."""
    return point.pp > 1 and math.comb(len(space.layered.labels) - 1, point.pp - 1) <= MAX_CUTS


def stage_bound(found: CandidateSet, columns: Mapping[StageKey, Array], effort: Effort) -> float:
    """Lower bound on the step of a point, infinite where no cut can beat the incumbent. Raises `columns`, the bounds of
    intervals by key of a stage, and adds the splits of the best cuts to the candidates."""
    space, point, solved = found.space, found.point, set[Stage]()
    m, n = space.micro_batches(point), len(space.layered.labels)
    variables, bounds = len(space.model(point).solver.used), stage_columns(space, point, columns)
    while (cut := best_cut(bounds, point.pp, m)) and cut.seconds < found.incumbent.seconds:
        stages = stages_of(space, point, cut.starts)
        left = [stage for stage in stages if stage not in solved]
        if not left or not effort.spend(variables, len(left), point.pp):
            _add_splits(found, stages)
            break
        for at, span in left:
            bound, _ = relaxed_stages(space, [(at, span)], space.options(point))
            where = interval_index(*span, n)
            for column in (column for (kind, _), column in columns.items() if kind == at.kind):
                column[where] = max(column[where], bound)
        solved.update(left)
    if cut is None or cut.seconds >= found.incumbent.seconds:
        return cut.seconds if cut else NEVER
    return max(cut.seconds, _cut_bound(found, [bounds(stage) for stage in range(point.pp)], effort))


def stages_of(space: SearchSpace, point: SearchPoint, starts: Starts) -> list[Stage]:
    """The stages of a cut."""
    spans = spans_of(starts, len(space.layered.labels))
    return [(space.at(point, stage), span) for stage, span in enumerate(spans)]


def _add_splits(found: CandidateSet, stages: Sequence[Stage]) -> None:
    """Add candidates for a cut: the splits that are best for all stages in common, then for each stage the best splits
    that agree with these."""
    space, point, model = found.space, found.point, found.space.model(found.point)
    _, common = relaxed_stages(space, stages, space.options(point))
    common = common and space.confirmed(point, common)
    if common is not None:
        found.add(common)
        agreeing = both(space.options(point), model.agreeing(model.interface(common.chosen)))
        for stage in stages:
            _, own = relaxed_stages(space, [stage], agreeing)
            found.add(own and space.confirmed(point, own))
    found.best_plan()


def _cut_bound(found: CandidateSet, columns: Sequence[Array], effort: Effort) -> float:
    """Lower bound on the step from relaxations of whole cuts, the least bound first; column s has the bounds of stage
    s. With R the relaxation of a cut of p stages, step >= R + (m - 1) max(largest bound of a stage, R / p)."""
    space, point, solved = found.space, found.point, set[Starts]()
    m, variables = space.micro_batches(point), len(space.model(point).solver.used)
    cuts = _cuts_by_bound(columns, len(space.layered.labels), m)
    while cuts and cuts[0][0] < found.incumbent.seconds and cuts[0][2] not in solved:
        if not effort.spend(variables, point.pp, point.pp):
            break
        bound, largest, starts = cuts[0]
        solved.add(starts)
        total, solutions = relaxed_cut(space, point, starts)
        if sum(found.add(space.confirmed(point, solution)) for solution in solutions):
            found.best_plan()
        heapq.heapreplace(cuts, (max(bound, total + (m - 1) * max(largest, total / point.pp)), largest, starts))
    return cuts[0][0] if cuts else NEVER


def _cuts_by_bound(columns: Sequence[Array], positions: int, micro_batches: int) -> list[tuple[float, float, Starts]]:
    """A heap of all cuts whose stages have finite bounds: lower bound on the step, largest bound of a stage, starts."""
    cuts = []
    for inner in itertools.combinations(range(1, positions), len(columns) - 1):
        spans = spans_of((0, *inner), positions)
        stages = [float(f[interval_index(*span, positions)]) for f, span in zip(columns, spans, strict=True)]
        if max(stages) < NEVER:
            cuts.append((sum(stages) + (micro_batches - 1) * max(stages), max(stages), (0, *inner)))
    heapq.heapify(cuts)
    return cuts


def stage_costs(space: SearchSpace, point: SearchPoint, span: Span) -> tuple[Array, Array]:
    """By priced variable, seconds of a micro-batch in a stage of the point's kind, linear in the splits: a lower bound
    on f (`Model.least_counts_in`); and f of splits in which every reshard of a value is needed in each of the stages
    that take the value. They differ where stages may want a tied weight in different placements."""
    model, modes, link = space.model(point), space.forced(point), space.between_stages(point)
    inside, windows = model.counts_in(*span), space.sync_windows(point)
    each = space.costs(point, modes).seconds / np.maximum(model.counts, 1.0)
    sent = messages(model, space.priced(point), span, link, least=True)[0] if link is not None else 0.0
    alone = model.counts_alone[slice(*span)].sum(0)
    first, last = model.counts_alone[span[0]], model.counts_alone[span[1] - 1]
    late = windows.scatter * (inside - alone + first) + windows.gather * (2 * (inside - alone) + first + last)
    rest = sent + late
    return each * model.least_counts_in(*span) + rest, each * inside + rest


def relaxed_stages(space: SearchSpace, stages: Sequence[Stage], allowed: Options) -> tuple[float, Solution | None]:
    """Lower bound on the seconds of some stages with the same splits; and the splits, None where the relaxation is
    fractional."""
    least, costs = np.sum([stage_costs(space, *stage) for stage in stages], axis=0)
    bound, found = space.model(stages[0][0]).solver.relax(least, allowed)
    if not np.array_equal(least, costs):
        _, found = space.model(stages[0][0]).solver.relax(costs, allowed)
    return bound, found and replace(found, problem=SplitProblem(costs, allowed))


def relaxed_cut(space: SearchSpace, point: SearchPoint, starts: Starts) -> tuple[float, list[Solution]]:
    """Lower bound on the seconds of all stages of a cut together, each with its own splits; and every stage's solution,
    [] where the relaxation is fractional. A solution's problem is that of its stage alone, with the options that agree
    with the other stages."""
    model, options = space.model(point), space.options(point)
    stages = stages_of(space, point, starts)
    least, costs = zip(*(stage_costs(space, *stage) for stage in stages), strict=True)
    bound, choices = model.pipeline(point.pp).relax(least, options)
    if not np.array_equal(least, costs):
        _, choices = model.pipeline(point.pp).relax(costs, options)
    agreeing = [both(options, model.agreeing(model.interface(chosen))) for chosen in choices]
    problems = map(SplitProblem, costs, agreeing)
    return bound, [Solution(chosen, 0.0, 0.0, each) for chosen, each in zip(choices, problems, strict=False)]


def messages(model: Model, prices: Prices, span: Span, link: Link, least: bool = False) -> Array:
    """[3, variables], each entry at the strategy that makes a value: seconds to send the values that a span takes or
    gives, and their gradients; bytes of the values that the span takes; bytes of those that it takes and does not save.

    A partial sum has the bytes of the placement in which it is made. With `least`: the fewest of the placements in
    which it may be taken."""
    sizes, table, found = model.sizes, model.table, np.zeros((3, len(model.counts)))
    for used in table.value_uses:
        source = table.nodes[used.source]
        inside = [span[0] <= producer < span[1] for producer in used.producers]
        crosses = [
            (here, {p for p in consumers if span[0] <= p < span[1]})
            for producer, consumers, here in zip(used.producers, used.consumers, inside, strict=True)
            if producer >= 0 and any(p >= 0 and (span[0] <= p < span[1]) != here for p in consumers)
        ]
        if not crosses or source.kind in ("parameter", "buffer"):
            continue
        value, saving = source.values[used.output], table.saving_positions.get(used.source, [])
        taken = [inside for here, inside in crosses if not here]
        unsaved = sum(inside.isdisjoint(saving) for inside in taken)
        for option in range(len(source.options)):
            have = source.given(option, used.output)
            wants = [w for h, w in used.chains if h == have] if least and is_partial(have) else []
            size = min(float(sizes.byte_coefficients(value, placed) @ prices.terms.basis) for placed in wants or [have])
            seconds = float(p2p_seconds(size, link)) * (1 + value.grad)
            at = sizes.first[used.source] + option
            found[:, at] += np.array([len(crosses) * seconds, len(taken) * size, unsaved * size])
    return found
