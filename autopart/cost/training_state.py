"""Training's state, messages and updates of each parameter, in bytes and seconds."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from autopart.cost.collectives import message_seconds
from autopart.cost.message_sizes import bucket_bytes
from autopart.cost.offload import FUSED_ON_HOST, host_bytes
from autopart.hardware.mesh import Group, Mesh
from autopart.hardware.rows import Device
from autopart.kernels.table import STEP

OPTIMIZER_STATES = {"sgd": 0, "momentum": 1, "adagrad": 1, "rmsprop": 1, "adam": 2, "adamw": 2}
"""Tensors of a parameter's size that torch.optim keeps for it."""


STEP_WORKSPACE = {"rmsprop": (1, 1), "adagrad": (1, 2), "adam": (2, 1), "adamw": (2, 1)}
"""Optimizer -> tensors of a parameter's size that torch.optim allocates in a step: where it steps one parameter after
another, as on CPUs, and where it steps all at once, as elsewhere. Source: `_single_tensor_adamw`, `_multi_tensor_adamw`
and their like in torch 2.13. The other optimizers allocate none."""


STEP_PASSES = {"sgd": 3, "momentum": 8, "adagrad": 13, "rmsprop": 13, "adam": 18, "adamw": 20}
"""Optimizer -> tensors of a parameter's size that a step reads and writes. Source: the functions `_multi_tensor_*` of
torch.optim, which step parameters on CUDA. Adam: lerp 3, mul 2, addcmul 3, sqrt 2, div 2, add 2, addcdiv 4. AdamW: one
mul more."""


ONE_PASS = {"adam": 7, "adamw": 7}
"""Optimizer -> tensors of a parameter's size that `autopart.kernels.optimizer` reads and writes in a step, without the
weight in another dtype: gradient, parameter and two states are read, all but the gradient written. It allocates
none."""


MASTERS = ("float32", "float64")
"""Dtypes that a master copy may have."""


def widening(precision: str, master: str | None) -> float:
    """Bytes of a number in the master dtype / bytes of a number in `precision`; 1 where there is no master copy."""
    return getattr(torch, master).itemsize / getattr(torch, precision).itemsize if master else 1.0


def step_kernel(
    optimizer: str, precision: str, master: str | None, device: Device, off: Collection[str], offload: bool = False
) -> str:
    """The kernel that makes the optimizer's step in one pass over memory: on a GPU, of states in float32, where it is
    not in `off` and the states are not on the host (`offload`); "" where there is none."""
    taken = (
        not offload
        and optimizer in ONE_PASS
        and (master or precision) == "float32"
        and device.type != "cpu"
        and STEP not in off
    )
    return STEP if taken else ""


def collectives_per_step(zero: int, micro_batches: int) -> tuple[int, int]:
    """All-gathers of a parameter, and reduce-scatters of its gradient, over the data-parallel axis in one step.

    level   all-gathers     reduce-scatters
    0       0               2: an all-reduce takes the time of two
    1       1               1
    2       1               one for each micro-batch
    3       2 for each micro-batch (forward, backward)   one for each micro-batch
    """
    return ((0, 2), (1, 1), (1, micro_batches), (2 * micro_batches, micro_batches))[zero]


def amortization(zero: int, micro_batches: int, stages: int) -> int:
    """The divisor a with which f has seconds / a of the seconds that a stage spends on its parameters in a step.

    m + p - 1 at ZeRO 0 and 1: stages work on their parameters at the same time, and sum(f) + (m - 1) max(f) of p equal
    stages counts f so many times. m from ZeRO 2 on: most of the work is done for every micro-batch.
    """
    return micro_batches + (stages - 1) * (zero < 2)


