"""A callback that compares the seconds that a plan predicts with measured seconds of steps."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING

import torch

from autopart.plan.schedules.ops import Op
from autopart.plan.timeline import CAUSES, timeline
from autopart.plan.units import seconds_text
from autopart.runtime.callbacks import RECOMPUTE, Callback, Event

if TYPE_CHECKING:
    from autopart.runtime.compiled import Compiled

SHOWN = 3
"""The number of causes in the line."""


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class PredictedSeconds(Callback):
    """Predicted and measured seconds of a step, in one line on rank 0's stderr once `steps` steps are measured:

        step 10.0 ms predicted, 12.5 ms measured (median of 20): 0.80. Stage 0, predicted and measured: waiting 0,
        1.9 ms; backward 6.0 ms, 6.6 ms; forward 3.0 ms, 2.9 ms

    The line names the SHOWN causes of this rank's stage whose predicted and measured seconds differ most:

        forward, backward   computing, with collectives over tp
        waiting, sending    messages from and to other stages
        gradient sync       sums of gradients over ranks
        optimizer           clipping and the optimizer's step
        other               the rest of a step, such as the check of the batch and the user's code between two steps

    steps    number of steps to measure. A step counts if its update is from one batch of the plan's micro-batches, with
             no evaluation before
    warm_up  updates before the first measured step
    report   called with the line, on rank 0
    line     the line, on every rank; None until it is complete

    On a GPU the device is synchronised around every instruction until the line is complete, which slows steps down.
    """

    def __init__(
        self, compiled: Compiled, steps: int = 20, warm_up: int = 5, report: Callable[[str], None] = _to_stderr
    ) -> None:
        self.plan, self.rank, self.stage = compiled.plan, compiled.rank, compiled.executor.index
        self.synchronises = compiled.groups.device.type == "cuda"
        self.steps, self.warm_up, self.report = steps, warm_up, report
        self.now: dict[str, float] = defaultdict(float)
        self.forwards = 0
        self.measured: list[dict[str, float]] = []
        self.line: str | None = None

    def before(self, event: Event) -> None:
        self._synchronise()

    def after(self, event: Event, seconds: float) -> None:
        self._synchronise()
        if event.op == RECOMPUTE:
            return  # a part of its backward
        self.forwards += event.op == Op.FORWARD
        self.now[CAUSES[Op(event.op)]] += seconds

    def _synchronise(self) -> None:
        if self.synchronises and self.line is None:
            torch.cuda.synchronize()

    def trained(self, step: int, loss: float, seconds: float) -> None:
        found, whole = self.now, self.forwards == self.plan.micro_batches
        self.now, self.forwards, self.warm_up = defaultdict(float), 0, self.warm_up - 1
        if self.line is not None or self.warm_up >= 0 or not whole:
            return
        self.measured.append({**found, "step": seconds, "other": seconds - sum(found.values())})
        if len(self.measured) == self.steps:
            self.line = self._line()
            if self.rank == 0:
                self.report(self.line)

    def seconds(self) -> dict[str, tuple[float, float]]:
        """Cause -> (predicted, median of measured) seconds of a step on this rank's stage; "step": the whole step."""
        predicted = {**timeline(self.plan).stages[self.stage].seconds, "step": self.plan.step_seconds}
        predicted["other"] = predicted.pop("idle")
        names = dict.fromkeys([*predicted, *CAUSES.values()])
        measured = {name: median(each.get(name, 0.0) for each in self.measured) for name in names}
        return {name: (predicted.get(name, 0.0), measured[name]) for name in names}

    def _line(self) -> str:
        causes = self.seconds()
        predicted, measured = causes.pop("step")
        apart = sorted(causes.items(), key=lambda cause: -abs(cause[1][0] - cause[1][1]))[:SHOWN]
        told = "; ".join(f"{name} {seconds_text(p)}, {seconds_text(m)}" for name, (p, m) in apart)
        return (
            f"step {seconds_text(predicted)} predicted, {seconds_text(measured)} measured (median of {self.steps}): "
            f"{predicted / measured:.2f}. Stage {self.stage}, predicted and measured: {told}"
        )
