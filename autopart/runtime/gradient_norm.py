"""The norm of all gradients of a model that lies on several ranks, and clipping by it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autopart.runtime.groups import AXES, Groups
from autopart.runtime.process_group import Group

EPSILON = 1e-6
"""Added to the norm, as torch.nn.utils.clip_grad_norm_ does."""


def total_norm(shares: Sequence[Any], tied: Mapping[str, Group], groups: Groups) -> Tensor:
    """The square root of the sum of squares over the gradients of the whole model, each element counted once.

    shares  what this rank trains, with complete gradients
    tied    parameter that lives on several stages -> the group of the ranks that hold it

    All ranks call it and get the same norm.
    """
    norms = [
        _norm(share.grad) for share in shares if share.grad is not None and _counted_here(share.origin, tied, groups)
    ]
    total = torch.zeros((), dtype=torch.float64, device=groups.device)
    if norms:
        total += torch.stack(norms).double().square().sum()
    for group in (groups.along(axis) for axis in AXES):
        if group.size > 1:
            group.all_reduce(total)
    return total.sqrt()


def scale(shares: Sequence[Any], factor: Tensor | float) -> None:
    """Multiply gradients by a factor."""
    if isinstance(factor, float) and factor == 1.0:
        return
    for share in shares:
        if share.grad is not None:
            share.grad.mul_(factor)


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / norm)."""
    return (max_norm / (norm + EPSILON)).clamp(max=1.0)


def _counted_here(origin: Any, tied: Mapping[str, Group], groups: Groups) -> bool:
    """Whether this rank counts its share: it is the first of the ranks that hold the same elements."""
    if origin.name in tied and tied[origin.name].rank > 0:
        return False
    return all(
        placement.kind == "S" or groups.holders(origin.sliced, axis).rank == 0
        for axis, placement in origin.placed.items()
    )


def _norm(gradient: Tensor) -> Tensor:
    """The norm of one gradient, added up in float32 at least."""
    real = torch.view_as_real(gradient) if gradient.is_complex() else gradient
    return torch.linalg.vector_norm(real, dtype=torch.promote_types(real.dtype, torch.float32)).double()
