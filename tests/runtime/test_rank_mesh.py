"""The place of a rank in its mesh, and the device that it takes."""

from __future__ import annotations

import pytest
import torch

from autopart.runtime import groups
from autopart.runtime.groups import AxisPlace, Groups, RankMesh
from autopart.runtime.simulated import run_simulated


def test_every_rank_knows_its_place_along_every_axis() -> None:
    """Neighbours share a model-parallel group; stages lie farthest apart, as in Megatron-LM."""

    def place(rank: Groups) -> RankMesh:
        return rank.mesh()

    found = run_simulated(2, 3, 2, place)
    assert [mesh.rank for mesh in found] == list(range(12)) and {mesh.size for mesh in found} == {12}
    assert found[9].pipeline == AxisPlace(2, 1, (3, 9))
    assert found[9].data == AxisPlace(3, 1, (7, 9, 11))
    assert found[9].model == AxisPlace(2, 1, (8, 9))
    assert str(found[9]) == "rank 9 of 12: pipeline 1 of 2, data 1 of 3, model 1 of 2"
    for mesh in found:
        for axis in (mesh.pipeline, mesh.data, mesh.model):
            assert axis.ranks[axis.rank] == mesh.rank and len(axis.ranks) == axis.size


@pytest.mark.parametrize(
    ("environment", "number"),
    [({}, 0), ({"RANK": "6"}, 2), ({"RANK": "6", "LOCAL_RANK": "1"}, 1), ({"RANK": "3"}, 3)],
    ids=str,
)
def test_a_rank_without_torchrun_takes_a_gpu_of_its_own(
    environment: dict[str, str], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On hosts of four GPUs that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT alone describe (env://)."""
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert groups._device() == torch.device("cuda", number) and taken == [torch.device("cuda", number)]
