"""The shell's `autopart report`, and the reports of `run` and `bench`."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from autopart.cli import models as models
from autopart.cli.shared import Json, ModelOf, command, note, of_plan, planning, settings_of, tell, write
from autopart.errors import PartitionError
from autopart.frontend.batch import Batch
from autopart.plan.data import Plan
from autopart.plan.report import Bench, Extras, report_html
from autopart.planner.explain.report_extras import memory_extras, report_extras
from autopart.runtime.compiled import Compiled
from autopart.runtime.measurement import Measurement


@command
def report_command(
    file: Annotated[Path, typer.Argument(metavar="PLAN.json", help="a saved plan")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="the HTML file to write (default: PLAN.html beside it)")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="a trace of a run of the plan (autopart.Trace), shown beside the prediction")
    ] = None,
    why: Annotated[
        bool, typer.Option("--why", help="plan again, for shadow prices, other degrees' plans and memory by tensor")
    ] = False,
    model: ModelOf = None,
    as_json: Json = False,
) -> None:
    """Write a saved plan as one HTML page: mesh, graph, timeline, memory, search, alternatives.

    Example: autopart report plan.json --trace trace.json -o report.html
    """
    saved = Plan.load(file)
    extras = _planned_again(saved, model) if why else None
    text, numbers = report_html(saved, trace=trace, extras=extras)
    out = out or file.with_suffix(".html")
    write(out, lambda to: to.write_text(text, encoding="utf-8"))
    tell({"file": str(out), **numbers} if as_json else str(out))


def _planned_again(saved: Plan, spec: str | None) -> Extras:
    """What planning the model of a saved plan again finds; the time it takes goes to stderr."""
    started = time.monotonic()
    with planning() as say:
        loaded, batch, options = of_plan(saved, spec)
        found = report_extras(saved, loaded, batch, on_progress=say, **settings_of(options))
    note(f"traced and planned again in {time.monotonic() - started:.1f} s")
    return found


def writable(file: Path) -> None:
    """Raise PartitionError unless a report can be written to a file, before what it reports has run."""
    parent = file.absolute().parent
    if not parent.is_dir():
        raise PartitionError(f"cannot write {file}", f"there is no folder {file.parent}")
    if file.is_dir() or not os.access(file if file.exists() else parent, os.W_OK):
        raise PartitionError(f"cannot write {file}", "it is a folder" if file.is_dir() else "permission denied")


def write_report(
    compiled: Compiled,
    model: nn.Module,
    batch: Batch,
    measurement: Measurement,
    file: Path,
    bench: Bench | None = None,
) -> None:
    """Write the report of a run on rank 0: its plan with memory by tensor, and a measured step. All ranks call it."""
    gathered = measurement.gather(compiled.groups.host)
    if compiled.rank:
        return
    extras = None
    try:
        extras = memory_extras(compiled.plan, model, batch)
    except PartitionError as error:
        note(f"the report has no memory by tensor: {error}")
    text, _ = report_html(compiled.plan, trace=gathered, extras=extras, bench=bench)
    write(file, lambda to: to.write_text(text, encoding="utf-8"))
    note(f"report: {file}")
