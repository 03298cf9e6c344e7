"""The search over what the ILPs leave open: degrees, micro-batch size, ZeRO level, recompute.

Every candidate has a lower bound, the time of its work at the device's speed with nothing between devices; candidates
are taken by rising bound, and those whose bound reaches the best plan found are never solved. For the others the
split ILP gives a bound of its own. The least of all these is the bound the plan's gap is proven against: no plan of
this search space is faster by this cost model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from autopart.comm import p2p_seconds
from autopart.cost import OPTIMIZER_STATES, Training, node_seconds, sync_seconds
from autopart.errors import PartitionError
from autopart.folded import Folded, crossing, used_parameters
from autopart.graph import info, placeholders
from autopart.mesh import Mesh
from autopart.notation import Placement
from autopart.passes.formulate import LOSS, Axis, Settings, formulate_splits
from autopart.passes.localise import localise
from autopart.passes.price import PricedRun, Prices, price
from autopart.passes.solve import solve_cuts, solve_splits
from autopart.plan import (
    Plan,
    PlanLine,
    PlanRun,
    PlanStage,
    Signature,
    bytes_text,
    usable_bytes,
)
from autopart.problem import CutProblem, SplitSolution
from autopart.rules import Strategy, has_rule
from autopart.schedules import SCHEDULES, in_flight, instructions, simulate
from autopart.stages import Choices, StageGraph


@dataclass(frozen=True)
class Request:
    """What the user asked for; None leaves the choice to the planner."""

    global_batch: int
    micro_batch: int | None = None
    pp: int | None = None
    tp: int | None = None
    dp: int | None = None
    zero: int | None = None
    recompute: str | None = None
    schedule: str | None = None
    precision: str = "float32"
    optimizer: str = "adamw"
    time_limit: float | None = None
    must_fit: bool = True
    memory_share: float = 1.0
    """Of what a device can give; lowered where a plan, written out, took more than the search had reckoned."""

    def check(self, mesh: Mesh) -> Request:
        """Raise PartitionError for what no planner could do; degrees that `mesh` fixes are taken over."""
        for name, value, known in (
            ("schedule", self.schedule, SCHEDULES),
            ("optimizer", self.optimizer, OPTIMIZER_STATES),
            ("recompute", self.recompute, ("none", "full")),
            ("zero", self.zero, (0, 1)),
        ):
            if value is not None and value not in known:
                raise PartitionError(f"{name}={value!r} is not known", try_=f"one of {', '.join(map(str, known))}")
        for name in ("pp", "dp", "tp", "micro_batch", "global_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PartitionError(f"{name}={value} is not positive")
        fixed = dict(mesh.axes)
        asked = {n: getattr(self, n) for n in ("pp", "dp", "tp") if getattr(self, n)}
        for name, degree in asked.items():
            if fixed.get(name, degree) != degree:
                raise PartitionError(
                    f"{name}={degree} contradicts the mesh", f"its axis {name} has {fixed[name]} ranks"
                )
        request = replace(self, **{**fixed, **asked})
        product = 1
        for name in ("pp", "dp", "tp"):
            product *= getattr(request, name) or 1
        whole = request.pp and request.dp and request.tp
        if mesh.size % product or (whole and product != mesh.size):
            degrees = " x ".join(f"{n}={getattr(request, n)}" for n in ("pp", "dp", "tp") if getattr(request, n))
            raise PartitionError(
                f"{degrees} does not fill the mesh",
                f"{product} ranks of {mesh.size}",
                "degrees whose product is the mesh",
            )
        if request.micro_batch and request.global_batch % request.micro_batch:
            raise PartitionError(
                "the batch does not divide",
                f"{request.global_batch} samples are no multiple of micro_batch={request.micro_batch}",
                f"micro_batch={_divisor_near(request.global_batch, request.micro_batch)}",
            )
        return request


@dataclass(frozen=True)
class Candidate:
    """One point of the outer search, with the least time it could take."""

    pp: int
    dp: int
    tp: int
    micro_batch: int
    bound: float = 0.0

    def passes(self, request: Request) -> float:
        """How often the time of all stages together counts: sum(f) + (m - 1) max(f) >= sum(f) (1 + (m - 1) / pp)."""
        return 1 + (request.global_batch // self.micro_batch - 1) / self.pp


@dataclass(frozen=True)
class Found:
    """A candidate's best plan so far, before it is written out."""

    candidate: Candidate
    choices: Choices
    training: Training
    recompute: str
    seconds: float
    bound: float


