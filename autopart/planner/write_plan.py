"""SearchResult -> Plan: every stage is partitioned, priced node by node, and compared with the search."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from torch import fx

from autopart.cost.offload import OFFLOADS
from autopart.cost.training_state import Training
from autopart.cost.update_seconds import update_seconds
from autopart.ir.graph import info
from autopart.ir.labels import is_block
from autopart.ir.layered_graph import LayeredGraph, used_parameters
from autopart.passes.partition import partition, without_idle_prelude
from autopart.passes.price_stage import PricedSegment, Prices, price_stage
from autopart.passes.stage_graph import PRELUDE, PRELUDE_SEGMENT, ShardingAssignment, Splits, StageGraph
from autopart.plan.data import Plan
from autopart.plan.fields import KernelUse
from autopart.plan.signature import Signature
from autopart.plan.stages import PlanSegment, PlanStage
from autopart.planner.candidate import SearchResult, host_limit
from autopart.planner.cuts import spans_of
from autopart.planner.dataflow import with_sources
from autopart.planner.interval_seconds import exposed_by_clock
from autopart.planner.memory_tree import messages, stage_memory
from autopart.planner.search_points import SearchPoint
from autopart.planner.search_space import SearchSpace
from autopart.planner.stage_parameters import distinct, messages_of, on_host, parameters
from autopart.planner.stage_traffic import sends_of, traffic_of
from autopart.sharding.rules import has_rule

EQUAL = 1e-6
"""Relative difference of two sums of the same numbers."""


def write_out(space: SearchSpace, found: SearchResult, started: float, model: str) -> Plan:
    """The plan. Raises AssertionError where its seconds, priced node by node, are not those of the search, or its bytes
    do not fit.

    Where backward hides gradient sync, the seconds written out may be less than those of the search: the search counts
    reshards that several positions share to no position's backward, so that they hide nothing.
    """
    request, layered, point = space.request, space.layered, found.point
    m = space.micro_batches(point)
    distinct = list(dict.fromkeys(found.chosen))
    splits = [_splits(space, found, chosen) for chosen in distinct]
    stages, known = [], Known()
    spans = spans_of(found.starts, len(layered.labels))
    for index, (start, end) in enumerate(spans):
        at = distinct.index(found.chosen[index])
        stages.append(write_stage(space, found, splits[at], at, index, (start, end), found.recompute[start:end], known))
    each = enumerate(zip(stages, spans, strict=True))
    written = [known[key_of(layered, s.splits, span, space.at(point, i).kind)][1:] for i, (s, span) in each]
    stages = with_sources(layered, stages, spans, written)
    times = [stage.turn_seconds(space.amortization(point)) for stage in stages]
    step = sum(times) + (m - 1) * max(times)
    hides = space.mesh.device.overlapped_share > 0
    for index, (mine, theirs) in enumerate(zip(times, found.stage_seconds, strict=True)):
        equal = math.isclose(mine, theirs, rel_tol=EQUAL) or (hides and mine < theirs)
        assert equal, f"stage {index} is {mine} s written out, {theirs} s searched"
    _check_fits(space, point, stages)
    missing = sorted({info(n).name for n in layered.representatives() if info(n).kind == "op"} - {"autopart.getitem"})
    blocks = {mode for mode, label in zip(found.recompute, layered.labels, strict=True) if is_block(label)}
    plan = Plan(
        model=model,
        mesh=space.mesh,
        pp=point.pp,
        dp=point.dp,
        tp=point.tp,
        micro_batch=point.micro_batch,
        global_batch=request.global_batch,
        schedule=space.schedule,
        zero=point.zero,
        recompute=next(iter(blocks), "none") if len(blocks) < 2 else "mixed",
        precision=request.precision,
        master=request.master,
        optimizer=request.optimizer,
        offload=OFFLOADS[point.offload],
        splits=tuple(splits),
        stages=tuple(stages),
        step_seconds=step,
        gap=0.0,
        bound_seconds=step,
        status="optimal",
        planning_seconds=time.monotonic() - started,
        forward_flops=_forward_flops(space, m),
        signature=Signature.of(layered),
        replicated=tuple(n for n in missing if not has_rule(n)),
        kernels=(*_kernels(layered, point.micro_batch), *_step(layered, space.training(point), point)),
        notes=tuple(_notes(space, found)),
        request=request.to_json(),
        prefetch_bytes=int(space.training(point).prefetch),
        shard_size=point.shard_size,
        search=found.summary,
    )
    return bounded(plan, found.bound)


def _check_fits(space: SearchSpace, point: SearchPoint, stages: Sequence[PlanStage]) -> None:
    """Raise AssertionError where a stage does not fit its device or its host."""
    for index, stage in enumerate(stages):
        at, pair = space.at(point, index), (stage.memory_bytes, stage.host_bytes)
        for nbytes, limit in zip(pair, (space.limit(at), host_limit(space, at)), strict=True):
            assert nbytes <= limit * (1 + EQUAL), f"{nbytes} bytes written out, searched to fit {limit}"


def bounded(plan: Plan, bound: float) -> Plan:
    """The plan with a lower bound on its step in seconds: gap = 1 - bound / step."""
    bound = min(bound, plan.step_seconds)
    status = "optimal" if bound >= plan.step_seconds * (1 - 1e-6) else "feasible"
    return replace(plan, bound_seconds=bound, gap=1.0 - bound / plan.step_seconds, status=status)


def _kernels(layered: LayeredGraph, micro_batch: int) -> tuple[KernelUse, ...]:
    """The calls of fused kernels in a micro-batch, by the bytes of whole tensors."""
    times, samples = Counter(layered.sequence), micro_batch / layered.traced.micro_batch
    uses: dict[str, KernelUse] = {}
    for index, segment in enumerate(layered.segments):
        for node in (node for node in segment.nodes if info(node).unfused):
            record = info(node)
            use = uses.get(record.name, KernelUse(record.name.partition(".")[2], 0, 0.0, 0.0))
            calls = times[index] * record.times
            scale = calls * (samples if _grows(node) else 1.0)
            fused, unfused = use.bytes + scale * record.fused, use.unfused + scale * record.unfused
            uses[record.name] = KernelUse(use.name, use.calls + calls, fused, unfused)
    return tuple(uses[name] for name in sorted(uses))


def _step(layered: LayeredGraph, training: Training, point: SearchPoint) -> Iterator[KernelUse]:
    """The kernel of the optimizer's step, if there is one, by the bytes of whole parameters."""
    if not training.kernel:
        return
    trained = {
        layered.parameter_at(position, node): info(node).bytes
        for position, segment in enumerate(layered.sequence)
        for node in used_parameters(layered.segments[segment])
        if info(node).grad
    }
    once = replace(training, zero=0)
    fused, unfused = (
        sum(way.step_bytes(nbytes, True) for nbytes in trained.values()) for way in (once, replace(once, kernel=""))
    )
    yield KernelUse(training.kernel, point.pp * point.tp, fused, unfused, step=True)


