"""Sizes -> prices: seconds and bytes of every strategy, every reshard and every saved tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from autopart.cost.compute import Array, Seconds, beside_product_seconds, peaks, stream_seconds, work_in, work_seconds
from autopart.cost.resharding import row_seconds
from autopart.cost.sizes import Sizes
from autopart.cost.slowest import of_slowest
from autopart.cost.training_state import Training
from autopart.cost.update_seconds import update_seconds
from autopart.hardware.mesh import Group
from autopart.hardware.rows import Device

PRODUCT_DIMS = slice(3, 7)
"""Columns of `Sizes.rest`: batch, m, n and k of a matrix product."""


@dataclass(frozen=True)
class Terms:
    """What prices depend on besides the table.

    sizes     axis -> its group of ranks;  scale: samples of the micro-batch / samples traced
    """

    device: Device
    sizes: Mapping[str, Group]
    scale: float
    training: Training

    @property
    def basis(self) -> Array:
        """(1, 1 / d, s, s / d) for d data-parallel ranks and s = `scale`: the terms of `cost.sizes`."""
        dp = self.sizes["dp"].ranks if "dp" in self.sizes else 1
        return np.array([1.0, 1.0 / dp, self.scale, self.scale / dp])


def _part(name: str, place: Any) -> Any:
    """A property: the part at a place of the array `name`."""
    return property(lambda self: getattr(self, name)[place])


class Prices:
    """Seconds and bytes of everything in a table, for one data-parallel degree, micro-batch and training setting: of
    every strategy, of every reshard, of every saved tensor.

    forward, backward     [strategies]: seconds
    reshard_forward, reshard_backward, reshard_recompute
                          [reshards]: seconds; the last, seconds that a reshard adds where it runs again for backward
    largest_gradient      [strategies]: bytes;  backward_bytes: [2, strategies], bytes of the gradients that one
                          operator's backward holds, in the first backward of a step and in others
    inner                 [strategies]: bytes that an operator saves for backward besides values
    saved_tensor_bytes    [saved tensors]: bytes per micro-batch
    saved_results         [MODES, strategies]: bytes of the results that a checkpointing mode saves, and of what
                          operators that do not run again save besides values
    reshard_bytes         [reshards]: bytes of the value after the reshard
    state_bytes           [strategies, 3]: bytes of a parameter, its gradient, its optimizer states;  state: their sum
    sync_seconds          [strategies]: seconds of a step to reduce a gradient, to gather its parameter and to update
                          it that computation cannot hide;  overlappable_seconds: to reduce it that computation can
                          hide, in each of `Training.backwards` on average;  crossing_seconds: the part of a step's
                          that the last of these alone can hide;  gather_seconds: to gather it ahead that computation
                          can hide, in each forward and in each backward
    reduced_bytes         [strategies]: bytes of a parameter whose gradient ranks reduce
    optimizer_workspace, pending_grad_bytes, host_bytes  [strategies]: as in `Training`
    """

    def __init__(self, sizes: Sizes, terms: Terms) -> None:
        self.sizes, self.terms = sizes, terms
        basis, device = terms.basis, terms.device
        self.output_bytes, self.inner = sizes.output_bytes @ basis, sizes.times * (sizes.inner @ basis)
        self.largest_gradient = sizes.largest_gradient @ basis
        seconds = self._computed(sizes, basis, device)
        ranks = {axis: group.ranks for axis, group in terms.sizes.items()}
        divided = sizes.means @ [ranks.get("dp", 1) > 1, ranks.get("tp", 1) > 1]
        mean = stream_seconds(2 * self.output_bytes, sizes.grad, np.minimum(divided, 1.0), device)
        streamed = beside_product_seconds((sizes.streamed @ basis).T, sizes.grad, device)
        self.forward = sizes.times * (seconds.forward + mean.forward + streamed.forward)
        self.backward = sizes.times * (seconds.backward + mean.backward + streamed.backward)

    @cached_property
    def backward_bytes(self) -> Array:
        ratio = self.terms.training.grad_alloc_ratio
        activations, weights = self.sizes.backward @ self.terms.basis, self.sizes.weights @ self.terms.basis
        return np.array([activations + ratio(first) * weights for first in (True, False)])

    @cached_property
    def saved_results(self) -> Array:
        return self.sizes.saved * self.sizes.times * self.output_bytes + (1.0 - self.sizes.rerun) * self.inner

    @cached_property
    def saved_tensor_bytes(self) -> Array:
        return self.sizes.saved_tensor_bytes @ self.terms.basis

    @cached_property
    def reshard_bytes(self) -> Array:
        """[reshards]: bytes of the value after the reshard."""
        return self.sizes.reshard_bytes @ self.terms.basis

    @cached_property
    def reshard_seconds(self) -> Array:
        """[3, reshards]: seconds forward, seconds backward, and seconds that recomputing the segment adds. A reshard
        that regathers runs its forward collective in backward anyway: recomputing adds 0."""
        nbytes = self.sizes.collective_bytes @ self.terms.basis
        found = np.zeros((3, len(nbytes)))
        for (axis, row, grad), where in self.sizes.reshard_groups.items():
            group = self.terms.sizes[axis]
            if group.ranks > 1:
                forward, backward = row_seconds(row, nbytes[where], group, grad, self.terms.device)
                found[:, where] = forward, backward, 0.0 * forward if row.regathers else forward
        return found * self.sizes.reshard_times

    reshard_forward, reshard_backward, reshard_recompute = (_part("reshard_seconds", row) for row in range(3))

    @cached_property
    def _parameter_costs(self) -> Array:
        """[strategies, 11]: of a parameter `state_bytes`, `sync_seconds`, `reduced_bytes`, `optimizer_workspace`,
        `overlappable_seconds`, `pending_grad_bytes`, `host_bytes`, `gather_seconds` and `crossing_seconds`."""
        return np.array([self._parameter_cost(*row) for row in self.sizes.parameters.tolist()])[self.sizes.parameter_of]

    def _parameter_cost(
        self, weight: float, grad: bool, over_dp: bool, over_tp: bool, together: float
    ) -> tuple[float, ...]:
        training = self.terms.training
        if not weight:
            return (0.0,) * 11
        share = self.terms.device.overlapped_share
        overlappable = share * training.overlappable_seconds(weight, over_dp, together)
        gather = share * training.gather_seconds(weight, over_dp, together)
        crossing = share * training.crossing_seconds(weight, over_dp, together)
        sync = training.sync_seconds(weight, over_dp, together) - training.backwards * (overlappable + 2 * gather)
        sync += update_seconds(weight, grad, over_dp, training, self.terms.device)
        if over_tp:
            sync += training.partial_sync_seconds(weight, over_dp, self.terms.sizes["tp"])
        reduced, workspace, pending, on_host = (
            each(weight, bool(grad), over_dp)
            for each in (
                training.reduced_bytes, training.optimizer_workspace, training.pending_grad_bytes, training.host_bytes
            )
        )  # fmt: skip
        state = training.state_bytes(weight, grad, over_dp)
        return (*state, sync, reduced, workspace, overlappable, pending, on_host, gather, crossing)

    @property
    def state_bytes(self) -> Array:
        """[strategies, 3]: bytes of a parameter, its gradient, its optimizer states."""
        return self._parameter_costs[:, :3]

    @cached_property
    def state(self) -> Array:
        return self.state_bytes.sum(1)

    (
        sync_seconds,
        reduced_bytes,
        optimizer_workspace,
        overlappable_seconds,
        pending_grad_bytes,
        host_bytes,
        gather_seconds,
        crossing_seconds,
    ) = (_part("_parameter_costs", np.s_[:, column]) for column in range(3, 11))

    @staticmethod
    @of_slowest
    def _computed(sizes: Sizes, basis: Array, device: Device) -> Seconds:
        """What the operators take under every strategy."""
        rest = sizes.rest.copy()
        rest[:, PRODUCT_DIMS] *= basis[sizes.factors]
        rows = np.column_stack(
            [sizes.flops @ basis, sizes.moved @ basis, peaks(device)[sizes.peak_dtype.astype(int)], rest]
        )
        found = work_seconds(work_in(rows), device)
        return Seconds(found.forward[sizes.which], found.backward[sizes.which])
