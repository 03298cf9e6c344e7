"""What ranks publish of themselves while they train: heartbeats in the store that torch.distributed met at."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch.distributed as dist

RUNNING, FAILED, FINISHED = "running", "failed", "finished"


class Blame(NamedTuple):
    """The rank because of which all ranks end, and how it failed: "failed", "fell silent" or "hung"."""

    rank: int
    how: str


@dataclass(frozen=True)
class Heartbeat:
    """What a rank last published of itself.

    beat           number of this heartbeat; a rank whose number stands still has stopped
    state          RUNNING, FAILED or FINISHED
    doing          what the rank was doing
    error          first line of the error of a rank that failed
    failure_order  1 for the first rank that failed, 2 for the second, ...; 0 for a rank that did not
    seconds        for which it has been doing that
    idle           whether it is in the user's code, between two steps
    blocked        whether it waits for other ranks
    """

    beat: int
    state: str
    doing: str
    error: str = ""
    failure_order: int = 0
    seconds: float = 0.0
    idle: bool = False
    blocked: bool = False


def last_known(heartbeat: Heartbeat | None) -> str:
    """The end of a sentence about a rank: what the rank was doing at its last heartbeat."""
    if heartbeat is None:
        return "before its watchdog said anything"
    if heartbeat.state == FAILED:
        return f"while at {heartbeat.doing}: {heartbeat.error}"
    if heartbeat.state == FINISHED:
        return "after it had finished"
    return f"while at {heartbeat.doing}, when last heard"


def hung(heartbeats: Mapping[int, Heartbeat], timeout: float | None) -> Blame | None:
    """The rank for which the others wait, once no rank has got on for `timeout` seconds; None before, where a rank has
    failed, and while all are idle.

    It is one that is not blocked, if there is one; of several, the one that has been at the same thing for longest.
    """
    running = {rank: beat for rank, beat in heartbeats.items() if beat.state == RUNNING}
    if timeout is None or any(beat.state == FAILED for beat in heartbeats.values()):
        return None
    shortest = min((beat.seconds for beat in running.values()), default=0.0)
    if shortest < timeout or all(beat.idle for beat in running.values()):
        return None
    return Blame(min(running, key=lambda rank: (running[rank].blocked, -running[rank].seconds)), "hung")


class HeartbeatStore:
    """The heartbeats of all ranks, which the ranks and the launcher read.

    world    number of ranks
    attempt  number of restarts by an agent, which keeps apart the heartbeats of restarted processes

    Every method raises torch.distributed.DistError once the store is gone.
    """

    def __init__(self, store: dist.Store, world: int, attempt: str = "0") -> None:
        self.world = world
        self._store = dist.PrefixStore(f"autopart/{attempt}", store)
        self._known: set[int] = set()

    def publish(self, rank: int, heartbeat: Heartbeat) -> None:
        """Replace the heartbeat of a rank."""
        self._store.set(str(rank), json.dumps(asdict(heartbeat)))

    def heartbeats(self) -> dict[int, Heartbeat]:
        """The last heartbeat of every rank that has published one."""
        unheard = set(range(self.world)) - self._known
        self._known.update(rank for rank in unheard if self._store.check([str(rank)]))
        known = sorted(self._known)
        texts = self._store.multi_get([str(rank) for rank in known]) if known else []
        return {rank: Heartbeat(**json.loads(text)) for rank, text in zip(known, texts, strict=True)}

    def next_failure(self) -> int:
        """1 for the first caller, 2 for the second, ..."""
        return self._store.add("failures", 1)

    def blame(self, blame: Blame) -> Blame:
        """Name the rank because of which all ranks end. The first call counts; what it named is returned."""
        return Blame(*json.loads(self._store.compare_set("blamed", "", json.dumps(blame))))

    def blamed(self) -> Blame | None:
        """What `blame` has named, if anything."""
        return Blame(*json.loads(self._store.get("blamed"))) if self._store.check(["blamed"]) else None
