"""Activations that are whole only while they are used: kept in parts, and gathered again for backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from models import source
from torch import nn

from autopart import Plan, check
from autopart.compile.check import one_process, worst_error
from autopart.compile.programs import emit_stage, stage_graphs
from autopart.compile.simulate import simulate_plan
from autopart.hardware.mesh import Mesh, usable_bytes
from autopart.planner.explain.certificate import findings
from autopart.planner.make_plan import make_plan, request_of
from autopart.runtime import collectives
from autopart.runtime.gathered import DeferredGather
from autopart.sharding.notation import AGAIN

LAYERS, MICRO_BATCHES = 2, 2
TWICE = {"tp": 2, "micro_batch": models.SAMPLES // MICRO_BATCHES}
PRODUCTS = {
    "gpt2": ("*.c_attn/matmul", "*.c_fc/matmul"),
    "llama": ("*.[qkv]_proj/linear", "*.gate_proj/linear", "*.up_proj/linear"),
}


def planned(name: str, behind: str, mesh: str = "2:cpu", **settings: Any) -> Plan:
    """A plan whose first products of attention and of the MLP split columns, with this behind their letter."""
    forced = [f"strategy {product} n{behind} over tp" for product in PRODUCTS[name]]
    model, batch = source(name).model, source(name).batch
    request = request_of(model, batch, constraints=forced, **{**TWICE, **settings})
    return make_plan(source(name), Mesh.parse(mesh), request, to_run=True)


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"recompute": "selective"},
        {"recompute": "mincut"},
        {"recompute": "full"},
        {"pp": 2, "mesh": "4:cpu"},
        {"dp": 2, "zero": 3, "mesh": "4:cpu"},
    ],
    ids=str,
)
def test_it_trains_like_one_process(name: str, settings: dict[str, Any]) -> None:
    """With whatever else is run or gathered again; the certificate knows it."""
    plan = planned(name, AGAIN, **settings)
    layered = source(name).full(plan.micro_batch, plan.mesh)
    emitted = [emit_stage(stage, plan, layered) for stage in stage_graphs(layered, plan)]
    assert all("= all_gather_again(" in text for text in emitted)
    assert not findings(Plan.from_json(plan.to_json()), layered)
    found = simulate_plan(source(name), plan)
    loss, gradients = one_process(deepcopy(source(name).model), source(name).batch)
    assert float(found.loss) == pytest.approx(float(loss), rel=1e-5)
    assert worst_error(found.gradients, gradients)[0] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", PRODUCTS)
def test_it_takes_less_memory_and_more_time(name: str) -> None:
    whole, parts = planned(name, ""), planned(name, AGAIN)
    assert parts.memory_bytes[0] < whole.memory_bytes[0]
    assert parts.step_seconds > whole.step_seconds


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_one_value_share_its_gather(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The input of attention and that of the MLP are gathered twice on each rank, however many products read them."""
    runs: list[Sequence[int]] = []

    class Counted(DeferredGather):
        def __init__(self, count: int, run: Callable[[Sequence[int]], Sequence[torch.Tensor]]) -> None:
            super().__init__(count, lambda some: (runs.append(some), run(some))[1])

    monkeypatch.setattr(collectives, "DeferredGather", Counted)
    simulate_plan(source(name), planned(name, AGAIN))
    assert len(runs) == 2 * (2 * LAYERS) * MICRO_BATCHES * 2


@pytest.mark.slow
def test_it_is_chosen_where_memory_is_short() -> None:
    parts, mesh = planned("gpt2", AGAIN, recompute="none"), Mesh.parse("2:cpu")
    share = usable_bytes(mesh) / mesh.device.memory_bytes
    short = replace(mesh, device=replace(mesh.device, memory_bytes=round(0.93 * parts.memory_bytes[0] / share)))
    request = request_of(source("gpt2").model, source("gpt2").batch, recompute="none", **TWICE)
    found = make_plan(source("gpt2"), short, request)
    assert any(s.name.endswith(AGAIN) for chosen in found.splits for s in chosen["tp"].values())


class Rotations(nn.Linear):
    """A linear layer, and a weight of another dtype or one that is read as complex numbers."""

    def __init__(self, kind: str):
        super().__init__(12, 12)
        self.kind, pairs = kind, torch.randn(6, 6, 2)
        values = {"pairs": pairs, "float64": torch.randn(6, 6).double()}
        self.z = nn.Parameter(values.get(kind, torch.view_as_complex(pairs)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = torch.view_as_complex(self.z) if self.kind == "pairs" else self.z
        h = torch.view_as_complex(super().forward(x).view(-1, 6, 6, 2))
        h = h + h.abs() * z.to(h.dtype) if self.kind == "float64" else h * z
        h = h @ z.mH + h.real * z.conj().imag if self.kind in ("conj", "pairs") else h
        return x + torch.view_as_real(h).flatten(2)


class Rotated(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.layers = nn.ModuleList(Rotations(kind) for _ in range(2))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.mse_loss(x, y)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("kind", ["pairs", "complex", "conj", "float64"])
def test_weights_in_slices_have_their_own_dtypes_and_views(kind: str, recompute: str) -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(8, 6, 12), "y": torch.randn(8, 6, 12)}
    found = check(Rotated(kind), "4:cpu", batch, dp=2, tp=2, zero=3, recompute=recompute)
    assert max(found.loss_error, found.gradient_error) < 1e-5
