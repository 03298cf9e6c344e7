"""Training's state, messages and updates of each parameter, in bytes and seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from autopart.cost.collectives import measured_seconds, merged_seconds
from autopart.cost.compute import stream_rate_seconds
from autopart.hardware.mesh import Group
from autopart.hardware.rows import Device

BUCKET_BYTES = 64 * 2**20
"""Bytes that tensors which travel in one message of the data-parallel axis have together at most; one alone may have
more."""


OPTIMIZER_STATES = {"sgd": 0, "momentum": 1, "adagrad": 1, "rmsprop": 1, "adam": 2, "adamw": 2}
"""Tensors of a parameter's size that torch.optim keeps for it."""


STEP_WORKSPACE = {"rmsprop": (1, 1), "adagrad": (1, 2), "adam": (2, 1), "adamw": (2, 1)}
"""Tensors of a parameter's size that torch.optim makes while it steps: one parameter after another, as on CPUs, and all
at once, as elsewhere (`_single_tensor_adamw` and `_multi_tensor_adamw` of torch 2.13, and so on; others make none)."""


STEP_PASSES = {"sgd": 3, "momentum": 8, "adagrad": 13, "rmsprop": 13, "adam": 18, "adamw": 20}
"""Tensors of a parameter's size that a step reads and writes: counted in torch.optim's `_multi_tensor_*`, which it
takes for parameters on CUDA. Adam: lerp 3, mul 2, addcmul 3, sqrt 2, div 2, add 2, addcdiv 4; AdamW has a mul more."""


MASTERS = ("float32", "float64")
"""Dtypes that a master copy may have: those wider than another."""


def widening(precision: str, master: str | None) -> float:
    """Bytes of a number in the master dtype over those of one in `precision`; 1 where there is no master copy."""
    return getattr(torch, master).itemsize / getattr(torch, precision).itemsize if master else 1.0


def messages(zero: int, micro_batches: int) -> tuple[int, int]:
    """How often a step all-gathers a parameter, and reduce-scatters its gradient, over the data-parallel axis. Level 0
    all-reduces it, in twice the time of a reduce-scatter. Level 1: reduce-scatter, all-gather of the new parameter.
    Level 2: reduce-scatter for every micro-batch. Level 3: for every micro-batch all-gather forward and backward, and
    reduce-scatter."""
    return ((0, 2), (1, 1), (1, micro_batches), (2 * micro_batches, micro_batches))[zero]


def amortization(zero: int, micro_batches: int, stages: int) -> int:
    """The turns of a pipeline among which the seconds that a stage spends on its parameters in a step are spread.

    Stages work on their parameters side by side. In sum(f) + (m - 1) max(f), the seconds of m micro-batches on p equal
    stages, f occurs m + p - 1 times: a share of 1 / (m + p - 1) in f counts the seconds once. From ZeRO 2 on most of
    that work is done for every micro-batch: the share is 1 / m.
    """
    return micro_batches + (stages - 1) * (zero < 2)


