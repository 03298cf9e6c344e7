"""Bounds on how much longer a step takes at one search point than at another of the same degrees and micro-batch: with
another ZeRO level, among other ranks, or with the optimizer's states elsewhere."""

from dataclasses import dataclass, replace

import numpy as np

from autopart.cost.compute import Array
from autopart.cost.training_state import Training
from autopart.cost.update_seconds import update_seconds
from autopart.hardware.rows import Device
from autopart.planner.class_bounds import least_work
from autopart.planner.search_points import SearchPoint
from autopart.planner.search_space import SearchSpace

UNIT, ALL, MEAN = "unit", "all", "mean"
"""Which parameters are compared: one that travels in full messages; every one whose gradient is a partial sum over dp,
in all strategies; one of a position that has its share of the model's bytes."""

BACKWARD_SHARE = 2 / 3
"""Seconds of a backward / seconds of a forward and a backward."""


def offload_seconds(space: SearchSpace, point: SearchPoint, other: SearchPoint) -> float:
    """A lower bound on the seconds that a step takes more at another point than at a point without offload, of the same
    splits: 0 unless the points differ in offload alone. Then it is the least that the updates of all parameters take
    more on the host."""
    if replace(point, offload=True) != other or point.offload:
        return 0.0
    pairs, model = zip(space.each_kind(point), space.each_kind(other), strict=True), space.model(point)
    more = [space.priced(on_host).sync_seconds - space.priced(here).sync_seconds for here, on_host in pairs]
    least = np.maximum(np.minimum.reduce(more), 0.0)
    each = least * model.counts[: len(least)]
    return model.sizes.separable_bound(each, space.options(point)) / space.amortization(point)


def extra_seconds(space: SearchSpace, one: SearchPoint, other: SearchPoint, parameters: str = UNIT) -> float:
    """The most that the seconds of parameters in a step can be greater at a point than at another of other level,
    shards or offload, relative to those at the `other`.

    A setting takes s = sync + update seconds. Computing hides some, with x the seconds of a backward, b the backwards
    that hide messages, q = 2 where it hides gathers too (no forward takes more than a backward), else 1, and the
    messages h that each of these can hide, the last with c more:

        hidden(x) = (b - 1) min(q x, h) + min(q x, h + c)

    The difference of 1 = `one` and 2 = `other` is greatest where x is 0 or where a term of hidden reaches its messages:

        s1 - s2 - hidden1(x) + hidden2(x)

    Where stages differ in kind, the difference of each kind is compared.
    """
    kinds = zip(space.each_kind(one), space.each_kind(other), strict=True)
    return max(_extra_seconds(space, mine, theirs, parameters) for mine, theirs in kinds)


def _extra_seconds(space: SearchSpace, one: SearchPoint, other: SearchPoint, parameters: str) -> float:
    """`extra_seconds` for stages of one kind."""
    mine, theirs = (_hiding(space, point, parameters) for point in (one, other))
    turns = [0.0 * mine.each, *mine.reached, *theirs.reached]
    more = mine.seconds - theirs.seconds + np.max([theirs.hidden(x) - mine.hidden(x) for x in turns], axis=0)
    relative = more / np.where(theirs.seconds > 0, theirs.seconds, 1.0)
    return float(relative.max())


@dataclass(frozen=True)
class Hiding:
    """Of some parameters, [parameters]: `seconds` of a step, and what computing may hide (`extra_seconds`): `each` (h)
    in every one of `backwards`, and `last` (h + c) in the last."""

    seconds: Array
    each: Array
    last: Array
    backwards: int
    passes: int

    @property
    def reached(self) -> tuple[Array, Array]:
        """The seconds x of a backward from which on it hides all messages: of any backward, of the last."""
        return self.each / self.passes, self.last / self.passes

    def hidden(self, x: Array) -> Array:
        """Seconds that backwards of `x` seconds, and forwards, hide in a step."""
        room = self.passes * x
        return (self.backwards - 1) * np.minimum(room, self.each) + np.minimum(room, self.last)


