"""What plans say of memory, against tensors counted, against themselves and against published formulas."""

from __future__ import annotations

import json
import os
from pathlib import Path

import models
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import autopart
from autopart.cli.main import app
from autopart.cost.training_state import Training
from autopart.hardware.mesh import Mesh
from autopart.runtime.optimizers import OPTIMIZERS
from benchmarks.accuracy import memory as benchmark
from benchmarks.accuracy.memory import MIXED, Bench, Memory, Row, layers
from benchmarks.accuracy.published import read
from benchmarks.accuracy.published_runs import as_held

pytestmark = pytest.mark.usefixtures("traced_once")

ZERO = {"dp": 2, "micro_batch": 4, **MIXED}
SUMMED = {"dp": 2, "micro_batch": 2, "recompute": "full", **MIXED}
NEAR = 0.02
TABLE = [
    Row("llama", 1, {"micro_batch": 2, "recompute": "selective"}),
    Row("llama", 1, {"micro_batch": 2, "recompute": "mincut"}),
    Row("llama", 4, {"pp": 2, "tp": 2, "micro_batch": 2}),
    *(Row("llama", 2, {**ZERO, "zero": zero}) for zero in (1, 3)),
    Row("gpt2", 2, {**SUMMED, "zero": 2}),
    Row("gpt2", 4, {**SUMMED, "zero": 3, "pp": 2}),
    *(Row("llama", 4, {**SUMMED, "dp": 4, "micro_batch": 4, "zero": zero, "shard_size": 2}) for zero in (1, 2, 3)),
    Row("wide gpt2", 2, {"tp": 2, "micro_batch": 4, "recompute": "full"}),
]
"""Every value of every setting, of as few traces as that takes; benchmarks.accuracy.memory has many more rows."""
if "AUTOPART_EXAMPLES" in os.environ:
    TABLE += [
        Row("gpt2", 1),
        Row("gpt2", 1, {"micro_batch": 2, "recompute": "full"}),
        Row("llama", 1, {"micro_batch": 2}),
        Row("llama", 2, {"pp": 2, "micro_batch": 2}),
        Row("llama", 4, {"pp": 4, "micro_batch": 1}),
        *(Row("llama", 2, {**SUMMED, "zero": zero}) for zero in (1, 2)),
    ]


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


@pytest.mark.slow
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_bytes_are_those_of_the_tensors(bench: Bench, row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "STEPS", 2)  # the first makes the optimizer's states
    found = bench.compared(row)
    assert all(abs(error) <= NEAR for error in found.errors), found


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_makes_what_is_said_of_it(name: str, together: bool) -> None:
    """Of parameters one after another; what is left of the one before, its root, is not counted."""
    kind, settings = OPTIMIZERS[name]
    weights = [nn.Parameter(torch.ones(size)) for size in (10, 3000)]
    optimizer = kind(weights, lr=1e-3, foreach=together, **settings)
    with Memory(apart=weights) as memory:
        for _ in range(2):
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            before, memory.peak = memory.alive, 0
            optimizer.step()
    training = Training(name, 0, Mesh.parse("1:cpu").group(1, 1), 1, foreach=together)
    each = [training.optimizer_workspace(weight.nbytes, True, False) for weight in weights]
    assert max(memory.peak - before, 0) == pytest.approx(sum(each) if together else max(each), abs=64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"tp": 2, "pp": 2, "micro_batch": 4},
        {"pp": 2, "dp": 2, "micro_batch": 4, "zero": 3, "recompute": "full", **MIXED},
        {"dp": 4, "micro_batch": 4, "zero": 1, "recompute": "selective", **MIXED},
    ],
    ids=str,
)
def test_tenants_sum_to_what_the_plan_says(settings: dict[str, object]) -> None:
    model, batch = models.build("gpt2")
    plan = autopart.plan(model, "4:cpu", batch, **settings)  # type: ignore[arg-type]
    stages = autopart.memory_report(plan, model, batch)
    assert [stage.memory for stage in stages] == [pytest.approx(stage.memory) for stage in plan.stages]
    assert sum(len(stage.blocks) for stage in stages) >= 3
    for stage in stages:
        weights = {each.name for block in stage.blocks for each in block.allocations if each.kind == "parameters"}
        assert weights <= dict(model.named_parameters()).keys()
        copies = [a for block in stage.blocks for a in block.allocations if "master copy" in a.name]
        # At ZeRO 3 only a weight that the planner keeps whole, with no gradient to sum over dp, has a copy of its own.
        assert bool(copies) == ("master" in settings) or (not copies and settings.get("zero") == 3)


@pytest.mark.slow
def test_the_shell_tells_whose_bytes_are(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    given = ["plan", "gpt2", "2:cpu", "--dp", "2", "--sequence", "32", "--precision", "bfloat16", "--save", str(file)]
    assert CliRunner().invoke(app, [*given, "--master", "float32", "--zero", "1"]).exit_code == 0
    shown = CliRunner().invoke(app, ["show", str(file), "--memory"])
    assert shown.exit_code == 0 and "weight, master copy" in shown.stdout
    told = json.loads(CliRunner().invoke(app, ["show", str(file), "--memory", "--json"]).stdout)
    total = sum(each["bytes"] for stage in told for block in stage["blocks"] for each in block["allocations"])
    assert total == pytest.approx(autopart.Plan.load(file).memory_bytes[0], rel=1e-6)


@pytest.mark.slow
def test_a_layer_keeps_what_the_formulas_say() -> None:
    """Korthikanti et al., arXiv 2205.05198: with and without scores, the sequence split or not, and run again."""
    found = list(layers(["GPT-22B"]))
    assert len(found) == 5
    assert all(abs(row.error) <= NEAR for row in found), found


def test_fsdp_under_a_pipeline_keeps_whole_what_level_1_does() -> None:
    rows = [as_held(row) for row in read("torchtitan_llama3.csv")]
    assert {(row.forced["pp"] > 1, row.forced["zero"]) for row in rows} == {(True, 1), (False, 3)}
