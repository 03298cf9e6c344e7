"""Whether a plan, which may have been edited by hand, can run on a model. Cuts and strategies are compared with the
model's graph and with the rules, not with the search's tables."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from torch import fx

from autopart.cost.liveness import MODES
from autopart.errors import PartitionError, few
from autopart.ir.graph import has_gradient, info, is_pick, operands, shape_args, value_of
from autopart.ir.labels import is_block
from autopart.ir.layered_graph import LayeredGraph
from autopart.passes.stage_graph import ShardingAssignment
from autopart.plan.data import Plan
from autopart.planner.cuts import spans_of
from autopart.sharding.notation import C, G, Placement, Strategy, splits
from autopart.sharding.resharding import possible
from autopart.sharding.rules import strategies


def validate(plan: Plan, layered: LayeredGraph) -> None:
    """Raise PartitionError unless a plan is for this model, traced with the plan's micro-batch, and can run on it."""
    plan.check(layered)
    for check in (stage_findings, strategy_findings):
        if wrong := list(check(plan, layered)):
            raise PartitionError(
                "the plan cannot run", few(wrong, joint="; "), "the plan as it was saved, or autopart.plan(...) again"
            )


def stage_findings(plan: Plan, layered: LayeredGraph) -> Iterator[str]:
    """What is wrong with the starts of stages, and with their checkpointing."""
    starts, updated, modes = plan.starts, layered.traced.updated, ", ".join(MODES)
    spans = spans_of(starts, len(layered.labels))
    if len(starts) != plan.pp or starts[:1] != (0,) or any(start >= end for start, end in spans):
        yield (
            f"{plan.pp} stages start at positions {', '.join(map(str, starts))}: "
            f"the first starts at 0, each behind the one before it, none behind position {len(layered.labels) - 1}"
        )
        return
    for index, (stage, (start, end)) in enumerate(zip(plan.stages, spans, strict=True)):
        if not 0 <= stage.splits < len(plan.splits):
            yield f"stage {index} is split as {stage.splits}, there are {len(plan.splits)} splits"
        if len(stage.recompute) != end - start:
            yield f"stage {index} has {end - start} positions and {len(stage.recompute)} modes of recompute"
        for label, mode in zip(layered.labels[start:end], stage.recompute, strict=False):
            why = {
                f"it is none of {modes}": mode not in MODES,
                "numbered blocks alone are recomputed": mode != "none" and not is_block(label),
                f"the forward pass changes {few(updated)}": mode != "none" and bool(updated),
            }
            yield from (f"{label or 'the loss'} cannot recompute {mode!r}: {w}" for w, wrong in why.items() if wrong)


def choices_of(plan: Plan) -> ShardingAssignment:
    """The plan's splits and cuts, as `partition` takes them."""
    axes = tuple((axis, size) for axis, size in (("dp", plan.dp), ("tp", plan.tp)) if size > 1)
    return ShardingAssignment(axes, tuple(plan.splits[s.splits] for s in plan.stages), plan.starts)


def strategy_findings(plan: Plan, layered: LayeredGraph) -> Iterator[str]:
    """What is wrong with strategies: none of the operator's, or not fit for each other."""
    choices, nodes, known = choices_of(plan), layered.representatives(), True
    for number, chosen in enumerate(plan.splits):
        if set(chosen) != {axis for axis, _ in choices.axes}:
            yield f"splits: those of number {number} are along {sorted(chosen)}"
            return
        for axis, size in choices.axes:
            if set(chosen[axis]) != {layered.keys[n] for n in nodes}:
                yield f"splits: those along {axis} are not of the model's operators"
                return
            for node in nodes:
                strategy = chosen[axis][layered.keys[node]]
                if strategy not in _known(node, strategy, size):
                    known = False
                    yield f"strategy: {layered.keys[node]} has no {strategy.name!r} along {axis}"
            inputs = {chosen[axis][layered.keys[n]] for n in nodes if info(n).kind == "input"}
            if len(inputs) > 1:
                yield f"inputs: they are placed differently along {axis}"
    if known:
        yield from dict.fromkeys([*_clashes(choices, layered), *_uses(choices, layered, plan)])


