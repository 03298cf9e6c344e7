"""The shell: autopart plan | mesh | show | check | estimate | emit | export | run | calibrate."""

from __future__ import annotations

import gc
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text
from torch import nn

from autopart.cli import models as models
from autopart.cli.calibrate import calibrate_command
from autopart.cli.shared import (
    BATCH_OPTIONS,
    MODEL_HELP,
    Json,
    MaybeMesh,
    Mesh,
    Model,
    ModelOf,
    Options,
    PlanFile,
    app,
    command,
    load,
    make_plan,
    needed,
    note,
    of_plan,
    planning,
    save_plan,
    saved_plan,
    settings_of,
    stderr,
    tell,
    write_file,
)
from autopart.cli.show import show_command
from autopart.compile.api import compile, estimate
from autopart.compile.check import check
from autopart.compile.programs import programs
from autopart.errors import PartitionError
from autopart.frontend.batch import DTYPES, outline, take
from autopart.passes.source import Source, prepare
from autopart.plan.data import Plan
from autopart.plan.estimate import Estimate
from autopart.plan.export import SYSTEMS, export
from autopart.plan.units import seconds_text
from autopart.planner.explain.mesh_search import PER_HOST, MeshChoice, search_mesh
from autopart.planner.explain.price_plan import price_plan
from autopart.planner.validate import validate
from autopart.runtime.launch import launch
from autopart.runtime.standalone import train, write


@command
def plan_command(
    model: Model,
    mesh: Mesh,
    options: Options,
    save: Annotated[Path | None, typer.Option(help="write the plan to this file")] = None,
    as_json: Json = False,
) -> None:
    """Find the fastest plan that fits. Needs no devices and no weights.

    Example: autopart plan llama-3-8b 2x8:h100-80gb --global-batch 64 --precision bfloat16 --save plan.json
    """
    made = _asked(make_plan(*load(model, options), mesh, options), model, options)
    if save:
        save_plan(made, save)
    tell(made.to_json() if as_json else str(made))


@command
def mesh_command(
    model: Model,
    options: Options,
    devices: Annotated[list[str], typer.Option(help="COUNT:DEVICE or a mesh; may be repeated")],
    target: Annotated[float | None, typer.Option(help="seconds of a step: the fewest devices that meet it")] = None,
    price: Annotated[list[str] | None, typer.Option(help="DEVICE=PRICE of one for an hour; may be repeated")] = None,
    per_host: Annotated[list[int] | None, typer.Option(help="devices of a host (default: 8); may be repeated")] = None,
    save: Annotated[Path | None, typer.Option(help="write the best mesh's plan to this file")] = None,
    as_json: Json = False,
) -> None:
    """Find the fastest, cheapest or smallest mesh for a model.

    Example: autopart mesh llama-3-8b --devices 64:h100-80gb --devices 128:a100-80gb --price h100-80gb=2.5
    --price a100-80gb=1.5 --global-batch 64 --precision bfloat16
    """
    loaded, batch = load(model, options)
    with stderr().status("planning") as status:
        found = search_mesh(
            loaded,
            batch,
            devices=devices,
            target_seconds=target,
            prices=_prices(price) if price else None,
            per_host=per_host or PER_HOST,
            on_progress=lambda text: status.update(Text(f"planning, done: {text}")),
            **settings_of(options),
        )
    best = found[0].plan
    if save and best:
        save_plan(best, save)
    if as_json:
        tell({"choices": [choice.to_json() for choice in found], "plan": best.to_json() if best else None})
    else:
        tell(_choices_text(found, target))


def _prices(given: list[str]) -> dict[str, float]:
    """Device -> price, from DEVICE=PRICE."""
    found = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise PartitionError(f"not a price: {text!r}", try_="h100-80gb=2.5") from None
    return found


