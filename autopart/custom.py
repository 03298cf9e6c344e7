"""autograd.Functions of the user's own: a trace sees their forward alone.

So one may be traced only if its backward is the derivative of its forward, which is tried on random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from autopart.errors import PartitionError

TOLERANCE = 1e-6
"""Relative, in float64: hand-written derivatives round their constants."""


SCALES = (1.0, 0.01)
"""Of the random inputs: the first at which both derivatives are numbers counts."""


@dataclass
class CustomFunction:
    """One call: the function, its arguments (tensors may be fake) and the line."""

    function: type[torch.autograd.Function]
    args: tuple[Any, ...]
    where: str

    def check(self) -> None:
        """Raise PartitionError unless backward is the derivative of forward here."""
        try:
            error = next((e for scale in SCALES if (e := self._error(scale)) == e), float("nan"))
            right = error <= TOLERANCE
            why = "" if right else f"its backward is not the derivative of its forward: off by {error:.1e}"
        except Exception as failure:
            why = f"its backward could not be held against its forward: {type(failure).__name__}: {failure}"
        if why:
            raise PartitionError(
                f"the forward pass calls an autograd.Function, {self.function.__name__} ({self.where})",
                f"a trace sees its forward only, and {why}",
                "plain torch operators, or another implementation of the layer if the model has one",
            )

    def _error(self, scale: float) -> float:
        """The largest error of a gradient, relative to the largest of all; not a number where one is none."""
        forward: Any = self.function.forward
        own = self._gradients(self.function.apply, scale)
        apart = self.function.setup_context is not torch.autograd.Function.setup_context
        derived = self._gradients(forward if apart else lambda *args: forward(_Context(), *args), scale)
        if not own:
            return 0.0
        mine, right = (torch.cat([g.flatten().double() for g in gradients]) for gradients in (own, derived))
        return float((mine - right).abs().max() / right.abs().max().clamp(min=1e-30))

    def _gradients(self, run: Any, scale: float) -> list[torch.Tensor]:
        random = torch.Generator().manual_seed(0)

        def real(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if not value.is_floating_point():
                return torch.ones(value.shape, dtype=value.dtype)
            drawn = torch.randn(value.shape, generator=random, dtype=torch.float64) * scale
            return drawn.requires_grad_(value.requires_grad)

        with torch.enable_grad():
            args = [real(a) for a in self.args]
            outputs = run(*args)
            given = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
            wanted = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
            if not given or not wanted:
                return []
            weights = [torch.randn(o.shape, generator=random, dtype=o.dtype) for o in given]
            return list(torch.autograd.grad(given, wanted, weights, materialize_grads=True, allow_unused=True))


class _Context:
    """Stands where `forward` expects its context."""

    needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: torch.Tensor) -> None:
        """Nothing to mark."""

    def mark_dirty(self, *tensors: torch.Tensor) -> None:
        """Nothing to mark."""

    def set_materialize_grads(self, value: bool) -> None:
        """Nothing to set."""
