"""Why a plan is as it is. Every number is the step of another plan, found by a search with one thing changed.

why      seconds of the step with each strategy that was not taken
why_not  seconds of the step with a constraint, or why there is no such plan
prices   seconds of the step with more memory, faster links and faster devices
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

from torch import nn

from autopart.errors import PartitionError
from autopart.frontend.batch import Batch
from autopart.frontend.with_loss import Loss, with_loss
from autopart.hardware.mesh import AnyMesh, Mesh
from autopart.hardware.mixed import changed, views_of
from autopart.hardware.rows import Link
from autopart.passes.source import Source
from autopart.plan.data import Plan
from autopart.plan.units import bytes_text
from autopart.planner.branch_and_bound import Search
from autopart.planner.candidate import SearchResult, costs_of
from autopart.planner.constraint_text import parse
from autopart.planner.constraints import Constraint
from autopart.planner.explain.answers import Alternative, Answer, Price, Reason
from autopart.planner.explain.differences import differences
from autopart.planner.ilp_model import Model
from autopart.planner.make_plan import explored, request_of
from autopart.planner.progress import OnProgress, silent
from autopart.planner.request import Request, Settings, read_constraints
from autopart.planner.search_points import SearchPoint
from autopart.planner.search_space import SearchSpace
from autopart.planner.write_plan import write_out
from autopart.planner.zero_levels import settings_of
from autopart.sharding.notation import Strategy
from autopart.sharding.strategy_table import Node

if TYPE_CHECKING:
    from autopart.passes.ilp import LpProblem

TIME_LIMIT = 0.4
"""Seconds after which `why_not` answers with the incumbent and the lower bound."""

LISTED = re.compile(r"embedding|norm|attention")
"""Operators that `why` lists besides products."""

SETTINGS = ("pp", "dp", "tp", "micro_batch", "zero", "shard_size", "recompute", "schedule")
"""The settings of a request that a constraint may contradict."""

GIB = 2**30
FASTER = 1.1
"""The factor by which `prices` makes links and devices faster."""


@dataclass(frozen=True)
class Exactly(Constraint):
    """The operator or tensor `key` has a strategy along an axis. Strategies are compared by placements, not by name."""

    axis: str
    key: str
    strategy: Strategy

    def allows_strategy(self, axis: str, key: str, strategy: Strategy) -> bool:
        return (axis, key) != (self.axis, self.key) or strategy == self.strategy


@dataclass
class Explanation:
    """A plan with the search space that it was chosen from, and with the search's result."""

    space: SearchSpace
    found: SearchResult
    plan: Plan
    near: tuple[SearchPoint, ...] = ()
    """Search points whose LP bound is known, by rising bound on the step."""

    def why(self, everything: bool = False) -> list[Reason]:
        """The step with each other strategy of products, attention, embeddings and norms; with `everything`, of all
        operators and tensors."""
        model = self.space.model(self.found.point)
        listed = [i for i, n in enumerate(model.table.nodes) if everything or n.product or LISTED.search(_operator(n))]
        reasons = (self._reason(model, i) for i in listed)
        return [reason for reason in reasons if reason.others]

    def _reason(self, model: Model, index: int) -> Reason:
        """The step with each other strategy of a node. The strategy that the plan has is that of stage 0."""
        node, chosen = model.table.nodes[index], self.found.chosen[0][index]
        axes = [axis for axis in model.table.axes if getattr(self.found.point, axis) > 1]
        columns = [model.table.axes.index(axis) for axis in axes]
        strategies = list(dict.fromkeys(tuple(option[c] for c in columns) for option in node.options))
        mine = tuple(node.options[chosen][c] for c in columns)
        others = []
        names = [_strategy(axes, each) for each in strategies]
        for each in strategies:
            if each != mine:
                text = _strategy(axes, each)
                text += f"  ({_placed(each)})" if names.count(text) > 1 else ""
                exactly = [Exactly(text, True, axis, node.key, s) for axis, s in zip(axes, each, strict=True)]
                others.append(self._alternative(text, exactly))
        others.sort(key=lambda other: (other.seconds is None, other.seconds or 0.0))
        times = model.table.segment_classes.count(node.segment_class) or len(model.table.state.get(index, ()))
        return Reason(node.key, max(1, times), _strategy(axes, mine), self.found.seconds, tuple(others))

    def _alternative(self, text: str, constraints: Sequence[Constraint]) -> Alternative:
        """The best plan under constraints, with the degrees, micro-batch and ZeRO level of the plan in question."""
        point = self.found.point
        names = ("pp", "dp", "tp", "micro_batch", "zero")
        pinned = [parse(f"{name}={getattr(point, name)}") for name in names]
        pinned.append(parse(f"shard_size={point.shards}"))
        try:
            found = Search(self.constrained([*pinned, *constraints]), silent, heuristic=True).run()
        except PartitionError as error:
            return Alternative(
                text, None, why="does not fit" if "no plan fits" in error.what else "no collective leads there"
            )
        return Alternative(text, found.seconds, found.bound)

    def constrained(self, constraints: Sequence[Constraint], **changes: Any) -> SearchSpace:
        """The search space with more constraints and with `changes` of the request.

        The new space shares what the old one computed, unless the schedule changes: the micro-batches in flight depend
        on the schedule.
        """
        together = (*self.space.request.constraints, *constraints)
        request = replace(self.space.request, constraints=together, **changes)
        if request.allows("schedule", self.space.schedule):
            return replace(self.space, request=request)
        return SearchSpace(self.space.layered, self.space.mesh, request, self.space.models)

    def why_not(self, text: str, seconds: float | None = TIME_LIMIT) -> Answer:
        """The step of the best plan that satisfies a constraint, or why no plan does.

        text     in the language of `planner.constraint_text`, such as "tp=8"
        seconds  after which the answer is the incumbent with the lower bound; None: the search runs to its end

        Raises PartitionError for a text that is no constraint on this model.
        """
        started = time.process_time()
        (constraint,) = read_constraints([text])
        space = self.constrained([constraint], time_limit=seconds, nodes=None)
        against = self.plan.step_seconds
        search = Search(space, silent, heuristic=seconds is not None)
        try:
            search.warm_start(self.near)
            found = search.run()
        except PartitionError as error:
            took = time.process_time() - started
            return Answer(text, None, float("inf"), against, (), f"{error.what}: {error.why}", took, self.asked, None)
        plan = write_out(space, found, time.monotonic(), self.plan.model)
        took = time.process_time() - started
        differs = tuple(differences(self.plan, plan, self.space.layered.labels))
        return Answer(text, plan.step_seconds, found.bound, against, differs, "", took, self.asked, plan)

    @property
    def asked(self) -> tuple[str, ...]:
        """The settings and constraints that the plan was asked for, as texts."""
        request = self.space.request
        settings = {name: getattr(request, name) for name in SETTINGS}
        given = [f"{name}={value}" for name, value in settings.items() if value is not None]
        return (*given, *(constraint.text for constraint in request.constraints))

    def prices(self) -> list[Price]:
        """The step with 1 GiB more or less a device, with room for one more micro-batch in flight, and with links,
        products or memory that are 10 % faster."""
        return [self._price(what, space) for what, space in self._changes()]

    def ilp(self, stage: int = 0) -> LpProblem:
        """The ILP that a stage's splits solve, as a problem of PuLP: ``explanation.ilp().writeLP("model.lp")``.

        The equations are those of `autopart.passes.ilp`; the objective is in microseconds, or in bytes where the search
        asked for the splits that take least memory. Raises PartitionError for a stage that the plan does not have.
        """
        from autopart.passes.ilp import state  # PuLP takes half a second to load

        if not 0 <= stage < len(self.found.problems):
            last = len(self.found.problems) - 1
            raise PartitionError(f"the plan has no stage {stage}", try_=f"stage 0 to {last}" if last else "stage 0")
        asked = self.found.problems[stage]
        if asked.unit == "seconds":
            asked = asked.scaled(1e6, "microseconds")
        problem = state(self.space.model(self.found.point).sizes, asked).problem
        problem.name = f"splits_of_stage_{stage}"
        return problem

    @property
    def slack(self) -> float:
        """The least usable bytes of a stage's device - peak bytes of the stage."""
        return min(most - nbytes for most, nbytes in zip(self.plan.usable_bytes, self.plan.memory_bytes, strict=True))

    def _saved_bytes(self, stage: int) -> float:
        """Bytes that one micro-batch saves for backward on a rank of a stage."""
        found, modes = self.found, [(mode,) for mode in self.found.recompute]
        costs = costs_of(self.space, self.space.at(found.point, stage), found.chosen[stage], modes)
        ends = (*found.starts, len(modes))
        return float(costs.saved_bytes[costs.index(*ends[stage : stage + 2])])

    def _price(self, what: str, space: SearchSpace) -> Price:
        """The step in another search space; `what` says what changed."""
        search = Search(space, silent, heuristic=True)
        try:
            search.warm_start([replace(self.found.point, zero=0, shard_size=0)])
            return Price(what, search.run().seconds, self.plan.step_seconds)
        except PartitionError:
            return Price(what, None, self.plan.step_seconds)

    def _changes(self) -> Iterator[tuple[str, SearchSpace]]:
        """The changes that `prices` tries, in words, each with its search space."""
        mesh = self.space.mesh
        if self.space.request.must_fit:
            for what, more in (("one more GiB per device", GIB), ("one GiB less per device", -GIB)):
                yield what, self._with_memory(more)
            fullest = max(range(self.plan.pp), key=lambda s: self.plan.memory_bytes[s])
            each = self._saved_bytes(fullest)
            yield f"room for one more micro-batch in flight ({bytes_text(each)})", self._with_memory(each / 0.92)
        links = {"devices of a host": "intra", "hosts": "inter"}
        for between, name in links.items():
            if (mesh.hosts if name == "inter" else mesh.devices_per_host) == 1:
                continue
            faster = changed(mesh, partial(_faster_link, name))
            names = dict.fromkeys(getattr(view, name).name for view in views_of(mesh))
            yield f"links between {between} 10 % faster ({', '.join(names)})", self._on_mesh(faster)
        if mesh.pods > 1:
            pods = replace(mesh, oversubscription=max(1.0, mesh.oversubscription / FASTER))
            yield "links between pods 10 % faster", self._on_mesh(pods)
        yield "products 10 % faster", self._on_mesh(changed(mesh, _faster_products))
        yield "memory of the devices 10 % faster", self._on_mesh(changed(mesh, _faster_memory))

    def _with_memory(self, more: float) -> SearchSpace:
        def grown(mesh: Mesh) -> Mesh:
            device = mesh.device
            return replace(mesh, device=replace(device, memory_bytes=round(device.memory_bytes + more)))

        return replace(self.space, mesh=changed(self.space.mesh, grown))

    def _on_mesh(self, mesh: Mesh) -> SearchSpace:
        """The search space of another mesh with the same tables."""
        return SearchSpace(self.space.layered, mesh, self.space.request, self.space.models)

    def __str__(self) -> str:
        return "\n".join(map(str, self.why()))


