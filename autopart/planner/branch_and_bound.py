"""Branch and bound over the outer search: degrees, micro-batch, ZeRO level; at each point splits, checkpointing, cuts.

The problem. With m micro-batches and f[s] the seconds of stage s for one of them,

    minimise  step = sum over s of f[s] + (m - 1) max over s of f[s]

over the points of `search_points`, the splits of every operator (the ILP of `passes.formulate`), the checkpointing of
every block and the cuts into stages, such that the peak bytes of every stage are at most those of a device.

The bounds. A point's lower bound rises in the steps of `Step`, each dearer than the one before:

    (start)     every operator in its fastest strategy, no cost of reshards
    LP_BOUND    the linear relaxation of the ILP, memory unlimited; before it the dual bound, from multipliers of
                relaxations that were solved at other points
    CAPACITY    the best cut by lower bounds of intervals, infinite for intervals that cannot fit (`lower_bounds`,
                multiplier 0)
    STAGE_CUT   the ILP's solution, cut into stages exactly (`cuts`): the point's first plan
    LAGRANGIAN  the best cut by lower bounds of intervals with multipliers for bytes (`lower_bounds`)
    REFINE      further candidates with less memory; for small models the relaxations of single stages and cuts
                (`stage_bounds`) and the exact splits of intervals (`refinement`)

The search takes the point with the least bound, does its next step and puts it back with its new bound. A point whose
bound reaches the incumbent's seconds is pruned. The least bound of all pruned points and of the queue is a lower bound
on every plan of the space: gap = 1 - bound / step. `tests/planner/test_brute.py` holds both against full enumeration.
"""

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum, auto

from autopart.cost.compute import Array
from autopart.cost.intervals import NEVER
from autopart.planner.candidate import (
    TOLERANCE,
    CandidateSet,
    Incumbent,
    SearchResult,
    max_stage_seconds,
    stage_columns,
)
from autopart.planner.class_bounds import best_modes, least_work, state_fits
from autopart.planner.cuts import best_cut
from autopart.planner.infeasibility import Shortfall, closest, missing_bytes, nothing_fits
from autopart.planner.lower_bounds import LagrangianBounds
from autopart.planner.progress import OnProgress, Progress, silent
from autopart.planner.refinement import is_small, may_refine, refine_intervals
from autopart.planner.search_history import SearchHistory
from autopart.planner.search_points import SearchPoint
from autopart.planner.search_space import SearchSpace, StageKey
from autopart.planner.setting_seconds import offload_seconds
from autopart.planner.stage_bounds import Effort, few_cuts, stage_bound
from autopart.planner.zero_levels import following, settings_of, starting_points

HOPELESS = 0.05
"""Share of a device's memory. Where a large model's candidate of least memory lacks more, no other is tried without
an incumbent: most likely nothing fits."""


class Step(IntEnum):
    """What the search does next with a point; see the module's table."""

    LP_BOUND = auto()
    CAPACITY = auto()
    STAGE_CUT = auto()
    LAGRANGIAN = auto()
    REFINE = auto()


