"""Models as users write them, of sizes drawn at random, train split as they do on one process.

They are those of benchmarks/coverage/handwritten.py whose operators transformers' models do not have: complex numbers,
recurrent cells, norms of weights, buffers that are written and never read.
`python -m benchmarks.coverage.zoo --outside` tries more.
"""

from __future__ import annotations

import pytest
import torch

import autopart
from benchmarks.coverage.exactness import TOLERANCE, error_of, verdict
from benchmarks.coverage.handwritten import MODELS, build

NAMES = """cells distilled fourier_mixer fourier_operator implicit_field kolmogorov_arnold recommender residual_mlp
    spectral_norm transcriber weight_norm""".split()


@pytest.mark.parametrize("name", NAMES)
def test_a_model_trains_split(name: str) -> None:
    model, batch = build(name)
    found = autopart.check(model, "4:cpu", batch, tp=2, pp=2)
    assert error_of(found)[0] <= TOLERANCE
    assert found.plan.tp == found.plan.pp == 2 and not found.plan.replicated


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fourier_operator", "graph_attention"])
def test_the_planner_decides(name: str) -> None:
    model, batch = build(name, seed=1)
    assert verdict(model, "2:cpu", batch)[0] == "exact"


def test_sizes_are_drawn() -> None:
    sizes = {tuple(p.shape for p in build("lstm", seed)[0].parameters()) for seed in range(8)}
    assert len(sizes) > 4 and len(MODELS) >= 20


class Scaled(torch.nn.Module):
    """A parameter of one element that becomes a scalar in four ways."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.gain = torch.nn.Linear(8, 8), torch.nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gains = self.gain.reshape(()) * self.gain.view([]) * self.gain.squeeze() * self.gain.sum().permute([])
        return (self.line(x) * gains.expand([])).square().mean()


def test_a_scalar_of_a_parameter() -> None:
    assert verdict(Scaled(), "2:cpu", {"x": torch.randn(4, 8)}, tp=2)[0] == "exact"


class Coded(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.code = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.rfft(self.code(x)).abs().mean()


def test_a_name_that_torch_cannot_trace_is_told() -> None:
    with pytest.raises(autopart.PartitionError, match="attribute of the model that is called 'code'"):
        autopart.plan(Coded(), "2:cpu", {"x": torch.randn(4, 8)})


class Spelled(torch.nn.Module):
    """Operators whose emitted call has arguments that are seldom given."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.rows, self.mode = torch.nn.Embedding(8, 8, padding_idx=1, scale_grad_by_freq=True), mode
        self.line = torch.nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        value = 0.5 if self.mode == "constant" else None
        padded = torch.nn.functional.pad(self.rows(ids), (2, 1), self.mode, value)
        return self.line(padded[..., :8]).square().mean()


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_emitted_calls_have_all_arguments(mode: str) -> None:
    assert verdict(Spelled(mode), "2:cpu", {"ids": torch.randint(3, (4, 6))}, tp=2, micro_batch=4)[0] == "exact"


class Recurrent(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0].square().mean()


def test_a_degree_that_splits_nothing_is_not_advised() -> None:
    with pytest.raises(autopart.PartitionError, match="tp=2 splits nothing") as caught:
        autopart.plan(Recurrent(), "2:cpu", {"x": torch.randn(4, 6, 8)}, tp=2)
    assert "tp=2" not in caught.value.try_
