"""The code of plans."""

from torch import nn

from autopart.compile.programs import emit_stage, stage_graphs
from autopart.frontend.batch import Batch
from autopart.passes.source import Source
from autopart.plan.data import Plan
from autopart.planner.validate import validate


def sources(model: nn.Module, batch: Batch, plan: Plan) -> list[str]:
    """The source text of every stage."""
    layered = Source.of(model, batch, plan).full(plan.micro_batch, plan.mesh)
    validate(plan, layered)
    return [emit_stage(stage, plan, layered) for stage in stage_graphs(layered, plan)]