@dataclass
class Search:
    """One search of a space.

    heuristic            whether to skip the steps that only raise bounds once there is a plan; bounds stay valid
    queue                (bound in seconds of a step, next step, point), the least bound first
    pushed               every point that was ever in the queue, with its last lower bound in seconds
    pruned_bound         the least bound of the points that left the queue
    visited              number of points taken from the queue
    plans                the candidates of every point that was cut into stages
    state_exceeds_memory points whose parameters, gradients and optimizer states alone exceed all devices
    shortfall            the bytes that are lacking, once `run` has raised because nothing fits
    history              incumbent and bound over time, and the last step of every point
    """

    space: SearchSpace
    on_progress: OnProgress = silent
    heuristic: bool = False
    incumbent: Incumbent = field(default_factory=Incumbent)
    queue: list[tuple[float, Step, SearchPoint]] = field(default_factory=list)
    pushed: dict[SearchPoint, float] = field(default_factory=dict)
    pruned_bound: float = NEVER
    visited: int = 0
    plans: dict[SearchPoint, CandidateSet] = field(default_factory=dict)
    state_exceeds_memory: list[SearchPoint] = field(default_factory=list)
    shortfall: Shortfall | None = None
    history: SearchHistory = field(default_factory=SearchHistory)
    effort: Effort = field(default_factory=Effort)
    _bounds: dict[SearchPoint, list[LagrangianBounds]] = field(default_factory=dict)
    _open: dict[SearchPoint, tuple[list[float], dict[StageKey, Array]]] = field(default_factory=dict)
    """Between LAGRANGIAN and REFINE: memory multipliers, and by key of a stage the bounds of all intervals."""
    _raised: set[SearchPoint] = field(default_factory=set)
    """Points whose `following` ones were put in the queue."""
    _waiting: list[tuple[float, Step, SearchPoint]] = field(default_factory=list)
    """What is put in the queue as soon as there is an incumbent."""

    def run(self) -> SearchResult:
        """The fastest plan, with its lower bound. Raises PartitionError where none fits."""
        request, started, progress = self.space.request, time.monotonic(), Progress(self.on_progress)
        steps = {
            Step.LP_BOUND: self._lp_bound,
            Step.CAPACITY: self._capacity,
            Step.STAGE_CUT: self._stage_cut,
            Step.LAGRANGIAN: self._lagrangian,
            Step.REFINE: self._refine,
        }
        self._fill_queue()
        while self.queue and self.queue[0][0] < self.incumbent.seconds * (1 - TOLERANCE):
            out_of_time = request.time_limit is not None and time.monotonic() - started > request.time_limit
            if self.incumbent.result and (out_of_time or (request.nodes is not None and self.visited >= request.nodes)):
                break
            self.visited += 1
            bound, step, point = heapq.heappop(self.queue)
            if step >= Step.LAGRANGIAN and self.heuristic and self.incumbent.result:
                self._prune(bound)
                continue
            steps[step](point, bound)
            while self.incumbent.result and self._waiting:
                heapq.heappush(self.queue, self._waiting.pop())
            self.history.note(point, step, self.visited, self.incumbent.seconds, self.bound)
            progress.tell(self.incumbent.seconds, self.bound, self.visited)
        if self.incumbent.result is None:
            candidates = {point: found.candidates for point, found in self.plans.items()}
            self.shortfall = closest(self.space, candidates, self.state_exceeds_memory)
            raise nothing_fits(self.space, self.shortfall)
        spent = self.effort
        return replace(self.incumbent.result, bound=self.bound, refined=spent.refined, stopped=spent.refining_stopped)

    def warm_start(self, points: Sequence[SearchPoint]) -> None:
        """Find an incumbent among some points, given in rising order of their known bounds. Each is tried with its
        fastest splits, at its own ZeRO level and then at higher ones and with offload until a plan fits."""
        space, known, started = self.space, set(self.space.points()), time.monotonic()
        for point in points:
            out_of_time = time.monotonic() - started > (space.request.time_limit or NEVER)
            if self.incumbent.result and (
                out_of_time or self._step_bound(point, space.known_bound(point)) >= self.incumbent.seconds
            ):
                break
            levels = settings_of(space, point) if replace(point, zero=0, offload=False, shard_size=0) in known else []
            levels = levels[levels.index(point) if point in levels else 0 :]
            if not levels or not all(space.options(point).values()):
                continue
            first = space.at(levels[0], 0)
            solution = space.solve(first, 0.0, space.forced(first))
            for level in levels if solution else ():
                found = self._plans_at(level)
                found.add(solution)
                if found.best_plan():
                    break

    @property
    def bound(self) -> float:
        """Lower bound on the step of every plan of the space, in seconds."""
        return min(self.pruned_bound, self.queue[0][0] if self.queue else NEVER, self.incumbent.seconds)

    def _fill_queue(self) -> None:
        for point in self.space.points():
            if all(self.space.options(point).values()):
                work = least_work(self.space, point)
                for at in starting_points(self.space, point):
                    self._push(self._step_bound(point, max(work, self.space.known_bound(at))), Step.LP_BOUND, at)

    def _step_bound(self, point: SearchPoint, seconds: float) -> float:
        """Lower bound on a step, from a lower bound on the sum of all stages' seconds."""
        return point.step_factor(self.space.request.global_batch) * seconds

    def _push(self, bound: float, step: Step, point: SearchPoint) -> None:
        self.pushed[point] = bound
        heapq.heappush(self.queue, (bound, step, point))

    def _prune(self, bound: float) -> None:
        self.pruned_bound = min(self.pruned_bound, bound)

    def _push_next_zero(self, point: SearchPoint, bound: float) -> None:
        """Put the points of less memory that follow in the queue, once, if they are not there from the start; of a
        first point with offload only where its bound is below the incumbent's seconds."""
        if point not in self._raised:
            self._raised.add(point)
            for at in following(self.space, point):
                least = bound + offload_seconds(self.space, point, at)
                if least < self.incumbent.seconds or at.offload == point.offload:
                    self._push(least, Step.LP_BOUND, at)

    def _plans_at(self, point: SearchPoint) -> CandidateSet:
        """A new empty set of candidates for a point."""
        self.plans[point] = CandidateSet(self.space, point, self.incumbent)
        return self.plans[point]

    def _lp_bound(self, point: SearchPoint, bound: float) -> None:
        """Raise the bound to the dual bound; if the point is still the first of the queue, to the linear relaxation. A
        point whose states exceed all devices is noted for the error message; its next ZeRO level takes its place."""
        dual = self._step_bound(point, self.space.dual_bound(point))
        if dual > bound and dual > self.bound:
            self._push(dual, Step.LP_BOUND, point)
        elif not state_fits(self.space, point):
            self.state_exceeds_memory.append(point)
            self._push_next_zero(point, bound)
        else:
            following = Step.STAGE_CUT if self.heuristic else Step.CAPACITY
            self._push(max(bound, self._step_bound(point, self.space.lp_bound(point))), following, point)

    def _capacity(self, point: SearchPoint, bound: float) -> None:
        """The bound of the best cut whose stages fit in the splits and checkpointing of least memory."""
        least, _ = self._cut_bound(point, self._bounds_at(point))
        if least > bound * (1 + TOLERANCE):
            self._push_next_zero(point, bound)
        if least < self.incumbent.seconds:
            self._push(max(bound, least), Step.STAGE_CUT, point)
        elif self.incumbent.result is None:  # if nothing fits at all, the error names what this point's candidate lacks
            self._push(bound, Step.STAGE_CUT, point)

    def _stage_cut(self, point: SearchPoint, bound: float) -> None:
        """Cut the ILP's splits into stages. A plan as fast as the point's bound ends the point, and with it higher ZeRO
        levels, which take no less time."""
        space, found = self.space, self._plans_at(point)
        for at in space.each_kind(point):
            solution = space.solve(at, 0.0, space.forced(at))
            assert solution is not None
            found.add(solution)
            if at == point:
                bound = max(bound, self._step_bound(point, solution.bound))
        plan = found.best_plan()
        if plan is not None and plan.seconds <= bound * (1 + TOLERANCE):
            self._prune(bound)
            return
        self._push(bound, Step.LAGRANGIAN, point)
        self._push_next_zero(point, bound)

    def _lagrangian(self, point: SearchPoint, bound: float) -> None:
        """Add higher memory multipliers, as long as they raise the bound of the best cut."""
        bounds, multipliers = self._bounds_at(point), self._multipliers(point)
        least, columns = self._cut_bound(point, bounds)
        for multiplier in multipliers[1:] if least < self.incumbent.seconds else ():
            before = least
            for of_kind in bounds:
                of_kind.add_multiplier(multiplier)
            least, columns = self._cut_bound(point, bounds)
            if least >= self.incumbent.seconds or least <= before * (1 + TOLERANCE):
                break
        bound = max(bound, least)
        if bound < self.incumbent.seconds:
            self._open[point] = multipliers, columns
            self._push(bound, Step.REFINE, point)

    def _refine(self, point: SearchPoint, bound: float) -> None:
        """Add candidates that take less memory. If the candidate of least memory does not fit and there is an
        incumbent, no others are tried. A large model that lacks much waits for an incumbent. Small models go on to
        bounds of single stages and to exact splits."""
        space, found, (multipliers, columns) = self.space, self.plans[point], self._open[point]
        least_memory = {segment_class: mode for segment_class in space.model(point).blocks for mode in space.modes[-1:]}
        found.add(space.solve(space.at(point, 0), NEVER, least_memory))
        fits = found.best_plan() is not None
        if not (fits or self.incumbent.result or is_small(found)) and missing_bytes(found) > HOPELESS * space.limit(
            point
        ):
            self._waiting.append((bound, Step.REFINE, point))
            return
        del self._open[point]
        if fits or self.incumbent.result is None:
            for multiplier in multipliers:
                for at in space.each_kind(point):
                    for modes in best_modes(space, at, multiplier):
                        found.add(space.solve(at, multiplier, modes))
            if len(found.candidates) > 2:
                found.best_plan()
        if few_cuts(space, point):
            bound = max(bound, stage_bound(found, columns, self.effort))
        if may_refine(found, bound, memory_binds=bool(multipliers)):
            refine_intervals(found, columns, self.effort)
        self._prune(bound)

    def _bounds_at(self, point: SearchPoint) -> list[LagrangianBounds]:
        """A point's bounds for each kind of its stages. They begin with the multipliers infinity (bytes alone) and 0
        (seconds alone)."""
        if point not in self._bounds:
            self._bounds[point] = [LagrangianBounds(self.space, at) for at in self.space.each_kind(point)]
            for bounds in self._bounds[point]:
                bounds.add_multiplier(NEVER)
                bounds.add_multiplier(0.0)
        return self._bounds[point]

    def _cut_bound(self, point: SearchPoint, bounds: Sequence[LagrangianBounds]) -> tuple[float, dict[StageKey, Array]]:
        """Lower bound on the step of a point, infinite where no cut can beat the incumbent; and key of a stage -> the
        bounds g of all intervals. The lower bound is

            max(min over cuts of (sum(g) + (m - 1) max(g)),  LP bound + (m - 1) min over cuts of max(g))
        """
        space, m = self.space, self.space.micro_batches(point)
        most, columns = max_stage_seconds(space, point, self.incumbent.seconds), dict[StageKey, Array]()
        for of_kind in bounds:
            columns |= of_kind.columns(most)
        cut = best_cut(stage_columns(space, point, columns), point.pp, m)
        if cut is None:
            return NEVER, columns
        return max(cut.seconds, space.lp_bound(point) + (m - 1) * cut.least_max), columns

    def _multipliers(self, point: SearchPoint) -> list[float]:
        """Memory multipliers to try, in seconds per byte: a tiny one, which among splits of equal seconds prefers fewer
        bytes; those at which a segment class begins to recompute; larger ones. [] where memory does not bind: the
        point's best plan is as fast as its first candidate with memory unlimited."""
        space, found = self.space, self.plans[point]
        if found.best_seconds < NEVER and found.best_seconds <= found.unlimited_seconds() * (1 + TOLERANCE):
            return []
        kinds = list(found.candidates[0].costs.values())
        whole = kinds[0].index(0, len(space.layered.labels))
        seconds = min(float(costs.seconds[whole]) for costs in kinds)
        saved, state = (float(x[whole]) for x in (kinds[0].saved_bytes, kinds[0].state_bytes))
        steps = [step for costs in kinds for steps in costs.savings[-1].values() for step in steps]
        ratios = sorted(step.seconds / step.bytes for step in steps) or [seconds / max(saved, 1.0)]
        least = 1e-6 * seconds / max(saved + state, 1.0)
        return [min(least, ratios[0]), *ratios, *(ratios[-1] * factor for factor in (3, 30, 1000))]
