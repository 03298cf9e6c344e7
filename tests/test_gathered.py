"""Activations that are whole only while they are used: kept in parts, and gathered again for backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import models
import pytest
import torch

import autopart
from autopart import Plan
from autopart.compile import sources
from autopart.mesh import Mesh
from autopart.notation import AGAIN
from autopart.plan import usable_bytes
from autopart.runtime import collectives
from autopart.runtime.gathered import Gather

LAYERS, MICRO_BATCHES = 2, 2
TWICE = {"tp": 2, "micro_batch": models.SAMPLES // MICRO_BATCHES}
PRODUCTS = {
    "gpt2": ("*.c_attn/matmul", "*.c_fc/matmul"),
    "llama": ("*.[qkv]_proj/linear", "*.gate_proj/linear", "*.up_proj/linear"),
}


def planned(name: str, behind: str, mesh: str = "2:cpu", **settings: Any) -> Plan:
    """A plan whose first products of attention and of the MLP split columns, with this behind their letter."""
    forced = [f"strategy {product} n{behind} over tp" for product in PRODUCTS[name]]
    batch = models.batch_for(name, torch.float32)
    return autopart.plan(models.MODELS[name](LAYERS), mesh, batch, constraints=forced, **{**TWICE, **settings})


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"recompute": "selective"},
        {"recompute": "full"},
        {"pp": 2, "mesh": "4:cpu"},
        {"dp": 2, "zero": 3, "mesh": "4:cpu"},
    ],
    ids=str,
)
def test_it_trains_like_one_process(name: str, settings: dict[str, Any]) -> None:
    """With whatever else is run or gathered again; the certificate knows it."""
    plan, model = planned(name, AGAIN, **settings), models.MODELS[name](LAYERS)
    batch = models.batch_for(name, torch.float32)
    assert all("= gather_again(" in text for text in sources(model, batch, plan))
    found = autopart.check(model, plan.mesh, batch, plan=plan)
    assert max(found.loss_error, found.gradient_error) < 1e-5
    autopart.certify(Plan.from_json(plan.to_json()), model, batch)


@pytest.mark.parametrize("name", PRODUCTS)
def test_it_takes_less_memory_and_more_time(name: str) -> None:
    whole, parts = planned(name, ""), planned(name, AGAIN)
    assert parts.memory_bytes[0] < whole.memory_bytes[0]
    assert parts.step_seconds > whole.step_seconds


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_one_value_share_its_gather(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The input of attention and that of the MLP are gathered twice on each rank, however many products read them."""
    runs: list[Sequence[int]] = []

    class Counted(Gather):
        def __init__(self, count: int, run: Callable[[Sequence[int]], Sequence[torch.Tensor]]) -> None:
            super().__init__(count, lambda some: (runs.append(some), run(some))[1])

    monkeypatch.setattr(collectives, "Gather", Counted)
    batch = models.batch_for(name, torch.float32)
    autopart.simulate(models.MODELS[name](LAYERS), "2:cpu", batch, plan=planned(name, AGAIN))
    assert len(runs) == 2 * (2 * LAYERS) * MICRO_BATCHES * 2


def test_it_is_chosen_where_memory_is_short() -> None:
    parts, mesh = planned("gpt2", AGAIN, recompute="none"), Mesh.parse("2:cpu")
    share = usable_bytes(mesh) / mesh.device.memory_bytes
    short = replace(mesh, device=replace(mesh.device, memory_bytes=round(0.93 * parts.memory_bytes[0] / share)))
    batch = models.batch_for("gpt2", torch.float32)
    found = autopart.plan(models.MODELS["gpt2"](LAYERS), short, batch, recompute="none", **TWICE)
    assert any(s.name.endswith(AGAIN) for chosen in found.splits for s in chosen["tp"].values())
