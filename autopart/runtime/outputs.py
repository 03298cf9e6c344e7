"""What an evaluation returns beside the loss: the shards that ranks compute, and the whole tensors."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autopart.runtime.groups import Groups
from autopart.runtime.parameters import Origin
from autopart.runtime.random import Split, Stream
from autopart.runtime.whole import assemble, shares_of
from autopart.sharding.notation import Placement


@dataclass(frozen=True)
class Returned:
    """One rank's shard of an output of one micro-batch.

    batch  the dim that counts samples; None where there is none
    axes   the dim that each axis splits
    """

    name: str
    micro_batch: int
    shard: Tensor
    batch: int | None
    axes: dict[str, Split]


def returned(x: Tensor, name: Stream, whole: Sequence[int], batch: int | None, **axes: Split) -> Tensor:
    """Note `x`, this rank's shard of an output of size `whole`, for the evaluation that runs."""
    groups = name.groups
    groups.returned.append(Returned(name.name, groups.rng.micro_batch, x.detach(), batch, axes))
    return x


def whole_outputs(groups: Groups) -> dict[str, Tensor]:
    """The outputs noted since the last call, whole, on the CPU of rank 0; {} on other ranks. Micro-batches follow each
    other in the dim of samples, in a new dim 0 where an output has none. All ranks call it."""
    noted = [each for each in groups.returned if isinstance(each, Returned)]
    groups.returned.clear()
    by_key = {f"{each.micro_batch} {each.name}": each for each in noted}
    placed = {key: {axis: _placement(each.axes.get(axis)) for axis in ("dp", "tp")} for key, each in by_key.items()}
    origins = {key: Origin(key, (), axes) for key, axes in placed.items()}
    mine = shares_of({key: each.shard for key, each in by_key.items()}, origins, groups)
    dims = {each.name: each.batch for each in noted}
    everyone = groups.host.gather((mine, dims))
    parts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for key, tensor in assemble([shares for shares, _ in everyone]).items():
        number, _, name = key.partition(" ")
        parts[name][int(number)] = tensor
    known = {name: dim for _, dims in everyone for name, dim in dims.items()}
    return {name: _joined([each[i] for i in sorted(each)], known[name]) for name, each in parts.items()}


def _placement(split: Any) -> Placement:
    if split is None:
        return Placement("R")
    dim, parts = split if isinstance(split, (tuple, list)) else (split, ())
    return Placement("S", dim, tuple(parts))


def _joined(parts: list[Tensor], batch: int | None) -> Tensor:
    return torch.stack(parts) if batch is None else torch.cat(parts, batch)
