"""The optimizer that the training loop of transformers.Trainer steps."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer


class UpdatingOptimizer(AcceleratedOptimizer):
    """An optimizer over a rank's shares whose `step` calls the update of the compiled model; the update steps it.

    Schedulers and callbacks see the groups and states of the optimizer.

    optimizer  as `Compiled.optimizer` returns it
    update     updates the weights; returns whether it left them as they are, since gradients were not finite
    """

    _is_accelerate_prepared = True

    def __init__(self, optimizer: torch.optim.Optimizer, update: Callable[[], bool]) -> None:
        super().__init__(optimizer, device_placement=False)
        self.update = update

    def step(self, closure: Any = None) -> None:
        self._is_overflow = self.update()

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Does nothing: the first backward after an update begins without gradients."""
