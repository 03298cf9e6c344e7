"""Batches of a dataset in an order that depends on nothing but a seed, so that a training goes on where it stopped."""

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from autopart.errors import PartitionError


class Loader:
    """Whole batches of a dataset, the same on every rank and under every plan.

    epoch  passes over the dataset that are complete
    done   batches that this pass has given

    A loop over it gives the rest of a pass. `state_dict` is where it stands, for `extra` of `Compiled.save`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        ranks: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        **settings: Any,
    ) -> None:
        """
        batch_size  samples of a batch, over all ranks
        ranks       that split the samples of a batch
        drop_last   whether the samples that fill no batch are left out
        settings    of torch's DataLoader

        Raises PartitionError for a dataset without a length, and where a batch does not divide by `ranks`.
        """
        if not isinstance(dataset, Sized):
            raise PartitionError(
                f"a {type(dataset).__name__} has no length",
                "batches are drawn by their places in the dataset",
                "a loop of your own: compiled.step(batch) with the same whole batch on every rank",
            )
        if not 0 < batch_size <= len(dataset):
            raise PartitionError(f"batches of {batch_size} samples", f"the dataset has {len(dataset)}")
        if taken := settings.keys() & {"sampler", "batch_sampler", "generator"}:
            raise PartitionError(f"{min(taken)}= is given", "the order of the samples is that of `shuffle` and `seed`")
        last = 0 if drop_last else len(dataset) % batch_size
        for which, samples in (("a", batch_size), ("the last", last)):
            if samples % ranks:
                raise PartitionError(
                    f"{which} batch has {samples} samples, which {ranks} ranks do not divide",
                    f"{len(dataset)} samples in batches of {batch_size}",
                    "drop_last=True" if samples == last else f"a batch_size that {ranks} divides",
                )
        self.dataset, self.batch_size, self.shuffle, self.seed = dataset, batch_size, shuffle, seed
        self.total = len(dataset)
        self.samples = self.total - (self.total % batch_size if drop_last else 0)
        self.settings = settings
        self.epoch = self.done = 0

    def __len__(self) -> int:
        """Batches of a pass."""
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        rest = self._batches()[self.done :]
        generator = torch.Generator().manual_seed(self.seed + self.epoch)  # of what workers draw
        for batch in DataLoader(self.dataset, batch_sampler=rest, generator=generator, **self.settings):
            self.done += 1
            yield batch
        self.epoch, self.done = self.epoch + 1, 0

    def _batches(self) -> list[list[int]]:
        """The samples of every batch of this pass, by their places in the dataset."""
        drawn = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.total, generator=drawn) if self.shuffle else torch.arange(self.total)
        return [part.tolist() for part in order[: self.samples].split(self.batch_size)]

    def state_dict(self) -> dict[str, int]:
        """The place in the data, and what the order depends on."""
        return {"epoch": self.epoch, "done": self.done, **self._order()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a place in the data. Raises PartitionError where the order was another one."""
        for name, value in self._order().items():
            if state[name] != value:
                raise PartitionError(
                    f"the loader that was saved had {name} {state[name]}, this one has {value}",
                    "its batches would be other samples",
                    "the same dataset, batch_size, shuffle and seed",
                )
        self.epoch, self.done = state["epoch"], state["done"]

    def _order(self) -> dict[str, int]:
        order = {"samples": self.samples, "dataset": self.total, "batch_size": self.batch_size}
        return {**order, "shuffle": int(self.shuffle), "seed": self.seed}
