"""What a plan remembers of its search, against plans that are forced."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from models import build

import autopart
from autopart import Mesh, PartitionError, Plan
from autopart.hardware.mesh import divisors
from autopart.passes.source import Source
from autopart.planner.make_plan import make_plan, request_of

pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.mark.slow
def test_the_runner_up_is_real() -> None:
    source = Source(*build("gpt2", layers=3), torch.float32)

    def planned(**degrees: int) -> Plan:
        return make_plan(source, Mesh.of("2x2:a100-80gb"), request_of(source.model, source.batch, **degrees))

    plan = planned()
    assert plan.search is not None
    other = plan.search.runner_up
    assert other is not None and (other.pp, other.dp, other.tp) != (plan.pp, plan.dp, plan.tp)
    forced = {}
    for pp, tp in itertools.product(divisors(4), repeat=2):
        if 4 % (pp * tp) == 0 and (pp, 4 // pp // tp, tp) != (plan.pp, plan.dp, plan.tp):
            try:
                forced[pp, 4 // pp // tp, tp] = planned(pp=pp, tp=tp, dp=4 // pp // tp)
            except PartitionError:
                continue
    least = min(each.step_seconds for each in forced.values())
    assert other.bound_seconds <= least * (1 + 1e-6)
    if other.seconds is not None:
        same = forced[other.pp, other.dp, other.tp]
        assert other.bound_seconds <= other.seconds
        assert same.bound_seconds <= other.seconds * (1 + 1e-6)


def test_no_runner_up_where_the_degrees_are_given() -> None:
    model, batch = build("mlp")
    plan = autopart.plan(model, "2:cpu", batch, pp=1, tp=1)
    assert plan.search is not None and plan.search.runner_up is None


@pytest.mark.slow
def test_memory_limits_a_plan_where_more_of_it_would_be_faster() -> None:
    model, batch = build("gpt2", layers=4)
    mesh = Mesh.of("1:a100-80gb")
    free = autopart.plan(model, mesh, batch)
    assert free.search is not None and free.search.limit != "memory"
    scarce = replace(mesh, device=replace(mesh.device, memory_bytes=round(max(free.memory_bytes) / 0.92 * 0.9)))
    tight = autopart.plan(model, scarce, batch)
    assert tight.search is not None and tight.search.limit == "memory"
    assert tight.step_seconds > free.step_seconds
