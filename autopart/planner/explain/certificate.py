"""Checks a plan independently of the search: whether it can run, and whether its seconds and bytes are right.

The checks use neither the solver nor the tables of the search. The whole model is traced. Every stage is partitioned by
the plan's decisions and priced node by node. The bytes of a stage are those of the liveness events of this trace
(`cost.liveness`). Strategies are looked up in the rules.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from autopart.cost.collectives import p2p_seconds
from autopart.cost.offload import OFFLOADS
from autopart.cost.training_state import (
    MASTERS,
    OPTIMIZER_STATES,
    Training,
    amortization,
    shard_groups,
    step_kernel,
    widening,
)
from autopart.cost.update_seconds import update_seconds
from autopart.errors import PartitionError
from autopart.frontend.batch import DTYPES, Batch
from autopart.frontend.with_loss import Loss, with_loss
from autopart.hardware.mesh import usable_bytes
from autopart.ir.graph import calls, info
from autopart.ir.labels import is_block
from autopart.ir.layered_graph import LayeredGraph
from autopart.passes.partition import partition
from autopart.passes.price_stage import PricedSegment, Prices, price_stage
from autopart.passes.source import Source
from autopart.passes.stage_graph import PRELUDE_SEGMENT, Crossing, ShardingAssignment, StageGraph
from autopart.plan.data import Plan
from autopart.plan.schedules import SCHEDULES, in_flight
from autopart.plan.signature import Signature
from autopart.plan.stages import PlanStage
from autopart.planner.cuts import spans_of
from autopart.planner.explain.host_findings import host_findings, traffic_findings
from autopart.planner.memory_tree import StageMemory
from autopart.planner.stage_parameters import Parameter, distinct, messages_of, on_host, parameters
from autopart.planner.validate import choices_of, stage_findings, strategy_findings
from autopart.sharding.rules import has_rule

EQUAL = 1e-6
"""The relative difference that rounding may make between two sums of the same numbers."""

SECONDS_TOLERANCE = 5e-4
"""The largest relative difference of seconds. The plan scales the seconds of a trace of two samples; the certificate
traces a whole micro-batch. A few small values, whose batch dim is not known, have another size there."""

BYTES_BELOW, BYTES_ABOVE = 1e-3, 0.05
"""The largest relative differences of bytes: of a plan that states fewer than the certificate finds, and of one that
states more. A plan scales all saved bytes with the samples, though a few do not grow. A plan counts an input that
several blocks save even where only one of these blocks is recomputed."""

REQUESTED = (
    *("pp", "dp", "tp", "micro_batch", "global_batch", "zero", "schedule"),
    *("precision", "master", "optimizer", "offload"),
)
"""Settings of a plan that must equal those of its request."""


def certify(plan: Plan, model: nn.Module, batch: Batch, *, loss: Loss | None = None) -> None:
    """Raise PartitionError with all findings where a plan cannot run on a model, or where its numbers are wrong.

    model  the model that the plan is for; it may be on meta
    batch  the batch that the plan was made with
    loss   the loss that the plan was made with
    """
    layered = Source.of(with_loss(model, loss), batch, plan).full(plan.micro_batch, plan.mesh)
    wrong = findings(plan, layered)
    if wrong:
        raise PartitionError("the plan does not hold", "; ".join(wrong), "plan again with autopart.plan(...)")


def findings(plan: Plan, layered: LayeredGraph) -> list[str]:
    """A text for each thing that is wrong with a plan for a model, which was traced whole with the plan's micro-batch.

    Each check presumes that the checks before it found nothing.
    """
    for check in (_settings, strategy_findings, _numbers):
        found = list(check(plan, layered))
        if found:
            return found
    return []


# ---- the settings -----------------------------------------------------------------------------------------


def _settings(plan: Plan, layered: LayeredGraph) -> Iterator[str]:
    """Findings in the signature, degrees, batch, precision, cuts, checkpointing modes and lower bound."""
    if plan.signature != Signature.of(layered):
        yield f"signature: {plan.signature.difference(Signature.of(layered)) or 'it is not that of the model'}"
    if min(plan.pp, plan.dp, plan.tp) < 1 or plan.pp * plan.dp * plan.tp != plan.mesh.size:
        yield f"degrees: {plan.degrees} does not fill {plan.mesh.size} devices"
    for axis, degree in plan.mesh.axes:
        if getattr(plan, axis) != degree:
            yield f"degrees: {axis}={getattr(plan, axis)}, the mesh has {degree}"
    if plan.micro_batch < 1 or plan.global_batch % plan.micro_batch or plan.micro_batch % plan.dp:
        yield f"micro-batch: {plan.micro_batch} does not divide {plan.global_batch}, or dp={plan.dp} not that"
    if plan.zero not in range(4):
        yield f"zero: {plan.zero} is no level"
    divides = plan.zero and 1 < plan.shard_size < plan.dp and plan.dp % plan.shard_size == 0
    if plan.shard_size and not divides:
        yield f"shard_size: ZeRO {plan.zero} does not divide among {plan.shard_size} of dp={plan.dp} ranks"
    if plan.prefetch_bytes and plan.zero < 3:
        yield f"prefetch: {plan.prefetch_bytes} bytes of weights gathered ahead, though ZeRO {plan.zero} gathers none"
    known_names = (
        ("schedule", SCHEDULES),
        ("optimizer", OPTIMIZER_STATES),
        ("precision", DTYPES),
        ("offload", OFFLOADS),
    )
    for name, known in known_names:
        if getattr(plan, name) not in known:
            yield f"{name}: {getattr(plan, name)!r} is not known"
    if plan.master is not None and (plan.master not in MASTERS or widening(plan.precision, plan.master) <= 1):
        yield f"master: {plan.master!r} is not wider than {plan.precision}"
    for name in REQUESTED:
        asked = plan.request.get(name)
        if asked is not None and asked != getattr(plan, name):
            yield f"{name}: {getattr(plan, name)}, asked for {asked}"
    missing = {info(n).name for n in layered.representatives() if info(n).kind == "op"} - {"autopart.getitem"}
    if plan.replicated != tuple(sorted(n for n in missing if not has_rule(n))):
        yield "replicated: not the operators without a rule"
    stages = list(stage_findings(plan, layered))
    yield from stages or _modes(plan, layered)
    yield from _bound(plan)


def _modes(plan: Plan, layered: LayeredGraph) -> Iterator[str]:
    """A finding where `Plan.recompute` does not sum up the checkpointing modes of the blocks."""
    modes = [mode for stage in plan.stages for mode in stage.recompute]
    kinds = {mode for mode, label in zip(modes, layered.labels, strict=True) if is_block(label)}
    stated = next(iter(kinds), "none") if len(kinds) < 2 else "mixed"
    if plan.recompute != stated:
        yield f"recompute: {plan.recompute!r}, the stages say {stated!r}"


def _bound(plan: Plan) -> Iterator[str]:
    """Findings in the lower bound, the gap = 1 - bound / step, and the status."""
    if not 0.0 <= plan.bound_seconds <= plan.step_seconds * (1 + EQUAL):
        yield f"bound: {plan.bound_seconds} s is not below the step's {plan.step_seconds} s"
    gap = max(0.0, 1 - plan.bound_seconds / plan.step_seconds) if plan.step_seconds > 0 else 0.0
    if not math.isclose(plan.gap, gap, abs_tol=EQUAL):
        yield f"gap: {plan.gap}, the bound says {gap}"
    if plan.status not in ("optimal", "feasible") or (plan.status == "optimal") != (gap <= 1e-6):
        yield f"status: {plan.status!r} with a gap of {gap}"


# ---- the numbers ------------------------------------------------------------------------------------------


def _numbers(plan: Plan, layered: LayeredGraph) -> Iterator[str]:
    """Findings in FLOPs, seconds, bytes, printed lines and messages of the stages, and in the step's seconds."""
    choices, m = choices_of(plan), plan.micro_batches
    flops = m * sum(info(node).model_flops for node in calls(layered.traced.graph))
    if not _agree(plan.forward_flops, flops):
        yield f"forward_flops: {flops}, the plan says {plan.forward_flops}"
    spans, seconds = [range(*span) for span in spans_of(plan.starts, len(layered.labels))], []
    for graph, stage, span in zip(partition(layered, choices), plan.stages, spans, strict=True):
        name, mesh = f"stage {graph.index}", plan.mesh_of(graph.index)
        here, device = replace(plan, mesh=mesh), mesh.busy_device(plan.pp, m)
        groups = {"dp": mesh.group(plan.tp, plan.dp), "tp": mesh.group(1, plan.tp)}
        priced = price_stage(layered, graph, Prices(device, {axis: groups[axis] for axis, _ in choices.axes}))
        segments = dict(zip(graph.indices, priced, strict=True))
        times = _seconds(here, layered, choices, graph, segments, span)
        times["send_seconds"] = sum(_message_seconds(plan, crossing) for crossing in [*graph.received, *graph.sent])
        for part, value in times.items():
            if not _agree(getattr(stage, part), value):
                yield f"{name}: {part} are {value}, the plan says {getattr(stage, part)}"
        memory = _stage_memory(here, layered, choices, graph, span)
        yield from _memory(here, memory, stage.memory, name)
        yield from host_findings(here, on_host(memory.reads, _training(here)), stage.host_bytes, name)
        yield from _printed(stage, layered, segments, span, name)
        sends = _sends(plan, graph)
        alike = all(a[:2] == b[:2] and _agree(a[2], b[2]) for a, b in zip(stage.sends, sends, strict=False))
        if len(stage.sends) != len(sends) or not alike:
            yield f"{name}: sends {sends}, the plan says {list(stage.sends)}"
        training, read = _training(here), distinct(_reads(layered, choices, span, graph))
        yield from traffic_findings(stage, segments, read, span, training, name)
        seconds.append(times["forward_seconds"] + times["backward_seconds"] + times["send_seconds"])
        seconds[-1] += times["sync_seconds"] / amortization(plan.zero, m, plan.pp)
    step = sum(seconds) + (m - 1) * max(seconds)
    if not _agree(plan.step_seconds, step):
        yield f"step: {step} s, the plan says {plan.step_seconds}"


