"""The search over what the ILPs leave open: degrees, micro-batch size, ZeRO level, recompute.

Every candidate has a lower bound, the time of its work at the device's speed with nothing between devices; candidates
are taken by rising bound, and those whose bound reaches the best plan found are never solved. For the others the
split ILP gives a bound of its own. The least of all these is the bound the plan's gap is proven against: no plan of
this search space is faster by this cost model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from autopart.comm import p2p_seconds
from autopart.cost import Training
from autopart.errors import PartitionError
from autopart.folded import Folded, crossing, used_parameters
from autopart.graph import info, placeholders
from autopart.mesh import Mesh
from autopart.passes.formulate import formulate
from autopart.passes.localise import localise
from autopart.passes.price import PricedRun, Prices, price
from autopart.plan import (
    bytes_text,
    usable_bytes,
)

from autopart.report import sync_by_stage
from autopart.request import Candidate, Found, Request, axes_of, divisors, is_block
from autopart.rules import Strategy, is_contraction
from autopart.schedules import in_flight
from autopart.stages import Choices, StageGraph

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


def _candidates(folded: Folded, mesh: Mesh, request: Request) -> Iterator[Candidate]:
    """Every combination of degrees and micro-batch that divides; PartitionError if there is none."""
    units, rejected = len(folded.runs), []
    found = False
    for pp in [request.pp] if request.pp else divisors(mesh.size):
        if pp > units:
            rejected.append(f"pp={pp} stages but the model has {units} places to cut")
            continue
        for tp in [request.tp] if request.tp else divisors(mesh.size // pp):
            dp = mesh.size // pp // tp
            if request.dp not in (None, dp) or pp * dp * tp != mesh.size:
                continue
            if tp > mesh.devices_per_host and not request.tp:
                continue
            sizes = [request.micro_batch] if request.micro_batch else _micro_batches(request.global_batch, dp)
            if not request.micro_batch and not folded.traced.mean_of_samples:
                sizes = [request.global_batch]
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
        near = divisors(request.global_batch)
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


def solve_candidate(folded: Folded, mesh: Mesh, request: Request, candidate: Candidate) -> Found:
    """The best plan of a candidate: cheapest in memory options first that fit. Raises PartitionError."""
    refused: PartitionError | None = None
    zeros = [request.zero] if request.zero is not None else [0, 1] if candidate.dp > 1 else [0]
    if folded.traced.updated and request.recompute == "full":
        raise PartitionError(
            f"the forward pass changes {folded.traced.updated[0]}",
            "recompute would change it twice a step",
            'recompute="none"',
        )
    recomputes = [request.recompute] if request.recompute else ["none"] if folded.traced.updated else ["none", "full"]
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
    keyed: dict[str, dict[str, Strategy]] = {}
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
        keyed[axis.name] = {folded.keys[n]: strategies[axis.name][n.name] for n in folded.representatives()}
        if forced.forced:
            _check_splits(folded, axis, strategies[axis.name])
        if axis.name == "dp":
            before = strategies["dp"]
            extra = solution.bound
    work = _work(folded, mesh, candidate) * settings.passes
    bound = solution.bound if solution is not None else work
    if len(axes) == 2:
        shared = _work(folded, mesh, replace(candidate, tp=1)) * settings.passes
        bound += max(0.0, extra - shared) / candidate.tp
    choices = Choices(tuple((a.name, a.shards) for a in axes), (keyed,), (0,))
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
        raise _too_big(cuts, candidate, mesh, folded, request)
    split = replace(choices, strategies=(keyed,) * candidate.pp)
    syncs = sync_by_stage(folded, split, axes, training, cut.starts)
    seconds = cut.seconds + max(syncs)
    choices = replace(choices, starts=cut.starts, strategies=(keyed,) * candidate.pp)
    return Found(candidate, choices, training, recompute, seconds, min(bound, seconds))


def _check_splits(folded: Folded, axis: Axis, chosen: Mapping[str, Strategy]) -> None:
    """Raise PartitionError where an axis that was asked for would leave every product whole."""
    products = [n for n in folded.representatives() if is_contraction(info(n).name)]
    if not products or any(chosen[n.name].shards_work for n in products):
        return
    sizes = sorted({s for n in products for o in n.all_input_nodes for s in info(o).shape if s > 1})
    fits = [d for d in range(2, 65) if sum(s % d == 0 for s in sizes) > 1]
    raise PartitionError(
        f"{axis.name}={axis.size} splits nothing",
        f"no matrix product has a dim that {axis.size} divides and that may be split; the sizes are "
        f"{', '.join(map(str, sizes))}",
        f"{axis.name}={', '.join(map(str, fits[:6]))}" if fits else "pp or dp",
    )


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
        r.forward * (2 if again and is_block(r.label) else 1) + r.backward + (setup if i == 0 else 0.0)
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


def _kept_by_unit(folded: Folded, whole: StageGraph, scale: float, again: bool) -> tuple[list[float], list[float]]:
    """Bytes each unit keeps per micro-batch, and those it keeps only while it is run again."""
    kept, inside = [], []
    for run, values in zip(folded.runs, crossing(folded), strict=False):
        nbytes = whole.kept.get(run.label, 0) * scale
        if again and is_block(run.label):
            kept.append(sum(info(n).bytes for n, _ in values) * scale)
            inside.append(nbytes)
        else:
            kept.append(nbytes)
            inside.append(0.0)
    return kept, inside


def _too_big(cuts: CutProblem, candidate: Candidate, mesh: Mesh, folded: Folded, request: Request) -> PartitionError:
    """Say how many bytes the best even cut lacks, and where."""
    total = sum(cuts.state) + sum(b for _, b in cuts.shared) + sum(k * cuts.in_flight[0] for k in cuts.kept)
    largest_unit = max(range(len(cuts.state)), key=lambda i: cuts.state[i] + cuts.kept[i] + cuts.transient[i])
    unit = cuts.state[largest_unit] + cuts.kept[largest_unit] + cuts.transient[largest_unit]
    need = max(total / candidate.pp, unit) + max(cuts.transient)
    missing = max(need - cuts.limit, 1.0)
    smaller = "a smaller micro_batch"
    if not folded.traced.mean_of_samples and request.micro_batch is None:
        smaller += f" (the batch is one, because of {folded.traced.mixed_at})"
    error = PartitionError(
        f"no plan fits {mesh} with pp={candidate.pp} dp={candidate.dp} tp={candidate.tp} "
        f"micro-batch {candidate.micro_batch}",
        f"a stage needs about {bytes_text(need)} of the {bytes_text(cuts.limit)} a {mesh.device.name} can give: "
        f"{bytes_text(missing)} short; largest: {folded.runs[largest_unit].label or 'the loss'} {bytes_text(unit)}",
        f'more devices, recompute="full", zero=1, {smaller}, or precision="bfloat16"',
    )
    error.missing = missing  # type: ignore[attr-defined]
    return error
