"""Batches of a dataset in an order that a seed decides, and batches of many lengths padded to a few."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from on_ranks import on_ranks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import autopart
from autopart.runtime.compiled import Compiled
from autopart.runtime.loader import Loader

WORDS, WIDTH = 11, 8


class Numbers(Dataset[Tensor]):
    """As many numbered samples."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, place: int) -> Tensor:
        return torch.tensor(place)


class Words(nn.Module):
    """Predicts a word from the mean of those before it; a loss over the targets that are not ignored."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        before = self.embed(x).cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return F.cross_entropy(self.head(before).flatten(0, 1), labels.flatten())


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.layer(x).square().mean()
        return loss


def seen(loader: Loader) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_pass_gives_every_sample_once(shuffle: bool) -> None:
    loader, other = (Loader(Numbers(10), 4, 2, shuffle) for _ in range(2))
    passes = [seen(loader) for _ in range(2)]
    assert passes == [seen(other) for _ in range(2)]
    for batches in passes:
        assert [len(batch) for batch in batches] == [4, 4, 2] and len(loader) == 3
        assert sorted(place for batch in batches for place in batch) == list(range(10))
    assert (passes[0] == passes[1]) is not shuffle
    assert (passes[0] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]) is not shuffle


def test_what_fills_no_batch_is_left_out() -> None:
    loader = Loader(Numbers(11), 4, 2, drop_last=True)
    assert [len(batch) for batch in seen(loader)] == [4, 4]
    everything = {place for _ in range(20) for batch in seen(loader) for place in batch}
    assert everything == set(range(11))


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_loader_goes_on_where_it_was_saved(stop: int) -> None:
    straight, first, second = (Loader(Numbers(10), 4, 1, seed=3) for _ in range(3))
    wanted = [batch for _ in range(3) for batch in seen(straight)]
    found = []
    while len(found) < stop:
        for batch in first:
            found.append(batch.tolist())
            if len(found) == stop:
                break
    second.load_state_dict(first.state_dict())
    while second.epoch < 3:
        found += seen(second)
    assert found == wanted


class Drawn(Numbers):
    """Samples are random numbers, as augmentation draws them in a worker."""

    def __getitem__(self, place: int) -> Tensor:
        return torch.rand(())


def test_workers_draw_other_numbers_in_every_pass_and_the_same_on_every_rank() -> None:
    loader, other = (Loader(Drawn(4), 4, 1, num_workers=1) for _ in range(2))
    first, second = seen(loader), seen(loader)
    assert first != second
    assert [first, second] == [seen(other), seen(other)]


def test_another_order_is_refused() -> None:
    state = Loader(Numbers(10), 4, 1).state_dict()
    for other in (Loader(Numbers(12), 4, 1), Loader(Numbers(10), 2, 1), Loader(Numbers(10), 4, 1, seed=1)):
        with pytest.raises(autopart.PartitionError, match="the loader that was saved had"):
            other.load_state_dict(state)


class Endless(IterableDataset[Tensor]):
    """Has no length."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(())


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((Endless(), 4, 1), "a Endless has no length"),
        ((Numbers(3), 4, 1), "batches of 4 samples"),
        ((Numbers(10), 0, 1), "batches of 0 samples"),
        ((Numbers(10), 5, 2), "a batch has 5 samples, which 2 ranks do not divide"),
        ((Numbers(11), 4, 2), "the last batch has 3 samples, which 2 ranks do not divide"),
    ],
)
def test_what_cannot_be_loaded(arguments: Any, what: str) -> None:
    with pytest.raises(autopart.PartitionError, match=what):
        Loader(*arguments)


def test_an_order_of_ones_own_is_refused() -> None:
    with pytest.raises(autopart.PartitionError, match="sampler= is given"):
        Loader(Numbers(4), 2, 1, sampler=[0, 1])


def test_ranks_train_on_the_batches_of_one_process() -> None:
    """With a short last batch, stopped in the middle of the second pass."""
    data = TensorDataset(torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(0)))

    def collate(samples: list[tuple[Tensor]]) -> dict[str, Tensor]:
        return {"x": torch.stack([x for (x,) in samples])}

    alone, losses = Squares(), []
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    loader = Loader(data, 4, 1, collate_fn=collate)
    for batch in (batch for _ in range(2) for batch in loader):
        optimizer.zero_grad()
        loss = alone(**batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))

    def run(compiled: Compiled) -> list[float]:
        compiled.optimizer(torch.optim.SGD, lr=0.1)
        loader, found = compiled.loader(data, collate_fn=collate), []
        for batch in (batch for _ in range(2) for batch in loader):
            found.append(float(compiled.step(batch)))
            if len(found) == 4:
                break
        rest = compiled.loader(data, collate_fn=collate)
        rest.load_state_dict(loader.state_dict())
        return found + [float(compiled.step(batch)) for batch in rest]

    models: list[nn.Module] = [Squares(), Squares()]
    for found in on_ranks(models, torch.zeros(4, WIDTH), run, dp=2, zero=0):
        assert found == pytest.approx(losses, rel=1e-5)


def words(length: int) -> dict[str, Tensor]:
    tokens = torch.randint(0, WORDS, (4, length + 1), generator=torch.Generator().manual_seed(length))
    return {"x": tokens[:, :-1], "labels": tokens[:, 1:]}


def test_padded_batches_have_the_loss_of_what_was_padded() -> None:
    """Batches of five lengths have two forms."""
    compiled = autopart.compile(Words(), "1:cpu", words(6))
    forms = set()
    for length in (3, 4, 6, 7, 9):
        batch = autopart.pad(words(length), (9, 6), {"x": 0, "labels": -100})
        forms.add(batch["x"].shape)
        alone = Words()(**words(length))
        assert float(compiled.evaluate(batch)) == pytest.approx(float(alone.detach()), rel=1e-5)
    assert forms == {(4, 6), (4, 9)}


def test_what_is_not_padded_stays() -> None:
    batch = {**words(5), "weight": torch.ones(4), "classes": torch.ones(4, 5), "name": "a"}
    padded = autopart.pad(batch, [8], {"x": 1, "labels": -100, "classes": None})
    assert padded["x"][:, 5:].eq(1).all() and padded["labels"].shape == (4, 8) and padded["x"].dtype == torch.int64
    assert all(padded[name] is batch[name] for name in ("weight", "classes", "name"))


@pytest.mark.parametrize(
    ("lengths", "values", "what"),
    [
        ([4], {"x": 0, "labels": -100}, "a batch of length 5 is longer than all lengths"),
        ([8], {"x": 0}, "labels is 5 long too, and has no value to pad with"),
        ([8], {"x": 0, "labels": -100, "mask": 0}, "there is no mask to pad"),
        ([8], {"x": 0, "labels": -100, "other": 0}, "what is to be padded has not one length"),
        ([8], {}, "what is to be padded has not one length"),
    ],
)
def test_what_cannot_be_padded(lengths: list[int], values: dict[str, float], what: str) -> None:
    with pytest.raises(autopart.PartitionError, match=what):
        autopart.pad({**words(5), "other": torch.zeros(4, 3)}, lengths, values)
