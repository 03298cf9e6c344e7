"""A plan -> the program of every stage: source text, instructions, messages."""

from collections.abc import Iterable

from autopart.ir.graph import info
from autopart.ir.layered_graph import LayeredGraph
from autopart.passes.checkpoint_cut import SAVING, stage_cut
from autopart.passes.codegen.module import EmitSettings
from autopart.passes.emit import emit
from autopart.passes.partition import partition
from autopart.passes.stage_graph import StageGraph
from autopart.plan.data import Plan
from autopart.plan.schedules.program import instructions
from autopart.plan.schedules.verify import verify as verify_schedule
from autopart.planner.validate import choices_of
from autopart.runtime.emitted import Message, Program


def programs(layered: LayeredGraph, plan: Plan, indices: Iterable[int] | None = None) -> list[Program]:
    """The programs of the stages with these indices (default: all)."""
    stages = stage_graphs(layered, plan)
    messages = [Message(c.name, c.producer, c.consumers, c.shape, c.dtype, c.grad) for s in stages for c in s.sent]
    edges = sorted({(m.producer, to) for m in messages for to in m.consumers})
    lists = instructions(plan.schedule, plan.pp, plan.micro_batches, edges)
    verify_schedule(lists)
    tied, axes = _tied(stages), _sample_axes(layered, plan)
    wanted = range(plan.pp) if indices is None else indices
    return [Program(emit_stage(stages[i], plan, layered), i, lists[i], messages, tied, axes) for i in wanted]


def emit_stage(stage: StageGraph, plan: Plan, layered: LayeredGraph) -> str:
    """The source text of one stage of a plan."""
    master = None if plan.offload == "optimizer" else plan.master  # the host has the slices in it
    settings = EmitSettings(plan.model, plan.degrees, plan.pp, plan.zero >= 3, master, layered.traced.classes)
    recompute = plan.stages[stage.index].recompute
    modes = ["none"] * (len(stage.segments) - len(recompute)) + list(recompute)
    cuts = {i: stage_cut(layered, stage, i, mode) for i, mode in enumerate(modes) if mode in SAVING}
    return emit(stage, modes, cuts, settings)


def stage_graphs(layered: LayeredGraph, plan: Plan) -> list[StageGraph]:
    """Every stage's graph under a plan."""
    return partition(layered, choices_of(plan))


def _tied(stages: list[StageGraph]) -> dict[str, tuple[int, ...]]:
    """Parameters that live on several stages -> those stages."""
    where: dict[str, list[int]] = {}
    for stage in stages:
        for node in stage.graph.nodes:
            if node.op == "placeholder" and info(node).kind == "parameter":
                where.setdefault(info(node).name, []).append(stage.index)
    return {name: tuple(at) for name, at in where.items() if len(at) > 1}


def _sample_axes(layered: LayeredGraph, plan: Plan) -> tuple[str, ...]:
    """The axes over which a batch's samples are split."""
    inputs = [n for n in layered.representatives() if info(n).kind == "input"]
    return tuple(
        axis
        for axis, size in (("dp", plan.dp), ("tp", plan.tp))
        if size > 1 and inputs and plan.splits[0][axis][layered.keys[inputs[0]]].outputs[0].kind == "S"
    )
