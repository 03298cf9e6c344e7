"""Prices a plan by its decisions alone, which may have been edited by hand, or says what is wrong with them."""

import time
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from autopart.errors import PartitionError, few
from autopart.frontend.batch import Batch
from autopart.frontend.with_loss import Loss, with_loss
from autopart.passes.source import Source
from autopart.passes.stage_graph import Splits
from autopart.plan.data import Plan
from autopart.planner.candidate import SearchResult, costs_of
from autopart.planner.cuts import spans_of
from autopart.planner.request import MIB, Request
from autopart.planner.search_points import SearchPoint
from autopart.planner.search_space import SearchSpace
from autopart.planner.validate import stage_findings
from autopart.planner.write_plan import write_out
from autopart.sharding.strategy_table import StrategyTable

Chosen = tuple[int, ...]
"""Index of the option of every node of a strategy table."""


def price_plan(plan: Plan, model: nn.Module, batch: Batch, *, loss: Loss | None = None) -> Plan:
    """The plan with its seconds and bytes computed from its decisions.

    Decisions are the degrees, the micro-batch, the ZeRO level, the splits, the first positions of the stages and the
    checkpointing modes. The lower bound stays that of the search. `batch` and `loss` are those that the plan was made
    with.

    Raises PartitionError for decisions that are no plan of the model. A plan that does not fit is no error
    (`Plan.fits`).
    """
    return price_traced(plan, Source.of(with_loss(model, loss), batch, plan))


def price_traced(plan: Plan, source: Source) -> Plan:
    """`price_plan` for a source, which may be traced already."""
    started = time.monotonic()
    space, found = decided(plan, source)
    return replace(write_out(space, found, started, plan.model), request=plan.request)


def decided(plan: Plan, source: Source) -> tuple[SearchSpace, SearchResult]:
    """The search space of a plan's settings, and the plan's decisions as a result of a search there.

    Raises PartitionError as `price_plan` does.
    """
    request = Request(
        plan.global_batch,
        plan.micro_batch,
        zero=plan.zero,
        shard_size=plan.shard_size or None,
        prefetch=plan.prefetch_bytes // MIB,
        schedule=plan.schedule,
        precision=plan.precision,
        master=plan.master,
        optimizer=plan.optimizer,
        offload=plan.offload,
        must_fit=False,
    )
    replace(request, pp=plan.pp, dp=plan.dp, tp=plan.tp).check(plan.mesh)
    if plan.micro_batch % plan.dp:
        raise PartitionError(f"{plan.micro_batch} samples do not divide over dp={plan.dp} ranks")
    layered = source.like(plan)
    space = SearchSpace(layered, plan.mesh, request)
    offload = plan.offload == "optimizer"
    degrees = plan.pp, plan.dp, plan.tp
    point = space.placed(SearchPoint(*degrees, plan.micro_batch, plan.zero, offload, plan.shard_size))
    if wrong := list(stage_findings(plan, layered)):
        raise PartitionError("the plan has no price", few(wrong, joint="; "))
    options = [_chosen(space, point, splits) for splits in plan.splits]
    chosen = tuple(options[stage.splits] for stage in plan.stages)
    _check_interface(space, point, chosen)
    modes = tuple(mode for stage in plan.stages for mode in stage.recompute)
    m, times = space.micro_batches(point), []
    for stage, (start, end) in enumerate(spans_of(plan.starts, len(modes))):
        found = costs_of(space, space.at(point, stage), chosen[stage], [(mode,) for mode in modes])
        times.append(float(found.seconds[found.index(start, end)]))
    step = sum(times) + (m - 1) * max(times)
    return space, SearchResult(point, chosen, plan.starts, modes, tuple(times), step, min(plan.bound_seconds, step))


def _chosen(space: SearchSpace, point: SearchPoint, splits: Splits) -> Chosen:
    """The option of every node that has the strategies of `splits`. Raises PartitionError for a node without such."""
    model = space.model(point)
    table = model.table
    axes = [axis for axis in table.axes if getattr(point, axis) > 1]
    if set(splits) != set(axes):
        raise PartitionError(f"the plan splits over {', '.join(splits) or 'nothing'}", f"not over {', '.join(axes)}")
    known = {n.key: i for i, n in enumerate(table.nodes) if n.kind != "end" and not n.key.endswith("/update")}
    allowed = {}
    for axis in axes:
        for key in (*splits[axis].keys() - known.keys(), *known.keys() - splits[axis].keys()):
            there = "the plan has no strategy of it" if key in known else "the model has no such operator or tensor"
            raise PartitionError(f"{key} over {axis}: {there}")
    for key, index in known.items():
        options, wanted = table.nodes[index].options, {axis: splits[axis][key] for axis in axes}
        allowed[index] = [
            i for i, option in enumerate(options)
            if all(option[table.axes.index(axis)] == strategy for axis, strategy in wanted.items())
        ]  # fmt: skip
        if not allowed[index]:
            names = ", ".join(f"{strategy.name}/{axis}" for axis, strategy in wanted.items())
            may = dict.fromkeys(
                ", ".join(f"{option[table.axes.index(axis)].name}/{axis}" for axis in axes) for option in options
            )
            raise PartitionError(f"{key} cannot be {names}", try_="; ".join(may))
    _check_flows(table, allowed)
    solution = model.solver.minimise(space.objective(point, 0.0, {}), allowed)
    if solution is None:
        raise PartitionError("the splits do not go together", "what is tied takes the same strategy")
    return solution.chosen


def _check_flows(table: StrategyTable, allowed: dict[int, list[int]]) -> None:
    """Raise PartitionError where no resharding gives an operator the placement that it takes."""

    def options(node: int) -> Sequence[int]:
        return allowed.get(node, range(len(table.nodes[node].options)))

    for used in table.value_uses:
        source = table.nodes[used.source]
        haves = {source.given(o, used.output) for o in options(used.source)}
        for index, operand in used.uses:
            user = table.nodes[index]
            wants = {user.taken(o, operand) for o in options(index)}
            if not any((have, want) in used.chains for have in haves for want in wants):
                have, want = (", ".join(map(str, next(iter(p)))) for p in (haves, wants))
                raise PartitionError(
                    f"{user.key} cannot take {source.key}", f"it is made as {have}, and {want} is taken"
                )


def _check_interface(space: SearchSpace, point: SearchPoint, chosen: Sequence[Chosen]) -> None:
    """Raise PartitionError where two stages place a value that passes between stages differently."""
    model = space.model(point)
    keys = [model.table.nodes[index].key for index, _ in model.interface_values]
    keys += [model.table.nodes[used.source].key for used, _ in model.interface_sums]
    for key, *placed in zip(keys, *map(model.interface, chosen), strict=True):
        if len(set(placed)) > 1:
            texts = [", ".join(map(str, p)) if p is not None else "no partial sum" for p in placed]
            raise PartitionError(f"the stages place {key} differently", " and ".join(dict.fromkeys(texts)))
