"""A step of many pipelines side by side, which run the same instructions for different seconds."""

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from autopart.plan.schedules.ops import IN_FLIGHT_CHANGE, RECEIVE_OF, SEND_OF, Channel, Instruction, Op, channel
from autopart.plan.schedules.verify import in_causal_order

Array = NDArray[np.float64]


def last_backward_ends(
    lists: Sequence[Sequence[Instruction]],
    seconds: Callable[[Instruction], Array],
    groups: Sequence[int],
    ties: Collection[tuple[int, Op]] = (),
) -> Array:
    """[stages, groups]: when the last backward of every stage ends in the last pipeline of a group, in seconds from the
    start.

    lists    of every stage, verified
    seconds  [pipelines] of a FORWARD or a BACKWARD, and the latency of the message of a SEND or a SEND_GRAD; it is
             asked once for each, in causal order
    groups   numbers of neighbouring pipelines that form a group
    ties     (stage, FORWARD or BACKWARD): the pipelines of a group end such a computation together

    One pipeline ends as in `autopart.plan.schedules.simulate.simulate`, before REDUCE and STEP.
    """
    starts = np.concatenate([[0], np.cumsum(groups)[:-1]])
    clock = np.zeros((len(lists), sum(groups)))
    arrivals: defaultdict[Channel, deque[Array]] = defaultdict(deque)
    for entry in in_causal_order(lists):
        now = clock[entry.stage]
        if entry.op in RECEIVE_OF:
            arrivals[channel(entry)].append(now + seconds(entry))
        elif entry.op in SEND_OF:
            np.maximum(now, arrivals[channel(entry)].popleft(), out=now)
        elif entry.op in IN_FLIGHT_CHANGE:
            now += seconds(entry)
            if (entry.stage, entry.op) in ties:
                now[:] = np.repeat(np.maximum.reduceat(now, starts), groups)
    return np.maximum.reduceat(clock, starts, axis=1)
