"""Whole batches into the ranks' shares, and the ranks' shares into whole tensors."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from autopart.errors import PartitionError
from autopart.plan.data import Plan
from autopart.runtime.groups import Groups
from autopart.runtime.parameters import Origin
from autopart.runtime.shards import shard, unshard
from autopart.sharding.notation import Placement

Place = tuple[int, int]
Share = tuple[Mapping[str, Placement], Place, Tensor]
"""A tensor's placement along every axis, the rank along (dp, tp) that holds this share, and the share."""


def micro_batches(
    plan: Plan, batch: Mapping[str, Any], ranks: int, rank: int, local: bool, device: torch.device
) -> list[dict[str, Tensor]]:
    """What rank `rank` of the `ranks` that split samples reads of every micro-batch.

    local  whether `batch` is that rank's share already

    Raises PartitionError where the size of the batch is not the plan's.
    """
    share = ranks if local else 1
    tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
    expected = plan.global_batch // share
    for name, shape in plan.signature.inputs.items():
        if name not in tensors:
            raise PartitionError(f"the batch lacks {name}", f"it has {', '.join(tensors) or 'nothing'}")
        wanted = (expected, *shape[1:])
        if tuple(tensors[name].shape) != wanted:
            raise PartitionError(
                f"{name} has shape {list(tensors[name].shape)}, the plan is for {list(wanted)}",
                f"{plan.micro_batches} micro-batches of {plan.micro_batch // share} samples",
                "drop or pad the last batch, or plan for this size",
            )
    size = plan.micro_batch // share
    result = []
    for i in range(plan.micro_batches):
        rows = {k: tensors[k][i * size : (i + 1) * size] for k in plan.signature.inputs}
        if not local and ranks > 1:
            rows = {k: shard(v, 0, (), ranks, rank) for k, v in rows.items()}
        result.append({k: v.to(device) for k, v in rows.items()})
    return result


def shares_of(tensors: Mapping[str, Tensor], origins: Mapping[str, Origin], groups: Groups) -> dict[str, Share]:
    """This rank's tensors by the model's names, so that over all ranks every whole one's pieces come once; `origins`
    says, by the same keys as `tensors` has, where each comes from."""
    place = {"dp": groups.dp.rank, "tp": groups.tp.rank}
    return {
        origins[path].name: (origins[path].placed, (groups.dp.rank, groups.tp.rank), value.detach().cpu())
        for path, value in tensors.items()
        if all(p.kind == "S" or place[axis] == 0 for axis, p in origins[path].placed.items())
    }


def assemble(everyone: Iterable[Mapping[str, Share]]) -> dict[str, Tensor]:
    """The whole tensors, from what `shares_of` returned on every rank."""
    pieces: dict[str, dict[Place, Tensor]] = {}
    placements: dict[str, Mapping[str, Placement]] = {}
    for given in everyone:
        for name, (placed, at, tensor) in given.items():
            placements[name] = placed
            pieces.setdefault(name, {})[at] = tensor
    return {name: _whole(placements[name], pieces[name]) for name in pieces}


def _whole(placed: Mapping[str, Placement], pieces: Mapping[Place, Tensor]) -> Tensor:
    rows = []
    for d in sorted({d for d, _ in pieces}):
        row = [pieces[d, t] for t in sorted({t for e, t in pieces if e == d})]
        rows.append(row[0] if len(row) == 1 else unshard(row, placed["tp"].dim, placed["tp"].parts))
    return rows[0] if len(rows) == 1 else unshard(rows, placed["dp"].dim, placed["dp"].parts)
