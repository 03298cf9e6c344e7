"""Profile, search and train a model that nobody prepared, by three commands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from commands import ROOT, run


@pytest.mark.slow
@pytest.mark.processes
def test_a_model_that_nobody_prepared_is_profiled_searched_and_trained(tmp_path: Path) -> None:
    """Each layer has a strategy of its own: the first blocks are recomputed, the last ones are not."""
    told = run([ROOT / "examples" / "galvatron.py", "--quick", "--folder", tmp_path, "--steps", 3], tmp_path)
    lines = told.splitlines()
    assert [line.split("autopart ")[1].split()[0] for line in lines if line[:1] == "$"] == ["calibrate", "plan", "run"]
    assert "on 2:mine" in told
    plan = json.loads((tmp_path / "plan.json").read_text())
    modes = [mode for stage in plan["stages"] for mode in stage["recompute"]]
    assert "full" in modes and "none" in modes
    losses = [float(loss) for loss in re.findall(r"step \d+  loss (\S+)", told)]
    assert len(losses) == 3 and losses[-1] < losses[0]
