"""Ranks that must have the same weights and the same rows: rank 0's weights are taken, other rows are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import agreement_worker
import pytest
import torch
from on_ranks import on_ranks
from ranks import run_apart
from torch import nn

from autopart.compile.check import one_process, worst_error
from autopart.errors import PartitionError
from autopart.runtime.agreement import EVERY, FIRST_STEPS, checksum, compares
from autopart.runtime.compiled import Compiled

Tensor = torch.Tensor


@pytest.mark.processes
def test_two_processes_without_a_shared_seed(tmp_path: Path) -> None:
    assert run_apart(agreement_worker.train, tmp_path) == 0
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0]["loss"] < 1e-6 and found[0]["gradients"] < 1e-6, found[0]
    for rank in range(2):
        assert found[rank]["whole"].startswith("rank 1 got other rows than rank 0\n"), found[rank]
        assert "DistributedSampler" in found[rank]["whole"]
        assert found[rank]["shares"] == ""


class Tied(nn.Module):
    """Tied weights in the first and in the last layer, an embedding in bfloat16, a buffer of booleans."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.last.weight = self.first.weight
        self.scale = nn.Parameter(torch.randn(8).bfloat16())
        self.register_buffer("mask", torch.rand(8) < 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()) * self.scale.float()
        return self.last(x.relu()).masked_fill(self.mask, 0.0).square().mean()


@pytest.mark.parametrize(
    "settings",
    [{"dp": 2, "zero": 0}, {"dp": 2, "zero": 2}, {"dp": 2, "zero": 3}, {"dp": 2, "zero": 1, "master": "float64"},
     {"tp": 2}, {"pp": 2}],
    ids=str,
)  # fmt: skip
def test_weights_are_rank_zeros(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    models, x = [Tied(), Tied()], torch.randn(4, 8)
    before = copy.deepcopy(models[1].state_dict())

    def run(compiled: Compiled) -> Any:
        return compiled.step({"x": x}), compiled.full_gradients(), compiled.full_state_dict()

    loss, gradients, state = on_ranks(models, x, run, nodes=5, **settings)[0]
    right, wanted = one_process(copy.deepcopy(models[0]), {"x": x})
    assert float(loss) == pytest.approx(float(right), rel=1e-6)
    assert (
        worst_error({n: g.float() for n, g in gradients.items()}, {n: g.float() for n, g in wanted.items()})[0] < 2**-7
    )
    assert all(torch.equal(state[n].to(t.dtype), t) for n, t in models[0].state_dict().items())
    assert all(torch.equal(models[1].state_dict()[n], t) for n, t in before.items())


def test_the_rank_with_other_rows_is_named() -> None:
    """Over tp all four ranks, or with local=True the two of one data_rank, must be given the same rows."""
    torch.manual_seed(0)
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    model = Tied()

    def whole(compiled: Compiled) -> str:
        with pytest.raises(PartitionError) as caught:
            compiled.step({"x": y if compiled.rank in (1, 2) else x})
        return str(caught.value)

    def local(compiled: Compiled) -> tuple[int, str]:
        share = x[2 * compiled.data_rank :][:2]
        compiled.step({"x": share}, local=True)
        with pytest.raises(PartitionError) as caught:
            compiled.step({"x": y[:2] if compiled.rank == 3 else share}, local=True)
        return compiled.data_ranks, str(caught.value)

    settings = {"dp": 2, "tp": 2, "nodes": 5, "micro_batch": 4, "constraints": ["split first.weight dim 0 over tp"]}
    for told in on_ranks([model] * 4, x, whole, **settings):
        assert told.startswith("ranks 1, 2 got other rows than rank 0\n")
    for data_ranks, told in on_ranks([model] * 4, x, local, **settings):
        assert data_ranks == 2 and told.startswith("rank 3 got other rows than rank 2, which has the same data_rank\n")


def test_when_batches_are_compared() -> None:
    assert [step for step in range(2 * EVERY + 1) if compares(step)] == [*range(FIRST_STEPS), EVERY, 2 * EVERY]


def test_a_checksum_is_of_values() -> None:
    x = torch.arange(-7.0, 8.0).view(3, 5)
    for dtype in (torch.bfloat16, torch.int8, torch.bool, torch.complex64):
        assert checksum(x.to(dtype)) == checksum(x.t().contiguous().t().to(dtype))
        assert checksum((x > 0).to(dtype)) != checksum(x.to(dtype))
    assert checksum(torch.tensor(1.0)) != checksum(torch.tensor(2.0))
    assert checksum(torch.empty(0)) == 0