Say = Callable[[str], None]


def search(folded: Folded, mesh: Mesh, request: Request, say: Say = lambda text: None) -> Found:
    """The best candidate. Raises PartitionError where none fits."""
    started = time.monotonic()
    candidates = sorted(_candidates(folded, mesh, request), key=lambda c: c.bound)
    best: Found | None = None
    proven: list[float] = []
    refusals: list[PartitionError] = []
    for number, candidate in enumerate(candidates):
        late = request.time_limit is not None and time.monotonic() - started > request.time_limit
        if best is not None and (candidate.bound >= best.seconds or late):
            proven += [c.bound for c in candidates[number:]]
            break
        try:
            found = solve_candidate(folded, mesh, request, candidate)
        except PartitionError as error:
            refusals.append(error)
            continue
        proven.append(found.bound)
        if best is None or found.seconds < best.seconds:
            best = found
            say(f"{number + 1}/{len(candidates)}: pp={candidate.pp} dp={candidate.dp} tp={candidate.tp} "
                f"micro-batch {candidate.micro_batch}: {found.seconds * 1e3:.3g} ms")  # fmt: skip
    if best is None:
        raise _nothing_fits(refusals, mesh)
    return replace(best, bound=min([best.seconds, *proven]))


def _nothing_fits(refusals: Sequence[PartitionError], mesh: Mesh) -> PartitionError:
    closest = min(refusals, key=lambda e: getattr(e, "missing", float("inf")), default=None)
    if closest is None:
        return PartitionError(f"no way to use {mesh}", "no degrees divide the mesh and the batch")
    return closest


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _divisor_near(number: int, wanted: int) -> int:
    return min(_divisors(number), key=lambda d: abs(d - wanted))


