"""Recomputing blocks and sharing over data-parallel ranks: what is kept is less, and nothing else changes."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import models
import pytest
import torch
from models import batch_for, build, gpt2, llama
from ranks import run_main
from torch import nn
from torch.nn import functional as F

import autopart
from autopart.compile.check import one_process, worst_error
from autopart.compile.programs import programs
from autopart.compile.simulate import Simulated, simulate_plan
from autopart.cost.liveness import MODES
from autopart.ir.labels import is_block
from autopart.passes.source import Source
from autopart.plan.schedules.ops import Instruction, Op
from autopart.planner.make_plan import make_plan, request_of
from autopart.runtime import standalone
from autopart.runtime.compiled import Compiled
from autopart.runtime.flat_slices import as_slices, buckets, gather, scatter_sum
from autopart.runtime.groups import Groups
from autopart.runtime.simulated import SimulatedGroup, run_simulated
from benchmarks.accuracy.memory import Memory

SLACK = 0.2
"""Of a model's bytes: the batch, the loss, and messages that another simulated rank has not let go of yet."""
compiler = import_module("autopart.compile.simulate")
slices = import_module("autopart.runtime.flat_slices")
Tensors = dict[str, torch.Tensor]


def forced(plan: autopart.Plan, zero: int = 0, modes: Sequence[str] = ("none",)) -> autopart.Plan:
    """The plan with another ZeRO level, whose numbered blocks are recomputed as `modes` says, by turns."""
    turns = itertools.cycle(modes)
    return changed(plan, zero, lambda mode: "none" if mode == "none" else next(turns))


def changed(plan: autopart.Plan, zero: int, mode: Callable[[str], str]) -> autopart.Plan:
    """The plan with another ZeRO level and, from that of every block, another mode."""
    stages = []
    for stage in plan.stages:
        labels = [label for run in stage.segments for label in run.labels][
            -len(stage.recompute) :
        ]  # without the prelude
        modes = (mode(m) if is_block(label) else m for label, m in zip(labels, stage.recompute, strict=True))
        stages.append(dataclasses.replace(stage, recompute=tuple(modes)))
    return dataclasses.replace(plan, zero=zero, stages=tuple(stages))


def planned(source: Source, mesh: str, **settings: Any) -> autopart.Plan:
    """A plan for a source that may be traced already."""
    request = request_of(source.model, source.batch, **settings)
    return make_plan(source, autopart.Mesh.of(mesh), request, to_run=True)


@dataclasses.dataclass
class Measured:
    """Bytes alive after the forward and after the backward of each micro-batch, and at the peak of a step, on rank 0;
    the whole gradients that lived on; bytes of the whole model."""

    forward: list[int]
    backward: list[int]
    peak: int
    whole_gradients: int
    model: int


def measure(source: Source, plan: autopart.Plan) -> Measured:
    """One step of a plan on simulated ranks."""
    model, batch = source.model, source.batch
    layered = source.full(plan.micro_batch, plan.mesh)
    stages = programs(layered, plan)

    def one(groups: Groups) -> Measured:
        found = Measured([], [], 0, 0, sum(p.nbytes for p in model.parameters()))
        with Memory(apart=[*model.parameters(), *model.buffers(), *batch.values()]) as memory:
            stage = stages[groups.pp.rank]
            compiled = Compiled(model, plan, groups, stage, layered.traced.aliases, layered.traced.buffers)
            actions = compiled.executor.actions
            forward, backward = actions[Op.FORWARD], actions[Op.BACKWARD]

            def watched(action: Callable[[Instruction], None], to: list[int]) -> Callable[[Instruction], None]:
                def run(at: Instruction) -> None:
                    action(at)
                    to.append(memory.alive)
                    if to is found.backward:
                        weights: list[Any] = [p for _, p in compiled.stage.named_parameters()]
                        found.whole_gradients += sum(w.grad is not None and not w.origin.sliced for w in weights)

                return run

            actions[Op.FORWARD] = watched(forward, found.forward)
            actions[Op.BACKWARD] = watched(backward, found.backward)
            compiled.step(batch)
            found.peak = memory.peak
        return found

    return run_simulated(plan.pp, plan.dp, plan.tp, one, plan.shard_size)[0]


# ---- recomputing -----------------------------------------------------------------------------------------