def _faster_link(name: str, mesh: Mesh) -> Mesh:
    """A mesh of equal devices with its link `name` FASTER times as fast."""
    link: Link = getattr(mesh, name)
    wire = link.measured.faster(FASTER) if link.measured else None
    faster: dict[str, Any] = {name: replace(link, bandwidth=link.bandwidth * FASTER, measured=wire)}
    return replace(mesh, **faster)


def _faster_products(mesh: Mesh) -> Mesh:
    """A mesh of equal devices with products FASTER times as fast."""
    flops = {dtype: rate * FASTER for dtype, rate in mesh.device.flops.items()}
    return replace(mesh, device=replace(mesh.device, flops=flops))


def _faster_memory(mesh: Mesh) -> Mesh:
    """A mesh of equal devices with memory FASTER times as fast."""
    device = mesh.device
    measured = device.measured.faster_memory(FASTER) if device.measured else None
    return replace(mesh, device=replace(device, bandwidth=device.bandwidth * FASTER, measured=measured))


def _operator(node: Node) -> str:
    return node.key.rpartition("/")[2] if node.kind == "op" else ""


def _strategy(axes: Sequence[str], chosen: Sequence[Strategy]) -> str:
    return "  ".join(f"{s.name}/{axis}" for axis, s in zip(axes, chosen, strict=True)) or "whole"


