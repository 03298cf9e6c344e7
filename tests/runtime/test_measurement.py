"""What a run shows besides seconds of instructions: peak bytes, and bytes and seconds of messages."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from on_ranks import on_ranks, split_by
from torch import Tensor, nn

from autopart.plan.report.measured import MeasuredStep, measured_step
from autopart.runtime.compiled import Compiled
from autopart.runtime.measurement import Measurement
from autopart.runtime.peak_bytes import PeakBytes

STEPS = 5


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x.square().mean()


def run_on(ranks: int, **settings: Any) -> tuple[Compiled, MeasuredStep]:
    """A program of a rank and what was measured of its steps, by simulated ranks."""
    x = torch.ones(32, 64)

    def run(compiled: Compiled) -> tuple[Compiled, dict[str, Any]]:
        compiled.optimizer(torch.optim.AdamW, lr=1e-3)
        compiled.callbacks.append(measurement := Measurement(compiled, STEPS))
        for _ in range(STEPS):
            compiled.step({"x": x})
        return compiled, measurement.gather(compiled.groups.host)

    found = on_ranks([Model() for _ in range(ranks)], x, run, same=True, **settings)
    compiled, trace = found[0]
    return compiled, measured_step(trace, compiled.plan)


@pytest.mark.parametrize("settings", [{"micro_batch": 32}, {"micro_batch": 8}], ids=str)
def test_the_peak_of_one_rank_is_the_plans(settings: dict[str, Any]) -> None:
    """Its states of the optimizer among them, and without what two other steps made."""
    compiled, step = run_on(1, **settings)
    (peak,) = step.peak_bytes
    assert step.of == STEPS - 2 and peak == pytest.approx(compiled.plan.memory_bytes[0], rel=0.03)


EXACT = [s for s in split_by("layers.*.weight over tp") if s != {"pp": 1} and s.get("zero") != 3]
"""Settings on several ranks. At ZeRO 3 plans count biases as if they were gathered again."""


@pytest.mark.parametrize("settings", EXACT, ids=str)
def test_messages_are_the_plans_traffic(settings: dict[str, Any]) -> None:
    ranks = settings.get("tp", 1) * settings.get("pp", 1) * settings.get("dp", 1)
    compiled, step = run_on(ranks, **settings)
    told, found = defaultdict[tuple[str, str], float](float), defaultdict[tuple[str, str], float](float)
    for stage in compiled.plan.stages:
        for traffic in stage.traffic:
            told[traffic.axis, traffic.collective] += traffic.bytes
    for row in (row for rows in step.messages for row in rows):
        assert row.calls > 0 and row.seconds > 0
        found[row.axis, row.collective] += row.bytes
    assert found == pytest.approx(told, rel=0.02) and found


def test_bytes_count_from_when_they_are_made_until_they_are_freed() -> None:
    known, apart = torch.ones(100), torch.ones(1000)
    with PeakBytes(known=[known, known[:10]], apart=[apart]) as counter:
        assert counter.peak == 400
        more = known + 1
        del more
        both = [known + 2, apart[:50] + 3]
        view = both[0][:3]
    assert counter.peak == 400 + 400 + 200 and counter.alive == 1000
    del both
    assert counter.alive == 800 and view.numel() == 3
