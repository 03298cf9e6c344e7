"""The call target of experts' products in a traced graph. Emitted code calls `autopart.runtime.experts` instead."""

import torch


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Every row of x (s, k) times the weight of its expert, whose number is in ids (s,). The result is (s, n).

    The weights are (e, n, k), or (e, k, n) where `transposed`. The body only gives the shape, on meta tensors.
    """
    first = weight[0]
    return x @ first if transposed else x @ first.t()
