"""compile=True: blocks that torch.compile compiles train as they do without, under every kind of plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch_compile_worker
from ranks import run_apart
from torch import nn

import autopart
from autopart.compile.check import worst_error

TABLE: list[dict[str, Any]] = [
    {"tp": 2, "dp": 2, "zero": 3, "recompute": "full"},
    {"tp": 2, "pp": 2, "micro_batch": 2, "recompute": "selective"},
    {"pp": 2, "dp": 2, "zero": 2, "recompute": "mincut", "precision": "bfloat16", "master": "float32"},
]


@pytest.mark.slow
@pytest.mark.processes
def test_blocks_that_are_compiled_train_as_they_do_without(tmp_path: Path) -> None:
    """Other sizes, evaluation and dropout included. Blocks of a stage share what is compiled."""
    assert run_apart(torch_compile_worker.train, TABLE, tmp_path) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    for settings, one in zip(TABLE, found, strict=True):
        for error, name in one["far"]:
            assert error <= 1e-6, (settings, name, error)
        assert 0 < one["graphs"] <= 60, (settings, one["graphs"])


@pytest.mark.slow
@pytest.mark.parametrize("model", [torch_compile_worker.Model, torch_compile_worker.NoBlocks])
def test_one_process(model: type[nn.Module]) -> None:
    """A stage without blocks is compiled whole."""
    found = torch_compile_worker.compared(model, "1:cpu", {})
    assert all(error <= 1e-6 for error, _ in found["far"]), found
    assert found["graphs"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("traced_once")
def test_by_the_default_backend() -> None:
    model, batch, found = torch_compile_worker.Model(1), torch_compile_worker.BATCHES[0], []
    for compile in (False, True):
        compiled = autopart.compile(model, "1:cpu", batch, seed=3, nodes=5, compile=compile, recompute="none")
        found.append({"loss": compiled.step(batch).detach(), **compiled.full_gradients()})
    assert worst_error(found[1], found[0])[0] <= 1e-5


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"fullgraph": True}, "a dict may have backend, mode, options, dynamic"),
        ("max-autotune", "compile='max-autotune'"),
        ({"backend": "inductr"}, "torch.compile does not take {'backend': 'inductr'}"),
        ({"mode": "fast"}, "torch.compile does not take {'mode': 'fast'}"),
    ],
)
def test_what_torch_compile_does_not_take(given: Any, told: str) -> None:
    with pytest.raises(autopart.PartitionError, match=told):
        autopart.compile(torch_compile_worker.Model(), "1:cpu", torch_compile_worker.BATCHES[0], compile=given, nodes=5)
