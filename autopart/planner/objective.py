"""The objective of the ILP at one search point: the cost of every priced variable, in seconds and in bytes.

Priced variables are those of `passes.ilp`: strategies, reshards, saved tensors. With lambda the memory multiplier in
seconds per byte and in_flight the micro-batches in flight in the first stage, the objective is

    sum over variables x of  n x (seconds + lambda (saved + state / in_flight))  +  exposed gradient sync

n        positions of the model that pay for the variable (`Model.counts`)
seconds  of a micro-batch: forward + backward + recompute + (gradient sync + optimizer) / amortization
saved    bytes that one micro-batch saves for backward
state    bytes of parameters, gradients and optimizer states. Where all micro-batches of a step are in flight at once,
         without gradients: no gradient is allocated when most activations are alive
"""

from dataclasses import dataclass

import numpy as np

from autopart.cost.compute import Array
from autopart.cost.prices import Prices
from autopart.planner.ilp_model import Model


@dataclass(frozen=True)
class Costs:
    """The terms of the objective, times n. All are [variables]; `seconds` are without the gradient sync that backward
    can hide."""

    seconds: Array
    state: Array
    saved: Array


def costs_by_mode(model: Model, prices: Prices, amortization: int, gradients: bool) -> tuple[Costs, ...]:
    """The costs with all blocks in each of `liveness.MODES`. `gradients`: whether the state counts gradients."""
    no_reshards, no_saved = 0.0 * prices.reshard_forward, 0.0 * prices.saved_tensor_bytes
    seconds = np.concatenate([
        prices.forward + prices.backward + prices.sync_seconds / amortization,
        prices.reshard_forward + prices.reshard_backward,
        no_saved,
    ])  # fmt: skip
    state = prices.state if gradients else prices.state - prices.state_bytes[:, 1]
    state = np.concatenate([state, no_reshards, no_saved]) * model.counts
    found = []
    for mode, results in enumerate(prices.saved_results):
        sizes, tensors = prices.sizes, no_saved if mode else prices.saved_tensor_bytes
        reshards = sizes.reshards_rerun[mode] * prices.reshard_recompute
        recompute = np.concatenate([sizes.rerun[mode] * prices.forward, reshards, no_saved])
        saved = np.concatenate([results, no_reshards, tensors])
        found.append(Costs((seconds + recompute) * model.counts, state, saved * model.counts))
    return tuple(found)


def sync_windows(prices: Prices, per_turn: float) -> tuple[Array, Array]:
    """[variables], for one position: `per_turn` x seconds of gradient sync that a backward can hide; `per_turn` x
    seconds of backward, which hides the sync of later positions (`interval_seconds.exposed`).

    per_turn  `Training.backwards` / amortization: backwards that hide gradient sync, per turn of the pipeline
    """
    none = np.zeros(len(prices.saved_tensor_bytes))
    hidden = np.concatenate([prices.overlappable_seconds, 0.0 * prices.reshard_backward, none])
    return per_turn * hidden, per_turn * np.concatenate([prices.backward, prices.reshard_backward, none])


def exposed_sync_bounds(model: Model, hidden: Array, backward: Array) -> tuple[Array, Array]:
    """[variables]: two lower bounds on the exposed gradient sync, in seconds, linear in the variables:

        first  sync of the first position
        whole  sync of all positions - backward of all positions but the last

    No backward hides the sync of parameters that several positions read: both bounds count it in full. A variable
    stands for all positions of a segment class: the model's first or last position is told apart only if it is the one
    position of its class.
    """
    classes, alone = model.table.segment_classes, model.counts_alone.sum(0)
    is_first, is_last = (classes.count(classes[end]) == 1 for end in (0, -1))
    first = hidden * (model.counts - alone + is_first * model.counts_alone[0])
    return first, hidden * model.counts - backward * (alone - is_last * model.counts_alone[-1])
