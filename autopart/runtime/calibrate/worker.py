"""One rank of a calibration: python -m autopart.runtime.calibrate.worker MESH FILE NAME DTYPES ROUNDS quick|full."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from autopart.hardware.mesh import Mesh
from autopart.runtime.calibrate.measure import measure
from autopart.runtime.calibrate.profile import profile, to_toml
from autopart.runtime.calibrate.sizes import FULL, QUICK, Sizes


def main(mesh_text: str, file: str, name: str, dtypes: str, rounds: str, extent: str) -> None:
    """Measure; rank 0 writes the file."""
    mesh, type_ = Mesh.parse(mesh_text), _start()
    wanted = tuple(filter(None, dtypes.split(","))) or _usual(mesh, type_)
    sizes: Sizes = (QUICK if extent == "quick" else FULL)[type_]
    found = measure(sizes, wanted, int(rounds), torch.device(type_))
    if dist.get_rank() == 0:
        Path(file).write_text(to_toml(*profile(found, mesh, name, type_), name), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _start() -> str:
    """Join the other ranks; what torch calls the devices."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return "cuda" if cuda else "cpu"


def _usual(mesh: Mesh, type_: str) -> tuple[str, ...]:
    usual = ("float32",) if type_ == "cpu" else ("bfloat16", "float32")
    return tuple(dtype for dtype in usual if dtype in mesh.device.flops)


if __name__ == "__main__":
    main(*sys.argv[1:])
