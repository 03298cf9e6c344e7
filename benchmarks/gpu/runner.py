"""Runs items in processes of their own, one after the other or side by side, and writes what each found at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple, TextIO

Record = dict[str, Any]
OUT_OF_MEMORY = "OutOfMemoryError"
"""In the status of an item that lacked memory."""


class Named(NamedTuple):
    """An item by name, its group, and the seconds that it may take."""

    name: str
    group: str
    seconds: float


class Worker:
    """A process that runs one item at a time."""

    def __init__(self, dry: bool) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.gpu.items"])
        self.connection, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, dry), daemon=False)
        self.item: Named | None = None
        self.deadline = 0.0
        self.process.start()
        there.close()
        try:
            self.items = [Named(*item) for item in self.connection.recv()]
        except BaseException:
            self.stop()
            raise

    def give(self, item: Named, losses: Mapping[str, float], until: float) -> None:
        """Let it run an item, until a time at the latest."""
        self.connection.send((item.name, losses))
        self.item, self.started = item, time.monotonic()
        self.deadline = min(self.started + item.seconds, until)

    def record(self) -> tuple[Record, bool] | None:
        """The record of its item, and whether the process has ended or is to end; None while it runs."""
        assert self.item
        what = {"item": self.item.name, "group": self.item.group}
        took = time.monotonic() - self.started
        if self.connection.poll():
            try:
                record, ends = self.connection.recv()
            except (EOFError, OSError):
                self.process.join()
                status = f"failed: its process ended with status {self.process.exitcode}"
                return {**what, "status": status, "wall_seconds": round(took, 2)}, True
            return record, ends
        if time.monotonic() >= self.deadline:
            return {**what, "status": f"failed: not done after {took:.0f} s", "wall_seconds": round(took, 2)}, True
        return None

    def stop(self) -> None:
        """End it, and what it has started."""
        try:
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        except ProcessLookupError:
            self.process.kill()
        self.process.join()


def _serve(connection: Any, dry: bool) -> None:
    from benchmarks.gpu.items import serve

    serve(connection, dry)


class Run:
    """A run that writes to a file.

    file     of JSON lines, one for each item
    until    `time.monotonic()` at which it ends
    earlier  records that the file has already
    told     is called with every record
    """

    def __init__(self, file: TextIO, dry: bool, until: float, earlier: Iterable[Record],
                 told: Callable[[Record], None]) -> None:  # fmt: skip
        self.file, self.dry, self.until, self.told = file, dry, until, told
        self.records = {record["item"]: record for record in earlier}
        self.left: list[Named] = []

    def all(self, parallel: Mapping[str, int], wanted: Callable[[Named], bool]) -> None:
        """Run the items that are wanted and not done yet, group after group, of each so many at once."""
        first = Worker(self.dry)
        items, idle = first.items, [first]
        for group, count in parallel.items():
            done = {name for name, record in self.records.items() if record["status"].startswith(("ok", "left out"))}
            waiting = [item for item in items if item.group == group and wanted(item) and item.name not in done]
            self._group(waiting, 1 if self.dry else count, idle)
            if not self.dry:
                while idle:
                    idle.pop().stop()
        for worker in idle:
            worker.stop()

    def _group(self, items: list[Named], count: int, idle: list[Worker]) -> None:
        """So many items at once; what lacks memory then is run again, one item at a time."""
        waiting, busy = deque(items), list[Worker]()
        try:
            while waiting or busy:
                while waiting and len(busy) < count and time.monotonic() < self.until:
                    worker = idle.pop() if idle else Worker(self.dry)
                    busy.append(worker)
                    worker.give(waiting.popleft(), self._losses(), self.until)
                if not busy:
                    break
                nearest = min(worker.deadline for worker in busy) - time.monotonic()
                wait([worker.connection for worker in busy], max(nearest, 0))
                for worker in list(busy):
                    if (found := worker.record()) is not None:
                        busy.remove(worker)
                        self._write(found[0])
                        worker.stop() if found[1] else idle.append(worker)
        except BaseException:
            for worker in [*busy, *idle]:
                worker.stop()
            raise
        self.left += waiting
        lacking = [item for item in items if OUT_OF_MEMORY in self.records.get(item.name, {}).get("status", "")]
        if lacking and count > 1:
            self._group(lacking, 1, idle)

    def _losses(self) -> dict[str, float]:
        return {name: record["loss"] for name, record in self.records.items() if "loss" in record}

    def _write(self, record: Record) -> None:
        self.records[record["item"]] = record
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        self.told(record)


def read(path: Path) -> list[Record]:
    """The records of a file, the last of each item; a line that is cut off is left out."""
    found: dict[str, Record] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[record["item"]] = record
    return list(found.values())
