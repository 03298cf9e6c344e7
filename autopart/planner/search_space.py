"""All plans that a request allows: tables, prices, solutions and bounds, each computed once."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopart.cost.compute import Array
from autopart.cost.intervals import NEVER, interval_ends
from autopart.cost.liveness import MODES
from autopart.cost.position_costs import PositionCosts, position_costs
from autopart.cost.prices import Prices, Terms
from autopart.cost.training_state import Training, amortization, shard_groups, step_kernel, widening
from autopart.errors import PartitionError
from autopart.hardware.mesh import Mesh, usable_bytes
from autopart.hardware.mixed import view_of, views_of
from autopart.hardware.rows import Device, Link
from autopart.ir.labels import is_block
from autopart.ir.layered_graph import LayeredGraph
from autopart.passes.formulate import formulate
from autopart.passes.solve import HIGHS, Solution
from autopart.passes.split_problem import SplitProblem
from autopart.plan.schedules import SCHEDULES, in_flight
from autopart.planner.allowed_choices import Options, modes_of, options_of, positions_of, stages_of
from autopart.planner.constraints import check_names
from autopart.planner.cut_constraints import Cuts
from autopart.planner.ilp_model import Model
from autopart.planner.objective import Costs, SyncWindows, costs_by_mode, exposed_sync_bounds, sync_windows
from autopart.planner.request import Request
from autopart.planner.search_points import MIXED, SearchPoint, search_points

StageKey = tuple[int, int]
"""(`SearchPoint.kind`, micro-batches in flight) of a stage."""

micro_batches_in_flight = lru_cache(maxsize=None)(in_flight)


@dataclass
class SearchSpace:
    """All plans of a model on a mesh that a request allows.

    The dictionaries cache results. Spaces that differ in constraints alone may share these: constraints are part of
    the keys, or do not change values. `models` depend on the device and on whether a degree of `tp` is asked for.
    """

    layered: LayeredGraph
    mesh: Mesh
    request: Request
    models: dict[int, Model] = field(default_factory=dict)
    prices: dict[SearchPoint, Prices] = field(default_factory=dict)
    solved: dict[object, Solution | None] = field(default_factory=dict)
    bounds: dict[object, float] = field(default_factory=dict)
    choice_costs: dict[tuple[SearchPoint, tuple[int, ...]], PositionCosts] = field(default_factory=dict)
    mode_costs: dict[SearchPoint, tuple[Costs, ...]] = field(default_factory=dict)
    relaxations: dict[object, tuple[float, Solution | None]] = field(default_factory=dict)
    exposed: dict[SearchPoint, Array] = field(default_factory=dict)
    hiding: dict[object, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise PartitionError where constraints name what the model does not have."""
        self.settings: dict[SearchPoint, list[SearchPoint]] = {}
        self._options: dict[int, Options] = {}
        self._stages: dict[object, list[NDArray[np.bool_]]] = {}
        check_names(self.request.constraints, self.layered.labels, self.layered.keys.values())

    # ---- what a point is ----------------------------------------------------------------------------------

    def points(self) -> Iterator[SearchPoint]:
        """Every combination of degrees and micro-batch, at ZeRO level 0. Raises PartitionError if there is none."""
        return map(self.placed, search_points(self.layered, self.mesh, self.request))

    def placed(self, point: SearchPoint) -> SearchPoint:
        """The point with the `kind` of its stages, MIXED where they differ."""
        kinds = {view_of(self.mesh, stage, point.pp) for stage in range(point.pp)}
        return replace(point, kind=kinds.pop() if len(kinds) == 1 else MIXED)

    def at(self, point: SearchPoint, stage: int) -> SearchPoint:
        """The point with the `kind` of one of its stages."""
        return replace(point, kind=view_of(self.mesh, stage, point.pp)) if point.kind == MIXED else point

    def each_kind(self, point: SearchPoint) -> list[SearchPoint]:
        """The point with every `kind` that its stages have, in the order of stages."""
        return list(dict.fromkeys(self.at(point, stage) for stage in range(point.pp if point.kind == MIXED else 1)))

    def view(self, point: SearchPoint) -> Mesh:
        """The mesh as stages of the point's kind have it; where they differ, what all have together."""
        return self.mesh if point.kind == MIXED else views_of(self.mesh)[point.kind]

    def limit(self, point: SearchPoint) -> float:
        """Bytes of a device of a stage that a plan may fill; infinite for a request that need not fit."""
        return usable_bytes(self.view(point)) if self.request.must_fit else float("inf")

    def model(self, point: SearchPoint) -> Model:
        """The table of strategies of the point's `tp`, with its solvers."""
        if point.tp not in self.models:
            forced = (self.request.tp or 1) > 1
            self.models[point.tp] = Model(formulate(self.layered, self.mesh.device, point.tp, forced))
        return self.models[point.tp]

    def micro_batches(self, point: SearchPoint) -> int:
        """Micro-batches of a step."""
        return self.request.global_batch // point.micro_batch

    def amortization(self, point: SearchPoint) -> int:
        """See `training_state.amortization`."""
        return amortization(point.zero, self.micro_batches(point), point.pp)

    def training(self, point: SearchPoint) -> Training:
        """The optimizer, ZeRO level, data-parallel group, micro-batches and master dtype."""
        asked, device, view = self.request, self.mesh.device, self.view(point)
        ratio, gpu, m = widening(asked.precision, asked.master), device.type != "cpu", self.micro_batches(point)
        group, parts = view.group(point.tp, point.dp), shard_groups(view, point.tp, point.dp, point.shard_size)
        kernel = step_kernel(asked.optimizer, asked.precision, asked.master, device, asked.no_fuse, point.offload)
        ahead = asked.prefetch_bytes(device) if point.zero >= 3 and point.dp > 1 else 0
        return Training(asked.optimizer, point.zero, group, m, ratio, gpu, kernel, point.offload, gpu, ahead, *parts)

    def device(self, point: SearchPoint) -> Device:
        """The device at the pace that it has in the point's pipeline: `Mesh.busy_device`."""
        return self.view(point).busy_device(point.pp, self.micro_batches(point))

    def between_stages(self, point: SearchPoint) -> Link | None:
        """The link between stages; None where there is one stage."""
        return self.mesh.between(point.dp * point.tp, point.pp, self.micro_batches(point)) if point.pp > 1 else None

    @cached_property
    def schedule(self) -> str:
        """The schedule that is asked for; else the first that constraints allow, beginning with 1F1B: of schedules of
        equal time it keeps the fewest activations. Raises PartitionError where constraints allow none."""
        known = sorted(SCHEDULES, key="1f1b".__ne__)
        allowed = [name for name in known if self.request.allows("schedule", name)]
        if not self.request.schedule and not allowed:
            asked = "; ".join(f"asked for: {c.text}" for c in self.request.constraints)
            raise PartitionError("no schedule is left", asked)
        return self.request.schedule or allowed[0]

    def in_flight(self, point: SearchPoint, stage: int) -> int:
        """Micro-batches whose activations a stage holds at once."""
        return micro_batches_in_flight(self.schedule, stage, point.pp, self.micro_batches(point))

    def stage_key(self, point: SearchPoint, stage: int) -> StageKey:
        """What the costs of a stage depend on besides its positions and splits."""
        return self.at(point, stage).kind, self.in_flight(point, stage)

    def stage_keys(self, point: SearchPoint) -> list[StageKey]:
        """The distinct keys of all stages."""
        return sorted({self.stage_key(point, stage) for stage in range(point.pp)})

    def priced(self, point: SearchPoint) -> Prices:
        """Seconds and bytes of all priced variables, each for one position."""
        if point not in self.prices:
            assert point.kind != MIXED, "each kind has its own prices"
            strides = {"dp": point.tp, "tp": 1}
            model = self.model(point)
            sizes = {axis: self.view(point).group(strides[axis], getattr(point, axis)) for axis in model.table.axes}
            scale = point.micro_batch / self.layered.traced.micro_batch
            self.prices[point] = Prices(model.sizes, Terms(self.device(point), sizes, scale, self.training(point)))
        return self.prices[point]

    def position_costs(self, point: SearchPoint, chosen: tuple[int, ...]) -> PositionCosts:
        """The costs of a choice at every position."""
        if (point, chosen) not in self.choice_costs:
            self.choice_costs[point, chosen] = position_costs(self.priced(point), chosen, self.between_stages(point))
        return self.choice_costs[point, chosen]

    # ---- what constraints leave ---------------------------------------------------------------------------

    def options(self, point: SearchPoint) -> Options:
        """Node -> the options that constraints allow, for nodes that may not take all."""
        if point.tp not in self._options:
            found = options_of(self.model(point).table, self.request.constraints) if self.request.constraints else {}
            self._options[point.tp] = found
        return self._options[point.tp]

    def stuck(self, model: Model) -> list[str]:
        """The keys of the nodes for which constraints allow no option."""
        found = options_of(model.table, self.request.constraints)
        return [model.table.nodes[node].key for node, left in found.items() if not left]

    @cached_property
    def allowed_modes(self) -> tuple[tuple[str, ...], ...]:
        """The checkpointing modes that each position may take. Where forward changes buffers, "none" alone: recomputing
        would change the buffers twice."""
        labels = self.layered.labels
        recompute = self.request.recompute or ("none" if self.layered.traced.updated else None)
        return modes_of(labels, [is_block(x) for x in labels], self.request.constraints, recompute)

    @cached_property
    def modes(self) -> tuple[str, ...]:
        """The modes that any block may take."""
        pairs = zip(self.allowed_modes, self.layered.labels, strict=True)
        found = {mode for modes, label in pairs if is_block(label) for mode in modes}
        return tuple(mode for mode in MODES if mode in found)

    def forced(self, point: SearchPoint) -> dict[int, str]:
        """Segment class -> the first of MODES that its blocks may use; classes that may use "none" are left out."""
        least: dict[int, int] = {}
        for segment_class, modes in zip(self.model(point).table.segment_classes, self.allowed_modes, strict=True):
            least[segment_class] = min(least.get(segment_class, len(MODES)), MODES.index(modes[0]))
        return {segment_class: MODES[mode] for segment_class, mode in least.items() if mode}

    def stages(self, point: SearchPoint) -> list[NDArray[np.bool_]]:
        """[stages][intervals]: whether constraints allow the stage to be the interval. Constraints on cuts by time or
        by memory read the predictions for the point's fastest splits."""
        predicted = any(isinstance(c, Cuts) and c.method in ("time", "memory") for c in self.request.constraints)
        key = point if predicted else point.pp
        if key not in self._stages:
            at = self._balanced(point) if predicted else point
            solution = self.solve(at, 0.0, self.forced(at)) if predicted else None
            costs = self.position_costs(at, solution.chosen) if solution else None
            labels, classes = self.layered.labels, self.layered.traced.classes
            positions = positions_of(labels, classes, self.model(point).table, costs)
            masks = stages_of(self.request.constraints, point.pp, positions)
            self._stages[key] = [mask[interval_ends(len(labels))] for mask in masks]
        return self._stages[key]

    def _balanced(self, point: SearchPoint) -> SearchPoint:
        """The point of the kind whose predictions a constraint on cuts reads. Raises PartitionError for cuts by time
        where stages differ in kind: a position has no one time then."""
        timed = [c.text for c in self.request.constraints if isinstance(c, Cuts) and c.method == "time"]
        if timed and point.kind == MIXED:
            raise PartitionError(
                f"{timed[0]} on {self.mesh}",
                "positions take other times on other kinds of devices, and stages have several kinds",
                "no such constraint: the planner chooses cuts by the time of each stage on its own devices",
            )
        return self.at(point, 0)

    # ---- the objective ------------------------------------------------------------------------------------

    def costs(self, point: SearchPoint, modes: Mapping[int, str]) -> Costs:
        """The costs of all variables, in seconds of the fastest kind where stages differ. `modes`: segment class ->
        checkpointing mode; other classes use "none"."""
        if point.kind == MIXED:
            each = [self.costs(at, modes) for at in self.each_kind(point)]
            return replace(each[0], seconds=np.minimum.reduce([costs.seconds for costs in each]))
        if point not in self.mode_costs:
            gradients = self.in_flight(point, 0) < self.micro_batches(point)
            self.mode_costs[point] = costs_by_mode(
                self.model(point), self.priced(point), self.amortization(point), gradients
            )
        none, *others = self.mode_costs[point]
        seconds, saved = none.seconds, none.saved
        for segment_class, mode in modes.items():
            if mode != "none":
                mine, other = self.model(point).segment_classes == segment_class, others[MODES.index(mode) - 1]
                seconds, saved = np.where(mine, other.seconds, seconds), np.where(mine, other.saved, saved)
        return Costs(seconds, none.state, saved)

    def hides_sync(self, point: SearchPoint) -> bool:
        """Whether backward hides gradient sync, and `exposed_sync_bound` tells what it does not hide."""
        return point.dp > 1 and self.mesh.device.overlapped_share > 0 and point.kind != MIXED

    def sync_windows(self, point: SearchPoint) -> SyncWindows:
        """See `objective.sync_windows`."""
        return sync_windows(self.priced(point), self.training(point).backwards / self.amortization(point))

    def exposed_sync_bound(self, point: SearchPoint) -> Array:
        """[variables]: a lower bound on the exposed sync, in seconds: of `objective.exposed_sync_bounds` the first, and
        each of the others with the weight in [0, 1] for which the linear relaxation costs most. With one
        other, that cost is by duality the one of the relaxation with the larger of the two bounds."""
        if point not in self.exposed:
            bound, others = exposed_sync_bounds(self.model(point), self.sync_windows(point))
            costs = self.costs(point, {}).seconds
            for more in others:
                bound = bound + self.model(point).solver.maximize_dual(costs + bound, more) * more
            self.exposed[point] = bound
        return self.exposed[point]

    def objective(self, point: SearchPoint, multiplier: float, modes: Mapping[int, str]) -> Array:
        """The ILP's objective at a memory multiplier in seconds per byte. At an infinite one: bytes alone."""
        costs = self.costs(point, modes)
        nbytes = costs.saved + costs.state / self.in_flight(point, 0)
        if multiplier == NEVER:
            return nbytes
        seconds = costs.seconds + multiplier * nbytes
        return seconds + self.exposed_sync_bound(point) if self.hides_sync(point) else seconds

    # ---- solutions and bounds -----------------------------------------------------------------------------

    def solve(self, point: SearchPoint, multiplier: float, modes: Mapping[int, str]) -> Solution | None:
        """The best splits at a memory multiplier; None where constraints allow none. Also None where the multiplier is
        neither 0 nor infinite and the relaxation is fractional: such splits are one candidate of many."""
        options = self.options(point)
        key = point, multiplier, tuple(sorted(modes.items())), tuple(options.items())
        if key not in self.solved:
            unit = "bytes" if multiplier == NEVER else "seconds"
            problem = SplitProblem(self.objective(point, multiplier, modes), options, unit=unit)
            self.solved[key] = self.minimise(point, problem, multiplier in (0.0, NEVER))
        return self.solved[key]

    def minimise(self, point: SearchPoint, problem: SplitProblem, branch: bool = True) -> Solution | None:
        """The best splits, by the request's solver; None where constraints allow none. Without `branch`, also None
        where the relaxation is fractional."""
        solver, costs, allowed = self.model(point).solver, problem.costs, problem.allowed
        if branch and self.request.solver != HIGHS:
            return self._by_solver(point, problem)
        if problem.capacity is not None:
            found = solver.minimise_with_capacity(costs, allowed, problem.capacity)
        else:
            found = solver.minimise(costs, allowed, branch)
        return self.confirmed(point, replace(found, problem=problem)) if found else None

    def confirmed(self, point: SearchPoint, found: Solution) -> Solution | None:
        """The solution `found` of a relaxation. Where the request's solver is not HiGHS: that solver's solution of the
        same problem."""
        assert found.problem is not None
        return found if self.request.solver == HIGHS else self._by_solver(point, found.problem)

    def _by_solver(self, point: SearchPoint, problem: SplitProblem) -> Solution | None:
        from autopart.passes.ilp_solvers import minimise  # PuLP takes half a second to load

        return minimise(self.model(point).sizes, problem, self.request.solver)

    def lp_bound(self, point: SearchPoint) -> float:
        """Lower bound on the sum of all stages' seconds, memory unlimited; infinite where constraints allow no splits.
        It is the bound of `solve` at multiplier 0 if that was called, else the linear relaxation."""
        options, modes = self.options(point), self.forced(point)
        key = point, 0.0, tuple(sorted(modes.items())), tuple(options.items())
        if key not in self.bounds and key in self.solved:
            known = self.solved[key]
            self.bounds[key] = known.bound if known else NEVER
        elif key not in self.bounds:
            objective = self.objective(point, 0.0, modes)
            same = point.tp, objective.tobytes(), *key[2:]  # points that differ in what has no seconds
            if same not in self.relaxations:
                self.relaxations[same] = self.model(point).solver.relax(objective, options)
            bound, solution = self.relaxations[same]
            self.bounds[key] = bound
            if bound == NEVER:
                self.solved[key] = None
            elif solution is not None and self.request.solver == HIGHS:
                self.solved[key] = replace(solution, problem=SplitProblem(objective, options))
        return self.bounds[key]

    def dual_bound(self, point: SearchPoint) -> float:
        """Lower bound on `lp_bound` without solving: from dual multipliers of other points' relaxations."""
        seconds = self.costs(point, self.forced(point)).seconds
        if self.hides_sync(point):
            seconds = seconds + exposed_sync_bounds(self.model(point), self.sync_windows(point))[0]
        return self.model(point).solver.dual_bound(seconds)

    def known_bound(self, point: SearchPoint) -> float:
        """`lp_bound` without constraints, if it is known, else 0. Constraints only raise `lp_bound`."""
        known = self.solved.get((point, 0.0, (), ()))
        return known.bound if known else 0.0