def _agree(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=SECONDS_TOLERANCE, abs_tol=1e-15)


def _seconds(
    plan: Plan,
    layered: LayeredGraph,
    choices: ShardingAssignment,
    graph: StageGraph,
    segments: dict[int, PricedSegment],
    span: range,
) -> dict[str, float]:
    """Seconds without messages, by their names in `PlanStage`: sync of a step, all others of a micro-batch."""
    modes = dict(zip(span, plan.stages[graph.index].recompute, strict=True))
    recompute = 0.0
    for segment, priced in segments.items():
        recompute += priced.recompute_seconds[modes.get(segment, "none")]
    sync, device, training = 0.0, plan.mesh.busy_device(plan.pp, plan.micro_batches), _training(plan)
    reads = _reads(layered, choices, span, graph)
    for _, record, nbytes, over_dp, over_tp in distinct(reads):
        sync += update_seconds(nbytes, record.grad, over_dp, training, device)
        if over_tp:
            sync += training.partial_sync_seconds(nbytes, over_dp, plan.mesh.group(1, plan.tp))
    messages = messages_of(layered, training, reads, plan.tp)
    each, share = [segments.get(p) for p in span], device.overlapped_share
    last = [s + c for s, c in zip(messages.scatter, messages.crossing, strict=True)]
    hidden = (training.backwards - 1) * _overlapped_seconds(messages.scatter, messages.gather, each, share)
    hidden += _overlapped_seconds(last, messages.gather, each, share)
    sync += messages.total - share * hidden
    return {
        "forward_seconds": sum(r.forward for r in segments.values()),
        "backward_seconds": sum(r.backward for r in segments.values()) + recompute,
        "sync_seconds": sync,
    }


