"""A decided plan in full: every stage localised and priced again, the schedule simulated."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch

from autopart.comm import p2p_seconds
from autopart.cost import OPTIMIZER_STATES, Training, sync_seconds
from autopart.folded import Folded, used_parameters
from autopart.graph import info, placeholders
from autopart.mesh import Mesh
from autopart.notation import Placement
from autopart.passes.formulate import Axis
from autopart.passes.localise import localise
from autopart.passes.price import PricedRun, Prices, price
from autopart.plan import (
    Plan,
    PlanRun,
    PlanStage,
    Signature,
    shortened,
)
from autopart.request import Found, Request, axes_of, is_block
from autopart.rules import has_rule, is_contraction
from autopart.schedules import in_flight, instructions, simulate
from autopart.stages import OWNED, Choices, Splits, StageGraph


def sync_by_stage(
    folded: Folded, choices: Choices, axes: Sequence[Axis], training: Training, starts: Sequence[int]
) -> list[float]:
    """Seconds each stage needs to add up its gradients."""
    ends = (*starts[1:], len(folded.runs))
    result = []
    for stage, (start, end) in enumerate(zip(starts, ends, strict=True)):
        parameters = dict.fromkeys(p for run in folded.runs[start:end] for p in used_parameters(run))
        total = 0.0
        for parameter in parameters:
            placed = choices.placements(folded, (parameter, 0), stage)
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
    syncs = sync_by_stage(folded, choices, axes, found.training, choices.starts)
    m = request.global_batch // candidate.micro_batch
    schedule = request.schedule or "1f1b"
    stages: list[PlanStage] = []
    distinct: list[Splits] = []
    for graph, start, sync in zip(graphs, choices.starts, syncs, strict=True):
        flights = in_flight(schedule, graph.index, candidate.pp, m)
        index = next((i for i, d in enumerate(distinct) if d is choices.strategies[graph.index]), len(distinct))
        distinct += [choices.strategies[graph.index]] if index == len(distinct) else []
        end = choices.starts[graph.index + 1] if graph.index + 1 < candidate.pp else len(folded.runs)
        modes = tuple(found.recompute if is_block(label) else "none" for label in folded.labels[start:end])
        stages.append(_stage(folded, graph, price(graph, prices), start, index, modes, sync, found, flights))
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
        splits=tuple(distinct),
        stages=tuple(stages),
        step_seconds=timeline.seconds,
        gap=max(0.0, 1.0 - found.bound / found.seconds),
        bound_seconds=found.bound,
        status="optimal" if found.bound >= found.seconds * (1 - 1e-4) else "feasible",
        planning_seconds=time.monotonic() - started,
        signature=Signature.of(folded.traced),
        replicated=tuple(n for n in missing if not has_rule(n)),
        notes=tuple(_notes(folded, choices, m)),
    )


def _notes(folded: Folded, choices: Choices, micro_batches: int) -> Iterator[str]:
    if micro_batches > 1 and not folded.traced.mean_of_samples:
        yield (
            f"the loss mixes samples ({folded.traced.mixed_at}): it is the mean of {micro_batches} micro-batches' "
            "losses, as in gradient accumulation, not that of the batch"
        )
    if any(name == "tp" for name, _ in choices.axes):
        products = [n for n in folded.representatives() if is_contraction(info(n).name)]
        work = {n: info(n).flops * folded.count[n] for n in products}
        whole = [n for n in products if not choices.strategies[0]["tp"][folded.keys[n]].shards_work]
        share = sum(work[n] for n in whole) / (sum(work.values()) or 1.0)
        if share > 1e-3:
            names = ", ".join(dict.fromkeys(info(n).module or shortened(info(n).name) for n in whole))
            yield f"tp splits {1 - share:.1%} of the FLOPs of products; whole on every rank: {names}"


def _stage(
    folded: Folded,
    graph: StageGraph,
    priced: Sequence[PricedRun],
    start: int,
    splits: int,
    recompute: tuple[str, ...],
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
        backward += sum(r.forward for r in priced if is_block(r.label))
        memory["activations"] = flights * _recomputed_bytes(graph)
        memory["transient"] += graph.kept_bytes // max(1, sum(is_block(r.label) for r in priced))
    runs = []
    shape = [
        (r.label if not is_block(r.label) else r.label.rpartition(".")[0], len(r.lines), r.forward) for r in priced
    ]
    for _, group in groupby(zip(shape, priced, strict=True), key=lambda pair: pair[0]):
        members = [run for _, run in group]
        each = members[0].forward + members[0].backward
        runs.append(PlanRun(tuple(r.label for r in members), each, members[0].lines))
    sends: dict[int, int] = {}
    for c in graph.sent:
        for to in c.consumers:
            sends[to] = sends.get(to, 0) + torch.Size(c.shape).numel() * c.dtype.itemsize
    return PlanStage(start, splits, recompute, forward, backward, sync, memory, tuple(runs), tuple(sorted(sends.items())))


def _recomputed_bytes(graph: StageGraph) -> int:
    """Bytes kept per micro-batch when numbered blocks keep their inputs alone."""
    total = 0
    for label, nodes in graph.runs:
        if not is_block(label):
            continue
        inside = set(nodes)
        total += sum(
            info(n).bytes
            for n in dict.fromkeys(i for node in nodes for i in node.all_input_nodes)
            if n not in inside and info(n).kind not in OWNED
        )
    return total