def shard_groups(mesh: Mesh, tp: int, dp: int, shard_size: int) -> tuple[Group | None, Group | None]:
    """`Training.shard` and `Training.replicas` of dp ranks spaced `tp` apart, with ZeRO divided among `shard_size`
    neighbours of them; 0: among all."""
    if shard_size in (0, dp):
        return None, None
    return mesh.group(tp, shard_size), mesh.group(tp * shard_size, dp // shard_size)


@dataclass(frozen=True)
class Training:
    """A training setting: the state of each parameter, and the cost of its gradient.

    optimizer      one of OPTIMIZER_STATES
    zero           ZeRO level (Rajbhandari et al., arXiv 1910.02054, section 5): what is sharded over the data-parallel
                   axis: 1 optimizer states, 2 gradients too, 3 parameters too
    group          the ranks of the data-parallel axis
    shard          those of them that ZeRO divides among; None: all. Ranks of several such groups have the same shares
    replicas       the ranks that have the same shares: one of every `shard`; None: there are no others
    micro_batches  of a step
    widening       bytes of a number in the master dtype over those of one of a parameter; 1: there is no master copy
    foreach        whether the optimizer steps all parameters at once, as torch.optim does wherever it can: not on CPUs
    kernel         the kernel that makes the step (`step_kernel`), or ""
    offload        whether the optimizer's states and its copy of the parameters lie on the host (`cost.offload`)
    apart          whether the host's memory is apart from the device's: not on CPUs
    prefetch       the most bytes of whole parameters of a position that ranks gather ahead at ZeRO 3; 0: none

    With a master copy, the model computes in the parameters' precision. In the master dtype are the gradients' sums
    over micro-batches and ranks, the optimizer's states, and a copy of every parameter. The optimizer steps the copy,
    and the parameter is written back from it. The copy counts as an optimizer state and is sharded like one. Of a
    parameter of p bytes, m in the master dtype, with k optimizer states, each of d ranks has these bytes:

        level   parameters   gradient   optimizer
        0       p            m          (1 + k) m
        1       p            m          (1 + k) m / d
        2       p            m / d      (1 + k) m / d
        3       m / d        m / d      k m / d

    At level 3 a rank has a slice of the copy, and none in the parameters' precision; whole parameters are gathered in
    their precision while they are used. With bfloat16, float32 and Adam, level 0 is 18 bytes a parameter and level 1 is
    6 + 12 / d, as in Megatron-LM (Megatron Core's guide, "Distributed Optimizer": bf16 parameters, fp32 gradients).
    Level 3 is 16 / d, as in torchtitan's FSDP2 (param_dtype bfloat16, reduce_dtype float32).

    With `shard` d is the number of its ranks.

    With `offload` the column "optimizer" is `host_bytes` on the host, and a parameter takes p / d at level 3: a slice
    of it is in its own dtype.
    """

    optimizer: str
    zero: int
    group: Group
    micro_batches: int
    widening: float = 1.0
    foreach: bool = False
    kernel: str = ""
    offload: bool = False
    apart: bool = True
    prefetch: float = 0.0
    shard: Group | None = None
    replicas: Group | None = None

    @property
    def ranks(self) -> int:
        """Ranks of the data-parallel axis."""
        return self.group.ranks

    @property
    def divided(self) -> Group:
        """The ranks that ZeRO divides among."""
        return self.shard or self.group

    def state_bytes(self, nbytes: float, grad: bool, over_dp: bool) -> tuple[float, float, float]:
        """Bytes on a rank of a parameter of `nbytes`, of its gradient and of its optimizer states (the table above).
        `grad`: whether it is trained.
        `over_dp`: the gradient is a partial sum over the data-parallel axis, so that ZeRO can shard all three."""
        is_slice, master_bytes = grad and self.sliced(over_dp), nbytes * self.widening
        tensors = OPTIMIZER_STATES[self.optimizer] + (self.widening > 1 and not is_slice)
        over = [self.divided.ranks if over_dp and grad and self.zero >= level else 1 for level in (1, 2, 3)]
        parameter = (master_bytes if is_slice and not self.offload else nbytes) / over[2]
        optimizer = master_bytes * grad * tensors / over[0]
        if self.offload:
            optimizer = 0.0 if self.apart else self._on_host(nbytes, grad, over_dp)
        return parameter, master_bytes * grad / over[1], optimizer

    def host_bytes(self, nbytes: float, grad: bool, over_dp: bool) -> float:
        """Bytes on the host, apart from the device's memory, of a parameter of `nbytes`: its copy, gradient and
        states."""
        return self._on_host(nbytes, grad, over_dp) if self.offload and self.apart else 0.0

    def _on_host(self, nbytes: float, grad: bool, over_dp: bool) -> float:
        return host_bytes(nbytes * self.widening * grad / self.slices(over_dp), OPTIMIZER_STATES[self.optimizer])

    def slices(self, over_dp: bool) -> int:
        """Ranks over which the optimizer's step of a parameter is divided."""
        return self.divided.ranks if over_dp and self.zero >= 1 else 1

    def optimizer_workspace(self, nbytes: float, grad: bool, over_dp: bool) -> float:
        """Bytes of temporaries while the optimizer steps a parameter of `nbytes`: STEP_WORKSPACE tensors in the master
        dtype, from ZeRO 1 on of the size of the rank's slice; none where a kernel makes the step, or the host."""
        if self.kernel or (self.offload and (self.apart or self.optimizer in FUSED_ON_HOST)):
            return 0.0
        tensors = STEP_WORKSPACE.get(self.optimizer, (0, 0))[self.foreach]
        return nbytes * self.widening * grad / self.slices(over_dp) * tensors

    def grad_alloc_ratio(self, first: bool) -> float:
        """Bytes that a backward allocates for a parameter's gradient / bytes of the parameter.

        A gradient is made in the parameter's dtype (ratio 1). Where there is a master copy, the gradient is then copied
        to the master dtype (ratio `widening`), and the copy is added to the sum over micro-batches. In the `first`
        backward of a step the copy is that sum: it counts as state, unless ranks keep slices of the sum (ZeRO 2 and 3).
        At ZeRO 3 a slice alone is copied: the ratio is 1.
        """
        level = self.zero if self.ranks > 1 else 0
        if level == 3:
            return 1.0
        counts_as_state = first and level < 2
        return (self.widening > 1) + self.widening * (not counts_as_state)

    def sliced(self, over_dp: bool) -> bool:
        """Whether a rank keeps a slice of a parameter instead of the whole."""
        return self.zero >= 3 and over_dp and self.ranks > 1

    def reduced_bytes(self, nbytes: float, grad: bool, over_dp: bool) -> float:
        """`nbytes` of a parameter whose gradient the ranks reduce, else 0."""
        return nbytes if over_dp and grad and self.ranks > 1 else 0.0

    def pending_grad_bytes(self, nbytes: float, grad: bool, over_dp: bool) -> float:
        """Bytes of the gradient, in the master dtype, of a parameter that several segments read.

        They are alive from the backward of the last of these segments to that of the first: autograd adds the gradient
        to the sum over micro-batches once all segments have contributed. The gradient of a slice is added at once: 0.
        """
        return nbytes * self.widening if grad and self.micro_batches > 1 and not self.sliced(over_dp) else 0.0

    def gathered_bytes(self, nbytes: Any) -> Any:
        """Bytes of whole parameters that a segment of `nbytes` of parameters gathers to compute: all at ZeRO 3, else
        0."""
        return nbytes * (self.zero >= 3)

    def ahead_bytes(self, nbytes: Any) -> Any:
        """Bytes of whole parameters that are gathered ahead for a segment of `nbytes` of parameters: all at ZeRO 3
        where they are at most `prefetch`, else 0."""
        return self.gathered_bytes(nbytes) * (nbytes <= self.prefetch)

    def grad_reduce_workspace(self, nbytes: Any, largest: Any, single: Any) -> Any:
        """Bytes that are alive while ranks reduce the gradients of a segment's parameters at ZeRO 2 and 3, else 0.

        The parameters have `nbytes`, the largest of them `largest`. w is `widening`, s the bytes of the parameters of
        one message, d the number of ranks:

            g nbytes   whole gradients: g = w at ZeRO 2, 1 at ZeRO 3
            + w s      a message; 0 where the segment has a `single` parameter whose gradient has the message's dtype
            + w s / d  the rank's slices of the sums, in which they are all-reduced over `replicas`
        """
        if self.zero < 2:
            return 0.0 * nbytes
        gradient = self.widening if self.zero == 2 else 1.0
        copied = 1.0 - single * (gradient == self.widening)
        message = self.widening * self._in_a_message(nbytes, largest, gradient)
        return gradient * nbytes + message * (copied + 1.0 / self.divided.ranks)

    def end_of_step_workspace(self, nbytes: Any, largest: Any) -> Any:
        """Bytes of a message at the end of a step, for a stage of `nbytes` of parameters, the largest of `largest`.

        ZeRO 0 and 1: a message of gradients, at ZeRO 1 with the rank's slices of the sums. ZeRO 2: a message of new
        parameters, with the rank's slices of these. ZeRO 3: none.
        """
        if self.zero >= 3:
            return 0.0 * nbytes
        message = self._in_a_message(nbytes, largest, self.widening)
        with_slices = 1.0 + (self.zero >= 1) / self.divided.ranks
        return message * with_slices * (self.widening if self.zero < 2 else 1.0)

    def _in_a_message(self, nbytes: Any, largest: Any, ratio: float) -> Any:
        """Bytes of the parameters whose gradients, `ratio` times as large, travel in one message."""
        return np.minimum(nbytes, np.maximum(largest, bucket_bytes(self.group) / ratio))

    def sync_seconds(self, nbytes: Any, over_dp: bool, together: Any = math.inf) -> Any:
        """Seconds of a step to reduce the gradient of a parameter of `nbytes` over the data-parallel axis, and to
        gather the new parameter. Parameters of less than a message share its latency by their bytes.

        together  bytes of all parameters of its segment: from ZeRO 2 on gradients, and at ZeRO 3 parameters, of several
                  segments do not travel in one message

        Gradients are in the master dtype, parameters in their own: with a master copy level 1 takes less than level 0.
        Over `replicas`, a step all-reduces the rank's slice of the gradient once.
        """
        if not over_dp or self.ranks == 1:
            return 0.0
        reduced = self.backwards * self.overlappable_seconds(nbytes, over_dp, together)
        gathers, _ = collectives_per_step(self.zero, self.micro_batches)
        return reduced + gathers * self._gather_seconds(nbytes, together) if gathers else reduced

    def overlappable_seconds(self, nbytes: Any, over_dp: bool, together: Any = math.inf) -> Any:
        """The part of `sync_seconds` that may overlap with one of `backwards`: the reduction of the gradient. That over
        `replicas` is one of a step and may overlap with the last (`crossing_seconds`): on average it counts here."""
        if not over_dp or self.ranks == 1:
            return 0.0
        name = "all_reduce" if self.zero == 0 else "reduce_scatter"
        message = self._gradient_message(together)
        within = message_seconds(nbytes * self.widening, self.divided, name, message)
        return within + self.crossing_seconds(nbytes, over_dp, together) / self.backwards

    def crossing_seconds(self, nbytes: Any, over_dp: bool, together: Any = math.inf) -> Any:
        """Seconds of a step to all-reduce a rank's slice of a gradient over `replicas`, with the other slices that a
        message of gradients left."""
        if not over_dp or self.replicas is None:
            return 0.0
        mine, message = (
            each / self.divided.ranks for each in (nbytes * self.widening, self._gradient_message(together))
        )
        return message_seconds(mine, self.replicas, "all_reduce", message)

    def _gradient_message(self, together: Any) -> Any:
        """Bytes of a message of gradients. At ZeRO 3 these fill messages in the parameters' dtype, and travel in the
        master dtype."""
        full = bucket_bytes(self.group) * (self.widening if self.zero >= 3 else 1.0)
        return np.minimum(full, together * self.widening) if self.zero >= 2 else full

    def gather_seconds(self, nbytes: Any, over_dp: bool, together: Any = math.inf) -> Any:
        """The part of `sync_seconds` that may overlap with a forward, and again with a backward: one all-gather of a
        parameter at ZeRO 3, where parameters are gathered ahead; else 0."""
        return self._gather_seconds(nbytes, together) if self.sliced(over_dp) and self.prefetch else 0.0

    def _gather_seconds(self, nbytes: Any, together: Any) -> Any:
        """Seconds of one all-gather of a parameter. Below ZeRO 3 slices fill messages in the master dtype."""
        full = bucket_bytes(self.group)
        message = np.minimum(full, together) if self.zero >= 3 else full / self.widening
        return message_seconds(nbytes, self.divided, "all_gather", message)

    def step_bytes(self, nbytes: float, over_dp: bool) -> float:
        """Bytes that the optimizer's step of a trained parameter of `nbytes` moves: STEP_PASSES or ONE_PASS tensors in
        the master dtype; and the parameter that is written back from a master copy, which is read again unless the
        kernel of ONE_PASS has it whole. From ZeRO 1 on a rank steps its slice."""
        master_bytes, slices = nbytes * self.widening, self.slices(over_dp)
        passes = (ONE_PASS if self.kernel else STEP_PASSES)[self.optimizer] * master_bytes
        if self.widening == 1 or self.sliced(over_dp):
            return passes / slices
        return (passes + nbytes + master_bytes * (not self.kernel or slices > 1)) / slices

    @property
    def backwards(self) -> int:
        """The number of backwards of a step that gradient sync may overlap with: the last; from ZeRO 2 on, all."""
        return self.micro_batches if self.zero >= 2 else 1

    def partial_sync_seconds(self, nbytes: float, over_dp: bool, group: Group) -> float:
        """Seconds of a step to all-reduce the gradient of a parameter of `nbytes` that is a partial sum over another
        axis, of ranks `group`: from ZeRO 1 on that of the rank's slice."""
        nbytes *= self.widening / self.slices(over_dp)
        return float(message_seconds(nbytes, group, "all_reduce", bucket_bytes(group)))
