"""Writes a checkpoint: all of it or nothing, as seen from outside."""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from autopart.plan.data import Plan
from autopart.runtime.checkpoint import dcp, files
from autopart.runtime.checkpoint.together import together
from autopart.runtime.process_group import Group

TRY = "free space, or another folder"


def write(
    shards: Mapping[str, dcp.Shards], record: bytes, plan: Plan, final: Path, keep: int | None, group: Group
) -> None:
    """Write a checkpoint to the folder `final`. All ranks call it.

    shards  the rectangles that this rank writes
    record  the file's content that `record.encode` gave; rank 0's counts
    keep    how many of the latest checkpoints stay; None: all

    Raises PartitionError, on every rank, where a rank cannot write; then `final` is as it was.
    """
    failed = f"the checkpoint cannot be written to {final.parent}"
    folder = files.temporary(final)
    together(group, lambda: files.make_empty(folder), failed, TRY, only=0)
    try:
        dcp.save(shards, folder, group)
        names = [*together(group, lambda: dcp.written(folder), failed, TRY), files.STATE, files.PLAN]
        together(group, lambda: _write_record(folder, record, plan), failed, TRY, only=0)
        mine = names[group.rank :: group.size]
        found = together(group, lambda: {name: files.digest(folder / name) for name in mine}, failed, TRY)
        digests: dict[str, Any] = {}
        for some in group.all_gather_object(found):
            digests.update(some)
        together(group, lambda: files.complete(folder, final, digests), failed, TRY, only=0)
    except BaseException:
        if group.rank == 0:
            with suppress(OSError):
                shutil.rmtree(folder)
        raise
    if keep is not None:
        failed = f"older checkpoints cannot be removed from {final.parent}"
        together(group, lambda: files.prune(final, keep), failed, only=0)


def _write_record(folder: Path, record: bytes, plan: Plan) -> None:
    files.write_synced(folder / files.STATE, record)
    files.write_synced(folder / files.PLAN, (json.dumps(plan.to_json(), indent=1) + "\n").encode())
