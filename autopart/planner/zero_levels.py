"""The ZeRO levels that the search tries at a point, with and without offload, and those that it begins with.

Where a higher level takes no less time than a lower one, the lower bounds of the lower level hold for it too. Such a
level is tried only once the level below it does not fit in memory. So are the points with offload: the first of them
once the first level without offload does not fit. `extra_seconds` compares the time of two points.
"""

from dataclasses import replace

import numpy as np

from autopart.cost.offload import OFFLOADS
from autopart.cost.training_state import OPTIMIZER_STATES, update_seconds
from autopart.errors import PartitionError
from autopart.planner.candidate import TOLERANCE
from autopart.planner.search_points import SearchPoint
from autopart.planner.search_space import SearchSpace


def offloads(space: SearchSpace) -> list[bool]:
    """Whether the optimizer's states may stay on the device (False), and whether they may lie on the host (True), as
    the request says. Where it says nothing, they may lie on the host if the device has a host of its own memory and
    the optimizer has states or a master copy.

    Raises PartitionError where they are asked to lie on a host that is not known."""
    request, device = space.request, space.mesh.device
    allowed = [
        chosen
        for chosen, name in enumerate(OFFLOADS)
        if request.offload in (None, name) and request.allows("offload", name)
    ]
    keeps = OPTIMIZER_STATES[request.optimizer] or request.master
    if len(allowed) > 1 and (device.host is None or device.type == "cpu" or not keeps):
        return [False]
    if allowed == [1] and device.host is None and device.type != "cpu":
        raise PartitionError(
            f"the host of {device.name} is not known",
            "offload needs its memory, its bandwidth and its link to the device",
            f"a table [devices.{device.name}.host] of memory_bytes, bandwidth, link and source in a file of hardware",
        )
    return [bool(chosen) for chosen in allowed]


def zero_levels(space: SearchSpace, point: SearchPoint) -> list[int]:
    """The levels that the request allows, with or without offload as the point has it, in rising order of seconds. At
    dp=1 all levels are equal, and the first is enough. Level 0 is left out where level 1 takes less time and no more
    memory: with a master copy of parameters, or where the optimizer's step has a price."""
    request = space.request
    levels = [zero for zero in (0, 1, 2, 3) if request.zero in (None, zero) and request.allows("zero", zero)]
    if point.dp == 1:
        return levels[:1]
    zero_0, zero_1 = (replace(point, zero=zero) for zero in (0, 1))
    faster = levels[:2] == [0, 1] and extra_seconds(space, zero_1, zero_0) < -TOLERANCE
    return levels[1:] if faster and _end_of_step(space, zero_1) <= _end_of_step(space, zero_0) else levels


def settings_of(space: SearchSpace, point: SearchPoint) -> list[SearchPoint]:
    """The point with every level that the search may try, those without offload first."""
    found = []
    for chosen in offloads(space):
        at = replace(point, offload=chosen)
        found += [replace(at, zero=zero) for zero in zero_levels(space, at)]
    return found


def starting_points(space: SearchSpace, point: SearchPoint) -> list[SearchPoint]:
    """The settings that are in the queue from the start: the first without offload; level 1 where it may take less time
    than level 0; level 3, whose gathers computing hides, where it may take less time than a lower one; all where the
    optimizer's step was measured, since its seconds may fall with every level. Those with offload likewise, where there
    are no others or where the first of them may take less time than the first of the others."""
    found: list[SearchPoint] = []
    measured = space.mesh.device.measured is not None
    for chosen in offloads(space):
        every = [at for at in settings_of(space, point) if at.offload == chosen]
        if found and every and extra_seconds(space, found[0], every[0]) <= TOLERANCE:
            continue
        unsure = len(every) > 1 and every[0].zero == 0 and extra_seconds(space, every[0], every[1]) > TOLERANCE
        start = every if measured else every[: 1 + unsure]
        below = [at for at in every if at.zero < 3]
        found += start
        found += [
            at
            for at in every[len(start) :]
            if at.zero == 3 and any(extra_seconds(space, lower, at) > TOLERANCE for lower in below)
        ]
    return found


def following(space: SearchSpace, point: SearchPoint) -> list[SearchPoint]:
    """What is put in the queue once a point does not fit: the next level; and after the first level without offload
    the first with it."""
    every = settings_of(space, point)
    same = [at for at in every if at.offload == point.offload]
    found = same[same.index(point) + 1 :][:1]
    if not point.offload and point == same[0]:
        found += [at for at in every if at.offload][:1]
    started = starting_points(space, point)
    return [at for at in found if at not in started]


def offload_seconds(space: SearchSpace, point: SearchPoint, other: SearchPoint) -> float:
    """A lower bound on the seconds that a step takes more at another point than at a point without offload, of the same
    splits: 0 unless the points differ in offload alone. Then it is the least that the updates of all parameters take
    more on the host."""
    if replace(point, offload=True) != other or point.offload:
        return 0.0
    model, more = space.model(point), space.priced(other).sync_seconds - space.priced(point).sync_seconds
    each = np.maximum(more, 0.0) * model.counts[: len(more)]
    return model.sizes.separable_bound(each, space.options(point)) / space.amortization(point)


def extra_seconds(space: SearchSpace, one: SearchPoint, other: SearchPoint) -> float:
    """The most that the seconds of parameters in a step can be greater at a point than at another of other level or
    offload, relative to those at the `other`.

    A level takes s = sync + update seconds. Computing hides min(t x, h) of them, with x the seconds of a backward, t
    the number of passes that hide messages (no forward takes more than a backward), and h the seconds of messages that
    they can hide. The difference of 1 = `one` and 2 = `other` is greatest where x is 0, h1 / t1 or h2 / t2:

        s1 - s2 - min(t1 x, h1) + min(t2 x, h2)
    """
    device, found = space.device(one), []
    for training in map(space.training, (one, other)):
        seconds = training.sync_seconds(1.0, True) + update_seconds(1.0, True, True, training, device)
        gathers = 2 * training.gather_seconds(1.0, True)
        hidden = training.backwards * (training.overlappable_seconds(1.0, True) + gathers)
        found.append((seconds, device.overlapped_share * hidden, training.backwards * (1 + (gathers > 0))))
    (s1, h1, t1), (s2, h2, t2) = found
    more = s1 - s2 + max(min(t2 * x, h2) - min(t1 * x, h1) for x in (0.0, h1 / t1, h2 / t2))
    return more / s2 if s2 else more


def _end_of_step(space: SearchSpace, point: SearchPoint) -> float:
    """Bytes for each byte of parameters at the end of a step: their state, and the workspace of one message of all."""
    training = space.training(point)
    return sum(training.state_bytes(1.0, True, True)) + float(training.end_of_step_workspace(1.0, 1.0))
