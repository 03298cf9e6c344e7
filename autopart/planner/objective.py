"""The objective of the ILP at one search point: what every priced variable costs, in seconds and in bytes.

Variables are those of `passes.formulate`: strategies of nodes, reshardings, saved tensors. With u the memory multiplier
in seconds per byte, n the micro-batches in flight on the first stage, and m those of a step, the objective is

    sum over variables x of  count x (seconds + u (saved + state / n))  +  exposed gradient sync

count    how many positions of the model pay for the variable (`Model.counts`)
seconds  of one micro-batch: forward + backward + recompute + gradient sync and optimizer / amortization
saved    bytes that one micro-batch keeps for backward
state    bytes of parameters, gradients and optimizer states; where all m are in flight at once, gradients are left out:
         when most is saved there are none
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopart.cost.compute import Array
from autopart.cost.prices import Prices
from autopart.planner.ilp_model import Model


@dataclass(frozen=True)
class Costs:
    """By priced variable, for all positions of the model: seconds of a micro-batch without the gradient sync that
    backward can hide, bytes of state, bytes saved."""

    seconds: Array
    state: Array
    saved: Array


def costs_by_mode(model: Model, prices: Prices, amortization: int, gradients: bool) -> tuple[Costs, ...]:
    """The costs if all blocks did as "none", as "selective" and as "full"; `gradients` are part of the state or not."""
    no_reshards, no_saved = 0.0 * prices.change_forward, 0.0 * prices.saved_tensor_bytes
    seconds = np.concatenate([
        prices.forward + prices.backward + prices.sync_seconds / amortization,
        prices.change_forward + prices.change_backward,
        no_saved,
    ])  # fmt: skip
    selective = np.concatenate([prices.forward - prices.product, prices.change_rerun, no_saved])
    full = np.concatenate([prices.forward, prices.change_rerun, no_saved])
    saved = np.concatenate([prices.inner, no_reshards, prices.saved_tensor_bytes])
    products = np.concatenate([prices.product_results, no_reshards, no_saved])
    state = prices.state if gradients else prices.state - prices.state_bytes[:, 1]
    state = np.concatenate([state, no_reshards, no_saved]) * model.counts
    return tuple(
        Costs((seconds + recompute) * model.counts, state, by_mode * model.counts)
        for recompute, by_mode in ((0.0, saved), (selective, products), (full, 0.0 * saved))
    )


def sync_windows(prices: Prices, share: float) -> tuple[Array, Array]:
    """By priced variable, for one position: seconds that its gradients travel and that computing can hide, and seconds
    of its backward, which can hide others' (see `interval_seconds.exposed`). Both times `share`, the backwards of a
    step over its amortization."""
    none = np.zeros(len(prices.saved_tensor_bytes))
    hidden = np.concatenate([prices.overlappable_seconds, 0.0 * prices.change_backward, none])
    return share * hidden, share * np.concatenate([prices.backward, prices.change_backward, none])


def exposed_sync_bounds(model: Model, hidden: Array, backward: Array) -> tuple[Array, Array]:
    """Two lower bounds on the seconds of gradient sync after the end of backward, by priced variable; both with the
    gradients that several positions add to, which nothing hides.

        first: what the first position sends
        whole: all that is sent, less the backward of all positions but the last

    Positions of the model's first and last class count only if no other is of their class, so that no interval pays for
    one that it has not.
    """
    classes, alone = model.table.segment_classes, model.counts_alone.sum(0)
    is_first, is_last = (classes.count(classes[end]) == 1 for end in (0, -1))
    first = hidden * (model.counts - alone + is_first * model.counts_alone[0])
    return first, hidden * model.counts - backward * (alone - is_last * model.counts_alone[-1])
