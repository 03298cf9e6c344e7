"""A torch DeviceMesh -> the hosts that it describes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from autopart.errors import PartitionError
from autopart.hardware import find_device
from autopart.hardware.axes import AXES
from autopart.hardware.cuda import of_cuda
from autopart.hardware.rows import Device

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def hosts_of(device_mesh: DeviceMesh) -> tuple[int, int, Device, tuple[tuple[str, int], ...]]:
    """Hosts, devices of a host, their row, and the degrees that a DeviceMesh fixes (see `Mesh.of`). Raises
    PartitionError where it does not hold all ranks in order."""
    names = device_mesh.mesh_dim_names
    if names is None:
        raise PartitionError(
            "the DeviceMesh has no dim names",
            why="they tell which degree each dim fixes",
            try_=f"mesh_dim_names out of {AXES}",
        )
    ranks = device_mesh.mesh.flatten().tolist()
    if ranks != list(range(len(ranks))):
        raise PartitionError(
            f"the DeviceMesh holds the ranks {ranks}",
            why="a plan is made for all ranks, in order",
            try_="the root mesh, as init_device_mesh makes it",
        )
    device = _of_device_type(device_mesh.device_type)
    per_host = _devices_per_host(len(ranks))
    return len(ranks) // per_host, per_host, device, tuple(zip(names, device_mesh.shape, strict=True))


def _devices_per_host(size: int) -> int:
    """LOCAL_WORLD_SIZE, as torchrun sets it, for a mesh of `size` ranks; `size` if unset or larger."""
    text = os.environ.get("LOCAL_WORLD_SIZE", str(size))
    local = min(int(text), size) if text.isdecimal() else 0
    if local < 1 or size % local:
        raise PartitionError(
            f"LOCAL_WORLD_SIZE={text} does not divide the {size} ranks of the DeviceMesh",
            why="every host must hold as many ranks",
        )
    return local


def _of_device_type(device_type: str) -> Device:
    import torch

    if device_type == "cpu":
        return find_device("cpu")
    if device_type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return of_cuda(torch.cuda.get_device_name(), properties.total_memory)
    raise PartitionError(
        f"no device row for a DeviceMesh on {device_type!r}",
        why="CUDA finds no device here" if device_type == "cuda" else "only cpu and cuda are known",
        try_='text that names the device, such as "4x8:h100-80gb", or a Mesh with a Device of your own',
    )
