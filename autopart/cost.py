"""What one operator costs on one device, and what training keeps for each parameter."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from autopart.comm import all_gather_seconds, all_reduce_seconds, reduce_scatter_seconds
from autopart.errors import PartitionError
from autopart.graph import Info
from autopart.hardware.rows import Device, Link

MATMUL_EFFICIENCY = 0.7
"""Share of the peak that large matrix products reach. Megatron-LM reports 52 % of the A100's peak end to end
(Narayanan et al., arXiv 2104.04473, table 1), with its products alone above that."""

BANDWIDTH_EFFICIENCY = 0.8
"""Share of the memory bandwidth that elementwise kernels reach."""


@dataclass(frozen=True)
class Seconds:
    """Seconds of one operator (or an array of them): forward and backward."""

    forward: Any
    backward: Any


@dataclass(frozen=True)
class Work:
    """What an operator does on one rank; every field may be an array, of one element an operator.

    flops     of the forward pass
    bytes     read and written by it
    rate      FLOP/s it reaches; infinite where matrix units have no part
    again     how many times the forward's time its backward takes
    runs      1, or 0 for what costs nothing: views
    """

    flops: Any
    bytes: Any
    rate: Any
    again: Any
    runs: Any


def work_seconds(work: Work, device: Device) -> Seconds:
    """Roofline time: max(FLOPs / rate, bytes / bandwidth) + launch (Williams, Waterman, Patterson 2009)."""
    moved = work.bytes / (device.bandwidth * BANDWIDTH_EFFICIENCY)
    forward = work.runs * (np.maximum(work.flops / work.rate, moved) + device.launch_seconds)
    return Seconds(forward, forward * work.again)


def rate_of(record: Info, device: Device) -> float:
    """FLOP/s that an operator reaches: `Work.rate`."""
    return peak(device, record.dtype) * MATMUL_EFFICIENCY if record.product else math.inf


def again_of(record: Info, inputs: Iterable[Info]) -> int:
    """`Work.again`: a product's two gradients cost a forward each, one where only one operand has a gradient; other
    operators move the same bytes again."""
    return min(sum(i.grad for i in inputs), 2) if record.product else int(record.grad)


def peak(device: Device, dtype: torch.dtype) -> float:
    """FLOP/s of matrix products; PartitionError where the device has none for the dtype."""
    name = str(dtype).removeprefix("torch.")
    found = device.flops.get(name)
    if found is None:
        raise PartitionError(
            f"{device.name} computes no {name}", f"it has {', '.join(device.flops)}", "another precision="
        )
    return found


OPTIMIZER_STATES = {"sgd": 0, "momentum": 1, "adagrad": 1, "rmsprop": 1, "adam": 2, "adamw": 2}
"""Tensors of a parameter's size that torch.optim keeps for it."""


@dataclass(frozen=True)
class Training:
    """What is kept for each parameter, and what its gradient costs.

    optimizer      one of OPTIMIZER_STATES
    zero           ZeRO level (Rajbhandari et al., arXiv 1910.02054, section 5): what the ranks of the data-parallel
                   axis share: 1 optimizer states, 2 gradients too, 3 parameters too
    ranks          of that axis;  link: between them
    micro_batches  of a step
    """

    optimizer: str
    zero: int
    ranks: int
    link: Link
    micro_batches: int

    def memory(self, nbytes: float, grad: bool, shared: bool) -> tuple[float, float, float]:
        """Bytes of a parameter of `nbytes` on a rank, its gradient and its optimizer's states; `shared` says whether
        the data-parallel axis can share them: whether it holds partial sums of the gradient."""
        states = OPTIMIZER_STATES[self.optimizer]
        share = [self.ranks if shared and grad and self.zero >= level else 1 for level in (3, 2, 1)]
        return nbytes / share[0], nbytes * grad / share[1], nbytes * grad * states / share[2]

    def gathered(self, nbytes: float, shared: bool) -> float:
        """Bytes of a parameter's whole that exist only while it is used."""
        return nbytes if self.zero >= 3 and shared and self.ranks > 1 else 0.0

    def sync_seconds(self, nbytes: float, shared: bool) -> float:
        """Seconds a step takes to bring the gradient of a parameter of `nbytes` together and the parameter back, over
        the data-parallel axis. Many parameters travel in one message, so that no latency is counted.

        Level 0: all-reduce. Level 1: reduce-scatter, all-gather of the new parameter. Level 2: reduce-scatter for every
        micro-batch. Level 3: for every micro-batch all-gather forward and backward, and reduce-scatter.
        """
        if not shared or self.ranks == 1:
            return 0.0
        link = replace(self.link, latency_seconds=0.0)
        gather = all_gather_seconds(nbytes, self.ranks, link)
        scatter = reduce_scatter_seconds(nbytes, self.ranks, link)
        m = self.micro_batches
        return (gather + scatter, gather + scatter, gather + m * scatter, m * (2 * gather + scatter))[self.zero]


def partial_sync_seconds(nbytes: float, size: int, link: Link) -> float:
    """Seconds a step takes to add up a gradient that is a partial sum over another axis: one all-reduce."""
    return all_reduce_seconds(nbytes, size, replace(link, latency_seconds=0.0))
