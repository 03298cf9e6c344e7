"""A model of one's own for the shell: `autopart run examples/tiny.py:model 2:cpu`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """x + a two-layer perceptron of x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Regressor(nn.Module):
    """Blocks and a head; its forward returns the loss."""

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(width) for _ in range(depth))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return F.mse_loss(self.head(x)[:, 0], y)


def model() -> tuple[nn.Module, dict[str, Tensor]]:
    """The model and a batch of 16 samples."""
    torch.manual_seed(0)
    return Regressor(), {"x": torch.randn(16, 64), "y": torch.randn(16)}
