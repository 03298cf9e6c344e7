"""Ranks of tests/runtime/test_checkpoint.py: models are trained under one plan after another, each on as many forks of
this process as it has ranks, and each from the checkpoint of the one before.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
from functools import partial
from pathlib import Path
from typing import Any

import torch
from exact_worker import plan_of, trace_once
from models import WORDS, Batch, Exact, batch_for, gpt2
from ranks import run_forked
from torch import nn

import autopart

STEPS = 2
"""Steps of a leg before its checkpoint; one more is made after it."""
Leg = tuple[int, dict[str, Any]]
"""Ranks, and settings of the plan; `as_zero` is the level that the plan is changed to."""


class Odd(nn.Module):
    """Tied weights, a scalar, a buffer that training changes, sizes that slices do not divide, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.last.weight = self.first.weight
        self.gain, self.scale = nn.Parameter(torch.randn(7, 3)), nn.Parameter(torch.tensor(1.5))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        x = x.to(self.first.weight.dtype)
        x = nn.functional.dropout(self.first(x).relu(), 0.1) * self.gain.square().mean() + self.seen / 10
        loss: torch.Tensor = (self.last(x) * self.scale).square().mean()
        return loss


class Norm(nn.Module):
    """Buffers that tp splits and training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = (self.norm(self.first(x)).relu() + self.norm.running_var).square().mean()
        return loss


def build(name: str) -> tuple[nn.Module, Batch]:
    """A chain's model and a batch; the GPT-2 has dropout, tied weights and fused queries, keys and values."""
    torch.manual_seed(0)
    if name != "gpt2":
        return (Norm() if name == "norm" else Odd()).train(), {"x": torch.randn(8, 8)}
    model = gpt2(2, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1).double()
    return Exact(model).train(), batch_for("gpt2", torch.float64)


MIXED = {"precision": "bfloat16", "master": "float32"}
CHAINS: dict[str, list[Leg]] = {
    "gpt2": [
        (4, {"tp": 2, "pp": 2, "micro_batch": 4}),
        (2, {"dp": 2, "micro_batch": 4, "as_zero": 3, "offload": "optimizer"}),
        (4, {"dp": 4, "zero": 3, "shard_size": 2, "micro_batch": 4}),
        (2, {"pp": 2, "micro_batch": 4}),
        (4, {"dp": 4, "zero": 1, "shard_size": 2, "micro_batch": 4}),
        (1, {"micro_batch": 4}),
    ],
    "odd": [
        (2, {"tp": 2, "constraints": ["split first.weight dim 0 over tp"]}),
        (2, {"dp": 2, "as_zero": 3}),
        (
            4,
            {
                "dp": 2,
                "tp": 2,
                "constraints": ["split first.weight dim 0 over tp"],
                "as_zero": 1,
                "offload": "optimizer",
            },
        ),
        (1, {}),
    ],
    "mixed": [
        (2, {"dp": 2, "as_zero": 2, "offload": "optimizer", **MIXED}),
        (2, {"pp": 2, **MIXED}),
        (1, {"precision": "bfloat16"}),
        (2, {"dp": 2, "as_zero": 3, **MIXED}),
    ],
    "norm": [(2, {"tp": 2, "constraints": ["split first.weight dim 0 over tp"]}), (1, {})],
}
"""By model and what is tried with it."""


def rows(batch: Batch, position: int) -> Batch:
    """The batch at a position in the data."""
    random = torch.Generator().manual_seed(position)
    if "x" in batch:
        return {"x": torch.randn(batch["x"].shape, generator=random)}
    return {**batch, "input_ids": torch.randint(3, WORDS, batch["input_ids"].shape, generator=random)}


def train(compiled: Any, batch: Batch, folder: Path | None, first: bool, steps: int, **how: Any) -> list[float]:
    """Losses of some steps, from the last checkpoint in a folder unless they are the first, and of one step more after
    a checkpoint was saved. What was loaded is saved again, in the folder "again"."""
    optimizer = compiled.optimizer(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    position, losses = 0, []
    if folder is not None and not first:
        position = compiled.load(folder, scheduler=scheduler)["position"]
        compiled.save(folder / "again", scheduler=scheduler, extra={"position": position})
    for step in range(steps + 1):
        losses.append(float(compiled.step(rows(batch, position))))
        scheduler.step()
        position += 1
        if folder is not None and step == steps - 1:
            compiled.save(folder, scheduler=scheduler, extra={"position": position}, **how)
    compiled.wait_saved()
    return losses


def planned(model: nn.Module, batch: Batch, ranks: int, settings: dict[str, Any]) -> autopart.Plan:
    """The plan of a leg."""
    asked = {"nodes": 5, **settings}
    zero = asked.pop("as_zero", None)
    plan = plan_of(model, f"{ranks}:cpu", batch, asked)
    return plan if zero is None else dataclasses.replace(plan, zero=zero)


def leg(model: nn.Module, batch: Batch, plan: autopart.Plan, folder: Path, number: int, seed: int) -> None:
    """One rank: train a leg; rank 0 writes its losses."""
    compiled = autopart.compile(model, plan.mesh, batch, plan=plan, seed=seed)
    losses = train(compiled, batch, folder, number == 0, STEPS, wait=number % 2 == 0)
    if os.environ["RANK"] == "0":
        (folder / f"{number}.json").write_text(json.dumps(losses))


def alone(model: nn.Module, batch: Batch, plan: autopart.Plan, folder: Path, steps: int) -> None:
    """One process: the losses of all steps, uninterrupted."""
    compiled = autopart.compile(model, plan.mesh, batch, plan=plan, seed=0)
    (folder / "alone.json").write_text(json.dumps(train(compiled, batch, None, True, steps)))


def full_disk(model: nn.Module, batch: Batch, plan: autopart.Plan, folder: Path) -> None:
    """One of two ranks, of which rank 1 cannot write files of any length for a while."""
    compiled = autopart.compile(model, plan.mesh, batch, plan=plan)
    compiled.optimizer(torch.optim.AdamW)
    compiled.step(rows(batch, 0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 if compiled.rank else limits[0], limits[1]))
    found = {"error": ""}
    try:
        compiled.save(folder)
    except autopart.PartitionError as error:
        found["error"] = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    compiled.step(rows(batch, 1))
    found["left"] = os.listdir(folder)
    compiled.save(folder)
    found["after"], found["step"] = os.listdir(folder), compiled.groups.rng.step
    (folder.parent / f"{compiled.rank}.json").write_text(json.dumps(found))


def train_chains(results: Path) -> None:
    """Plan for all chains, then run them: a folder of checkpoints and results for each."""
    torch.set_num_threads(1)
    trace_once()
    for name, legs in CHAINS.items():
        folder = results / name
        folder.mkdir()
        model, batch = build(name)
        plans = [planned(model, batch, *each) for each in legs]
        for number, (plan, (ranks, _)) in enumerate(zip(plans, legs, strict=True)):
            run_forked(partial(leg, model, batch, plan, folder, number, seed=number), ranks)
        one = planned(model, batch, 1, MIXED if name == "mixed" else next(asked for ranks, asked in legs if ranks == 1))
        run_forked(partial(alone, model, batch, one, folder, STEPS * len(legs)), 1)
    folder = results / "full" / "checkpoints"
    folder.mkdir(parents=True)
    run_forked(partial(full_disk, model, batch, plans[0], folder), 2)