def _choices_text(choices: list[MeshChoice], target: float | None) -> str:
    """A line a mesh, the best first; * marks those that nothing beats in time and cost (in devices, without prices)."""
    missed = target is not None and not choices[0].meets
    lines = [f"no mesh takes at most {seconds_text(target or 0.0)} a step; the fastest is first"] if missed else []
    for choice in choices:
        head = f"{'*' if choice.front else ' '} {choice.mesh!s:<20}"
        if choice.plan is None:
            lines.append(f"{head} {choice.problem}")
            continue
        cost = (
            ""
            if choice.cost is None
            else f"{choice.cost:>12.6g} a step {choice.cost_per_million_tokens:>10.4g} a M tokens"
        )
        rate = f"{seconds_text(choice.step_seconds):>10} {choice.tokens_per_second:>14,.0f} tokens/s"
        late = "  misses the target" if target is not None and not choice.meets else ""
        lines.append(f"{head} {rate} {cost}  {choice.plan.degrees} zero {choice.plan.zero}{late}")
    return "\n".join(lines)


command(show_command)


def _asked(made: Plan, model: str, options: Options) -> Plan:
    """A plan that remembers which model and batch it was asked for."""
    given = {name: options[name] for name in BATCH_OPTIONS if options[name]}
    return replace(made, request={**made.request, "model": model, **given})


@command
def check_command(
    model: Model, options: Options, mesh: MaybeMesh = None, plan_file: PlanFile = None, as_json: Json = False
) -> None:
    """Run one step of a plan on simulated ranks, threads of this process, and hold it against one process.

    Example: autopart check gpt2 4:cpu --pp 2 --tp 2 --sequence 64
    """
    made = saved_plan(plan_file, options)
    torch.manual_seed(0)
    loaded, batch = load(model, options, meta=False)
    made = made or make_plan(loaded, batch, needed(mesh), options)
    found = check(loaded, made.mesh, batch, plan=made)
    result = {k: v for k, v in vars(found).items() if k != "plan"}
    text = (
        "{loss:.6g} is the loss, off by {loss_error:.1e} from {against}; "
        "gradients are off by at most {gradient_error:.1e} ({worst})"
    ) + ("; buffers by at most {buffer_error:.1e} ({worst_buffer})" if found.worst_buffer else "")
    tell(result if as_json else text.format(**result))


@command
def estimate_command(
    model: Annotated[str, typer.Argument(metavar="MODEL|PLAN.json", help=f"{MODEL_HELP}; or a saved plan")],
    options: Options,
    mesh: MaybeMesh = None,
    of: ModelOf = None,
    as_json: Json = False,
) -> None:
    """What a configuration costs, whether it fits or not; without MESH, what a saved plan costs: its decisions, edited
    by hand as they may be, are priced again.

    Example: autopart estimate gpt2-xl 8:a100-80gb --tp 8 --global-batch 32
    """
    if mesh is None:
        if not model.endswith(".json"):
            raise PartitionError(f"on which mesh is {model} to be estimated?", try_=f"autopart estimate {model} 4:cpu")
        made = Estimate.of(_repriced(Plan.load(model), of))
    else:
        loaded, batch = load(model, options)
        with planning():
            made = estimate(loaded, mesh, batch, **settings_of(options))
    tell(made.to_json() if as_json else str(made))


def _repriced(saved: Plan, spec: str | None) -> Plan:
    """A saved plan, priced again where it is known for which model."""
    if spec is None and "model" not in saved.request:
        note("the plan does not say which model it is for: these are the numbers in the file; --model prices it again")
        return saved
    loaded, batch, _ = of_plan(saved, spec)
    return price_plan(saved, loaded, batch)


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
    made = saved_plan(plan_file, options)
    loaded, batch = load(model, options)
    made = made or make_plan(loaded, batch, needed(mesh), options)
    files = write_folder(loaded, batch, made, to)
    tell({"folder": str(to), "files": [str(f) for f in files]} if as_json else "\n".join(map(str, files)))


