"""What a rank does, told while it does it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autopart.runtime.process_group import Group


@dataclass(frozen=True)
class Event:
    """Something that a rank does.

    op           "forward", "backward", "send", "recv", "send_grad", "recv_grad", "reduce" (gradients over ranks), or
                 "step" (clipping and the optimizer)
    stage        the rank's stage
    step         batches that were trained before
    micro_batch  from 0; -1 for "reduce" and "step"
    peer         the other stage of a message; -1 otherwise
    """

    op: str
    stage: int
    step: int
    micro_batch: int = -1
    peer: int = -1


class Callback:
    """Called around all that a rank does in steps and evaluations: derive from it, and append to
    `compiled.callbacks`. An exception ends the step."""

    def before(self, event: Event) -> None:
        """Called before a rank begins something."""

    def after(self, event: Event, seconds: float) -> None:
        """Called when it has ended. Seconds are of the host: a GPU may still compute what was started."""

    def trained(self, step: int, loss: float, seconds: float) -> None:
        """Called after every update, with the number of the batch from 0, its loss, and the seconds since the update
        before, or since compile."""


@contextmanager
def told(callbacks: Sequence[Callback], event: Event) -> Iterator[None]:
    """Tell callbacks of what is done meanwhile."""
    for callback in callbacks:
        callback.before(event)
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    for callback in callbacks:
        callback.after(event, seconds)


class JsonLines(Callback):
    """A line of JSON at the end of a file for every update: step, loss, seconds, and `extra`."""

    def __init__(self, file: str | Path, **extra: Any) -> None:
        self.file, self.extra = Path(file), extra

    def trained(self, step: int, loss: float, seconds: float) -> None:
        with self.file.open("a") as lines:
            lines.write(json.dumps({"step": step, "loss": loss, "seconds": seconds, **self.extra}) + "\n")


class Trace(Callback):
    """What ranks did, on a clock, for Perfetto or chrome://tracing: a process for each stage, a thread for each rank,
    as in the trace that `autopart.timeline` predicts."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def after(self, event: Event, seconds: float) -> None:
        started = (time.time() - seconds) * 1e6
        name = event.op if event.micro_batch < 0 else f"{event.op} {event.micro_batch}"
        self.events.append(
            {"name": name, "ph": "X", "pid": event.stage, "ts": started, "dur": seconds * 1e6, "args": asdict(event)}
        )

    def save(self, file: str | Path, host: Group) -> None:
        """Write the events of all ranks into one file, on rank 0. All ranks call it, with `compiled.groups.host`."""
        everyone = host.gather(self.events)
        events = [{**event, "tid": rank} for rank, mine in enumerate(everyone) for event in mine]
        first = min((event["ts"] for event in events), default=0.0)
        if host.rank == 0:
            shown = [{**event, "ts": event["ts"] - first} for event in events]
            Path(file).write_text(json.dumps({"displayTimeUnit": "ms", "traceEvents": shown}))
