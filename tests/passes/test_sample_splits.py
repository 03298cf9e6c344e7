"""Of the strategies along dp, those that are left out are of no use."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor, nn

from autopart.hardware.mesh import Mesh
from autopart.ir.layered_graph import LayeredGraph
from autopart.passes import sample_splits, value_positions
from autopart.passes.formulate import formulate
from autopart.passes.source import Source
from autopart.planner.request import Request
from autopart.planner.search_space import SearchSpace

MESH = Mesh.parse("1x4:h100-80gb")
SAMPLES = 8


class Model(nn.Module):
    """Two convolutions with batch norm, or with another norm, and a classifier."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1)
        self.one, self.two, self.head = norm(8), norm(8), nn.Linear(8, 4)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        y = self.one(self.first(x)).relu()
        y = self.two(self.second(y))
        return nn.functional.cross_entropy(self.head(self.pool(y.relu()).flatten(1)), labels)


class OverSamples(nn.Module):
    """Divides by the size of all samples, of which every sample's gradient is a part."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean((0, 2, 3), keepdim=True) + 0.1).rsqrt() * self.weight


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch norm": nn.BatchNorm2d,
    "its own": OverSamples,
    "group norm": lambda channels: nn.GroupNorm(2, channels),
}


def traced(norm: str) -> LayeredGraph:
    batch = {"x": torch.randn(SAMPLES, 4, 8, 8), "labels": torch.zeros(SAMPLES, dtype=torch.long)}
    return Source(Model(NORMS[norm]).train(), batch, torch.float32).full(SAMPLES, MESH)


def kinds(layered: LayeredGraph, operator: str) -> list[str]:
    """The kinds of placement along dp that an operator's results may have, in every place of the operator."""
    nodes = [n for n in formulate(layered, MESH.device, 1).nodes if n.key.rpartition("/")[2].startswith(operator)]
    return ["".join(sorted({node.given(o)[0].kind for o in range(len(node.options))})) for node in nodes]


def test_between_two_batch_norms_values_are_whole() -> None:
    """Behind the last one the loss asks for a split of samples."""
    assert kinds(traced("batch norm"), "relu") == ["R", "S"]


def test_statistics_over_samples_are_partial_sums_with_partial_gradients() -> None:
    """They are read whole by operators that split samples."""
    layered = traced("its own")
    assert set(kinds(layered, "relu")) == {"S"}
    assert set(kinds(layered, "rsqrt")) == {"CR"}
    assert set(kinds(layered, "mean")) >= {"P"}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("tp", [1, 2])
def test_no_choice_is_better_with_the_others(norm: str, tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds of all points are those of a table with every strategy."""
    layered = traced(norm)

    def found() -> tuple[int, dict[object, float]]:
        monkeypatch.setattr(value_positions, "_KNOWN", WeakKeyDictionary())
        space = SearchSpace(layered, MESH, Request(global_batch=SAMPLES, tp=tp, precision="float32").check(MESH))
        points = list(space.points())
        table = space.model(points[0]).table
        return sum(len(node.options) for node in table.nodes), {point: space.lp_bound(point) for point in points}

    fewer, bounds = found()
    monkeypatch.setattr(sample_splits, "_kept", lambda every, *_: every)
    more, others = found()
    assert bounds == pytest.approx(others, rel=1e-6)
    assert (fewer < more) == (norm == "batch norm")