def _candidates(folded: Folded, mesh: Mesh, request: Request) -> Iterator[Candidate]:
    """Every combination of degrees and micro-batch that divides; PartitionError if there is none."""
    units, rejected = len(folded.runs), []
    found = False
    for pp in [request.pp] if request.pp else _divisors(mesh.size):
        if pp > units:
            rejected.append(f"pp={pp} stages but the model has {units} places to cut")
            continue
        for tp in [request.tp] if request.tp else _divisors(mesh.size // pp):
            dp = mesh.size // pp // tp
            if request.dp not in (None, dp) or pp * dp * tp != mesh.size:
                continue
            if tp > mesh.devices_per_host and not request.tp:
                continue
            sizes = [request.micro_batch] if request.micro_batch else _micro_batches(request.global_batch, dp)
            for size in sizes:
                if size % dp or request.global_batch % size:
                    rejected.append(f"{size} samples do not divide over dp={dp} ranks")
                    continue
                found = True
                candidate = Candidate(pp, dp, tp, size)
                yield replace(candidate, bound=_work(folded, mesh, candidate) * candidate.passes(request))
            if not sizes:
                rejected.append(f"{request.global_batch} samples do not divide over dp={dp} ranks")
    if not found:
        near = _divisors(request.global_batch)
        raise PartitionError(
            "no degrees fit the batch and the mesh", "; ".join(dict.fromkeys(rejected)),
            f"a dp of {', '.join(map(str, near[:8]))}, or fewer stages",
        )  # fmt: skip


def _micro_batches(global_batch: int, dp: int) -> list[int]:
    """dp x 1, 2, 4, ... samples, as far as they divide the batch."""
    sizes, size = [], dp
    while size <= global_batch:
        if global_batch % size == 0:
            sizes.append(size)
        size *= 2
    return sizes


def _work(folded: Folded, mesh: Mesh, candidate: Candidate) -> float:
    """Seconds of a micro-batch's operators, perfectly divided, without communication."""
    scale = candidate.micro_batch / candidate.dp / folded.traced.micro_batch
    total = 0.0
    for node in folded.representatives():
        if info(node).kind == "op":
            work = node_seconds(node, mesh.device, candidate.tp, scale)
            total += folded.count[node] * (work.forward + work.backward)
    return total


def axes_of(mesh: Mesh, dp: int, tp: int) -> list[Axis]:
    """The axes inside a stage that have more than one rank."""
    strides = {"dp": tp, "tp": 1}
    return [Axis(name, size, mesh.link(strides[name], size)) for name, size in (("dp", dp), ("tp", tp)) if size > 1]


def solve_candidate(folded: Folded, mesh: Mesh, request: Request, candidate: Candidate) -> Found:
    """The best plan of a candidate: cheapest in memory options first that fit. Raises PartitionError."""
    refused: PartitionError | None = None
    zeros = [request.zero] if request.zero is not None else [0, 1] if candidate.dp > 1 else [0]
    recomputes = [request.recompute] if request.recompute else ["none", "full"]
    for recompute in recomputes:
        for zero in zeros:
            training = Training(request.optimizer, zero, candidate.dp)
            for budget in (None, 1.0, 0.7):
                try:
                    return _solve(folded, mesh, request, candidate, training, recompute, budget)
                except PartitionError as error:
                    refused = error
                    if not hasattr(error, "missing"):
                        break
                if candidate.tp == 1 or not request.must_fit:
                    break
    assert refused is not None
    raise refused


def _solve(
    folded: Folded,
    mesh: Mesh,
    request: Request,
    candidate: Candidate,
    training: Training,
    recompute: str,
    budget: float | None,
) -> Found:
    scale = candidate.micro_batch / candidate.dp / folded.traced.micro_batch
    settings = Settings(mesh.device, training, candidate.passes(request), candidate.pp, scale)
    axes = axes_of(mesh, candidate.dp, candidate.tp)
    strategies: dict[str, dict[str, Strategy]] = {}
    before: dict[str, Strategy] = {}
    solution: SplitSolution | None = None
    extra = 0.0
    for axis in axes:
        forced = replace(settings, forced=axis.name == "tp" and (request.tp or 1) > 1)
        if axis.name == "dp":
            solution = _solve_dp(folded, axis, forced, request.time_limit)
        else:
            problem = formulate_splits(folded, axis, forced, before)
            if budget is not None:
                problem.budget = budget * request.memory_share * usable_bytes(mesh) * candidate.pp
                problem.in_flight = (candidate.pp + 1) / 2
            solution = solve_splits(problem, request.time_limit)
        strategies[axis.name] = {n: s for n, s in solution.chosen.items() if n != LOSS}
        if axis.name == "dp":
            before = strategies["dp"]
            extra = solution.bound
    work = _work(folded, mesh, candidate) * settings.passes
    bound = solution.bound if solution is not None else work
    if len(axes) == 2:
        shared = _work(folded, mesh, replace(candidate, tp=1)) * settings.passes
        bound += max(0.0, extra - shared) / candidate.tp
    choices = Choices(tuple((a.name, a.shards) for a in axes), strategies, (0,))
    whole = localise(folded, choices)[0]
    prices = Prices(mesh.device, {a.name: (a.size, a.link) for a in axes}, scale)
    priced = price(whole, prices)
    cuts = _cut_problem(folded, mesh, request, candidate, training, recompute, whole, priced, scale)
    if not request.must_fit:
        cuts = replace(cuts, limit=float("inf"))
    else:
        cuts = replace(cuts, limit=cuts.limit * request.memory_share)
    cut = solve_cuts(cuts)
    if cut is None:
        raise _too_big(cuts, candidate, mesh, folded)
    syncs = _sync_by_stage(folded, choices, axes, training, cut.starts)
    seconds = cut.seconds + max(syncs)
    return Found(candidate, replace(choices, starts=cut.starts), training, recompute, seconds, min(bound, seconds))


def _solve_dp(folded: Folded, axis: Axis, settings: Settings, time_limit: float | None) -> SplitSolution:
    """The split along `dp`, which does not depend on the other axes: solved once for equal settings."""
    key = (axis, repr(settings))
    if key not in folded.solved:
        folded.solved[key] = solve_splits(formulate_splits(folded, axis, settings, {}), time_limit)
    return folded.solved[key]


def _cut_problem(
    folded: Folded,
    mesh: Mesh,
    request: Request,
    candidate: Candidate,
    training: Training,
    recompute: str,
    whole: StageGraph,
    priced: Sequence[PricedRun],
    scale: float,
) -> CutProblem:
    """Units, their times and bytes on one rank, from the graph localised as one stage."""
    index_of = {id(nodes): i for i, nodes in enumerate(whole.runs)}
    offset = 1 if whole.runs[0][0] == "" and len(whole.runs) == len(folded.runs) + 1 else 0
    assert len(index_of) - offset == len(folded.runs)
    units = priced[offset:]
    setup = sum(r.forward for r in priced[:offset])
    again = recompute == "full"
    seconds = [
        r.forward * (2 if again and _repeats(r.label) else 1) + r.backward + (setup if i == 0 else 0.0)
        for i, r in enumerate(units)
    ]
    local = {info(n).name: info(n) for n in placeholders(whole.graph, "parameter")}
    users: dict[str, list[int]] = {}
    for i, run in enumerate(folded.runs):
        for parameter in used_parameters(run):
            users.setdefault(info(parameter).name, []).append(i)
    state = [0.0] * len(units)
    shared = []
    for name, where in users.items():
        record = local[name]
        nbytes = torch.Size(record.shape).numel() * training.state_bytes(record.dtype)
        if len(where) == 1:
            state[where[0]] += nbytes
        else:
            shared.append((tuple(where), nbytes))
    kept = _kept_by_unit(folded, whole, scale, again)
    transient = [2.0 * scale * max((info(n).bytes for n in nodes), default=0) for _, nodes in whole.runs[offset:]]
    transient = [t + (k if again else 0.0) for t, k in zip(transient, kept[1], strict=True)]
    cross = crossing(folded)
    link = mesh.link(candidate.dp * candidate.tp, candidate.pp)
    cut_seconds = []
    for values in cross[:-1]:
        sent = [info(n).bytes / len(info(n).shapes) * scale * (2 if info(n).grad else 1) for n, _ in values]
        cut_seconds.append(sum(p2p_seconds(s, link) for s in sent) if candidate.pp > 1 else 0.0)
    m = request.global_batch // candidate.micro_batch
    flights = [in_flight(request.schedule or "1f1b", s, candidate.pp, m) for s in range(candidate.pp)]
    return CutProblem(
        candidate.pp, m, seconds, state, kept[0], transient, shared, cut_seconds, flights, usable_bytes(mesh)
    )


def _repeats(label: str) -> bool:
    """Whether a run is a numbered block, the kind that is recomputed."""
    return label.rpartition(".")[2].isdigit()


def _kept_by_unit(folded: Folded, whole: StageGraph, scale: float, again: bool) -> tuple[list[float], list[float]]:
    """Bytes each unit keeps per micro-batch, and those it keeps only while it is run again."""
    kept, inside = [], []
    for run, values in zip(folded.runs, crossing(folded), strict=False):
        nbytes = whole.kept.get(run.label, 0) * scale
        if again and _repeats(run.label):
            kept.append(sum(info(n).bytes for n, _ in values) * scale)
            inside.append(nbytes)
        else:
            kept.append(nbytes)
            inside.append(0.0)
    return kept, inside


def _too_big(cuts: CutProblem, candidate: Candidate, mesh: Mesh, folded: Folded) -> PartitionError:
    """Say how many bytes the best even cut lacks, and where."""
    total = sum(cuts.state) + sum(b for _, b in cuts.shared) + sum(k * cuts.in_flight[0] for k in cuts.kept)
    largest_unit = max(range(len(cuts.state)), key=lambda i: cuts.state[i] + cuts.kept[i] + cuts.transient[i])
    unit = cuts.state[largest_unit] + cuts.kept[largest_unit] + cuts.transient[largest_unit]
    need = max(total / candidate.pp, unit) + max(cuts.transient)
    missing = max(need - cuts.limit, 1.0)
    error = PartitionError(
        f"no plan fits {mesh} with pp={candidate.pp} dp={candidate.dp} tp={candidate.tp} "
        f"micro-batch {candidate.micro_batch}",
        f"a stage needs about {bytes_text(need)} of the {bytes_text(cuts.limit)} a {mesh.device.name} can give: "
        f"{bytes_text(missing)} short; largest: {folded.runs[largest_unit].label or 'the loss'} {bytes_text(unit)}",
        'more devices, recompute="full", zero=1, a smaller micro_batch, or precision="bfloat16"',
    )
    error.missing = missing  # type: ignore[attr-defined]
    return error


def _sync_by_stage(
    folded: Folded, choices: Choices, axes: Sequence[Axis], training: Training, starts: Sequence[int]
) -> list[float]:
    """Seconds each stage needs to add up its gradients."""
    ends = (*starts[1:], len(folded.runs))
    result = []
    for start, end in zip(starts, ends, strict=True):
        parameters = dict.fromkeys(p for run in folded.runs[start:end] for p in used_parameters(run))
        total = 0.0
        for parameter in parameters:
            placed = choices.placements(folded, (parameter, 0))
            shards = _shards(placed, [a.shards for a in axes])
            for placement, axis in zip(placed, axes, strict=True):
                total += sync_seconds(info(parameter), placement, axis.size, axis.link, shards, training)
        result.append(total)
    return result


def _shards(placements: Sequence[Placement], sizes: Sequence[int]) -> int:
    shards = 1
    for placement, size in zip(placements, sizes, strict=True):
        shards *= size if placement.kind == "S" else 1
    return shards


def write_out(folded: Folded, mesh: Mesh, request: Request, found: Found, started: float, model: str) -> Plan:
    """The plan in full: every stage localised and priced again, the schedule simulated."""
    candidate = found.candidate
    axes = axes_of(mesh, candidate.dp, candidate.tp)
    choices = replace(found.choices, axes=tuple((a.name, a.size) for a in axes))
    graphs = localise(folded, choices)
    prices = Prices(mesh.device, {a.name: (a.size, a.link) for a in axes})
    syncs = _sync_by_stage(folded, choices, axes, found.training, choices.starts)
    m = request.global_batch // candidate.micro_batch
    schedule = request.schedule or "1f1b"
    stages = []
    for graph, start, sync in zip(graphs, choices.starts, syncs, strict=True):
        flights = in_flight(schedule, graph.index, candidate.pp, m)
        stages.append(_stage(folded, graph, price(graph, prices), start, sync, found, flights))
    link = mesh.link(candidate.dp * candidate.tp, candidate.pp)
    edges = sorted({(c.producer, to) for g in graphs for c in g.sent for to in c.consumers})
    latency = {(a, b): p2p_seconds(dict(stages[a].sends)[b], link) for a, b in edges}
    timeline = simulate(
        instructions(schedule, candidate.pp, m, edges),
        [s.forward_seconds for s in stages],
        [s.backward_seconds for s in stages],
        latency,
        [s.sync_seconds for s in stages],
    )
    missing = sorted({info(n).name for n in folded.representatives() if info(n).kind == "op"} - {"autopart.getitem"})
    return Plan(
        model=model,
        mesh=mesh,
        pp=candidate.pp,
        dp=candidate.dp,
        tp=candidate.tp,
        micro_batch=candidate.micro_batch,
        global_batch=request.global_batch,
        schedule=schedule,
        zero=found.training.zero,
        recompute=found.recompute,
        precision=request.precision,
        optimizer=request.optimizer,
        strategies=choices.strategies,
        stages=tuple(stages),
        step_seconds=timeline.seconds,
        gap=max(0.0, 1.0 - found.bound / found.seconds),
        bound_seconds=found.bound,
        status="optimal" if found.bound >= found.seconds * (1 - 1e-4) else "feasible",
        planning_seconds=time.monotonic() - started,
        signature=Signature.of(folded.traced),
        replicated=tuple(n for n in missing if not has_rule(n)),
    )


def _stage(
    folded: Folded,
    graph: StageGraph,
    priced: Sequence[PricedRun],
    start: int,
    sync: float,
    found: Found,
    flights: int,
) -> PlanStage:
    """One stage's report; equal neighbours are printed once."""
    training = found.training
    again = found.recompute == "full"
    parameters = [info(n) for n in placeholders(graph.graph, "parameter")]
    elements = {p.name: torch.Size(p.shape).numel() for p in parameters}
    states = OPTIMIZER_STATES[training.optimizer]
    shared = training.shared_by if training.zero else 1
    memory = {
        "parameters": sum(elements[p.name] * p.dtype.itemsize for p in parameters),
        "gradients": sum(elements[p.name] * p.dtype.itemsize for p in parameters if p.grad),
        "optimizer": sum(elements[p.name] * p.dtype.itemsize * states for p in parameters if p.grad) // shared,
        "activations": flights * graph.kept_bytes,
        "transient": 2 * max((info(n).bytes for _, nodes in graph.runs for n in nodes), default=0),
    }
    forward = sum(r.forward for r in priced)
    backward = sum(r.backward for r in priced)
    if again:
        backward += sum(r.forward for r in priced if _repeats(r.label))
        memory["activations"] = flights * _recomputed_bytes(graph, folded, start)
        memory["transient"] += graph.kept_bytes // max(1, sum(_repeats(r.label) for r in priced))
    runs = []
    shape = [
        (r.label if not _repeats(r.label) else r.label.rpartition(".")[0], len(r.lines), r.forward) for r in priced
    ]
    for _, group in groupby(zip(shape, priced, strict=True), key=lambda pair: pair[0]):
        members = [run for _, run in group]
        lines = tuple(
            PlanLine(n.name, n.operator, n.note, n.seconds, n.comm_seconds, n.source) for n in members[0].lines
        )
        runs.append(PlanRun(tuple(r.label for r in members), members[0].forward + members[0].backward, lines))
    sends: dict[int, int] = {}
    for c in graph.sent:
        for to in c.consumers:
            sends[to] = sends.get(to, 0) + torch.Size(c.shape).numel() * c.dtype.itemsize
    return PlanStage(start, forward, backward, sync, memory, tuple(runs), tuple(sorted(sends.items())))


def _recomputed_bytes(graph: StageGraph, folded: Folded, start: int) -> int:
    """Bytes kept per micro-batch when numbered blocks keep their inputs alone."""
    total = 0
    for label, nodes in graph.runs:
        if not _repeats(label):
            continue
        inside = set(nodes)
        total += sum(
            info(n).bytes
            for n in dict.fromkeys(i for node in nodes for i in node.all_input_nodes)
            if n not in inside and info(n).kind not in ("parameter", "buffer")
        )
    return total
