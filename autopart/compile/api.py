"""The straight line from a model to a program: the passes, the plan, the source text, the running ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from autopart.compile.programs import programs
from autopart.errors import PartitionError
from autopart.frontend.batch import DTYPES, Batch
from autopart.hardware.mesh import Mesh
from autopart.passes.source import Source
from autopart.plan.data import Plan
from autopart.plan.estimate import Estimate
from autopart.planner.branch_and_bound import OnProgress, silent
from autopart.planner.make_plan import make_plan, request_of
from autopart.planner.validate import validate
from autopart.runtime.compiled import Compiled
from autopart.runtime.groups import make_groups, start_processes
from autopart.runtime.watchdog import start_watchdog

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def plan(
    model: nn.Module,
    mesh: str | Mesh | DeviceMesh,
    batch: Batch,
    *,
    global_batch: int | None = None,
    micro_batch: int | None = None,
    pp: int | None = None,
    tp: int | None = None,
    dp: int | None = None,
    zero: int | None = None,
    recompute: str | None = None,
    schedule: str | None = None,
    precision: str | torch.dtype | None = None,
    master: str | None = None,
    optimizer: str = "adamw",
    time_limit: float | None = None,
    nodes: int | None = None,
    exact: bool = False,
    constraints: Sequence[str] = (),
    say: OnProgress = silent,
) -> Plan:
    """Find the fastest way to train `model` on `mesh` that fits its memory. Needs no devices and no memory: the model
    may be on meta.

    model         any nn.Module whose forward takes `batch` and returns a loss (alone, as `.loss`, or first)
    mesh          "hosts x devices:device", as "4x8:h100-80gb"; a Mesh; or a DeviceMesh, whose axes pp, dp, tp are kept
    batch         the model's keyword arguments, samples in dim 0 of every tensor
    global_batch  samples of a step (default: those of `batch`);  micro_batch: of a micro-batch, over all ranks
    pp, tp, dp    degrees, where you want to decide them; so for zero (0 to 3), recompute ("none", "selective", "full":
                  in all blocks), schedule ("gpipe", "1f1b") and precision (of the parameters: "float32", "bfloat16",
                  "float64", "float16")
    master        dtype ("float32" with a precision of 16 bits) in which gradients add up and the optimizer keeps its
                  states and a copy of the parameters, from which they are written back; None: all in `precision`
    optimizer     for its memory: "sgd", "momentum", "adam", "adamw", ...
    time_limit    seconds after which the best plan so far is taken;  nodes: points of the search likewise
    exact         whether a small model's splits are refined to the optimum: every range of its blocks is solved by
                  itself under real bytes, which takes minutes; otherwise only where memory binds and the gap is worth
                  it, within a limit
    constraints   what to fix or forbid by hand: "tp=8", "stage 2 starts at layers.10", "no cut before layers.3",
                  "split layers.*.up_proj.weight dim 0 over tp", ... (see autopart/planner/constraints.py); the plan is
                  proven against all that do as they say
    say           is told how far the search is: the best plan's time, the bound, the gap

    Raises PartitionError for a model that cannot be traced, a batch that does not divide, a mesh that is too small.
    """
    request = request_of(
        model,
        batch,
        global_batch=global_batch,
        micro_batch=micro_batch,
        pp=pp,
        tp=tp,
        dp=dp,
        zero=zero,
        recompute=recompute,
        schedule=schedule,
        precision=precision,
        master=master,
        optimizer=optimizer,
        time_limit=time_limit,
        nodes=nodes,
        exact=exact,
        constraints=constraints,
    )
    return make_plan(Source(model, batch, DTYPES[request.precision]), Mesh.of(mesh), request, say)


def estimate(model: nn.Module, mesh: str | Mesh | DeviceMesh, batch: Batch, **settings: Any) -> Estimate:
    """What the configuration in `settings` (see `plan`) would cost, whether it fits or not."""
    request = request_of(model, batch, **settings)
    source = Source(model, batch, DTYPES[request.precision])
    return Estimate.of(make_plan(source, Mesh.of(mesh), replace(request, must_fit=False)))


def compile(
    model: nn.Module,
    mesh: str | Mesh | DeviceMesh,
    batch: Batch,
    *,
    plan: Plan | None = None,
    seed: int | None = None,
    **settings: Any,
) -> Compiled:
    """Plan (unless a `plan` is given), emit this rank's module, load the model's weights into it.

    Dropout and other random numbers depend on `seed` (default: torch's, of rank 0), the step and the place in the whole
    batch, not on the plan.

    To be called by every process; `settings` are those of `autopart.plan`. Rank 0 plans for all. Raises PartitionError
    as `plan` does, and where the processes are not as many as the mesh, the plan is for another model, or the model
    does what training cannot yet reproduce on several ranks.
    """
    mesh = Mesh.of(mesh)
    check_plan(plan, mesh)
    start_processes(mesh.size)
    say = settings.pop("say", silent)
    request = request_of(model, batch, **settings)
    source = Source(model, batch, DTYPES[plan.precision if plan else request.precision])
    if plan is None and request.micro_batch and dist.is_initialized() and dist.get_rank():
        with suppress(PartitionError):  # which rank 0 raises for all
            source.full(request.micro_batch, mesh)
    plan, seed = _agreed(plan, seed, lambda: make_plan(source, mesh, request, say, to_run=True))
    layered = source.full(plan.micro_batch, plan.mesh)
    validate(plan, layered)
    _check_trainable(model)
    groups = make_groups(plan.pp, plan.dp, plan.tp)
    groups.draws.seed = seed
    (program,) = programs(layered, plan, [groups.pp.rank])
    compiled = Compiled(model, plan, groups, program, layered.traced.aliases, layered.traced.buffers)
    if "MASTER_ADDR" in os.environ:
        start_watchdog(lambda: compiled.executor.doing)
    return compiled


def check_plan(plan: Any, mesh: Mesh) -> None:
    """Raise PartitionError for a plan that is none, or is for other ranks."""
    if plan is not None and not isinstance(plan, Plan):
        raise PartitionError(f"plan={plan!r} is no Plan", try_='autopart.Plan.load("plan.json")')
    if plan is not None and plan.mesh.size != mesh.size:
        raise PartitionError(f"the plan is for {plan.mesh.size} ranks, the mesh has {mesh.size}")


def _agreed(given: Plan | None, seed: int | None, make: Callable[[], Plan]) -> tuple[Plan, int]:
    """Rank 0's plan and seed, on every rank; its error too."""
    seed = torch.initial_seed() if seed is None else seed
    if not dist.is_initialized():
        return given or make(), seed
    box: list[Any] = [None, seed]
    if dist.get_rank() == 0:
        try:
            box[0] = (given or make()).to_json()
        except PartitionError as error:
            box[0] = (error.what, error.why, error.try_)
    dist.broadcast_object_list(box, 0)
    if isinstance(box[0], tuple):
        raise PartitionError(*box[0])
    return Plan.from_json(box[0]), box[1]


def _check_trainable(model: nn.Module) -> None:
    if any(p.is_meta for p in model.parameters()):
        raise PartitionError(
            "the model is on the meta device", "it has shapes but no weights to train", "build it on the CPU"
        )
