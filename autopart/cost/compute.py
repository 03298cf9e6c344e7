"""Seconds of one operator on one device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autopart.cost.kernel_efficiency import attention_seconds, memory_seconds, product_seconds
from autopart.cost.measured_tables import KIND_OF, operator_seconds
from autopart.cost.measured_tables import attention_seconds as attention_tables
from autopart.cost.measured_tables import product_seconds as product_tables
from autopart.errors import PartitionError
from autopart.hardware.measured import Measured
from autopart.hardware.rows import Device
from autopart.ir.graph import Info

Array = NDArray[np.float64]

MATMUL_EFFICIENCY = 0.7
"""Share of the peak that matrix products reach on a device without `silicon`. An assumption."""

BANDWIDTH_EFFICIENCY = 0.8
"""Share of the memory bandwidth that elementwise kernels reach on a device without `silicon`. An assumption."""

NO_SIZES = (0.0,) * 6
"""The sizes of an operator that is no matrix product."""


@dataclass(frozen=True)
class Seconds:
    """Seconds of one operator, or arrays of them."""

    forward: Any
    backward: Any


@dataclass(frozen=True)
class Work:
    """What operators do on one rank; every field is an array, of one element (or row) an operator.

    flops     of the forward pass
    bytes     read and written by it
    peak      FLOP/s of the matrix units; infinite where they have no part
    backward_ratio  seconds of the backward / seconds of the forward
    launches  1, or 0 for a view, which launches no kernel
    kind      index of its kind in `autopart.cost.measured_tables.KINDS`
    sizes     rows as `rules.Sizes` of the matrix product that it is; zeros where it is none
    grads     rows of two: whether gradients flow to the product's first factor, and to another
    """

    flops: Array
    bytes: Array
    peak: Array
    backward_ratio: Array
    launches: Array
    kind: Array
    sizes: Array
    grads: Array


def work_of(records: Sequence[Info], device: Device) -> Work:
    """The work of the operators of a stage's graph."""
    rows = [
        [r.flops, r.moved, peak_of(r, device), r.backward_ratio, not r.view, kind_of(r), *_sizes(r), *r.grads]
        for r in records
    ]
    return work_in(np.array(rows, dtype=float).reshape(len(rows), -1))


def _sizes(record: Info) -> tuple[float, ...]:
    return record.matrix.sizes if record.matrix else NO_SIZES


def work_in(rows: Array) -> Work:
    """The work that rows of its numbers tell."""
    flops, nbytes, peaks, ratio, launches, kind = rows[:, :6].T
    return Work(flops, nbytes, peaks, ratio, launches, kind, rows[:, 6:12], rows[:, 12:14])


def work_seconds(work: Work, device: Device) -> Seconds:
    """Seconds of operators, forward and backward.

    A device with measured tables: products and attention by their sizes, everything else by its kind and bytes.
    A device with `silicon`: products and attention by their sizes (`autopart.cost.kernel_efficiency`), the gradients of
    both factors as products of their own; everything else by max(bytes, FLOPs of several products); no kernel takes
    less than a launch.
    Any other device: the roofline max(FLOPs / rate, bytes / bandwidth) + launch (Williams, Waterman, Patterson 2009);
    backward takes `backward_ratio` times as long.
    """
    if device.measured:
        return _measured_seconds(work, device, device.measured)
    share = device.silicon.sustained if device.silicon else MATMUL_EFFICIENCY
    each = np.maximum(_streamed(work.bytes, device), work.flops / (work.peak * share))
    forward = work.launches * with_launch(each, device)
    backward = forward * work.backward_ratio
    for which, seconds in (
        ((work.sizes[:, 0] > 0) & (work.sizes[:, 4] == 0), _product_seconds),
        (work.sizes[:, 4] > 0, _attention_seconds),
    ):
        own = np.flatnonzero(which) if device.silicon else ()
        if len(own):
            found = seconds(work.sizes[own].T, work.bytes[own], work.peak[own], work.grads[own].T, device)
            forward[own], backward[own] = work.launches[own] * found.forward, work.launches[own] * found.backward
    return Seconds(forward, backward)


def _measured_seconds(work: Work, device: Device, measured: Measured) -> Seconds:
    """Seconds by the measured tables. `backward_ratio` only tells whether there is a backward. Several products at
    once, whose sizes are not known, run at the peak.
    """
    own, flows = operator_seconds(work.kind, work.bytes, measured), np.minimum(work.backward_ratio, 1.0)
    forward, backward = own[0], own[1] * flows
    several = np.isfinite(work.peak) & (work.sizes[:, 0] == 0)
    forward = np.where(several, np.maximum(forward, work.flops / work.peak), forward)
    backward = np.where(several, np.maximum(backward, work.backward_ratio * work.flops / work.peak), backward)
    products = np.flatnonzero((work.sizes[:, 0] > 0) & (work.sizes[:, 4] == 0))
    if len(products):
        each = [
            product_tables(work.sizes[products, 0], m, n, k, work.peak[products], device.flops, measured)
            for m, n, k in _three(*work.sizes[products, 1:4].T)
        ]
        alone, (first, second) = device.launch_seconds * measured.pace, work.grads[products].T
        forward[products] = each[0] + alone
        backward[products] = first * (each[1] + alone) + second * (each[2] + alone)
    fused = np.flatnonzero(work.sizes[:, 4] > 0)
    if len(fused):
        there, back = attention_tables(work.sizes[fused].T, work.peak[fused], device.flops, measured)
        forward[fused], backward[fused] = there, back * work.grads[fused].max(1)
    return Seconds(forward * work.launches, backward * work.launches)


