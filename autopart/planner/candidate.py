"""Solutions of the ILP at one search point, and the fastest plan whose stages take their splits from these."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from autopart.cost.compute import Array
from autopart.cost.intervals import NEVER
from autopart.passes.solve import Solution
from autopart.passes.split_problem import SplitProblem
from autopart.plan.search_summary import SearchSummary
from autopart.planner.cuts import best_cut, spans_of
from autopart.planner.ilp_model import Interface
from autopart.planner.interval_costs import IntervalCosts, interval_costs
from autopart.planner.search_points import SearchPoint
from autopart.planner.search_space import SearchSpace, StageKey

TOLERANCE = 1e-9
"""Relative difference below which two times are equal."""


@dataclass(frozen=True)
class Candidate:
    """A solution of the ILP, priced on every interval of positions.

    costs      `SearchPoint.kind` of a stage -> the prices on its devices
    interface  the placements of what passes between stages; stages of one plan may take different candidates of one
               interface
    """

    solution: Solution
    costs: Mapping[int, IntervalCosts]
    interface: Interface


@dataclass(frozen=True)
class SearchResult:
    """A plan before it is written out.

    chosen         for every stage the option of each node
    starts         the first position of every stage
    recompute      for every position one of `liveness.MODES`
    stage_seconds  f of every stage: seconds of one micro-batch, forward and backward
    seconds        of a step: sum(f) + (m - 1) max(f) for m micro-batches
    bound          lower bound on the step of every plan in the search space, in seconds
    peak_bytes     peak bytes of a rank of every stage; () where the result is of no search
    problems       the ILP that the splits of every stage solve
    refined        number of intervals whose splits were refined
    stopped        whether the limit on `refined` left other intervals
    summary        the record of the search in the plan
    """

    point: SearchPoint
    chosen: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    recompute: tuple[str, ...]
    stage_seconds: tuple[float, ...]
    seconds: float
    bound: float = 0.0
    refined: int = 0
    stopped: bool = False
    problems: tuple[SplitProblem, ...] = ()
    peak_bytes: tuple[float, ...] = ()
    summary: SearchSummary | None = None


@dataclass
class Incumbent:
    """The fastest plan so far, of all points of a search."""

    result: SearchResult | None = None

    @property
    def seconds(self) -> float:
        """Of a step; infinite as long as there is no plan."""
        return self.result.seconds if self.result else NEVER

    def offer(self, result: SearchResult) -> None:
        """Take a plan if it is faster."""
        if result.seconds < self.seconds * (1 - TOLERANCE):
            self.result = result


@dataclass
class CandidateSet:
    """The candidates of one search point.

    best_seconds  of a step of the point's fastest plan; infinite without one
    best_bytes    peak bytes of a rank of that plan's fullest stage; 0 without one
    """

    space: SearchSpace
    point: SearchPoint
    incumbent: Incumbent
    candidates: list[Candidate] = field(default_factory=list)
    best_seconds: float = NEVER
    best_bytes: float = 0.0

    def add(self, solution: Solution | None) -> bool:
        """Make a candidate of a solution. False if the solution is None, or a candidate has it."""
        if solution is None or any(solution.chosen == c.solution.chosen for c in self.candidates):
            return False
        self.candidates.append(make_candidate(self.space, self.point, solution))
        return True

    def best_plan(self) -> SearchResult | None:
        """The fastest plan of the candidates, offered to the incumbent; None where none fits."""
        by_interface: dict[Interface, list[Candidate]] = defaultdict(list)
        for candidate in self.candidates:
            by_interface[candidate.interface].append(candidate)
        plans = [plan for same in by_interface.values() if (plan := self._fastest_plan(same))]
        best = min(plans, key=lambda plan: plan.seconds, default=None)
        self.best_seconds, self.best_bytes = (best.seconds, max(best.peak_bytes)) if best else (NEVER, 0.0)
        if best:
            self.incumbent.offer(best)
        return best

    def unlimited_seconds(self) -> float:
        """Seconds of a step of the best cut with the splits of the first candidate, memory unlimited; infinite where
        constraints allow no cut."""
        space, point, costs = self.space, self.point, self.candidates[0].costs
        columns = {key: costs[key[0]].seconds for key in space.stage_keys(point)}
        cut = best_cut(stage_columns(space, point, columns), point.pp, space.micro_batches(point))
        return cut.seconds if cut else NEVER

    def fastest(self, candidates: Sequence[Candidate], keys: Iterable[StageKey], most: float) -> dict[StageKey, Array]:
        """Key of a stage -> [intervals]: f with the fastest of some candidates, infinite above `most`."""
        space, columns = self.space, dict[StageKey, Array]()
        for kind, in_flight in keys:
            limit, every = space.limit(replace(self.point, kind=kind)), [c.costs[kind] for c in candidates]
            columns[kind, in_flight] = column = np.full_like(every[0].seconds, NEVER)
            for costs in every:
                where = costs.within(most)
                f = costs.least_seconds(where, in_flight, limit, space.modes)
                column[where] = np.minimum(column[where], np.where(f <= most, f, NEVER))
        return columns

    def _fastest_plan(self, candidates: Sequence[Candidate]) -> SearchResult | None:
        """The best cut into stages, each of which takes the fastest of some candidates of one interface."""
        space, point, m = self.space, self.point, self.space.micro_batches(self.point)
        most = max_stage_seconds(space, point, self.incumbent.seconds)
        columns = self.fastest(candidates, space.stage_keys(point), most)
        cut = best_cut(stage_columns(space, point, columns), point.pp, m)
        if cut is None:
            return None
        chosen, modes, times, problems, peaks = [], [], [], [], []
        for stage, (i, j) in enumerate(spans_of(cut.starts, len(space.layered.labels))):
            (kind, in_flight), limit = space.stage_key(point, stage), space.limit(space.at(point, stage))
            every = [c.costs[kind] for c in candidates]
            where = np.array([every[0].index(i, j)])
            seconds = [costs.least_seconds(where, in_flight, limit, space.modes)[0] for costs in every]
            fastest = int(np.argmin(seconds))
            recompute, peak = every[fastest].modes(i, j, in_flight, limit, space.modes)
            chosen.append(candidates[fastest].solution.chosen)
            problems.append(candidates[fastest].solution.problem)
            modes += recompute
            peaks.append(peak)
            times.append(every[fastest].exact_seconds(i, j, recompute))
        step = sum(times) + (m - 1) * max(times)
        splits = tuple(filter(None, problems))
        return SearchResult(
            point, tuple(chosen), cut.starts, tuple(modes), tuple(times), step, problems=splits, peak_bytes=tuple(peaks)
        )


def make_candidate(space: SearchSpace, point: SearchPoint, solution: Solution) -> Candidate:
    """Price a solution on every interval of positions."""
    kinds = space.each_kind(point)
    costs = {at.kind: costs_of(space, at, solution.chosen, space.allowed_modes) for at in kinds}
    return Candidate(solution, costs, space.model(point).interface(solution.chosen))


def costs_of(
    space: SearchSpace, point: SearchPoint, chosen: tuple[int, ...], allowed: Sequence[tuple[str, ...]]
) -> IntervalCosts:
    """The costs of all intervals under a choice, on the devices of the point's kind. `allowed`: the checkpointing modes
    of each position."""
    table, m = space.model(point).table, space.micro_batches(point)
    costs = space.position_costs(point, chosen)
    turns, host = space.amortization(point), host_limit(space, point)
    return interval_costs(costs, table.segment_classes, table.block, m, turns, allowed, host)


def host_limit(space: SearchSpace, point: SearchPoint) -> float:
    """Bytes of its host that a rank of a stage may fill; infinite for a request that need not fit."""
    return space.view(point).device.usable_host_bytes if space.request.must_fit else NEVER


def max_stage_seconds(space: SearchSpace, point: SearchPoint, step: float) -> float:
    """The most seconds f of a stage in a plan of less than `step` seconds: (step - LP bound) / (m - 1), since
    step >= sum(f) + (m - 1) max(f) and sum(f) >= LP bound."""
    m = space.micro_batches(point)
    return (step - space.lp_bound(point)) / (m - 1) if m > 1 else step


def stage_columns(space: SearchSpace, point: SearchPoint, columns: Mapping[StageKey, Array]) -> Callable[[int], Array]:
    """For `best_cut`: stage -> f of every interval, from f by the key of a stage; infinite where constraints
    forbid the stage to be that interval."""
    allowed = space.stages(point)
    every = all(mask.all() for mask in {id(mask): mask for mask in allowed}.values())

    def column(stage: int) -> Array:
        f = columns[space.stage_key(point, stage)]
        return f if every else np.where(allowed[stage], f, NEVER)

    return column
