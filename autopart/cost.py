"""What one operator costs on one device, and what training keeps for each parameter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from autopart.comm import all_reduce_seconds
from autopart.errors import PartitionError
from autopart.graph import Info, info
from autopart.mesh import Device, Link
from autopart.notation import C, Placement
from autopart.rules import is_contraction

MATMUL_EFFICIENCY = 0.7
"""Share of the peak that large matrix products reach. Megatron-LM reports 52 % of the A100's peak end to end
(Narayanan et al., arXiv 2104.04473, table 1), with its products alone above that."""

BANDWIDTH_EFFICIENCY = 0.8
"""Share of the memory bandwidth that elementwise kernels reach."""


@dataclass(frozen=True)
class Seconds:
    """Seconds of one operator: forward and backward."""

    forward: float
    backward: float


def node_seconds(node: fx.Node, device: Device, share: int, scale: float) -> Seconds:
    """Roofline time of a node when `share` ranks divide its work, at `scale` times the traced samples.

    max(FLOPs / peak, bytes / bandwidth) + launch (Williams, Waterman, Patterson 2009). Backward: a product's two
    gradients cost a forward each, one where only one operand has a gradient; other operators move the same
    bytes again, and their inputs.
    """
    record = info(node)
    if record.view:
        return Seconds(0.0, 0.0)
    inputs = [info(n) for n in node.all_input_nodes]
    grow = scale if record.batch is not None or any(i.batch is not None for i in inputs) else 1.0
    moved = grow * (record.bytes + sum(i.bytes for i in inputs)) / share / (device.bandwidth * BANDWIDTH_EFFICIENCY)
    if is_contraction(record.name):
        work = grow * record.flops / share / (peak(device, record.dtype) * MATMUL_EFFICIENCY)
        forward = max(work, moved) + device.launch_seconds
        gradients = sum(i.grad for i in inputs)
        return Seconds(forward, forward * min(gradients, 2) if gradients else 0.0)
    forward = moved + device.launch_seconds
    return Seconds(forward, forward if record.grad else 0.0)


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
    """What is kept for each parameter: one of OPTIMIZER_STATES; ZeRO level; ranks that share its states."""

    optimizer: str = "adamw"
    zero: int = 0
    shared_by: int = 1

    def gradient_bytes(self, dtype: torch.dtype) -> float:
        """Bytes of an element's gradient."""
        return float(dtype.itemsize)

    def state_bytes(self, dtype: torch.dtype) -> float:
        """Bytes of an element with its gradient and optimizer states (ZeRO-1: arXiv 1910.02054, section 5.1)."""
        states = OPTIMIZER_STATES[self.optimizer] * dtype.itemsize
        return 2 * dtype.itemsize + states / (self.shared_by if self.zero >= 1 else 1)


def sync_seconds(record: Info, placement: Placement, size: int, link: Link, shards: int, training: Training) -> float:
    """Seconds to add up a parameter's gradients over an axis of `size` ranks, once a step: where they are partial
    sums. Many parameters travel in one message, so no latency is counted; `shards` is how finely other axes
    split the parameter."""
    if record.kind != "parameter" or placement != C or not record.grad:
        return 0.0
    nbytes = torch.Size(record.shape).numel() * training.gradient_bytes(record.dtype) / shards
    return all_reduce_seconds(nbytes, size, replace(link, latency_seconds=0.0))
