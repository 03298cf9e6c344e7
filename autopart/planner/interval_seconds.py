"""The seconds of an interval that are no sum over its positions: messages between stages, exposed sync of weights."""

from collections.abc import Iterable, Sequence

import numpy as np

from autopart.cost.compute import Array
from autopart.cost.intervals import contains_any, interval_ends, interval_index, interval_maxima
from autopart.cost.position_costs import Crossings, PositionCosts


def exposed(overlappable: Array, backward: Array, forward: Array, gather: Array) -> Array:
    """[intervals]: seconds of the gradient sync and of the gathers of parameters that computing does not hide, of a
    forward and a backward of the interval.

    Backward runs from the last position to the first. Gradients of position p are sent for overlappable[p] seconds,
    once the backward of p has ended and the gradients of later positions are sent:

        scatters(i, j) = max over p in [i, j) of  sum of overlappable over [i, p]  -  sum of room over [i, p)

    Parameters of p are gathered for gather[p] seconds while the position computes that computes before p; those of the
    first are waited for:

        gathers(i, j) = gather[i] + sum over p in [i + 1, j) of max(0, gather[p] - forward[p - 1])
                        + gather[j - 1] + sum over p in [i, j - 1) of max(0, gather[p] - backward[p + 1])

    Messages share the links: room[p] = backward[p] less the gather that it hides, max(0, backward[p] - gather[p - 1]);
    room[i] = backward[i].

    Seconds of recomputation are not part of `backward`. `overlappable` and `gather` are `Device.overlapped_share` x the
    seconds of the messages; the other seconds of a message slow computation down, overlapped or not. Not modelled: the
    runtime sends a message when it is full, so that the last message may have gradients of several positions."""
    n = len(overlappable)
    starts, ends = interval_ends(n)
    found = np.zeros(len(starts))
    if overlappable.any():
        room = np.maximum(0.0, backward - np.concatenate([[0.0], gather[:-1]]))
        sync, computed = (np.concatenate([[0.0], np.cumsum(each)]) for each in (overlappable, room))
        found, several = overlappable[starts], ends > starts + 1
        later = interval_maxima(sync[1:] - computed[:-1])[interval_index(starts + 1, ends, n)[several]]
        first = starts[several]
        later -= (sync - computed)[first] + (backward - room)[first]
        found[several] = np.maximum(found[several], later)
    if gather.any():
        late = (
            np.maximum(0.0, gather[1:] - forward[:-1]),
            np.maximum(0.0, gather[:-1] - backward[1:]),
        )
        total = np.concatenate([[0.0], np.cumsum(sum(late))])
        found = found + gather[starts] + gather[ends - 1] + total[ends - 1] - total[starts]
    return found


def exposed_in_step(costs: PositionCosts) -> Array:
    """[intervals]: `exposed` seconds of all forwards and backwards of a step that may hide messages. The last backward
    has the messages of a step that others have not."""
    each, count = costs.overlappable_seconds, costs.training.backwards
    computing = costs.backward, costs.forward, costs.gather_seconds
    if not costs.crossing_seconds.any():
        return count * exposed(each, *computing)
    others = each - costs.crossing_seconds / count
    last = exposed(others + costs.crossing_seconds, *computing)
    return last + (count - 1) * exposed(others, *computing) if count > 1 else last


def exposed_by_clock(
    overlappable: Sequence[float], backward: Sequence[float], forward: Sequence[float], gather: Sequence[float]
) -> float:
    """`exposed` of one interval, simulated: between its start and its end messages have the links one after the other,
    gathers first."""
    last = len(forward) - 1
    late, waiting = gather[0] + gather[last], 0.0
    for p in range(last):
        late += max(0.0, gather[p + 1] - forward[p])
    for p in range(last, -1, -1):
        coming = gather[p - 1] if p else 0.0
        takes = max(backward[p], coming)
        late += takes - backward[p]
        waiting = max(0.0, waiting - (takes - coming)) + overlappable[p]
    return late + waiting


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
