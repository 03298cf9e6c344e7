"""A small model with what optimizers and clipping must get right."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TiedModel(nn.Module):
    """Tied weights in the first and the last layer, biases, a matrix that 2 ranks do not divide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.last.weight = self.first.weight
        self.gain = nn.Parameter(torch.randn(7, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x.to(self.gain.dtype)).relu()) * self.gain.square().mean()
        loss: Tensor = self.last(x.relu()).float().square().mean()
        return loss
