"""GPT-X: its numbers, the cut by parameters, and two tensors over a cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import autopart
from benchmarks.models.gptx import GPTX, Config

pytestmark = pytest.mark.usefixtures("traced_once")

RECIPE = {"macaron": True, "residual_attention": True, "alibi": True}
SMALL = {"vocabulary": 66, "tokens": 12, "width": 32, "layers": 4, "heads": 4, "top_k": 3}
HALF_AND_MASTER = {"precision": "float16", "master": "float32"}


def published(**switches: bool) -> tuple[GPTX, dict[str, torch.Tensor]]:
    """The model of its own size on meta, and two samples."""
    with torch.device("meta"):
        model = GPTX(Config(**switches))
    tokens = torch.zeros(2, 1024, dtype=torch.long)
    return model, {"input_ids": tokens, "labels": tokens}


@pytest.mark.slow
def test_its_parameters_and_its_cut_are_those_that_were_published() -> None:
    model, batch = published()
    assert sum(p.numel() for p in model.parameters()) == 1_099_214_888
    plan = autopart.plan(model, "2:v100-16gb", batch, pp=2, constraints=["cuts=parameters"], **HALF_AND_MASTER)
    labels = [[label for segment in stage.segments for label in segment.labels if label] for stage in plan.stages]
    assert labels[0][-1] == "layers.9" and labels[1] == [*(f"layers.{i}" for i in range(10, 20)), "norm", "head"]
    parts = [*(f"layers.{i}" for i in range(10)), "embedding"]
    first = sum(p.numel() for name in parts for p in model.get_submodule(name).parameters())
    assert (first, 1_099_214_888 - first) == (550_653_972, 548_560_916)
    assert max(plan.memory_bytes) < 16e9


@pytest.mark.slow
def test_the_recipe_has_two_tensors_over_a_cut() -> None:
    model, batch = published(**RECIPE)
    plan = autopart.plan(model, "2:v100-16gb", batch, pp=2, constraints=["cuts=parameters"], **HALF_AND_MASTER)
    states, scores = 1024 * 2048 * 2, 16 * 1024 * 1024 * 2
    assert [(stage, size) for stage, size, _ in plan.stages[0].sends] == [(1, plan.micro_batch * (states + scores))]


@pytest.mark.slow
@pytest.mark.parametrize("switches", [{}, RECIPE], ids=["as it was", "recipe"])
@pytest.mark.parametrize("settings", [{"tp": 2, "pp": 2}, {"dp": 2, "pp": 2, "zero": 1}, {}], ids=str)
def test_gradients_are_those_of_one_process(switches: dict[str, bool], settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = GPTX(Config(**SMALL, **switches)).double()
    for name, parameter in model.named_parameters():
        if "gate" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1)
    tokens = torch.randint(SMALL["vocabulary"], (4, SMALL["tokens"]))
    found = autopart.check(model, "4:cpu", {"input_ids": tokens, "labels": tokens}, **settings)
    assert found.loss_error < 1e-12 and found.gradient_error < 1e-12
