"""What a step refuses: a batch of another form than the traced one, another training mode, autocast around it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autopart
from autopart import PartitionError

Tensor = torch.Tensor


class Model(nn.Module):
    """Two layers under a loss with weights for rows, a divisor, and perhaps dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.dropout = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(dropout)

    def forward(self, x: Tensor, weights: Tensor | None = None, divisor: float | None = None) -> Tensor:
        y = self.b(self.dropout(self.a(x).relu())).square()
        y = F.dropout(y, 0.0, self.training)
        y = y if weights is None else y * weights[:, None]
        return y.mean() / (divisor or 1.0)


def batch(**more: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    return {"x": torch.randn(4, 8), **more}


def compiled(model: nn.Module | None = None, **more: Any) -> autopart.Compiled:
    return autopart.compile(model or Model(), "1:cpu", batch(**more), nodes=5)


WEIGHTS = torch.tensor([1.0, 2.0, 3.0, 4.0])
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a key more": ({}, {"weights": WEIGHTS}, "the batch has 'weights', which the batch at compile had not"),
    "a key less": ({"weights": WEIGHTS}, {}, "the batch lacks 'weights', which the batch at compile had"),
    "a key that became None": ({"weights": WEIGHTS}, {"weights": None}, "the batch lacks 'weights'"),
    "a number more": ({}, {"divisor": 2.0}, "the batch has 'divisor'"),
    "a number less": ({"divisor": 2.0}, {}, "the batch lacks 'divisor'"),
    "another number": ({"divisor": 2.0}, {"divisor": 3.0}, r"batch\['divisor'\] is 3.0, and was 2.0 at compile"),
    "a tensor for a number": ({"divisor": 2.0}, {"divisor": torch.tensor(2.0)}, r"batch\['divisor'\] is tensor"),
    "another dtype": ({"weights": WEIGHTS}, {"weights": WEIGHTS.int()}, "is torch.int32, and was torch.float32"),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_batch_of_another_form(name: str) -> None:
    before, now, told = FORMS[name]
    program = compiled(**before)
    program.step(batch(**before))
    with pytest.raises(PartitionError, match=told) as caught:
        program.step(batch(**now))
    assert caught.value.why and caught.value.try_


def test_none_is_as_good_as_absent() -> None:
    program = compiled(weights=None)
    assert program.step(batch()) == program.step(batch(divisor=None, weights=None))


def test_dropout_that_was_off_at_compile() -> None:
    model = Model(dropout=0.5).eval()
    program = compiled(model)
    program.step(batch())
    model.train()
    with pytest.raises(PartitionError, match="changed to training mode after compile"):
        program.step(batch())
    model.eval()
    program.step(batch())


def test_one_module_frozen_after_compile() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    wrapped = Wrapped(model)
    program = autopart.compile(wrapped, "1:cpu", batch(), nodes=5)
    model[1].eval()
    with pytest.raises(PartitionError, match=r"^inner\.1 changed to evaluation mode"):
        program.step(batch())


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.inner(x).square().mean()
        return loss


def test_a_mode_that_changes_nothing_is_accepted() -> None:
    model = Model(dropout=0.0).eval()
    program = compiled(model)
    loss = program.step(batch())
    model.train()
    assert program.step(batch()) == loss
    assert program.mode.modes == [True] * 4


@pytest.mark.parametrize("step", [0, 1])
def test_autocast_around_any_step(step: int) -> None:
    program = compiled()
    for _ in range(step):
        program.step(batch())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(PartitionError, match="autocast is on around a step"):
        program.step(batch())


def two(m: Model, x: Tensor) -> Any:
    return m.a(x).square().mean(), m.b(x).square().mean()


def parts_first(m: Model, x: Tensor) -> Any:
    one, other = two(m, x)
    return {"one": one, "total": one + other}


def named(m: Model, x: Tensor) -> Any:
    one, other = two(m, x)
    return {"other": other, "loss": one}


def parts_last(m: Model, x: Tensor) -> Any:
    one, other = two(m, x)
    return one + other, one, other


def logged(m: Model, x: Tensor) -> Any:
    one, other = two(m, x)
    return {"loss": one, "perplexity": one.exp(), "other": other.detach(), "count": (m.a(x) > 0).float().mean()}


class Returns(Model):
    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor) -> Any:
        return self.outputs(self, x)


@pytest.mark.parametrize("outputs", [two, parts_first, named])
def test_a_second_loss_is_told(outputs: Any) -> None:
    with pytest.warns(UserWarning, match=r"other scalars with gradients \(test_guards.py:\d+.*only the loss") as caught:
        compiled(Returns(outputs))
    assert caught[0].filename == __file__


@pytest.mark.parametrize("outputs", [parts_last, logged])
def test_what_is_part_of_the_loss_or_only_logged_is_not_told(outputs: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(Returns(outputs))


def test_notes_of_the_plan_are_warnings() -> None:
    model = Wrapped(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    with pytest.warns(UserWarning, match="the loss mixes samples"):
        made = autopart.compile(model, "1:cpu", batch(), micro_batch=2, nodes=5)
    assert made.plan.notes
