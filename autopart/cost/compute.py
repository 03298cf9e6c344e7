"""Seconds of operators on one device, and bytes of the gradients in their backward."""

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
from autopart.cost.slowest import of_slowest
from autopart.errors import PartitionError
from autopart.hardware.measured import Measured
from autopart.hardware.rows import DTYPES, Device
from autopart.ir.graph import Info
from autopart.sharding.notation import Strategy

Array = NDArray[np.float64]

MATMUL_EFFICIENCY = 0.7
"""FLOP/s of matrix products / peak FLOP/s, on a device without `silicon`. An assumption."""

BANDWIDTH_EFFICIENCY = 0.8
"""Bytes/s of elementwise kernels / memory bandwidth, on a device without `silicon`. An assumption."""

NO_SIZES = (0.0,) * 6
"""`Work.sizes` of an operator that is neither a matrix product nor attention."""


@dataclass(frozen=True)
class Seconds:
    """Seconds of an operator, or arrays of seconds by operator."""

    forward: Any
    backward: Any


@dataclass(frozen=True)
class Work:
    """What operators do on one rank. Every field is an array with an element or a row for each operator.

    flops           FLOPs of the forward
    bytes           bytes that the forward reads and writes
    peak            FLOP/s of the matrix units; infinite where the operator does not use them
    backward_ratio  seconds of the backward / seconds of the forward
    launches        kernels of the forward: 1, or 0 for a view
    kind            index in `autopart.cost.measured_tables.KINDS`
    sizes           rows: `rules.Sizes` of a matrix product or of attention; NO_SIZES of other operators
    grads           rows: whether the first factor of a product has a gradient; whether another factor has one
    """

    flops: Array
    bytes: Array
    peak: Array
    backward_ratio: Array
    launches: Array
    kind: Array
    sizes: Array
    grads: Array


@of_slowest
def operator_seconds_of(records: Sequence[Info], device: Device) -> Seconds:
    """Seconds of the operators of a stage's graph."""
    return work_seconds(work_of(records, device), device)


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
    """The work of operators whose 14 numbers are a row each, in the order of the fields."""
    flops, nbytes, peaks, ratio, launches, kind = rows[:, :6].T
    return Work(flops, nbytes, peaks, ratio, launches, kind, rows[:, 6:12], rows[:, 12:14])


def work_seconds(work: Work, device: Device) -> Seconds:
    """Seconds of operators, forward and backward.

    measured tables  products and attention: interpolated by sizes; other operators: by kind and bytes
    `silicon`        products and attention: by sizes (`autopart.cost.kernel_efficiency`), with the gradient of each
                     factor as a product of its own; other operators: max(bytes / memory rate, FLOPs / sustained
                     FLOP/s); no kernel takes less than a launch
    neither          max(FLOPs / rate, bytes / bandwidth) + launch: the roofline (Williams, Waterman, Patterson 2009)

    Where the backward has no formula of its own, its seconds are forward seconds x `backward_ratio`.
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
    """Seconds by the measured tables.

    `backward_ratio` says only whether an operator has a backward. An operator of several products, whose sizes are not
    known, takes at least FLOPs / peak seconds.
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
            for m, n, k in _with_gradients(*work.sizes[products, 1:4].T)
        ]
        alone, (first, second) = device.launch_seconds * measured.pace, work.grads[products].T
        forward[products] = each[0] + alone
        backward[products] = first * (each[1] + alone) + second * (each[2] + alone)
    fused = np.flatnonzero(work.sizes[:, 4] > 0)
    if len(fused):
        there, back = attention_tables(work.sizes[fused].T, work.peak[fused], device.flops, measured)
        forward[fused], backward[fused] = there, back * work.grads[fused].max(1)
    return Seconds(forward * work.launches, backward * work.launches)


@of_slowest
def stream_seconds(nbytes: Any, backward_ratio: Any, launches: Any, device: Device) -> Seconds:
    """Seconds of kernels that read and write `nbytes` and whose FLOPs do not count. Arguments as in `Work`."""
    if device.measured:
        there, back = operator_seconds(0, nbytes, device.measured)
        return Seconds(launches * there, launches * back * backward_ratio)
    forward = launches * with_launch(_streamed(nbytes, device), device)
    return Seconds(forward, forward * backward_ratio)


def beside_product_seconds(nbytes: Array, grad: Any, device: Device) -> Seconds:
    """Seconds of what kernels with a matrix product read and write apart from it, in bytes: [2, operators], forward and
    backward."""
    there, back = stream_seconds(nbytes, 0.0, nbytes > 0, device).forward
    return Seconds(there, grad * back)


def _streamed(nbytes: Any, device: Device) -> Any:
    """Seconds to read and write `nbytes` in one kernel, without its launch."""
    if device.silicon is None:
        return nbytes / (device.bandwidth * BANDWIDTH_EFFICIENCY)
    return memory_seconds(nbytes, device.bandwidth, device.silicon)


def _product_seconds(sizes: Array, nbytes: Array, peak: Array, grads: Array, device: Device) -> Seconds:
    """Seconds of products on a device with `silicon`.

    forward          m x k by k x n
    first gradient   m x n by n x k
    second gradient  k x m by m x n
    """
    assert device.silicon is not None
    batch, m, n, k = sizes[:4]
    high, wide, deep = np.swapaxes(_with_gradients(m, n, k), 0, 1)
    each = product_seconds(batch, high, wide, deep, nbytes, peak, device.bandwidth, device.silicon)
    forward, first, second = with_launch(each, device)
    return Seconds(forward, grads[0] * first + grads[1] * second)


