"""torch.distributed.checkpoint: rectangles of whole tensors, written and read by all ranks together."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from autopart.errors import PartitionError, few
from autopart.runtime.checkpoint.rectangles import Rectangle
from autopart.runtime.process_group import Group

METADATA = ".metadata"
NAMED = {
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "WindowsPath"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
}  # fmt: skip
"""Module -> what a file of metadata may name of it."""


class Shards:
    """A rank's rectangles of a whole tensor, by the protocol of torch.distributed.checkpoint that DTensor has."""

    def __init__(self, whole: Sequence[int], rectangles: Sequence[Rectangle]) -> None:
        self.whole, self.at = torch.Size(whole), {torch.Size(offsets): values for offsets, values in rectangles}

    def size(self) -> torch.Size:
        """The whole tensor's shape."""
        return self.whole

    def copied(self) -> Shards:
        """The same rectangles, with a copy of their values on the CPU."""
        copies = [(tuple(offsets), values.to("cpu", copy=True)) for offsets, values in self.at.items()]
        return Shards(self.whole, copies)

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(fqn, offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties.create_from_tensor(values), self.whole),
            )
            for (offsets, values), chunk in zip(self.at.items(), self.__create_chunk_list__(), strict=True)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, values.size()) for offsets, values in self.at.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.at[index.offset]


class _SavePlanner(DefaultSavePlanner):
    """torch's own, which looks only tensors up by their offset."""

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        shards: Shards = self.state_dict[index.fqn]
        return shards.__get_tensor_shard__(index)


class _LoadPlanner(DefaultLoadPlanner):
    """torch's own likewise, which would drop what is neither a tensor nor a plain value."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        shards: Shards = self.state_dict[index.fqn]
        return shards.__get_tensor_shard__(index)


class _Unpickler(pickle.Unpickler):
    """Reads metadata, and runs no code that a file names."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in NAMED.get(module, ()):
            raise pickle.UnpicklingError(f"metadata names {module}.{name}")
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """torch's own; the metadata is not unpickled freely."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        with open(Path(self.path) / METADATA, "rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        return metadata


def tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """The tensors of a checkpoint by name, with their whole shapes and dtypes."""
    found = Reader(folder).read_metadata().state_dict_metadata
    return {name: each for name, each in found.items() if isinstance(each, TensorStorageMetadata)}


def save(shards: Mapping[str, Shards], folder: Path, group: Group) -> None:
    """Write every rank's rectangles. All ranks call it. A rectangle that several ranks bring is written once. Raises
    PartitionError, on every rank, where a rank cannot write."""
    planner = _SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.save(dict(shards), storage_writer=dcp.FileSystemWriter(folder), planner=planner, **_where(group))
    except CheckpointException as error:
        raise _failed("written to", folder.parent, error, "free space, or another folder") from error


def written(folder: Path) -> list[str]:
    """The files that `save` wrote."""
    return sorted({METADATA, *(each.relative_path for each in Reader(folder).read_metadata().storage_data.values())})


def load(shards: Mapping[str, Shards], folder: Path, group: Group) -> None:
    """Fill every rank's rectangles. All ranks call it. Raises PartitionError, on every rank, where a rank cannot
    read."""
    planner = _LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.load(dict(shards), storage_reader=Reader(folder), planner=planner, **_where(group))
    except CheckpointException as error:
        raise _failed("read from", folder, error, "another checkpoint") from error


def _where(group: Group) -> dict[str, Any]:
    if group.size > 1:
        return {"process_group": group.handle}
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
    return {"no_dist": True}


def _failed(what: str, folder: Path, error: CheckpointException, try_: str) -> PartitionError:
    whose = [f"rank {rank}: {type(each).__name__}: {each}" for rank, (each, _) in error.failures.items()]
    return PartitionError(f"the checkpoint cannot be {what} {folder}", few(whose, joint="; "), try_)
