"""A profile of a run, from a program and from the shell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from on_ranks import on_ranks
from torch import Tensor, nn
from typer.testing import CliRunner

import autopart
from autopart.cli.main import app
from autopart.errors import PartitionError
from autopart.runtime.compiled import Compiled


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.last(self.first(x).relu()).square().mean()
        return loss


def test_a_profile_has_ranges_what_ranks_did_and_the_prediction(tmp_path: Path) -> None:
    def run(compiled: Compiled) -> None:
        compiled.step({"x": torch.ones(4, 8)})
        with autopart.profiled(compiled, tmp_path / "found"):
            compiled.step({"x": torch.ones(4, 8)})
        assert not compiled.callbacks
        (tmp_path / "file").touch()
        with (
            pytest.raises(PartitionError, match="cannot write the profile"),
            autopart.profiled(compiled, tmp_path / "file"),
        ):
            pass

    on_ranks([Model()], torch.ones(4, 8), run, micro_batch=2)
    found = {path.stem: json.loads(path.read_text())["traceEvents"] for path in (tmp_path / "found").iterdir()}
    assert found.keys() == {"rank_0", "trace", "predicted"}
    names = {event.get("name") for event in found["rank_0"]}
    assert {"stage 0 FORWARD micro-batch 1", "aten::linear"} <= names or {
        "stage 0 FORWARD micro-batch 1", "aten::addmm"
    } <= names  # fmt: skip
    assert {event["name"] for event in found["trace"]} >= {"forward 0", "forward 1", "backward 1", "step"}


def test_the_shell_profiles_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "profile"
    arguments = ["run", "examples/tiny.py:model", "1:cpu", "--steps", "1", "--profile", str(folder)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert {path.name for path in folder.iterdir()} == {"rank_0.json", "trace.json", "predicted.json"}
