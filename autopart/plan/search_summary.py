"""What a plan remembers of the search that found it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RunnerUp:
    """The best of the search points with other degrees (pp, dp, tp) than the plan's.

    micro_batch    samples of a micro-batch over all data-parallel ranks
    seconds        of a step of the best plan that the search found there; None where it found none, because a lower
                   bound was enough to drop these points
    bound_seconds  no plan with other degrees than the plan's takes less
    """

    pp: int
    dp: int
    tp: int
    micro_batch: int
    zero: int
    seconds: float | None
    bound_seconds: float


@dataclass(frozen=True)
class SearchSummary:
    """What the search compared, and what limits its plan.

    points     number of search points (degrees, micro-batch, ZeRO level) that the search bounded
    runner_up  None where no other degrees are possible
    limit      "memory": with more memory the search would have found a faster plan, or a lower ZeRO level would have
               fitted. "batch": no rank can take fewer samples at a time, and that leaves devices idle or forbids more
               data parallelism. "devices": neither of these
    """

    points: int
    runner_up: RunnerUp | None
    limit: str


LIMITS = ("memory", "batch", "devices")
