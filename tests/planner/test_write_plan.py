"""Plans with drawn splits are priced alike as a sum over positions and node by node in the graph of each stage."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopart.cost.liveness import MODES
from autopart.hardware.mesh import Mesh
from autopart.passes.source import Source
from autopart.passes.split_problem import SplitProblem
from autopart.planner.candidate import CandidateSet, Incumbent
from autopart.planner.class_bounds import best_modes
from autopart.planner.request import Request
from autopart.planner.search_space import SearchSpace
from autopart.planner.write_plan import write_out

D, H, EXPERTS = 32, 64, 4
DRAWS = 6


class Experts(nn.Module):
    """A view lies between a value that runs again and the product that saves it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.RMSNorm(D), nn.Linear(D, H, bias=False)
        self.scale = nn.Parameter(torch.ones(H))
        self.down = nn.Parameter(torch.randn(EXPERTS, H, D))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = (torch.tanh(self.up(self.norm(x))) * self.scale).repeat(EXPERTS, 1, 1)
        return x + torch.bmm(y.view(EXPERTS, b * t, H), self.down).sum(0).view(b, t, D)


class Attention(nn.Module):
    """Views lie between attention and the products around it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (F.silu(part).view(b, t, 4, -1).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, D))


class Model(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(block() for _ in range(4)), nn.Linear(D, 16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.mse_loss(self.head(x), y)


@pytest.mark.parametrize("block", [Experts, Attention])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("axes", [{"tp": 2}, {"tp": 4}, {"dp": 2, "tp": 2}, {"pp": 2, "tp": 2}], ids=str)
def test_drawn_splits_are_priced_alike(block: type[nn.Module], mode: str, axes: dict[str, int]) -> None:
    mesh = Mesh.parse(f"{int(np.prod(list(axes.values())))}:h100-80gb")
    batch = {"x": torch.randn(8, 16, D), "y": torch.randn(8, 16, 16)}
    request = Request(8, micro_batch=4, recompute=mode, **{"pp": 1, "dp": 1, "tp": 1, **axes}).check(mesh)
    space = SearchSpace(Source(Model(block), batch, torch.float32).sampled(2, mesh), mesh, request)
    draw = random.Random(f"{block.__name__} {mode} {axes}")
    (point, *_) = space.points()
    size = len(space.objective(point, 0.0, best_modes(space, point, 0.0)[0]))
    chosen = set()
    for _ in range(DRAWS):
        drawn = np.array([draw.expovariate(1.0) for _ in range(size)])
        solution = space.minimise(point, SplitProblem(drawn))
        assert solution is not None
        chosen.add(solution.chosen)
        found = CandidateSet(space, point, Incumbent())
        found.add(solution)
        best = found.best_plan()
        assert best is not None
        step = write_out(space, best, 0.0, "drawn").step_seconds
        assert step == pytest.approx(best.seconds, rel=1e-6) or (point.dp > 1 and step < best.seconds)
    assert len(chosen) > DRAWS // 2
