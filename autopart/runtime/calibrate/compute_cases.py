"""What every rank computes by itself in a calibration: products, attention, operators, optimizers."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from autopart.runtime import one_pass
from autopart.runtime.calibrate.operators import OPERATORS
from autopart.runtime.calibrate.timing import Case, Seconds, Timer
from autopart.runtime.optimizers import OPTIMIZERS


@dataclass(frozen=True)
class ComputeCases:
    """The cases of one rank."""

    timer: Timer

    def cases(self, dtypes: tuple[str, ...]) -> Iterator[Case]:
        """What each rank does for itself."""
        for name in dtypes:
            dtype = getattr(torch, name)
            for m, n, k in itertools.product(self.timer.sizes.products, repeat=3):
                if 2.0 * m * n * k <= self.timer.sizes.flops:
                    yield Case("products", name, (m, n, k), partial(self._product, m, n, k, dtype))
            for length, head, causal in itertools.product(self.timer.sizes.sequences, self.timer.sizes.heads, (0, 1)):
                sizes = length, head, causal
                yield Case("attention", name, sizes, partial(self._attention, *sizes, dtype))
        dtype = getattr(torch, dtypes[0])
        for (kind, make), nbytes in itertools.product(OPERATORS.items(), self.timer.sizes.streams):
            yield Case("operators", kind, (nbytes,), partial(self._operator, make, nbytes, dtype))
        for optimizer, nbytes in itertools.product(OPTIMIZERS, self.timer.sizes.parameters):
            yield Case("updates", optimizer, (nbytes,), partial(self._update, optimizer, nbytes))
        for nbytes in self.timer.sizes.parameters:
            yield Case("accumulate", "", (nbytes,), partial(self._accumulate, nbytes))

    def _product(self, m: int, n: int, k: int, dtype: torch.dtype) -> Callable[[], Seconds]:
        """In turn as products lie forward, and in the gradients of either factor."""
        x, w, v = (self.timer.randn(*shape, dtype=dtype) for shape in ((m, k), (n, k), (k, n)))
        y = self.timer.randn(k, m, dtype=dtype)
        products = itertools.cycle([lambda: x @ w.t(), lambda: x @ v, lambda: y.t() @ v])
        return self.timer.repeated(lambda: next(products)(), self.timer.held(m * n * dtype.itemsize))

    def _attention(self, length: int, head: int, causal: int, dtype: torch.dtype) -> Callable[[], Seconds]:
        flops = 4.0 * length * length * head * (0.5 if causal else 1.0)
        many = max(1, round(self.timer.sizes.flops_attention / flops))
        q, k, v = (self.timer.randn(1, many, length, head, dtype=dtype, grad=True) for _ in range(3))
        timed = self.timer.apart(
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=bool(causal)),
            [q, k, v],
            self.timer.held(q.nbytes),
        )

        def each() -> Seconds:
            return tuple(seconds / (many * flops) for seconds in timed())

        return each

    def _operator(self, make: Callable[..., Any], nbytes: int, dtype: torch.dtype) -> Callable[[], Seconds]:
        forward, inputs = make(self.timer.randn, nbytes, dtype)
        return self.timer.apart(forward, inputs, self.timer.held(nbytes))

    def _update(self, name: str, nbytes: int) -> Callable[[], Seconds]:
        parameters = [nn.Parameter(self.timer.randn(nbytes // 4)) for _ in range(self.timer.held(4 * nbytes))]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        kind, settings = OPTIMIZERS[name]
        optimizer = kind(parameters, lr=1e-6, **settings)

        def step() -> None:
            if not one_pass.step(optimizer):
                optimizer.step()

        timed = self.timer.repeated(step, 1)
        return lambda: (timed()[0] / len(parameters),)

    def _accumulate(self, nbytes: int) -> Callable[[], Seconds]:
        sums = [self.timer.randn(nbytes // 4) for _ in range(self.timer.held(2 * nbytes))]
        more = [torch.ones_like(total) for total in sums]
        operands = itertools.cycle(zip(sums, more, strict=True))

        def add() -> None:
            total, gradient = next(operands)
            total.add_(gradient)

        return self.timer.repeated(add, 1)
