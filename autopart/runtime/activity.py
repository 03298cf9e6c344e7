"""What a rank is doing, since when, and whether it waits for other ranks."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

COMMUNICATION = (str(Path(__file__).parent), str(Path(dist.__file__).parent))
"""Folders of the functions in which a thread waits for other ranks: those of this package and of torch.distributed."""


class Activity:
    """What a rank is doing. The rank's main thread writes it, the watchdog's thread reads it."""

    def __init__(self) -> None:
        self.begin("starting", idle=True)

    def begin(self, text: str, idle: bool = False) -> None:
        """Note that the rank now does what `text` says. An idle rank is in the user's code, between two steps."""
        self._now = text, idle, time.monotonic()

    @contextmanager
    def during(self, text: str) -> Iterator[None]:
        """Note that the rank does what `text` says in the block, and is idle after it.

        After an error the activity stays, so that it names what failed.
        """
        self.begin(text)
        yield
        self.begin("waiting for the next step", idle=True)

    @property
    def text(self) -> str:
        """What the rank is doing, such as "stage 0 FORWARD micro-batch 1"."""
        return self._now[0]

    def progress(self) -> tuple[float, bool, bool]:
        """(seconds since the activity began, whether the rank is idle, whether the rank waits for other ranks).

        A rank waits if the innermost Python function of a thread is in one of the folders COMMUNICATION. The thread
        that calls this does not count.
        """
        _, idle, since = self._now
        others = (frame for thread, frame in sys._current_frames().items() if thread != threading.get_ident())
        blocked = any(frame.f_code.co_filename.startswith(COMMUNICATION) for frame in others)
        return time.monotonic() - since, idle, blocked
