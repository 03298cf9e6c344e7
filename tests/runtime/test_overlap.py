"""Gradients that travel while the backward goes on: the same sums, in the same order on all ranks."""

from __future__ import annotations

import dataclasses
from functools import cache
from importlib import import_module
from typing import Any

import models
import numpy as np
import pytest
import torch
from models import build
from torch import nn
from torch.nn import functional as F

import autopart
from autopart.compile.check import one_process, worst_error
from autopart.compile.programs import programs
from autopart.cost.intervals import interval_ends
from autopart.cost.training_state import Training
from autopart.cost.update_seconds import update_seconds
from autopart.hardware import find_device
from autopart.hardware.mesh import Mesh
from autopart.hardware.rows import Device
from autopart.passes.source import Source
from autopart.planner.interval_seconds import exposed, exposed_by_clock
from autopart.planner.make_plan import make_plan, request_of
from autopart.runtime.compiled import Compiled
from autopart.runtime.groups import Groups
from autopart.runtime.simulated import run_simulated

Tensors = dict[str, torch.Tensor]
Sent = list[tuple[str, list[tuple[int, ...]]]]
"""What a rank was doing when it sent gradients of these shapes."""


class Unused(nn.Module):
    """A weight that gets no gradient, and one that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(32, 32) for _ in range(3))
        self.third.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        x = self.second(F.gelu(self.first(x))) * self.scale.detach()
        return F.mse_loss(self.third(x)[:, :8], target)


@cache
def unused() -> Source:
    torch.manual_seed(0)
    return Source(Unused(), models.batch_for("mlp", torch.float32), torch.float32)


ON_GPUS = ("bias_activation",)
"""Kernels that graphs for GPUs alone have: the plan for a CPU is run as one for a GPU."""


@cache
def traced(name: str, precision: str) -> Source:
    """A model in float32 that computes in another precision."""
    return dataclasses.replace(models.source(name), dtype=getattr(torch, precision), prepared={}, planned={})


def train(source: Source, plan: autopart.Plan) -> list[tuple[Tensors, Sent, bool]]:
    """A step on simulated ranks: of every rank the gradients (on rank 0), what was sent when, whether all has come."""
    layered = source.full(plan.micro_batch, plan.mesh)
    stages = programs(layered, plan)

    def one(groups: Groups) -> tuple[Tensors, Sent, bool]:
        stage = stages[groups.pp.rank]
        compiled = Compiled(source.model, plan, groups, stage, layered.traced.aliases, layered.traced.buffers)
        shared, sent = compiled.executor.shared, Sent()
        message = shared._message

        def told(weights: list[Any], gradients: list[torch.Tensor]) -> Any:
            sent.append((compiled.executor.activity.text, [tuple(g.shape) for g in gradients]))
            return message(weights, gradients)

        shared._message = told  # type: ignore[method-assign]
        compiled.step(source.batch)
        return compiled.full_gradients(), sent, not shared.started

    return run_simulated(plan.pp, plan.dp, plan.tp, one, plan.shard_size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gpt2", {"dp": 2, "zero": 0}),
        ("gpt2", {"dp": 2, "zero": 1}),
        ("gpt2", {"dp": 2, "zero": 2}),
        ("gpt2", {"dp": 2, "zero": 3}),
        ("gpt2", {"dp": 2, "pp": 2, "zero": 0}),
        ("gpt2", {"dp": 2, "tp": 2, "zero": 1, "recompute": "full"}),
        ("gpt2", {"dp": 2, "zero": 1, "precision": "bfloat16", "master": "float32"}),
        ("gpt2", {"dp": 2, "zero": 0, "precision": "bfloat16", "master": "float32"}),
        ("unused", {"dp": 4, "zero": 0, "micro_batch": 4}),
        ("unused", {"dp": 4, "zero": 2, "micro_batch": 4}),
    ],
    ids=str,
)
def test_gradients_that_overlap_are_the_same(
    monkeypatch: pytest.MonkeyPatch, name: str, settings: dict[str, Any]
) -> None:
    monkeypatch.setattr(import_module("autopart.runtime.flat_slices"), "HOST_BUCKET_BYTES", 2**13)
    settings = {"micro_batch": 4, **settings}
    given = unused() if name == "unused" else traced(name, settings.get("precision", "float32"))
    source = dataclasses.replace(given, no_fuse=ON_GPUS, prepared={}, planned={})
    model, batch = source.model, source.batch
    mesh = Mesh.of(f"{settings['dp'] * settings.get('pp', 1) * settings.get('tp', 1)}:cpu")
    after = make_plan(source, mesh, request_of(model, batch, no_fuse=ON_GPUS, **settings), to_run=True)
    beside = dataclasses.replace(after, mesh=Mesh.of(f"{mesh.size}:h100-80gb"))
    at_end, overlapped = train(source, after), train(source, beside)

    wanted = at_end[0][0]
    assert overlapped[0][0].keys() == wanted.keys()
    if settings["zero"] < 3:
        assert all(torch.equal(found, wanted[key]) for key, found in overlapped[0][0].items())
    assert worst_error(overlapped[0][0], wanted)[0] < 1e-6, "uses of a slice are added up in another order alone"
    if after.precision == "float32":
        assert worst_error(wanted, one_process(model, batch)[1])[0] < 1e-5

    ranks = after.dp * after.tp
    for stage in range(after.pp):
        mine = [sent for _, sent, _ in overlapped[stage * ranks : (stage + 1) * ranks]]
        assert all(sent == mine[0] for sent in mine[:: after.tp]), "ranks of a group send in different orders"
    assert all(done for *_, done in overlapped)
    doing = {what for _, sent, _ in overlapped for what, _ in sent}
    last = {f"stage {s} BACKWARD micro-batch {after.micro_batches - 1}" for s in range(after.pp)}
    if settings["zero"] < 2:
        assert last < doing | {""} and all(what in last or "REDUCE" in what for what in doing)
        assert all("REDUCE" in what for _, sent, _ in at_end for what, _ in sent)
    else:
        assert {f"stage 0 BACKWARD micro-batch {m}" for m in range(after.micro_batches)} <= doing


def test_devices_that_move_messages_themselves_hide_nothing() -> None:
    assert find_device("cpu").overlapped_share == 0.0
    share = find_device("h100-80gb").overlapped_share
    computing, messages = 1.0, 1.189 * 1.102 - 1.0  # whose hidden steps take 1.189, and 1.102 times that in turn
    assert computing + (1 - share) * messages == pytest.approx(1.189)
    assert dataclasses.replace(find_device("h100-80gb"), overlap=0.0).overlapped_share == 0.0
    assert dataclasses.replace(find_device("cpu"), overlap=2.0).overlapped_share == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_every_range_exposes_what_a_clock_says(seed: int) -> None:
    draw, n = np.random.default_rng(seed), 9
    sent, backward = draw.uniform(0, [0.2, 1, 1, 3, 10][seed], n), draw.uniform(0, 1, n)
    sent[draw.uniform(size=n) < 0.3] = 0.0
    forward, gathers = backward / 2, draw.uniform(0, [0.0, 0.3, 1, 2, 5][seed], n)
    found, ends = exposed(sent, backward, forward, gathers), np.transpose(interval_ends(n)).tolist()
    for late, (i, j) in zip(found, ends, strict=True):
        rows = [row[i:j].tolist() for row in (sent, backward, forward, gathers)]
        assert late == pytest.approx(exposed_by_clock(*rows), abs=1e-12)
        sync, gathered, computed = (float(row[i:j].sum()) for row in (sent, gathers, backward))
        least = max(sent[i] + gathers[i] + gathers[j - 1], sync + 2 * gathered - 1.5 * computed)
        assert least - 1e-12 <= late <= sync + 2 * gathered + 1e-12


@pytest.mark.slow
def test_the_price_is_between_nothing_hidden_and_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build("llama", layers=4)
    prices = []
    for beside in (0.0, 0.5, 0.9):
        monkeypatch.setattr(Device, "overlapped_share", beside)
        plan = autopart.plan(model, "2x2:a100-80gb", batch, dp=4, zero=0, micro_batch=4, no_fuse=["adamw"])
        prices.append(plan.stages[0].sync_seconds)
    training = Training("adamw", 0, plan.mesh.group(1, 4), plan.micro_batches)
    prices = [
        p - sum(update_seconds(w.nbytes, True, True, training, plan.mesh.device) for w in model.parameters())
        for p in prices
    ]
    whole = sum(training.sync_seconds(p.nbytes, True) for p in model.parameters())
    first = training.sync_seconds(model.model.embed_tokens.weight.nbytes, True)
    assert prices[0] == pytest.approx(whole)
    assert prices[1] == pytest.approx(0.5 * whole + 0.5 * first)
    assert prices[2] == pytest.approx(0.1 * whole + 0.9 * first)
