"""Batches of other sizes, and evaluation: as in one process, over the same weights, under every way to split them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from on_ranks import on_ranks, split_by
from torch import Tensor, nn
from torch.nn import functional as F

import autopart
from autopart.compile.check import worst_error
from autopart.runtime.compiled import Compiled

WIDTH, LENGTH = 8, 6


class Block(nn.Module):
    """Attention with dropout, which is another operator in evaluation mode, and an MLP with dropout."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.p * self.training)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.drop(self.down(F.gelu(self.up(x))))


class Model(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(p) for _ in range(2))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for block in self.blocks:
            y = block(y)
        loss: Tensor = (self.head(y) - x.roll(1, 1)).square().mean()
        return loss


class Returning(Model):
    """Returns a dict with a tensor of a micro-batch's samples, one in the middle of the model, and one beside the
    loss."""

    def forward(self, x: Tensor) -> Any:
        first = self.blocks[0](x)
        logits = self.head(self.blocks[1](first))
        return {"loss": (logits - x.roll(1, 1)).square().mean(), "logits": logits, "hidden": (first, logits * 2)}


class Normed(nn.Module):
    """Batch norm, whose buffers every step updates."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(WIDTH, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.last(self.norm(self.first(x)).relu()).square().mean()
        return loss


SETTINGS: list[dict[str, Any]] = [
    *split_by("blocks.0.up.weight over tp"),
    {"pp": 2, "dp": 2, "zero": 2, "micro_batch": 2},
]
SIZES = [(4, LENGTH), (2, LENGTH), (4, 3), (6, 9), (4, LENGTH)]
"""Samples and length of batches; the first is that of the plan."""


def batch(samples: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(samples * 100 + length)
    return {"x": torch.randn(samples, length, WIDTH, generator=generator)}


def ranks(settings: dict[str, Any]) -> int:
    size: int = settings.get("pp", 1) * settings.get("dp", 1) * settings.get("tp", 1)
    return size


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_batches_of_other_sizes_train_the_same_weights(settings: dict[str, Any]) -> None:
    alone, losses = Model(), []
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    for size in SIZES:
        optimizer.zero_grad()
        loss = alone(**batch(*size))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))

    def run(compiled: Compiled) -> Any:
        compiled.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
        return [float(compiled.step(batch(*size))) for size in SIZES], compiled.full_state_dict()

    models: list[nn.Module] = [Model() for _ in range(ranks(settings))]
    found, state = on_ranks(models, batch(*SIZES[0])["x"], run, same=True, nodes=5, **settings)[0]
    assert found == pytest.approx(losses, rel=1e-5)
    assert worst_error(state, alone.state_dict())[0] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_evaluation_between_steps(settings: dict[str, Any]) -> None:
    """Dropout is off, outputs are whole on rank 0, no weight changes, later steps draw what they would have drawn."""
    models: list[nn.Module] = [Returning(0.3) for _ in range(ranks(settings))]
    evaluations = [*((size, ()) for size in SIZES[:2]), *((size, ("logits", "hidden.0")) for size in SIZES[:3])]

    def run(compiled: Compiled, evaluates: bool) -> Any:
        compiled.optimizer(torch.optim.SGD, lr=0.1)
        losses, evaluated = [], []
        for _ in range(2):
            losses.append(float(compiled.step(batch(*SIZES[0]))))
            if evaluates:
                state = compiled.full_state_dict()
                for size, outputs in evaluations:
                    told = (
                        compiled.evaluate(batch(*size), outputs=outputs) if outputs else compiled.evaluate(batch(*size))
                    )
                    evaluated.append((size, told if outputs else (told, {}), state))
        return losses, evaluated, compiled.full_state_dict()

    x = batch(*SIZES[0])["x"]
    everyone = on_ranks(models, x, lambda c: run(c, True), same=True, nodes=5, **settings)
    losses, evaluated, state = everyone[0]
    same, _, wanted = on_ranks(models, x, lambda c: run(c, False), same=True, nodes=5, **settings)[0]
    assert losses == same
    assert worst_error(state, wanted)[0] == 0
    assert all(module.training for module in models[0].modules())
    assert len(evaluated) == 2 * len(evaluations)
    for size, (loss, outputs), weights in evaluated:
        alone = Returning().eval()
        alone.load_state_dict(weights)
        with torch.no_grad():
            found = alone(**batch(*size))
        assert float(loss) == pytest.approx(float(found["loss"]), rel=1e-5)
        whole = {"logits": found["logits"], "hidden.0": found["hidden"][0]}
        assert worst_error(outputs, {name: whole[name] for name in outputs})[0] < 1e-5
    assert {len(outputs) for _, (_, outputs), _ in evaluated} == {0, 2}
    assert all(outputs == {} for _, evaluated, _ in everyone[1:] for _, (_, outputs), _ in evaluated)


@pytest.mark.parametrize("settings", [{"pp": 1}, {"dp": 2}, {"pp": 2}], ids=str)
def test_running_statistics(settings: dict[str, Any]) -> None:
    """Steps of several sizes update one set of buffers; evaluation reads and does not change them."""
    sizes, alone, wanted = [(4, 1), (2, 1), (4, 1)], Normed(), []
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    batches = [{"x": batch(*size)["x"][:, 0]} for size in sizes]
    for each in batches:
        optimizer.zero_grad()
        loss = alone(**each)
        loss.backward()
        optimizer.step()
        wanted.append((float(loss.detach()), float(copy.deepcopy(alone).eval()(**batches[0]).detach())))

    def run(compiled: Compiled) -> Any:
        compiled.optimizer(torch.optim.SGD, lr=0.1)
        losses = [(float(compiled.step(each)), float(compiled.evaluate(batches[0]))) for each in batches]
        return losses, compiled.full_state_dict()

    models: list[nn.Module] = [Normed() for _ in range(ranks(settings))]
    found, state = on_ranks(models, batches[0]["x"], run, nodes=5, **settings)[0]
    assert [x for pair in found for x in pair] == pytest.approx([x for pair in wanted for x in pair], rel=1e-5)
    numbers, right = ({k: v.double() for k, v in each.items()} for each in (state, alone.state_dict()))
    assert worst_error(numbers, right)[0] < 1e-4


@pytest.mark.parametrize(
    ("name", "what"), [("logit", "returns no tensor 'logit'"), ("hidden.1", "the loss does not come from the output")]
)
def test_outputs_that_cannot_be_returned(name: str, what: str) -> None:
    compiled = autopart.compile(Returning(), "1:cpu", batch(*SIZES[0]), nodes=5)
    with pytest.raises(autopart.PartitionError, match=what):
        compiled.evaluate(batch(*SIZES[0]), outputs=[name])


def test_samples_that_no_ranks_can_share() -> None:
    models: list[nn.Module] = [Model(), Model()]
    with pytest.raises(autopart.PartitionError, match="a batch of 3 samples does not divide") as caught:
        on_ranks(models, batch(4, LENGTH)["x"], lambda c: c.step(batch(3, LENGTH)), nodes=5, dp=2, zero=0)
    assert "2 or 4 samples" in str(caught.value)


def test_shares_of_other_sizes_are_named() -> None:
    models: list[nn.Module] = [Model(), Model()]

    def run(compiled: Compiled) -> None:
        compiled.step(batch(2 - compiled.rank, LENGTH), local=True)

    with pytest.raises(autopart.PartitionError, match="rank 1 got shares of other sizes than rank 0"):
        on_ranks(models, batch(4, LENGTH)["x"], run, nodes=5, dp=2, zero=0)


@pytest.mark.slow
def test_through_compile_with_local_shares() -> None:
    compiled = autopart.compile(Model(0.1), "1:cpu", batch(4, LENGTH), nodes=5)
    compiled.optimizer(torch.optim.SGD, lr=0.1)
    for size in SIZES:
        compiled.step(batch(*size), local=True)
        before = compiled.full_state_dict()
        alone = Model().eval()
        alone.load_state_dict(before)
        assert float(compiled.evaluate(batch(*size))) == pytest.approx(float(alone(**batch(*size))), rel=1e-5)
    with pytest.raises(autopart.PartitionError, match="the batch lacks"):
        compiled.step({})
