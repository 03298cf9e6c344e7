"""Saves and loads what one rank's program has trained, together with all other ranks."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from autopart.errors import PartitionError
from autopart.runtime.checkpoint import contents, files, optimizer_states
from autopart.runtime.checkpoint import record as records
from autopart.runtime.checkpoint.choose import choose
from autopart.runtime.checkpoint.load import load
from autopart.runtime.checkpoint.together import together
from autopart.runtime.checkpoint.write import write
from autopart.runtime.process_group import Group
from autopart.runtime.rank_state import RankState


class Checkpoints:
    """The checkpoints of one rank's program. All ranks call each method."""

    def __init__(self, compiled: RankState) -> None:
        self.compiled, self.executor = compiled, compiled.executor
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[None] | None = None

    @cached_property
    def group(self) -> Group:
        """All ranks, on a communicator of their own, which a save may use while training goes on."""
        host = self.executor.groups.host
        if host.size == 1:
            return host
        if host.handle is None:
            raise PartitionError(
                "simulated ranks have no checkpoints", "torch.distributed.checkpoint needs a process a rank", "torchrun"
            )
        return Group("checkpoint", host.size, host.rank, dist.new_group(backend="gloo"))

    def save(self, folder: Path, scheduler: Any, extra: Any, keep: int | None, wait: bool) -> Path:
        """See `Compiled.save`."""
        self.wait_saved()
        if keep is not None and keep < 1:
            raise PartitionError(f"keep={keep!r} keeps no checkpoint", try_="keep=1 or more, or None for all")
        executor, group = self.executor, self.group
        entries = {**contents.model_entries(self.compiled), **contents.state_entries(executor.optimizer)}
        failed = "what was trained cannot be saved"
        mine = together(group, lambda: contents.summary(executor, entries), failed)
        stages = [each for each in group.all_gather_object(mine) if each is not None]
        record = together(group, lambda: records.encode(self._record(stages, scheduler, extra)), failed, only=0)
        shards = contents.written_here(entries, executor.groups, stages)
        if not wait:
            shards = {name: each.copied() for name, each in shards.items()}
        final = files.folder_of(folder, executor.groups.rng.step)
        work = partial(write, shards, record, self.compiled.plan, final, keep, group)
        if wait:
            work()
        else:
            self.pending = self.pool.submit(work)
        return final

    def wait_saved(self) -> None:
        """See `Compiled.wait_saved`."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def load(self, folder: Path, scheduler: Any) -> Any:
        """See `Compiled.load`."""
        self.wait_saved()
        path = choose(folder, self.group)
        return load(path, self.compiled, scheduler, self.group)

    def _record(self, stages: Sequence[contents.StageSummary], scheduler: Any, extra: Any) -> records.Record:
        compiled, executor = self.compiled, self.executor
        optimizer = executor.optimizer
        state = {compiled.aliases.get(name, name): value for name, value in compiled.model.state_dict().items()}
        unused = {name: v for name, v in state.items() if name not in compiled.emitted and not v.is_meta}
        return {
            "format": records.FORMAT,
            "step": executor.groups.rng.step,
            "seed": executor.groups.rng.seed,
            "skipped": executor.skipped,
            "loss_scale": executor.loss_scale and vars(executor.loss_scale),
            "parameters": dict(compiled.plan.signature.parameters),
            "beside": {**unused, **compiled.unused_tensors},
            "optimizer": optimizer and {
                "class": type(optimizer).__qualname__,
                "groups": optimizer_states.groups_record(optimizer, compiled.group_names),
                "scalars": {name: states for each in stages for name, states in each.scalars.items()},
            },
            "scheduler": scheduler and {"class": type(scheduler).__qualname__, "state": scheduler.state_dict()},
            "extra": extra,
        }  # fmt: skip
