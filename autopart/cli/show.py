"""autopart show | export: a saved plan, its timeline, why it is as it is, and other systems' settings for it."""

import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from autopart.cli import models as models
from autopart.cli.shared import (
    Json,
    ModelOf,
    command,
    note,
    of_plan,
    planning,
    settings_of,
    tell,
    write,
)
from autopart.cli.stragglers import Jitter, Slow, SlowDevices, SlowSeed, SlowSpeed, stragglers_of
from autopart.errors import PartitionError
from autopart.plan.data import Plan
from autopart.plan.export import GRAPHS, SYSTEMS, export
from autopart.plan.stragglers import Stragglers
from autopart.plan.text import missing
from autopart.plan.timeline import timeline
from autopart.plan.units import bytes_text, seconds_text
from autopart.planner.explain.memory_report import memory_report
from autopart.planner.explain.why import Explanation, explain

LABEL_WIDTH = 90
"""Columns that the text next to a timeline's chart takes."""


@command
def show_command(
    file: Annotated[Path, typer.Argument(metavar="PLAN.json", help="a saved plan")],
    without_rule: Annotated[
        bool, typer.Option("--missing", help="the operators that no rule splits, the costliest first")
    ] = False,
    why: Annotated[bool, typer.Option("--why", help="what every other strategy would cost")] = False,
    why_not: Annotated[
        list[str] | None, typer.Option(help='what the step would be with a constraint, as "tp=8"; may be repeated')
    ] = None,
    prices: Annotated[bool, typer.Option("--prices", help="what more memory and faster links would bring")] = False,
    clock: Annotated[bool, typer.Option("--timeline", help="what every stage does when, simulated")] = False,
    slow_devices: SlowDevices = None,
    slow_speed: SlowSpeed = 0.8,
    slow: Slow = None,
    jitter: Jitter = None,
    slow_seed: SlowSeed = 0,
    trace: Annotated[Path | None, typer.Option(help="write the timeline for Chrome's tracing or Perfetto")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="whose the bytes of every stage are")] = False,
    lp: Annotated[Path | None, typer.Option(help="write the ILP of a stage's splits as an LP file")] = None,
    mps: Annotated[Path | None, typer.Option(help="write the ILP of a stage's splits as an MPS file")] = None,
    stage: Annotated[int, typer.Option(help="with --lp and --mps: of which stage")] = 0,
    everything: Annotated[bool, typer.Option("--all", help="with --why: of every operator and parameter")] = False,
    model: ModelOf = None,
    as_json: Json = False,
) -> None:
    """Print a saved plan, its timeline, its memory by tensor, or why it was chosen (which traces the model again).

    Example: autopart show plan.json --why-not tp=4 --why-not "stage 1 starts at h.8"
    """
    saved = Plan.load(file)
    stragglers = stragglers_of(slow_devices, slow_speed, slow, jitter, slow_seed)
    if why or why_not or prices:
        _explain(saved, model, why, everything, why_not or [], prices, as_json)
    elif lp or mps:
        _write_ilp(saved, model, stage, lp, mps, as_json)
    elif clock or trace or stragglers:
        _timeline(saved, trace, stragglers, as_json)
    elif memory:
        loaded, batch, _ = of_plan(saved, model)
        stages = memory_report(saved, loaded, batch)
        tell([asdict(stage) for stage in stages] if as_json else "\n".join(map(str, stages)))
    elif without_rule:
        rows = missing(saved)
        tell([{"operator": n, "calls": c, "seconds": s} for n, c, s in rows] if as_json else _missing_text(rows))
    else:
        tell(saved.to_json() if as_json else str(saved))


def _timeline(saved: Plan, trace: Path | None, stragglers: Stragglers | None, as_json: bool) -> None:
    """Print a plan's timeline, as wide as the terminal, and write its trace."""
    made = timeline(saved, slow=stragglers)
    if trace:
        write(trace, lambda file: file.write_text(json.dumps(made.trace())))
    if as_json:
        tell(made.to_json())
    else:
        console = Console()
        console.print(made.chart(max(40, console.width - LABEL_WIDTH)), soft_wrap=True)


def _planned_again(saved: Plan, spec: str | None) -> Explanation:
    """The explanation of a saved plan, whose model is planned again."""
    started = time.monotonic()
    with planning() as say:
        loaded, batch, options = of_plan(saved, spec)
        found = explain(loaded, saved.mesh, batch, **settings_of(options), on_progress=say)
    if not math.isclose(found.plan.step_seconds, saved.step_seconds, rel_tol=1e-6):
        note(f"planned again the step takes {seconds_text(found.plan.step_seconds)}, which the answers go by")
    note(f"traced and planned again in {time.monotonic() - started:.2f} s")
    return found


def _write_ilp(saved: Plan, spec: str | None, stage: int, lp: Path | None, mps: Path | None, as_json: bool) -> None:
    """Write the ILP of a stage's splits to the files that are asked for, and print their names."""
    problem = _planned_again(saved, spec).ilp(stage)
    note(f"{problem.numVariables()} variables, {problem.numConstraints()} constraints")
    try:
        for file, write in ((lp, problem.writeLP), (mps, problem.writeMPS)):
            if file:
                write(str(file))
    except OSError as error:
        raise PartitionError("cannot write the ILP", str(error)) from error
    files = [str(file) for file in (lp, mps) if file]
    tell({"files": files} if as_json else "\n".join(files))


def _explain(
    saved: Plan, spec: str | None, why: bool, everything: bool, why_not: list[str], prices: bool, as_json: bool
) -> None:
    """Print what is asked of a saved plan; the time it takes once the model is planned again goes to stderr."""
    found = _planned_again(saved, spec)
    started = time.process_time()
    answers = [found.why_not(text) for text in why_not]
    reasons = found.why(everything) if why else []
    changes = found.prices() if prices else []
    taken = time.process_time() - started
    if as_json:
        told: dict[str, list[Any]] = {
            "why_not": [replace(a, plan=None) for a in answers],
            "why": reasons,
            "prices": changes,
        }
        tell({name: [asdict(row) for row in rows] for name, rows in told.items()})
    else:
        slack = [f"{bytes_text(found.slack)} of memory are left on the fullest device"] if prices else []
        tell("\n".join(map(str, [*answers, *reasons, *slack, *changes])))
    note(f"answered in {taken:.2f} s of CPU")


def _missing_text(rows: list[tuple[str, int, float]]) -> str:
    if not rows:
        return "every operator has a rule"
    return "\n".join(f"{name:<48} {calls:>5} calls   {seconds_text(seconds)}" for name, calls, seconds in rows)


@command
def export_command(
    file: Annotated[Path, typer.Argument(metavar="PLAN.json", help="a saved plan")],
    to: Annotated[str, typer.Option("--to", help=", ".join([*SYSTEMS, *GRAPHS]))],
    out: Annotated[Path | None, typer.Option(help="write to this file instead of printing")] = None,
    as_json: Json = False,
) -> None:
    """Write a saved plan as another system's settings, or its graph. What settings cannot say goes to stderr.

    Example: autopart export plan.json --to torchtitan --out train.toml
    """
    made = export(Plan.load(file), to)
    for what, lines in (("differs", made.differences), ("by hand", made.by_hand)):
        for line in lines:
            note(f"{what}: {line}")
    if out:
        write(out, lambda file: file.write_text(made.text))
    if as_json or not out:
        tell(vars(made) if as_json else made.text.rstrip("\n"))
