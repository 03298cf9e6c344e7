"""Ranks of tests/runtime/test_restart.py: a user's script that goes on from the last checkpoint, if there is one, on as
many ranks as there are."""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import launch_forked, redirect
from torch import Tensor, nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import autopart
from autopart.runtime.watchdog import finish, report_failure

STEPS, EVERY, KILLED_AT = 7, 2, 5
"""Steps of a training, after how many a checkpoint is saved, and before which step a rank is killed."""


class Model(nn.Module):
    """Layers with dropout, whose random numbers do not depend on the plan."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = (self.last(nn.functional.dropout(self.first(x).relu(), 0.1)) - x).square().mean()
        return loss


def rows(step: int) -> dict[str, Tensor]:
    """The batch of a step."""
    return {"x": torch.randn(8, 8, generator=torch.Generator().manual_seed(step))}


def script(folder: Path, killed: bool, settings: dict[str, Any]) -> None:
    """One rank: train to the last step. Rank 1 is killed on the way, at its first start."""
    mesh = f"{os.environ['WORLD_SIZE']}:cpu"
    compiled = autopart.compile(Model(), mesh, rows(0), seed=0, nodes=5, **settings)
    optimizer = compiled.optimizer(torch.optim.AdamW, lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    done = 0
    if any(folder.glob("step-*")):
        done = compiled.load(folder, scheduler=scheduler)["done"]
    for step in range(done, STEPS):
        if killed and step == KILLED_AT and compiled.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        loss = float(compiled.step(rows(step)))
        scheduler.step()
        if compiled.rank == 0:
            with (folder / "losses.jsonl").open("a") as log:
                log.write(json.dumps({"step": step, "loss": loss, "degrees": compiled.plan.degrees}) + "\n")
        if (step + 1) % EVERY == 0:
            compiled.save(folder, scheduler=scheduler, extra={"done": step + 1}, keep=2)
    if dist.is_initialized():
        dist.destroy_process_group()


def forked(folder: Path, killed: bool, settings: dict[str, Any]) -> None:
    """The script as a fork, which has no exit of an interpreter at which its watchdog would hear of the end."""
    torch.set_num_threads(1)
    try:
        script(folder, killed, settings)
    except BaseException as error:
        report_failure(error)
        raise
    finally:
        finish()


def torchrun(folder: Path, output: Path, ranks: int, max_restarts: int) -> None:
    """torchrun's agent, as `torchrun --nproc-per-node RANKS --max-restarts N` starts it, with forks as ranks."""
    redirect(output)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, max_restarts=max_restarts, monitor_interval=0.1,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="restart", start_method="fork",
    )  # fmt: skip
    elastic_launch(config, forked)(folder, True, {})


def launched(folder: Path, output: Path, ranks: int, killed: bool, settings: dict[str, Any]) -> None:
    """autopart's launcher; exits with its status."""
    redirect(output)
    sys.exit(launch_forked(partial(forked, folder, killed, settings), ranks))
