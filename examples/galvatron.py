"""Profiles this machine, searches a plan and trains it, for a model that nobody prepared: Galvatron's three steps.

    python examples/galvatron.py                    # on 2 ranks: three commands, each printed as it runs
    python examples/galvatron.py --ranks 4 --quick  # a short profile

`Classifier` is a model of a user: it has no line for autopart. Its layers get strategies of their own: the first block
is recomputed, the last one is not.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TOKENS, WIDTH, CLASSES, SAMPLES, BLOCKS = 16, 32, 10, 8, 4
LAYERS = ("recompute blocks.0 full", f"recompute blocks.{BLOCKS - 1} none")
"""Strategies of single layers, as `--force` takes them."""


class Mixer(nn.Module):
    """Tokens are mixed, then features: (samples, TOKENS, WIDTH) -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.tokens = nn.Sequential(nn.Linear(TOKENS, 2 * TOKENS), nn.GELU(), nn.Linear(2 * TOKENS, TOKENS))
        self.features = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.features(self.norms[1](x))


class Classifier(nn.Module):
    """Mixers and a head; its forward returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mixer() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x.mean(1)), labels)


def model() -> tuple[nn.Module, dict[str, Tensor]]:
    """The model and a batch."""
    torch.manual_seed(0)
    labels = torch.randint(CLASSES, (SAMPLES,))
    return Classifier(), {"x": torch.randn(SAMPLES, TOKENS, WIDTH), "labels": labels}


def main() -> None:
    """Run the three commands one after another; the first that fails ends it with its status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("build/galvatron"), help="for the profile and the plan")
    parser.add_argument("--quick", action="store_true", help="profile few sizes")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    profile, plan = options.folder / "mine.toml", options.folder / "plan.json"
    here, mesh = f"{Path(__file__).resolve()}:model", f"{options.ranks}:mine"
    forced = [word for layer in LAYERS for word in ("--force", layer)]
    for hardware, line in (
        (None, ["calibrate", f"{options.ranks}:cpu", "--to", profile, "--name", "mine", *["--quick"] * options.quick]),
        (profile, ["plan", here, mesh, "--pp", options.ranks, "--save", plan, *forced]),
        (profile, ["run", here, mesh, "--plan", plan, "--steps", options.steps]),
    ):
        _autopart([str(word) for word in line], hardware)


def _autopart(line: list[str], hardware: Path | None) -> None:
    variables = {} if hardware is None else {"AUTOPART_HARDWARE": str(hardware)}
    print("$", *(f"{name}={value}" for name, value in variables.items()), "autopart", shlex.join(line), flush=True)
    command = subprocess.Popen([sys.executable, "-m", "autopart.cli.main", *line], env={**os.environ, **variables})
    if status := command.wait():
        sys.exit(status)


if __name__ == "__main__":
    main()
