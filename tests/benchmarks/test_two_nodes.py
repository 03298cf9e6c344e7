"""The bytes that two hosts send each other in a step, against those that plans tell."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import models
import pytest

import autopart
from autopart.errors import PartitionError
from autopart.plan.host_traffic import bytes_between_hosts
from autopart.plan.stages import StageTraffic
from benchmarks.runtime.two_nodes import can_make_hosts

ROOT = Path(__file__).parents[2]
COUNTED = (
    ["dp=4, ZeRO 3", "tp=4, recompute full", "pp=2, dp=2"]
    if "AUTOPART_EXAMPLES" in os.environ
    else ["dp=4, ZeRO 3", "pp=2, dp=2"]
)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(900)
@pytest.mark.skipif(not can_make_hosts(), reason="network namespaces need the right to make them")
def test_the_network_carries_what_plans_tell() -> None:
    """Ranks of two network namespaces over gloo: collectives along dp and tp, messages, and tied weights along pp."""
    command = [sys.executable, "-m", "benchmarks.runtime.two_nodes", "--json", *COUNTED]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    rows = json.loads(done.stdout)
    assert [row["name"] for row in rows] == COUNTED
    for row in rows:
        assert row["foretold"] > 1e6 and abs(row["error"]) < 0.02, row


@pytest.mark.slow
def test_a_plan_tells_what_crosses_between_hosts() -> None:
    """Of 4-way data parallelism over two hosts the ring crosses twice; within one host nothing does."""
    model, batch = models.build("gpt2")
    count = sum(p.numel() for p in model.parameters())
    plan = autopart.plan(model, "2x2:cpu", batch, dp=4, zero=0)
    assert plan.bytes_between_hosts == pytest.approx(2 * 2 * 3 / 4 * 4 * count, rel=1e-3)
    assert "between hosts" in str(plan)
    inside = autopart.plan(model, "4:cpu", batch, dp=4, zero=0)
    assert inside.bytes_between_hosts == 0 and "between hosts" not in str(inside)
    gpus = dataclasses.replace(plan, mesh=autopart.Mesh.of("2x2:h100-80gb"))
    rows = (StageTraffic("dp", "reduce_scatter", 400), StageTraffic("dp", "all_to_all", 400))
    stage = dataclasses.replace(plan.stages[0], traffic=rows)
    # Rings cross two edges; of an all-to-all, which gloo's reduce-scatter is too, each of 4 ranks sends half of its 4
    # parts to the other host.
    assert bytes_between_hosts(dataclasses.replace(gpus, stages=(stage,))) == 2 * 300 + 4 * 2 * 100
    assert bytes_between_hosts(dataclasses.replace(plan, stages=(stage,))) == 2 * 4 * 2 * 100
    with pytest.raises(PartitionError, match="moves"):
        autopart.certify(dataclasses.replace(plan, stages=(stage,)), model, batch)
