"""Tiny models of ten architectures train on four processes as on one: a sample of benchmarks/coverage/zoo.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).parents[1] / "support" / "zoo_worker.py"
SAMPLE = """clm:bloom clm:deepseek_v3 clm:falcon clm:gpt_oss clm:mamba clm:mixtral mlm:deberta-v2 s2s:t5gemma
    img:convnext img:resnet""".split()


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What every architecture of the sample is off by."""
    results = tmp_path_factory.mktemp("zoo") / "results.json"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"}
    subprocess.run([sys.executable, str(WORKER), ",".join(SAMPLE), str(results)], env=env, check=False)
    found: dict[str, dict[str, Any]] = json.loads(results.read_text())
    return found


@pytest.mark.processes
@pytest.mark.timeout(900)  # the first waits for all
@pytest.mark.parametrize("name", SAMPLE)
def test_an_architecture_trains_like_one_process(errors: dict[str, dict[str, Any]], name: str) -> None:
    assert errors[name]["loss"] <= 1e-5
    assert errors[name]["gradients"] <= 1e-5, errors[name]["worst"]