@dataclass(frozen=True)
class Training:
    """A training setting: the state of each parameter, and the cost of its gradient.

    optimizer      one of OPTIMIZER_STATES
    zero           ZeRO level (Rajbhandari et al., arXiv 1910.02054, section 5): what the ranks of the data-parallel
                   axis share: 1 optimizer states, 2 gradients too, 3 parameters too
    group          the ranks of that axis
    micro_batches  of a step
    widening       bytes of a number in the master dtype over those of one of a parameter; 1: there is no master copy
    foreach        whether the optimizer steps all parameters at once, as torch.optim does wherever it can: not on CPUs

    With a master copy, the model computes in the parameters' precision, and everything that adds up is in the master
    dtype: gradients, over micro-batches and over ranks, the optimizer's states, and a copy of every parameter that the
    optimizer steps, from which the parameter is written back. The copy counts to the optimizer and is shared like its
    states. Of a parameter of p bytes, m in the master dtype, and k states, a rank of d has

        level   parameters   gradient   optimizer
        0       p            m          (1 + k) m
        1       p            m          (1 + k) m / d
        2       p            m / d      (1 + k) m / d
        3       m / d        m / d      k m / d

    At level 3 the slice of the copy is the parameter: it is gathered in its precision while it is used, and no slice in
    that precision is kept. With bfloat16, float32 and Adam, level 0 is 18 bytes a parameter and level 1 is 6 + 12 / d,
    as in Megatron-LM (Megatron Core's guide, "Distributed Optimizer": bf16 parameters, fp32 gradients); level 3 is
    16 / d, as in torchtitan's FSDP2 (param_dtype bfloat16, reduce_dtype float32).
    """

    optimizer: str
    zero: int
    group: Group
    micro_batches: int
    widening: float = 1.0
    foreach: bool = False

    @property
    def ranks(self) -> int:
        """How many ranks share."""
        return self.group.ranks

    def state_bytes(self, nbytes: float, grad: bool, shared: bool) -> tuple[float, float, float]:
        """Bytes of a parameter of `nbytes` on a rank, its gradient and its optimizer's states; `shared` says whether
        the data-parallel axis can share them: whether it holds partial sums of the gradient."""
        sliced = grad and self.sliced(shared)
        copies = OPTIMIZER_STATES[self.optimizer] + (self.widening > 1 and not sliced)
        share = [self.ranks if shared and grad and self.zero >= level else 1 for level in (3, 2, 1)]
        wide = nbytes * self.widening
        return (wide if sliced else nbytes) / share[0], wide * grad / share[1], wide * grad * copies / share[2]

    def optimizer_workspace(self, nbytes: float, grad: bool, shared: bool) -> float:
        """Bytes of temporaries while the optimizer steps a parameter of `nbytes`: STEP_WORKSPACE tensors of its rank's
        slice, in the master dtype."""
        share = self.ranks if shared and self.zero >= 1 else 1
        return nbytes * self.widening * grad / share * STEP_WORKSPACE.get(self.optimizer, (0, 0))[self.foreach]

    def grad_alloc_ratio(self, first: bool) -> float:
        """Bytes that a backward allocates for a parameter's gradient, over the bytes of the parameter.

        A gradient is made in the parameter's dtype. Where there is a master copy, a copy in the master dtype follows,
        which is added to the sum. The copy of the `first` backward of a step is the sum, and counts as state, unless
        ranks keep slices of the sum (ZeRO 2 and 3). At ZeRO 3 the copy is made of slices: the ratio is 1.
        """
        sliced = self.zero if self.ranks > 1 else 0
        kept = first and sliced < 2
        return 1.0 if sliced >= 3 else (self.widening > 1) + self.widening * (not kept)

    def sliced(self, shared: bool) -> bool:
        """Whether a rank keeps a slice of a parameter, and not the whole."""
        return self.zero >= 3 and shared and self.ranks > 1

    def reduced_bytes(self, nbytes: float, grad: bool, shared: bool) -> float:
        """`nbytes` of a parameter whose gradient the ranks reduce, else 0."""
        return nbytes if shared and grad and self.ranks > 1 else 0.0

    def pending_grad_bytes(self, nbytes: float, grad: bool, shared: bool) -> float:
        """Bytes, in the master dtype, of the gradient of a parameter that several segments read, from the backward of
        the last of these segments until that of the first. Autograd adds the gradient to that of earlier micro-batches
        when all segments have contributed. The gradient of a slice is added at once: 0."""
        return nbytes * self.widening if grad and self.micro_batches > 1 and not self.sliced(shared) else 0.0

    def gathered_bytes(self, summed: Any) -> Any:
        """Bytes of whole parameters that a segment gathers to compute: all of `summed` bytes at ZeRO 3, else 0."""
        return summed * (self.zero >= 3)

    def grad_reduce_workspace(self, summed: Any, most: Any, alone: Any) -> Any:
        """Bytes that are alive while ranks reduce the gradients of a segment's parameters at ZeRO 2 and 3, else 0.

        The parameters have `summed` bytes, the largest `most`. With w bytes of a master number to one of a parameter, a
        message of parameters of s bytes, and d ranks:

            (w or, at ZeRO 3, 1) summed  whole gradients  +  w s  a message  +  w s / d  the rank's slices of sums

        The gradient of a parameter that is `alone` is its own message where its dtype is the message's.
        """
        if self.zero < 2:
            return 0.0 * summed
        first = self.widening if self.zero == 2 else 1.0
        copied = 1.0 - alone * (first == self.widening)
        return first * summed + self.widening * self._in_a_message(summed, most, first) * (copied + 1.0 / self.ranks)

    def end_of_step_workspace(self, summed: Any, most: Any) -> Any:
        """Bytes of a message at the end of a step, for parameters of a stage of `summed` bytes, the largest `most`.

        ZeRO 0 and 1: a message of gradients, at ZeRO 1 with the rank's slices of the sums. ZeRO 2: a message of new
        parameters, with the rank's slices of these. ZeRO 3: none.
        """
        if self.zero >= 3:
            return 0.0 * summed
        message = self._in_a_message(summed, most, self.widening)
        both = 1.0 + (self.zero >= 1) / self.ranks
        return message * both * (self.widening if self.zero < 2 else 1.0)

    @staticmethod
    def _in_a_message(summed: Any, most: Any, wide: float) -> Any:
        """Bytes of the parameters whose gradients, `wide` times as large, travel in one message."""
        return np.minimum(summed, np.maximum(most, BUCKET_BYTES / wide))

    def sync_seconds(self, nbytes: float, shared: bool) -> float:
        """Seconds a step takes to bring the gradient of a parameter of `nbytes` together and the parameter back, over
        the data-parallel axis. Many parameters travel in one message, so that no latency is counted.

        Gradients are in the master dtype, parameters in their own: with a master copy level 1 takes less than level 0.
        """
        if not shared or self.ranks == 1:
            return 0.0
        wide = nbytes * self.widening
        if self.zero == 0:
            return float(merged_seconds(wide, self.group, "all_reduce"))
        gathers, scatters = messages(self.zero, self.micro_batches)
        gather = merged_seconds(nbytes, self.group, "all_gather")
        return float(gathers * gather + scatters * merged_seconds(wide, self.group, "reduce_scatter"))

    def overlappable_seconds(self, nbytes: float, shared: bool) -> float:
        """Of `sync_seconds`, those of the reduction of the gradient, which may overlap with one backward."""
        if not shared or self.ranks == 1:
            return 0.0
        name = "all_reduce" if self.zero == 0 else "reduce_scatter"
        return float(merged_seconds(nbytes * self.widening, self.group, name))

    @property
    def backwards(self) -> int:
        """Backwards of a step beside which gradients are summed: the last, from level 2 every one."""
        return self.micro_batches if self.zero >= 2 else 1

    def partial_sync_seconds(self, nbytes: float, group: Group) -> float:
        """Seconds a step takes to add up the gradient of a parameter of `nbytes` that is a partial sum over another
        axis: one all-reduce."""
        return float(merged_seconds(nbytes * self.widening, group, "all_reduce"))


