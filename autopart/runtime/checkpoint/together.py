"""Work whose errors every rank raises, so that no rank waits for one that failed."""

from collections.abc import Callable
from typing import TypeVar

from autopart.errors import PartitionError, few
from autopart.runtime.process_group import Group

T = TypeVar("T")


def together(group: Group, work: Callable[[], T], what: str, try_: str = "", only: int | None = None) -> T:
    """This rank's result of `work`. All ranks call it; `work` must not communicate.

    only  the one rank that works; the others get None

    Raises PartitionError on every rank where one rank fails: the rank's own, or one that says `what` and why.
    """
    mine: T | None = None
    error: Exception | None = None
    try:
        if only in (None, group.rank):
            mine = work()
    except Exception as caught:
        error = caught
    own = (error.what, error.why, error.try_) if isinstance(error, PartitionError) else None
    everyone = group.all_gather_object((own, error and f"{type(error).__name__}: {error}"))
    if errors := [own for own, _ in everyone if own]:
        raise PartitionError(*errors[0]) from error
    if failed := [f"rank {rank}: {text}" for rank, (_, text) in enumerate(everyone) if text]:
        raise PartitionError(what, few(failed, joint="; "), try_) from error
    return mine  # type: ignore[return-value]
