"""Optimizer states on the host: the optimizer steps copies of a rank's shares in the host's memory.

On a GPU the copies and their gradients are pinned, so that they are copied at the link's full rate; states of the
optimizer never move and need not be. On a CPU the host's memory is the device's, and the same copies are made.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad)
"""Optimizers of which torch has a fused step on CPUs."""


class HostCopies:
    """Copies on the host of what a rank trains, which an optimizer steps.

    copy_of    share on the device -> its copy, a parameter of the same origin in the master dtype
    gradients  share on the device -> memory of its gradient on the host, which also takes the new value on its way up
    """

    def __init__(self, shares: Sequence[Any], master: torch.dtype | None) -> None:
        self.copy_of: dict[Any, Any] = {}
        self.gradients: dict[Any, Tensor] = {}
        for share in shares:
            dtype = master or share.dtype
            copy: Any = nn.Parameter(_on_host(share, dtype))
            copy.detach().copy_(share.detach())
            copy.origin = share.origin
            self.copy_of[share], self.gradients[share] = copy, _on_host(share, dtype)

    def take_gradients(self) -> None:
        """Copy the gradients of all shares to the host. A share without a gradient has none there."""
        for share, copy in self.copy_of.items():
            copy.grad = None
            if share.grad is not None:
                copy.grad = self.gradients[share].copy_(share.grad, non_blocking=True)
        _wait(self.copy_of)

    def write_back(self) -> None:
        """Copy the values of all copies into the shares on the device, in the dtypes of these."""
        for share, copy in self.copy_of.items():
            value = copy.detach()
            if share.dtype != copy.dtype:
                narrow = self.gradients[share].view(-1).view(share.dtype)[: copy.numel()]
                value = narrow.view(copy.shape).copy_(value)
            share.detach().copy_(value, non_blocking=True)
        _wait(self.copy_of)


@contextmanager
def fused_steps(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """In this context an optimizer of torch's over parameters on a CPU takes its fused step, which passes over memory
    once, unless its user chose an implementation."""
    chosen = [group for group in optimizer.param_groups if type(optimizer) in FUSED and _left_open(group)]
    for group in chosen:
        group["fused"] = True
    try:
        yield
    finally:
        for group in chosen:
            group["fused"] = None


def _left_open(group: Mapping[str, Any]) -> bool:
    """Whether a group names no implementation, and the fused one takes it."""
    free = all(group.get(name) is None for name in ("fused", "foreach")) and not group.get("differentiable")
    return free and all(p.is_floating_point() and p.device.type == "cpu" for p in group["params"])


def _on_host(share: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory on the host of a share's shape; pinned where the share is on a GPU."""
    return torch.zeros(share.shape, dtype=dtype, pin_memory=share.device.type == "cuda")


def _wait(shares: Iterable[Tensor]) -> None:
    """Wait for copies between devices and the host."""
    for device in {share.device for share in shares if share.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