def _overlapped_seconds(
    scatter: Sequence[float], gather: Sequence[float], segments: Sequence[PricedSegment | None], share: float
) -> float:
    """Seconds of gradient sync and gathers that go on during a forward and a backward of a stage's positions.

    The parameters of a position are gathered while the one before it computes; computing takes 1 / `share` times as
    long meanwhile. Backward runs from the last position to the first. The gradients of a position are sent during the
    backward of earlier positions, as far as gathers leave the links. Messages of parameters that several positions read
    are not hidden.
    """
    if not share:
        return 0.0
    computing = [(s.forward / share, s.backward / share) if s else (0.0, 0.0) for s in segments]
    hidden, ready = 0.0, 0.0
    for (forward, _), coming in zip(computing, gather[1:], strict=False):
        hidden += min(forward, coming)
    for p, (_, backward) in reversed(list(enumerate(computing))):
        coming = gather[p - 1] if p else 0.0
        gathered = min(backward, coming)
        sent = min(ready, backward - gathered)
        hidden, ready = hidden + gathered + sent, ready - sent + scatter[p]
    return hidden


def _sends(plan: Plan, graph: StageGraph) -> list[tuple[int, int, float]]:
    """(consumer stage, bytes, seconds) of the messages of a micro-batch that a stage sends, by consumer stage.

    The seconds are those of the values forward and of their gradients backward.
    """
    sizes, seconds = Counter[int](), defaultdict[int, float](float)
    for crossing in graph.sent:
        for to in crossing.consumers:
            sizes[to] += round(crossing.size)
            seconds[to] += _message_seconds(plan, crossing)
    return [(to, size, seconds[to]) for to, size in sorted(sizes.items())]


