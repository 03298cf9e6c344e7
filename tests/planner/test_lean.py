"""Plans of large models, batches and meshes take little memory. Each is made in a process of its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_apart
from torch import Tensor, nn

import autopart
from autopart.cli import models as models

pytestmark = pytest.mark.slow

GIB = 2**30


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradients[0]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(Cube.apply(self.up(x)))


class Deep(nn.Module):
    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def custom() -> autopart.Plan:
    """100 B parameters, and an autograd.Function on 51 M elements a sample."""
    with torch.device("meta"):
        model, x = Deep(86, 12288 + 4096).bfloat16(), torch.empty(64, 2048, 12288 + 4096)
    assert sum(p.numel() for p in model.parameters()) > 1e11
    return autopart.plan(model, "8x8:h100-80gb", {"x": x.bfloat16()})


def devices() -> autopart.Plan:
    """100,000 devices, and a micro-batch of as many samples of 1,024 tokens; the mask is not that of a packed batch,
    which takes a look at all tokens."""
    model, batch = models.load("llama-3-8b", 2, meta=True)
    settings: dict[str, Any] = {"global_batch": 100_000, "micro_batch": 100_000, "precision": "bfloat16"}
    return autopart.plan(model, "12500x8:h100-80gb", batch, **settings)


PLANS: dict[str, Callable[[], autopart.Plan]] = {"custom": custom, "devices": devices}


@pytest.mark.parametrize(("name", "bytes_"), [("custom", 1 * GIB), ("devices", 2 * GIB)])
def test_lean(name: str, bytes_: int, tmp_path: Path) -> None:
    assert run_apart(make, name, tmp_path / "status") == 0
    (kib,) = re.findall(r"VmHWM:\s*(\d+) kB", (tmp_path / "status").read_text())
    assert int(kib) * 1024 < bytes_, f"{int(kib) / 2**20:.2f} GiB"


def make(name: str, status: Path) -> None:
    """Make a plan; write the status of this process."""
    PLANS[name]()
    status.write_text(Path("/proc/self/status").read_text())
