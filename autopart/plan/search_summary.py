"""What a plan remembers of the search that found it."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PointPlan:
    """A search point, and the best plan that the search found there.

    micro_batch    samples of a micro-batch over all data-parallel ranks
    seconds        of a step of that plan; None where the search found none
    bound_seconds  lower bound on a step of every plan of the point
    offload        whether the optimizer's states are on the host
    shard_size     data-parallel ranks that ZeRO divides among; 0: all
    """

    pp: int
    dp: int
    tp: int
    micro_batch: int
    zero: int
    seconds: float | None
    bound_seconds: float
    offload: bool = field(default=False, kw_only=True)
    shard_size: int = field(default=0, kw_only=True)


@dataclass(frozen=True)
class RunnerUp(PointPlan):
    """The best of the search points with other degrees (pp, dp, tp) than the plan's. `seconds` is None where a lower
    bound was enough to drop these points. No plan with other degrees takes less than `bound_seconds`."""


@dataclass(frozen=True)
class SearchMoment:
    """Where the search stood when its incumbent or its lower bound had changed.

    seconds    since the search began
    visited    points taken from the queue until then
    incumbent  seconds of a step of the fastest plan until then; None where there was none
    bound      lower bound on the step of every plan of the space, in seconds
    """

    seconds: float
    visited: int
    incumbent: float | None
    bound: float


@dataclass(frozen=True)
class SearchedPoint(PointPlan):
    """A search point, and how the search was done with it.

    memory_bytes   of the point's plan: peak bytes of a rank of its fullest stage; None without a plan
    ended          one of ENDS
    """

    memory_bytes: float | None
    ended: str


@dataclass(frozen=True)
class SearchSummary:
    """What the search compared, and what limits its plan.

    points     number of search points (degrees, micro-batch, ZeRO level) that the search bounded
    runner_up  None where no other degrees are possible
    limit      "memory": with more memory the search would have found a faster plan, or a lower ZeRO level would have
               fitted. "batch": no rank can take fewer samples at a time, and that leaves devices idle or forbids more
               data parallelism. "devices": neither of these
    history    in order of time, every new incumbent, and the lower bound as it rises
    ended      how the search was done with its points: of ENDS, in their order -> number of points
    compared   the points with a plan, the fastest first, then those of the least bounds
    """

    points: int
    runner_up: RunnerUp | None
    limit: str
    history: tuple[SearchMoment, ...] = ()
    ended: Mapping[str, int] = field(default_factory=dict)
    compared: tuple[SearchedPoint, ...] = ()


LIMITS = ("memory", "batch", "devices")

ENDS: Mapping[str, str] = {
    "chosen": "the plan is of this point",
    "state": "parameters, gradients and optimizer states alone exceed all devices",
    "fastest strategies": "pruned by the sum of every operator's fastest strategy",
    "linear relaxation": "pruned by the linear relaxation of the splits' ILP",
    "capacity": "pruned by the fastest cut whose stages fit with the least memory",
    "splits": "its splits' ILP was solved and cut into stages; nothing of it can be faster than the plan",
    "memory multipliers": "pruned by the Lagrangian bound on memory",
    "refined": "searched to the end: its fastest plan is no faster, or none fits",
    "unfinished": "left open when the search reached its limit of time or nodes",
}
"""How a search is done with a point -> in words."""
