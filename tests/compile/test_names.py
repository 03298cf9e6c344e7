"""Names of a model's own parts that emitted code has for something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autopart

pytestmark = pytest.mark.usefixtures("traced_once")

Tensor = torch.Tensor


class Named(nn.Module):
    """Two linear layers, and tensors of given names."""

    def __init__(self, names: list[str], buffers: bool):
        super().__init__()
        self.a, self.b, self.names = nn.Linear(8, 8), nn.Linear(8, 8), names
        for name in names:
            if buffers:
                self.register_buffer(name, torch.randn(8, 8))
            else:
                self.register_parameter(name, nn.Parameter(torch.randn(8, 8)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.b(self.a(x).relu())
        for name in self.names:
            x = x + x.tanh() @ getattr(self, name)
        return F.mse_loss(x, y)


class Lists(nn.Module):
    """Lists of blocks of given names; `kind` is the blocks' class."""

    def __init__(self, names: list[str], kind: str):
        super().__init__()
        self.names = names
        block = type(kind, (_Block,), {})
        for name in names:
            self.add_module(name, nn.ModuleList(block() for _ in range(2)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for name in self.names:
            for block in getattr(self, name):
                x = block(x)
        return F.cross_entropy(x, y.argmax(-1))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(x).tanh() + x


def exact(model: nn.Module, **settings: Any) -> bool:
    batch = {"x": torch.randn(8, 8), "y": torch.randn(8, 8)}
    found = autopart.check(model, "4:cpu", batch, **settings)
    return max(found.loss_error, found.gradient_error, found.buffer_error) < 1e-5


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize(
    "names",
    [["a_weight"], ["a_weight", "a_weight_2"], ["dp", "tp"], ["valid"], ["inputs"], ["sent", "received"], ["device"],
     ["gathers_again", "count_valid"], ["lambda", "class"], ["groups", "name", "weights"]],
    ids="-".join,
)  # fmt: skip
def test_tensors(names: list[str], buffers: bool) -> None:
    torch.manual_seed(0)
    assert exact(Named(names, buffers), dp=2, tp=2)
    assert exact(Named(names, buffers), dp=4, zero=3)


@pytest.mark.parametrize(
    "names",
    [["f"], ["h", "H"], ["inputs"], ["sent"], ["dp"], ["valid"], ["torch", "nn"], ["layer", "groups"]],
    ids="-".join,
)
def test_lists_of_blocks(names: list[str]) -> None:
    torch.manual_seed(0)
    assert exact(Lists(names, "Block"), dp=2, pp=2)
    assert exact(Lists(names, "Block"), dp=4, zero=3)


@pytest.mark.parametrize("kind", ["F", "H", "Groups", "Stage", "torch", "nn", "weight", "range", "class", "Block[8]"])
def test_classes_of_blocks(kind: str) -> None:
    torch.manual_seed(0)
    assert exact(Lists(["h"], kind), dp=4, zero=3)


class OneNorm(nn.Module):
    """Additions in front of a norm that is called twice, so that a fused addition and norm stand alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.q, self.k, self.norm = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24), nn.LayerNorm(24)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.a(x)
        x = x + self.q(self.norm(x)) * self.k(self.norm(x))
        return F.mse_loss(self.norm(x), y)


@pytest.mark.parametrize("settings", [{"pp": 2, "tp": 2}, {"dp": 4, "zero": 3}, {"tp": 4}], ids=str)
def test_an_addition_outside_of_the_module_of_the_norm_that_is_fused_with_it(settings: Any) -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(8, 6, 24), "y": torch.randn(8, 6, 24)}
    found = autopart.check(OneNorm(), "4:cpu", batch, **settings)
    assert max(found.loss_error, found.gradient_error) < 1e-5
