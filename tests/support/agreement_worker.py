"""The 2 ranks of tests/runtime/test_agreement.py: no seed is shared, as in a script written for DDP."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ranks import run_forked
from torch import nn

import autopart
from autopart.compile.check import one_process, worst_error


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.register_buffer("scale", torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = (self.layers(x) * self.scale).square().mean()
        return loss


def refused(step: Any) -> str:
    try:
        step()
    except autopart.PartitionError as error:
        return str(error)
    return ""


def be_a_rank(folder: Path) -> None:
    """Train, and leave in the folder what this rank found."""
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = Model()
    torch.manual_seed(7)
    whole, others = torch.randn(4, 8), torch.randn(4, 8)
    loss, gradients = one_process(model, {"x": whole})
    compiled = autopart.compile(model, "2:cpu", {"x": whole}, dp=2, nodes=5)
    found = {
        "loss": abs(float(compiled.step({"x": whole})) / float(loss) - 1),
        "gradients": worst_error(compiled.full_gradients(), gradients)[0],
        "whole": refused(lambda: compiled.step({"x": others if rank else whole})),
        "shares": refused(lambda: compiled.step({"x": whole[2 * rank :][:2]}, local=True)),
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))


def train(folder: Path) -> None:
    """Run both ranks."""
    run_forked(partial(be_a_rank, folder), 2)
