"""Everything that is found out, one item after the other, and the process that does it."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import time
import tomllib
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from multiprocessing.connection import Connection
from os import setsid
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import transformers

from autopart.runtime.calibrate import calibrate
from benchmarks.accuracy.gpu import here
from benchmarks.gpu import correct, memory, speed, steps, updates
from benchmarks.gpu.calls import DTYPES
from benchmarks.gpu.forms import forms
from benchmarks.gpu.sizes import LAYERS, Layer
from benchmarks.gpu.speed import why
from benchmarks.kernels.resources import records

Found = dict[str, Any]
COPIED = 2**31
"""Bytes that are read and written by the copy of the group "machine"."""
DRY_MEMORY = ("gpt2 16x1024 bfloat16 micro_batch=4",)


class Item(NamedTuple):
    """What is found out at once.

    seconds  that it may take
    run      it, given the losses of earlier items by name
    alone    whether the process ends with it, as it changes what other items run
    """

    name: str
    group: str
    seconds: float
    run: Callable[[Mapping[str, float]], Found]
    alone: bool = False


def items(dry: bool) -> list[Item]:
    """All items in the order of their groups."""
    device = "cpu" if dry else "cuda"
    mesh_device = "cpu" if dry else here()[0]
    found = [Item("machine", "machine", 60, lambda earlier: machine(device, mesh_device))]
    for group in (kernel_items, warm_items, time_items, step_items, update_items, memory_items, compile_items):
        found += group(device, mesh_device)
    return [*found, Item("calibrate", "calibrate", 180, lambda earlier: calibrated(mesh_device, dry))]


def calls(device: str) -> Iterator[tuple[str, Any, Layer | None]]:
    """Name, record and layer of every kernel; without layers on a CPU."""
    for name, kernel in records().items():
        if forms(name):
            for layer in LAYERS.get(name, ()) if device == "cuda" else (None,):
                yield f"{name}, {layer.model if layer else 'small'}", kernel, layer


def kernel_items(device: str, mesh_device: str) -> Iterator[Item]:
    """Outputs and gradients in every dtype."""
    for name, kernel, layer in calls(device):
        for dtype in DTYPES:
            yield _of(f"{name}, {dtype}", "correct", 90, partial(correct.check, kernel, layer, dtype, device))
    for name in records():
        if not forms(name):
            yield Item(f"correct {name}", "correct", 1, lambda earlier: {"status": "left out: it has no form"})


def warm_items(device: str, mesh_device: str) -> Iterator[Item]:
    """What torch.compile makes of references, compiled side by side before it is timed; nothing on a CPU."""
    for name, kernel, layer in calls(device) if device == "cuda" else ():
        yield _of(name, "warm", 90, partial(speed.warm, kernel, layer, "bfloat16", device))


def time_items(device: str, mesh_device: str) -> Iterator[Item]:
    """Times in bfloat16."""
    for name, kernel, layer in calls(device):
        yield _of(name, "time", 60, partial(speed.measure, kernel, layer, "bfloat16", device))


def step_items(device: str, mesh_device: str) -> Iterator[Item]:
    """Steps, eager PyTorch's first. Liger changes the classes of models: its process ends with it."""
    for system in ("eager", "autopart", "liger"):
        for name in steps.MODELS:
            yield _step(name, system, "step", device, mesh_device)


def update_items(device: str, mesh_device: str) -> Iterator[Item]:
    """The optimizer's step over all parameters of a model."""
    for name in steps.MODELS:
        yield _of(name, "update", 90, partial(updates.measure, name, device))


def memory_items(device: str, mesh_device: str) -> Iterator[Item]:
    """Configurations; one of them on a CPU. Beside them, what torch.compile makes of the models is compiled."""
    for name in steps.MODELS if device == "cuda" else ():
        yield _of(f"besides, torch.compile of {name}", "memory", 250, partial(steps.warm, name, device))
    for name in memory.ROWS if device == "cuda" else DRY_MEMORY:
        yield _of(name, "memory", 90, partial(memory.measure, name, device, mesh_device))


def compile_items(device: str, mesh_device: str) -> Iterator[Item]:
    """Steps of compiled models."""
    for name in steps.MODELS:
        yield _step(name, "compile", "compile", device, mesh_device)


def _step(name: str, system: str, group: str, device: str, mesh_device: str) -> Item:
    def run(earlier: Mapping[str, float]) -> Found:
        return steps.measure(name, system, earlier.get(f"step {name}, eager"), device, f"1:{mesh_device}")

    return Item(f"{group} {name}, {system}", group, 150, run, alone=system == "liger" and device == "cuda")


def _of(name: str, group: str, seconds: float, run: Callable[[], Found]) -> Item:
    return Item(f"{group} {name}", group, seconds, lambda earlier: run())


def machine(device: str, mesh_device: str) -> Found:
    """Versions, and on a GPU its name and the time of a copy of 1 GiB."""
    packages = ("torch", "triton", "transformers", "liger_kernel")
    found: Found = {"status": "ok", "device": mesh_device}
    found |= {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)}
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability())}
        found["microseconds_of_copy"] = speed.median_us(speed.copy_of(COPIED, device), device)
    return found


def calibrated(mesh_device: str, dry: bool) -> Found:
    """What `autopart calibrate` writes, of one round; of few sizes on a CPU."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "hardware.toml")
        calibrate(f"1:{mesh_device}", path, rounds=1, quick=dry)
        return {"status": "ok", "hardware": tomllib.loads(path.read_text())}


def serve(connection: Connection, dry: bool) -> None:
    """Run the items whose names come, in a session of this process's own, until none comes.

    The first answer is the name, group and seconds of every item. After an error the process ends: a GPU may be left in
    a state in which nothing runs.
    """
    setsid()
    gc.freeze()  # what is imported stays: every collection would walk over it
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    if dry:
        torch.set_num_threads(1)
    known = {item.name: item for item in items(dry)}
    connection.send([(item.name, item.group, item.seconds) for item in known.values()])
    while (asked := connection.recv()) is not None:
        name, earlier = asked
        record = done(known[name], earlier)
        ends = known[name].alone or (not dry and record["status"].startswith("failed"))
        connection.send((record, ends))
        if ends:
            return
        gc.collect()
        if not dry:
            torch.cuda.empty_cache()


def done(item: Item, earlier: Mapping[str, float]) -> Found:
    """The record of an item."""
    start = time.perf_counter()
    try:
        found = item.run(earlier)
    except Exception as error:
        places = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
        found = {"status": f"failed: {why(error)}", "at": places[-6:]}
    return {"item": item.name, "group": item.group, **found, "wall_seconds": round(time.perf_counter() - start, 2)}
