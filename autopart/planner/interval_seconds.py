"""Seconds by interval of positions that are no sum over positions: messages between stages, exposed gradient sync."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from autopart.cost.compute import Array
from autopart.cost.intervals import contains_any, interval_ends, interval_maxima
from autopart.cost.position_costs import Crossings


def exposed(overlappable: Array, backward: Array) -> Array:
    """[intervals]: seconds for which gradients still travel when the backward of an interval has ended.

    The backward goes from the last position to the first. When the backward of p ends, its gradients start to travel
    for overlappable[p] seconds, behind those of later positions:

        exposed(i, j) = max over p in [i, j) of  sum of overlappable over [i, p]  -  sum of backward over [i, p)

    Seconds of recomputation do not count as backward. `overlappable` is `Device.overlapped_share` times the seconds of
    the messages; the rest of these seconds slows computation down and is paid in any case. The runtime sends a message
    when it is full, so that the last message may hold more than one position's gradients.
    """
    starts, _ = interval_ends(len(overlappable))
    if not overlappable.any():
        return np.zeros(len(starts))
    sent, done = (np.concatenate([[0.0], np.cumsum(each)]) for each in (overlappable, backward))
    return interval_maxima(sent[1:] - done[:-1]) - (sent - done)[starts]


def exposed_by_clock(overlappable: Sequence[float], backward: Sequence[float]) -> float:
    """`exposed` of one interval, simulated."""
    now = arrived = 0.0
    for travels, takes in zip(reversed(overlappable), reversed(backward), strict=True):
        now += takes
        arrived = max(arrived, now) + travels
    return arrived - now


def crossed(crossings: Iterable[Crossings], n: int) -> tuple[Array, Array, Array]:
    """[intervals] of n positions, three times: seconds of the messages of values that an interval receives and sends;
    bytes of values that it receives; bytes of those among them that none of its positions saves."""
    starts, ends = interval_ends(n)
    (seconds, received, held), adjacent = np.zeros((3, len(starts))), np.zeros((3, n + 1))
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
            held += (taken & ~contains_any(values.consumers[where][values.saves[where]].tolist(), n)) * values.size
    before = adjacent[:, starts]
    return seconds + before[0] + adjacent[0, ends], received + before[1], held + before[2]