def _message_seconds(plan: Plan, crossing: Crossing) -> float:
    """Seconds to send a value from one stage to another, and its gradient back if the value has one."""
    link = plan.mesh.between(plan.dp * plan.tp, plan.pp, plan.micro_batches)
    return float(p2p_seconds(crossing.size, link)) * (1 + crossing.grad)


def _training(plan: Plan) -> Training:
    group, wide = plan.mesh.group(plan.tp, plan.dp), widening(plan.precision, plan.master)
    offload, ahead = plan.offload == "optimizer", plan.prefetch_bytes
    kernel = step_kernel(plan.optimizer, plan.precision, plan.master, plan.mesh.device, plan.no_fuse, offload)
    gpu, m = plan.mesh.device.type != "cpu", plan.micro_batches
    parts = shard_groups(plan.mesh, plan.tp, plan.dp, plan.shard_size)
    return Training(plan.optimizer, plan.zero, group, m, wide, gpu, kernel, offload, gpu, ahead, *parts)


def _reads(layered: LayeredGraph, choices: ShardingAssignment, span: range, graph: StageGraph) -> list[list[Parameter]]:
    """The parameters that each position of a stage reads."""
    return parameters(layered, choices, (span.start, span.stop), graph.index)


def _stage_memory(
    plan: Plan, layered: LayeredGraph, choices: ShardingAssignment, graph: StageGraph, span: range
) -> StageMemory:
    """The liveness events of one rank of a stage, by the trace of the whole model."""
    flights, received = in_flight(plan.schedule, graph.index, plan.pp, plan.micro_batches), graph.received
    return StageMemory(
        layered=layered,
        choices=choices,
        graph=graph,
        stage=graph.index,
        span=(span.start, span.stop),
        modes=plan.stages[graph.index].recompute,
        training=_training(plan),
        in_flight=flights,
        micro_batches=plan.micro_batches,
        received=sum(crossing.size for crossing in received),
    )


def _memory(plan: Plan, memory: StageMemory, stated: Mapping[str, float], name: str) -> Iterator[str]:
    """Findings in the bytes of a stage.

    The stated bytes of each kind must be those of one moment within BYTES_ABOVE of the peak: in the planner's trace of
    two samples another moment may be the peak. The stated sum must reach the peak, and the peak must fit the device.
    """
    peak = memory.peak.bytes
    near = [memory.by_kind(moment) for moment in memory.moments if moment.bytes >= peak * (1 - BYTES_ABOVE)]
    wrong = min((list(_wrong_kinds(expected, stated)) for expected in near), key=len)
    if wrong:
        wrong = list(_wrong_kinds(memory.by_kind(), stated))
    yield from (f"{name}: {text}" for text in wrong)
    if sum(stated.values()) < peak * (1 - BYTES_BELOW):
        yield f"{name}: memory is {peak} bytes, the plan says {sum(stated.values())}"
    if plan.request.get("must_fit", True) and peak > usable_bytes(plan.mesh) * (1 + EQUAL):
        yield f"{name}: memory of {peak} bytes is more than the device's {usable_bytes(plan.mesh)}"


def _wrong_kinds(expected: Mapping[str, float], stated: Mapping[str, float]) -> Iterator[str]:
    """A finding for each kind whose stated bytes are too low by more than BYTES_BELOW, or too high by BYTES_ABOVE."""
    for part in {**expected, **stated}:
        said, found = stated.get(part, -1.0), expected.get(part, -1.0)
        if not -BYTES_BELOW * abs(found) <= said - found <= BYTES_ABOVE * abs(found):
            yield f"memory of {part} is {expected.get(part)} bytes, the plan says {stated.get(part)}"


def _printed(
    stage: PlanStage, layered: LayeredGraph, segments: dict[int, PricedSegment], span: range, name: str
) -> Iterator[str]:
    """Findings where the printed segments are not those of the stage, or do not add up to its seconds."""
    labels = [label for segment in stage.segments for label in segment.labels]
    if Counter(labels) != Counter(
        [""] * (PRELUDE_SEGMENT in segments) + [layered.labels[p] for p in span if p in segments]
    ):
        yield f"{name}: the segments printed are not those it has"
        return
    total = sum(segment.seconds * len(segment.labels) for segment in stage.segments)
    if not _agree(total, stage.forward_seconds + stage.backward_seconds):
        yield f"{name}: the segments printed take {total} s, not what the stage does"
    lines = sum(
        (line.seconds + line.comm_seconds) * len(segment.labels) for segment in stage.segments for line in segment.lines
    )
    if not _agree(lines, sum(segment.forward + segment.backward for segment in segments.values())):
        yield f"{name}: the operators printed take {lines} s, not what they do"