def update_seconds(nbytes: float, grad: bool, shared: bool, training: Training, device: Device) -> float:
    """Seconds a step takes to add up the gradients of micro-batches and to update a parameter of `nbytes`, or this
    rank's slice of it: as measured; on a device with `silicon` by the bytes they move (`summing_seconds` and
    STEP_PASSES); on another 0. An optimizer that was not measured is taken for the measured one with as many states at
    least, else for the costliest."""
    if not grad:
        return 0.0
    master_bytes = nbytes * training.widening
    slices = training.ranks if shared and training.zero >= 1 else 1
    measured = device.measured
    if measured is None:
        if device.silicon is None:
            return 0.0
        copied = master_bytes + nbytes if training.widening > 1 and not training.sliced(shared) else 0.0
        step = (STEP_PASSES[training.optimizer] * master_bytes + copied) / slices
        return summing_seconds(nbytes, training, device) + stream_rate_seconds(step, device)
    seconds = (training.micro_batches - 1) * measured_seconds(master_bytes, measured.accumulate)
    rows = measured.updates.get(training.optimizer)
    if rows is None:
        states = OPTIMIZER_STATES[training.optimizer]
        known = sorted(measured.updates, key=lambda name: (OPTIMIZER_STATES[name] < states, OPTIMIZER_STATES[name]))
        rows = measured.updates[known[0]] if known else ((1.0, 0.0, 0.0),)
    return float(seconds * measured.pace + measured_seconds(master_bytes / slices, rows))


def summing_seconds(nbytes: float, training: Training, device: Device) -> float:
    """Seconds a step takes to add up the gradients of its micro-batches of a parameter of `nbytes`, on a device with
    `silicon`: each is read, and the sum read and written; the first is the sum, or written in the master dtype."""
    master_bytes = nbytes * training.widening
    first = nbytes + master_bytes if training.widening > 1 else 0.0
    return stream_rate_seconds(first + (training.micro_batches - 1) * (nbytes + 2 * master_bytes), device)
