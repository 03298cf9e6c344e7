"""ZeRO over a part of the data-parallel ranks: losses and gradients of one process, messages of the plan."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from functools import cache
from typing import Any

import models
import pytest
import torch
from torch import Tensor

import autopart
from autopart.compile.check import one_process, worst_error
from autopart.compile.simulate import simulate_plan
from autopart.errors import PartitionError
from autopart.hardware.mesh import Mesh
from autopart.passes.source import Source
from autopart.plan.data import Plan
from autopart.planner.explain.certificate import findings
from autopart.planner.make_plan import make_plan, request_of
from autopart.runtime.simulated import SimulatedGroup

ON_GPUS = ("bias_activation",)
"""Kernels that graphs for GPUs alone have: the plan for a CPU is run as one for a GPU."""
SHARED = ["strategy *.weight C over dp", "strategy *.bias C over dp"]
"""Weights whose gradients are partial sums over dp."""


@cache
def tied(dtype: torch.dtype = torch.float64) -> Source:
    """A GPT-2, whose words and head are one weight."""
    model = models.build("gpt2", layers=2)[0].to(dtype)
    return Source(model, models.batch_for("gpt2", dtype), dtype, ON_GPUS)


@cache
def planned(zero: int, **settings: Any) -> Plan:
    """A plan for four data-parallel ranks that divide among two."""
    source = tied()
    asked = {"micro_batch": 4, "dp": 4, "zero": zero, "shard_size": 2, **settings}
    ranks = asked["dp"] * asked.get("pp", 1) * asked.get("tp", 1)
    request = request_of(source.model, source.batch, no_fuse=ON_GPUS, constraints=SHARED, **asked)
    return make_plan(source, Mesh.of(f"{ranks}:cpu"), request, to_run=True)


CASES = [
    *({"zero": zero} for zero in (1, 2, 3)),
    *({"zero": zero, "pp": 2, "recompute": "full"} for zero in (2, 3)),
    {"zero": 3, "recompute": "mincut", "prefetch": 64},
    {"zero": 1, "offload": "optimizer"},
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_it_trains_like_one_process(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    monkeypatch.setattr("autopart.runtime.flat_slices.HOST_BUCKET_BYTES", 2**13)
    source, plan = tied(), planned(**settings)
    assert (plan.shard_size, plan.dp) == (2, 4)
    assert not findings(plan, source.full(plan.micro_batch, plan.mesh))
    assert Plan.from_json(plan.to_json()) == plan
    loss, gradients = one_process(source.model, source.batch)
    beside = dataclasses.replace(plan, mesh=Mesh.of(f"{plan.mesh.size}:h100-80gb"))
    for at in (plan, beside):
        found = simulate_plan(source, at)
        assert float(found.loss) == pytest.approx(float(loss), rel=1e-10)
        error, worst = worst_error(found.gradients, gradients)
        assert error < 1e-10, worst


def sent_by_rank_zero(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> dict[tuple[str, str], int]:
    """(group, collective) -> bytes that one rank's messages of weights and gradients have in a step."""
    found: dict[tuple[str, str], int] = defaultdict(int)

    def watched(name: str, collective: str) -> None:
        method = getattr(SimulatedGroup, name)

        def run(self: SimulatedGroup, x: Tensor, *more: Any) -> Any:
            if self.axis in ("shard", "replicas") and self.key[1:3] == (0, 0):
                mine = self.rank == 0 and self.key[3] == 0
                found[self.axis, collective] += mine * x.nbytes * (self.size if collective == "all_gather" else 1)
            return method(self, x, *more)

        monkeypatch.setattr(SimulatedGroup, name, run)

    watched("start_reduce_scatter", "reduce_scatter")
    watched("start_all_reduce", "all_reduce")
    watched("start_all_gather", "all_gather")
    simulate_plan(tied(), plan)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_its_messages_are_those_of_the_plan(monkeypatch: pytest.MonkeyPatch, zero: int) -> None:
    plan = planned(zero)
    stated = {(row.axis, row.collective): row.bytes for row in plan.stages[0].traffic}
    found = sent_by_rank_zero(monkeypatch, plan)
    assert found["replicas", "all_reduce"] == pytest.approx(stated["replicas", "all_reduce"], rel=0.01)
    assert found["shard", "reduce_scatter"] == pytest.approx(stated["shard", "reduce_scatter"], rel=0.01)
    assert zero == 3 or stated["replicas", "all_reduce"] * 2 * (zero == 2) in (0, stated["shard", "reduce_scatter"] / 2)
    if zero == 3:
        assert found["shard", "all_gather"] == pytest.approx(stated["shard", "all_gather"], rel=0.02)


@pytest.mark.parametrize(
    ("mesh", "settings", "said"),
    [
        ("4:cpu", {"dp": 4, "shard_size": 3}, "shard_size=3 does not divide dp=4 ranks"),
        ("4:cpu", {"shard_size": 8}, "does not divide the mesh's 4 devices"),
        ("4:cpu", {"shard_size": 2, "zero": 0}, "nothing is divided at zero=0"),
        ("4:cpu", {"shard_size": 1}, "nothing is divided at shard_size=1"),
    ],
)
def test_a_size_that_cannot_be_is_refused(mesh: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(PartitionError) as error:
        autopart.plan(tied().model, mesh, tied().batch, **settings)
    assert said in str(error.value)


def test_a_constraint_says_among_how_many_ranks() -> None:
    request = request_of(tied().model, tied().batch, dp=4, constraints=["shard_size=2", *SHARED], no_fuse=ON_GPUS)
    plan = make_plan(tied(), Mesh.of("2x2:h100-80gb"), request)
    assert plan.zero and plan.shard_size == 2
    assert f"ZeRO {plan.zero} over 2 ranks" in plan.head
