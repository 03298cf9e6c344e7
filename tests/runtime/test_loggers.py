"""Callbacks that show and record training."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from on_ranks import on_ranks
from test_callbacks import SETTINGS, Model, X

import autopart
from autopart.plan.timeline import timeline
from autopart.runtime.compiled import Compiled

pytestmark = pytest.mark.usefixtures("traced_once")


def train(compiled: Compiled, steps: int) -> list[float]:
    """Losses of some steps."""
    compiled.optimizer(torch.optim.SGD, lr=0.1)
    return [float(compiled.step({"x": X}, clip_grad_norm=1.0)) for _ in range(steps)]


def on_two_stages(run: Any) -> list[Any]:
    """What `run` gives on every simulated rank."""
    return on_ranks([Model(), Model()], X, run, same=True, **SETTINGS)


def test_a_progress_bar_on_stderr_of_rank_0(capsys: pytest.CaptureFixture[str]) -> None:
    def run(compiled: Compiled) -> list[float]:
        compiled.callbacks.append(autopart.Progress(compiled, steps=3))
        return train(compiled, 3)

    losses, _ = on_two_stages(run)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(rf"step 3/3 \S+ loss {losses[-1]:.4f}  grad norm \S+  [\d,]+ samples/s \S+ \S+\s*", shown.err)


class Recorder(ModuleType):
    """In place of torch.utils.tensorboard and of wandb: what it is told to write."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.made: list[Any] = []
        self.rows: list[tuple[int, str, float]] = []
        self.closed = 0

    def SummaryWriter(self, folder: str) -> Recorder:
        self.made.append(folder)
        return self

    def init(self, **settings: Any) -> Recorder:
        self.made.append(settings)
        return self

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.rows.append((step, name, value))

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.rows.extend((step, name, value) for name, value in metrics.items())

    def close(self) -> None:
        self.closed += 1

    finish = close


@pytest.mark.parametrize("name", ["torch.utils.tensorboard", "wandb"])
def test_figures_of_every_update_are_written_by_rank_0(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(name)
    monkeypatch.setitem(sys.modules, name, recorder)

    def run(compiled: Compiled) -> Any:
        if name == "wandb":
            callback: Any = autopart.WeightsAndBiases(compiled, project="p", config={"a": 1})
        else:
            callback = autopart.TensorBoard(compiled, tmp_path)
        compiled.callbacks.append(callback)
        losses = train(compiled, 2)
        callback.close()
        return losses, float(compiled.grad_norm or 0.0), compiled.plan

    (losses, norm, plan), _ = on_two_stages(run)
    told = {(step, metric): value for step, metric, value in recorder.rows}
    assert [told[step, "loss"] for step in range(2)] == losses
    assert told[1, "grad_norm"] == norm
    assert told[1, "samples_per_second"] > 0 and (0, "samples_per_second") not in told
    assert recorder.closed == 1
    config = {"plan": plan.head, "predicted_seconds": plan.step_seconds, "a": 1}
    assert recorder.made == [{"config": config, "project": "p"} if name == "wandb" else str(tmp_path)]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_not_installed_is_named(name: str, tmp_path: Path) -> None:
    if find_spec(name):
        pytest.skip(f"{name} is installed")
    compiled = autopart.compile(Model(), "1:cpu", {"x": X}, nodes=5)
    with pytest.raises(autopart.PartitionError, match=f"needs {name}\n(.|\n)*pip install"):
        if name == "wandb":
            autopart.WeightsAndBiases(compiled)
        else:
            autopart.TensorBoard(compiled, tmp_path)


def test_ranges_of_the_profiler_have_the_names_of_instructions() -> None:
    compiled = autopart.compile(Model(), "1:cpu", {"x": X}, nodes=5, micro_batch=2)
    compiled.callbacks.append(autopart.ProfilerRanges())
    train(compiled, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(compiled, 2)
    events = list(profile.events() or ())
    ranges = {event.name: event for event in events if event.name.startswith("stage ")}
    assert set(ranges) == {
        *(f"stage 0 {op} micro-batch {number}" for op in ("FORWARD", "BACKWARD") for number in range(2)),
        "stage 0 REDUCE",
        "stage 0 STEP",
    }
    inside = {child.name for child in ranges["stage 0 FORWARD micro-batch 1"].cpu_children}
    assert any("linear" in name or "addmm" in name or "mm" in name for name in inside), inside


def test_a_range_ends_with_an_instruction_that_fails() -> None:
    compiled = autopart.compile(Model(), "1:cpu", {"x": X}, nodes=5)
    ranges = autopart.ProfilerRanges()
    compiled.callbacks.append(ranges)
    right, compiled.executor.actions = compiled.executor.actions, {}
    with pytest.raises(KeyError):
        train(compiled, 1)
    compiled.executor.actions = right
    assert len(ranges.ranges) == 1
    train(compiled, 1)
    assert not ranges.ranges


def test_predicted_seconds_are_held_against_measured_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that every instruction moves by one second, whatever the machine."""
    clock = [0.0]
    monkeypatch.setattr("autopart.runtime.callbacks.time.perf_counter", lambda: clock[0])
    lines: list[str] = []
    compiled = autopart.compile(Model(), "1:cpu", {"x": X}, nodes=5, micro_batch=2)
    for op, action in list(compiled.executor.actions.items()):

        def slow(at: Any, action: Any = action) -> None:
            clock[0] += 1.0
            action(at)

        compiled.executor.actions[op] = slow
    report = autopart.PredictedSeconds(compiled, steps=3, warm_up=1, report=lines.append)
    compiled.callbacks.append(report)
    train(compiled, 2)
    compiled.evaluate({"x": X})  # whose forward passes are no part of a step
    train(compiled, 1)
    assert len(report.measured) == 1 and report.line is None
    train(compiled, 5)
    plan = compiled.plan
    predicted = timeline(plan).stages[0].seconds
    causes = report.seconds()
    assert causes["step"] == (plan.step_seconds, 4.0)
    assert causes["forward"] == (predicted["forward"], 2.0) and causes["backward"] == (predicted["backward"], 2.0)
    assert causes["other"] == (predicted["idle"], 0.0) and causes["waiting"] == (0.0, 0.0)
    assert lines == [report.line]
    assert re.fullmatch(
        r"step .* predicted, 4\.00 s measured \(median of 3\): 0\.00\. Stage 0, predicted and measured: "
        r"(forward|backward) .*, 2\.00 s; (forward|backward) .*, 2\.00 s; .*",
        lines[0],
    )


def test_predicted_seconds_on_two_stages(capsys: pytest.CaptureFixture[str]) -> None:
    def run(compiled: Compiled) -> Any:
        report = autopart.PredictedSeconds(compiled, steps=2, warm_up=0)
        compiled.callbacks.append(report)
        train(compiled, 3)
        return report.seconds(), report.line

    found = on_two_stages(run)
    assert capsys.readouterr().err == f"{found[0][1]}\n"
    for stage, (causes, line) in enumerate(found):
        assert f"Stage {stage}, predicted and measured: " in line
        assert causes["waiting"][1] > 0 and causes["sending"][1] > 0
        whole = sum(measured for name, (_, measured) in causes.items() if name != "step")
        assert whole == pytest.approx(causes["step"][1])  # the median of two is their mean
