"""The run on a GPU, dry: all of its items on the CPU at tiny sizes; and what it would give kernels on a GPU."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from io import StringIO
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from rich.console import Console

from benchmarks.gpu import correct, memory, report, runner
from benchmarks.gpu.calls import DTYPES
from benchmarks.gpu.forms import forms
from benchmarks.gpu.items import items
from benchmarks.gpu.runner import Named, Run, read
from benchmarks.gpu.sizes import LAYERS, shaped
from benchmarks.kernels.resources import records

pytestmark = pytest.mark.slow


@pytest.mark.processes
def test_everything_runs_dry(tmp_path: Path) -> None:
    file = tmp_path / "dry.jsonl"
    run(["-m", "benchmarks.gpu", "--dry", "--to", file, "--seconds", "280"])
    found = {record["item"]: record for record in map(json.loads, file.read_text().splitlines())}
    assert set(found) == {item.name for item in items(dry=True)}
    assert {r["status"].partition(":")[0] for r in found.values()} == {"ok", "left out"}
    assert found["compile GPT-2 XL, compile"]["loss_error"] < 1e-2
    assert found["correct rms_norm, small, float32"]["errors"]["gradient 1"]["kernel"] < 1e-6


@pytest.mark.parametrize("kernel", records())
def test_a_kernel_has_the_sizes_of_a_model(kernel: str) -> None:
    """A new kernel needs a form in `benchmarks/gpu/forms.py`, unless graphs have it, and a layer in `sizes.py`."""
    assert forms(kernel) and LAYERS.get(kernel)
    for layer in LAYERS[kernel]:
        for dtype in DTYPES.values():
            given = shaped(kernel, layer, dtype, correct.TOKENS)
            assert any(t.dtype == dtype for t in given if isinstance(t, torch.Tensor) and t.is_floating_point()) or all(
                not t.is_floating_point() for t in given if isinstance(t, torch.Tensor)
            )
            assert min(records()[kernel].bytes_moved(*given)) >= 0


def test_a_wrong_kernel_is_caught() -> None:
    kernel = records()["rms_norm"]

    def checked(function: Callable[..., Any], dtype: str) -> str:
        found = correct.check(replace(kernel, function=wraps(kernel.function)(function)), None, dtype, "cpu")
        return str(found["status"])

    for off in (1.001, float("nan")):
        assert checked(lambda *given, off=off: kernel.reference(*given) * off, "float32").startswith("wrong: output 0")
    assert "gradient 0" in checked(lambda x, *given: kernel.reference(x + x.detach(), *given), "bfloat16")


def test_there_are_configurations_enough() -> None:
    assert len(memory.ROWS) >= 30


def test_what_a_gpu_finds_is_shown() -> None:
    us = {"kernel": 50.0, "eager": 200.0, "compile": 60.0, "liger": 55.0, "copy": 40.0}
    found = [
        {"group": "correct", "errors": {"output 0": {"kernel": 1e-3, "reference": 2e-3}}, "launches": 2},
        {"group": "time", "microseconds": {"forward": us, "both": {"eager": 1.0, "copy": 1.0}}},
        {"group": "step", "loss": 10.5, "loss_error": 1e-3, "seconds": 0.25, "bytes": 3 * 2**30},
        {"group": "update", "torch": {"error": 1e-7, "microseconds": 7250.0, "workspace": 2**29}},
        {"group": "memory", "predicted_bytes": 2**30, "measured_bytes": 2**31, "bytes_error": -0.5},
    ]
    records = [{"item": f"{r['group']} x", "status": "ok", **r} for r in found]
    text = StringIO()
    failed = {"item": "compile y", "group": "compile", "status": "failed: not done after 150 s"}
    report.show([*records, failed], Console(file=text, width=200))
    words = text.getvalue().replace("│", " ").split()
    assert {"1.0e-03", "1.25", "4.00", "1.20", "1.10", "250.0", "3.00", "7.2", "0.50", "-50.0%", "50.0%"} <= set(words)
    assert "compile y: failed: not done after 150 s" in text.getvalue()


class Sleeper:
    """A worker that is done with an item at once, unless the item is named "slow" or "dies"."""

    stopped: list[str] = []  # noqa: RUF012
    items = [Named(name, "group", 0.2) for name in ("first", "slow", "dies", "last")]  # noqa: RUF012

    def __init__(self, dry: bool) -> None:
        self.item = None
        self.connection, self.there = Pipe()

    give, record = runner.Worker.give, runner.Worker.record

    def stop(self) -> None:
        self.stopped.append(self.item.name if self.item else "")

    @property
    def process(self) -> Any:
        return type("Process", (), {"exitcode": -9, "join": lambda self: None})()

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name != "item" or value is None:
            return
        if value.name == "dies":
            self.there.close()
        elif value.name != "slow":
            self.there.send(({"item": value.name, "group": "group", "status": "ok", "wall_seconds": 0.0}, False))


def test_a_run_loses_only_the_item_in_progress(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runner, "Worker", Sleeper)
    path = tmp_path / "found.jsonl"
    with path.open("w") as file:
        Run(file, True, time.monotonic() + 60, [], lambda record: None).all({"group": 1}, lambda item: True)
    found = {record["item"]: record["status"] for record in read(path)}
    assert found.pop("slow").startswith("failed: not done after")
    assert found.pop("dies") == "failed: its process ended with status -9"
    assert found == {"first": "ok", "last": "ok"} and {"slow", "dies"} <= set(Sleeper.stopped)

    with path.open("a") as file:
        file.write('{"item": "cut o')
    begun: list[str] = []
    with path.open("a") as file:
        late = Run(file, True, time.monotonic() + 60, read(path), lambda record: begun.append(record["item"]))
        late.all({"group": 1}, lambda item: item.name != "dies")
    assert begun == ["slow"]


def test_a_run_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "Worker", Sleeper)
    run = Run(StringIO(), True, time.monotonic(), [], lambda record: None)
    run.all({"group": 1}, lambda item: True)
    assert not run.records and [item.name for item in run.left] == ["first", "slow", "dies", "last"]


def test_what_lacks_memory_beside_others_is_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Crowded(Sleeper):
        def record(self) -> Any:
            record, ends = self.connection.recv()
            lacks = record["item"] == "last" and "last fa" not in begun
            return {**record, "status": "failed: OutOfMemoryError: all is taken" if lacks else "ok"}, ends

    begun: list[str] = []
    monkeypatch.setattr(runner, "Worker", Crowded)
    run = Run(StringIO(), False, time.monotonic() + 60, [], lambda r: begun.append(f"{r['item']} {r['status'][:2]}"))
    run.all({"group": 2}, lambda item: item.name in ("first", "last"))
    assert begun == ["first ok", "last fa", "last ok"]
