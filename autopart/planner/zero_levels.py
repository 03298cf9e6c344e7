"""The ZeRO levels that the search tries at a point, and those that it begins with.

Where a higher level takes no less time than a lower one, the lower bounds of the lower level hold for it too. Such a
level is tried only once the level below it does not fit in memory. `extra_seconds` compares the time of two levels.
"""

from collections.abc import Sequence
from dataclasses import replace

from autopart.cost.training_state import update_seconds
from autopart.planner.candidate import TOLERANCE
from autopart.planner.search_points import SearchPoint
from autopart.planner.search_space import SearchSpace


def zero_levels(space: SearchSpace, point: SearchPoint) -> list[int]:
    """The levels that the request allows, in rising order of seconds. At dp=1 all levels are equal, and the first is
    enough. Level 0 is left out where level 1 takes less time and no more memory: with a master copy of parameters, or
    where the optimizer's step has a price."""
    request = space.request
    levels = [zero for zero in (0, 1, 2, 3) if request.zero in (None, zero) and request.allows("zero", zero)]
    if point.dp == 1:
        return levels[:1]
    faster = levels[:2] == [0, 1] and extra_seconds(space, point, 1, 0) < -TOLERANCE
    return levels[1:] if faster and _end_of_step(space, point, 1) <= _end_of_step(space, point, 0) else levels


def starting_levels(space: SearchSpace, point: SearchPoint, levels: Sequence[int]) -> Sequence[int]:
    """The levels that are in the queue from the start: the first; level 1 where it may take less time than level 0;
    level 3, whose gathers computing hides, where it may take less time than a lower one; all where the optimizer's step
    was measured, since its seconds may fall with every level."""
    if space.mesh.device.measured is not None:
        return levels
    unsure = point.dp > 1 and levels[0] == 0 and extra_seconds(space, point, 0, 1) > TOLERANCE
    start = list(levels[: 1 + unsure])
    if point.dp > 1 and 3 in levels[len(start) :]:
        below = [zero for zero in levels if zero < 3]
        start += [3] if any(extra_seconds(space, point, zero, 3) > TOLERANCE for zero in below) else []
    return start


def extra_seconds(space: SearchSpace, point: SearchPoint, one: int, other: int) -> float:
    """The most that the seconds of parameters in a step can be greater at level `one` than at level `other`, relative
    to those at `other`.

    A level takes s = sync + update seconds. Computing hides min(t x, h) of them, with x the seconds of a backward, t
    the number of passes that hide messages (no forward takes more than a backward), and h the seconds of messages that
    they can hide. The difference of the levels 1 = `one` and 2 = `other` is greatest where x is 0, h1 / t1 or h2 / t2:

        s1 - s2 - min(t1 x, h1) + min(t2 x, h2)
    """
    device, found = space.device(point), []
    for training in (space.training(replace(point, zero=zero)) for zero in (one, other)):
        seconds = training.sync_seconds(1.0, True) + update_seconds(1.0, True, True, training, device)
        gathers = 2 * training.gather_seconds(1.0, True)
        hidden = training.backwards * (training.overlappable_seconds(1.0, True) + gathers)
        found.append((seconds, device.overlapped_share * hidden, training.backwards * (1 + (gathers > 0))))
    (s1, h1, t1), (s2, h2, t2) = found
    return (s1 - s2 + max(min(t2 * x, h2) - min(t1 * x, h1) for x in (0.0, h1 / t1, h2 / t2))) / s2


def _end_of_step(space: SearchSpace, point: SearchPoint, zero: int) -> float:
    """Bytes for each byte of parameters at the end of a step: their state, and the workspace of one message of all."""
    training = space.training(replace(point, zero=zero))
    return sum(training.state_bytes(1.0, True, True)) + float(training.end_of_step_workspace(1.0, 1.0))
