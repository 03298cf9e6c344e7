"""The ZeRO levels that the search tries at a point, among which ranks, with and without offload, and those that it
begins with.

Where a higher level takes no less time than a lower one, the lower bounds of the lower level hold for it too. Such a
level is tried only once the level below it does not fit in memory. So are the points with offload: the first of them
once the first level without offload does not fit. `setting_seconds.extra_seconds` compares the time of two points.

Every level may divide among all data-parallel ranks, or among a part of them (`shard_sizes`). The fewer ranks, the more
memory. A part is of the search space where the ranks are of more than MOST_HOSTS hosts or of several pods, and where it
is estimated to save MIN_SAVING of a step against all ranks at the same level, and against a larger part. It is tried
once a setting before it does not fit that takes no more time, or from the start where there is none.
"""

import math
from dataclasses import replace

from autopart.cost.offload import OFFLOADS
from autopart.cost.training_state import OPTIMIZER_STATES
from autopart.errors import PartitionError
from autopart.hardware.mesh import divisors
from autopart.planner.candidate import TOLERANCE
from autopart.planner.refinement import SMALL
from autopart.planner.search_points import SearchPoint
from autopart.planner.search_space import SearchSpace
from autopart.planner.setting_seconds import ALL, UNIT, extra_seconds, message_share, saving

MIN_SAVING = 0.05
"""The least share of a step that a part of the data-parallel ranks must save to be of the search space. For a request
that is `exact`, and for small models, every part is that may save anything."""

MOST_HOSTS = 128
"""The hosts of data-parallel ranks of one pod up to which ZeRO divides among all: there the rings between hosts are
short enough for parts to save little. For an `exact` request, and for small models, parts are tried on any number of
hosts."""

SPREAD = 2
"""The least ratio of two numbers of ranks that ZeRO may divide among."""


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


def shard_sizes(space: SearchSpace, point: SearchPoint) -> list[int]:
    """The numbers of data-parallel ranks that ZeRO may divide among where these are not all, rising: those of a host,
    of k hosts, and of a pod of hosts. Inside a host all links are equal: a part of its ranks brings no faster messages.
    Each number but that of a pod is at least SPREAD times the one before."""
    request, dp = space.request, point.dp
    if request.shard_size:
        sizes = [request.shard_size] if request.shard_size < dp else []
    else:
        host, pod = (
            math.gcd(dp, max(1, devices // point.tp)) for devices in (space.mesh.devices_per_host, space.mesh.pod_size)
        )
        sizes = []
        for size in (host * hosts for hosts in divisors(dp // host)):
            if 1 < size < dp and (not sizes or size >= SPREAD * sizes[-1] or size == pod):
                sizes.append(size)
    return sizes


def zero_levels(space: SearchSpace, point: SearchPoint) -> list[int]:
    """The levels that the request allows, with or without offload as the point has it, in rising order of seconds. At
    dp=1 all levels are equal, and the first is enough. Level 0 is left out where level 1 takes less time and no more
    memory: with a master copy of parameters, or where the optimizer's step has a price."""
    request = space.request
    levels = [
        zero
        for zero in (0, 1, 2, 3)
        if request.zero in (None, zero) and request.allows("zero", zero) and (zero or not request.shard_size)
    ]
    if point.dp == 1:
        return levels[:1]
    if not _allowed(space, replace(point, zero=0)):
        return [zero for zero in levels if zero]
    zero_0, zero_1 = (replace(point, zero=zero) for zero in (0, 1))
    faster = levels[:2] == [0, 1] and extra_seconds(space, zero_1, zero_0) < -TOLERANCE
    return levels[1:] if faster and _end_of_step(space, zero_1) <= _end_of_step(space, zero_0) else levels


def _allowed(space: SearchSpace, point: SearchPoint) -> bool:
    """Whether the request allows the ranks that ZeRO divides among."""
    asked = space.request.shard_size
    return (not point.zero or asked in (None, point.shards)) and space.request.allows("shard_size", point.shards)


def settings_of(space: SearchSpace, point: SearchPoint) -> list[SearchPoint]:
    """The point with every level, and among every number of ranks, that the search may try, those without offload
    first; of a level the fewest ranks first."""
    base = replace(point, zero=0, offload=False, shard_size=0)
    if base not in space.settings:
        space.settings[base] = _settings(space, base)
    return space.settings[base]


def _settings(space: SearchSpace, base: SearchPoint) -> list[SearchPoint]:
    found: list[SearchPoint] = []
    for chosen in offloads(space):
        at = replace(base, offload=chosen)
        for zero in zero_levels(space, at):
            whole = replace(at, zero=zero)
            among = [replace(whole, shard_size=size) for size in shard_sizes(space, at)] if zero else []
            parts = [each for each in among if _allowed(space, each)]
            found += _that_save(space, parts, whole) if _allowed(space, whole) else parts
    return found


def _every(space: SearchSpace) -> bool:
    """Whether every part is tried that may save anything."""
    return space.request.exact or len(space.layered.labels) <= SMALL[0]


def _that_save(space: SearchSpace, parts: list[SearchPoint], whole: SearchPoint) -> list[SearchPoint]:
    """Those of some settings of one level, in rising number of ranks, that save MIN_SAVING of a step against the next
    that is left; and the setting `whole`, among all ranks."""
    every, left = _every(space), [whole]
    group = space.training(whole).group
    far = group.hosts > MOST_HOSTS or group.pods > 1
    if parts and (every or (far and message_share(space, whole) > MIN_SAVING)):
        for at in reversed(parts):
            most = extra_seconds(space, left[0], at, ALL) if every else saving(space, left[0], at) - MIN_SAVING
            if most > 0:
                left.insert(0, at)
    return left


def starting_points(space: SearchSpace, point: SearchPoint) -> list[SearchPoint]:
    """The settings that are in the queue from the start: of those without offload the ones without a `_parent`. With
    offload likewise, where there are no others or where the first of them may take less time than the first of the
    others. Where the optimizer's step was measured all: its seconds may fall with every level."""
    found: list[SearchPoint] = []
    measured = space.mesh.device.measured is not None
    every = settings_of(space, point)
    for chosen in offloads(space):
        same = [at for at in every if at.offload == chosen]
        if found and same and extra_seconds(space, found[0], same[0]) <= TOLERANCE:
            continue
        found += same if measured else [at for at in same if _parent(space, same, at) is None]
    return found


def _parent(space: SearchSpace, settings: list[SearchPoint], at: SearchPoint) -> SearchPoint | None:
    """The last of the settings before one that takes no more time than it, whose lower bounds hold for it."""
    parameters = ALL if _every(space) or any(each.shard_size for each in settings) else UNIT
    before = settings[: settings.index(at)]
    return next((one for one in reversed(before) if extra_seconds(space, one, at, parameters) <= TOLERANCE), None)


def following(space: SearchSpace, point: SearchPoint) -> list[SearchPoint]:
    """What is put in the queue once a point does not fit: the settings whose `_parent` it is; and after the first
    setting without offload the first with it."""
    every = settings_of(space, point)
    same = [at for at in every if at.offload == point.offload]
    found = [at for at in same if _parent(space, same, at) == point]
    if not point.offload and point == same[0]:
        found += [at for at in every if at.offload][:1]
    started = starting_points(space, point)
    return [at for at in found if at not in started]


def _end_of_step(space: SearchSpace, point: SearchPoint) -> float:
    """Bytes for each byte of parameters at the end of a step: their state, and the workspace of one message of all."""
    training = space.training(point)
    return sum(training.state_bytes(1.0, True, True)) + float(training.end_of_step_workspace(1.0, 1.0))
