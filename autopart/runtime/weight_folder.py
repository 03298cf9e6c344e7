"""A folder of weights as Hugging Face lays it out, of which a rank reads what it needs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from autopart.errors import PartitionError, few
from autopart.runtime.share_reader import Sliceable
from autopart.runtime.transformers_names import (
    FileTensors,
    may_be_missing,
    may_be_unexpected,
    names_of,
    tensors_in_file,
)
from autopart.runtime.weight_files import INDEX, SINGLE

MAPPED_BYTES = 2**26
"""After so many bytes a file is opened anew: what was read of it stays in this process's memory while it is open."""


class WeightFolder:
    """The tensors of a model in a folder.

    Raises PartitionError for a folder without weights, and where parameters are missing, tensors are unexpected or
    shapes are others than the model's. Buffers may be missing.
    """

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self.folder = folder
        self.file_of = _files(folder)
        self.open_file: tuple[Path, Any, int] | None = None
        self.converted: tuple[FileTensors, Mapping[str, Tensor]] | None = None
        shapes = {key: self._on_meta(key) for key in self.file_of}
        self.given: dict[str, FileTensors] = {}
        self.same: dict[str, tuple[str, ...]] = {}
        """First name of a tensor -> its names that the folder has."""
        self._match(model, shapes)

    def _match(self, model: nn.Module, shapes: Mapping[str, Tensor]) -> None:
        found = dict(tensors_in_file(model, shapes))
        names = names_of(model)
        known = {name: group[0] for group in names for name in group}
        if unexpected := [name for name in found if name not in known and not may_be_unexpected(model, name)]:
            raise PartitionError(
                f"{self.folder} has {few(unexpected)}, which the model has not",
                f"it has {len(self.file_of)} tensors, {len(unexpected)} of them unknown to {type(model).__name__}",
                "the class and the config that the weights were saved from",
            )
        for group in names:
            if there := tuple(name for name in group if name in found):
                self.same[group[0]] = there
                self.given |= {name: found[name] for name in there}
        parameters = dict(model.named_parameters())
        missing = [name for name in parameters if name not in self.same and not may_be_missing(model, name)]
        if missing:
            raise PartitionError(
                f"{self.folder} lacks {few(missing)}",
                f"{len(missing)} of the model's {len(parameters)} parameters are not there",
                f"the class that the weights were saved from, in place of {type(model).__name__}; or these parameters "
                "saved with the others",
            )
        self._check_shapes(model, shapes)

    def _check_shapes(self, model: nn.Module, shapes: Mapping[str, Tensor]) -> None:
        state, checked = model.state_dict(), set()
        for name, given in self.given.items():
            made = shapes if given.convert is None else {}
            if given.convert is not None and given.keys not in checked:
                checked.add(given.keys)
                made = given.convert({key: shapes[key] for key in given.keys})
            for target, tensor in made.items() if given.convert else [(name, made[given.keys[0]])]:
                if target in state and tensor.shape != state[target].shape:
                    raise PartitionError(
                        f"{self.folder} has {target} of shape {list(tensor.shape)}, the model of "
                        f"{list(state[target].shape)}",
                        "it was saved from a model of another config",
                        "the config.json of that folder",
                    )

    def __contains__(self, name: str) -> bool:
        return name in self.same

    def find(self, name: str) -> Sliceable:
        """A tensor by its first name. Raises PartitionError where the folder has other values under another name."""
        first, *others = self.same[name]
        for other in others:
            if not torch.equal(self._tensor(first)[...], self._tensor(other)[...]):
                raise PartitionError(
                    f"{self.folder} has other values for {other} than for {first}",
                    "the model has one parameter of both names",
                    "tie_word_embeddings=False in the config, or the file without one of them",
                )
        self.same[name] = (first,)
        return self._tensor(first)

    def _tensor(self, name: str) -> Sliceable:
        given = self.given[name]
        if given.convert is None:
            return self._slice(given.keys[0])
        if self.converted is None or self.converted[0].keys != given.keys:
            self.converted = None
            self.converted = given, given.convert({key: self._slice(key)[...] for key in given.keys})
        return self.converted[1][name]

    def _slice(self, key: str) -> Sliceable:
        file = self.file_of[key]
        if self.open_file is None or self.open_file[0] != file or self.open_file[2] > MAPPED_BYTES:
            self.open_file = file, safe_open(file, "pt"), 0
        _, handle, read = self.open_file
        entry = handle.get_slice(key)
        scalar = not entry.get_shape()
        size = 8
        for dim in entry.get_shape():
            size *= dim
        self.open_file = file, handle, read + size
        return handle.get_tensor(key) if scalar else entry

    def _on_meta(self, key: str) -> Tensor:
        entry: Any = self._slice(key)
        return torch.empty(entry.shape if isinstance(entry, Tensor) else entry.get_shape(), device="meta")


def _files(folder: Path) -> dict[str, Path]:
    """Key of a tensor -> the file that has it."""
    index = folder / INDEX
    try:
        if index.exists():
            files = {key: folder / name for key, name in json.loads(index.read_text())["weight_map"].items()}
        else:
            files = dict.fromkeys(safe_open(folder / SINGLE, "pt").keys(), folder / SINGLE)
        for file in sorted(set(files.values())):
            lacking = {key for key, at in files.items() if at == file} - set(safe_open(file, "pt").keys())
            if lacking:
                raise PartitionError(f"{file} lacks {few(sorted(lacking))}", f"{INDEX} says that it is there")
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise PartitionError(
            f"cannot read the weights in {folder}",
            f"{type(error).__name__}: {error}",
            f"a folder with {SINGLE}, or with {INDEX} and the files that it names",
        ) from error
    return files
