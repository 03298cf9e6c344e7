"""Tiny models of some architectures train on four processes as on one: a sample of benchmarks/coverage/zoo.py.

One has experts, attention over a latent space and no dropout; one a scan instead of attention; one attention to where
words are; one convolutions and the means of a batch. AUTOPART_EXAMPLES takes six more.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import zoo_worker
from ranks import run_apart

SAMPLE = ["clm:deepseek_v3", "clm:mamba", "mlm:deberta-v2", "img:resnet"]
if "AUTOPART_EXAMPLES" in os.environ:
    SAMPLE += ["clm:bloom", "clm:falcon", "clm:gpt_oss", "clm:mixtral", "s2s:t5gemma", "img:convnext"]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What every architecture of the sample is off by."""
    results = tmp_path_factory.mktemp("zoo") / "results.json"
    run_apart(zoo_worker.train_zoo, SAMPLE, results)
    found: dict[str, dict[str, Any]] = json.loads(results.read_text())
    return found


@pytest.mark.processes
@pytest.mark.timeout(900)  # the first waits for all
@pytest.mark.parametrize("name", SAMPLE)
def test_an_architecture_trains_like_one_process(errors: dict[str, dict[str, Any]], name: str) -> None:
    assert errors[name]["loss"] <= 1e-5
    assert errors[name]["gradients"] <= 1e-5, errors[name]["worst"]
