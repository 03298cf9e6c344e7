"""autograd.Functions of the user's own, of which a trace sees only the forward.

Such a function may be traced only if its backward is the derivative of its forward. That is tested on random numbers:
at the call's own sizes where it has few elements, else at small sizes in place of large ones.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autopart.errors import OperatorError

TOLERANCE = 1e-6
"""The largest relative error in float64. Hand-written derivatives round their constants."""

ALWAYS_AT_OWN_SIZES = 2**18
"""A function is tested at its own sizes if its arguments have no more elements than this."""

MAX_AT_OWN_SIZES = 2**24
"""A function is not tested at its own sizes if its arguments have more elements than this."""

MIN_REPLACED = 8
"""Sizes up to this one are not replaced by others: they count heads, or parts."""

Sizes = Mapping[int, int]
"""Size of a dim -> the size that is tested in its place."""

SCALES = (1.0, 0.01)
"""Scales of the random inputs. The first at which both derivatives are finite counts."""


@dataclass
class CustomFunction:
    """One call of a function: its class, its arguments (tensors may be fake) and the user's line."""

    function: type[torch.autograd.Function]
    args: tuple[Any, ...]
    where: str

    @property
    def key(self) -> tuple[object, ...]:
        """The same for calls that one check speaks for: of one function, with arguments that differ in tensors' values
        alone."""
        return self.function, *(
            (tuple(a.shape), a.dtype, a.requires_grad) if isinstance(a, torch.Tensor) else repr(a) for a in self.args
        )

    def check(self) -> None:
        """Raise OperatorError unless the function's backward is the derivative of its forward for this call.

        Its own sizes, if large, are tried only where no smaller ones could be or where these disagree.
        """
        own, why, agreed = {s: s for s in self._sizes()}, "", False
        if self._elements(own) > ALWAYS_AT_OWN_SIZES:
            right, wrong, failed = self._tried(self._smaller())
            why, agreed = wrong, right != bool(wrong)
            if not (right or wrong):
                why = f"{failed}, at sizes smaller than its own {self._elements(own):,} elements"
        if not agreed and self._elements(own) <= MAX_AT_OWN_SIZES:
            _, wrong, failed = self._tried([own])
            why = wrong or failed
        if why:
            raise OperatorError(
                f"the forward pass calls an autograd.Function, {self.function.__name__} ({self.where})",
                f"a trace sees its forward only, and {why}",
                "plain torch operators, or another implementation of the layer if the model has one",
            )

    def _tried(self, every: Iterable[Sizes]) -> tuple[bool, str, str]:
        """Whether the derivative is right at some of these sizes; in words, what is wrong at others ("" for nothing),
        and why no sizes could be tested ("" if any were)."""
        failed = "its backward could not be held against its forward: there are too many elements"
        right, wrong = False, ""
        for sizes in every:
            try:
                error = next((e for scale in SCALES if (e := self._error(scale, sizes)) == e), float("nan"))
            except Exception as failure:
                failed = f"its backward could not be held against its forward: {type(failure).__name__}: {failure}"
                continue
            if error <= TOLERANCE:
                right = True
            else:
                wrong = wrong or f"its backward is not the derivative of its forward: off by {error:.1e}"
        return right, wrong, "" if right or wrong else failed

    def _sizes(self) -> list[int]:
        """The sizes of the dims of all arguments, each once, in order."""
        return sorted({s for a in self.args if isinstance(a, torch.Tensor) for s in a.shape})

    def _elements(self, sizes: Sizes) -> int:
        """The number of elements of all arguments at these sizes."""
        shapes = [a.shape for a in self.args if isinstance(a, torch.Tensor)]
        return sum(math.prod(sizes[s] for s in shape) for shape in shapes)

    def _smaller(self) -> Iterator[Sizes]:
        """Small sizes to test, different for different sizes: in the same ratios; each twice the one before; multiples
        of the smallest."""
        large = [s for s in self._sizes() if s > MIN_REPLACED]
        if not large:
            return
        rest = {s: s for s in self._sizes() if s <= MIN_REPLACED}
        common = math.gcd(*large)
        by = next(d for d in range(max(1, large[0] // MIN_REPLACED), 0, -1) if common % d == 0)
        for chosen in (
            [s // by for s in large],
            [2 * MIN_REPLACED * 2**i for i in range(len(large))],
            [(MIN_REPLACED + 4) * (i + 1) for i in range(len(large))],
        ):
            sizes = rest | dict(zip(large, chosen, strict=True))
            if self._elements(sizes) <= ALWAYS_AT_OWN_SIZES:
                yield sizes

    def _error(self, scale: float, sizes: Sizes) -> float:
        """The largest error of a gradient / the largest gradient; NaN where a gradient is not finite."""
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
            if type(value) is int and value > MIN_REPLACED:
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
    """The context that `forward` is called with."""

    needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: torch.Tensor) -> None:
        """Autograd differentiates the operators of `forward`, and needs no mark."""

    def mark_dirty(self, *tensors: torch.Tensor) -> None:
        """As above."""

    def set_materialize_grads(self, value: bool) -> None:
        """As above."""
