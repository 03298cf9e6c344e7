"""Ranks of a test as forks of one process, which share what that process has imported, traced and planned.

To import torch and transformers takes a process 10 CPU seconds, and every trace takes some too. `run_apart` forks a
process from a server that has imported them, and has run nothing; `run_forked` forks ranks from that process.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from autopart.runtime import watchdog
from autopart.runtime.launch import launch

SERVER = get_context("forkserver")
WORKERS = "agreement chaos checkpoint exact mixed restart torch_compile trainer weights zoo"
LATE = ("autopart.compile.trainer", "networkx", "torch._inductor.utils", "warm")
"""What is imported where it is needed first: by most forks of the server, if not by the server."""
SERVER.set_forkserver_preload([*(f"{name}_worker" for name in WORKERS.split()), *LATE])


def run_apart(work: Callable[..., None], *arguments: Any) -> int:
    """`start_apart`, until it ends; the exit status."""
    process = start_apart(work, *arguments)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def start_apart(work: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Call a function of a module, with arguments that can be pickled, in a process of its own."""
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # the server's, which starts once
        process = SERVER.Process(target=_apart, args=(work, *arguments))
        process.start()
    return process


def _apart(work: Callable[..., None], *arguments: Any) -> None:
    """Start autograd before any tensor is fake, then work. A build with CUDA counts a GPU from then on, even where
    there is none: a first backward while a plan is made would start a thread for it, and no fork run a backward."""
    torch.ones((), requires_grad=True).backward()
    work(*arguments)


def run_main(main: Callable[[Sequence[str]], object], arguments: Sequence[str], ranks: int, output: Path) -> int:
    """Call a program's main function on forked ranks instead of starting as many; the exit status.

    main       a function of a module
    arguments  of the program
    output     the file for what the ranks print
    """
    return run_apart(_run_main, main, arguments, ranks, output)


def _run_main(main: Callable[[Sequence[str]], object], arguments: Sequence[str], ranks: int, output: Path) -> None:
    redirect(output)
    run_forked(partial(main, arguments), ranks)


def redirect(output: Path, errors: Path | None = None) -> None:
    """Write what this process and its children print to a file, or what they print on stderr to another."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if errors:
        with errors.open("w") as file:
            os.dup2(file.fileno(), 2)


def run_forked(work: Callable[[], object], ranks: int) -> None:
    """Run `work` on so many forked processes, in torchrun's environment.

    Where there is a GPU, the caller must not have run a backward before: autograd's threads do not survive a fork.
    Raises ProcessRaisedException or ProcessExitedException for the first rank that fails, once the others have ended.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.start_processes(_rank, (work, ranks, store.port), nprocs=ranks, start_method="fork")


def _rank(rank: int, work: Callable[[], object], ranks: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    _make_threads()
    try:
        work()
    except BaseException as error:
        watchdog.report_failure(error)
        raise
    finally:
        watchdog.finish()


def _make_threads() -> None:
    """Let torch make its pool of threads anew, which a fork lacks, before two threads do so at once and one fails."""
    torch.set_num_threads(torch.get_num_threads())


def launch_forked(work: Callable[[], object], ranks: int) -> int:
    """`launch`, with forks of this process that call `work` in place of a command; its status."""
    with mock.patch("subprocess.Popen", partial(Fork, work)):
        return launch([], ranks)


class Fork:
    """What `launch` uses of subprocess.Popen."""

    def __init__(self, work: Callable[[], object], _: Sequence[str], env: Mapping[str, str]) -> None:
        self.process = get_context("fork").Process(target=_forked, args=(work, env))
        self.process.start()
        self.terminate, self.kill = self.process.terminate, self.process.kill

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> None:
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("rank", timeout or 0.0)
            time.sleep(0.05)


def _forked(work: Callable[[], object], env: Mapping[str, str]) -> None:
    """A forked rank. Like a started one, it has neither its parent's files nor its signal handlers."""
    os.closerange(3, 1024)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(env)
    _make_threads()
    work()
