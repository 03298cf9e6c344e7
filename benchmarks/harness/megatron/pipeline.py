"""The 1F1B schedule: a stage's forwards and backwards of micro-batches, and the messages between stages."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.harness.megatron.groups import Place


class Pipeline:
    """Runs a stage. Sends do not wait for their receivers; receives do.

    stage   takes tokens or hidden states and labels, and gives hidden states or the loss
    tokens  of every micro-batch, (b, s); the ends read them, and all stages their sizes
    hidden  the size of hidden states
    """

    def __init__(self, stage: nn.Module, place: Place, tokens: Sequence[Tensor], labels: Sequence[Tensor], hidden: int):
        self.stage, self.place, self.tokens, self.labels = stage, place, tokens, labels
        samples, sequence = tokens[0].shape
        self.shape = (sequence // place.tp if place.sequence else sequence, samples, hidden)
        self.waiting: deque[tuple[Tensor, Tensor]] = deque()
        self.sends: list[Any] = []
        self.losses: list[Tensor] = []

    def run(self) -> None:
        """All micro-batches, each as a share of the mean."""
        count, place = len(self.tokens), self.place
        warm_up = min(place.pp - 1 - place.stage, count)
        self.losses = []
        for number in range(warm_up):
            self._forward(number)
        for number in range(warm_up, count):
            self._forward(number)
            self._backward()
        for _ in range(warm_up):
            self._backward()
        for send, _ in self.sends:
            send.wait()
        self.sends.clear()

    def _forward(self, number: int) -> None:
        place = self.place
        x = self.tokens[number] if place.first else self._received(place.rank - place.tp).requires_grad_()
        y = self.stage(x, self.labels[number])
        if place.last:
            y = y / len(self.tokens)
            self.losses.append(y.detach())
        else:
            self._send(y.detach(), place.rank + place.tp)
        self.waiting.append((x, y))

    def _backward(self) -> None:
        place = self.place
        x, y = self.waiting.popleft()
        y.backward(None if place.last else self._received(place.rank + place.tp))
        if not place.first:
            self._send(x.grad, place.rank - place.tp)

    def _received(self, source: int) -> Tensor:
        message = torch.empty(self.shape, device=self.tokens[0].device)
        dist.recv(message, source)
        return message

    def _send(self, message: Tensor, target: int) -> None:
        message = message.contiguous()
        self.sends.append((dist.isend(message, target), message))
