"""autopart check | emit | run: what trains a plan, or writes the code that does."""

import gc
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from autopart.cli import models as models
from autopart.cli.report import writable, write_report
from autopart.cli.shared import (
    BATCH_OPTIONS,
    Json,
    MaybeMesh,
    Model,
    Options,
    PlanFile,
    command,
    load,
    make_plan,
    needed,
    note,
    saved_plan,
    settings_of,
    stderr,
    tell,
)
from autopart.compile.api import compile
from autopart.compile.check import check
from autopart.compile.programs import programs
from autopart.errors import PartitionError
from autopart.frontend.batch import DTYPES, outline, take
from autopart.passes.source import Source, prepare
from autopart.plan.data import Plan
from autopart.planner.validate import validate
from autopart.runtime.launch import launch
from autopart.runtime.measurement import Measurement
from autopart.runtime.profiled import profiled
from autopart.runtime.standalone import rate_text, train, write


@command
def check_command(
    model: Model, options: Options, mesh: MaybeMesh = None, plan_file: PlanFile = None, as_json: Json = False
) -> None:
    """Run one step of a plan on simulated ranks, threads of this process, and compare it with one process.

    Example: autopart check gpt2 4:cpu --pp 2 --tp 2 --sequence 64
    """
    made = saved_plan(plan_file, options, mesh)
    torch.manual_seed(0)
    loaded, batch = load(model, options, meta=False)
    made = made or make_plan(loaded, batch, needed(mesh), options)
    found = check(loaded, made.mesh, batch, plan=made)
    tell({k: v for k, v in vars(found).items() if k != "plan"} if as_json else str(found))


@command
def emit_command(
    model: Model,
    options: Options,
    to: Annotated[Path, typer.Option("--to", help="the folder to write")],
    mesh: MaybeMesh = None,
    plan_file: PlanFile = None,
    as_json: Json = False,
) -> None:
    """Write the code of every stage, the plan, and a run.py that trains them.

    Example: autopart emit gpt2 4:cpu --pp 2 --tp 2 --to emitted && python emitted/run.py
    """
    made = saved_plan(plan_file, options, mesh)
    loaded, batch = load(model, options)
    made = made or make_plan(loaded, batch, needed(mesh), options)
    files = write_folder(loaded, batch, made, to)
    tell({"folder": str(to), "files": [str(f) for f in files]} if as_json else "\n".join(map(str, files)))


@command
def run_command(
    model: Model,
    options: Options,
    mesh: MaybeMesh = None,
    steps: Annotated[int, typer.Option(help="optimizer steps")] = 10,
    lr: Annotated[float, typer.Option(help="learning rate")] = 1e-3,
    processes: Annotated[int, typer.Option(help="without MESH: so many cpu ranks")] = 2,
    plan_file: PlanFile = None,
    report: Annotated[
        Path | None, typer.Option(help="write the plan and a measured step as one HTML page, as `report` does")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="a folder for torch.profiler's trace of every rank, and what ranks did when")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train random weights on one random batch, on processes started here, or as one of torchrun's.

    Example: autopart run gpt2 4:cpu --pp 2 --tp 2 --sequence 128 --steps 5
    """
    gc.enable()
    if not (lr >= 0 and math.isfinite(lr) and steps >= 0):
        raise PartitionError(f"{steps} steps at a learning rate of {lr}", try_="--steps 10 --lr 1e-3")
    if report:
        writable(report)
    made = saved_plan(plan_file, options, mesh)
    started = "RANK" in os.environ
    world = int(os.environ.get("WORLD_SIZE", processes))
    mesh = str(made.mesh) if made else mesh or f"{world}:cpu"
    if not started:
        outlined = load(model, options)
        if made:  # which is told before weights are made
            Source.of(*outlined, made).like(made)
        made = made or make_plan(*outlined, mesh, options)
        if made.mesh.size > 1:
            raise typer.Exit(_launch(model, made, options, steps, lr, report, profile, as_json))
    torch.manual_seed(0)
    quiet = os.environ.get("RANK", "0") != "0"
    loaded, batch = load(model, options, meta=False, say=None if not started or quiet or made else note)
    with warnings.catch_warnings(record=True) as warned:
        compiled = compile(loaded, made.mesh if made else mesh, batch, plan=made, **settings_of(options))
    for warning in warned:
        note(str(warning.message))
    measurement = Measurement(compiled, steps) if report else None
    if measurement:
        compiled.callbacks.append(measurement)
    with _steps(steps, quiet) as say, profiled(compiled, profile) if profile else nullcontext():
        result = train(compiled, take(batch, compiled.plan.global_batch), steps, lr, say)
    if report and measurement:
        write_report(compiled, loaded, batch, measurement, report)
    if profile and not quiet:
        note(f"profile: {profile}")
    if not quiet:
        result = {**result, "plan": compiled.plan.to_json()}
        tell(result if as_json else _run_text(result))
    if dist.is_initialized():
        dist.destroy_process_group()


def write_folder(model: nn.Module, batch: models.Batch, made: Plan, folder: Path) -> list[Path]:
    """Emit every stage of a plan into a folder that trains on its own; the files of the stages.

    Raises PartitionError where the plan is for another model.
    """
    layered = prepare(model, outline(batch, made.micro_batch), made.mesh, DTYPES[made.precision], no_fuse=made.no_fuse)
    validate(made, layered)
    try:
        return write(folder, made, programs(layered, made), layered.traced.aliases, layered.traced.buffers, batch)
    except OSError as error:
        raise PartitionError(f"cannot write {folder}", str(error)) from error


def _launch(
    model: str, made: Plan, options: Options, steps: int, lr: float, report: Path | None, profile: Path | None,
    as_json: bool,
) -> int:  # fmt: skip
    """Run this command again as the ranks of a plan; the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        made.save(file)
        line = [sys.executable, "-m", "autopart.cli.main", "run", model, "--plan", str(file)]
        line += ["--steps", str(steps), "--lr", str(lr), *(["--json"] if as_json else [])]
        line += ["--report", str(report)] if report else []
        line += ["--profile", str(profile)] if profile else []
        given = {name: options[name] for name in BATCH_OPTIONS if options[name]}
        line += [f"--{k}" if v is True else f"--{k}={v}" for k, v in given.items()]
        return launch(line, made.mesh.size)


@contextmanager
def _steps(steps: int, quiet: bool) -> Iterator[Callable[[int, float], None]]:
    """A progress bar of steps on stderr, with the loss."""
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), console=stderr(), disable=quiet) as progress:
        task = progress.add_task("", total=steps)
        yield lambda number, loss: progress.update(task, completed=number, description=f"loss {loss:.4f}")


def _run_text(result: Mapping[str, Any]) -> str:
    losses = "\n".join(f"step {number}  loss {loss:.4f}" for number, loss in enumerate(result["losses"], 1))
    return f"{losses}\n{rate_text(result)}"
