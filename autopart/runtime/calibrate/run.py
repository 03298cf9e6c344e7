"""Starts the ranks that measure."""

import os
import sys
from pathlib import Path

from autopart.errors import PartitionError
from autopart.hardware import load_hardware
from autopart.hardware.mesh import Mesh
from autopart.hardware.mixed import parts_of
from autopart.runtime.launch import launch

DEFAULT_ROUNDS = 3


def calibrate(
    mesh: str | Mesh,
    to: str | os.PathLike[str],
    *,
    name: str = "",
    dtypes: tuple[str, ...] = (),
    quick: bool = False,
    rounds: int = DEFAULT_ROUNDS,
) -> str:
    """Measure the devices and links of this host with a process for each device of `mesh`, all at once, and write rows
    for them to the TOML file `to`, which are also loaded; the name of the device's row.

    mesh    one host; what is not measured (memory, links between hosts) is as in its device's row
    name    of the rows; "DEVICE-COUNT" if it is not given
    dtypes  whose products and attention are measured; float32 on a CPU, bfloat16 and float32 on GPUs if none are given
    quick   few sizes, for a short time each: to try whether it runs
    rounds  of which the medians are taken; one takes 10 to 30 s

    A process has as many threads as `autopart run` gives it, or OMP_NUM_THREADS. Raises PartitionError for a mesh of
    several hosts, dtypes that the device does not know, a file that cannot be written, and where a rank failed.
    """
    mesh, path = Mesh.of(mesh), Path(to)
    _check(mesh, dtypes, rounds, path)
    name = name or f"{mesh.device.name}-{mesh.size}"
    line = [sys.executable, "-m", "autopart.runtime.calibrate.worker", str(mesh), str(path), name, ",".join(dtypes)]
    status = launch([*line, str(rounds), "quick" if quick else "full"], mesh.size)
    if status:
        raise PartitionError("the calibration failed", f"a rank ended with status {status}")
    load_hardware(path)
    return name


def _check(mesh: Mesh, dtypes: tuple[str, ...], rounds: int, path: Path) -> None:
    if mesh.hosts > 1:
        raise PartitionError(
            f"{mesh} has {mesh.hosts} hosts",
            "one host is measured",
            f"{mesh.devices_per_host}:{parts_of(mesh)[0].device.name}",
        )
    for dtype in dtypes:
        if dtype not in mesh.device.flops or dtype in ("tf32", "float8"):
            raise PartitionError(f"{mesh.device.name} computes no {dtype}", f"it has {', '.join(mesh.device.flops)}")
    if rounds < 1:
        raise PartitionError(f"{rounds} rounds measure nothing", try_="1 or more")
    if not path.parent.is_dir():
        raise PartitionError(f"cannot write {path}", "there is no such folder")
