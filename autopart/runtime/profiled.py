"""A profile of a run: what torch.profiler saw on every rank, what ranks did when, and what the plan foretold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

from autopart.errors import PartitionError
from autopart.plan.timeline import timeline
from autopart.runtime.callbacks import Trace
from autopart.runtime.loggers import ProfilerRanges

if TYPE_CHECKING:
    from autopart.runtime.compiled import Compiled


@contextmanager
def profiled(compiled: Compiled, folder: str | Path) -> Iterator[None]:
    """Profile the steps of this context on all ranks, which enter and leave it together.

    In the folder, which is made, are then these files in Chrome\'s Trace Event Format, for Perfetto:

    rank_0.json, ...  torch.profiler\'s operators and kernels of each rank, in ranges named by stage, instruction and
                      micro-batch
    trace.json        what all ranks did when (`autopart.Trace`), which `autopart report --trace` reads too
    predicted.json    the step that the plan foretells, on the same rows

    Raises PartitionError, on every rank, where a rank cannot write there.
    """
    folder, host, where = Path(folder), compiled.groups.host, compiled.callbacks
    error = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank_{compiled.rank}.json").touch()
    except OSError as failure:
        error = str(failure)
    if failed := [text for text in host.all_gather_object(error) if text]:
        raise PartitionError(f"cannot write the profile {folder}", failed[0], "a folder that all ranks can write to")
    callbacks = [trace := Trace(), ProfilerRanges()]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    where.extend(callbacks)
    try:
        with profile(activities=activities) as profiler:
            yield
    finally:
        for callback in callbacks:
            where.remove(callback)
    profiler.export_chrome_trace(str(folder / f"rank_{compiled.rank}.json"))
    trace.save(folder / "trace.json", host)
    if compiled.rank == 0:
        (folder / "predicted.json").write_text(json.dumps(timeline(compiled.plan).trace()))
