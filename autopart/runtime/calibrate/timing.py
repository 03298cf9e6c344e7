"""How a case of a calibration is timed.

Compute is timed by the wall clock: every rank repeats a case until its window is over, so that all ranks are busy all
the while. Communication is repeated equally often on all ranks. Every call makes its results anew, and some of them are
held, as in training. Operators run under autograd, forward and backward timed apart.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopart.runtime.calibrate.sizes import Sizes

Seconds = tuple[float, ...]


@dataclass(frozen=True)
class Case:
    """One thing to time.

    table  the table of `Measured` or `Wire` that it is for
    entry  the entry of that table
    sizes  the sizes of its row
    make   makes a function that times the case for a window and returns its seconds
    """

    table: str
    entry: str
    sizes: tuple[float, ...]
    make: Callable[[], Callable[[], Seconds]]


@dataclass(frozen=True)
class Timer:
    """Times what runs on one rank's device."""

    sizes: Sizes
    device: torch.device

    def now(self) -> float:
        """Seconds of the clock once the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def apart(self, forward: Callable[[], Tensor], inputs: list[Tensor], results: int) -> Callable[[], Seconds]:
        """Times `forward` and its backward apart, `results` calls of each at a time."""

        def timed() -> Seconds:
            there = back = 0.0
            count, gradients = -1, list[Tensor]()
            while count < 1 or there + back < self.sizes.window:
                if count == 0:
                    there = back = 0.0
                begun = self.now()
                outputs = [forward() for _ in range(results)]
                turned = self.now()
                gradients = gradients or [torch.ones_like(output) for output in outputs]
                paused = self.now()
                for output, gradient in zip(outputs, gradients, strict=True):
                    torch.autograd.grad(output, inputs, gradient)
                ended = self.now()
                there, back, count = there + turned - begun, back + ended - paused, count + 1
            return there / (count * results), back / (count * results)

        return timed

    def repeated(self, run: Callable[[], Any], held: int) -> Callable[[], Seconds]:
        """Times `run`, of whose results the last `held` are kept."""

        def timed() -> Seconds:
            kept: list[Any] = [None] * held
            kept[0] = run()
            count, started = 0, self.now()
            while count < 2 or (now := self.now()) - started < self.sizes.window:
                for _ in range(max(1, count // 4)):
                    kept[count % held] = run()
                    count += 1
                now = self.now()
            return ((now - started) / count,)

        return timed

    def equally(self, run: Callable[[], Any]) -> Callable[[], Seconds]:
        """Times `run`, equally often on all ranks."""

        def timed() -> Seconds:
            run()
            started = self.now()
            run()
            longest = torch.tensor(self.now() - started)
            dist.all_reduce(longest, dist.ReduceOp.MAX)
            count = min(max(2, int(self.sizes.window / longest.item())), 200)
            dist.barrier()
            started = self.now()
            for _ in range(count):
                run()
            return ((self.now() - started) / count,)

        return timed

    def held(self, nbytes: float) -> int:
        """Number of results of so many bytes that are held."""
        return max(1, min(16, int(self.sizes.held / nbytes)))

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype).requires_grad_(grad)
