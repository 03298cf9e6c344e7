"""Ranks of a test as forks of one process, which share what that process has imported, traced and planned.

To import torch and transformers takes a rank seconds, and so does every trace. Tests of what ranks started one by one
do, each with a trace of its own, use `autopart.runtime.launch`.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch.distributed as dist
import torch.multiprocessing as mp

from autopart.runtime import watchdog


def run_forked(work: Callable[[], None], ranks: int) -> None:
    """Run `work` on so many forked processes, in torchrun's environment.

    The caller must not have run a backward before: autograd's threads do not survive a fork.
    Raises ProcessRaisedException or ProcessExitedException for the first rank that fails, once the others have ended.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.start_processes(_rank, (work, ranks, store.port), nprocs=ranks, start_method="fork")


def _rank(rank: int, work: Callable[[], None], ranks: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    try:
        work()
    except BaseException as error:
        watchdog.report_failure(error)
        raise
    finally:
        watchdog.finish()
