"""Ranks of tests/runtime/test_mixed.py, forks of this process: they train models with master copies, each under every
configuration of its table, and rank 0 holds them against one process that does so by hand.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from exact_worker import Tensors, plan_of, share, trace_once, worst
from models import Batch, build
from ranks import run_forked
from torch import nn

import autopart

RANKS, STEPS = 2, 3
RIGHT: dict[tuple[int, int], tuple[torch.Tensor, Tensors, Tensors]] = {}
"""What one process finds, by model and micro-batches."""
SETTINGS = {"lr": 1e-2, "momentum": 0.9}


def valid(batch: Tensors) -> int:
    """Targets that a causal model's loss is the mean over."""
    return int((batch["labels"][:, 1:] != -100).sum())


def train(model: nn.Module, batch: Tensors, micro_batches: int) -> tuple[torch.Tensor, Tensors, Tensors]:
    """One process: the loss and gradients of the first step, the float32 weights after STEPS. The model computes in
    bfloat16; float32 are the sums of gradients over micro-batches, what the optimizer steps, and its states."""
    low = copy.deepcopy(model).to(torch.bfloat16)
    master = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(master.values(), **SETTINGS)
    first: tuple[torch.Tensor, Tensors] | None = None
    for _ in range(STEPS):
        optimizer.zero_grad()
        total = torch.zeros(())
        for rows in torch.arange(len(next(iter(batch.values())))).chunk(micro_batches):
            low.zero_grad()
            part = {k: v[rows] for k, v in batch.items()}
            loss = low(**part).loss * (valid(part) / valid(batch))
            loss.backward()
            total += loss.detach().float()
            for name, p in low.named_parameters():
                wide = p.grad.float()
                known = master[name].grad
                master[name].grad = wide if known is None else known + wide
        first = first or (total, {name: p.grad.clone() for name, p in master.items()})
        optimizer.step()
        for name, p in low.named_parameters():
            p.data.copy_(master[name].detach())
    assert first is not None
    return *first, {name: p.detach() for name, p in master.items()}


Task = tuple[nn.Module, Batch, list[autopart.Plan]]


def planned(name: str, table: list[dict[str, Any]]) -> Task:
    """A model, its batch, and a plan for every configuration: as asked for, but for the ZeRO level in `as_zero`."""
    model, batch = build(name, torch.float32)
    plans = []
    for settings in table:
        asked = {"precision": "bfloat16", "master": "float32", **settings}
        zero = asked.pop("as_zero", None)
        plan = plan_of(model, f"{RANKS}:cpu", batch, asked)
        plans.append(plan if zero is None else dataclasses.replace(plan, zero=zero))
    return model, batch, plans


def run(model: nn.Module, batch: Tensors, plan: autopart.Plan) -> dict[str, Any]:
    """Train under one plan; what rank 0 found, against one process."""
    compiled = autopart.compile(model, f"{RANKS}:cpu", batch, plan=plan)
    loss = compiled.step(batch)
    gradients = compiled.full_gradients()
    optimizer = compiled.optimizer(torch.optim.SGD, **SETTINGS)
    for _ in range(STEPS):
        compiled.step(share(compiled, batch), local=True)
    state = compiled.full_state_dict()
    trained = compiled.executor.shared.trained
    kinds = {str(t.dtype) for p in trained for t in (p, p.grad, optimizer.state[p]["momentum_buffer"])}
    kept = {str(p.dtype) for _, p in compiled.stage.named_parameters()}
    if os.environ["RANK"] != "0":
        return {}
    key = id(model), plan.micro_batches
    right = RIGHT[key] = RIGHT.get(key) or train(model, batch, plan.micro_batches)
    names = dict(model.named_parameters())
    return {
        "plan": f"{plan.degrees} zero {plan.zero} micro-batches {plan.micro_batches}",
        "loss": abs(float(loss) / float(right[0]) - 1),
        "gradients": worst(gradients, right[1]),
        "state": worst({name: state[name] for name in names}, right[2]),
        "moved": worst({name: p.detach() for name, p in names.items()}, right[2])[0],
        "dtypes": sorted(kinds | {str(g.dtype) for g in gradients.values()} | {str(state[n].dtype) for n in names}),
        "kept": sorted(kept),
        "weights": {name: state[name].double().sum().item() for name in names},
    }


def train_all(tables: dict[str, list[dict[str, Any]]], tasks: dict[str, Task], path: Path) -> None:
    """One rank: run the tables; rank 0 writes what it found after each model."""
    results: dict[str, list[dict[str, Any]]] = {}
    for name, (model, batch, plans) in tasks.items():
        rows = zip(tables[name], plans, strict=True)
        results[name] = [{"settings": settings, **run(model, batch, plan)} for settings, plan in rows]
        if os.environ["RANK"] == "0":
            path.write_text(json.dumps(results))


def train_tables(tables: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plan for all tables, model -> keywords of `autopart.compile`, then run them on forks of this process."""
    torch.set_num_threads(1)
    trace_once()
    tasks = {name: planned(name, table) for name, table in tables.items()}
    run_forked(partial(train_all, tables, tasks, path), RANKS)
