"""A training whose rank is killed goes on from the last checkpoint, by itself or on fewer ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import run_apart
from restart_worker import EVERY, KILLED_AT, STEPS, launched, torchrun

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]
AGAIN = list(range(KILLED_AT // EVERY * EVERY, STEPS))
"""The steps after the last checkpoint before the rank was killed."""


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Of one process that nothing happens to."""
    folder = tmp_path_factory.mktemp("alone")
    assert run_apart(launched, folder, folder / "output", 1, False, {}) == 0, (folder / "output").read_text()
    return [row["loss"] for row in rows(folder)]


def rows(folder: Path) -> list[dict[str, Any]]:
    """What rank 0 logged, step by step."""
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def check(found: list[dict[str, Any]], losses: list[float]) -> None:
    """Steps up to the failure, then those from the last checkpoint on, all with the right losses."""
    assert [row["step"] for row in found] == [*range(KILLED_AT), *AGAIN]
    assert [row["loss"] for row in found] == pytest.approx([losses[row["step"]] for row in found], rel=1e-5)


def test_torchrun_starts_the_ranks_again(tmp_path: Path, losses: list[float]) -> None:
    status = run_apart(torchrun, tmp_path, tmp_path / "output", 2, 1)
    print((tmp_path / "output").read_text())
    assert status == 0
    check(rows(tmp_path), losses)


def test_fewer_ranks_go_on_with_another_plan(tmp_path: Path, losses: list[float]) -> None:
    split = {"tp": 2, "pp": 2, "constraints": ["split first.weight dim 0 over tp"]}
    assert run_apart(launched, tmp_path, tmp_path / "output", 4, True, split) == 128 + 9
    assert "rank 1 was killed by SIGKILL" in (tmp_path / "output").read_text()
    status = run_apart(launched, tmp_path, tmp_path / "output", 2, False, {})
    print((tmp_path / "output").read_text())
    assert status == 0
    found = rows(tmp_path)
    check(found, losses)
    assert found[0]["degrees"] == "mesh(pp=2, dp=1, tp=2)"
    assert found[-1]["degrees"] != found[0]["degrees"]
