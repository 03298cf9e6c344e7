"""The tables of devices and links, and how to add rows to them.

The package's own rows are in `devices.toml` and `links.toml`, in this folder. A user's rows are in a TOML file of the
same format, which `load_hardware` reads, or which the environment variable AUTOPART_HARDWARE names (several files are
separated as in PATH). Such rows can be named wherever a device or a link can:

    [devices.my-gpu]
    like = "h100-80gb"            # a field that is not given is as in that row
    memory_bytes = 64e9
    inter = "my-fabric"
    source = "measured"

    [links.my-fabric]
    bandwidth = 40e9              # bytes/s, one direction, of a device; between hosts, of a network card
    latency_seconds = 5e-6
    source = "measured"

- A row without `like` needs every field of `Device` or `Link` that has no default, in the units given there.
- A field of a row replaces that field of the row it is `like`; `flops` and `silicon` are replaced as a whole. A
  `source` that is not given names the other row and the fields that were changed.
- `like` names a row above in the file, or a row of the tables.
- `cuda`, a field of a device's row that `like` does not copy, is a regular expression for the whole name that the CUDA
  driver gives the device.
- Of rows with one name the last one read counts, so that a file can replace the datasheet's a100-80gb by a measured
  one.
"""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from autopart.errors import PartitionError, closest

from .files import read_rows
from .rows import Device, Link

_Row = TypeVar("_Row")

ENVIRONMENT = "AUTOPART_HARDWARE"
"""The environment variable that names files of rows."""

_devices: dict[str, Device] = {}
_links: dict[str, Link] = {}
_cuda: dict[str, str] = {}

DEVICES: Mapping[str, Device] = _devices
"""The known devices by name."""

LINKS: Mapping[str, Link] = _links
"""The known links by name."""

CUDA_NAMES: Mapping[str, str] = _cuda
"""What the CUDA driver calls a device, as a pattern for the full name -> row of DEVICES, oldest first."""


def load_hardware(path: str | os.PathLike[str]) -> list[str]:
    """Add the rows of a TOML file to the tables; their names, links first.

    Raises PartitionError, naming file and row, where anything is wrong with it, and then adds none.
    """
    rows = read_rows(Path(path), DEVICES, LINKS)
    _links.update(rows.links)
    _devices.update(rows.devices)
    _cuda.update(rows.cuda)
    return [*rows.links, *rows.devices]


def load_environment() -> None:
    """Add the rows of the files that AUTOPART_HARDWARE names, once for each value it has; see `load_hardware`."""
    _load_all(os.environ.get(ENVIRONMENT, ""))


@functools.cache
def _load_all(paths: str) -> None:
    for path in filter(None, paths.split(os.pathsep)):
        load_hardware(path)


def find_device(name: str) -> Device:
    """The row of a device, AUTOPART_HARDWARE's included; PartitionError with the names there are for another name."""
    load_environment()
    return _look_up(DEVICES, name, "device")


def find_link(name: str) -> Link:
    """The row of a link, AUTOPART_HARDWARE's included; PartitionError with the names there are for another name."""
    load_environment()
    return _look_up(LINKS, name, "link")


def _look_up(table: Mapping[str, _Row], name: str, kind: str) -> _Row:
    if name in table:
        return table[name]
    raise PartitionError(
        f"unknown {kind} {name!r}",
        why=f"known are {', '.join(table)}",
        try_=" or ".join(map(repr, closest(name, table))),
    )


for _file in ("links.toml", "devices.toml"):
    load_hardware(Path(__file__).with_name(_file))