def _known(node: fx.Node, strategy: Strategy, size: int) -> list[Strategy]:
    """The strategies of a node along one axis, split into as many parts as the chosen one."""
    record = info(node)
    if record.kind == "op" and G in strategy.inputs:
        plain = _kept_whole(strategy)
        fits = G not in strategy.outputs or (record.view and strategy.inputs == strategy.outputs)
        return [strategy] if fits and plain in _known(node, plain, size) else []
    if record.kind == "op":
        hints = [p for p in strategy.outputs[:1] if p.parts or p.kind == "M"]
        options = strategies(record.name, shape_args(node), record.shapes, size, hints)
        return [o for o in options if has_gradient(record.dtype) or o.name != "P"]
    placed = strategy.outputs[0] if len(strategy.outputs) == 1 else Placement("P")
    if placed.kind == "S":
        fits = 0 <= placed.dim < len(record.shape) and splits(placed, record.shape, size)
        return [Strategy(f"d{placed.dim}", (), (placed,))] if fits else []
    kinds = "RC" if record.kind == "parameter" else "R"
    return [Strategy(kind, (), (Placement(kind),)) for kind in kinds]


def _kept_whole(strategy: Strategy) -> Strategy:
    """The strategy with placement C in place of G: it saves the whole operand instead of gathering it again."""
    inputs, outputs = (tuple(C if p == G else p for p in placed) for placed in (strategy.inputs, strategy.outputs))
    name = "C" if strategy.name == "G" else strategy.split
    return replace(strategy, name=name, inputs=inputs, outputs=outputs)  # type: ignore[arg-type]


def _clashes(choices: ShardingAssignment, layered: LayeredGraph) -> Iterator[str]:
    """Operators of which two axes split one dim."""
    for stage in range(len(choices.starts)):
        for node in layered.representatives():
            along = [(*s.inputs, *s.outputs) for s in choices.of(layered, node, stage)]
            for tensor in zip(*along, strict=True):
                dims = [p.dim for p in tensor if p is not None and p.kind == "S"]
                if len(dims) != len(set(dims)):
                    yield f"strategy: two axes split one dim at {layered.keys[node]}"


def _uses(choices: ShardingAssignment, layered: LayeredGraph, plan: Plan) -> Iterator[str]:
    """Uses whose operand no resharding gives the placement that they take; values that stages place differently."""
    spans, segment_of = spans_of(plan.starts, len(layered.labels)), layered.segment_of()
    stage_of = {segment: stage for stage, span in enumerate(spans) for segment in range(*span)}
    stages: dict[fx.Node, set[int]] = defaultdict(set)
    for node in layered.traced.graph.nodes:
        if node.op != "call_function" or is_pick(node):
            continue
        at = stage_of.get(segment_of.get(node, -1))
        for operand, argument in enumerate(operands(node)):
            if argument is None:
                continue
            source, output = value_of(argument)
            home = stage_of.get(segment_of.get(source, -1))
            for stage in range(plan.pp) if at is None else [at]:
                have = choices.placements(layered, (source, output), stage)
                want = [s.inputs[operand] for s in choices.of(layered, node, stage)]
                if not all(w is None or possible(h, w) for h, w in zip(have, want, strict=True)):
                    yield f"placement: {layered.keys[layered.same[node]]} cannot take operand {operand} as it wants it"
                if home is not None and have != choices.placements(layered, (source, output), home):
                    key = layered.keys[layered.same[source]]
                    yield f"placement: {key} lies differently in stages {home} and {stage}"
                if info(source).kind in ("parameter", "input"):
                    stages[source].add(stage)
    for source, where in stages.items():
        if len({choices.placements(layered, (source, 0), stage) for stage in where}) > 1:
            yield f"placement: {info(source).name} lies differently in stages {sorted(where)}"
