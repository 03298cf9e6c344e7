"""The GPU script: what it would run, and some of it dry."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from ranks import run_main

from benchmarks.accuracy import gpu

pytestmark = pytest.mark.slow

ROWS = list(gpu.rows())


def test_there_are_rows_enough() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert sum(row.devices == 1 for row in ROWS) >= 30
    assert {row.devices for row in ROWS} == {1, 2, 4, 8}
    assert {row.model for row in ROWS} == set(gpu.MODELS)
    several = [row.given for row in ROWS if row.devices > 1]
    assert {given["zero"] for given in several} == {0, 1, 2, 3}
    assert all(row.samples % row.given["micro_batch"] == 0 for row in ROWS)


@pytest.mark.parametrize("row", [r for r in ROWS if r.name in ("vit-large 32 bfloat16 recompute=full",
                                                               "llama-1b 1x8192 bfloat16")],
                         ids=lambda r: r.model)  # fmt: skip
def test_rows_are_planned_for_a_gpu(row: gpu.Row) -> None:
    plan = gpu.plan_of(row, dry=False, device="h100-80gb")
    assert plan.fits and plan.precision == "bfloat16" and plan.recompute == row.given["recompute"]


@pytest.mark.processes
def test_some_rows_run_dry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ranks are forks that call its main function, as it would start them."""
    monkeypatch.setattr(gpu, "launch", lambda line, ranks, _: run_main(gpu.main, line[3:], ranks, tmp_path / "output"))
    names = ["llama-1b 8x2048 bfloat16 dp=2 zero=3"]
    if "AUTOPART_EXAMPLES" in os.environ:
        names.insert(0, "gpt2 16x1024 bfloat16 micro_batch=4")
    file = tmp_path / "dry.json"
    assert gpu.main(["--dry", "--only", *names, "--json", str(file)]) == 0
    told = json.loads(file.read_text())
    assert told["dry"] and [row["name"] for row in told["rows"]] == names
    for row in told["rows"]:
        assert row["status"] == "ok" and row["trained_loss"] < row["loss"], row
        assert not any("seconds" in key or "bytes" in key for key in row)
    assert told["summary"] == {}


def test_errors_are_of_medians_and_of_the_fullest_rank() -> None:
    row = ROWS[0]
    plan = gpu.plan_of(gpu.Row("gpt2", 8, 16, settings=row.settings), dry=True, device="cpu")
    rank = {"stage": 0, "loss": 2.0, "reference_loss": 2.0, "trained_loss": 1.0}
    seconds = [{"seconds": [1.0, 2.0, 3.0]}, {"seconds": [2.0, 1.0, 9.0]}]
    ranks = [
        {**rank, **s, "seconds_with_optimizer": [4.0] * 3, "bytes": b} for s, b in zip(seconds, (5, 7), strict=True)
    ]
    found = gpu.compared(row, plan, {"status": "ok", "ranks": ranks}, dry=False)
    assert found["measured_seconds"] == 2.0 and found["measured_bytes"] == [7]
    assert found["seconds_error"] == pytest.approx(plan.step_seconds / 2.0 - 1)
    assert found["bytes_error"] == pytest.approx(plan.memory_bytes[0] / 7 - 1)
    assert gpu.summary([found, {**found, "seconds_error": 0.5, "bytes_error": -0.5}, {"status": "out of memory"}])[
        "bytes_error"
    ] == pytest.approx({
        "rows": 2, "mean": (abs(found["bytes_error"]) + 0.5) / 2, "median": (abs(found["bytes_error"]) + 0.5) / 2,
        "mean_signed": (found["bytes_error"] - 0.5) / 2,
    })  # fmt: skip
    wrong = [{**rank, "loss": 3.0, "seconds": [1.0], "seconds_with_optimizer": [1.0], "bytes": 1}]
    assert gpu.compared(row, plan, {"status": "ok", "ranks": wrong}, dry=True)["status"].startswith("the loss is 3")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        gpu.main([])
