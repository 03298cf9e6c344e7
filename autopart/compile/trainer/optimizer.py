"""The optimizer that the loop of transformers.Trainer steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer


class UpdatingOptimizer(AcceleratedOptimizer):
    """An optimizer over a rank's shares whose step is an update of the compiled model, which steps it.

    Its groups and states are the optimizer's, for schedulers and callbacks.

    update  updates the weights, and returns whether it left them as they are, since gradients were not finite
    """

    _is_accelerate_prepared = True

    def __init__(self, optimizer: torch.optim.Optimizer, update: Callable[[], bool]) -> None:
        super().__init__(optimizer, device_placement=False)
        self.update = update

    def step(self, closure: Any = None) -> None:
        self._is_overflow = self.update()

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Nothing: the first backward after an update begins with no gradients."""