def _with_gradients(m: Array, n: Array, k: Array) -> Array:
    """[3, 3, products]: m, n and k of a product, and of the two products that give the gradients of its factors."""
    return np.array([[m, n, k], [m, k, n], [k, n, m]])


def _attention_seconds(sizes: Array, nbytes: Array, peak: Array, grads: Array, device: Device) -> Seconds:
    """Seconds of fused attention on a device with `silicon`. The backward moves twice the bytes of the forward."""
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
    """`Work.peak` of an operator, in FLOP/s."""
    return peak(device, record.computes or record.dtype) if record.product else math.inf


def peak_dtype_of(record: Info, device: Device) -> int:
    """The index in `peaks` of an operator's `Work.peak`, for any device. Raises PartitionError as `peak` does."""
    if not record.product:
        return len(DTYPES)
    dtype = record.computes or record.dtype
    peak(device, dtype)
    return DTYPES.index(_name(dtype))


def peaks(device: Device) -> Array:
    """FLOP/s in each of DTYPES, NaN for those that the device does not compute in; and behind them infinity, for
    operators that do not use the matrix units."""
    return np.array([*(device.flops.get(dtype, math.nan) for dtype in DTYPES), math.inf])


def kind_of(record: Info) -> int:
    """`Work.kind` of an operator."""
    return KIND_OF.get(record.kernel or record.name, 0)


def is_loss(record: Info) -> bool:
    """Whether an operator is a cross-entropy of logits."""
    return kind_of(record) == LOSS


LOSS = KIND_OF["aten.cross_entropy_loss"]
SPLIT_LOSS = "vocab_cross_entropy"
"""The function of `autopart.runtime` for the cross-entropy of logits that are split along the vocabulary."""


SPLIT_HEAD = "vocab_linear_loss"
"""The function of `autopart.runtime` for the head with its cross-entropy, whose vocabulary is split."""


OWN_EXPERTS = "own_experts"
"""The function of `autopart.runtime` for a mixture of experts of which each rank has some. Every rank sorts all pairs
of a token and an expert, and saves as much for backward as if it had all experts."""

NARROW_EXPERTS = "narrow_experts"
"""A mixture of experts with biases of which each rank has a part of every expert: one rank adds the outputs' bias."""


def divides_saved(strategy: Strategy) -> bool:
    """Whether ranks share what an operator saves for backward besides values."""
    return strategy.shards_work and strategy.local != OWN_EXPERTS


def divides_weights(strategy: Strategy, weights: Iterable[int]) -> bool:
    """Whether ranks share the operands of these indices, and what an operator saves of them for backward."""
    return any(
        placement is not None and placement.kind == "S" for placement in map(strategy.inputs.__getitem__, weights)
    )


def largest_gradient_bytes(made: Any, taken: Any, record: Any, loss: bool, split: bool) -> Any:
    """Bytes of the largest gradient in an operator's backward.

        cross-entropy                        taken, or taken / 2 where the logits are split (`runtime.functions`)
        between logits and a cross-entropy   (made + taken) / 2; of a view made / 2
        other operators                      made

    made   bytes of the outputs
    taken  bytes of the operands of a product that are no parameters; of another operator, of the first operand
    loss   whether the operator is a cross-entropy of logits
    split  whether its logits are split along the vocabulary
    """
    if loss:
        return taken / 2 if split else taken
    return (made + taken * (not record.view)) / 2 if record.logits else made


def backward_gradient_bytes(made: Any, taken: Any, weights: Any, record: Any, loss: bool, split: bool) -> Any:
    """Bytes of the gradients that are alive in an operator's backward.

        matrix product, embedding  made + taken + weights
        other operators            `Info.gradient_copies` x `largest_gradient_bytes`

    weights  bytes of the gradients of parameters

    The other arguments are those of `largest_gradient_bytes`.
    """
    if not loss and (record.product or 0 in record.weights):
        return made + taken + weights
    return record.gradient_copies * largest_gradient_bytes(made, taken, record, loss, split)


def backward_ratio_of(record: Info, inputs: Iterable[Info]) -> int:
    """`Work.backward_ratio` of an operator.

    A product has as many products in its backward as operands with a gradient, at most 2. The backward of another
    operator moves as many bytes as its forward: the ratio is 1, or 0 without a gradient.
    """
    return min(sum(i.grad for i in inputs), 2) if record.product else int(record.grad)


def peak(device: Device, dtype: torch.dtype) -> float:
    """FLOP/s of real matrix products in a dtype. A complex product is counted as several real ones (`passes.annotate`).

    Raises PartitionError for a dtype in which the device has no FLOP/s.
    """
    name = _name(dtype)
    found = device.flops.get(name)
    if found is None:
        raise PartitionError(
            f"{device.name} computes no {name}", f"it has {', '.join(device.flops)}", "another precision="
        )
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype.to_real()).removeprefix("torch.")


def stream_rate_seconds(nbytes: float, device: Device) -> float:
    """Seconds to move `nbytes` in a kernel over many tensors, on a device with `silicon`. Launches do not count."""
    assert device.silicon is not None
    return float(memory_seconds(nbytes, device.bandwidth, device.silicon, 0))


def with_launch(seconds: Any, device: Device) -> Any:
    """Seconds of kernels with their launch.

    measured tables  seconds, which include the launch
    `silicon`        max(seconds, `Device.launch_seconds`)
    neither          seconds + `Device.launch_seconds`
    """
    if device.measured:
        return seconds
    return seconds + device.launch_seconds if device.silicon is None else np.maximum(seconds, device.launch_seconds)
