"""Parameters in 16 bits with master copies in float32: what is kept, and that several ranks train like one."""

from __future__ import annotations

import json
from typing import Any

import mixed_worker
import models
import pytest
from ranks import run_apart
from torch import nn

import autopart
from autopart.cost.message_sizes import BUCKET_BYTES
from autopart.cost.training_state import Training
from autopart.errors import PartitionError
from autopart.hardware.mesh import Mesh

MIXED = {"precision": "bfloat16", "master": "float32"}
NEAR = 5e-2
"""Relative error of gradients that several ranks compute in bfloat16, of 8 bits: some of a few roundings."""
LEVELS: dict[int, list[dict[str, Any]]] = {
    m: [{"dp": 2, "micro_batch": m, "zero": 1, "as_zero": zero} for zero in range(4)] for m in (8, 4)
}
TABLE: dict[str, list[dict[str, Any]]] = {
    "gpt2": [*LEVELS[8], {"pp": 2, "micro_batch": 4}],
    "llama": [*LEVELS[4], {"tp": 2, "micro_batch": 4}],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Every model, trained under every configuration on the same 2 ranks, forks of one process."""
    file = tmp_path_factory.mktemp("mixed") / "results.json"
    assert run_apart(mixed_worker.train_tables, TABLE, file) == 0
    found: dict[str, list[dict[str, Any]]] = json.loads(file.read_text())
    return found


@pytest.fixture(params=TABLE)
def results(request: pytest.FixtureRequest, trained: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One model's."""
    return trained[request.param]


@pytest.mark.processes
def test_several_ranks_train_like_one(results: list[dict[str, Any]]) -> None:
    assert len(results) == 5
    for found in results:
        assert found["loss"] <= 1e-2, found
        assert found["gradients"][0] <= NEAR, found
        assert found["state"][0] <= 1e-2 * found["moved"] + 1e-4 and found["moved"] > 1e-3, found
        assert found["dtypes"] == ["torch.float32"], found
        assert found["kept"] == (["torch.float32"] if found["plan"].count("zero 3") else ["torch.bfloat16"]), found


@pytest.mark.processes
def test_zero_levels_train_alike(results: list[dict[str, Any]]) -> None:
    """With one micro-batch gradients are the same sums at every level, to the bit; with two, in another order."""
    first, *others = results[:4]
    limit = 0.0 if first["settings"]["micro_batch"] == 8 else 1e-5
    for level in others:
        assert level["weights"] == pytest.approx(first["weights"], rel=limit, abs=limit)


@pytest.mark.parametrize(
    ("zero", "held"),
    [(0, (2, 4, 12)), (1, (2, 4, 12 / 8)), (2, (2, 4 / 8, 12 / 8)), (3, (4 / 8, 4 / 8, 8 / 8))],
)
def test_bytes_of_a_parameter(zero: int, held: tuple[float, float, float]) -> None:
    """Level 0 is Megatron-LM's 18 bytes, level 1 its 6 + 12/d, level 3 torchtitan's 16/d."""
    group = Mesh.parse("8:h100-80gb").group(1, 8)
    training = Training("adamw", zero, group, 4, 2.0)
    assert training.state_bytes(2.0, True, True) == pytest.approx(held)
    assert training.state_bytes(2.0, True, False) == pytest.approx((2, 4, 12))
    assert training.state_bytes(2.0, False, False) == (2, 0, 0)
    assert training.reduced_bytes(2.0, True, True) == 2.0
    assert training.reduced_bytes(2.0, False, True) == training.reduced_bytes(2.0, True, False) == 0.0
    assert training.gathered_bytes(2.0) == (2.0 if zero == 3 else 0.0)


@pytest.mark.parametrize(
    ("zero", "summing", "ending"),
    [(0, 0, 4), (1, 0, 4 + 4 / 8), (2, 4 + 4 + 4 / 8, 2 + 2 / 8), (3, 2 + 4 + 4 / 8, 0)],
)
def test_bytes_of_messages(zero: int, summing: float, ending: float) -> None:
    """Of a parameter of 2 bytes that travels in one message; and of many of which a message holds few."""
    training = Training("adamw", zero, Mesh.parse("8:h100-80gb").group(1, 8), 4, 2.0)
    assert (training.grad_reduce_workspace(2.0, 2.0, False), training.end_of_step_workspace(2.0, 2.0)) == pytest.approx(
        (summing, ending)
    )
    few, many, message = 2.0**10, 2.0**40, {3: BUCKET_BYTES}.get(zero, BUCKET_BYTES / 2)
    assert training.end_of_step_workspace(many, few) == pytest.approx(ending / 2 * message)
    sent = (4 + 4 / 8) / 2 * (zero >= 2)
    assert training.grad_reduce_workspace(many, few, False) == pytest.approx(
        (summing / 2 - sent) * many + sent * message
    )
    assert (
        training.grad_reduce_workspace(many, many / 4, False) > training.grad_reduce_workspace(many, few, False)
        or zero < 2
    )
    assert training.grad_reduce_workspace(2.0, 2.0, True) == pytest.approx(summing - 4 * (zero == 2))


@pytest.mark.slow
def test_a_plan_says_so_and_holds() -> None:
    model, batch = models.build("llama")
    plan = autopart.plan(model, "2:cpu", batch, dp=2, zero=2, micro_batch=4, **MIXED)
    assert plan.master == "float32" and "bfloat16, master float32" in str(plan)
    assert autopart.Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    autopart.certify(plan, model, batch)
    memory, count = plan.stages[0].memory, sum(p.numel() for p in model.parameters())
    assert [memory[k] for k in ("parameters", "gradients", "optimizer")] == pytest.approx(
        [2 * count, 2 * count, 6 * count]
    )
    again = autopart.price_plan(plan, model, batch)
    assert again.master == "float32" and again.stages[0].memory == pytest.approx(plan.stages[0].memory)


@pytest.mark.parametrize("master", ["float32", "bfloat16", "int8"])
def test_what_is_no_master_copy_is_refused(master: str) -> None:
    with pytest.raises(PartitionError, match="master="):
        autopart.plan(
            nn.Linear(2, 2), "1:cpu", {"input": nn.Parameter()}, global_batch=1, precision="float32", master=master
        )
