"""The ranks of tests/runtime/test_exact.py: they train models, each under every configuration of its table; rank 0
compares."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import sys
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from models import Batch, build
from ranks import run_forked
from torch import nn

import autopart
from autopart.compile.check import worst_error
from autopart.frontend.batch import DTYPES
from autopart.hardware.mesh import Mesh
from autopart.passes.source import Source
from autopart.planner.make_plan import make_plan, request_of

STEPS = 2
AHEAD = 2**26
"""Bytes of weights that are gathered ahead at ZeRO 3, where a plan is changed."""
Tensors = dict[str, torch.Tensor]

Table = list[tuple[str, dict[str, Any]]]

SOURCES: dict[tuple[int, torch.dtype], Source] = {}
"""Of every model, the traces for all its micro-batch sizes."""
PLANS: dict[tuple[int, str], autopart.Plan] = {}
"""By model and what was asked for."""
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, float]]] = {
    "SGD": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-3}),
}


def train(model: nn.Module, batch: Tensors, name: str) -> tuple[torch.Tensor, Tensors, Tensors]:
    """One process, the unmodified model: its loss and gradients, and its state after STEPS steps."""
    model = copy.deepcopy(model)

    def backward() -> torch.Tensor:
        model.zero_grad()
        output = model(**batch)
        loss = output if isinstance(output, torch.Tensor) else output.loss
        loss.backward()
        return loss.detach()

    loss = backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    kind, settings = OPTIMIZERS[name]
    optimizer: torch.optim.Optimizer = kind(model.parameters(), **settings)  # type: ignore[arg-type]
    for _ in range(STEPS):
        backward()
        optimizer.step()
    return loss, gradients, model.state_dict()


def worst(found: Tensors, wanted: Tensors) -> tuple[float, str]:
    """The largest error and whose it is (`autopart.check.worst_error`); infinite where one side lacks a tensor."""
    if found.keys() != wanted.keys():
        return float("inf"), f"names: {sorted(found.keys() ^ wanted.keys())}"
    return worst_error(found, wanted)


def share(compiled: Any, batch: Tensors) -> Tensors:
    """The samples of a batch that this rank reads: its part of every micro-batch, one after the other."""
    plan = compiled.plan
    rows = torch.arange(plan.global_batch).view(plan.micro_batches, compiled.data_ranks, -1)
    return {k: v[rows[:, compiled.data_rank].flatten()] for k, v in batch.items()}


def force(plan: autopart.Plan, zero: int, modes: list[str], device: str, shard_size: int) -> autopart.Plan:
    """The plan with another ZeRO level, among other ranks, and for another device, whose blocks are recomputed as
    `modes` says, by turns. At ZeRO 3 weights are gathered ahead."""
    turns = itertools.cycle(modes)
    stages = [
        dataclasses.replace(stage, recompute=tuple("none" if m == "none" else next(turns) for m in stage.recompute))
        for stage in plan.stages
    ]
    mesh = autopart.Mesh.of(f"{plan.mesh.size}:{device}")
    ahead = AHEAD if zero == 3 else 0
    recompute = " ".join(modes)
    return dataclasses.replace(
        plan,
        mesh=mesh,
        zero=zero,
        recompute=recompute,
        stages=tuple(stages),
        prefetch_bytes=ahead,
        shard_size=shard_size,
    )


def plan_of(model: nn.Module, mesh: str, batch: Tensors, settings: dict[str, Any]) -> autopart.Plan:
    """The plan that `autopart.compile` makes on rank 0, made once, and changed as `forced` in the settings says."""
    asked, forced = asked_of(settings), settings.get("forced")
    key = id(model), str(asked), (forced or {}).get("device")
    if key not in PLANS:
        request = request_of(model, batch, **asked)
        source = source_of(model, batch, DTYPES[request.precision])
        device = (forced or {}).get("device")  # for whose type the model is traced
        PLANS[key] = make_plan(source, Mesh.of(mesh.replace("cpu", device or "cpu")), request, to_run=True)
        source.full(PLANS[key].micro_batch, PLANS[key].mesh)
    return force(PLANS[key], *(forced[k] for k in ("zero", "modes", "device", "shard_size"))) if forced else PLANS[key]


def asked_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of `autopart.plan`: a plan that is changed starts with all blocks recomputed."""
    asked = {key: value for key, value in settings.items() if key != "forced"}
    return {**asked, "recompute": "full"} if "forced" in settings else asked


