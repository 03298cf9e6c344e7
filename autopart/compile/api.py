"""`plan`, `estimate` and `compile`: the line from a model to a plan, and on to the program of one rank."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import nn

from autopart.compile.given_weights import GivenWeights, check_has_weights, given_weights, used_parameters
from autopart.compile.programs import programs
from autopart.compile.variants import variant
from autopart.compile.warn import warn
from autopart.errors import PartitionError
from autopart.frontend.batch import Batch, outline
from autopart.frontend.with_loss import Loss, with_loss
from autopart.hardware.mesh import AnyMesh, Mesh
from autopart.passes.source import Source
from autopart.plan.data import Plan
from autopart.plan.estimate import Estimate
from autopart.planner.make_plan import make_plan, request_of
from autopart.planner.progress import OnProgress, silent
from autopart.planner.request import Settings
from autopart.planner.validate import validate
from autopart.runtime.compiled import Compiled
from autopart.runtime.groups import make_groups, start_processes
from autopart.runtime.parameters import tensors_of
from autopart.runtime.torch_compile import TorchCompile
from autopart.runtime.torch_compile import check as check_compile
from autopart.runtime.watchdog import check_timeout, start_watchdog


def plan(
    model: nn.Module,
    mesh: AnyMesh,
    batch: Batch,
    *,
    loss: Loss | None = None,
    on_progress: OnProgress = silent,
    **settings: Unpack[Settings],
) -> Plan:
    """Find the fastest plan to train `model` on `mesh` that fits the memory of the devices.

    Planning needs no devices and no memory for weights: the model may be on meta.

    model        any nn.Module whose forward takes `batch` and returns a loss (alone, as `.loss`, or first)
    mesh         "hosts x devices:device", as "4x8:h100-80gb"; a Mesh; or a DeviceMesh, whose axes pp, dp, tp are kept
    batch        the model's keyword arguments, samples in dim 0 of every tensor
    loss         of the model's outputs and the batch, for a model that returns none: a function that returns a scalar,
                 the mean over samples. Keys of the batch that forward has no name for are for the loss alone
    on_progress  called with a line of text: the best plan's seconds, the lower bound, the gap
    settings     degrees, batch sizes, precision, constraints and all else that may be fixed: `autopart.Settings`

    Raises PartitionError for a model that cannot be traced, a batch that does not divide, a mesh that is too small.
    """
    model = with_loss(model, loss)
    request = request_of(model, batch, **settings)
    return make_plan(Source.of(model, batch, request), Mesh.of(mesh), request, on_progress)


def estimate(
    model: nn.Module,
    mesh: AnyMesh,
    batch: Batch,
    *,
    loss: Loss | None = None,
    **settings: Unpack[Settings],
) -> Estimate:
    """The seconds and bytes of the configuration in `settings`, whether it fits or not. Arguments as in `plan`."""
    model = with_loss(model, loss)
    request = request_of(model, batch, **settings)
    source = Source.of(model, batch, request)
    return Estimate.of(make_plan(source, Mesh.of(mesh), replace(request, must_fit=False)))


def compile(
    model: nn.Module,
    mesh: AnyMesh,
    batch: Batch,
    *,
    loss: Loss | None = None,
    plan: Plan | None = None,
    weights: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    check_batches: bool = True,
    hang_timeout: float | None = None,
    compile: TorchCompile = False,
    on_progress: OnProgress = silent,
    **settings: Unpack[Settings],
) -> Compiled:
    """Plan (unless a `plan` is given), emit this rank's module and load the model's weights into it.

    loss           of the model's outputs and the batch, for a model that returns none (see `plan`)
    plan           a plan for as many ranks as the mesh has
    weights        a folder of safetensors as Hugging Face lays it out, of which every rank reads its own shares; or
                   "init", the model's own initialisation, by `seed` and by the names of modules. Either way `model` may
                   be on meta. Default: the model's weights
    seed           of dropout and other random numbers (default: torch's seed on rank 0). Random numbers depend on the
                   seed, the step and the element's place in the whole batch, not on the plan
    check_batches  whether the first 10 steps, then every 100th, compare checksums of the rows that ranks were given
    hang_timeout   seconds in which no rank makes progress, after which all ranks are ended and the one that others wait
                   for is named (default: none); longer than any instruction, checkpoint and compilation
    compile        True or arguments of torch.compile (backend, mode, options, dynamic): it compiles the emitted blocks.
                   The plan's seconds and bytes are those without
    settings       as `autopart.plan`

    Without `weights`, weights and buffers are those of rank 0's model on every rank: what differs on another rank is
    broadcast. `model` is not changed, neither now nor by steps, and its weights are not read again:
    `compiled.load_state_dict` loads others, `compiled.sync_to(model)` brings the trained ones into it.

    Warnings on rank 0 show the plan's notes, and name scalars with gradients that are returned and no part of the loss.
    Every process calls it; rank 0 plans for all. Raises PartitionError as `autopart.plan` does, where the number of
    processes is not that of the mesh, where the plan is for another model, where the model does what training on
    several ranks cannot reproduce, where `weights` do not fit the model, and where a tensor has no value.
    """
    check_compile(compile)
    check_timeout(hang_timeout)
    mesh = Mesh.of(mesh)
    check_plan(plan, mesh)
    model = with_loss(model, loss)
    start_processes(mesh.size)
    request = request_of(model, batch, **settings)
    given = None if weights is None else given_weights(model, weights, torch.initial_seed() if seed is None else seed)
    if given is None:
        check_has_weights(model)
    source = Source.of(given.model if given else model, batch, plan or request)
    if plan is None and request.micro_batch and dist.is_initialized() and dist.get_rank():
        with suppress(PartitionError):  # which rank 0 raises for all
            source.full(request.micro_batch, mesh)
    plan, seed = _agreed(plan, seed, lambda: make_plan(source, mesh, request, on_progress, to_run=True))
    compiled = _loaded(source, model, plan, seed, given, hang_timeout, compile)
    compiled.check_batches = check_batches
    if compiled.rank == 0:
        warn(plan, source.full(plan.micro_batch, plan.mesh).traced, model)
    return compiled


def _loaded(
    source: Source,
    model: nn.Module,
    plan: Plan,
    seed: int,
    given: GivenWeights | None,
    hang_timeout: float | None,
    compile: TorchCompile,
) -> Compiled:
    """This rank's program with its shares of the weights, watched where other processes are."""
    layered = source.full(plan.micro_batch, plan.mesh)
    validate(plan, layered)
    groups = make_groups(plan.pp, plan.dp, plan.tp, plan.shard_size)
    groups.rng.seed = seed
    (program,) = programs(layered, plan, [groups.pp.rank])
    ranks = groups.size_over(program.sample_axes)
    again = replace(source, batch=outline(source.batch, 1), prepared={}, planned={})

    def same_trace() -> bool:
        now = replace(again, model=given.like(model), prepared={}) if given else replace(again, prepared={})
        with suppress(PartitionError):
            return now.full(plan.micro_batch, plan.mesh).hash == layered.hash
        return False

    buffers = layered.traced.buffers
    find = given.loading(buffers, seed) if given else None
    compiled = Compiled(
        model, plan, groups, program, layered.traced.aliases, buffers, source.batch, same_trace,
        partial(variant, again, plan, layered, ranks, groups.pp.rank, lambda make: _agreed(None, None, make)[0]),
        find, compile,
    )  # fmt: skip
    compiled.returned = layered.traced.returned
    if "MASTER_ADDR" in os.environ:
        start_watchdog(compiled.executor.activity, hang_timeout=hang_timeout)
    used = used_parameters(layered.traced)
    compiled.emitted = {*used, *buffers}
    if given is None:
        compiled.load_rank_zero(tensors_of(model, buffers))
    else:
        compiled.load_rank_zero({name: value for name, value in buffers.items() if value is not None})
        compiled.unused_tensors = given.unused(used) if compiled.rank == 0 else {}
    return compiled


def check_plan(plan: Any, mesh: Mesh) -> None:
    """Raise PartitionError for a `plan` that is not a Plan, or is for another number of ranks."""
    if plan is not None and not isinstance(plan, Plan):
        raise PartitionError(f"plan={plan!r} is no Plan", try_='autopart.Plan.load("plan.json")')
    if plan is not None and plan.mesh.size != mesh.size:
        raise PartitionError(f"the plan is for {plan.mesh.size} ranks, the mesh has {mesh.size}")


def _agreed(given: Plan | None, seed: int | None, make: Callable[[], Plan]) -> tuple[Plan, int]:
    """Rank 0's plan and seed, on every rank. Every rank raises the error that rank 0 raises."""
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
