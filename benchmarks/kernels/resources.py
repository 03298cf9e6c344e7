"""Registers, spills, shared memory and occupancy of every Triton kernel, compiled for GPUs that need not be here.

    python -m benchmarks.kernels.resources                  compute capabilities 8.0, 9.0 and 10.0
    python -m benchmarks.kernels.resources --capability 90  one of them

Each fused kernel is compiled for the layers of its `shapes`. Occupancy is the share of a multiprocessor's warps that
are resident, by registers, shared memory and warps of a block. The exit status is 1 where a kernel spills. All of it
takes some minutes of CPU time, on one process a core.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import pkgutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

import autopart.kernels
from autopart.kernels.ahead import Usage
from autopart.kernels.kernel import Kernel
from benchmarks.support.command import command_line


class Limits(NamedTuple):
    """What a multiprocessor has.

    warps, blocks  that are resident at once, at most
    registers      of 32 bits
    shared         bytes of shared memory, with those that CUDA reserves of each block
    """

    warps: int
    blocks: int
    registers: int
    shared: int


LIMITS = {
    80: Limits(64, 32, 65536, 164 * 1024),
    90: Limits(64, 32, 65536, 228 * 1024),
    100: Limits(64, 32, 65536, 228 * 1024),
}
"""Compute capability -> limits. Source: NVIDIA, CUDA C++ Programming Guide, table "Technical Specifications per Compute
Capability"."""

RESERVED = 1024
"""Bytes of shared memory that CUDA reserves of a thread block. Source: the same guide, on compute capability 8.x."""

UNITS = {"registers": 256, "shared": 128, "warps": 4}
"""What a warp's registers and a block's bytes of shared memory are rounded up to, and the warps that registers suffice
for are rounded down to. Source: NVIDIA, CUDA Occupancy Calculator."""


def occupancy(usage: Usage, capability: int) -> float:
    """Warps that are resident on a multiprocessor over the most that can be: from 0, where not one block fits, to 1."""
    limits = LIMITS[capability]
    warps = limits.registers // _rounded(32 * usage.registers, UNITS["registers"])
    warps = min(limits.warps, warps // UNITS["warps"] * UNITS["warps"])
    shared = _rounded(usage.shared + RESERVED, UNITS["shared"])
    blocks = min(limits.blocks, warps // usage.warps, limits.shared // shared)
    return blocks * usage.warps / limits.warps


def _rounded(n: int, unit: int) -> int:
    """n, up to a multiple of the unit."""
    return -(-n // unit) * unit


class Job(NamedTuple):
    """Layers of equal shape of some models, for which a kernel is compiled."""

    kernel: str
    models: tuple[str, ...]
    capability: int


@functools.cache
def records() -> Mapping[str, Kernel]:
    """Every record of autopart/kernels by name, of modules in the order of their names."""
    found: dict[str, Kernel] = {}
    for module in pkgutil.iter_modules(autopart.kernels.__path__):
        if module.name != "table":
            loaded = importlib.import_module(f"autopart.kernels.{module.name}")
            kernels = getattr(loaded, "KERNELS", None) or [k for k in [getattr(loaded, "KERNEL", None)] if k]
            found |= {kernel.name: kernel for kernel in kernels}
    return found


def layers(kernel: Kernel) -> dict[tuple[str, ...], Mapping[str, Any]]:
    """Models whose layers have equal shapes -> the arguments of `ahead`."""
    grouped: list[tuple[list[str], Mapping[str, Any]]] = []
    for model, arguments in kernel.shapes.items():
        same = next((models for models, others in grouped if others == arguments), None)
        if same is None:
            grouped.append(([model], arguments))
        else:
            same.append(model)
    return {tuple(models): arguments for models, arguments in grouped}


def compiled(job: Job) -> list[dict[str, Any]]:
    """A row for each Triton function of a job."""
    kernel = records()[job.kernel]
    usages = kernel.ahead(job.capability, **layers(kernel)[job.models])
    return [row(job, function, usage) for function, usage in usages.items()]


def row(job: Job, function: str, usage: Usage) -> dict[str, Any]:
    """What is known of a compiled function."""
    return {
        "kernel": job.kernel,
        "models": list(job.models),
        "function": function,
        "capability": job.capability,
        **usage._asdict(),
        "occupancy": round(occupancy(usage, job.capability), 4),
    }


def compile_all(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """The rows of all jobs, in their order, on one process a core."""
    with multiprocessing.get_context("spawn").Pool(min(len(jobs), len(os.sched_getaffinity(0)))) as pool:
        return [row for rows in pool.imap(compiled, jobs) for row in rows]


def table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """A line a row."""
    made = Table("kernel", "models", "function", "sm", "registers", "spills", "shared", "warps", "occupancy")
    for r in rows:
        numbers = (r["capability"], r["registers"], r["spills"], r["shared"], r["warps"])
        made.add_row(
            r["kernel"], ", ".join(r["models"]), r["function"], *map(str, numbers), f"{r['occupancy']:.0%}"
        )  # fmt: skip
    return made


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the rows to a file of JSON, one a line."""
    versions = json.dumps({name: importlib.metadata.version(name) for name in ("torch", "triton")})
    lines = ",\n".join(map(json.dumps, rows))
    command = json.dumps(command_line(__spec__.name))
    path.write_text(f'{{"command": {command},\n"versions": {versions},\n"rows": [\n{lines}\n]}}\n')


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--kernel", nargs="+", choices=records(), default=list(records()), help="names (default: all)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows to PATH")
    options = parser.parse_args()
    jobs = [Job(name, models, capability) for name in options.kernel for models in layers(records()[name])
            for capability in options.capability]  # fmt: skip
    rows = compile_all(jobs)
    Console(width=None if sys.stdout.isatty() else 200).print(table(rows))
    if options.json:
        write(options.json, rows)
    return int(any(row["spills"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