def _grows(node: fx.Node) -> bool:
    """Whether an operator's work grows with the samples."""
    return any(info(n).batch is not None for n in (node, *node.all_input_nodes))


def _forward_flops(space: SearchSpace, micro_batches: int) -> float:
    """FLOPs of a step's forwards: of operators with a batch dim for every sample, of others for every micro-batch."""
    layered = space.layered
    times = Counter(layered.sequence)
    samples = space.request.global_batch / layered.traced.micro_batch
    return sum(
        info(node).model_flops * times[index] * (samples if _grows(node) else micro_batches)
        for index, segment in enumerate(layered.segments)
        for node in segment.nodes
    )


def _splits(space: SearchSpace, found: SearchResult, chosen: Sequence[int]) -> Splits:
    """Axis -> key of a node -> strategy, for the axes with more than one rank."""
    table = space.model(found.point).table
    return {
        axis: {
            n.key: n.options[option][place]
            for n, option in zip(table.nodes, chosen, strict=True)
            if n.kind != "end" and not n.key.endswith("/update")
        }
        for place, axis in enumerate(table.axes)
        if getattr(found.point, axis) > 1
    }


def assignment_of(
    space: SearchSpace, found: SearchResult, splits: Splits, starts: tuple[int, ...]
) -> ShardingAssignment:
    """The assignment with which `partition` cuts a stage out of the graph: the same splits on both sides of each
    cut."""
    point = found.point
    axes = tuple((axis, getattr(point, axis)) for axis in ("dp", "tp") if axis in splits)
    scale = point.micro_batch / space.layered.traced.micro_batch
    return ShardingAssignment(axes, (splits,) * len(starts), starts, scale, frozenset({"dp"}))


