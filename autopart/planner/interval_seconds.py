"""The seconds of an interval that are not a sum over its positions: messages between stages, exposed gradient sync."""

from collections.abc import Iterable, Sequence

import numpy as np

from autopart.cost.compute import Array
from autopart.cost.intervals import contains_any, interval_ends, interval_maxima
from autopart.cost.position_costs import Crossings


def exposed(overlappable: Array, backward: Array) -> Array:
    """[intervals]: seconds from the end of an interval's backward to the end of its gradient sync.

    Backward runs from the last position to the first. Gradients of position p are sent for overlappable[p] seconds,
    once the backward of p has ended and the gradients of later positions are sent:

        exposed(i, j) = max over p in [i, j) of  sum of overlappable over [i, p]  -  sum of backward over [i, p)

    Seconds of recomputation are not part of `backward`. `overlappable` is `Device.overlapped_share` x the seconds of
    the messages; the other seconds of a message slow computation down, overlapped or not. Not modelled: the runtime
    sends a message when it is full, so that the last message may have gradients of several positions."""
    starts, _ = interval_ends(len(overlappable))
    if not overlappable.any():
        return np.zeros(len(starts))
    sync, computed = (np.concatenate([[0.0], np.cumsum(each)]) for each in (overlappable, backward))
    return interval_maxima(sync[1:] - computed[:-1]) - (sync - computed)[starts]


def exposed_by_clock(overlappable: Sequence[float], backward: Sequence[float]) -> float:
    """`exposed` of one interval, simulated."""
    now = arrived = 0.0
    for travels, takes in zip(reversed(overlappable), reversed(backward), strict=True):
        now += takes
        arrived = max(arrived, now) + travels
    return arrived - now


def crossed(crossings: Iterable[Crossings], n: int) -> tuple[Array, Array, Array]:
    """Three arrays [intervals], of n positions: seconds to send the values that an interval receives or sends; bytes of
    the values that it receives; bytes of the received values that none of its positions saves."""
    starts, ends = interval_ends(n)
    (seconds, received, unsaved), adjacent = np.zeros((3, len(starts))), np.zeros((3, n + 1))
    for values in crossings:
        near = (values.consumers == values.producers + 1) & (not values.one)
        for row, amount in zip(adjacent, (values.seconds, values.size, values.size * ~values.saves[near]), strict=True):
            np.add.at(row, values.consumers[near], amount)
        far = np.flatnonzero(~near)
        for where in [far] if values.one else far[:, None]:
            producer, consumers = int(values.producers[where[0]]), values.consumers[where].tolist()
            taken = contains_any(consumers, n) & (starts > producer)
            given = (starts <= producer) & (producer < ends) & (ends <= max(consumers))
            seconds += (taken.astype(float) + given) * values.seconds
            received += taken * values.size
            unsaved += (taken & ~contains_any(values.consumers[where][values.saves[where]].tolist(), n)) * values.size
    before = adjacent[:, starts]
    return seconds + before[0] + adjacent[0, ends], received + before[1], unsaved + before[2]