def test_selective_keeps_the_outputs_of_products_and_full_none() -> None:
    layers, samples, tokens, width, heads = 4, 8, 12, 32, 4
    source = models.source("gpt2", layers=layers)
    plan = planned(source, "1:cpu", recompute="full", micro_batch=samples)
    none, selective, mincut, full = (measure(source, forced(plan, 0, [mode])).forward[0] for mode in MODES)
    # A block's products give 3 (query, key, value), 1, 4 and 1 times its width, attention 1 and a number a head.
    products = layers * samples * tokens * (10 * width + heads) * 4
    assert selective - full == products
    # Of the four values of that width that two sums and two products give, backward reads none but one sum.
    assert selective - mincut == layers * samples * tokens * width * 4
    assert none > full + products
    mixed = measure(source, forced(plan, 0, ["full", "selective", "none", "none"])).forward[0]
    assert full < mixed < none


@cache
def dropping() -> tuple[Source, autopart.Plan, Simulated]:
    """A GPT-2 with dropout, a plan that recomputes its blocks, and a step of that plan without recomputing."""
    torch.manual_seed(0)
    model = gpt2(3, resid_pdrop=0.2, attn_pdrop=0.2, embd_pdrop=0.2)
    source = Source(model, batch_for("gpt2", torch.float32), torch.float32)
    plan = planned(source, "2:cpu", dp=2, micro_batch=4, recompute="full")
    return source, plan, simulate_plan(source, forced(plan), seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 3])
def test_dropout_is_the_same_again(zero: int) -> None:
    source, plan, kept = dropping()
    for modes in (["full"], ["selective", "none", "mincut"]):
        again = simulate_plan(source, forced(plan, zero, modes), seed=1)
        assert torch.equal(again.loss, kept.loss)
        assert worst_error(again.gradients, kept.gradients)[0] < 1e-6


class Normed(nn.Module):
    """Numbered layers that change buffers: a batch norm, and a running average that the output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(NormedLayer() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


class NormedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.register_buffer("level", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.level.copy_(self.level * 2)
        return torch.tanh(self.linear(self.norm(x)) * self.level)


@pytest.mark.slow
def test_a_block_that_is_run_again_changes_its_buffers_once() -> None:
    torch.manual_seed(0)
    model, batch = Normed(), {"x": torch.randn(8, 8)}
    plan = autopart.plan(model, "1:cpu", batch, recompute="none")
    with mock.patch.object(compiler, "validate"):  # which refuses what no planner gives
        kept, *others = (
            simulate_plan(
                Source(copy.deepcopy(model), batch, torch.float32),
                changed(plan, 0, lambda _, mode=mode: mode),  # type: ignore[misc]
            )
            for mode in MODES
        )
    for again in others:
        assert worst_error(again.gradients, kept.gradients)[0] < 1e-6
        assert all(torch.equal(again.state[name], value) for name, value in kept.state.items())


class Alternating(nn.Module):
    """Numbered layers of two kinds by turns, two of which share a weight, with one that is frozen and one unused, and
    with gates of one element, of which a rank's slice at level 3 has one too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Wide() if i % 2 else Narrow() for i in range(6))
        self.layers[4].linear.weight = self.layers[0].linear.weight
        self.layers[1].up.weight.requires_grad_(False)
        self.layers[3].up.bias.requires_grad_(False)
        self.table = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        x = x + self.table[ids]
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


class Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.gate = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x)) * self.gate


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.unused = nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(2, 2)
        self.gate = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gate * self.down(F.gelu(self.up(x)))


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"dp": 2}, {"dp": 2, "tp": 2}, {"dp": 2, "pp": 2}], ids=str)
def test_blocks_of_two_kinds_with_shared_and_frozen_weights(axes: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = Alternating().double()
    batch = {"x": torch.randn(8, 8, dtype=torch.float64), "ids": torch.randint(0, 5, (8,))}
    source = Source(model, batch, torch.float64)
    plan = planned(source, f"{math.prod(axes.values())}:cpu", micro_batch=4, recompute="none", **axes)
    loss, gradients = one_process(copy.deepcopy(model), batch)
    for zero, mode in itertools.product((0, 1, 2, 3), MODES):
        found = simulate_plan(
            source,
            changed(plan, zero, lambda _, mode=mode: mode),  # type: ignore[misc]
        )
        assert torch.allclose(found.loss, loss, rtol=1e-10)
        error, worst = worst_error(found.gradients, gradients)
        assert error < 1e-10, (zero, mode, worst)


@pytest.mark.slow
def test_a_few_recomputed_blocks_of_a_list_read_as_loops() -> None:
    source = models.source("gpt2", layers=4)
    plan = planned(source, "1:cpu", recompute="full", micro_batch=models.SAMPLES)
    layered = source.full(plan.micro_batch, plan.mesh)
    (text,) = (p.source for p in programs(layered, forced(plan, 0, ["full", "full", "none", "none"])))
    assert (
        "for layer in self.transformer_h[:2]:\n            hidden_states = recomputed(layer, hidden_states)\n" in text
    )
    assert "for layer in self.transformer_h[2:]:\n            hidden_states = layer(hidden_states)\n" in text
    (text,) = (p.source for p in programs(layered, forced(plan, 0, ["full", "selective", "selective", "none"])))
    assert "hidden_states = recomputed(self.transformer_h[0], hidden_states)\n" in text
    call = "hidden_states = recomputed(layer, hidden_states)"
    assert f"for layer in self.transformer_h[1:3]:\n            {call}\n" in text
    assert "hidden_states = self.transformer_h[3](hidden_states)\n" in text


# ---- sharing over data-parallel ranks --------------------------------------------------------------------


@pytest.fixture(scope="module")
def levels() -> dict[int, Measured]:
    """A model of much more weights than activations, at every level on two ranks."""
    torch.manual_seed(0)
    model = llama(4, hidden_size=128, intermediate_size=256)
    source = Source(model, batch_for("llama", torch.float32, samples=4), torch.float32)
    plan = planned(source, "2:cpu", dp=2, micro_batch=2, recompute="full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "HOST_BUCKET_BYTES", 2**16)
        return {zero: measure(source, forced(plan, zero, ["none"])) for zero in range(4)}


@pytest.mark.slow
def test_no_whole_gradient_lives_on_from_level_2(levels: dict[int, Measured]) -> None:
    assert levels[0].whole_gradients and levels[1].whole_gradients
    assert not levels[2].whole_gradients
    for measured, held in ((levels[0], 2.0), (levels[1], 2.0), (levels[2], 1.5), (levels[3], 1.0)):
        for alive in measured.backward:
            assert held <= alive / measured.model < held + SLACK


def test_no_whole_weight_lives_on_at_level_3(levels: dict[int, Measured]) -> None:
    model = levels[3].model
    activations = levels[2].forward[0] - model
    assert levels[3].forward[0] < (0.5 + SLACK) * model + activations
    assert levels[3].backward[0] < (1.0 + SLACK) * model
    assert levels[3].peak < levels[2].peak < levels[1].peak


def test_messages_hold_many_tensors_and_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "HOST_BUCKET_BYTES", 100)
    tensors = [torch.zeros(n, dtype=d) for n, d in ((10, torch.float32), (10, torch.float64), (15, torch.float32))]
    group = SimulatedGroup("dp", 2, 0)
    assert list(buckets(tensors, group)) == [[0, 2], [1]]
    assert list(buckets(tensors, group, times=2)) == [[0], [1], [2]]
    assert list(buckets([torch.zeros(1), torch.zeros(99), torch.zeros(1)], group)) == [[0], [1], [2]]


def test_slices_come_together_again() -> None:
    whole = [torch.arange(7.0).view(7, 1), torch.arange(12, dtype=torch.float64).view(3, 4), torch.tensor(5.0)]

    def one(groups: Groups) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        mine = [as_slices(x, 3)[groups.dp.rank] for x in whole]
        summed = scatter_sum([x * (1 + groups.dp.rank) for x in whole], groups.dp)
        return tuple(gather(some, list(map(torch.empty_like, whole)), groups.dp) for some in (mine, summed))

    for gathered, summed in run_simulated(1, 3, 1, one):
        assert all(torch.equal(a, b) for a, b in zip(gathered, whole, strict=True))
        assert all(torch.equal(a, 6 * b) for a, b in zip(summed, whole, strict=True))


@pytest.mark.processes
def test_an_emitted_folder_of_slices_trains_as_one_process(tmp_path: Path) -> None:
    model, batch = build("gpt2")
    plan = autopart.plan(model, "2:cpu", batch, dp=2, micro_batch=4, recompute="full")
    plan = forced(plan, 3, ["selective", "mincut", "full"])
    layered = Source(model, batch, torch.float32).full(plan.micro_batch, plan.mesh)
    standalone.write(tmp_path, plan, programs(layered, plan), layered.traced.aliases, layered.traced.buffers, batch)
    output = tmp_path / "output"
    status = run_main(partial(standalone.main, tmp_path), ["--steps", "3", "--json"], 2, output)
    assert status == 0, output.read_text()

    model.load_state_dict({n: standalone.random_weight(n, p.shape) for n, p in model.named_parameters()}, strict=False)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**standalone.random_batch(tmp_path, plan, 0)).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert json.loads(output.read_text().splitlines()[-1])["losses"] == pytest.approx(losses, rel=1e-5)
