"""A thread on every rank that publishes what the rank is doing, and ends the rank's process once another rank failed.

A collective whose peer has died may wait for ever. The watchdog's thread takes part in no collective, so that it
goes on watching. Ranks publish and read heartbeats (`autopart.runtime.heartbeat`).
"""

import atexit
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist

from autopart.errors import PartitionError
from autopart.runtime.activity import Activity
from autopart.runtime.heartbeat import FAILED, FINISHED, RUNNING, Blame, Heartbeat, HeartbeatStore, hung, last_known

SHOWN = 8
"""The most other ranks whose last heartbeats a failing rank prints."""


class _Watchdog(threading.Thread):
    def __init__(
        self,
        store: HeartbeatStore,
        rank: int,
        hosts_store: bool,
        activity: Activity,
        interval: float,
        patience: float,
        hang_timeout: float | None,
    ) -> None:
        super().__init__(name="autopart watchdog", daemon=True)
        self.store, self.rank, self.hosts_store = store, rank, hosts_store
        self.activity, self.interval, self.patience, self.hang_timeout = activity, interval, patience, hang_timeout
        # A death may show first in the error of a peer: seconds to wait for the dead rank's silence.
        self.grace = max(2.0, 4 * interval)
        self.own = Heartbeat(0, RUNNING, activity.text)
        self.heartbeats: dict[int, Heartbeat] = {}
        self.silence: dict[int, float] = {}
        self.last_round = time.monotonic()
        self.first_failure: float | None = None
        self.finished_at: float | None = None
        self.failure: Heartbeat | None = None
        self.wake, self.decided = threading.Event(), threading.Event()

    def run(self) -> None:
        try:
            while not self.round():
                self.wake.wait(self.interval)
                self.wake.clear()
        except dist.DistError:
            self._store_gone()
        self.decided.set()

    def round(self) -> bool:
        """Publish a heartbeat and read those of the others. True once this rank's watch is over."""
        self.own = self._next_heartbeat()
        self.store.publish(self.rank, self.own)
        self._listen()
        if self.own.state == FINISHED:
            return self._may_leave()
        blame = self._blame() or hung(self.heartbeats, self.hang_timeout)
        if blame is None:
            return False
        self._end(self.store.blame(blame))
        return True

    def _next_heartbeat(self) -> Heartbeat:
        beat = self.own.beat + 1
        if self.failure is not None:
            order = self.own.failure_order or self.store.next_failure()
            return Heartbeat(beat, FAILED, self.failure.doing, self.failure.error, order)
        if self.finished_at is not None:
            return Heartbeat(beat, FINISHED, "nothing")
        seconds, idle, blocked = self.activity.progress()
        return Heartbeat(beat, RUNNING, self.activity.text, seconds=seconds, idle=idle, blocked=blocked)

    def _listen(self) -> None:
        """Note for how many seconds every other rank has been silent.

        One round adds at most two intervals: where all ranks were suspended together, none has failed.
        """
        now = time.monotonic()
        elapsed, self.last_round = min(now - self.last_round, 2 * self.interval), now
        heartbeats = self.store.heartbeats()
        for rank, heartbeat in heartbeats.items():
            moved = rank not in self.heartbeats or self.heartbeats[rank].beat != heartbeat.beat
            self.silence[rank] = 0.0 if moved else self.silence[rank] + elapsed
        self.heartbeats = heartbeats

    def _may_leave(self) -> bool:
        """Whether this rank may end. A rank that hosts the store waits until no other rank runs."""
        assert self.finished_at is not None
        waited = time.monotonic() - self.finished_at
        others = (heartbeat.state for rank, heartbeat in self.heartbeats.items() if rank != self.rank)
        return not self.hosts_store or waited > self.patience or RUNNING not in others

    def _blame(self) -> Blame | None:
        """The rank because of which all ranks should end; None where no rank has failed or it is too early to tell."""
        running = [r for r, heartbeat in self.heartbeats.items() if r != self.rank and heartbeat.state == RUNNING]
        most_silent = max(running, key=self.silence.__getitem__, default=self.rank)
        if self.silence[most_silent] >= self.patience:
            return Blame(most_silent, "fell silent")
        failed = [r for r, heartbeat in self.heartbeats.items() if heartbeat.state == FAILED]
        if not failed:
            return None
        now = time.monotonic()
        self.first_failure = self.first_failure or now
        # A rank that failed by itself is given time to print its traceback.
        if now - self.first_failure < self.grace + (0.0 if self.failure else 1.0):
            return None
        if self.silence[most_silent] >= self.grace - self.interval:
            return Blame(most_silent, "fell silent")
        return Blame(min(failed, key=lambda rank: self.heartbeats[rank].failure_order), "failed")

    def _end(self, blame: Blame) -> None:
        """Print the rank at fault. A rank that hung prints its stack. End this process, unless an error is ending it
        already."""
        culprit, how = blame
        if culprit != self.rank:
            _report(f"rank {culprit} {how} {last_known(self.heartbeats.get(culprit))}; ending rank {self.rank}")
        elif how == "hung":
            _report(f"rank {culprit} hung while at {self.own.doing} for {self.own.seconds:.0f} s, here:")
            faulthandler.dump_traceback(2)
        if self.failure is None:
            _exit()

    def _store_gone(self) -> None:
        """End this process, unless it has finished, or rank 0 hosted the store and has finished."""
        host = self.heartbeats.get(0)
        host_left = host is not None and host.state == FINISHED and not _agent_hosts_store()
        if host_left or self.finished_at is not None:
            return
        whose = "with the launcher" if _agent_hosts_store() else f"with rank 0, which left {last_known(host)}"
        _report(f"the store is gone {whose}; ending rank {self.rank} while at {self.activity.text}")
        if self.failure is None:
            _exit()

    def fail(self, error: BaseException) -> None:
        """Publish this rank's failure, and wait until it is known whether another rank's failure was its cause."""
        first_line = (str(error).splitlines() or [""])[0]
        if isinstance(error, PartitionError) and error.why:
            first_line += f" ({' '.join(error.why.split())})"
        self.failure = Heartbeat(0, FAILED, self.activity.text, f"{type(error).__name__}: {first_line}")
        self.wake.set()
        _report(f"rank {self.rank} failed {last_known(self.failure)}{self._heard()}")
        self.decided.wait(self.grace + 2 * self.interval + 1.0)

    def _heard(self) -> str:
        others = sorted((rank for rank in self.heartbeats if rank != self.rank), key=lambda r: -self.silence[r])
        told = "; ".join(f"rank {rank} {last_known(self.heartbeats[rank])}" for rank in others[:SHOWN])
        return f" (the others: {told})" if told else ""

    def finish(self) -> None:
        """Publish that this rank has finished."""
        self.finished_at = time.monotonic()
        self.wake.set()
        self.join(self.patience + 2 * self.interval)


