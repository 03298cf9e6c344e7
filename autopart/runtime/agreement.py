"""What all ranks must have alike: the model's weights and the rows of a batch. Checksums are compared first."""

import json
import pickle
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from autopart.errors import PartitionError, few
from autopart.runtime.process_group import Group

FIRST_STEPS, EVERY = 10, 100
"""Batches are compared in the first steps, then once in so many."""


def checksum(tensor: Tensor, start: int = 0) -> int:
    """The CRC-32 of a tensor's bytes, continued from `start`."""
    return zlib.crc32(bytes_of(tensor.detach().cpu().contiguous()).numpy().data, start)


def rank_zero_values(tensors: Mapping[str, Tensor], host: Group) -> Iterator[tuple[str, Tensor]]:
    """Names and rank 0's values, on the CPU, of those tensors of which any rank has another value. Every rank must call
    it with the same names and shapes, and take all."""
    if host.size == 1:
        return
    names = sorted(tensors)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        sums = torch.tensor(list(pool.map(lambda name: checksum(tensors[name]), names)), dtype=torch.int64)
    everyone = host.all_gather(sums)
    for name in (name for name, differs in zip(names, (everyone != everyone[0]).any(0), strict=True) if differs):
        mine = tensors[name].detach()
        value = mine.cpu().contiguous() if host.rank == 0 else torch.empty(mine.shape, dtype=mine.dtype)
        host.broadcast(bytes_of(value), 0)
        yield name, value


def from_rank_zero(
    tensors: Mapping[str, Tensor], host: Group, check: Callable[[Mapping[str, tuple[int, ...]]], None]
) -> Iterator[tuple[str, Tensor]]:
    """Names and values of rank 0's tensors, on the CPU of every rank, one at a time. Every rank must take all.

    check  is called first, with the shapes of all by their names
    """
    found = from_first([(name, tuple(value.shape), value.dtype) for name, value in tensors.items()], host)
    check({name: shape for name, shape, _ in found})
    for name, shape, dtype in found:
        value = tensors[name].detach().cpu().contiguous() if host.rank == 0 else torch.empty(shape, dtype=dtype)
        if host.size > 1:
            host.broadcast(bytes_of(value), 0)
        yield name, value


def check_names(wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> None:
    """Raise PartitionError where a state dict has other names or shapes than the model's."""
    lacking, strange = [n for n in wanted if n not in given], [n for n in given if n not in wanted]
    if lacking or strange:
        raise PartitionError(
            "the state dict is not the model's",
            "; ".join(f"{what} {few(names)}" for what, names in (("it lacks", lacking), ("it has", strange)) if names),
            "compiled.full_state_dict() or model.state_dict(), whole, on rank 0",
        )
    if other := [f"{n} is {list(given[n])}, not {list(wanted[n])}" for n in wanted if given[n] != wanted[n]]:
        raise PartitionError(
            "the state dict has other shapes than the model", few(other), "the whole tensors on rank 0"
        )


def from_first(value: Any, host: Group) -> Any:
    """Rank 0's picklable value, on every rank."""
    if host.size == 1:
        return value
    data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    length = torch.tensor(len(data))
    host.broadcast(length, 0)
    data = data if host.rank == 0 else torch.empty(int(length), dtype=torch.uint8)
    host.broadcast(data, 0)
    return pickle.loads(data.numpy().tobytes())


def compares(step: int) -> bool:
    """Whether ranks compare their batches in this step."""
    return step < FIRST_STEPS or step % EVERY == 0


def check_sizes(batch: Mapping[str, Any], host: Group) -> None:
    """Raise PartitionError on every rank where ranks were given shares of other sizes: they would wait for messages of
    other sizes."""
    if host.size == 1:
        return
    sizes = {name: list(value.shape) for name, value in sorted(batch.items()) if isinstance(value, Tensor)}
    mine = zlib.crc32(json.dumps(sizes).encode())
    ends = torch.tensor([mine, -mine])
    host.all_reduce(ends, "max")
    if ends[0] == -ends[1]:
        return
    found = [int(each) for each in host.all_gather(torch.tensor(mine))]
    others = [str(rank) for rank, size in enumerate(found) if size != found[0]]
    raise PartitionError(
        f"rank {few(others)} got shares of other sizes than rank 0",
        f"rank {host.rank} has {', '.join(f'{name} {size}' for name, size in sizes.items())}",
        "equal shares on every data_rank: a DistributedSampler, and padding to a length that all ranks know",
    )


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


def bytes_of(contiguous: Tensor) -> Tensor:
    """A contiguous tensor's memory."""
    return contiguous.view(-1).view(torch.uint8)
