"""Callbacks: functions that are called before and after each thing that a rank does."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autopart.runtime.process_group import Group

RECOMPUTE = "recompute"
"""The op of an event that is no instruction of its own: the backward of its micro-batch has its seconds too."""


@dataclass(frozen=True)
class Event:
    """An instruction that a rank runs, or the recompute of one block inside of a backward.

    op           "forward", "backward", "send", "recv", "send_grad", "recv_grad", "reduce" (sums of gradients over
                 ranks), "step" (clipping and the optimizer), or "recompute" (a checkpointed block runs again)
    stage        index of the rank's stage
    step         number of batches that were trained before
    micro_batch  index of the micro-batch; -1 for "reduce" and "step"
    peer         index of the other stage of a message; -1 otherwise
    """

    op: str
    stage: int
    step: int
    micro_batch: int = -1
    peer: int = -1


class Callback:
    """Called around every instruction of steps and evaluations, around every block that a backward recomputes, and
    after every update.

    Derive a class from this one, and append an object of it to `compiled.callbacks`. An exception in a callback ends
    the step.
    """

    def before(self, event: Event) -> None:
        """Called before the rank begins an instruction."""

    def after(self, event: Event, seconds: float) -> None:
        """Called after an instruction that raised no error. `seconds` are those of the host: a GPU may still
        compute what was started."""

    def trained(self, step: int, loss: float, seconds: float) -> None:
        """Called after every update.

        step     number of the last batch, from 0
        loss     of the last batch, the same on every rank
        seconds  since the update before; of the first update, since compile
        """


@contextmanager
def notifying(callbacks: Sequence[Callback], event: Event, always: bool = False) -> Iterator[None]:
    """Call `before` of all callbacks, run the block, and call `after` with the block's seconds.

    always  whether `after` is called where the block ends by an exception too: torch ends a recompute by one, as soon
            as it has every tensor that backward reads
    """
    for callback in callbacks:
        callback.before(event)
    started, ended = time.perf_counter(), always
    try:
        yield
        ended = True
    finally:
        if ended:
            seconds = time.perf_counter() - started
            for callback in callbacks:
                callback.after(event, seconds)


class JsonLines(Callback):
    """Appends a line of JSON to a file for every update: step, loss, seconds, and `extra`."""

    def __init__(self, file: str | Path, **extra: Any) -> None:
        self.file, self.extra = Path(file), extra

    def trained(self, step: int, loss: float, seconds: float) -> None:
        with self.file.open("a") as lines:
            lines.write(json.dumps({"step": step, "loss": loss, "seconds": seconds, **self.extra}) + "\n")


class Trace(Callback):
    """Records what ranks did when, for Perfetto or chrome://tracing.

    A stage is a process of the trace and a rank is a thread, as in the trace that `autopart.timeline` predicts.
    """

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def after(self, event: Event, seconds: float) -> None:
        started = (time.time() - seconds) * 1e6
        name = event.op if event.micro_batch < 0 else f"{event.op} {event.micro_batch}"
        self.events.append(
            {"name": name, "ph": "X", "pid": event.stage, "ts": started, "dur": seconds * 1e6, "args": asdict(event)}
        )

    def save(self, file: str | Path, host: Group) -> None:
        """Write the events of all ranks into one file of JSON, on rank 0.

        host  `compiled.groups.host`

        All ranks call this method. Times are in microseconds since the first event.
        """
        gathered = self.gather(host)
        if host.rank == 0:
            Path(file).write_text(json.dumps(gathered))

    def gather(self, host: Group) -> dict[str, Any]:
        """The events of all ranks in Chrome's Trace Event Format: what `save` writes. All ranks call this method."""
        everyone = host.gather(self.events)
        events = [{**event, "tid": rank} for rank, mine in enumerate(everyone) for event in mine]
        first = min((event["ts"] for event in events), default=0.0)
        return {"displayTimeUnit": "ms", "traceEvents": [{**event, "ts": event["ts"] - first} for event in events]}
