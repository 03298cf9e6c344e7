"""One step of a plan with all ranks as threads of one process."""

from dataclasses import dataclass
from typing import Unpack

import torch
from torch import nn

from autopart.compile.api import check_plan
from autopart.compile.given_weights import check_has_weights
from autopart.compile.programs import programs
from autopart.frontend.batch import Batch
from autopart.frontend.with_loss import Loss, with_loss
from autopart.hardware.mesh import AnyMesh, Mesh
from autopart.passes.source import Source
from autopart.plan.data import Plan
from autopart.planner.make_plan import make_plan, request_of
from autopart.planner.request import Settings
from autopart.planner.validate import validate
from autopart.runtime.compiled import Compiled
from autopart.runtime.groups import Groups
from autopart.runtime.simulated import run_simulated


@dataclass(frozen=True)
class Simulated:
    """One step of a plan on simulated ranks.

    plan       the plan
    loss       of the whole batch
    gradients  parameter -> its whole gradient
    state      the state dict after the step: weights unchanged, buffers as the forward pass left them
    """

    plan: Plan
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]


def simulate(
    model: nn.Module,
    mesh: AnyMesh,
    batch: Batch,
    *,
    loss: Loss | None = None,
    plan: Plan | None = None,
    seed: int | None = None,
    **settings: Unpack[Settings],
) -> Simulated:
    """One step with every rank a thread of this process, on the CPU: what `compile` would run on the devices.

    Arguments and errors as `compile`.
    """
    mesh = Mesh.of(mesh)
    check_plan(plan, mesh)
    model = with_loss(model, loss)
    request = request_of(model, batch, **settings)
    source = Source.of(model, batch, plan or request)
    return simulate_plan(source, plan or make_plan(source, mesh, request, to_run=True), seed)


def simulate_plan(source: Source, plan: Plan, seed: int | None = None) -> Simulated:
    """`simulate` of a plan for a model that is traced already."""
    layered = source.full(plan.micro_batch, plan.mesh)
    validate(plan, layered)
    check_has_weights(source.model)
    stages = programs(layered, plan)

    def one(groups: Groups) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        groups.rng.seed = torch.initial_seed() if seed is None else seed
        stage = stages[groups.pp.rank]
        traced = layered.traced
        compiled = Compiled(source.model, plan, groups, stage, traced.aliases, traced.buffers, source.batch)
        loss = compiled.step(source.batch)
        return loss, compiled.full_gradients(), compiled.full_state_dict()

    results = run_simulated(plan.pp, plan.dp, plan.tp, one, plan.shard_size)
    return Simulated(plan, *results[0])
