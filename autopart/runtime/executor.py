"""Runs a stage's list of instructions for one step.

The receives of a computation are posted before the computation in front of it begins (`receives_ahead`), so that
messages travel while the stage computes.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from autopart.plan.schedules.ops import ONCE_A_STEP, Instruction, Op
from autopart.plan.schedules.program import receives_ahead
from autopart.runtime import one_pass
from autopart.runtime.activity import Activity
from autopart.runtime.callbacks import RECOMPUTE, Callback, Event, notifying
from autopart.runtime.emitted import Message, StageProgram
from autopart.runtime.flat_slices import sum_together
from autopart.runtime.gathered import keeping_parts
from autopart.runtime.groups import Groups
from autopart.runtime.loss_scale import LossScale
from autopart.runtime.offload import fused_steps
from autopart.runtime.process_group import Group, Work
from autopart.runtime.recompute import around_recompute
from autopart.runtime.shared_loss import shared_loss
from autopart.runtime.update import Update, complete
from autopart.runtime.zero import DataParallelState


@dataclass
class _Flight:
    """What a stage holds of one micro-batch between its forward and its backward.

    A value that was sent is freed when no stage is `waiting` for it any more. Backward starts from `roots`, nodes of
    autograd's graph.
    """

    received: dict[str, Tensor] = field(default_factory=dict)
    sent: dict[str, Tensor] = field(default_factory=dict)
    roots: dict[str, Any] = field(default_factory=dict)
    waiting: set[int] = field(default_factory=set)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None


Arrival = tuple[Message, Tensor, Work]
"""A receive that was posted: the message, its buffer, the work to wait for."""


class Executor:
    """One rank's stage with its instructions, and other programs over the same weights. The watchdog publishes its
    `activity`."""

    def __init__(
        self,
        program: StageProgram,
        index: int,
        groups: Groups,
        tied: Mapping[str, Group],
        zero: int = 0,
        master: torch.dtype | None = None,
        overlap: bool = False,
        loss_scale: LossScale | None = None,
        one_pass: bool = True,
        offload: bool = False,
        prefetch: int = 0,
    ) -> None:
        """With `overlap`, gradients are summed over dp while the last backward still computes others; with `one_pass`,
        a kernel steps what it takes; with `offload`, the host steps all. `prefetch`: the most bytes of weights that are
        gathered ahead at ZeRO 3."""
        self.index, self.groups, self.tied = index, groups, tied
        self.shared = DataParallelState(program.stage, groups, zero, master, overlap, offload, prefetch)
        self.use(program)
        self.activity = Activity()
        self.optimizer: torch.optim.Optimizer | None = None
        self.loss_scale, self.one_pass = loss_scale, one_pass and not offload
        self.stepping = self.accumulating = False
        """Whether the optimizer steps now; whether gradients wait for an update."""
        self.skipped = 0
        self.callbacks: list[Callback] = []
        self.updated_at = time.perf_counter()
        self.grad_norm: Tensor | None = None
        self.loss_dtype: torch.dtype | None = None
        self.actions: dict[Op, Callable[[Instruction], None]] = {
            Op.FORWARD: self._forward,
            Op.BACKWARD: self._backward,
            Op.SEND: self._send,
            Op.RECV: self._receive,
            Op.SEND_GRAD: self._send_gradients,
            Op.RECV_GRAD: self._receive_gradients,
        }

    def use(self, program: StageProgram) -> None:
        """Run this program from now on."""
        self.stage, self.program = program.stage, program.instructions
        self.closing = max((at.micro_batch for at in self.program if at.op is Op.BACKWARD), default=-1)
        self.incoming = [m for m in program.messages if self.index in m.consumers]
        self.outgoing = [m for m in program.messages if m.producer == self.index]
        self.last = not self.outgoing
        self.ahead = receives_ahead(self.program)

    def run(
        self,
        micro_batches: Sequence[Mapping[str, Tensor]],
        update: Update | None,
        weight: float = 1.0,
        targets: float | None = None,
    ) -> Tensor:
        """Forward and backward of this rank's share of every micro-batch, and an update of the weights if one is given.

        weight   of the loss in the gradients, which are added to those that wait for an update
        targets  the divisor of sums over valid targets; None: their number in the batch

        Returns the loss of the whole batch, on every rank.
        """
        self.updates = update is not None
        self.weight = weight * (self.loss_scale.factor if self.loss_scale else 1.0)
        if not self.accumulating:
            self.shared.zero_grad()
        self.accumulating = False  # an error in between leaves gradients that nothing is to be added to
        self._compute(micro_batches, targets)
        self.accumulating = True
        if update is not None:
            self._update(update)
        loss = self._ended()
        self.groups.rng.step += 1
        self.last_loss = loss
        if update is not None:
            self._tell_trained()
        return loss

    def evaluate(self, micro_batches: Sequence[Mapping[str, Tensor]], targets: float | None = None) -> Tensor:
        """The loss of the whole batch, on every rank, by a program of forward passes. `targets` as in `run`."""
        self._compute(micro_batches, targets)
        return self._ended()

    def _compute(self, micro_batches: Sequence[Mapping[str, Tensor]], targets: float | None) -> None:
        """Run the instructions of a step on micro-batches, without those that run once a step."""
        self.micro_batches = micro_batches
        self.flights: dict[int, _Flight] = defaultdict(_Flight)
        self.works: list[tuple[Work, Tensor]] = []
        self.arrivals: dict[Instruction, list[Arrival]] = {}
        self.losses: list[Tensor] = []
        self._count_valid(targets)
        rng = self.groups.rng
        for instruction in self.program:
            if instruction.op in ONCE_A_STEP:
                continue
            rng.micro_batch = instruction.micro_batch
            self.activity.begin(str(instruction))
            self.works = [(work, held) for work, held in self.works if not work.is_completed()]
            for receive in self.ahead.get(instruction, ()):
                self.arrivals[receive] = self._ask(receive)
            with self._notifying(instruction.op, instruction.micro_batch, instruction.peer):
                self.actions[instruction.op](instruction)

    def _notifying(self, op: str, micro_batch: int = -1, peer: int = -1) -> AbstractContextManager[None]:
        """Call the callbacks before and after the block."""
        event = Event(str(op), self.index, self.groups.rng.step, micro_batch, peer)
        return notifying(self.callbacks, event, always=op == RECOMPUTE)

    def _ended(self) -> Tensor:
        """Wait for the messages that were sent; the loss."""
        for work, _ in self.works:
            work.wait()
        with self.activity.during("sharing the loss"):
            loss = shared_loss(self.losses, self.groups, self.loss_dtype)
            self.loss_dtype = loss.dtype
            return loss

    def update(self, update: Update) -> None:
        """Complete the gradients of the batches before over all ranks, and step the optimizer."""
        self._update(update)
        self.activity.begin("waiting for the next step", idle=True)
        self._tell_trained()

    def _tell_trained(self) -> None:
        """Tell the callbacks of an update."""
        if self.callbacks:
            now, loss = time.perf_counter(), float(self.last_loss)
            for callback in self.callbacks:
                callback.trained(self.groups.rng.step - 1, loss, now - self.updated_at)
            self.updated_at = now

    def _update(self, update: Update) -> None:
        self.activity.begin(str(Instruction(Op.REDUCE, self.index)))
        with self._notifying(Op.REDUCE):
            self._reduce()
        self.activity.begin(str(Instruction(Op.STEP, self.index)))
        with self._notifying(Op.STEP):
            self._step(update)
        self.accumulating = False

    def _inputs(self, micro_batch: int) -> list[Tensor]:
        return [self.micro_batches[micro_batch][name] for name in self.stage.inputs]

    def _count_valid(self, targets: float | None) -> None:
        """Set the divisor of every mean over valid targets: their mean number in a micro-batch of the whole batch, or
        `targets` / (number of micro-batches)."""
        if not hasattr(self.stage, "count_valid"):
            return
        totals: dict[str, int] = defaultdict(int)
        axes: dict[str, list[str]] = {}
        for i in range(len(self.micro_batches)):
            for name, (count, split) in self.stage.count_valid(*self._inputs(i)).items():
                totals[name] += count
                axes[name] = split
        for name, count in totals.items():
            total = torch.tensor(count if targets is None else targets, device=self.groups.device)
            for axis in axes[name] if targets is None else ():
                self.groups.along(axis).all_reduce(total)
            self.stage.valid[name] = total.item() / len(self.micro_batches)

    def _forward(self, at: Instruction) -> None:
        flight = self.flights[at.micro_batch]
        received = [flight.received[name] for name in self.stage.received]
        again = around_recompute(partial(self._notifying, RECOMPUTE, at.micro_batch))
        with self._keeping(), again, self.shared.prefetch.during((id(self.stage), at.op)):
            results = self.stage(*self._inputs(at.micro_batch), *received)
        if self.last:
            flight.loss = results / len(self.micro_batches)
            self.losses.append(flight.loss.detach())
            return
        results = results if isinstance(results, tuple) else (results,)
        flight.sent = {m.name: r for m, r in zip(self.outgoing, results, strict=True)}
        if torch.is_grad_enabled():
            flight.roots = {m.name: get_gradient_edge(flight.sent[m.name]) for m in self.outgoing if m.grad}
        else:
            flight.received = {}
        flight.waiting = {to for m in self.outgoing for to in m.consumers}

    def _keeping(self) -> AbstractContextManager[None]:
        """A context for forward passes: the rank saves its own part of tensors that backward gathers again."""
        parts = self.shared.level >= 3 or getattr(self.stage, "gathers_again", False)
        return keeping_parts() if parts else nullcontext()

    def _backward(self, at: Instruction) -> None:
        flight = self.flights[at.micro_batch]
        self.shared.backward_begins(last=self.updates and at.micro_batch == self.closing)
        with self.shared.prefetch.during((id(self.stage), at.op)):
            if flight.loss is not None:
                (flight.loss if self.weight == 1.0 else flight.loss * self.weight).backward()
            else:
                torch.autograd.backward(list(flight.roots.values()), [flight.gradients[n] for n in flight.roots])
        self.shared.backward_ended()
        gradients = {
            m.name: g if (g := flight.received[m.name].grad) is not None else torch.zeros_like(flight.received[m.name])
            for m in self.incoming
            if m.grad
        }
        self.flights[at.micro_batch] = _Flight(gradients=gradients)

    def _send(self, at: Instruction) -> None:
        flight = self.flights[at.micro_batch]
        for m in self.outgoing:
            if at.peer in m.consumers:
                self._post(flight.sent[m.name].detach(), at.peer, self.groups.activations)
        flight.waiting.discard(at.peer)
        if not flight.waiting:
            flight.sent = {}

    def _receive(self, at: Instruction) -> None:
        flight = self.flights[at.micro_batch]
        for m, tensor in self._take(at):
            flight.received[m.name] = tensor.requires_grad_(m.grad and torch.is_grad_enabled())

    def _send_gradients(self, at: Instruction) -> None:
        flight = self.flights[at.micro_batch]
        for m in self.incoming:
            if m.producer == at.peer and m.grad:
                self._post(flight.gradients.pop(m.name), at.peer, self.groups.gradients)
        if not flight.gradients:
            del self.flights[at.micro_batch]

    def _receive_gradients(self, at: Instruction) -> None:
        flight = self.flights[at.micro_batch]
        for m, gradient in self._take(at):
            known = flight.gradients.get(m.name)
            flight.gradients[m.name] = gradient if known is None else known + gradient

    def _post(self, tensor: Tensor, stage: int, channel: Group) -> None:
        """Send without waiting. The buffer is held until the message has left."""
        tensor = tensor.contiguous()
        self.works.append((channel.send(tensor, self.groups.rank_at(stage)), tensor))

    def _ask(self, at: Instruction) -> list[Arrival]:
        """Post a receive."""
        if at.op is Op.RECV:
            channel, expected = self.groups.activations, [m for m in self.incoming if m.producer == at.peer]
        else:
            channel, expected = self.groups.gradients, [m for m in self.outgoing if at.peer in m.consumers and m.grad]
        buffers = [torch.empty(m.shape, dtype=m.dtype, device=self.groups.device) for m in expected]
        source = self.groups.rank_at(at.peer)
        return [(m, x, channel.receive(x, source)) for m, x in zip(expected, buffers, strict=True)]

    def _take(self, at: Instruction) -> Iterator[tuple[Message, Tensor]]:
        """Wait for a receive that was posted; the tensor."""
        for message, tensor, work in self.arrivals.pop(at, None) or self._ask(at):
            work.wait()
            yield message, tensor

    def _reduce(self) -> None:
        """Add up gradients that are partial sums over an axis, then those of weights that live on several stages."""
        self.shared.reduce()
        if self.groups.tp.size > 1:
            _sum_gradients([p for p in self.shared.trained if p.origin.placed["tp"].kind == "C"], self.groups.tp)
        by_group: dict[Group, list[Any]] = defaultdict(list)
        for share in sorted(self.shared.trained, key=lambda p: p.origin.name):
            if share.origin.name in self.tied:
                by_group[self.tied[share.origin.name]].append(share)
        for group, shares in by_group.items():
            _sum_gradients(shares, group)

    def _step(self, update: Update) -> None:
        trained = self.shared.trained
        finite, self.grad_norm, factor = complete(update, trained, self.tied, self.groups, self.loss_scale)
        self.skipped += not finite
        optimizer = self.optimizer if finite else None
        taken = one_pass.step(optimizer, factor, self.shared.weight_of) if optimizer and self.one_pass else set()
        self.shared.multiply(factor, later=taken)
        if optimizer is not None:
            self.shared.stepping()
            self.stepping = True
            on_host = fused_steps(optimizer) if self.shared.host else nullcontext()
            try:
                with one_pass.without_gradients(taken), on_host:
                    optimizer.step()
            finally:
                self.stepping = False
            self.shared.stepped(written=taken)


def _sum_gradients(shares: Sequence[Any], group: Group) -> None:
    """Replace gradients by their sums over a group."""
    for share, summed in zip(shares, sum_together([share.grad for share in shares], group), strict=True):
        share.grad = summed
