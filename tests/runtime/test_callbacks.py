"""What callbacks are told, on two stages."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from on_ranks import on_ranks
from torch import Tensor, nn

import autopart
from autopart.runtime.compiled import Compiled


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.last(self.first(x).relu()).square().mean()
        return loss


class Log(autopart.Callback):
    def __init__(self) -> None:
        self.begun: list[autopart.Event] = []
        self.ended: list[autopart.Event] = []
        self.losses: list[tuple[int, float]] = []

    def before(self, event: autopart.Event) -> None:
        self.begun.append(event)

    def after(self, event: autopart.Event, seconds: float) -> None:
        assert seconds >= 0
        self.ended.append(event)

    def trained(self, step: int, loss: float, seconds: float) -> None:
        self.losses.append((step, loss))


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, Any] = {"pp": 2, "micro_batch": 2, "nodes": 5}


def test_every_instruction_is_told(tmp_path: Path) -> None:
    def run(compiled: Compiled) -> Any:
        log, trace, lines = Log(), autopart.Trace(), tmp_path / f"{compiled.rank}.jsonl"
        compiled.callbacks.extend([log, trace, autopart.JsonLines(lines, run="a")])
        losses = [float(compiled.step({"x": X}))]
        compiled.backward({"x": X})
        losses.append(float(compiled.backward({"x": X})))
        compiled.update()
        trace.save(tmp_path / "trace.json", compiled.groups.host)
        return log, losses, lines.read_text()

    found = on_ranks([Model(), Model()], X, run, **SETTINGS)
    for stage, (log, losses, text) in enumerate(found):
        sent = {"send": 6, "recv_grad": 6} if stage == 0 else {"recv": 6, "send_grad": 6}
        assert Counter(e.op for e in log.ended) == {"forward": 6, "backward": 6, "reduce": 2, "step": 2, **sent}
        assert log.begun == log.ended
        assert {e.stage for e in log.ended} == {stage}
        assert [e.step for e in log.ended if e.op == "forward"] == [0, 0, 1, 1, 2, 2]
        assert {e.peer for e in log.ended if "send" in e.op or "recv" in e.op} == {1 - stage}
        assert log.losses == [(0, losses[0]), (2, losses[1])]
        assert [(row["step"], row["loss"], row["run"]) for row in map(json.loads, text.splitlines())] == [
            (0, losses[0], "a"),
            (2, losses[1], "a"),
        ]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert len(events) == sum(len(log.ended) for log, _, _ in found)
    assert {(event["pid"], event["tid"]) for event in events} == {(0, 0), (1, 1)}
    assert min(event["ts"] for event in events) == 0


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(3))
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        loss: Tensor = self.head(x).square().mean()
        return loss


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_the_recompute_of_every_block_is_told_inside_of_its_backward(mode: str) -> None:
    """By micro-batch and stage, and the ranges of a profiler nest."""
    constraints = [f"recompute layers.* {mode}", "stage 1 starts at layers.1"]

    def run(compiled: Compiled) -> Any:
        log, ranges, predicted = Log(), autopart.ProfilerRanges(), autopart.PredictedSeconds(compiled, warm_up=0)
        compiled.callbacks.extend([log, ranges, predicted])
        loss = compiled.step({"x": X})
        assert not ranges.ranges and len(predicted.measured) == 1
        return log, loss, compiled.full_gradients()

    found = on_ranks([Blocks(), Blocks()], X, run, constraints=constraints, **SETTINGS)
    model = Blocks()
    right = model(X)
    right.backward()
    torch.testing.assert_close(found[0][1].float(), right.detach())
    torch.testing.assert_close(found[0][2], {name: p.grad for name, p in model.named_parameters()})
    for stage, (log, _, _) in enumerate(found):
        blocks = 0 if mode == "none" else 2 if stage else 1
        inside: list[str] = []
        recomputed: Counter[tuple[int, int]] = Counter()
        for event in log.begun:
            if event.op == "recompute":
                assert inside[-1] == f"backward {event.micro_batch}"
                recomputed[event.stage, event.micro_batch] += 1
            else:
                inside.append(f"{event.op} {event.micro_batch}")
        assert recomputed == {(stage, batch): blocks for batch in range(2) if blocks}
        assert Counter(log.begun) == Counter(log.ended)


def test_an_error_of_a_callback_ends_the_step_and_leaves_no_gradients() -> None:
    class Fails(autopart.Callback):
        def after(self, event: autopart.Event, seconds: float) -> None:
            if event.op == "backward":
                raise RuntimeError("full")

    compiled = autopart.compile(Model(), "1:cpu", {"x": X}, nodes=5)
    compiled.step({"x": X})
    wanted = compiled.full_gradients()
    compiled.callbacks.append(Fails())
    with pytest.raises(RuntimeError, match="full"):
        compiled.step({"x": X})
    compiled.callbacks.clear()
    compiled.step({"x": X})
    assert all(torch.equal(wanted[name], gradient) for name, gradient in compiled.full_gradients().items())