_running: _Watchdog | None = None


def check_timeout(hang_timeout: float | None) -> None:
    """Raise PartitionError for a number of seconds that is not positive."""
    if hang_timeout is not None and not hang_timeout > 0:
        raise PartitionError(f"hang_timeout={hang_timeout!r} is not positive", try_="hang_timeout=600, or None")


def start_watchdog(
    activity: Activity, interval: float = 0.5, patience: float = 15.0, hang_timeout: float | None = None
) -> None:
    """Watch the other ranks from now on, and be watched by them. A process on its own starts nothing.

    activity      what this rank is doing
    interval      seconds between two heartbeats
    patience      seconds of silence after which a rank counts as dead; longer than any call that holds the GIL
    hang_timeout  seconds in which no rank makes progress, while not all are idle, after which the ranks are ended;
                  None: none

    After `patience` seconds of a rank's silence, or a few seconds after its failure, this process ends with status 1,
    after a line on stderr that names the rank and what it was doing. A rank that dies before its first heartbeat goes
    unnoticed. An uncaught error is told to the others, as is the interpreter's normal exit.
    Call it after torch.distributed is initialized; once it runs, another call only changes `activity`, and
    `hang_timeout` where one is given. Raises PartitionError where the environment does not tell the store,
    torch.distributed.DistError where that does not answer.
    """
    global _running
    if _running is not None:
        _running.activity, _running.hang_timeout = activity, hang_timeout or _running.hang_timeout
        return
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    store, rank = _connect(os.environ, patience)
    hosts_store = rank == 0 and not _agent_hosts_store()
    _running = _Watchdog(store, rank, hosts_store, activity, interval, patience, hang_timeout)
    _running.round()
    _running.start()
    atexit.register(finish)
    sys.excepthook = _excepthook


def report_failure(error: BaseException) -> None:
    """Tell every rank that this rank failed, with the error's first line and what the rank was doing.

    Returns after about 2 s (4 intervals if that is longer): where another rank's death is the cause of the error, the
    launcher is to notice that death first. A second call does nothing, nor does a call without a watchdog.
    """
    if _running is not None and _running.failure is None:
        _running.fail(error)


def finish() -> None:
    """Tell every rank that this rank has finished, and stop watching."""
    global _running
    if _running is None:
        return
    atexit.unregister(finish)
    if sys.excepthook is _excepthook:
        sys.excepthook = _other_excepthook
    if _running.failure is None:
        _running.finish()
    _running = None


_other_excepthook = sys.excepthook


def _excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    report_failure(error)
    _other_excepthook(kind, error, traceback)


def _agent_hosts_store() -> bool:
    """Whether the launcher, not rank 0, hosts the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _connect(environment: Mapping[str, str], patience: float) -> tuple[HeartbeatStore, int]:
    """This rank, and a connection of its own to torch.distributed's store, which does not queue behind torch's
    requests."""
    try:
        address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    except KeyError as missing:
        raise PartitionError(
            "the watchdog cannot find the other ranks",
            f"{missing.args[0]} is not set",
            "start the processes by torchrun or by autopart's launcher",
        ) from None
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=patience))
    # A store that rank 0 hosts is a new one after a restart, of which agents of several hosts have other counts.
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0") if _agent_hosts_store() else "0"
    return HeartbeatStore(store, world, attempt), rank


def _report(message: str) -> None:
    """Print to stderr past Python's buffers, whose locks a hanging main thread may hold."""
    os.write(2, f"autopart: {message}\n".encode())


def _exit() -> None:
    """End the process whatever the main thread is doing. Python's stdout buffer has one second to be written."""
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)
    flush.start()
    flush.join(1.0)
    os._exit(1)
