"""What of a program is saved and loaded: its tensors with their origins, and which rank writes them."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autopart.errors import PartitionError
from autopart.runtime.checkpoint import optimizer_states
from autopart.runtime.checkpoint.dcp import Shards
from autopart.runtime.checkpoint.rectangles import rectangles
from autopart.runtime.executor import Executor
from autopart.runtime.groups import Groups
from autopart.runtime.parameters import Origin
from autopart.runtime.rank_state import RankState

MODEL, OPTIMIZER = "model", "optimizer"
Entries = dict[str, tuple[Tensor, Origin]]
"""A name in the checkpoint -> this rank's share, and where it comes from."""


@dataclass(frozen=True)
class StageSummary:
    """What one rank tells for all ranks of its stage.

    names    of its tensors in the checkpoint
    scalars  weight -> state -> value, of the optimizer's states that have not the weight's shape
    """

    stage: int
    names: frozenset[str]
    scalars: dict[str, dict[str, Any]] = field(default_factory=dict)


def model_entries(compiled: RankState) -> Entries:
    """Weights, of which the optimizer's slice or copy counts, and buffers of the model's state dict."""
    best_of, origins = compiled.executor.shared.best_of, compiled.origins
    saved = {compiled.aliases.get(name, name) for name in compiled.model.state_dict()}
    shares: list[Any] = [best_of(weight) for _, weight in compiled.stage.named_parameters()]
    found = [(share, share.origin) for share in shares]
    found += [(value, origins[path]) for path, value in compiled.stage.named_buffers() if origins[path].name in saved]
    return {f"{MODEL}/{origin.name}": (value, origin) for value, origin in found if 0 not in origin.whole}


def state_entries(optimizer: torch.optim.Optimizer | None) -> Entries:
    """The states of the weights' shapes."""
    if optimizer is None:
        return {}
    found = optimizer_states.of_share_shape(optimizer)
    return {
        f"{OPTIMIZER}/{key}/{share.origin.name}": (value, share.origin)
        for key, share, value in found
        if 0 not in share.origin.whole
    }


def summary(executor: Executor, entries: Entries) -> StageSummary | None:
    """What this rank tells of its stage; None on ranks for which another of the stage tells. Raises PartitionError for
    what cannot be saved."""
    groups, optimizer = executor.groups, executor.optimizer
    if executor.accumulating:
        raise PartitionError(
            "gradients wait for an update", "a checkpoint has no gradients", "compiled.update(), then compiled.save"
        )
    scalars = {} if optimizer is None else optimizer_states.scalars(optimizer)
    return None if groups.dp.rank or groups.tp.rank else StageSummary(groups.pp.rank, frozenset(entries), scalars)


def written_here(entries: Entries, groups: Groups, stages: Iterable[StageSummary]) -> dict[str, Shards]:
    """What this rank writes, so that every element of the model is written once.

    A tensor on several stages is the first stage's. Of ranks that have the same share, a checksum of the name says
    which writes it, so that all write about as many.
    """
    first: dict[str, int] = {}
    for each in sorted(stages, key=lambda each: each.stage):
        for name in each.names:
            first.setdefault(name, each.stage)
    return {
        name: Shards(origin.whole, rectangles(value, origin, groups))
        for name, (value, origin) in entries.items()
        if first[name] == groups.pp.rank and _replica(origin, groups, zlib.crc32(name.encode()))
    }


def _replica(origin: Origin, groups: Groups, number: int) -> bool:
    """Whether this rank is number `number` (modulo their count) of the ranks that have the same share."""
    rank, count = 0, 1
    for axis, placement in origin.placed.items():
        if placement.kind != "S":
            group = groups.holders(origin.sliced, axis)
            rank, count = rank * group.size + group.rank, count * group.size
    return number % count == rank
