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


@dataclass(frozen=True)
class SyncWindows:
    """[variables], for one position, in seconds for each turn of the pipeline (see `interval_seconds.exposed`).

    scatter            gradient sync that a backward can hide
    gather             gathers of parameters that a forward can hide, and again a backward
    backward, forward  seconds that hide them
    """

    scatter: Array
    gather: Array
    backward: Array
    forward: Array


def sync_windows(prices: Prices, per_turn: float) -> SyncWindows:
    """The windows. `per_turn` is `Training.backwards` / amortization: backwards that hide sync, per turn of the
    pipeline."""
    reshards, none = 0.0 * prices.reshard_backward, np.zeros(len(prices.saved_tensor_bytes))
    return SyncWindows(
        per_turn * np.concatenate([prices.overlappable_seconds, reshards, none]),
        per_turn * np.concatenate([prices.gather_seconds, reshards, none]),
        per_turn * np.concatenate([prices.backward, prices.reshard_backward, none]),
        per_turn * np.concatenate([prices.forward, prices.reshard_forward, none]),
    )


def exposed_sync_bounds(model: Model, windows: SyncWindows) -> tuple[Array, list[Array]]:
    """[variables]: a lower bound on the exposed sync, in seconds, linear in the variables, and what may be added to it:
    each of the others with any weight in [0, 1].

        first  sync of the first position, and gathers of the first (forward) and of the last (backward)
        whole  backward: sync and gathers of all positions - backward of all positions but the last
               forward: gathers of all positions - forward of all positions

    Where there are gathers, the backward of the last position hides the gather of the position before, and counts. No
    computing hides messages of parameters that several positions read: all bounds count them in full. A variable stands
    for all positions of a segment class: the model's first or last position is told apart only if it is the one
    position of its class.
    """
    scatter, gather = windows.scatter, windows.gather
    classes, alone = model.table.segment_classes, model.counts_alone.sum(0)
    at_first, at_last = (model.counts_alone[end] * (classes.count(classes[end]) == 1) for end in (0, -1))
    shared = model.counts - alone
    last = 0.0 * at_last if gather.any() else at_last
    backward = (scatter + gather) * model.counts - windows.backward * (alone - last)
    first = (scatter + gather) * shared + scatter * at_first
    if not gather.any():
        return first, [backward - first]
    backward_first = first + gather * at_last
    forward, forward_first = gather * model.counts - windows.forward * alone, gather * (shared + at_first)
    return backward_first + forward_first, [backward - backward_first, forward - forward_first]
