"""The harness: every system trains what one process trains, and what does not is marked."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from commands import run

from autopart.compile.bench.judge import compare, judge, shows_gradients
from autopart.compile.bench.own import uniform
from autopart.compile.bench.report import COLUMNS, csv_text
from benchmarks.harness.adapters.pipelining import KINDS

ROOT = Path(__file__).parents[2]
TINY = ["--layers", "4", "--width", "32", "--heads", "4", "--vocabulary", "64", "--sequence", "16", "--rounds", "2"]
OPTIONAL = {"Lightning Fabric": "lightning", "DeepSpeed": "deepspeed", "Galvatron": "galvatron"}
"""The start of a system's name -> the package that it needs, which is not among autopart's own."""


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(320)
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("model", ["llama", "gpt2"] if "AUTOPART_EXAMPLES" in os.environ else ["llama"])
def test_every_system_trains_what_one_process_trains(model: str, tmp_path: Path) -> None:
    to_json, to_csv = tmp_path / "found.json", tmp_path / "found.csv"
    files = ["--json", str(to_json), "--csv", str(to_csv)]
    run(["-m", "benchmarks.harness", "--model", model, *TINY, *files])
    found = json.loads(to_json.read_text())
    losses = found["config"]["losses"]
    assert losses[-1] < losses[0]
    rows = {row["system"]: row for row in found["rows"]}
    assert len(rows) == len(found["rows"])
    for name, row in rows.items():
        package = next((p for start, p in OPTIONAL.items() if name.startswith(start)), None)
        if package and find_spec(package) is None:
            assert row["status"] == f"not installed: No module named '{package}'"
        elif package:
            assert row["status"] == "ok" or row["status"].startswith(("not ", "failed")), row
        elif (name, model) == ("transformers tp_plan", "gpt2"):
            assert row["status"].startswith("not expressible")
        else:
            assert row["status"] == "ok", row
            assert row["losses"] == pytest.approx(losses, rel=1e-4)
            assert len(row["seconds"]) == 2
    written = list(csv.DictReader(to_csv.open()))
    assert [row["system"] for row in written] == list(rows)
    assert {row["system"] for row in written if row["to_like"]} >= {"DDP", "by hand tp=2", "by hand pp=2"}


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(320)
@pytest.mark.xdist_group("processes")
def test_four_ranks_by_hand() -> None:
    names = ["by hand pp=2 tp=2", "by hand pp=2 tp=2 sp", "by hand tp=4 sp", "by hand pp=4"]
    out = run(["-m", "benchmarks.harness", "--ranks", "4", "--json", "/dev/stdout", *TINY, "--systems", *names])
    found = json.loads(out[out.index("{\n") :])
    assert [(row["system"], row["status"]) for row in found["rows"]] == [
        (row["system"], "ok") for row in found["rows"] if row["system"] in names
    ]
    assert len(found["rows"]) == len(names)


@pytest.mark.processes
@pytest.mark.xdist_group("processes")
def test_the_command_takes_a_model_of_ones_own(tmp_path: Path) -> None:
    model, to_csv = "examples/tiny.py:model", tmp_path / "found.csv"
    given = ["-m", "autopart.cli.main", "bench", model, "2:cpu", "--rounds", "1", "--warm-up", "1"]
    page = tmp_path / "found.html"
    found = json.loads(run([*given, "--csv", str(to_csv), "--report", str(page), "--tp", "2", "--json"]))
    rows = {row["system"]: row for row in found["rows"]}
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert {"autopart", "one process", "DDP", "ZeroRedundancyOptimizer", "FSDP2", *uniform(2)} == set(rows)
    assert rows["autopart"]["note"].startswith("tp=2")
    assert rows["one process"]["losses"] == pytest.approx(found["config"]["losses"], rel=1e-6)
    assert len(list(csv.DictReader(to_csv.open()))) == len(rows)
    assert all((rows[name].get("predicted_seconds", 0) > 0) == name.startswith("autopart") for name in rows)
    numbers = json.loads(page.read_text().partition('id="numbers">')[2].partition("</script>")[0])
    assert [row["system"] for row in numbers["bench"]["rows"]] == list(rows)
    assert numbers["measured"]["seconds"] > 0 and numbers["degrees"]["tp"] == 2


@pytest.mark.slow
def test_the_command_compares_in_float32() -> None:
    given = ["-m", "autopart.cli.main", "bench", "examples/tiny.py:model", "2:cpu", "--precision", "bfloat16"]
    made = subprocess.run([sys.executable, *given], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert made.returncode == 2
    assert "float32" in made.stderr and not made.stdout


def row(system: str, losses: list[float], seconds: list[float], like: str = "") -> dict[str, Any]:
    return {"system": system, "status": "ok", "losses": losses, "seconds": seconds, "like": like}


@pytest.mark.parametrize("wrong", [[2.0, 1.7], [2.1, 1.5], [2.0, math.nan], [math.nan, 1.5]])
def test_a_wrong_system_is_marked_and_not_ranked(wrong: list[float]) -> None:
    rows = {
        "autopart": row("autopart", [2.0, 1.5], [1.0, 2.0]),
        "right": row("right", [2.00001, 1.50001], [2.0, 5.0], "autopart"),
        "wrong": row("wrong", wrong, [0.1, 0.1], "autopart"),
    }
    judge(rows.values(), [2.0, 1.5])
    compare(rows)
    assert rows["right"]["status"] == "ok"
    assert rows["right"]["to_autopart"] == rows["right"]["to_like"] == 2.25
    assert rows["wrong"]["status"].startswith("differs")
    assert "to_autopart" not in rows["wrong"]


def test_a_wrong_autopart_ranks_nothing() -> None:
    rows = {"autopart": row("autopart", [2.0, 1.6], [1.0]), "right": row("right", [2.0, 1.5], [2.0], "autopart")}
    judge(rows.values(), [2.0, 1.5])
    compare(rows)
    assert rows["autopart"]["status"].startswith("differs")
    assert not {"to_autopart", "to_like"} & set(rows["right"])


def test_losses_that_stand_still_show_no_gradients() -> None:
    assert not shows_gradients([2.0, 2.001])
    assert shows_gradients([2.0, 1.9])


def test_csv_has_a_line_for_each_system() -> None:
    rows = [row("a", [1.0], [0.5]), {"system": "b, c", "status": "not installed: x", "like": ""}]
    written = list(csv.DictReader(io.StringIO(csv_text({"rows": rows}))))
    assert [r["system"] for r in written] == ["a", "b, c"]
    assert tuple(written[0]) == COLUMNS


def test_uniform_configurations_fill_the_ranks() -> None:
    assert list(uniform(1)) == ["autopart dp=1"]
    assert {"autopart pp=2 dp=2 1f1b", "autopart dp=2 tp=2", "autopart pp=4 gpipe", "autopart dp=4 zero=3"} <= set(
        uniform(4)
    )


def test_stages_lie_on_all_ranks_alike() -> None:
    for kind in KINDS.values():
        places = [kind.rank_of(stage, 4) for stage in range(4 * kind.stages)]
        assert sorted(places) == sorted(list(range(4)) * kind.stages)
        if kind.v:
            assert places == [0, 1, 2, 3, 3, 2, 1, 0]
