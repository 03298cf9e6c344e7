"""The ranks of tests/compile/test_zoo.py: they train architectures one after the other with tp=2 x pp=2, two
micro-batches; rank 0 compares."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from exact_worker import plan_of, trace_once
from ranks import run_forked
from torch import nn

import autopart
from autopart.compile.check import one_process, worst_error
from autopart.frontend.batch import Batch
from benchmarks.coverage.zoo_models import build

RANKS, SAMPLES = 4, 4
Task = tuple[nn.Module, Batch, autopart.Plan]


def planned(task: str, model_type: str) -> Task:
    """A tiny model with its batch and its plan."""
    model, batch = build(task, model_type)
    whole = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())  # whose means are a micro-batch's
    settings = {"tp": 2, "pp": 2, "micro_batch": SAMPLES if whole else SAMPLES // 2}
    return model, batch, plan_of(model, f"{RANKS}:cpu", batch, settings)


def train(model: nn.Module, batch: Batch, plan: autopart.Plan) -> dict[str, Any]:
    """The errors of a step, on rank 0."""
    compiled = autopart.compile(model, f"{RANKS}:cpu", batch, plan=plan)
    loss = float(compiled.step(batch))
    gradients = compiled.full_gradients()
    if dist.get_rank():
        return {}
    right, wanted = one_process(copy.deepcopy(model), batch)
    error, name = worst_error(gradients, wanted)
    return {"loss": abs(loss / float(right) - 1), "gradients": error, "worst": name}


def train_all(tasks: dict[str, Task], path: Path) -> None:
    """One rank: train all; rank 0 writes what it found after each, so that a failure leaves the rest."""
    results = {}
    for name, task in tasks.items():
        results[name] = train(*task)
        if dist.get_rank() == 0:
            path.write_text(json.dumps(results))


def train_zoo(names: list[str], path: Path) -> None:
    """Plan for architectures, each "task:model_type", then train them on forks of this process."""
    torch.set_num_threads(1)
    trace_once()
    tasks = {name: planned(*name.split(":")) for name in names}
    run_forked(partial(train_all, tasks, path), RANKS)
