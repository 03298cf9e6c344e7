"""Losses that are means over samples, and losses that are not: both end up those of one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autopart import Simulated
from autopart.compile.check import one_process, worst_error
from autopart.compile.simulate import simulate_plan
from autopart.hardware.mesh import Mesh
from autopart.passes.source import Source
from autopart.planner.make_plan import make_plan
from autopart.planner.request import Request

Tensor = torch.Tensor
Loss = Callable[["Model", Tensor, Tensor], Tensor]
SAMPLES, TOLERANCE = 8, 1e-9
"""Of float64: the gradient of a bias ahead of a batch norm is zero, and in float32 only rounding would be compared."""


class Model(nn.Module):
    """Two layers under a loss."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 6)])
        self.norm = nn.BatchNorm1d(6)
        self.loss = loss

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self, self.layers[1](self.layers[0](x).tanh()), labels)


def made(loss: Loss) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    x, labels = torch.randn(SAMPLES, 6, dtype=torch.float64), torch.randint(0, 6, (SAMPLES,))
    labels[[0, 1, 2, 5]] = -100
    return Model(loss).double(), {"x": x, "labels": labels}


def masked_by_ratio(m: Model, h: Tensor, labels: Tensor) -> Tensor:
    valid = (labels >= 0).to(h.dtype)
    return (h.square().mean(-1) * valid).sum() / valid.sum()


def masked_per_sample(m: Model, h: Tensor, labels: Tensor) -> Tensor:
    valid = (labels >= 0).to(h.dtype)[:, None]
    return (h.square() * valid).mean()


def balanced(m: Model, h: Tensor, labels: Tensor) -> Tensor:
    """A mixture of experts' load-balancing loss, beside another."""
    shares = h.softmax(-1)
    chosen = F.one_hot(shares.argmax(-1), 6).to(h.dtype)
    return h.square().mean() + (chosen.mean(0) * shares.mean(0)).sum()


def top_two(m: Model, h: Tensor, labels: Tensor) -> Tensor:
    return h.topk(2, -1).values.square().mean()


LOSSES: dict[str, tuple[Loss, bool]] = {
    "mean": (lambda m, h, y: h.square().mean(), True),
    "sum by a literal": (lambda m, h, y: h.square().sum() / 48, False),
    "sum": (lambda m, h, y: h.square().sum(), False),
    "mean and sum": (lambda m, h, y: h.square().mean() + h.sum(), False),
    "two means": (lambda m, h, y: h.square().mean() + 3 * h.abs().mean() - 1, True),
    "one less": (lambda m, h, y: 1 - h.square().mean(), True),
    "one less sum": (lambda m, h, y: 1 - h.sum(), False),
    "regularised": (lambda m, h, y: h.square().mean() + 0.1 * m.layers[0].weight.square().sum(), True),
    "by a weight": (lambda m, h, y: h.square().mean() / m.layers[0].weight.square().sum(), True),
    "root of a mean": (lambda m, h, y: h.square().mean().sqrt(), False),
    "mean of roots": (lambda m, h, y: h.square().mean(-1).sqrt().mean(), True),
    "product of means": (lambda m, h, y: h.square().mean() * h.abs().mean(), False),
    "masked by ratio": (masked_by_ratio, False),
    "masked per sample": (masked_per_sample, True),
    "batch norm": (lambda m, h, y: m.norm(h).square().mean() + m.norm(h).relu().mean(), False),
    "sort over the batch": (lambda m, h, y: (h.sort(0).values * torch.arange(len(h))[:, None]).mean(), False),
    "sort in samples": (lambda m, h, y: (h.sort(-1).values * torch.arange(6)).mean(), True),
    "top two": (top_two, True),
    "cross-entropy": (lambda m, h, y: F.cross_entropy(h, y), True),
    "summed cross-entropy": (lambda m, h, y: F.cross_entropy(h, y, reduction="sum"), False),
    "cross-entropy and mean": (lambda m, h, y: F.cross_entropy(h, y) + 0.1 * h.square().mean(), True),
    "balanced": (balanced, False),
    "cumulated": (lambda m, h, y: h.cumsum(0).square().mean(), False),
    "cumulated in samples": (lambda m, h, y: h.cumsum(-1).square().mean(), True),
    "centred": (lambda m, h, y: (h - h.mean(0) / 2).square().mean(), False),
    "the largest": (lambda m, h, y: h.amax(), False),
    "of pairs": (lambda m, h, y: (h @ h.t()).square().mean(), False),
    "log of summed": (lambda m, h, y: h.square().sum(0).log().mean(), False),
}
MIXING = [name for name, (_, mean) in LOSSES.items() if not mean]


@lru_cache
def source(name: str) -> Source:
    """The model with this loss, whose traces are kept."""
    return Source(*made(LOSSES[name][0]), torch.float64)


def step(name: str, ranks: int, **settings: int) -> Simulated:
    plan = make_plan(source(name), Mesh.of(f"{ranks}:cpu"), Request(SAMPLES, precision="float64", **settings))
    return simulate_plan(source(name), plan)


def assert_as_one_process(name: str, found: Simulated) -> None:
    loss, gradients = one_process(*made(LOSSES[name][0]))
    assert float(found.loss) == pytest.approx(float(loss), rel=TOLERANCE)
    error, worst = worst_error(found.gradients, gradients)
    assert error < TOLERANCE, worst


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_known_for_a_mean(name: str) -> None:
    traced = source(name).full(2, Mesh.of("2:cpu")).traced
    assert traced.mean_of_samples == LOSSES[name][1], traced.mixed_at
    assert traced.mixed_at == "" or traced.mixed_at.startswith("test_means.py:")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("axis", ["pp", "dp"])
def test_a_plan_left_free_trains_as_one_process(name: str, axis: str) -> None:
    found = step(name, 2, **{axis: 2})
    assert_as_one_process(name, found)
    assert LOSSES[name][1] or found.plan.micro_batches == 1
    assert not any("mixes samples" in note for note in found.plan.notes)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in MIXING])
def test_a_mean_survives_micro_batches(name: str) -> None:
    found = step(name, 2, pp=2, micro_batch=2)
    assert_as_one_process(name, found)
    assert found.plan.micro_batches == 4 and not found.plan.notes


@pytest.mark.parametrize("name", MIXING)
def test_micro_batches_of_a_mixing_loss_are_told(name: str) -> None:
    """The loss is then the mean of theirs, which the note says."""
    found = step(name, 2, pp=2, micro_batch=4)
    note, *others = found.plan.notes
    assert ["once in every micro-batch, 2 times a step" in other for other in others] == [True] * (name == "batch norm")
    assert "mixes samples (test_means.py:" in note and "mean of 2 micro-batches' losses" in note
    model, batch = made(LOSSES[name][0])
    halves = [one_process(model, {k: v[i : i + 4] for k, v in batch.items()}) for i in (0, 4)]
    assert float(found.loss) == pytest.approx(sum(float(loss) for loss, _ in halves) / 2, rel=TOLERANCE)


@pytest.mark.parametrize("name", ["cross-entropy", "regularised"])
def test_micro_batches_are_split_over_both_axes(name: str) -> None:
    assert_as_one_process(name, step(name, 4, pp=2, dp=2, micro_batch=4))