def _hiding(space: SearchSpace, point: SearchPoint, parameters: str) -> Hiding:
    """Of some parameters at a point."""
    if (point, parameters) not in space.hiding:
        rows = np.array([[1.0, np.inf, 0.0]])
        if parameters != UNIT:
            rows = _rows(space, point) if parameters == ALL else np.array([[1.0, _mean_bytes(space, point), 0.0]])
        made, tp = _hidden_at(space.training(point), space.device(point), *rows[:, :2].T), rows[:, 2]
        if tp.any():
            group = space.view(point).group(1, point.tp)
            each = [space.training(point).partial_sync_seconds(nbytes, True, group) for nbytes in rows[:, 0].tolist()]
            made = replace(made, seconds=made.seconds + tp * each)
        space.hiding[point, parameters] = made
    found: Hiding = space.hiding[point, parameters]
    return found


def _hidden_at(training: Training, device: Device, nbytes: Array, together: Array) -> Hiding:
    """Of parameters of `nbytes`, in segments whose parameters are `together` bytes."""
    share, backwards = device.overlapped_share, training.backwards
    update = [update_seconds(each, True, True, training, device) for each in nbytes.tolist()]
    gathers = 2 * training.gather_seconds(nbytes, True, together) + 0.0 * nbytes
    crossing = share * training.crossing_seconds(nbytes, True, together)
    mean = share * (training.overlappable_seconds(nbytes, True, together) + gathers)
    each = mean - crossing / backwards
    seconds = training.sync_seconds(nbytes, True, together) + np.array(update)
    return Hiding(seconds, each, each + crossing, backwards, 1 + bool(gathers.any()))


def saving(space: SearchSpace, one: SearchPoint, other: SearchPoint) -> float:
    """An estimate of what a step takes less at a point than at `one`, which differs in its setting alone, as a share of
    the step at `one`."""
    seconds, computing = (_late(space, one) - _late(space, other)), _computing(space, one)
    return seconds / (computing + _late(space, one))


def message_share(space: SearchSpace, point: SearchPoint) -> float:
    """An estimate of the share of a step that the messages of parameters, the optimizer and what computing does not
    hide of them take."""
    late = _late(space, point)
    return late / (_computing(space, point) + late)


def _computing(space: SearchSpace, point: SearchPoint) -> float:
    """Seconds of a micro-batch in all stages, every operator in its fastest strategy, without messages."""
    return least_work(space, replace(point, zero=0, offload=False, shard_size=0))


def _late(space: SearchSpace, point: SearchPoint) -> float:
    """Seconds of sync and update in a micro-batch's share of a step that computing does not hide, where all positions
    of the model have equal parameters and take as long."""
    nbytes = _mean_bytes(space, point) * len(space.layered.labels)
    if not nbytes:
        return 0.0
    of = _hiding(space, space.at(point, 0), MEAN)
    backward = np.array([_computing(space, point) * BACKWARD_SHARE / nbytes])
    return float((of.seconds - of.hidden(backward))[0]) * nbytes / space.amortization(point)


def _mean_bytes(space: SearchSpace, point: SearchPoint) -> float:
    """Bytes on a rank of the trained parameters of a position, on average, in the strategies of fewest bytes."""
    key = "mean bytes", point.tp
    if key not in space.hiding:
        model = space.model(point)
        rows = model.sizes.parameters[model.sizes.parameter_of]
        each = rows[:, 0] * rows[:, 1] * model.counts[: len(rows)]
        space.hiding[key] = model.sizes.separable_bound(each, {}) / len(space.layered.labels)
    return float(space.hiding[key])


def _rows(space: SearchSpace, point: SearchPoint) -> Array:
    """[parameters, 3]: of the parameters of ALL (bytes, bytes of all parameters of the segment, whether the gradient is
    a partial sum over tp too)."""
    rows = space.model(point).sizes.parameters
    reduced = rows[(rows[:, 0] > 0) & (rows[:, 1] > 0) & (rows[:, 2] > 0)][:, [0, 4, 3]]
    return reduced if len(reduced) else np.array([[1.0, np.inf, 0.0]])
