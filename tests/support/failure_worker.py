"""Three ways to start ranks, of which rank 1 fails at step 5, for tests/runtime/test_failure.py.

A rank as a script: argv is "watched" or "started" (whether the watchdog is around a block or runs to the end), how rank
1 fails, and a file to which ranks append their process ids.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import launch_forked, redirect
from watched import watched

from autopart.runtime.activity import Activity
from autopart.runtime.launch import launch
from autopart.runtime.watchdog import start_watchdog

PATIENCE = 3.0


def launch_forks(command: Sequence[str], ranks: int, output: Path) -> None:
    """`launch` with forks of this process as ranks, which need not import torch; exits with its status."""
    redirect(output)
    sys.exit(launch_forked(partial(be_a_rank, *command), ranks))


def launch_scripts(command: Sequence[str], ranks: int, output: Path) -> None:
    """`launch` as it is; exits with its status."""
    redirect(output)
    sys.exit(launch([sys.executable, __file__, *command], ranks))


def torchrun(command: Sequence[str], ranks: int, output: Path) -> None:
    """torchrun's command line."""
    redirect(output)
    from torch.distributed.run import main

    main(["--standalone", "--nproc-per-node", str(ranks), __file__, *command])


def be_a_rank(watch: str, how: str, ids: str) -> None:
    """Some steps, each a collective."""
    with open(ids, "a") as file:
        file.write(f"{os.getpid()}\n")
    dist.init_process_group("gloo")
    at = Activity()
    if watch == "watched":
        with watched(at, patience=PATIENCE):
            train(at, how, ids)
    else:
        start_watchdog(at, patience=PATIENCE)
        train(at, how, ids)
    print(f"rank {dist.get_rank()} done")
    dist.destroy_process_group()


def train(at: Activity, how: str, ids: str) -> None:
    """Eight steps, or no end of them."""
    for step in range(10**9 if how == "forever" else 8):
        at.begin(f"step {step}")
        dist.all_reduce(torch.ones(4))
        if step == 5 and dist.get_rank() == 1:
            fail(how, ids)


def fail(how: str, ids: str) -> None:
    """Raise, exit, have a signal's name, or do neither."""
    time.sleep(1)  # until the others have heard of step 5
    Path(f"{ids}.failed").touch()
    if how == "raise":
        raise ValueError("no such token\nand more")
    if how == "exit":
        os._exit(3)
    if how.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, how))


if __name__ == "__main__":
    be_a_rank(*sys.argv[1:])
