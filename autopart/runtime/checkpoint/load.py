"""Loads a checkpoint into one rank's program, together with all other ranks."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autopart.runtime.checkpoint import dcp, files, fit, optimizer_states
from autopart.runtime.checkpoint import record as records
from autopart.runtime.checkpoint.contents import OPTIMIZER, model_entries
from autopart.runtime.checkpoint.rectangles import rectangles
from autopart.runtime.checkpoint.together import together
from autopart.runtime.executor import Executor
from autopart.runtime.parameters import Origin
from autopart.runtime.process_group import Group
from autopart.runtime.rank_state import RankState


def load(path: Path, compiled: RankState, scheduler: Any, group: Group) -> Any:
    """Load the good checkpoint at `path`; what was saved as `extra`. All ranks call it.

    Raises PartitionError, on every rank and before anything is changed, where the checkpoint does not fit.
    """
    executor, optimizer = compiled.executor, compiled.executor.optimizer
    names = [] if optimizer is None else compiled.group_names
    entries = model_entries(compiled)
    here = {name: origin.whole for name, (_, origin) in entries.items()}

    def checked() -> tuple[records.Record, dict[str, Any], bool]:
        record, stored = records.read(path / files.STATE), dcp.tensors(path)
        fit.check_model(record["parameters"], compiled.plan.signature.parameters)
        fit.check_tensors({name: each.size for name, each in stored.items()}, here)
        fit.check_scheduler(record, scheduler)
        return record, stored, fit.takes_optimizer(record, stored, optimizer, names)

    record, stored, takes = together(group, checked, f"the checkpoint {path} cannot be read")
    states = _empty_states(stored, executor) if takes else {}
    everything = {**entries, **{f"{OPTIMIZER}/{key}/{name}": entry for (key, name), entry in states.items()}}
    shards = {
        name: dcp.Shards(origin.whole, rectangles(value, origin, executor.groups))
        for name, (value, origin) in everything.items()
    }
    dcp.load(shards, path, group)
    executor.shared.stepped()
    if takes:
        assert optimizer is not None
        tensors = {key: value for key, (value, _) in states.items()}
        optimizer_states.restore(optimizer, record["optimizer"], tensors, names)
    if scheduler is not None:
        scheduler.load_state_dict(record["scheduler"]["state"])
    _restore_counters(record, compiled)
    if group.rank == 0:
        for text in fit.not_loaded(record, optimizer, scheduler):
            warnings.warn(f"autopart: {text}", stacklevel=4)
    return record["extra"]


def _restore_counters(record: records.Record, compiled: RankState) -> None:
    executor = compiled.executor
    executor.groups.rng.seed, executor.groups.rng.step = record["seed"], record["step"]
    executor.skipped, executor.accumulating = record["skipped"], False
    compiled.unused_tensors.update(record["beside"])
    if executor.loss_scale and record["loss_scale"]:
        vars(executor.loss_scale).update(record["loss_scale"])


def _empty_states(stored: Mapping[str, Any], executor: Executor) -> dict[tuple[str, str], tuple[Tensor, Origin]]:
    """Memory for this rank's shares of the states in a checkpoint, by state and weight, in the dtypes that were saved.
    States that the optimizer has are freed."""
    assert executor.optimizer is not None
    executor.optimizer.state.clear()
    shares: dict[str, Any] = {share.origin.name: share for share in executor.shared.stepped_as.values()}
    found: dict[tuple[str, str], tuple[Tensor, Origin]] = {}
    for entry, tensor in stored.items():
        kind, _, rest = entry.partition("/")
        key, _, name = rest.partition("/")
        if kind == OPTIMIZER and name in shares:
            empty = torch.zeros_like(shares[name], dtype=tensor.properties.dtype, requires_grad=False)
            found[key, name] = (empty, shares[name].origin)
    return found
