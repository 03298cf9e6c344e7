"""Ranks of tests/runtime/test_chaos.py, one of which fails while it is at a drawn instruction.

The plans are made once (`prepare`) and written as emitted programs, so that ranks trace nothing. A run makes a step,
saves a checkpoint, makes another step, saves, and loads what it saved.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import launch_forked, redirect
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from watched import watched

import autopart
from autopart.cli.training import write_folder
from autopart.plan.schedules.ops import Instruction, Op
from autopart.runtime.activity import Activity
from autopart.runtime.compiled import Compiled
from autopart.runtime.standalone import read

INTERVAL, PATIENCE, HANG = 0.2, 5.0, 4.0
"""Of the watchdog; HANG where a rank hangs."""
LINGER, SLOW = 3 * INTERVAL, 6.0
"""Seconds for which a rank is at an instruction before it fails, so that the others have heard; and if it is slow."""
SPLIT = ["split first.weight dim 0 over tp"]
PLANS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp": (2, {"tp": 2, "micro_batch": 4, "constraints": SPLIT}),
    "pp": (2, {"pp": 2, "micro_batch": 4}),
    "zero1": (2, {"dp": 2, "zero": 1, "micro_batch": 4}),
    "zero2": (2, {"dp": 2, "zero": 2, "micro_batch": 4}),
    "zero3": (2, {"dp": 2, "zero": 3, "micro_batch": 4}),
    "tp-pp": (4, {"tp": 2, "pp": 2, "micro_batch": 4, "constraints": SPLIT}),
}
"""Ranks and settings of each."""
OPS = {
    "forward": (Op.FORWARD,),
    "backward": (Op.BACKWARD,),
    "send": (Op.SEND, Op.SEND_GRAD),
    "recv": (Op.RECV, Op.RECV_GRAD),
    "reduce": (Op.REDUCE,),
    "step": (Op.STEP,),
}
MESSAGES = ("send", "recv")


@dataclass(frozen=True)
class Case:
    """Rank `rank` of the plan `plan` fails as `kind` says, at an instruction of `op`, or in "save" or "load"; `seed`
    draws which."""

    kind: str
    op: str
    plan: str
    rank: int
    seed: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.op}-{self.plan}-rank{self.rank}-{self.seed}"


class Model(nn.Module):
    """Two stages' worth of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = (self.last(self.second(self.first(x).relu()).relu()) - x).square().mean()
        return loss


def rows(step: int) -> dict[str, Tensor]:
    """The batch of a step."""
    return {"x": torch.randn(8, 8, generator=torch.Generator().manual_seed(step))}


def prepare(folder: Path) -> None:
    """Emit every plan, and write the losses of one process that nothing happens to."""
    model = Model()
    for name, (ranks, settings) in PLANS.items():
        plan = autopart.plan(model, f"{ranks}:cpu", rows(0), nodes=5, **settings)
        write_folder(model, rows(0), plan, folder / name)
    alone = optimized(read(folder / "one"))
    (folder / "losses.json").write_text(json.dumps([float(alone.step(rows(step))) for step in range(3)]))


def optimized(compiled: Compiled) -> Compiled:
    """With an optimizer."""
    compiled.optimizer(torch.optim.AdamW, lr=0.05)
    return compiled


def run_case(plans: Path, folder: Path, case: Case) -> None:
    """Launch the ranks of a case; write their status, and how one process goes on from the last good checkpoint."""
    redirect(folder / "output")
    status = launch_forked(partial(be_a_rank, plans / case.plan, folder, case), PLANS[case.plan][0])
    compiled = optimized(read(plans / "one"))
    position = compiled.load(folder / "checkpoints")["position"]
    result = {"status": status, "position": position, "loss": float(compiled.step(rows(position)))}
    (folder / "result.json").write_text(json.dumps(result))


def be_a_rank(plan: Path, folder: Path, case: Case) -> None:
    """One rank's run."""
    with (folder / "ids").open("a") as file:
        file.write(f"{os.getpid()}\n")
    dist.init_process_group("gloo")
    with watched(Activity(), INTERVAL, PATIENCE, HANG if case.kind == "hang" else None):
        train(optimized(read(plan)), folder, case)
    dist.destroy_process_group()


