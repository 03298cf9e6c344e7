"""Plans on hosts of two kinds: uneven stages, each priced and filled by its own devices."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autopart
from autopart import Mesh, PartitionError, Plan
from autopart.hardware import _devices, load_hardware
from autopart.hardware.mesh import joined
from autopart.ir.labels import is_block
from autopart.planner.explain.why import explain

A100, H100 = "1x4:a100-80gb", "1x4:h100-80gb"
BOTH = f"{A100}+{H100}"


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


class Net(nn.Module):
    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Block(width) for _ in range(blocks)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.device("meta"):
        return Net(2048, 12).bfloat16()


@pytest.fixture(scope="module")
def batch() -> Mapping[str, torch.Tensor]:
    return {"x": torch.zeros(64, 256, 2048, device="meta", dtype=torch.bfloat16)}


@pytest.fixture(scope="module")
def plan(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Plan:
    return autopart.plan(model, BOTH, batch, pp=2)


def blocks_of(plan: Plan) -> list[int]:
    return [sum(is_block(label) for s in stage.segments for label in s.labels) for stage in plan.stages]


def test_cuts_by_time_are_faster(plan: Plan, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> None:
    same = {"pp": 2, "dp": plan.dp, "tp": plan.tp, "micro_batch": plan.micro_batch}
    even = autopart.plan(model, BOTH, batch, constraints=["cuts=uniform"], **same)
    assert blocks_of(even) == [6, 6]
    assert blocks_of(plan)[0] < blocks_of(plan)[1]
    assert autopart.timeline(even).seconds >= 1.3 * autopart.timeline(plan).seconds
    assert plan.gap < 0.01
    for each in (plan, even):
        autopart.certify(each, model, batch)


@pytest.mark.parametrize(("stage", "kind"), [(0, A100), (1, H100)])
def test_a_stage_is_priced_as_on_a_mesh_of_its_kind(
    stage: int, kind: str, plan: Plan, model: nn.Module, batch: Mapping[str, torch.Tensor]
) -> None:
    alone = replace(plan, mesh=Mesh.parse(f"2x{kind[2:]}"))
    mine, theirs = plan.stages[stage], autopart.price_plan(alone, model, batch).stages[stage]
    for name in ("forward_seconds", "backward_seconds", "sync_seconds"):
        assert getattr(mine, name) == pytest.approx(getattr(theirs, name), rel=1e-9), name
    assert mine.memory == theirs.memory
    assert f"stage {stage} on {kind[4:]} " in str(plan)


def test_a_stage_of_both_kinds_is_as_slow_as_the_slowest(
    plan: Plan, model: nn.Module, batch: Mapping[str, torch.Tensor]
) -> None:
    """Rates of the second kind are drawn so that some operators are slower on it, and others on the first."""
    first = Mesh.parse("1x2:a100-80gb")
    second = replace(first, device=replace(first.device, name="other", bandwidth=1e11, flops={"bfloat16": 1e15}))
    made = autopart.plan(model, joined([first, second]), batch, pp=1, dp=4, micro_batch=16)
    autopart.certify(made, model, batch)
    each = [
        autopart.price_plan(replace(made, mesh=replace(kind, hosts=2)), model, batch).stages[0]
        for kind in (first, second)
    ]
    (stage,) = made.stages
    assert stage.forward_seconds >= max(alone.forward_seconds for alone in each) * (1 - 1e-9)
    assert stage.forward_seconds <= sum(alone.forward_seconds for alone in each)
    lines = [[line.seconds for s in of.segments for line in s.lines] for of in (stage, *each)]
    assert lines[0] == pytest.approx([max(pair) for pair in zip(*lines[1:], strict=True)], rel=0.2)


def test_files_keep_the_kinds(plan: Plan) -> None:
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again.mesh == plan.mesh and again.mesh.to_json().keys() == {"parts", "axes"}
    assert again.usable_bytes == pytest.approx([0.92 * 80e9] * 2, rel=0.1)


def test_each_stage_fills_its_own_memory(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> None:
    """The second kind has a hundredth of the memory and no other difference: it gets fewer blocks, and no more memory
    than it has."""
    large = Mesh.parse("1x2:h100-80gb")
    tight = replace(large, device=replace(large.device, name="tight", memory_bytes=int(8e8)))
    made = autopart.plan(model, joined([large, tight]), batch, pp=2, micro_batch=2)
    assert made.fits and made.memory_bytes[0] > made.usable_bytes[1]
    assert blocks_of(made)[0] > blocks_of(made)[1]
    autopart.certify(made, model, batch)
    with pytest.raises(PartitionError, match=r"stage 1 needs .* a tight can give"):
        smaller = replace(tight, device=replace(tight.device, memory_bytes=100_000))
        autopart.plan(model, joined([large, smaller]), batch, pp=2, micro_batch=2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"precision": "float64", "pp": 2}, "a100-80gb.other computes no float64"),
        ({"constraints": ["cuts=time"], "pp": 2}, "stages have several kinds"),
    ],
)
def test_what_both_kinds_cannot(
    settings: dict[str, Any], said: str, model: nn.Module, batch: Mapping[str, torch.Tensor]
) -> None:
    first = Mesh.parse(A100)
    other = replace(first, device=replace(first.device, name="other", flops={"bfloat16": 3e14}))
    with pytest.raises(PartitionError, match=said):
        autopart.plan(model, joined([first, other]), batch, **settings)


def test_questions(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> None:
    found = explain(model, BOTH, batch, pp=2, dp=4, zero=1, micro_batch=16)
    prices = {price.what: price.seconds for price in found.prices()}
    assert prices["products 10 % faster"] < found.plan.step_seconds
    assert found.slack > 0


@pytest.fixture
def half(tmp_path: Path) -> Iterator[str]:
    """A row of a user's file: a CPU half as fast as `cpu`."""
    path = tmp_path / "rows.toml"
    path.write_text('[devices.cpu-half]\nlike = "cpu"\nflops = { float32 = 2e10 }\nbandwidth = 5e9\n')
    load_hardware(path)
    yield "cpu-half"
    del _devices["cpu-half"]


def test_a_step_on_two_kinds_of_cpu(half: str) -> None:
    torch.manual_seed(0)
    model, batch = Net(8, 6), {"x": torch.randn(8, 4, 8)}
    mesh = Mesh.parse(f"1:cpu+1:{half}")
    made = autopart.plan(model, mesh, batch, pp=2)
    found = autopart.simulate(model, mesh, batch, plan=made)
    torch.testing.assert_close(found.loss, model(batch["x"]))