@command
def export_command(
    file: Annotated[Path, typer.Argument(metavar="PLAN.json", help="a saved plan")],
    to: Annotated[str, typer.Option("--to", help=", ".join(SYSTEMS))],
    out: Annotated[Path | None, typer.Option(help="write to this file instead of printing")] = None,
    as_json: Json = False,
) -> None:
    """Write a saved plan as another system's settings, and say on stderr what they cannot.

    Example: autopart export plan.json --to torchtitan --out train.toml
    """
    made = export(Plan.load(file), to)
    for what, lines in (("differs", made.differences), ("by hand", made.by_hand)):
        for line in lines:
            note(f"{what}: {line}")
    if out:
        write_file(made.text, out)
    if as_json or not out:
        tell(vars(made) if as_json else made.text.rstrip("\n"))


@command
def run_command(
    model: Model,
    options: Options,
    mesh: MaybeMesh = None,
    steps: Annotated[int, typer.Option(help="optimizer steps")] = 10,
    lr: Annotated[float, typer.Option(help="learning rate")] = 1e-3,
    processes: Annotated[int, typer.Option(help="without MESH: so many cpu ranks")] = 2,
    plan_file: PlanFile = None,
    as_json: Json = False,
) -> None:
    """Train random weights on one random batch, on processes started here, or as one of torchrun's.

    Example: autopart run gpt2 4:cpu --pp 2 --tp 2 --sequence 128 --steps 5
    """
    gc.enable()
    if not (lr >= 0 and math.isfinite(lr) and steps >= 0):
        raise PartitionError(f"{steps} steps at a learning rate of {lr}", try_="--steps 10 --lr 1e-3")
    made = saved_plan(plan_file, options)
    started = "RANK" in os.environ
    world = int(os.environ.get("WORLD_SIZE", processes))
    mesh = str(made.mesh) if made else mesh or f"{world}:cpu"
    if not started:
        outlined = load(model, options)
        if made:  # which is told before weights are made
            Source(*outlined, DTYPES[made.precision]).like(made)
        made = made or make_plan(*outlined, mesh, options)
        if made.mesh.size > 1:
            raise typer.Exit(_launch(model, made, options, steps, lr, as_json))
    torch.manual_seed(0)
    quiet = os.environ.get("RANK", "0") != "0"
    loaded, batch = load(model, options, meta=False, say=None if not started or quiet or made else note)
    compiled = compile(loaded, made.mesh if made else mesh, batch, plan=made, **settings_of(options))
    with _steps(steps, quiet) as say:
        result = train(compiled, take(batch, compiled.plan.global_batch), steps, lr, say)
    if not quiet:
        result = {**result, "plan": compiled.plan.to_json()}
        tell(result if as_json else _run_text(result))
    if dist.is_initialized():
        dist.destroy_process_group()


command(calibrate_command)


def write_folder(model: nn.Module, batch: models.Batch, made: Plan, folder: Path) -> list[Path]:
    """Emit every stage of a plan into a folder that trains on its own; the stage files.

    Raises PartitionError where the plan is for another model.
    """
    layered = prepare(model, outline(batch, made.micro_batch), made.mesh, DTYPES[made.precision])
    validate(made, layered)
    try:
        return write(folder, made, programs(layered, made), layered.traced.aliases, layered.traced.buffers, batch)
    except OSError as error:
        raise PartitionError(f"cannot write {folder}", str(error)) from error


def _launch(model: str, made: Plan, options: Options, steps: int, lr: float, as_json: bool) -> int:
    """Run this command again as the ranks of a plan; the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        made.save(file)
        line = [sys.executable, "-m", "autopart.cli.main", "run", model, "--plan", str(file)]
        line += ["--steps", str(steps), "--lr", str(lr), *(["--json"] if as_json else [])]
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
    return f"{losses}\n{result['tokens_per_second']:,.0f} tokens/s"


def main() -> None:
    """The entry point of the shell. Its commands are short, so that garbage in cycles is left to the system, and so is
    the end, at which Python would look through all that was ever made. Training is not short: `run` collects."""
    gc.disable()
    try:
        app()
    except SystemExit as end:
        if gc.isenabled() or not isinstance(end.code, (int, type(None))):
            raise
        with suppress(BrokenPipeError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(end.code or 0)


if __name__ == "__main__":
    main()
