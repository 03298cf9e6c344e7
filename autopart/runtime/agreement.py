"""What all ranks must have alike: the model's weights and the rows of a batch. Checksums are compared first."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from autopart.errors import PartitionError, few
from autopart.runtime.process_group import Group

Tensor = torch.Tensor
FIRST_STEPS, EVERY = 10, 100
"""Batches are compared in the first steps, then once in so many."""


def checksum(tensor: Tensor, start: int = 0) -> int:
    """The CRC-32 of a tensor's bytes, continued from `start`."""
    return zlib.crc32(_bytes(tensor.detach().cpu().contiguous()).numpy().data, start)


def rank_zero_values(tensors: Mapping[str, Tensor], host: Group) -> Iterator[tuple[str, Tensor]]:
    """Names and rank 0's values, on the CPU, of those tensors of which any rank has another value. Every rank must call
    it with the same names and shapes, and take all."""
    if host.size == 1:
        return
    names = sorted(tensors)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        sums = torch.tensor(list(pool.map(lambda name: checksum(tensors[name]), names)), dtype=torch.int64)
    everyone = torch.stack(host.all_gather(sums))
    for name in (name for name, differs in zip(names, (everyone != everyone[0]).any(0), strict=True) if differs):
        mine = tensors[name].detach()
        value = mine.cpu().contiguous() if host.rank == 0 else torch.empty(mine.shape, dtype=mine.dtype)
        host.broadcast(_bytes(value), 0)
        yield name, value


def compares(step: int) -> bool:
    """Whether ranks compare their batches in this step."""
    return step < FIRST_STEPS or step % EVERY == 0


def check_rows(batch: Mapping[str, Any], local: bool, share: int, host: Group) -> None:
    """Raise PartitionError on every rank where ranks that must be given the same rows were given others.

    local  whether ranks of the same `share` must be given the same rows, not all ranks
    """
    if host.size == 1:
        return
    rows = 0
    for name in sorted(k for k, v in batch.items() if isinstance(v, Tensor)):
        rows = checksum(batch[name], rows)
    found = [each.tolist() for each in host.all_gather(torch.tensor([share * local, rows]))]
    first: dict[int, int] = {}
    for rank, (place, _) in enumerate(found):
        first.setdefault(place, rank)
    others = [rank for rank, (place, rows) in enumerate(found) if rows != found[first[place]][1]]
    if not others:
        return
    which = f"{'rank' if len(others) == 1 else 'ranks'} {few([str(rank) for rank in others])}"
    model = first[found[others[0]][0]]
    if local:
        raise PartitionError(
            f"{which} got other rows than rank {model}, which has the same data_rank",
            "with local=True the ranks of one data_rank take the same share of the batch",
            "DistributedSampler(dataset, compiled.data_ranks, compiled.data_rank)",
        )
    raise PartitionError(
        f"{which} got other rows than rank {model}",
        "step(batch) takes the whole batch on every rank, and each rank trains on its part of it",
        "one order of samples on all ranks, without DistributedSampler; or step(share, local=True) with the share of "
        "compiled.data_rank",
    )


def _bytes(contiguous: Tensor) -> Tensor:
    """A contiguous tensor's memory."""
    return contiguous.view(-1).view(torch.uint8)
