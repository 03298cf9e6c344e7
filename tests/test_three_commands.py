"""Profile, search and train a model that nobody prepared, by three commands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from commands import run

MODEL = '''
import torch
from torch import nn
from torch.nn import functional as F


class Mixer(nn.Module):
    """Tokens are mixed, then features."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.tokens = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.features = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x):
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.features(self.norms[1](x))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Mixer() for _ in range(4))
        self.head = nn.Linear(32, 10)

    def forward(self, x, labels):
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x.mean(1)), labels)


def model():
    torch.manual_seed(0)
    return Classifier(), {"x": torch.randn(8, 16, 32), "labels": torch.randint(10, (8,))}
'''


@pytest.mark.slow
@pytest.mark.processes
def test_a_model_that_nobody_prepared_is_profiled_searched_and_trained(tmp_path: Path) -> None:
    """Each layer has a strategy of its own: the first blocks are recomputed, the last ones are not."""
    (tmp_path / "mixer.py").write_text(MODEL)

    def autopart(*given: str, hardware: str | None = "mine.toml") -> str:
        return run(["-m", "autopart.cli.main", *given], tmp_path, {"AUTOPART_HARDWARE": hardware})

    autopart("calibrate", "2:cpu", "--to", "mine.toml", "--name", "mine", "--quick", hardware=None)
    layers = ["recompute blocks.0 full", "recompute blocks.3 none"]
    forced = [word for layer in layers for word in ("--force", layer)]
    told = autopart("plan", "mixer.py:model", "2:mine", "--pp", "2", "--save", "plan.json", *forced)
    assert "on 2:mine" in told
    plan = json.loads((tmp_path / "plan.json").read_text())
    modes = [mode for stage in plan["stages"] for mode in stage["recompute"]]
    assert "full" in modes and "none" in modes
    trained = json.loads(autopart("run", "mixer.py:model", "2:mine", "--plan", "plan.json", "--steps", "3", "--json"))
    assert re.search(r"\d", json.dumps(trained)) and len(trained["losses"]) == 3
    assert trained["losses"][-1] < trained["losses"][0]
