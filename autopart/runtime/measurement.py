"""What a report needs of a real run: when ranks did what, their peak bytes, and what their messages took."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autopart.runtime.callbacks import Event, Trace
from autopart.runtime.message_times import MessageTimes
from autopart.runtime.peak_bytes import PeakBytes
from autopart.runtime.process_group import Group

if TYPE_CHECKING:
    from autopart.runtime.compiled import Compiled

COUNTED = 2
"""Steps whose bytes are counted: the optimizer makes its states at the end of the first."""


class Measurement(Trace):
    """A trace of a program's steps that has bytes and messages too.

    steps  that will be trained; of four and more the first two are for counting bytes, and their seconds are left out

    On a CPU every tensor is counted as it is made, which takes time; on a GPU the allocator counts. What a trace has of
    a rank besides events (in its "ranks"):

    peak_bytes  of tensors, in the last of the counted steps; None where none was counted
    steps       traced
    messages    rows of `MessageTimes`, over these steps
    """

    def __init__(self, compiled: Compiled, steps: int) -> None:
        super().__init__()
        self.compiled = compiled
        self.device: torch.device = compiled.groups.device
        self.counted = COUNTED if steps >= COUNTED + 2 else 0
        self.steps, self.traced = 0, 0
        self.peak: int | None = None
        self.counter: PeakBytes | None = None
        self.messages = MessageTimes()
        for axis, group in _groups(compiled):
            self.messages.watch(axis, group)

    def before(self, event: Event) -> None:
        if self.steps < self.counted:
            self._count()
        elif event.op != "recompute":  # its messages belong to the backward around it
            self.messages.instruction = event.op

    def after(self, event: Event, seconds: float) -> None:
        if event.op != "recompute":
            self.messages.instruction = ""
        if self.steps >= self.counted:
            super().after(event, seconds)

    def trained(self, step: int, loss: float, seconds: float) -> None:
        self.steps += 1
        self.traced += self.steps > self.counted
        if self.steps == self.counted:
            self._counted()
        elif self.counter:
            self.counter.peak = 0
        elif self.steps < self.counted:
            torch.cuda.reset_peak_memory_stats(self.device)

    def gather(self, host: Group) -> dict[str, Any]:
        mine = {"peak_bytes": self.peak, "steps": self.traced, "messages": self.messages.to_json()}
        return {**super().gather(host), "ranks": host.gather(mine)}

    def _count(self) -> None:
        """Begin to count bytes, once."""
        if self.counter is None and self.device.type != "cuda":
            self.counter = PeakBytes(known=_tensors(self.compiled))
            self.counter.__enter__()

    def _counted(self) -> None:
        """Note the peak of the last counted step, and count no more."""
        if self.counter:
            self.peak = self.counter.peak
            self.counter.__exit__(None, None, None)
            self.counter = None
        else:
            self.peak = torch.cuda.max_memory_allocated(self.device)


def _groups(compiled: Compiled) -> Iterator[tuple[str, Group]]:
    """(axis, group) of every group over which a step communicates, each once."""
    groups, shared = compiled.groups, compiled.executor.shared
    along_dp = {id(group): group for group in (groups.dp, shared.channel, shared.prefetch.group)}
    yield "tp", groups.tp
    yield from (("dp", group) for group in along_dp.values())
    yield from (("pp", group) for group in (groups.activations, groups.gradients))


def _tensors(compiled: Compiled) -> Iterator[Tensor]:
    """What a program holds between steps: weights, slices, copies, gradients, states of the optimizer, buffers."""
    shared, optimizer = compiled.executor.shared, compiled.executor.optimizer
    held = [*compiled.shares(), *shared.trained, *shared.stepped_as.values()]
    yield from held
    yield from (share.grad for share in held if share.grad is not None)
    for state in optimizer.state.values() if optimizer else ():
        yield from (value for value in state.values() if isinstance(value, Tensor))
