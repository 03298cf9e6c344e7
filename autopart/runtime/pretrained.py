"""Trained weights for others, tensor by tensor: a folder as Hugging Face reads it, and the user's own model."""

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autopart.errors import PartitionError, few, not_known
from autopart.frontend.batch import DTYPES
from autopart.frontend.inputs import main_dtype
from autopart.runtime.agreement import bytes_of, from_first
from autopart.runtime.rank_state import RankState
from autopart.runtime.share_reader import fill_from
from autopart.runtime.transformers_names import is_pretrained, original_format, saved_names
from autopart.runtime.weight_files import WeightFiles, size_of
from autopart.runtime.weight_folder import WeightFolder
from autopart.runtime.whole_tensors import whole_tensors


def save_pretrained(compiled: RankState, folder: Path, max_shard_size: int | str, dtype: Any) -> None:
    """`Compiled.save_pretrained`. Rank 0 writes."""
    limit, wanted = size_of(max_shard_size), _dtype(dtype)
    model = compiled.model
    parameters = {name for name, _ in model.named_parameters()}
    own, used = main_dtype(model), wanted or getattr(torch, compiled.plan.precision)
    names = saved_names(model)
    files = WeightFiles(folder, limit)
    if compiled.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shapes = {name: torch.empty_like(value, device="meta") for name, value in model.state_dict().items()}
        original = original_format(model, {name: shapes[name] for name, _ in names})
    tensors = whole_tensors(compiled, [first for _, first in names], masters=wanted is not None)
    for (name, _), (first, value) in zip(names, tensors, strict=True):
        if value is not None:
            value = value if name == first else value.clone()
            if first in parameters and value.is_floating_point() and (wanted or value.dtype == own):
                value = value.to(used)
            for key, each in original(name, value).items():
                files.add(key, each)
    if compiled.rank == 0:
        files.close()
        if is_pretrained(model):
            _save_configs(model, folder, used)
    from_first(None, compiled.groups.host)


def load_pretrained(compiled: RankState, folder: Path) -> None:
    """`Compiled.load_pretrained`. Each rank reads its own shares."""
    found = WeightFolder(folder, compiled.model)
    fill_from([share for share in compiled.shares() if share.origin.name in found], compiled.groups, found.find)
    compiled.unused_tensors.update({name: found.find(name)[...] for name in compiled.unused_tensors if name in found})
    from_first(None, compiled.groups.host)


def _save_configs(model: Any, folder: Path, dtype: torch.dtype) -> None:
    config = copy.deepcopy(model.config)
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _dtype(given: Any) -> torch.dtype | None:
    if given is None or given in DTYPES.values():
        return given
    if given not in DTYPES:
        raise not_known("dtype", given, DTYPES)
    return DTYPES[given]


def sync_to(compiled: RankState, model: nn.Module, ranks: Collection[int] | None) -> None:
    """`Compiled.sync_to`. Tensors go by rank 0, one at a time."""
    names = list(_named(compiled.model))
    host = compiled.groups.host
    takes = ranks is None or host.rank in ranks
    into = _tensors(model, names) if takes else {}
    shapes = {name: tensor.shape for name, tensor in _named(compiled.model).items()}
    for name, value in whole_tensors(compiled, names, masters=True):
        if ranks is None or set(ranks) - {0}:
            dtype = from_first(None if value is None else value.dtype, host)
            value = torch.empty(shapes[name], dtype=dtype) if value is None else value.contiguous()
            if value.numel() and host.size > 1:
                host.broadcast(bytes_of(value), 0)
        if takes and value is not None:
            _put(name, into[name], value)
    compiled.weights.seen()


def _named(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def _tensors(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """The tensors of a model with these names. Raises PartitionError for a model that has others."""
    own = _named(model)
    if missing := [name for name in names if name not in own]:
        raise PartitionError(
            f"the model has no {few(missing)}",
            "it is not the model that was compiled",
            "a model of the same class and config",
        )
    return own


def _put(name: str, old: Tensor, value: Tensor) -> None:
    """Copy a value into a tensor of a model. One on meta gets memory, and stays the object that it was."""
    if old.shape != value.shape:
        raise PartitionError(
            f"{name} has shape {list(old.shape)}, the trained one {list(value.shape)}",
            "it is not the model that was compiled",
            "a model of the same config",
        )
    if old.is_meta:
        new: Tensor = value.to(old.dtype).clone()
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        new.__dict__.update(old.__dict__)
        torch.utils.swap_tensors(old, new)
    else:
        with torch.no_grad():
            old.copy_(value)
