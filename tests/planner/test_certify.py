"""The checker of plans: it takes what the planner makes, and finds whatever was changed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import source
from torch import nn

import autopart
from autopart import Plan
from autopart.cost.training_state import Training
from autopart.cost.update_seconds import update_seconds
from autopart.planner.explain.certificate import findings
from autopart.planner.make_plan import make_plan, request_of
from autopart.sharding.notation import G, Placement, Strategy

pytestmark = pytest.mark.usefixtures("traced_once")

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("4:cpu", {"pp": 2, "tp": 2, "micro_batch": 4}),
    ("4:cpu", {"dp": 2, "tp": 2, "zero": 3, "recompute": "full"}),
    ("3:cpu", {"pp": 3, "recompute": "selective"}),
    ("2:h100-80gb", {"zero": 1, "dp": 2}),
    ("4:h100-80gb", {"zero": 2, "dp": 2, "pp": 2, "micro_batch": 4}),
]


TOKENS, WIDTH = 6, 16


@functools.cache
def planned(name: str, number: int) -> Plan:
    mesh, settings = SETTINGS[number]
    made = source(name)
    return make_plan(made, autopart.Mesh.of(mesh), request_of(made.model, made.batch, **settings))


def wrong(plan: Plan, name: str = "gpt2") -> list[str]:
    return findings(
        plan, source(name).full(4 if name == "gpt2" and plan.micro_batch != 4 else plan.micro_batch, plan.mesh)
    )


@pytest.mark.parametrize(
    ("name", "number"),
    [*(("gpt2", number) for number in range(len(SETTINGS))), ("llama", 1), ("llama", 4), ("vit", 2), ("bert", 3)],
)
def test_a_plan_of_the_planner_is_accepted(name: str, number: int) -> None:
    plan = planned(name, number)
    assert not findings(plan, source(name).full(plan.micro_batch, plan.mesh))


class Made(nn.Module):
    """Makes masks, positions and a state of nothing but the number of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.down = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        n = x.shape[0]
        places = torch.arange(TOKENS).unsqueeze(0).expand(n, TOKENS)
        causal = (places[:, None, :] <= places[:, :, None]).float()
        state = torch.zeros(n * 2, WIDTH).view(n, 2, WIDTH).sum(1, keepdim=True)
        x = causal @ self.down(x + self.places(places) + state)
        return F.mse_loss(x * torch.ones(n, TOKENS).unsqueeze(-1), target)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"tp": 2}, {"dp": 2}], ids=str)
def test_what_is_made_for_every_sample_is_counted(settings: dict[str, int]) -> None:
    """A plan is made of a trace of two samples and holds for eight."""
    torch.manual_seed(0)
    model, batch = Made(), {name: torch.randn(8, TOKENS, WIDTH) for name in ("x", "target")}
    plan = autopart.plan(model, "2:cpu", batch, micro_batch=8, **settings)
    autopart.certify(plan, model, batch)
    assert autopart.check(model, "2:cpu", batch, plan=plan).gradient_error < 1e-5


class Head(nn.Module):
    """A head of a large vocabulary, fused with its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8192, bias=False)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.down(x)).flatten(0, 1), target.flatten())


@pytest.mark.parametrize("settings", [{"pp": 2}, {"tp": 2}, {"dp": 2}], ids=str)
def test_a_fused_head_is_priced_for_its_rows(settings: dict[str, int]) -> None:
    """Its product has rows for the samples, eight here, of which the planner traces two."""
    model = Head()
    batch = {"x": torch.randn(8, 512, WIDTH), "target": torch.randint(8192, (8, 512))}
    plan = autopart.plan(model, "2:h100-80gb", batch, micro_batch=8 // settings.get("dp", 1), **settings)
    assert "linear_loss" in [used.name for used in plan.kernels]
    autopart.certify(plan, model, batch)


class Slopes(nn.Module):
    """A block that makes its scores' bias of a buffer of its own, as ALiBi is written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, WIDTH + 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(TOKENS, device=x.device)
        bias = (places[:, None] - places).abs() * self.slopes[:, None, None]
        return x + self.linear(x) * bias.mean((1, 2))


