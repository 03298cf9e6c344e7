"""The call target that stands for experts' products in a traced graph; `autopart.runtime.experts` has what runs."""

from __future__ import annotations

import torch


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Every row of x (s, k) times the weight of the expert that ids (s,) names: (s, n). The weights are (e, n, k),
    or (e, k, n) where `transposed`."""
    first = weight[0]
    return x @ first if transposed else x @ first.t()
