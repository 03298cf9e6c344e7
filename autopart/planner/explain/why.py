"""Why a plan is as it is: every number here is that of another plan, found by solving again.

why      what every strategy that was not taken would make of the step, all else decided anew around it
why_not  what anything that a constraint can say would make of it, or why nothing can be so
prices   what more memory, faster links and faster devices would make of it
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Unpack

from torch import nn

from autopart.errors import PartitionError
from autopart.frontend.batch import DTYPES, Batch
from autopart.hardware.mesh import Mesh, usable_bytes
from autopart.passes.source import Source
from autopart.plan.data import Plan
from autopart.plan.units import bytes_text, seconds_text
from autopart.planner.branch_and_bound import OnProgress, Search, SearchResult, points, silent, zero_levels
from autopart.planner.candidate import costs_of
from autopart.planner.constraints import Constraint, parse
from autopart.planner.explain.differences import differences
from autopart.planner.explain.split_ilp import split_ilp
from autopart.planner.make_plan import explored, request_of
from autopart.planner.request import Request, SearchPoint, Settings, read_constraints
from autopart.planner.search_space import Model, SearchSpace
from autopart.planner.write_plan import write_out
from autopart.sharding.rules import Strategy
from autopart.sharding.strategy_table import Node

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from autopart.passes.ilp import LpProblem

QUICK = 0.4
"""Seconds after which a question is answered with the best plan so far, and the bound."""

TELLING = re.compile(r"embedding|norm|attention")
"""Operators that are told about, besides products."""

SETTINGS = ("pp", "dp", "tp", "micro_batch", "zero", "recompute", "schedule")
"""The settings of a request that a constraint could contradict."""

GIB = 2**30
FASTER = 1.1


@dataclass(frozen=True)
class Exactly(Constraint):
    """One operator's or tensor's strategy, by all of it rather than by its name."""

    axis: str
    key: str
    strategy: Strategy

    def allows_strategy(self, axis: str, key: str, strategy: Strategy) -> bool:
        return (axis, key) != (self.axis, self.key) or strategy == self.strategy


@dataclass(frozen=True)
class Alternative:
    """A strategy, and seconds of the step with it; None where there is no plan with it, and why. No plan of the same
    degrees with it is faster than `bound`."""

    strategy: str
    seconds: float | None
    bound: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Reason:
    """An operator of one class of equal blocks, what was chosen for it, and the others, the best first."""

    key: str
    times: int
    chosen: str
    seconds: float
    others: tuple[Alternative, ...]

    def __str__(self) -> str:
        times = f" x {self.times}" if self.times > 1 else ""
        lines = [f"{self.key}{times}: {self.chosen}"]
        for other in self.others:
            told = other.why if other.seconds is None else _proven(other.seconds, other.bound, self.seconds)
            lines.append(f"    {other.strategy:<28} {told}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Answer:
    """What the step would be if a constraint held.

    seconds   of the best plan found with it, None where there is none;  bound: no plan with it is faster
    against   of the plan that is asked about;  differs: in what the plans do, in words
    why       nothing can be so
    asked     what the plan was asked for, which holds too
    took      seconds it took to answer
    """

    text: str
    seconds: float | None
    bound: float
    against: float
    differs: tuple[str, ...]
    why: str
    took: float
    asked: tuple[str, ...]
    plan: Plan | None = field(repr=False)

    def __str__(self) -> str:
        text = f"{self.text} (with {', '.join(self.asked)} as asked)" if self.asked else self.text
        if self.seconds is None:
            free = "\n  try: a plan that is not asked for so, and then why not" if self.asked else ""
            return f"{text}: not possible\n  {self.why}{free}"
        told = _proven(self.seconds, self.bound, self.against)
        lines = [f"  {line}" for line in self.differs] or ["  the plan does so already, or what is as fast"]
        return "\n".join([f"{text}: {told}", *lines])


@dataclass(frozen=True)
class Price:
    """What a change of the machine makes of the step; `seconds` is None where nothing fits then."""

    what: str
    seconds: float | None
    against: float

    def __str__(self) -> str:
        return f"{self.what:<52} {'nothing fits' if self.seconds is None else _against(self.seconds, self.against)}"


def _against(seconds: float, before: float) -> str:
    """``"906 ms, +44.6 ms, +5.2 %"``."""
    more = seconds - before
    if abs(more) < 1e-6 * before:
        return f"{seconds_text(seconds)}, the same"
    sign = "+" if more > 0 else "-"
    return f"{seconds_text(seconds)}, {sign}{seconds_text(abs(more))}, {more / before:+.1%}"


def _proven(seconds: float, bound: float, before: float) -> str:
    """The same, with the bound where it is not as good as reached."""
    far = bound < seconds * (1 - 1e-3)
    return _against(seconds, before) + (f", proven at least {seconds_text(bound)}" if far else "")


@dataclass
class Explanation:
    """A plan with all that it was chosen from."""

    space: SearchSpace
    found: SearchResult
    plan: Plan
    near: tuple[SearchPoint, ...] = ()
    """Points whose splits are known, the best first."""

    def why(self, everything: bool = False) -> list[Reason]:
        """What every other strategy would cost: for products, attention, embeddings and norms, or for everything."""
        model = self.space.model(self.found.point)
        told = [i for i, n in enumerate(model.table.nodes) if everything or n.product or TELLING.search(_operator(n))]
        reasons = (self._reason(model, i) for i in told)
        return [reason for reason in reasons if reason.others]

    def _reason(self, model: Model, index: int) -> Reason:
        node, chosen = model.table.nodes[index], self.found.chosen[0][index]
        axes = [axis for axis in model.table.axes if getattr(self.found.point, axis) > 1]
        columns = [model.table.axes.index(axis) for axis in axes]
        ways = {tuple(option[c] for c in columns): None for option in node.options}
        mine = tuple(node.options[chosen][c] for c in columns)
        others = []
        names = [_strategy(axes, way) for way in ways]
        for way in ways:
            if way != mine:
                text = _strategy(axes, way)
                text += f"  ({_placed(way)})" if names.count(text) > 1 else ""
                exactly = [Exactly(text, True, axis, node.key, s) for axis, s in zip(axes, way, strict=True)]
                others.append(self._alternative(text, exactly))
        others.sort(key=lambda other: (other.seconds is None, other.seconds or 0.0))
        places = model.table.group.count(node.group) or len(model.table.state.get(index, ()))
        return Reason(node.key, max(1, places), _strategy(axes, mine), self.found.seconds, tuple(others))

    def _alternative(self, text: str, constraints: Sequence[Constraint]) -> Alternative:
        point = self.found.point
        names = ("pp", "dp", "tp", "micro_batch", "zero")
        pinned = [parse(f"{name}={getattr(point, name)}") for name in names]
        try:
            found = Search(self._with([*pinned, *constraints]), silent, quick=True).run()
        except PartitionError as error:
            return Alternative(
                text, None, why="does not fit" if "no plan fits" in error.what else "no change of placement"
            )
        return Alternative(text, found.seconds, found.bound)

    def _with(self, constraints: Sequence[Constraint], **changes: Any) -> SearchSpace:
        """The space with more constraints; all that is known of it stays known."""
        request = self.space.request
        together = (*request.constraints, *constraints)
        return replace(self.space, request=replace(request, constraints=together, **changes))

    def why_not(self, text: str, seconds: float | None = QUICK) -> Answer:
        """What the step would be if a constraint held. After some `seconds` the best plan so far is told, with what is
        proven; None waits for the whole search. Raises PartitionError for text that says nothing of this model."""
        started = time.process_time()
        (constraint,) = read_constraints([text])
        space = self._with([constraint], time_limit=seconds, nodes=None)
        against = self.plan.step_seconds
        search = Search(space, silent, quick=seconds is not None)
        try:
            search.begin(self.near)
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
        """What more memory, room for another micro-batch, faster links and faster devices would make of the step."""
        return [self._price(what, space) for what, space in self._changes()]

    def ilp(self, stage: int = 0) -> LpProblem:
        """The ILP that a stage's splits solve, as a problem of PuLP: ``explanation.ilp().writeLP("model.lp")``.

        The equations are those of `autopart.passes.ilp`; the objective is in microseconds, or in bytes where the search
        asked for the splits that take least memory. Raises PartitionError for a stage that the plan does not have.
        """
        return split_ilp(self.space, self.found, stage)

    @property
    def slack(self) -> float:
        """Bytes that are left on the fullest device."""
        return usable_bytes(self.space.mesh) - max(self.plan.memory_bytes)

    def _saved_bytes(self, stage: int) -> float:
        """Bytes that one micro-batch saves for backward on a rank of a stage."""
        found, modes = self.found, [(mode,) for mode in self.found.recompute]
        costs = costs_of(self.space, found.point, found.chosen[stage], modes)
        ends = (*found.starts, len(modes))
        return float(costs.saved_bytes[costs.index(*ends[stage : stage + 2])])

    def _price(self, what: str, space: SearchSpace) -> Price:
        search = Search(space, silent, quick=True)
        try:
            search.begin([replace(self.found.point, zero=0)])
            return Price(what, search.run().seconds, self.plan.step_seconds)
        except PartitionError:
            return Price(what, None, self.plan.step_seconds)

    def _changes(self) -> Iterator[tuple[str, SearchSpace]]:
        """The changes that are tried, each with the space it makes."""
        mesh, device = self.space.mesh, self.space.mesh.device
        if self.space.request.must_fit:
            for what, more in (("one more GiB per device", GIB), ("one GiB less per device", -GIB)):
                yield what, self._memory(more)
            fullest = max(range(self.plan.pp), key=lambda s: self.plan.memory_bytes[s])
            each = self._saved_bytes(fullest)
            yield f"room for one more micro-batch in flight ({bytes_text(each)})", self._memory(each / 0.92)
        links = {"devices of a host": "intra", "hosts": "inter"}
        for between, name in links.items():
            link = getattr(mesh, name)
            if (mesh.hosts if name == "inter" else mesh.devices_per_host) == 1:
                continue
            wire = link.measured.faster(FASTER) if link.measured else None
            faster = replace(link, bandwidth=link.bandwidth * FASTER, measured=wire)
            yield f"links between {between} 10 % faster ({link.name})", self._on(replace(mesh, **{name: faster}))
        flops = {dtype: rate * FASTER for dtype, rate in device.flops.items()}
        yield "products 10 % faster", self._on(replace(mesh, device=replace(device, flops=flops)), FASTER)
        measured = device.measured.faster_memory(FASTER) if device.measured else None
        moved = replace(device, bandwidth=device.bandwidth * FASTER, measured=measured)
        yield "memory of the devices 10 % faster", self._on(replace(mesh, device=moved))

    def _memory(self, more: float) -> SearchSpace:
        device = self.space.mesh.device
        size = replace(device, memory_bytes=round(device.memory_bytes + more))
        return replace(self.space, mesh=replace(self.space.mesh, device=size))

    def _on(self, mesh: Mesh, rate: float = 1.0) -> SearchSpace:
        """The space of another mesh, with the same tables."""
        models = {tp: _faster(model, rate) for tp, model in self.space.models.items()}
        return SearchSpace(self.space.layered, mesh, self.space.request, models)

    def __str__(self) -> str:
        return "\n".join(map(str, self.why()))


def _faster(model: Model, rate: float) -> Model:
    """A model whose products run faster; the equations are the same."""
    other = copy.copy(model)
    other.solver = model.solver
    other.sizes = copy.copy(model.sizes)
    other.sizes.peak = model.sizes.peak * rate
    return other


def _operator(node: Node) -> str:
    return node.key.rpartition("/")[2] if node.kind == "op" else ""


def _strategy(axes: Sequence[str], chosen: Sequence[Strategy]) -> str:
    return "  ".join(f"{s.name}/{axis}" for axis, s in zip(axes, chosen, strict=True)) or "whole"


def _placed(way: Sequence[Strategy]) -> str:
    """What strategies of the same name differ in: where they take and give."""
    return "; ".join(f"{', '.join(map(str, s.inputs))} -> {', '.join(map(str, s.outputs))}" for s in way)


def explain(
    model: nn.Module,
    mesh: str | Mesh | DeviceMesh,
    batch: Batch,
    *,
    on_progress: OnProgress = silent,
    **settings: Unpack[Settings],
) -> Explanation:
    """Plan, with the settings of `autopart.plan`, and keep what the plan was chosen from. Raises PartitionError."""
    request = request_of(model, batch, **settings)
    return explain_traced(Source(model, batch, DTYPES[request.precision]), Mesh.of(mesh), request, on_progress)


def explain_traced(source: Source, mesh: Mesh, request: Request, on_progress: OnProgress = silent) -> Explanation:
    """`explain` for a model that may be traced already."""
    plan, search, found = explored(source, mesh, request, on_progress)
    space, samples = search.space, request.global_batch
    levels = (replace(point, zero=zero) for point in points(space) for zero in zero_levels(space, point))
    tried = [at for at in levels if space.known_bound(at)]
    near = sorted(tried, key=lambda p: (space.known_bound(p) * p.passes(samples), p))
    return Explanation(space, found, plan, tuple(near))
