"""The differences in CONTRIBUTING.md are what they say: applied to a copy of the package, each adds what it names."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST = 10
"""Lines that a difference in CONTRIBUTING.md adds or takes away at most."""
DIFFERENCES = re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
TRIED = """
import torch
import autopart
from autopart.hardware import DEVICES
from autopart.passes.codegen import spelling
from autopart.plan.export import SYSTEMS
from autopart.sharding.rules import RULES

assert "aten.special_bessel_j0" in RULES and "h20" in DEVICES and "erf" in spelling.TORCH

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.special.bessel_j0(layer(x)).detach() + torch.erf(layer(x))
        return x.square().mean()

batch = {"x": torch.randn(8, 8)}
plan = autopart.plan(Model(), "2:h20", batch, pp=2, micro_batch=2, schedule="eager-1f1b")
assert SYSTEMS["degrees"](plan).text == "pp=2 dp=1 tp=1\\n"
found = autopart.check(Model(), "2:cpu", batch, pp=2, micro_batch=2, schedule="eager-1f1b")
assert max(found.loss_error, found.gradient_error) < 1e-5, found
"""


def test_differences_are_short() -> None:
    changed = [[line for line in d.splitlines() if re.match(r"[+-](?![+-]{2})", line)] for d in DIFFERENCES]
    assert len(changed) == 5 and all(0 < len(lines) <= MOST for lines in changed)


@pytest.mark.parametrize("difference", DIFFERENCES, ids=[d.splitlines()[0].rpartition("/")[2] for d in DIFFERENCES])
def test_a_difference_applies(difference: str) -> None:
    done = subprocess.run(["git", "apply", "--check"], input=difference, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_differences_do_what_they_say(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "autopart", tmp_path / "autopart", ignore=shutil.ignore_patterns("__pycache__"))
    for difference in DIFFERENCES:
        subprocess.run(["git", "apply"], input=difference, text=True, cwd=tmp_path, check=True)
    tried = subprocess.run([sys.executable, "-c", TRIED], capture_output=True, text=True, cwd=tmp_path)
    assert tried.returncode == 0, tried.stderr
