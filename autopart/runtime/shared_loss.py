"""The loss of a step, which the last stage computes and every rank returns."""

from collections.abc import Sequence

import torch
from torch import Tensor

from autopart.runtime.groups import Groups

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What a loss may be of; its place here travels with it."""


def shared_loss(losses: Sequence[Tensor], groups: Groups, known: torch.dtype | None) -> Tensor:
    """The sum of the `losses` of a step's micro-batches, on every rank in the dtype that the last stage's have.

    losses  scalars; [] on other stages
    known   the dtype, where an earlier step told it: a stage without losses reads it from the message otherwise, which
            waits for the device
    """
    loss = torch.stack([*losses]).sum() if losses else None
    if groups.pp.size == 1:
        assert loss is not None
        return loss
    message = torch.zeros(2, dtype=torch.float64, device=groups.device)
    if loss is not None:
        message[0] = loss
        message[1] = DTYPES.index(loss.dtype)
    groups.pp.broadcast(message, groups.pp.size - 1)
    dtype = loss.dtype if loss is not None else known or DTYPES[int(message[1])]
    return message[0].to(dtype)