def compiled_for(model: nn.Module, mesh: str, batch: Tensors, settings: dict[str, Any], forked: bool) -> Any:
    """`autopart.compile`: of a plan that all ranks know already, if they are forked, or that rank 0 changes."""
    if forked or ("forced" in settings and os.environ["RANK"] == "0"):
        return autopart.compile(model, mesh, batch, plan=plan_of(model, mesh, batch, settings))
    return autopart.compile(model, mesh, batch, **asked_of(settings))


def run(
    model: nn.Module, batch: Tensors, right: tuple[Any, ...] | None, settings: dict[str, Any], forked: bool
) -> dict[str, Any]:
    """Train under one configuration; the errors against `right`, one process's results, on the rank that has them."""
    world = int(os.environ["WORLD_SIZE"])
    try:
        compiled = compiled_for(model, f"{world}:cpu", batch, settings, forked)
    except autopart.PartitionError as error:
        return {"refused": str(error)}
    loss = compiled.step(batch)
    gradients = compiled.full_gradients()
    losses = torch.zeros(world, dtype=torch.float64)
    dist.all_gather(list(losses.split(1)), loss.double().reshape(1))
    local = float(compiled.step(share(compiled, batch), local=True))
    kind, options = OPTIMIZERS[optimizer_of(settings)]
    compiled.optimizer(kind, **options)
    for _ in range(STEPS):
        compiled.step(batch)
    state = compiled.full_state_dict()
    if right is None:
        return {}
    return {
        "plan": f"{compiled.plan.degrees} {compiled.plan.schedule} micro-batches {compiled.plan.micro_batches} "
        f"zero {compiled.plan.zero} recompute {compiled.plan.recompute}",
        "losses": losses.tolist(),
        "local": local,
        "loss": abs(losses[0].item() / right[0].item() - 1),
        "gradients": worst(gradients, right[1]),
        "state": worst(state, right[2]),
    }


def optimizer_of(settings: dict[str, Any]) -> str:
    """The name of the optimizer of a configuration."""
    name: str = settings.get("forced", {}).get("optimizer", "SGD")
    return name


def source_of(model: nn.Module, batch: Tensors, dtype: torch.dtype) -> Source:
    """A model with its batch, traced once for every micro-batch size."""
    return SOURCES.setdefault((id(model), dtype), Source(model, batch, dtype))


def trace_once() -> None:
    """Have `autopart.compile` trace a model once for every micro-batch size, not again for every configuration."""
    known = SimpleNamespace(of=lambda model, batch, asked: source_of(model, batch, DTYPES[asked.precision]))
    setattr(sys.modules["autopart.compile.api"], "Source", known)  # noqa: B010


def train_table(made: dict[str, tuple[nn.Module, Batch]], table: Table, file: Path, forked: bool) -> None:
    """Run a model's table; rank 0 writes what it found after each line, so that a failure leaves the rest."""
    results: list[dict[str, Any]] = []
    right: dict[tuple[str, str], tuple[Any, ...]] = {}
    for dtype, settings in table:
        optimizer = optimizer_of(settings)
        if os.environ["RANK"] == "0" and (dtype, optimizer) not in right:
            right[dtype, optimizer] = train(*made[dtype], optimizer)
        found = run(*made[dtype], right.get((dtype, optimizer)), settings, forked)
        results.append({"dtype": dtype, "settings": settings, **found})
        if os.environ["RANK"] == "0":
            file.write_text(json.dumps(results))


def fork_table(
    made: dict[str, tuple[nn.Module, Batch]], table: Table, file: Path, ranks: int, traces_itself: bool
) -> bool:
    """Run a model's table on forks of this process; whether these ended well. A rank traces and plans for itself, or
    this process does so for all."""
    for dtype, settings in [] if traces_itself else table:
        with suppress(autopart.PartitionError):  # which every rank meets again
            plan_of(made[dtype][0], f"{ranks}:cpu", made[dtype][1], settings)
    try:
        run_forked(partial(train_table, made, table, file, forked=not traces_itself), ranks)
    except Exception:
        traceback.print_exc()
        return False
    return True


def train_tables(tables: dict[str, Table], folder: Path, ranks: int, traces_itself: bool) -> None:
    """Run the tables, one model after the other; exits with status 1 where ranks failed.

    tables         model -> its configurations: dtype and keywords of `autopart.compile`
    folder         where the results are written, MODEL.json for every model
    ranks          number of ranks
    traces_itself  whether every rank traces and plans for itself
    """
    torch.set_num_threads(1)
    trace_once()
    ended_well = []
    for name, table in tables.items():
        made = {dtype: build(name, getattr(torch, dtype)) for dtype in dict(table)}
        ended_well.append(fork_table(made, table, folder / f"{name}.json", ranks, traces_itself))
    sys.exit(0 if all(ended_well) else 1)
