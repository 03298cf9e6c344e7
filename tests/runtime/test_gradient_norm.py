"""Gradients clipped by the norm of the whole model: as torch does in one process, under every way to split it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from on_ranks import on_ranks
from tied_model import TiedModel as Model
from torch import Tensor, nn

import autopart
from autopart.compile.check import one_process, worst_error
from autopart.runtime.compiled import Compiled

LR, STEPS = 0.5, 2


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
SETTINGS: list[dict[str, Any]] = [
    {"pp": 1},
    {"tp": 2, "constraints": ["split first.weight dim 0 over tp"]},
    {"pp": 2},
    *({"dp": 2, "zero": zero} for zero in range(4)),
    {"dp": 2, "zero": 0, "master": "float64"},
    {"dp": 2, "zero": 3, "master": "float64"},
    {"pp": 2, "dp": 2, "zero": 1, "micro_batch": 2},
]


def in_one_process(max_norm: float) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """The norms of the steps, the last gradients as clipped, and the state after the steps."""
    model, norms = Model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for _ in range(STEPS):
        one_process(model, {"x": X})
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
        optimizer.step()
    return norms, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, model.state_dict()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("max_norm", [0.01, 1e3])
def test_clipped_as_in_one_process(settings: dict[str, Any], max_norm: float) -> None:
    def run(compiled: Compiled) -> Any:
        compiled.optimizer(torch.optim.SGD, lr=LR)
        norms = []
        for _ in range(STEPS):
            compiled.step({"x": X}, clip_grad_norm=max_norm)
            norms.append(float(compiled.grad_norm))
        return norms, compiled.full_gradients(), compiled.full_state_dict()

    ranks = settings.get("pp", 1) * settings.get("dp", 1) * settings.get("tp", 1)
    found = on_ranks([Model()] * ranks, X, run, nodes=5, **settings)
    norms, gradients, state = in_one_process(max_norm)
    for each in found:
        assert each[0] == pytest.approx(norms, rel=1e-5)
    assert worst_error(found[0][1], gradients)[0] < 1e-5
    assert worst_error(found[0][2], state)[0] < 1e-5
    assert (norms[0] > max_norm) == (max_norm == 0.01)


def test_clipping_is_of_one_step_and_a_norm_is_positive() -> None:
    compiled = autopart.compile(Model(), "1:cpu", {"x": X}, nodes=5)
    compiled.step({"x": X}, clip_grad_norm=0.01)
    clipped = copy.deepcopy(compiled.full_gradients())
    compiled.step({"x": X})
    assert compiled.grad_norm is None
    assert worst_error(compiled.full_gradients(), clipped)[0] > 1
    with pytest.raises(autopart.PartitionError, match="clip_grad_norm=0 is not positive"):
        compiled.step({"x": X}, clip_grad_norm=0)
