"""A thread on every rank that tells the others what the rank is doing, and ends it once another has failed.

A collective whose peer has died may wait for ever; this thread does not take part in any, so it goes on
watching. Every rank says its word through the store that torch.distributed met at.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist

from autopart.errors import PartitionError
from autopart.runtime.executor import Executor

RUNNING, FAILED, FINISHED = "running", "failed", "finished"

SHOWN = 8
"""A failing rank tells of so many others at most."""


@dataclass(frozen=True)
class Word:
    """What a rank last said of itself.

    beat    counts its words: one that stands still tells of a rank that has stopped
    state   RUNNING, FAILED or FINISHED
    doing   what it was at
    error   the first line of the error, of a rank that failed
    order   1 for the first rank that failed, 2 for the second, ...
    """

    beat: int
    state: str
    doing: str
    error: str = ""
    order: int = 0


def last_said(word: Word | None) -> str:
    """The end of a sentence about a rank: what it was doing, as of its last word."""
    if word is None:
        return "before its watchdog said anything"
    if word.state == FAILED:
        return f"while at {word.doing}: {word.error}"
    if word.state == FINISHED:
        return "after it had finished"
    return f"while at {word.doing}, when last heard"


class Channel:
    """What the ranks say to each other, and to a launcher, through a store.

    `attempt` keeps apart the words of processes that an agent has restarted. Every method raises
    torch.distributed.DistError once the store is gone.
    """

    def __init__(self, store: dist.Store, world: int, attempt: str = "0") -> None:
        self.world = world
        self._store = dist.PrefixStore(f"autopart/{attempt}", store)
        self._known: set[int] = set()

    def say(self, rank: int, word: Word) -> None:
        """Publish what a rank says of itself."""
        self._store.set(str(rank), json.dumps(asdict(word)))

    def words(self) -> dict[int, Word]:
        """The last word of every rank that has said one."""
        unheard = set(range(self.world)) - self._known
        self._known.update(rank for rank in unheard if self._store.check([str(rank)]))
        known = sorted(self._known)
        texts = self._store.multi_get([str(rank) for rank in known]) if known else []
        return {rank: Word(**json.loads(text)) for rank, text in zip(known, texts, strict=True)}

    def next_failure(self) -> int:
        """1 for the first caller, 2 for the second, ..."""
        return self._store.add("failures", 1)

    def blame(self, rank: int) -> int:
        """Name the rank that all ends for; the one that was named first counts and is returned."""
        return int(self._store.compare_set("blamed", "", str(rank)))

    def blamed(self) -> int | None:
        """The rank that a watchdog has named, if one has."""
        return int(self._store.get("blamed")) if self._store.check(["blamed"]) else None


class _Watchdog(threading.Thread):
    def __init__(
        self,
        channel: Channel,
        rank: int,
        hosts_store: bool,
        doing: Callable[[], str],
        interval: float,
        patience: float,
    ) -> None:
        super().__init__(name="autopart watchdog", daemon=True)
        self.channel, self.rank, self.hosts_store = channel, rank, hosts_store
        self.doing, self.interval, self.patience = doing, interval, patience
        # A death may show first in the error of a peer: seconds to wait for the dead rank's silence.
        self.grace = max(2.0, 4 * interval)
        self.word = Word(0, RUNNING, self._at())
        self.words: dict[int, Word] = {}
        self.silence: dict[int, float] = {}
        self.last_round = time.monotonic()
        self.first_failure: float | None = None
        self.finished_at: float | None = None
        self.failure: Word | None = None
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
        """Say a word and hear the others'; whether this rank's watch is over."""
        self.word = self._next_word()
        self.channel.say(self.rank, self.word)
        self._listen()
        if self.word.state == FINISHED:
            return self._may_leave()
        culprit = self._culprit()
        if culprit is None:
            return False
        self._end(self.channel.blame(culprit))
        return True

    def _at(self) -> str:
        try:
            return self.doing()
        except Exception as error:
            return f"something that cannot be told ({error!r})"

    def _next_word(self) -> Word:
        beat = self.word.beat + 1
        if self.failure is not None:
            order = self.word.order or self.channel.next_failure()
            return Word(beat, FAILED, self.failure.doing, self.failure.error, order)
        if self.finished_at is not None:
            return Word(beat, FINISHED, "nothing")
        return Word(beat, RUNNING, self._at())

    def _listen(self) -> None:
        """Note for how long every other rank has been silent, in seconds.

        A round adds little even after a long pause: where all ranks were suspended together, none has failed.
        """
        now = time.monotonic()
        elapsed, self.last_round = min(now - self.last_round, 2 * self.interval), now
        words = self.channel.words()
        for rank, word in words.items():
            moved = rank not in self.words or self.words[rank].beat != word.beat
            self.silence[rank] = 0.0 if moved else self.silence[rank] + elapsed
        self.words = words

    def _may_leave(self) -> bool:
        """Whether the others can do without this rank: the one that hosts the store waits for their end."""
        assert self.finished_at is not None
        waited = time.monotonic() - self.finished_at
        others = (word.state for rank, word in self.words.items() if rank != self.rank)
        return not self.hosts_store or waited > self.patience or RUNNING not in others

    def _culprit(self) -> int | None:
        """The rank that all should end for; None while there is none or it is too early to tell."""
        running = [r for r, word in self.words.items() if r != self.rank and word.state == RUNNING]
        stillest = max(running, key=self.silence.__getitem__, default=self.rank)
        if self.silence[stillest] >= self.patience:
            return stillest
        failed = [r for r, word in self.words.items() if word.state == FAILED]
        if not failed:
            return None
        now = time.monotonic()
        self.first_failure = self.first_failure or now
        # A rank that failed by itself is left the time to show its traceback.
        if now - self.first_failure < self.grace + (0.0 if self.failure else 1.0):
            return None
        if self.silence[stillest] >= self.grace - self.interval:
            return stillest
        return min(failed, key=lambda rank: self.words[rank].order)

    def _end(self, culprit: int) -> None:
        """Name the rank at fault; end this process unless an error is ending it already."""
        if culprit != self.rank:
            word = self.words.get(culprit)
            how = "failed" if word and word.state == FAILED else "fell silent"
            _report(f"rank {culprit} {how} {last_said(word)}; ending rank {self.rank}")
        if self.failure is None:
            _exit()

    def _store_gone(self) -> None:
        """End this process, unless it is done or the store went with a rank 0 that had finished."""
        host = self.words.get(0)
        host_left = host is not None and host.state == FINISHED and not _agent_hosts_store()
        if host_left or self.finished_at is not None:
            return
        whose = "with the launcher" if _agent_hosts_store() else f"with rank 0, which left {last_said(host)}"
        _report(f"the store is gone {whose}; ending rank {self.rank} while at {self._at()}")
        if self.failure is None:
            _exit()

    def fail(self, error: BaseException) -> None:
        """Tell of this rank's failure, and wait until it is clear whether another rank's was the cause."""
        first_line = (str(error).splitlines() or [""])[0]
        self.failure = Word(0, FAILED, self._at(), f"{type(error).__name__}: {first_line}")
        self.wake.set()
        _report(f"rank {self.rank} failed {last_said(self.failure)}{self._heard()}")
        self.decided.wait(self.grace + 2 * self.interval + 1.0)

    def _heard(self) -> str:
        others = sorted((rank for rank in self.words if rank != self.rank), key=lambda r: -self.silence[r])
        told = "; ".join(f"rank {rank} {last_said(self.words[rank])}" for rank in others[:SHOWN])
        return f" (the others: {told})" if told else ""

    def finish(self) -> None:
        """Tell that this rank is done."""
        self.finished_at = time.monotonic()
        self.wake.set()
        self.join(self.patience + 2 * self.interval)


_running: _Watchdog | None = None


def start_watchdog(doing: Callable[[], str], interval: float = 0.5, patience: float = 15.0) -> None:
    """Watch over the other ranks from now on, and be watched by them; nothing to do for a process on its own.

    doing      says what this rank is at; called from another thread
    interval   seconds between two words
    patience   seconds of silence after which a rank counts as dead; longer than any call that holds the GIL

    Within `patience` of a rank's silence or seconds of its failure, this process ends with status 1, after a
    line on stderr that names the rank and what it was doing. A rank that dies before its first word goes
    unnoticed. An uncaught error is told to the others, as is the interpreter's normal exit.
    Call it after torch.distributed is initialized; once it runs, another call only changes `doing`. Raises
    PartitionError where the environment does not tell the store, torch.distributed.DistError where that does
    not answer.
    """
    global _running
    if _running is not None:
        _running.doing = doing
        return
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    channel, rank = _connect(os.environ, patience)
    hosts_store = rank == 0 and not _agent_hosts_store()
    _running = _Watchdog(channel, rank, hosts_store, doing, interval, patience)
    _running.round()
    _running.start()
    atexit.register(finish)
    sys.excepthook = _excepthook


def report_failure(error: BaseException) -> None:
    """Tell every rank that this one failed, with the error's first line and what it was doing.

    Returns after about 2 s (4 intervals if that is longer): should the error come of another rank's death, a
    launcher is to notice that one first. A second call, or one without a watchdog, does nothing.
    """
    if _running is not None and _running.failure is None:
        _running.fail(error)


def finish() -> None:
    """Tell every rank that this one is done, and stop watching."""
    global _running
    if _running is None:
        return
    atexit.unregister(finish)
    if sys.excepthook is _excepthook:
        sys.excepthook = _other_excepthook
    if _running.failure is None:
        _running.finish()
    _running = None


@contextmanager
def watched(executor: Executor, interval: float = 0.5, patience: float = 15.0) -> Iterator[None]:
    """start_watchdog and finish around a block, whose error is told to the others and raised again."""
    start_watchdog(lambda: executor.doing, interval, patience)
    try:
        yield
    except BaseException as error:
        if not (isinstance(error, SystemExit) and not error.code):
            report_failure(error)
        raise
    finally:
        finish()


_other_excepthook = sys.excepthook


def _excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    report_failure(error)
    _other_excepthook(kind, error, traceback)


def _agent_hosts_store() -> bool:
    """Whether a launcher, not rank 0, holds the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _connect(environment: Mapping[str, str], patience: float) -> tuple[Channel, int]:
    """A connection to torch.distributed's store that does not queue behind torch's own requests."""
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
    return Channel(store, world, environment.get("TORCHELASTIC_RESTART_COUNT", "0")), rank


def _report(message: str) -> None:
    """Past Python's own buffers, whose locks a hanging main thread may hold."""
    os.write(2, f"autopart: {message}\n".encode())


def _exit() -> None:
    """End the process whatever the main thread is at; what it has printed is given a second to get out."""
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)
    flush.start()
    flush.join(1.0)
    os._exit(1)
