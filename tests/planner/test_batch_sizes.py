"""A plan is made from a trace of two samples, of a model's first blocks, and run with any number: models for which that
is another graph."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import autopart

WIDTH, TOKENS = 8, 6


class Recurrent(nn.Module):
    """Its first states, zeros of (layers, samples, width), look like two samples where it has two layers."""

    def __init__(self, kind: type[nn.RNNBase], layers: int = 2) -> None:
        super().__init__()
        self.inner = kind(WIDTH, WIDTH, layers, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Attention(nn.Module):
    """Written by hand; with one sample its products have a dim of one element in front."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) + self.bias(n, tokens)).softmax(-1)
        return self.out((scores @ v).transpose(1, 2).reshape(n, tokens, width))

    def bias(self, n: int, tokens: int) -> Tensor:
        """Nothing."""
        return torch.zeros(())


class Alibi(Attention):
    """As BLOOM: slopes of all heads, copied for every sample."""

    def bias(self, n: int, tokens: int) -> Tensor:
        slopes = torch.pow(0.5, torch.arange(1.0, 1 + self.heads))
        each = slopes[:, None, None] * torch.arange(tokens)[None, None, :]
        return each.repeat(n, 1, 1).view(n, self.heads, 1, tokens)


class Branch(nn.Module):
    """Two models, by the number of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.few, self.many = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.few(x).tanh() if len(x) < 3 else self.many(x).relu()


class Chain(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


PARTS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU, 3),
    "attention": lambda: Attention(2),
    "one head": lambda: Attention(1),
    "alibi": lambda: Alibi(4),
    "branch": Branch,
    "linear": lambda: nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH)),
}


def holds(model: nn.Module, mesh: str, batch: dict[str, Tensor], **settings: int) -> autopart.Plan:
    found = autopart.check(model, mesh, batch, **settings)
    assert found.loss_error < 1e-5 and found.gradient_error < 1e-4, found
    return found.plan


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_every_part(name: str) -> None:
    torch.manual_seed(0)
    model, x = Chain(PARTS[name]()), torch.randn(4, TOKENS, WIDTH)
    plan = autopart.plan(model, "2:cpu", {"x": x})
    autopart.certify(plan, model, {"x": x})
    assert autopart.price_plan(plan, model, {"x": x}).step_seconds == pytest.approx(plan.step_seconds, rel=1e-9)
    holds(model, "2:cpu", {"x": x}, plan=plan)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(8 if "AUTOPART_EXAMPLES" in os.environ else 4))
def test_drawn(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = Chain(*(PARTS[name]() for name in draw.choices(list(PARTS), k=draw.randint(1, 3))))
    samples = draw.choice([1, 2, 3, 4, 5, 6])
    micro = draw.choice([None, *(n for n in range(1, samples + 1) if samples % n == 0)])
    holds(model, draw.choice(["1:cpu", "2:cpu"]), {"x": torch.randn(samples, TOKENS, WIDTH)}, micro_batch=micro)


@pytest.mark.slow
def test_bloom() -> None:
    torch.manual_seed(0)
    config = hf.BloomConfig(n_layer=2, hidden_size=16, n_head=4, vocab_size=32, hidden_dropout=0.0, use_cache=False)
    ids = torch.randint(0, 32, (4, TOKENS))
    holds(hf.BloomForCausalLM(config), "2:cpu", {"input_ids": ids, "labels": ids}, dp=1, tp=1)


@pytest.mark.parametrize("heads", [1, 2])
def test_one_sample_does_not_mix(heads: int) -> None:
    plan = autopart.plan(Chain(Attention(heads)), "2:cpu", {"x": torch.randn(4, TOKENS, WIDTH)}, micro_batch=1)
    assert not any("mixes samples" in note for note in plan.notes), plan.notes


def test_samples_that_mix_are_told_of_one_by_one() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = self.line(x)
            return (x - x.mean(0)).exp().mean()

    plan = autopart.plan(Centred(), "1:cpu", {"x": torch.randn(4, WIDTH)}, micro_batch=1)
    assert any("mixes samples (test_batch_sizes.py" in note for note in plan.notes), plan.notes


@pytest.mark.parametrize(("samples", "degrees"), [(6, {"tp": 2}), (12, {"dp": 2}), (10, {"dp": 1, "tp": 2})], ids=str)
def test_a_batch_that_is_no_power_of_two_may_be_one_micro_batch(samples: int, degrees: dict[str, int]) -> None:
    """Without memory limits or a pipeline one micro-batch is the fastest: the fewest launches and collectives."""
    model, batch = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()), {"input": torch.randn(samples, WIDTH)}
    plan = autopart.plan(model, "2:h100-80gb", batch, loss=lambda output, batch: output.square().mean(), **degrees)
    assert plan.micro_batches == 1
