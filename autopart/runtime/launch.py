"""Starts one process for each rank on this machine, and ends all of them when one fails."""

from __future__ import annotations

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
from autopart.runtime.watchdog import FAILED, Channel, Word, last_said

POLL = 0.1
"""Seconds between two looks at the processes."""

GATHER = 0.5
"""Seconds after the first death in which others are gathered, to find the one that came first."""

MERCY = 3.0
"""Seconds from SIGTERM to SIGKILL."""


@dataclass(frozen=True)
class _Death:
    rank: int
    status: int
    seen: float


def launch(command: Sequence[str], processes: int, env: Mapping[str, str] | None = None) -> int:
    """Run `command` as that many ranks on this machine until all have ended; the exit status.

    `env` is their environment (this process's by default), to which what torch.distributed asks for is
    added. The status is 0 if all went well; otherwise that of the rank which failed first, 128 + the number
    for a signal, after a message on stderr that names it and, where it has a watchdog, what it was doing.
    Every other rank is then ended; so are all of them on Ctrl-C (130) and SIGTERM (143).
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
            deaths = _first_deaths(children)
            if not deaths:
                return 0
            channel = Channel(store, processes)
            return _tell(deaths, channel.words(), channel.blamed(), processes)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        finally:
            _end(children)


def cores_here() -> int:
    """The cores that processes started here have between them."""
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


def _first_deaths(children: Sequence[subprocess.Popen[bytes]]) -> list[_Death]:
    """Wait until all have ended, or one has failed; the failures, with those shortly after the first."""
    deaths: dict[int, _Death] = {}
    while True:
        now = time.monotonic()
        statuses = [child.poll() for child in children]
        for rank, status in enumerate(statuses):
            if status:
                deaths.setdefault(rank, _Death(rank, status, now))
        first = min((death.seen for death in deaths.values()), default=now)
        if None not in statuses or now - first >= GATHER:
            return list(deaths.values())
        time.sleep(POLL)


def _tell(deaths: Sequence[_Death], words: Mapping[int, Word], blamed: int | None, processes: int) -> int:
    """Print which rank failed and how; the exit status."""
    death = _first(deaths, words)
    if blamed is not None:
        death = next((d for d in deaths if d.rank == blamed), _Death(blamed, 0, death.seen))
    word = words.get(death.rank)
    ending = f"; ending the other {processes - 1} rank{'s' * (processes > 2)}" if processes > 1 else ""
    how = _how(death.status, word)
    print(f"autopart: rank {death.rank} {how} {last_said(word)}{ending}", file=sys.stderr, flush=True)
    return 128 - death.status if death.status < 0 else death.status or 1


def _first(deaths: Sequence[_Death], words: Mapping[int, Word]) -> _Death:
    """The death behind the others.

    Of those within two looks of the first, one by a signal, then one that its watchdog did not tell of, then
    the one that was told of first: a rank whose peer has gone tells of an error.
    """
    start = min(death.seen for death in deaths)
    close = [death for death in deaths if death.seen - start < 2.5 * POLL]

    def order(death: _Death) -> tuple[bool, int, float]:
        word = words.get(death.rank)
        return death.status > 0, word.order if word else 0, death.seen

    return min(close, key=order)


def _how(status: int, word: Word | None) -> str:
    if status > 0:
        return f"failed with exit status {status}"
    if status < 0:
        return f"was killed by {_signal_name(-status)}"
    return "failed" if word and word.state == FAILED else "fell silent"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what still runs: SIGTERM, then SIGKILL."""
    for child in children:
        child.terminate()
    deadline = time.monotonic() + MERCY
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
    """Let SIGTERM unwind the stack, so that no rank is left behind; only the main thread may set that."""

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
