"""The watchdog around a block of code."""

from collections.abc import Iterator
from contextlib import contextmanager

from autopart.runtime.activity import Activity
from autopart.runtime.watchdog import finish, report_failure, start_watchdog


@contextmanager
def watched(
    activity: Activity, interval: float = 0.5, patience: float = 15.0, hang_timeout: float | None = None
) -> Iterator[None]:
    """`start_watchdog` and `finish` around a block. Other ranks are told of an error of the block."""
    start_watchdog(activity, interval, patience, hang_timeout)
    try:
        yield
    except BaseException as error:
        if not (isinstance(error, SystemExit) and not error.code):
            report_failure(error)
        raise
    finally:
        finish()
