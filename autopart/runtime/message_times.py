"""What a rank's collectives and messages move, and how long the rank is held up by them."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import wraps
from time import perf_counter
from typing import Any

import torch

from autopart.runtime.process_group import Group, Work

COLLECTIVES: dict[str, str] = {
    "all_reduce": "all_reduce",
    "start_all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "start_all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "start_reduce_scatter": "reduce_scatter",
    "all_to_all": "all_to_all",
    "send": "send",
}
"""Method of `Group` -> what it runs, as `PlanStage.traffic` names it."""


@dataclass
class MessageTotal:
    """Messages of one kind.

    calls    their number
    bytes    of the whole tensors, as `autopart.cost.collectives` counts them
    seconds  that the rank spent in their calls and in waits for them: other ranks may have come later
    """

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0


class MessageTimes:
    """Totals by (instruction, axis, collective) of the groups that are watched, while `instruction` is not empty."""

    def __init__(self) -> None:
        self.instruction = ""
        self.totals: dict[tuple[str, str, str], MessageTotal] = defaultdict(MessageTotal)
        self._inside = False

    def watch(self, axis: str, group: Group) -> None:
        """Count what a group along an axis runs from now on; along pp its messages, else its collectives."""
        for method, collective in COLLECTIVES.items():
            if (collective == "send") == (axis == "pp"):
                self._watch(group, axis, method, collective)

    def to_json(self) -> list[dict[str, Any]]:
        """The totals as dicts."""
        return [
            {"op": op, "axis": axis, "collective": name, **asdict(total)}
            for (op, axis, name), total in self.totals.items()
        ]

    def _watch(self, group: Group, axis: str, method: str, collective: str) -> None:
        called: Callable[..., Any] = getattr(group, method)

        @wraps(called)
        def run(*given: Any, **named: Any) -> Any:
            if self._inside or not self.instruction:  # a collective may call another one
                return called(*given, **named)
            total = self.totals[self.instruction, axis, collective]
            total.calls += 1
            total.bytes += _bytes(method, given, group.size)
            self._inside, started = True, perf_counter()
            try:
                out = called(*given, **named)
            finally:
                self._inside = False
                total.seconds += perf_counter() - started
            return _timed(out, total)

        object.__setattr__(group, method, run)  # a group is frozen, and emitted code has it already


def _bytes(method: str, given: tuple[Any, ...], size: int) -> int:
    tensor: torch.Tensor = given[1] if method == "start_all_gather" else given[0]
    return tensor.numel() * tensor.element_size() * (size if method == "all_gather" else 1)


def _timed(out: Any, total: MessageTotal) -> Any:
    """What a collective returned; waiting for what it started counts too."""
    if isinstance(out, torch.Tensor) or out is None:
        return out
    return _TimedWork(out, total) if hasattr(out, "is_completed") else _timed_call(out, total)


def _timed_call(wait: Callable[[], torch.Tensor], total: MessageTotal) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        started = perf_counter()
        out = wait()
        total.seconds += perf_counter() - started
        return out

    return run


class _TimedWork:
    """Communication that was started, whose wait is timed."""

    def __init__(self, work: Work, total: MessageTotal) -> None:
        self.work, self.total = work, total

    def wait(self) -> Any:
        started = perf_counter()
        out = self.work.wait()
        self.total.seconds += perf_counter() - started
        return out

    def is_completed(self) -> bool:
        return self.work.is_completed()