class Sloped(nn.Module):
    """Six such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Slopes() for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@pytest.mark.parametrize(
    ("mesh", "settings"),
    [("2:cpu", {"tp": 2}), ("2:cpu", {"pp": 2}), ("2:h100-80gb", {"pp": 2}), ("2:cpu", {"dp": 2, "zero": 2})],
    ids=str,
)
def test_what_every_block_makes_for_itself_is_counted(mesh: str, settings: dict[str, int]) -> None:
    model, batch = Sloped(), {"x": torch.randn(8, TOKENS, WIDTH)}
    plan = autopart.plan(model, mesh, batch, **settings)
    autopart.certify(plan, model, batch)


Change = Callable[[Plan], Plan]


def stage(index: int, **fields: Any) -> Change:
    """One stage with other fields; a function gets the old value."""

    def change(plan: Plan) -> Plan:
        stages = list(plan.stages)
        old = stages[index]
        new = {k: v(getattr(old, k)) if callable(v) else v for k, v in fields.items()}
        stages[index] = replace(old, **new)
        return replace(plan, stages=tuple(stages))

    return change


def memory(part: str, factor: float) -> Change:
    return stage(0, memory=lambda old: {**old, part: old[part] * factor})


def having(**fields: Any) -> Change:
    return lambda plan: replace(plan, **{k: v(getattr(plan, k)) if callable(v) else v for k, v in fields.items()})


def split(axis: str, key: str, strategy: Callable[[Strategy], Strategy | None]) -> Change:
    """A strategy of the first node whose name ends in `key` replaced; left out for None."""

    def change(plan: Plan) -> Plan:
        (chosen, *more) = plan.splits
        node = next(n for n in chosen[axis] if n.endswith(key))
        new = strategy(chosen[axis][node])
        row = {n: s for n, s in chosen[axis].items() if n != node} | ({node: new} if new else {})
        return replace(plan, splits=({**chosen, axis: row}, *more))

    return change


def gathered_again(s: Strategy) -> Strategy:
    return replace(s, name="G", inputs=(G, *s.inputs[1:]), outputs=(G, *s.outputs[1:]))


S0, R = Placement("S", 0), Placement("R")
TAMPERED: list[tuple[str, Change, str]] = [
    *((f"{part} of stage {i} x {x}", stage(i, **{part: lambda v, x=x: v * x}), part)
      for part in ("forward_seconds", "backward_seconds", "send_seconds") for i in (0, 1) for x in (0.999, 1.01)),
    *((f"{part} x {x}", memory(part, x), part)
      for part in ("parameters", "gradients", "optimizer", "activations", "transient") for x in (0.9, 1.1)),
    *((f"messages x {x}", stage(1, memory=lambda m, x=x: {**m, "messages": m["messages"] * x}), "messages")
      for x in (0.9, 1.1)),
    ("no activations", stage(0, memory=lambda m: {k: v for k, v in m.items() if k != "activations"}), "activations"),
    ("more memory", stage(0, memory=lambda m: {**m, "slack": 1.0}), "slack"),
    ("gradient sync", stage(0, sync_seconds=lambda v: v + 1e-3), "sync_seconds"),
    ("step lower", having(step_seconds=lambda v: v * 0.99, bound_seconds=0.0, gap=1.0, status="feasible"), "step"),
    ("bound above step", having(bound_seconds=lambda v: v * 1.5), "bound"),
    ("bound below nothing", having(bound_seconds=-1.0), "bound"),
    ("gap 0 with a lower bound", having(bound_seconds=lambda v: v * 0.5, gap=0.0), "gap"),
    ("gap too large", having(gap=0.5), "gap"),
    ("optimal with a gap", having(bound_seconds=lambda v: v * 0.5, gap=0.5, status="optimal"), "status"),
    ("status", having(status="perfect"), "status"),
    ("start moved", stage(1, first_position=lambda v: v - 1), "recompute"),
    ("start at zero", stage(1, first_position=0), "starts"),
    ("first start", stage(0, first_position=1), "starts"),
    ("start past the end", stage(1, first_position=1000), "starts"),
    ("stage left out", having(stages=lambda s: s[:1]), "starts"),
    ("stages turned", having(stages=lambda s: s[::-1]), "starts"),
    ("recompute told", having(recompute="full"), "recompute"),
    ("recompute of a run", stage(0, recompute=lambda r: ("full", *r[1:])), "recompute"),
    ("recompute of all", stage(1, recompute=lambda r: ("full",) * len(r)), "recompute"),
    ("recompute unknown", stage(0, recompute=lambda r: ("some", *r[1:])), "recompute"),
    ("recompute short", stage(0, recompute=lambda r: r[1:]), "recompute"),
    ("zero", having(zero=4), "zero"),
    ("zero below", having(zero=-1), "zero"),
    ("micro-batch", having(micro_batch=3), "micro-batch"),
    ("micro-batch 0", having(global_batch=6), "micro-batch"),
    ("degrees", having(tp=1), "degrees"),
    ("degrees swapped", having(dp=2, tp=1, request={}), "splits"),
    ("pp", having(pp=4), "degrees"),
    ("schedule", having(schedule="zigzag"), "schedule"),
    ("optimizer", having(optimizer="magic"), "optimizer"),
    ("optimizer without states", having(optimizer="sgd"), "optimizer"),
    ("precision", having(precision="float7"), "precision"),
    ("hash", having(signature=lambda s: replace(s, hash="0" * 16)), "signature"),
    ("parameters of another", having(signature=lambda s: replace(s, parameters={})), "signature"),
    ("operators of another", having(signature=lambda s: replace(s, operators=1)), "signature"),
    ("replicated", having(replicated=("aten.linear",)), "replicated"),
    ("fewer FLOPs", having(forward_flops=lambda v: v * 0.99), "forward_flops"),
    ("sends dropped", stage(0, sends=()), "sends"),
    ("sends less", stage(0, sends=lambda s: tuple((to, n - 1, t) for to, n, t in s)), "sends"),
    ("sends faster", stage(0, sends=lambda s: tuple((to, n, t / 2) for to, n, t in s)), "sends"),
    ("sends elsewhere", stage(0, sends=lambda s: tuple((0, n, t) for _, n, t in s)), "sends"),
    ("segments left out", stage(0, segments=lambda r: r[:-1]), "printed"),
    ("segment cheaper", stage(0, segments=lambda r: (*r[:-1], replace(r[-1], seconds=0.0))), "printed"),
    ("operators left out", stage(0, segments=lambda r: (*r[:-1], replace(r[-1], lines=()))), "printed"),
    ("splits not there", stage(0, splits=7), "splits"),
    ("splits along nothing", having(splits=lambda s: ({}, *s[1:])), "splits"),
    ("strategy left out", split("tp", "/layer_norm", lambda s: None),
     "splits"),
    ("strategy unknown", split("tp", "/layer_norm", lambda s: replace(s, name="nothing")), "strategy"),
    ("partial sum of a norm", split("tp", "/layer_norm", lambda s: replace(s, outputs=(Placement("P"),))), "strategy"),
    ("gathered again what is split", split("tp", ".c_proj/matmul", lambda s: replace(s, inputs=(G, *s.inputs[1:]))),
     "strategy"),
    ("gathered again what nobody split", split("tp", ".ln_f/layer_norm", gathered_again), "strategy"),
    ("parameter summed", split("tp", "wte.weight", lambda s: Strategy("P", (), (Placement("P"),))), "strategy"),
    ("input split", split("tp", "input_ids", lambda s: Strategy("d1", (), (Placement("S", 9),))), "strategy"),
    ("sizes of the mesh", having(mesh=lambda m: replace(m, devices_per_host=8)), "degrees"),
    ("asked otherwise", having(request={"zero": 3}), "zero"),
    ("gathered ahead at level 0", having(prefetch_bytes=2**20), "prefetch"),
]  # fmt: skip


@pytest.mark.parametrize("part", [0.0, 0.9, 1.1])
def test_gradients_that_are_hidden_are_counted(part: float) -> None:
    plan = planned("llama", 4)
    training = Training("adamw", 2, plan.mesh.group(1, 2), plan.micro_batches)
    sizes, device = {n: p.nbytes for n, p in source("llama").model.named_parameters()}, plan.mesh.device
    segments = {name: name.partition("layers.")[2][:1] or name for name in sizes}
    together = {name: sum(sizes[n] for n in sizes if segments[n] == segments[name]) for name in sizes}
    whole = sum(training.sync_seconds(size, True, together[name]) for name, size in sizes.items())
    updates = sum(update_seconds(size, True, True, training, device) for size in sizes.values())
    assert 0 < sum(s.sync_seconds for s in plan.stages) - updates < 0.9 * whole
    changed = stage(0, sync_seconds=lambda v: v * part)(plan)
    assert any("sync_seconds" in text for text in wrong(changed, "llama"))


@pytest.mark.parametrize(("name", "change", "named"), TAMPERED, ids=[t[0] for t in TAMPERED])
def test_what_was_changed_is_found(name: str, change: Change, named: str) -> None:
    found = wrong(change(planned("gpt2", 0)))
    assert any(named in text for text in found), found


class Einsum(nn.Module):
    """Experts as einsums: the first saves a copy of its weight, with the dim that it sums over in front."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 8, 16)), nn.Parameter(torch.randn(4, 16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.einsum("btd,edf->btef", x, self.up).relu()
        return torch.einsum("btef,efd->btd", hidden, self.down).square().mean()


@pytest.mark.parametrize("samples", [6, 12])
def test_what_an_operator_saves_of_its_weight_does_not_grow_with_the_samples(samples: int) -> None:
    """Nor is it shared out over dp."""
    model, batch, saved = Einsum(), {"x": torch.randn(samples, 4, 8)}, {}
    plan = autopart.plan(model, "2:cpu", batch, dp=2, micro_batch=samples, recompute="none")
    autopart.certify(plan, model, batch)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t), id):
        model(batch["x"][: samples // 2].clone())
    there = sum(tensor.untyped_storage().nbytes() for at, tensor in saved.items() if at not in weights)
    assert plan.stages[0].memory["activations"] == there