def _placed(chosen: Sequence[Strategy]) -> str:
    """The placements of inputs and outputs: strategies of one name differ in these."""
    return "; ".join(f"{', '.join(map(str, s.inputs))} -> {', '.join(map(str, s.outputs))}" for s in chosen)


def explain(
    model: nn.Module,
    mesh: AnyMesh,
    batch: Batch,
    *,
    loss: Loss | None = None,
    on_progress: OnProgress = silent,
    **settings: Unpack[Settings],
) -> Explanation:
    """Plan as `autopart.plan` does, with its arguments and errors. Returns the plan with its search space, for
    questions."""
    model = with_loss(model, loss)
    request = request_of(model, batch, **settings)
    return explain_traced(Source.of(model, batch, request), Mesh.of(mesh), request, on_progress)


def explain_traced(source: Source, mesh: Mesh, request: Request, on_progress: OnProgress = silent) -> Explanation:
    """`explain` for a source, which may be traced already."""
    plan, search, found = explored(source, mesh, request, on_progress)
    space, samples = search.space, request.global_batch
    tried = [at for point in space.points() for at in settings_of(space, point) if space.known_bound(at)]
    near = sorted(tried, key=lambda p: (space.known_bound(p) * p.step_factor(samples), p))
    return Explanation(space, found, plan, tuple(near))