def train(compiled: Compiled, folder: Path, case: Case) -> None:
    """Two steps, each saved; the second is loaded. The case's rank fails on the way."""
    checkpoints, draw, culprit = folder / "checkpoints", random.Random(case.seed), compiled.rank == case.rank
    checks, waits = draw.random() < 0.5, draw.random() < 0.5
    fail = partial(fail_at, case.kind, compiled.executor.activity, folder)
    compiled.check_batches = checks
    compiled.step(rows(0))
    disk = Disk(checkpoints, only_writes=case.kind == "full")
    compiled.save(checkpoints, extra={"position": 1})
    batch = rows(1)
    if culprit and case.kind == "shape":
        batch = {"x": batch["x"][:, :7] if draw.random() < 0.5 else batch["x"][:6]}
        (folder / "doing").write_text("preparing the batch")
    elif culprit and case.op in OPS:
        at = draw.choice([each for each in compiled.executor.program if each.op in OPS[case.op]])
        compiled.callbacks.append(Fails(at, fail))
    compiled.step(batch)
    if culprit and case.op == "save":
        disk.fail(draw.randint(1, disk.events), fail)
    compiled.save(checkpoints, extra={"position": 2}, wait=waits)
    compiled.wait_saved()
    latest = checkpoints / "step-00000002"
    if case.kind in ("truncated", "flipped"):
        if culprit:
            damage(draw.choice(sorted(f for f in latest.iterdir() if f.name != "manifest.json")), case.kind, draw)
        dist.barrier()
    if culprit and case.op == "load":
        disk.fail(draw.randint(1, 3), fail)
    compiled.load(latest)


def damage(file: Path, kind: str, draw: random.Random) -> None:
    """Cut a file short, or turn one bit over."""
    content = bytearray(file.read_bytes())
    at = draw.randrange(len(content))
    if kind == "truncated":
        del content[at:]
    else:
        content[at] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def fail_at(kind: str, activity: Activity, folder: Path) -> None:
    """Fail, after the others have heard what this rank is at."""
    time.sleep(LINGER)
    (folder / "doing").write_text(activity.text)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind.startswith("exit"):
        os._exit(int(kind[4:]))
    elif kind == "hang":
        time.sleep(3600)
    elif kind == "slow":
        time.sleep(SLOW)
    elif kind == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif kind == "memory":
        raise torch.OutOfMemoryError("Tried to allocate 1 TiB")
    elif kind == "raise":
        raise RuntimeError("no such token\nand more")


class Fails(autopart.Callback):
    """Fails at an instruction; without memory, at its first operator."""

    def __init__(self, at: Instruction, fail: Callable[[], None]) -> None:
        self.at, self.fail = at, fail

    def before(self, event: autopart.Event) -> None:
        at = self.at
        if (event.op, event.micro_batch, event.peer) == (at.op, at.micro_batch, at.peer):
            if self.fail.args[0] == "memory":  # type: ignore[attr-defined]
                NoMemory(self.fail).__enter__()
            else:
                self.fail()


class NoMemory(TorchDispatchMode):
    """Fails at the next operator."""

    def __init__(self, fail: Callable[[], None]) -> None:
        super().__init__()
        self.fail = fail

    def __torch_dispatch__(self, *_: Any, **__: Any) -> Any:
        self.fail()


class Disk:
    """Counts the times that this process opens a file of a folder, or writes to one, and fails at one of them."""

    def __init__(self, folder: Path, only_writes: bool) -> None:
        self.folder, self.only_writes, self.events = str(folder), only_writes, 0
        self.fail_at, self.act = 0, lambda: None
        self.open = io.open
        io.open = builtins.open = self.opened  # type: ignore[assignment]

    def fail(self, number: int, act: Callable[[], None]) -> None:
        """Call `act` at the event of this number from now on."""
        self.events, self.fail_at, self.act = 0, number, act

    def event(self, write: bool) -> None:
        """Something is done."""
        if write or not self.only_writes:
            self.events += 1
            if self.events == self.fail_at:
                self.act()

    def opened(self, file: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        """In place of `open`."""
        if not str(file).startswith(self.folder):
            return self.open(file, mode, *more, **named)
        self.event(write=False)
        return io.BufferedWriter(Written(self, file, mode)) if mode == "wb" else self.open(file, mode, *more, **named)


class Written(io.FileIO):
    """A file to which every write is an event."""

    def __init__(self, disk: Disk, file: Any, mode: str) -> None:
        super().__init__(file, mode)
        self.disk = disk

    def write(self, content: Any) -> int:
        self.disk.event(write=True)
        return super().write(content)