def stream_seconds(nbytes: Any, backward_ratio: Any, launches: Any, device: Device) -> Seconds:
    """Seconds of kernels that read and write `nbytes` and compute next to nothing."""
    if device.measured:
        there, back = operator_seconds(0, nbytes, device.measured)
        return Seconds(launches * there, launches * back * backward_ratio)
    forward = launches * with_launch(_streamed(nbytes, device), device)
    return Seconds(forward, forward * backward_ratio)


def _streamed(nbytes: Any, device: Device) -> Any:
    if device.silicon is None:
        return nbytes / (device.bandwidth * BANDWIDTH_EFFICIENCY)
    return memory_seconds(nbytes, device.bandwidth, device.silicon)


def _product_seconds(sizes: Array, nbytes: Array, peak: Array, grads: Array, device: Device) -> Seconds:
    """m x k by k x n forward; backward m x n by n x k for the first factor, k x m by m x n for the second."""
    assert device.silicon is not None
    batch, m, n, k = sizes[:4]
    high, wide, deep = np.swapaxes(_three(m, n, k), 0, 1)
    each = product_seconds(batch, high, wide, deep, nbytes, peak, device.bandwidth, device.silicon)
    forward, first, second = with_launch(each, device)
    return Seconds(forward, grads[0] * first + grads[1] * second)


def _three(m: Array, n: Array, k: Array) -> Array:
    """m, n and k of a product and of the two products that give the gradients of its factors."""
    return np.array([[m, n, k], [m, k, n], [k, n, m]])


def _attention_seconds(sizes: Array, nbytes: Array, peak: Array, grads: Array, device: Device) -> Seconds:
    """One fused kernel, which moves twice the bytes backward."""
    assert device.silicon is not None
    batch, queries, keys, head, value, causal = sizes
    forward, backward = (
        attention_seconds(
            batch, 1.0, queries, keys, head, value, causal, nbytes * (1 + back), peak, device.bandwidth,
            device.silicon, back,
        )
        for back in (False, True)
    )  # fmt: skip
    return Seconds(with_launch(forward, device), grads.max(0) * with_launch(backward, device))


def peak_of(record: Info, device: Device) -> float:
    """FLOP/s of the matrix units for an operator: `Work.peak`."""
    return peak(device, record.dtype) if record.product else math.inf


def kind_of(record: Info) -> int:
    """`Work.kind` of an operator."""
    return KIND_OF.get(record.kernel or record.name, 0)


def is_loss(record: Info) -> bool:
    """Whether an operator is a cross-entropy of logits."""
    return kind_of(record) == LOSS


LOSS = KIND_OF["aten.cross_entropy_loss"]
SPLIT_LOSS = "vocab_cross_entropy"
"""The function that computes the cross-entropy of logits split along the vocabulary."""


def largest_of(made: Any, taken: Any, record: Any, loss: bool, split: bool) -> Any:
    """Bytes of the largest gradient in an operator's backward. `made` are bytes of its outputs, `taken` of its operands
    without parameters (of an operator that is no product: of its first operand).

        cross-entropy                        taken, or taken / 2 where the logits are split (`runtime.functions`)
        between logits and a cross-entropy   (made + taken) / 2; of a view made / 2
        other operators                      made
    """
    if loss:
        return taken / 2 if split else taken
    return (made + taken * (not record.view)) / 2 if record.logits else made


def bytes_of_backward(made: Any, taken: Any, weights: Any, record: Any, loss: bool, split: bool) -> Any:
    """Bytes of gradients that are alive in an operator's backward. `weights` are bytes of the gradients of parameters.

    matrix product, embedding  made + taken + weights
    other operators            `Info.gradient_copies` x `largest_of`
    """
    if not loss and (record.product or 0 in record.weights):
        return made + taken + weights
    return record.gradient_copies * largest_of(made, taken, record, loss, split)


def backward_ratio_of(record: Info, inputs: Iterable[Info]) -> int:
    """`Work.backward_ratio`. A product has a backward product for each operand with a gradient, at most 2. The backward
    of another operator moves the same bytes as its forward: 1; 0 without a gradient."""
    return min(sum(i.grad for i in inputs), 2) if record.product else int(record.grad)


def peak(device: Device, dtype: torch.dtype) -> float:
    """FLOP/s of real matrix products, of which a complex one is several (`passes.annotate`); PartitionError where the
    device has none for the dtype."""
    name = str(dtype.to_real()).removeprefix("torch.")
    found = device.flops.get(name)
    if found is None:
        raise PartitionError(
            f"{device.name} computes no {name}", f"it has {', '.join(device.flops)}", "another precision="
        )
    return found


def stream_rate_seconds(nbytes: float, device: Device) -> float:
    """Seconds to move `nbytes` at the memory bandwidth, without launches: in one large kernel, or in a kernel of many
    tensors."""
    assert device.silicon is not None
    return float(memory_seconds(nbytes, device.bandwidth, device.silicon, 0))


def with_launch(seconds: Any, device: Device) -> Any:
    """Seconds of kernels with their launch (`Device.launch_seconds`). Measured seconds include it already."""
    if device.measured:
        return seconds
    return seconds + device.launch_seconds if device.silicon is None else np.maximum(seconds, device.launch_seconds)
