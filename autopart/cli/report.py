"""The shell's `autopart report`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from autopart.cli import models as models
from autopart.cli.shared import Json, ModelOf, command, note, of_plan, planning, settings_of, tell, write
from autopart.plan.data import Plan
from autopart.plan.report import Extras, report_html
from autopart.planner.explain.report_extras import report_extras


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
