"""How weights are updated: what is done to complete gradients before the optimizer steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from autopart.runtime.gradient_norm import clip_factor, total_norm
from autopart.runtime.groups import Groups
from autopart.runtime.loss_scale import LossScale
from autopart.runtime.process_group import Group


@dataclass(frozen=True)
class Update:
    """How an update of the weights is made.

    max_norm     the norm that gradients are clipped to; None: they are not
    only_finite  whether gradients that are not finite leave the weights as they are
    frozen       names of parameters that stay as they are
    """

    max_norm: float | None = None
    only_finite: bool = False
    frozen: frozenset[str] = frozenset()


class Completed(NamedTuple):
    """What is known of complete gradients.

    finite  whether the optimizer is to step
    norm    the norm of the gradients before clipping; None where nothing asks for it
    factor  what the gradients are to be multiplied by, to undo the scale of the loss and to clip
    """

    finite: bool
    norm: torch.Tensor | None
    factor: torch.Tensor | float


def complete(
    update: Update,
    trained: Sequence[Any],
    tied: Mapping[str, Group],
    groups: Groups,
    loss_scale: LossScale | None,
) -> Completed:
    """Drop gradients of frozen parameters. Returns the norm of the others, and the factor to multiply
    them by. All ranks call it.

    trained  what this rank trains, with gradients that are complete
    tied     parameter that lives on several stages -> the group of the ranks that hold it
    """
    for share in trained:
        if share.origin.name in update.frozen:
            share.grad = None
    factor: Any = 1.0 / loss_scale.factor if loss_scale else 1.0
    norm, finite = None, True
    if update.max_norm is not None or update.only_finite or loss_scale:
        norm = total_norm(trained, tied, groups) * factor
        finite = not (update.only_finite or loss_scale) or bool(norm.isfinite())
        if update.max_norm is not None:
            factor = factor * clip_factor(norm, update.max_norm)
    if loss_scale:
        loss_scale.updated(finite)
    return Completed(finite, norm, factor)
