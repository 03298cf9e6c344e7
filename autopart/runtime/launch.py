"""Starts one process for each rank on this machine, and ends all of them when one fails.

torchrun's agent (torch.distributed.launcher) does the same, but closes its store before its caller can read from it
what the failed rank was doing, by default waits up to 30 s for the other ranks to end, and takes the first process to
exit for the one that failed first, which may be a peer that lost its connection.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch.distributed as dist

from autopart.errors import PartitionError
from autopart.runtime.heartbeat import RUNNING, Blame, Heartbeat, HeartbeatStore, last_known

POLL_SECONDS = 0.1
"""Seconds between two looks at the processes."""

SETTLE_SECONDS = 0.5
"""Seconds after the first death in which further deaths are collected, to find the one that caused the others."""

KILL_SECONDS = 3.0
"""Seconds from SIGTERM to SIGKILL."""


@dataclass(frozen=True)
class _Death:
    """The end of a rank that failed, when it was seen; `status` is None where the process is still there."""

    rank: int
    status: int | None
    seen: float


def launch(command: Sequence[str], processes: int, env: Mapping[str, str] | None = None) -> int:
    """Run a command as the ranks of this machine until all have ended; the exit status.

    command    the command line of every rank
    processes  number of ranks
    env        environment of the ranks (default: this process's); the variables of torch.distributed are added

    The status is 0 if every rank's is. Otherwise the status is that of the rank which failed first, or 128 + the number
    of the signal that ended it; a line on stderr names the rank and, where a watchdog ran, what it was doing, and every
    other rank is ended. Ctrl-C (130) and SIGTERM (143) end all ranks.

    Raises PartitionError for fewer than one process, OSError where the command cannot be run.
    """
    if processes < 1:
        raise PartitionError(f"{processes} processes cannot be started", try_="1 or more")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children: list[subprocess.Popen[bytes]] = []
    with _sigterm_raises():
        try:
            for rank in range(processes):
                environment = _environment(os.environ if env is None else env, rank, processes, store.port)
                children.append(subprocess.Popen(list(command), env=environment))
            heard = HeartbeatStore(store, processes)
            deaths = _first_deaths(children, heard)
            if not deaths:
                return 0
            return _report(deaths, heard.heartbeats(), heard.blamed(), processes)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        finally:
            _end(children)


def cores_here() -> int:
    """The number of cores that this process and its children may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _environment(base: Mapping[str, str], rank: int, processes: int, port: int) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(max(1, cores_here() // processes)),
        **base,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # torch then takes every rank for a client of the store here, rank 0 too.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _first_deaths(children: Sequence[subprocess.Popen[bytes]], heard: HeartbeatStore) -> list[_Death]:
    """Wait until all ranks have ended, or until SETTLE_SECONDS after one has failed; the failures until then.

    A rank that ended with status 0 has failed if its watchdog did not say that it had finished: it called os._exit.
    """
    deaths: dict[int, _Death] = {}
    finished: set[int] = set()
    while True:
        now = time.monotonic()
        statuses = [child.poll() for child in children]
        for rank, status in enumerate(statuses):
            if status is None or rank in deaths or rank in finished:
                continue
            heartbeat = None if status else heard.heartbeats().get(rank)
            if status or (heartbeat and heartbeat.state == RUNNING):
                deaths[rank] = _Death(rank, status, now)
            else:
                finished.add(rank)
        first = min((death.seen for death in deaths.values()), default=now)
        if None not in statuses or now - first >= SETTLE_SECONDS:
            return list(deaths.values())
        time.sleep(POLL_SECONDS)


def _report(deaths: Sequence[_Death], heartbeats: Mapping[int, Heartbeat], blamed: Blame | None, processes: int) -> int:
    """Print which rank failed and how; the exit status."""
    death = _cause(deaths, heartbeats)
    if blamed is not None:
        death = next((d for d in deaths if d.rank == blamed.rank), _Death(blamed.rank, None, death.seen))
    heartbeat = heartbeats.get(death.rank)
    ending = f"; ending the other {processes - 1} rank{'s' * (processes > 2)}" if processes > 1 else ""
    how = _how(death.status, blamed)
    print(f"autopart: rank {death.rank} {how} {last_known(heartbeat)}{ending}", file=sys.stderr, flush=True)
    return 128 - death.status if death.status and death.status < 0 else death.status or 1


def _cause(deaths: Sequence[_Death], heartbeats: Mapping[int, Heartbeat]) -> _Death:
    """The death that caused the others.

    Among the deaths within two polls of the first: a death by a signal before others, then a rank whose watchdog
    reported no failure, then the failure that was reported first. A rank whose peer has died reports an error.
    """
    start = min(death.seen for death in deaths)
    close = [death for death in deaths if death.seen - start < 2.5 * POLL_SECONDS]

    def order(death: _Death) -> tuple[bool, int, float]:
        heartbeat = heartbeats.get(death.rank)
        return (death.status or 0) > 0, heartbeat.failure_order if heartbeat else 0, death.seen

    return min(close, key=order)


def _how(status: int | None, blamed: Blame | None) -> str:
    if blamed and (status is None or blamed.how == "hung"):
        return blamed.how
    assert status is not None
    if status < 0:
        return f"was killed by {_signal_name(-status)}"
    return f"{'failed' if status else 'left'} with exit status {status}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the ranks that still run: SIGTERM, then SIGKILL."""
    for child in children:
        child.terminate()
    deadline = time.monotonic() + KILL_SECONDS
    try:
        for child in children:
            child.wait(max(0.0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    finally:
        for child in children:
            child.kill()
            child.wait()


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Make SIGTERM raise SystemExit, so that no rank is left running. Only the main thread may set a signal handler."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