Known = dict[tuple[int, frozenset[int], int], tuple[ShardingAssignment, StageGraph, dict[int, PricedSegment]]]
"""(index of the splits, segments, `SearchPoint.kind`) -> the partitioned stage, and the prices of its segments."""


def key_of(layered: LayeredGraph, splits: int, span: tuple[int, int], kind: int) -> tuple[int, frozenset[int], int]:
    """The key of a stage in `Known`."""
    return splits, frozenset(layered.sequence[slice(*span)]), kind


def write_stage(
    space: SearchSpace,
    found: SearchResult,
    splits: Splits,
    at: int,
    index: int,
    span: tuple[int, int],
    modes: Sequence[str],
    known: Known,
) -> PlanStage:
    """One stage, partitioned and priced. Equal segments are priced once and counted."""
    layered, point = space.layered, space.at(found.point, index)
    found = replace(found, point=point)
    segments, key = layered.sequence[slice(*span)], key_of(layered, at, span, point.kind)
    if key not in known:
        choices, graph = partitioned(space, found, splits, span)
        groups = {axis: space.priced(point).terms.sizes[axis] for axis, _ in choices.axes}
        prices = price_stage(layered, graph, Prices(space.device(point), groups))
        known[key] = choices, graph, dict(zip(graph.indices, prices, strict=True))
    choices, graph, priced = known[key]
    at_each = [
        _at(layered, priced[segment], position) if segment in priced else None
        for position, segment in zip(range(*span), segments, strict=True)
    ]
    counted = [(segment, mode) for segment, mode in zip(at_each, modes, strict=True) if segment]
    counted += [(priced[PRELUDE_SEGMENT], "none")] if PRELUDE_SEGMENT in priced else []
    computing = [(segment.forward, segment.backward) if segment else (0.0, 0.0) for segment in at_each]
    memory = stage_memory(space, found, choices, graph, span, modes, index)
    return PlanStage(
        first_position=span[0],
        splits=at,
        recompute=tuple(modes),
        forward_seconds=sum(segment.forward for segment, _ in counted),
        backward_seconds=sum(segment.backward + segment.recompute_seconds[mode] for segment, mode in counted),
        sync_seconds=_sync(space, found, choices, span, computing),
        send_seconds=messages(space, found, span, index)[0],
        memory=memory.by_kind(),
        backward_memory=memory.backward_by_kind(),
        host_bytes=round(on_host(memory.reads, memory.training)),
        traffic=tuple(traffic_of(space, found, choices, counted, index, span)),
        segments=tuple(_printed(layered, priced, span, modes)),
        sends=tuple(sends_of(space, found, index, span)),
    )


def _at(layered: LayeredGraph, segment: PricedSegment, position: int) -> PricedSegment:
    """The segment at a position. Where it stands for several blocks, the readers of the last are traced: the other
    blocks reshard nothing for these, unless several segments read the block before too."""
    if segment.inner is None:
        return segment
    earlier = [layered.earlier(position, node) for node, _ in segment.handed_on]
    return segment if any(len(layered.readers_of(node)) > 1 for node in earlier) else segment.inner


def partitioned(
    space: SearchSpace, found: SearchResult, splits: Splits, span: tuple[int, int]
) -> tuple[ShardingAssignment, StageGraph]:
    """The assignment and the graph of one rank of a stage, in which equal segments are one. Where the stage begins
    within a period, segments of the graph may stand for none of its blocks: they count for nothing."""
    layered = space.layered
    segments = layered.sequence[slice(*span)]
    pieces = sorted({0, min(segments), max(segments) + 1} - {len(layered.segments)})
    choices = assignment_of(space, found, splits, tuple(pieces))
    (graph,) = partition(layered, choices, [pieces.index(min(segments))])
    return choices, without_idle_prelude(graph, frozenset(segments))


