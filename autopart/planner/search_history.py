"""The record of a search: incumbent and lower bound over time, and the last step of every point."""

import math
import time
from dataclasses import dataclass, field

from autopart.plan.search_summary import SearchMoment
from autopart.planner.search_points import SearchPoint

KEPT = 100
"""Moments that a plan remembers, besides those of new incumbents."""


@dataclass
class SearchHistory:
    """The record of one search.

    started    when the search began, by `time.monotonic`
    last_step  point -> the last step that the search did with it (`branch_and_bound.Step`)
    moments    every change of the incumbent or of the lower bound
    """

    started: float = field(default_factory=time.monotonic)
    last_step: dict[SearchPoint, int] = field(default_factory=dict)
    moments: list[SearchMoment] = field(default_factory=list)

    def note(self, point: SearchPoint, step: int, visited: int, incumbent: float, bound: float) -> None:
        """Record what the search knows after the `visited`-th step, which it did with a point.

        incumbent, bound  seconds of a training step; infinite: none
        """
        self.last_step[point] = step
        found = incumbent if math.isfinite(incumbent) else None
        last = self.moments[-1] if self.moments else None
        if math.isfinite(bound) and (last is None or last.incumbent != found or bound > last.bound):
            self.moments.append(SearchMoment(time.monotonic() - self.started, visited, found, bound))

    def thinned(self) -> tuple[SearchMoment, ...]:
        """The first moment, the last, those of new incumbents, and of the others at most KEPT, evenly."""
        every = self.moments
        new = {i for i in range(1, len(every)) if every[i].incumbent != every[i - 1].incumbent}
        stride = max(1, math.ceil(len(every) / KEPT))
        kept = sorted(new | {i - 1 for i in new} | set(range(0, len(every), stride)) | {len(every) - 1} - {-1})
        return tuple(every[i] for i in kept)
