"""Programs of one model with other batches, or in evaluation mode, over the shares that a first program has.

The plan's splits are kept where they fit the other graph. Otherwise the planner solves them again with the weights, the
inputs and the stages where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from autopart.compile.programs import programs
from autopart.errors import PartitionError
from autopart.frontend.batch import outline
from autopart.frontend.with_loss import with_outputs
from autopart.ir.graph import info
from autopart.ir.layered_graph import LayeredGraph
from autopart.passes.source import Source
from autopart.plan.data import Plan
from autopart.plan.schedules.ops import Op
from autopart.plan.signature import Signature
from autopart.planner.constraints import Constraint, Positions
from autopart.planner.make_plan import make_plan
from autopart.planner.request import MIB, Request
from autopart.planner.validate import stage_findings, strategy_findings
from autopart.runtime.variants import Mode, Variant
from autopart.sharding.notation import Strategy

FORWARD = (Op.FORWARD, Op.SEND, Op.RECV)
"""Instructions of a pass without gradients."""


@dataclass(frozen=True)
class SharesAsTheyAre(Constraint):
    """Weights, inputs and stages are where a plan has them.

    labels  of the first segments of the stages
    placed  axis -> key of a parameter or an input -> its strategies
    """

    labels: tuple[str, ...]
    placed: Mapping[str, Mapping[str, set[Strategy]]]

    def allows_stage(self, stage: int, start: int, stop: int, stages: int, positions: Positions) -> bool:
        return positions.labels[start] == self.labels[stage]

    def allows_strategy(self, axis: str, key: str, strategy: Strategy) -> bool:
        known = self.placed.get(axis, {}).get(key)
        return known is None or strategy in known

    @staticmethod
    def of(plan: Plan, layered: LayeredGraph) -> SharesAsTheyAre:
        """The constraint of a plan and the graph that it is for."""
        keys = {layered.keys[n] for n in layered.representatives() if info(n).kind in ("parameter", "input")}
        placed = {axis: {key: {splits[axis][key] for splits in plan.splits} for key in keys} for axis in plan.splits[0]}
        labels = tuple(layered.labels[start] for start in plan.starts)
        return SharesAsTheyAre("shares as they are", True, labels, placed)


def variant(
    source: Source,
    plan: Plan,
    layered: LayeredGraph,
    ranks: int,
    stage: int,
    agreed: Callable[[Callable[[], Plan]], Plan],
    batch: Mapping[str, Any],
    rows: int,
    mode: Mode,
) -> Variant:
    """The program of a stage for a batch of `rows` samples like those of `batch`.

    layered  the graph that the plan is for
    ranks    that the samples of a batch are split over
    agreed   makes a plan that is the same on every rank
    mode     what the program returns beside the loss, in evaluation mode; None for the program of a step

    Raises PartitionError where the samples cannot be split over ranks and micro-batches, and where the model computes
    what the shares as they are do not allow.
    """
    mixes = not layered.traced.mean_of_samples
    micro_batch = _micro_batch(plan, rows, ranks, mixes and mode is None)
    model = with_outputs(source.model) if mode else source.model
    other = replace(source, model=model, batch=outline(batch, micro_batch), prepared={}, planned={}, outputs=mode or ())
    known = mode is None and micro_batch == plan.micro_batch and _row_shapes(batch) == _row_shapes(source.batch)
    with _mode(source.model, mode):
        graph = layered if known else other.full(micro_batch, plan.mesh)
        sized = replace(plan, global_batch=rows, micro_batch=micro_batch, signature=Signature.of(graph))
        made = _same_splits(sized, graph) or agreed(lambda: _solved_again(other, sized, layered))
    (program,) = programs(graph, made, [stage])
    if mode is not None:
        program = replace(program, instructions=[at for at in program.instructions if at.op in FORWARD])
    return Variant(made, program, graph.traced.buffers)


def _row_shapes(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The shape of a sample of every tensor of a batch."""
    return {name: value.shape[1:] for name, value in batch.items() if isinstance(value, Tensor)}


def _micro_batch(plan: Plan, rows: int, ranks: int, mixes: bool) -> int:
    """The samples of a micro-batch: as many as the plan's at most, or all where the loss mixes samples."""
    if not rows:
        raise PartitionError("a batch of 0 samples has no loss", try_="drop_last=True in the DataLoader, or skip it")
    if rows % ranks:
        raise PartitionError(
            f"a batch of {rows} samples does not divide",
            f"{ranks} ranks have equal shares of every micro-batch",
            f"{rows - rows % ranks} or {rows + -rows % ranks} samples; drop_last=True in the DataLoader drops the rest",
        )
    if mixes and plan.micro_batches == 1:
        return rows
    return next(m for m in range(min(plan.micro_batch, rows), 0, -1) if rows % m == 0 and m % ranks == 0)


def _same_splits(plan: Plan, layered: LayeredGraph) -> Plan | None:
    """The plan, where its splits fit another graph of the same operators."""
    with suppress(KeyError):
        if not any(stage_findings(plan, layered)) and not any(strategy_findings(plan, layered)):
            return plan
    return None


def _solved_again(source: Source, plan: Plan, layered: LayeredGraph) -> Plan:
    """A plan with other splits for the same shares."""
    request = Request(
        plan.global_batch, plan.micro_batch, plan.pp, plan.tp, plan.dp, plan.zero,
        plan.prefetch_bytes // MIB, None, plan.schedule, plan.precision, plan.master, plan.optimizer, nodes=20,
        must_fit=False, offload=plan.offload,
        shard_size=(plan.shard_size or plan.dp) if plan.zero and plan.dp > 1 else None,
        constraints=(SharesAsTheyAre.of(plan, layered),),
    )  # fmt: skip
    try:
        return make_plan(source, plan.mesh, request, to_run=True, advise=False)
    except PartitionError as error:
        raise PartitionError(
            "this batch, or this mode, cannot be run with the shares of the weights as they are",
            f"{error.what} ({error.why})" if error.why else error.what,
            "sizes like those of the batch at compile, or autopart.compile again",
        ) from error


@contextmanager
def _mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """A model as it is, or in evaluation mode for now."""
    modes = [(module, module.training) for module in model.modules()]
    if mode is not None:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
