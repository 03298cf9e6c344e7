"""Sizes -> prices: seconds and bytes of every strategy, every change of placement and every kept memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from autopart.cost.compute import Array, Seconds, stream_seconds, work_in, work_seconds
from autopart.cost.resharding import row_seconds
from autopart.cost.sizes import Sizes
from autopart.cost.training_state import Training, update_seconds
from autopart.hardware.mesh import Group
from autopart.hardware.rows import Device

FOUR = slice(3, 7)
"""Where `Sizes.rest` has batch, m, n and k."""


@dataclass(frozen=True)
class Terms:
    """What prices depend on besides the table.

    sizes     the ranks of every axis;  scale: samples of the micro-batch over those traced
    """

    device: Device
    sizes: Mapping[str, Group]
    scale: float
    training: Training

    @property
    def basis(self) -> Array:
        """What the four numbers of a size are multiplied by."""
        dp = self.sizes["dp"].ranks if "dp" in self.sizes else 1
        return np.array([1.0, 1.0 / dp, self.scale, self.scale / dp])


class Prices:
    """Seconds and bytes of everything in a table, for one data-parallel degree, micro-batch and way to train.

    forward, backward  seconds of every strategy and (`change_...`) every change of placement;  change_rerun: that a
                       change adds where its run is run again
    largest, in_backward  bytes of every strategy's largest gradient; that exist in its backward besides what is kept,
                       in the first of a step and in others
    inner, memory      bytes kept per micro-batch: a strategy's own, and every kept memory
    results            bytes of what matrix products give, with what they keep
    state, sync        bytes of a parameter with gradient and optimizer states; seconds a step takes to sum its gradient
                       and to update it that nothing hides
    beside             seconds of the sum of its gradient that computing beside it can hide, in each of so many
                       backwards: `Training.backwards`
    summed             bytes of a parameter whose gradient ranks sum
    stepping, waiting  bytes that the optimizer makes while it steps a parameter; of its gradient if it is shared
    """

    def __init__(self, sizes: Sizes, terms: Terms) -> None:
        self.sizes, self.terms = sizes, terms
        basis, device = terms.basis, terms.device
        self.made, self.largest, self.inner = sizes.made @ basis, sizes.largest @ basis, sizes.inner @ basis
        seconds = self._computed(sizes, basis, device)
        ranks = {axis: group.ranks for axis, group in terms.sizes.items()}
        divided = sizes.means @ [ranks.get("dp", 1) > 1, ranks.get("tp", 1) > 1]
        mean = stream_seconds(2 * self.made, sizes.grad, np.minimum(divided, 1.0), device)
        self.forward, self.backward = seconds.forward + mean.forward, seconds.backward + mean.backward
        self.product = sizes.product * seconds.forward

    @cached_property
    def in_backward(self) -> Array:
        anew = self.terms.training.anew
        activations, weights = self.sizes.backward @ self.terms.basis, self.sizes.weights @ self.terms.basis
        return np.array([activations + anew(first) * weights for first in (True, False)])

    @cached_property
    def results(self) -> Array:
        return self.sizes.product * (self.made + self.inner)

    @cached_property
    def memory(self) -> Array:
        return self.sizes.memory @ self.terms.basis

    @cached_property
    def after(self) -> Array:
        """Bytes that every change of placement makes."""
        return self.sizes.after @ self.terms.basis

    @cached_property
    def changes(self) -> Array:
        """[3, changes]: seconds forward, backward, and added where they are run again, which does what a change that
        gathers again does anyway."""
        nbytes = self.sizes.whole @ self.terms.basis
        found = np.zeros((3, len(nbytes)))
        for (axis, row, grad), where in self.sizes.kinds.items():
            group = self.terms.sizes[axis]
            if group.ranks > 1:
                forward, backward = row_seconds(row, nbytes[where], group, grad, self.terms.device)
                found[:, where] = forward, backward, 0.0 * forward if row.again else forward
        return found

    @property
    def change_forward(self) -> Array:
        return self.changes[0]

    @property
    def change_backward(self) -> Array:
        return self.changes[1]

    @property
    def change_rerun(self) -> Array:
        return self.changes[2]

    @cached_property
    def _holdings(self) -> Array:
        """[strategies, 8]: of a parameter its `parts`, `sync`, `summed`, `stepping`, `beside` and `waiting`."""
        return np.array([self._holding(*row) for row in self.sizes.holdings.tolist()])[self.sizes.holds]

    def _holding(self, weight: float, grad: bool, over_dp: bool, over_tp: bool) -> tuple[float, ...]:
        training = self.terms.training
        if not weight:
            return (0.0,) * 8
        beside = self.terms.device.overlapped_share * training.beside_seconds(weight, over_dp)
        sync = training.sync_seconds(weight, over_dp) - training.backwards * beside
        sync += update_seconds(weight, grad, over_dp, training, self.terms.device)
        if over_tp:
            sync += training.partial_sync_seconds(weight, self.terms.sizes["tp"])
        summed, stepping, waiting = (
            each(weight, bool(grad), over_dp) for each in (training.summed, training.stepping, training.waiting)
        )
        return (*training.memory(weight, grad, over_dp), sync, summed, stepping, beside, waiting)

    @property
    def parts(self) -> Array:
        """[strategies, 3]: bytes of a parameter, its gradient, its optimizer states."""
        return self._holdings[:, :3]

    @cached_property
    def state(self) -> Array:
        return self.parts.sum(1)

    @property
    def sync(self) -> Array:
        return self._holdings[:, 3]

    @property
    def summed(self) -> Array:
        return self._holdings[:, 4]

    @property
    def stepping(self) -> Array:
        return self._holdings[:, 5]

    @property
    def beside(self) -> Array:
        return self._holdings[:, 6]

    @property
    def waiting(self) -> Array:
        return self._holdings[:, 7]

    @staticmethod
    def _computed(sizes: Sizes, basis: Array, device: Device) -> Seconds:
        """What the operators take under every strategy."""
        rest = sizes.rest.copy()
        rest[:, FOUR] *= basis[sizes.factors]
        rows = np.column_stack([sizes.flops @ basis, sizes.moved @ basis, sizes.peak, rest])
        found = work_seconds(work_in(rows), device)
        return Seconds(found.forward[sizes.which], found.backward[sizes.which])
