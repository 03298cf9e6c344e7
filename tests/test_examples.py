"""The example of a whole training, run as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.processes
def test_a_training_is_killed_and_goes_on_under_another_plan(tmp_path: Path) -> None:
    """With the losses of one process, in float64."""
    command = [sys.executable, str(ROOT / "examples" / "train.py"), "gpt2", "--steps", "20", "--float64"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    told = re.search(r"the losses differ by at most (\S+)", done.stdout.decode())
    assert told and float(told[1]) <= 1e-10, done.stdout.decode()
    assert (tmp_path / "build/train/gpt2/model/model.safetensors").exists()
