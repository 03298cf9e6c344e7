"""autograd.Functions of the user's own: a trace sees their forward alone.

So one may be traced only if its backward is the derivative of its forward, which is tried on random numbers: of its own
sizes where these are few, else of small sizes in their place, as many different ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autopart.errors import PartitionError

TOLERANCE = 1e-6
"""Relative, in float64: hand-written derivatives round their constants."""

FEW = 2**18
"""Elements of all arguments up to which they are tried as they are."""

MOST = 2**24
"""Elements beyond which they are not, even where no small sizes will do."""

LEAST = 8
"""Sizes up to this one stay: they count heads, or parts."""

Sizes = Mapping[int, int]
"""Size of a dim -> the one that is tried in its place."""

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
        own, why = {s: s for s in self._sizes()}, ""
        if self._elements(own) > FEW:
            wrong, failed = self._tried(self._smaller())
            if not (wrong or failed):
                return
            why = wrong or f"{failed}, at sizes smaller than its own {self._elements(own):,} elements"
        if self._elements(own) <= MOST:
            wrong, failed = self._tried([own])
            why = wrong or failed
        if why:
            raise PartitionError(
                f"the forward pass calls an autograd.Function, {self.function.__name__} ({self.where})",
                f"a trace sees its forward only, and {why}",
                "plain torch operators, or another implementation of the layer if the model has one",
            )

    def _tried(self, every: Iterable[Sizes]) -> tuple[str, str]:
        """In words, what is wrong at some of these sizes, and why none could be tried; "" for neither."""
        failed, ran = "its backward could not be held against its forward: there are too many elements", False
        for sizes in every:
            try:
                error = next((e for scale in SCALES if (e := self._error(scale, sizes)) == e), float("nan"))
            except Exception as failure:
                failed = f"its backward could not be held against its forward: {type(failure).__name__}: {failure}"
                continue
            if not error <= TOLERANCE:
                return f"its backward is not the derivative of its forward: off by {error:.1e}", ""
            ran = True
        return "", "" if ran else failed

    def _sizes(self) -> list[int]:
        """Of the dims of all arguments, each once."""
        return sorted({s for a in self.args if isinstance(a, torch.Tensor) for s in a.shape})

    def _elements(self, sizes: Sizes) -> int:
        """Of all arguments."""
        shapes = [a.shape for a in self.args if isinstance(a, torch.Tensor)]
        return sum(math.prod(sizes[s] for s in shape) for shape in shapes)

    def _smaller(self) -> Iterator[Sizes]:
        """Sizes to try instead, different ones for different ones: in the same ratios; each twice the one before;
        multiples of the smallest."""
        large = [s for s in self._sizes() if s > LEAST]
        if not large:
            return
        rest = {s: s for s in self._sizes() if s <= LEAST}
        common = math.gcd(*large)
        by = next(d for d in range(max(1, large[0] // LEAST), 0, -1) if common % d == 0)
        for chosen in (
            [s // by for s in large],
            [2 * LEAST * 2**i for i in range(len(large))],
            [(LEAST + 4) * (i + 1) for i in range(len(large))],
        ):
            sizes = rest | dict(zip(large, chosen, strict=True))
            if self._elements(sizes) <= FEW:
                yield sizes

    def _error(self, scale: float, sizes: Sizes) -> float:
        """The largest error of a gradient, relative to the largest of all; not a number where one is none."""
        forward: Any = self.function.forward
        own = self._gradients(self.function.apply, scale, sizes)
        apart = self.function.setup_context is not torch.autograd.Function.setup_context
        derived = self._gradients(forward if apart else lambda *args: forward(_Context(), *args), scale, sizes)
        if not own:
            return 0.0
        mine, right = (torch.cat([g.flatten().double() for g in gradients]) for gradients in (own, derived))
        return float((mine - right).abs().max() / right.abs().max().clamp(min=1e-30))

    def _gradients(self, run: Any, scale: float, sizes: Sizes) -> list[torch.Tensor]:
        random = torch.Generator().manual_seed(0)

        def real(value: Any) -> Any:
            if type(value) is int and value > LEAST:
                return sizes.get(value, value)
            if isinstance(value, (list, tuple)):
                return type(value)(map(real, value))
            if not isinstance(value, torch.Tensor):
                return value
            shape = [sizes[s] for s in value.shape]
            if not value.is_floating_point():
                return torch.ones(shape, dtype=value.dtype)
            drawn = torch.randn(shape, generator=random, dtype=torch.float64) * scale
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
