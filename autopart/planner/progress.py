"""Lines of progress of a search: the incumbent's seconds, the lower bound, the gap between them."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from autopart.cost.intervals import NEVER
from autopart.plan.units import seconds_text

OnProgress = Callable[[str], None]
"""Called with a line of text."""

INTERVAL = 0.5
"""Seconds between two lines while the incumbent stays the same."""


def silent(text: str) -> None:
    """The default `on_progress`: nothing."""


@dataclass
class Progress:
    """Calls `on_progress` for every new incumbent, and every INTERVAL seconds."""

    on_progress: OnProgress
    told_at: float = 0.0
    told_seconds: float = NEVER
    """The incumbent's seconds in the last line."""

    def tell(self, incumbent: float, bound: float, points: int) -> None:
        """Print a line: `incumbent` and `bound` in seconds of a step, `points` the number taken from the queue."""
        if incumbent == NEVER or (incumbent >= self.told_seconds and time.monotonic() - self.told_at < INTERVAL):
            return
        self.told_at, self.told_seconds = time.monotonic(), incumbent
        gap = max(0.0, 1 - bound / incumbent)
        self.on_progress(f"best {seconds_text(incumbent)}, bound {seconds_text(bound)}, gap {gap:.1%}, {points} points")