def _sync(
    space: SearchSpace,
    found: SearchResult,
    choices: ShardingAssignment,
    span: tuple[int, int],
    computing: Sequence[tuple[float, float]],
) -> float:
    """Seconds of a step for gradient sync, gathers of parameters and optimizer, without what computing hides.
    `computing`, [positions], are seconds of a forward and of a backward of a micro-batch. The messages of a parameter
    that one position reads may be hidden; those of a parameter that several read are not."""
    training, device = space.training(found.point), space.device(found.point)
    sizes = space.priced(found.point).terms.sizes
    reads = parameters(space.layered, choices, span)
    seconds = sum(update_seconds(p.bytes, p.record.grad, p.over_dp, training, device) for p in distinct(reads))
    seconds += sum(training.partial_sync_seconds(p.bytes, p.over_dp, sizes["tp"]) for p in distinct(reads) if p.over_tp)
    messages = messages_of(space.layered, training, reads, found.point.tp)
    share = device.overlapped_share
    scatter, crossing, gather = ([share * hidden for hidden in each] for each in messages[1:])
    last = [s + c for s, c in zip(scatter, crossing, strict=True)]
    forward, backward = zip(*computing, strict=True)
    late = seconds + messages.total
    for times, sent in ((training.backwards - 1, scatter), (1, last)):
        exposed = exposed_by_clock(sent, backward, forward, gather)
        late += times * (exposed - sum(sent) - 2 * sum(gather))
    return float(late)


def _printed(
    layered: LayeredGraph, priced: Mapping[int, PricedSegment], span: tuple[int, int], modes: Sequence[str]
) -> Iterator[PlanSegment]:
    """The segments of a stage in the printed plan; equal neighbours are one."""
    if PRELUDE_SEGMENT in priced:
        segment = priced[PRELUDE_SEGMENT]
        yield PlanSegment((PRELUDE,), segment.forward + segment.backward, segment.lines)
    rows = [
        (layered.labels[p], _at(layered, priced[layered.sequence[p]], p), mode)
        for p, mode in zip(range(*span), modes, strict=True)
        if layered.sequence[p] in priced
    ]

    def shape(row: tuple[str, PricedSegment, str]) -> tuple[object, ...]:
        label, segment, mode = row
        name = label.rpartition(".")[0] if is_block(label) else label
        return name, len(segment.lines), segment.forward, segment.backward, mode

    for _, group in groupby(rows, key=shape):
        members = list(group)
        _, segment, mode = members[0]
        yield PlanSegment(
            tuple(label for label, _, _ in members),
            segment.forward + segment.backward + segment.recompute_seconds[mode],
            segment.lines,
        )


def _notes(space: SearchSpace, found: SearchResult) -> Iterator[str]:
    layered, m = space.layered, space.micro_batches(found.point)
    if found.refined:
        left = "; a limit left others that might be faster: exact=True looks further" if found.stopped else ""
        yield f"memory binds: the splits of {found.refined} intervals of positions were refined under their bytes{left}"
    if layered.traced_in_full:
        yield f"every block was traced: {layered.traced_in_full}"
    if m > 1 and not layered.traced.mean_of_samples:
        yield (
            f"the loss mixes samples ({layered.traced.mixed_at}): it is the mean of {m} micro-batches' losses, as in "
            "gradient accumulation, not that of the batch"
        )
    if m > 1 and (changed := layered.traced.updated):
        yield f"the forward pass changes {changed[0]} once in every micro-batch, {m} times a step"
    if found.point.tp > 1:
        table = space.model(found.point).table
        tp = table.axes.index("tp")
        counts = Counter(table.segment_classes)
        work = {i: n.times * n.flops * max(1, counts[n.segment_class]) for i, n in enumerate(table.nodes) if n.product}
        whole = [i for i in work if not table.nodes[i].options[found.chosen[0][i]][tp].shards_work]
        share = sum(work[i] for i in whole) / (sum(work.values()) or 1.0)
        if share > 1e-3:
            names = ", ".join(dict.fromkeys(table.nodes[i].key.partition("/")[0] or table.nodes[i].key for i in whole))
            yield f"tp splits {1 - share:.1%} of the FLOPs of products; whole on every rank: {names}"
