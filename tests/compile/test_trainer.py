"""autopart.Trainer: transformers.Trainer's logs, weights, predictions and checkpoints, on a mesh."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_worker
from ranks import run_apart
from torch import Tensor
from trainer_worker import SETTINGS

LIMIT = 1e-5
"""Relative error in float32."""
RUNS = [
    pytest.param(case, name, id=f"{case}-{name}", marks=pytest.mark.xdist_group(f"trainer of {case}"))
    for case, settings in SETTINGS.items()
    for name in ("whole", "resumed")[: len(settings)]
]

Run = tuple[dict[str, Any], dict[str, Any]]


def told(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Logs without what is measured by the clock."""
    return [{k: v for k, v in row.items() if not k.endswith(("runtime", "_per_second"))} for row in history]


def alike(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= LIMIT * wanted.abs().max()


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """What a run told, and its tensors. The runs of a case are made when the first of them is asked for."""

    @cache
    def folder_of(case: str, who: str) -> Path:
        folder = tmp_path_factory.mktemp(f"{case}-{who}")
        status = run_apart(getattr(trainer_worker, who), case, folder)
        assert status == 0, folder.with_suffix(".txt").read_text()[-4000:]
        return folder

    def read(case: str, who: str, name: str, rank: int = 0) -> Run:
        path = folder_of(case, who) / name
        return json.loads((path / f"{rank}.json").read_text()), torch.load(path / f"{rank}.pt")

    return read


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(("case", "name"), RUNS)
def test_a_run_is_that_of_one_process(read: Callable[..., Run], case: str, name: str) -> None:
    """Losses, norms, learning rates, evaluations, the best model, predictions: on the first rank and on the last."""
    wanted, tensors = read(case, "alone", name)
    assert (case, wanted["best"]) in (("t5", "checkpoint-2"), ("gpt2", "checkpoint-6"))
    for rank in (0, 3):
        found, on_rank = read(case, "on_mesh", name, rank)
        assert found["best"] == wanted["best"]
        logs = told(found["logs"]), told(wanted["logs"])
        assert len(logs[0]) == len(logs[1])
        for row, expected in zip(*logs, strict=True):
            assert row == pytest.approx(expected, rel=LIMIT, abs=LIMIT)
        assert told([found["predicted"]])[0] == pytest.approx(told([wanted["predicted"]])[0], rel=LIMIT, abs=LIMIT)
        assert on_rank["weights"].keys() == tensors["weights"].keys()
        for key, value in tensors["weights"].items():
            alike(on_rank["weights"][key], value)
        for mine, other in zip(on_rank["outputs"], tensors["outputs"], strict=True):
            alike(mine, other)
