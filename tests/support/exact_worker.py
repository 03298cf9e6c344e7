"""One rank of tests/runtime/test_exact.py: trains models, each under every configuration of its table; rank 0 compares.

argv: the tables (model -> list of dtypes with keywords) as JSON, the file for the results.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import build
from torch import nn

import autopart
from autopart.compile.check import worst_error
from autopart.passes.source import Source

STEPS = 3
Tensors = dict[str, torch.Tensor]


PLANS: dict[str, autopart.Plan] = {}
"""Plans that are changed more than once, by what was asked for."""
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


def force(plan: autopart.Plan, zero: int, modes: list[str], device: str) -> autopart.Plan:
    """The plan with another ZeRO level and for another device, whose blocks are recomputed as `modes` says, by
    turns."""
    turns = itertools.cycle(modes)
    stages = [
        dataclasses.replace(stage, recompute=tuple("none" if m == "none" else next(turns) for m in stage.recompute))
        for stage in plan.stages
    ]
    mesh = autopart.Mesh.of(f"{plan.mesh.size}:{device}")
    return dataclasses.replace(plan, mesh=mesh, zero=zero, recompute=" ".join(modes), stages=tuple(stages))


def compiled_for(model: nn.Module, mesh: str, batch: Tensors, settings: dict[str, Any]) -> Any:
    """`autopart.compile`, of a plan that is changed as `forced` in the settings says."""
    forced = settings.get("forced")
    if forced is None:
        return autopart.compile(model, mesh, batch, **settings)
    asked = {**{k: v for k, v in settings.items() if k != "forced"}, "recompute": "full"}
    if os.environ["RANK"] != "0":
        return autopart.compile(model, mesh, batch, **asked)
    key = f"{asked} {next(model.parameters()).dtype}"
    if key not in PLANS:
        PLANS[key] = autopart.plan(model, mesh, batch, **asked)
    return autopart.compile(
        model, mesh, batch, plan=force(PLANS[key], *(forced[k] for k in ("zero", "modes", "device")))
    )


def run(model: nn.Module, batch: Tensors, right: tuple[Any, ...] | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Train under one configuration; the errors against `right`, one process's results, on the rank that has them."""
    started = time.monotonic()
    world = int(os.environ["WORLD_SIZE"])
    try:
        compiled = compiled_for(model, f"{world}:cpu", batch, settings)
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
        "seconds": time.monotonic() - started,
    }


def optimizer_of(settings: dict[str, Any]) -> str:
    """The name of the optimizer of a configuration."""
    name: str = settings.get("forced", {}).get("optimizer", "SGD")
    return name


def trace_once() -> None:
    """Have `autopart.compile` trace a model once for every micro-batch size, not again for every configuration."""
    module, known = sys.modules["autopart.compile.api"], dict[tuple[int, torch.dtype], Source]()
    setattr(module, "Source", lambda *given: known.setdefault((id(given[0]), given[2]), Source(*given)))  # noqa: B010


def main() -> None:
    """Run the tables; rank 0 writes what it found after each line, so that a failure leaves the rest."""
    tables, path = sys.argv[1:]
    torch.set_num_threads(1)
    trace_once()
    results: dict[str, list[dict[str, Any]]] = {}
    for name, table in json.loads(tables).items():
        made = {dtype: build(name, getattr(torch, dtype)) for dtype in dict(table)}
        right: dict[Any, tuple[Any, ...]] = {}
        PLANS.clear()
        results[name] = []
        for dtype, settings in table:
            optimizer = optimizer_of(settings)
            if os.environ["RANK"] == "0" and (dtype, optimizer) not in right:
                right[dtype, optimizer] = train(*made[dtype], optimizer)
            found = run(*made[dtype], right.get((dtype, optimizer)), settings)
            results[name].append({"dtype": dtype, "settings": settings, **found})
            if os.environ["RANK"] == "0":
                Path(path).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
