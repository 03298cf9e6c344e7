"""The shell: autopart plan | mesh | show | estimate | emit | export | run | calibrate."""

from __future__ import annotations

import functools
import gc
import inspect
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text
from torch import nn

from autopart import models
from autopart.calibrate.command import calibrate_command
from autopart.check import check
from autopart.compile import DTYPES, compile, estimate, plan, prepare, programs, samples_of, take
from autopart.constraints import forbidden, parse
from autopart.errors import PartitionError
from autopart.estimates import Estimate
from autopart.explain import explain
from autopart.exports import SYSTEMS, export
from autopart.meshes import PER_HOST, MeshChoice, search_mesh
from autopart.plan import Plan, bytes_text, missing, seconds_text
from autopart.reprice import reprice
from autopart.runtime.launch import launch
from autopart.runtime.standalone import train, write
from autopart.runtime.watchdog import report_failure
from autopart.timeline import timeline

app = typer.Typer(
    help="Find the fastest way to train a model on a mesh of devices, and train it so.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

MODEL_HELP = (
    "a model type or size (gpt2, llama-3-8b), a config.json or its folder, or module:function that returns model, batch"
)
MESH_HELP = r'"[HOSTSx]DEVICES:DEVICE\[@LINK]", as 4x8:h100-80gb or 4:cpu'
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Mesh = Annotated[str, typer.Argument(metavar="MESH", help=MESH_HELP)]
MaybeMesh = Annotated[str | None, typer.Argument(metavar="[MESH]", help=MESH_HELP)]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="take this plan instead of making one")]
ModelOf = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="the plan's model, where the file does not say it")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]

BESIDE = 90
"""Characters that a timeline's rows have beside their charts."""

BATCH_OPTIONS: Mapping[str, tuple[type, Any, str]] = {
    "batch": (int, None, "samples of the example batch (default: --global-batch, else 8)"),
    "sequence": (int, None, f"tokens of a sample (default: the config's maximum, at most {models.LONGEST})"),
    "dropout": (bool, False, "keep the config's dropout rates (otherwise 0: attention with dropout is not fused)"),
}
PLAN_OPTIONS: Mapping[str, tuple[type, Any, str]] = {
    "global_batch": (int, None, "samples of a step (default: those of the batch)"),
    "micro_batch": (int, None, "samples of a micro-batch, over all ranks"),
    "pp": (int, None, "pipeline-parallel degree"),
    "tp": (int, None, "tensor-parallel degree"),
    "dp": (int, None, "data-parallel degree"),
    "zero": (int, None, "ZeRO level: 0, 1, 2 or 3"),
    "recompute": (str, None, "none, selective or full, in all blocks"),
    "schedule": (str, None, "gpipe or 1f1b"),
    "precision": (str, None, "of the parameters: float32, bfloat16, float16 or float64"),
    "master": (str, None, "of gradients, optimizer states and its copy of the parameters, as float32 (default: none)"),
    "optimizer": (str, "adamw", "sgd, momentum, adagrad, rmsprop, adam or adamw"),
    "time_limit": (float, None, "seconds after which the best plan so far is taken"),
    "nodes": (int, None, "points of the search after which the best plan so far is taken"),
}
CONSTRAINT_OPTIONS: Mapping[str, tuple[type, Any, str]] = {
    "force": (list[str], [], 'what has to be so, as "stage 2 starts at layers.10"; may be repeated'),
    "forbid": (list[str], [], 'what may not be so, as "split lm_head.weight over tp"; may be repeated'),
}
OPTIONS = {**BATCH_OPTIONS, **PLAN_OPTIONS, **CONSTRAINT_OPTIONS}
"""Shared options: name -> type, default, help. A command with an argument `options` has them all."""

Options = dict[str, Any]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function: with the shared options if it takes `options`, and PartitionError told in red."""
    own = inspect.signature(function, eval_str=True).parameters

    @functools.wraps(function)
    def run(**given: Any) -> None:
        if "options" in own:
            given["options"] = {name: given.pop(name) for name in OPTIONS}
        try:
            function(**given)
        except PartitionError as error:
            if os.environ.get("RANK", "0") == "0":
                _stderr().print(Text(str(error), "red"), soft_wrap=True)
            report_failure(error)
            raise typer.Exit(2) from None

    shared = [_option(name, *row) for name, row in OPTIONS.items()] if "options" in own else []
    kept = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in own.values() if p.name != "options"]
    run.__signature__ = inspect.Signature([*kept, *shared])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in [*kept, *shared]}
    del run.__wrapped__
    return app.command(function.__name__.removesuffix("_command"))(run)


def _option(name: str, kind: type, default: Any, text: str) -> Parameter:
    flag = "--" + name.replace("_", "-")
    wanted: Any = kind if default is not None else kind | None
    annotation = Annotated[wanted, typer.Option(flag, help=text)]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


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
    made = _asked(_plan(*_load(model, options), mesh, options), model, options)
    if save:
        _save(made, save)
    _print(made.to_json() if as_json else str(made))


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
    loaded, batch = _load(model, options)
    with _stderr().status("planning") as status:
        found = search_mesh(
            loaded,
            batch,
            devices=devices,
            target_seconds=target,
            prices=_prices(price) if price else None,
            per_host=per_host or PER_HOST,
            say=lambda text: status.update(Text(f"planning, done: {text}")),
            **_settings(options),
        )
    best = found[0].plan
    if save and best:
        _save(best, save)
    if as_json:
        _print({"choices": [choice.to_json() for choice in found], "plan": best.to_json() if best else None})
    else:
        _print(_choices_text(found, target))


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
    trace: Annotated[Path | None, typer.Option(help="write the timeline for Chrome's tracing or Perfetto")] = None,
    everything: Annotated[bool, typer.Option("--all", help="with --why: of every operator and parameter")] = False,
    model: ModelOf = None,
    as_json: Json = False,
) -> None:
    """Print a saved plan, its timeline, or why it is as it is: then the model is traced again.

    Example: autopart show plan.json --why-not tp=4 --why-not "stage 1 starts at h.8"
    """
    saved = Plan.load(file)
    if why or why_not or prices:
        _explain(saved, model, why, everything, why_not or [], prices, as_json)
    elif clock or trace:
        _timeline(saved, trace, as_json)
    elif without_rule:
        rows = missing(saved)
        _print([{"operator": n, "calls": c, "seconds": s} for n, c, s in rows] if as_json else _missing_text(rows))
    else:
        _print(saved.to_json() if as_json else str(saved))


def _timeline(saved: Plan, trace: Path | None, as_json: bool) -> None:
    """Print a plan's timeline, a row a stage as wide as the terminal allows, and write its trace."""
    made = timeline(saved)
    if trace:
        _write(json.dumps(made.trace()), trace)
    if as_json:
        _print(made.to_json())
    else:
        console = Console()
        console.print(made.chart(max(40, console.width - BESIDE)), soft_wrap=True)


def _explain(
    saved: Plan, spec: str | None, why: bool, everything: bool, why_not: list[str], prices: bool, as_json: bool
) -> None:
    """Print what is asked of a saved plan; the time it takes once the model is planned again goes to stderr."""
    started = time.monotonic()
    with _planning() as say:
        loaded, batch, options = _of_plan(saved, spec)
        found = explain(loaded, saved.mesh, batch, **_settings(options), say=say)
    if not math.isclose(found.plan.step_seconds, saved.step_seconds, rel_tol=1e-6):
        _note(f"planned again the step takes {seconds_text(found.plan.step_seconds)}, which the answers go by")
    _note(f"traced and planned again in {time.monotonic() - started:.2f} s")
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
        _print({name: [asdict(row) for row in rows] for name, rows in told.items()})
    else:
        slack = [f"{bytes_text(found.slack)} of memory are left on the fullest device"] if prices else []
        _print("\n".join(map(str, [*answers, *reasons, *slack, *changes])))
    _note(f"answered in {taken:.2f} s of CPU")


def _of_plan(saved: Plan, spec: str | None) -> tuple[nn.Module, models.Batch, Options]:
    """The model and batch of a saved plan, and the options it was made with."""
    spec = spec or saved.request.get("model")
    if spec is None:
        raise PartitionError(
            "the plan does not say which model it is for", f"only that its class is {saved.model}", "--model MODEL"
        )
    known = {name: saved.request[name] for name in OPTIONS if name in saved.request}
    sequence = next((s[1] for s in saved.signature.inputs.values() if len(s) == 2), None)
    options = {name: row[1] for name, row in OPTIONS.items()} | {"sequence": sequence} | known
    options |= {"precision": saved.precision, "master": saved.master, "force": saved.request.get("constraints", [])}
    return *_load(spec, options), options


def _asked(made: Plan, model: str, options: Options) -> Plan:
    """A plan that remembers which model and batch it was asked for."""
    given = {name: options[name] for name in BATCH_OPTIONS if options[name]}
    return replace(made, request={**made.request, "model": model, **given})


def _missing_text(rows: list[tuple[str, int, float]]) -> str:
    if not rows:
        return "every operator has a rule"
    return "\n".join(f"{name:<48} {calls:>5} calls   {seconds_text(seconds)}" for name, calls, seconds in rows)


@command
def check_command(
    model: Model, options: Options, mesh: MaybeMesh = None, plan_file: PlanFile = None, as_json: Json = False
) -> None:
    """Run one step of a plan on simulated ranks, threads of this process, and hold it against one process.

    Example: autopart check gpt2 4:cpu --pp 2 --tp 2 --sequence 64
    """
    made = _saved(plan_file, options)
    torch.manual_seed(0)
    loaded, batch = _load(model, options, meta=False)
    made = made or _plan(loaded, batch, _needed(mesh), options)
    found = check(loaded, made.mesh, batch, plan=made)
    result = {k: v for k, v in vars(found).items() if k != "plan"}
    text = (
        "{loss:.6g} is the loss, off by {loss_error:.1e} from {against}; "
        "gradients are off by at most {gradient_error:.1e} ({worst})"
    )
    _print(result if as_json else text.format(**result))


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
        loaded, batch = _load(model, options)
        with _planning():
            made = estimate(loaded, mesh, batch, **_settings(options))
    _print(made.to_json() if as_json else str(made))


def _repriced(saved: Plan, spec: str | None) -> Plan:
    """A saved plan, priced again where it is known for which model."""
    if spec is None and "model" not in saved.request:
        _note("the plan does not say which model it is for: these are the numbers in the file; --model prices it again")
        return saved
    loaded, batch, _ = _of_plan(saved, spec)
    return reprice(saved, loaded, batch)


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
    made = _saved(plan_file, options)
    loaded, batch = _load(model, options)
    made = made or _plan(loaded, batch, _needed(mesh), options)
    files = write_folder(loaded, batch, made, to)
    _print({"folder": str(to), "files": [str(f) for f in files]} if as_json else "\n".join(map(str, files)))


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
            _note(f"{what}: {line}")
    if out:
        _write(made.text, out)
    if as_json or not out:
        _print(vars(made) if as_json else made.text.rstrip("\n"))


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
    made = _saved(plan_file, options)
    started = "RANK" in os.environ
    world = int(os.environ.get("WORLD_SIZE", processes))
    mesh = str(made.mesh) if made else mesh or f"{world}:cpu"
    if not started:
        made = made or _plan(*_load(model, options), mesh, options)
        if made.mesh.size > 1:
            raise typer.Exit(_launch(model, made, options, steps, lr, as_json))
    torch.manual_seed(0)
    quiet = os.environ.get("RANK", "0") != "0"
    loaded, batch = _load(model, options, meta=False, say=None if not started or quiet or made else _note)
    compiled = compile(loaded, made.mesh if made else mesh, batch, plan=made, **_settings(options))
    with _steps(steps, quiet) as say:
        result = train(compiled, take(batch, compiled.plan.global_batch), steps, lr, say)
    if not quiet:
        result = {**result, "plan": compiled.plan.to_json()}
        _print(result if as_json else _run_text(result))
    if dist.is_initialized():
        dist.destroy_process_group()


command(calibrate_command)


def write_folder(model: nn.Module, batch: models.Batch, made: Plan, folder: Path) -> list[Path]:
    """Emit every stage of a plan into a folder that trains on its own; the stage files.

    Raises PartitionError where the plan is for another model.
    """
    folded = prepare(model, take(batch, made.micro_batch), made.mesh, DTYPES[made.precision])
    made.check(folded)
    return write(folder, made, programs(folded, made), folded.traced.aliases, folded.traced.buffers, batch)


def _load(
    model: str, options: Options, meta: bool = True, say: Callable[[str], None] | None = None
) -> tuple[nn.Module, models.Batch]:
    samples = options["batch"] or options["global_batch"] or 8
    loaded, batch = models.load(
        model,
        samples,
        options["sequence"],
        meta,
        options["dropout"],
        say or (_note if meta else lambda text: None),
    )
    name = options["precision"]
    if name in DTYPES:
        batch = {
            k: v.to(DTYPES[name]) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in batch.items()
        }
    samples_of(batch)
    return loaded, batch


def _plan(model: nn.Module, batch: models.Batch, mesh: str, options: Options) -> Plan:
    with _planning() as say:
        return plan(model, mesh, batch, **_settings(options), say=say)


def _settings(options: Options) -> Options:
    forced, without = options["force"], [forbidden(parse(text)).text for text in options["forbid"]]
    return {name: options[name] for name in PLAN_OPTIONS} | {"constraints": [*forced, *without]}


def _saved(file: Path | None, options: Options) -> Plan | None:
    """A saved plan, whose precision, batch and sequence the options then are."""
    if file is None:
        return None
    saved = Plan.load(file)
    sequence = next((s[1] for s in saved.signature.inputs.values() if len(s) == 2), None)
    options.update(
        precision=saved.precision,
        master=saved.master,
        global_batch=saved.global_batch,
        sequence=options["sequence"] or sequence,
    )
    return saved


def _needed(mesh: str | None) -> str:
    if mesh is None:
        raise PartitionError("neither a mesh nor a plan is given", try_="MODEL MESH, or MODEL --plan PLAN.json")
    return mesh


def _save(made: Plan, file: Path) -> None:
    try:
        made.save(file)
    except OSError as error:
        raise PartitionError(f"cannot write {file}", str(error)) from error


def _write(text: str, file: Path) -> None:
    try:
        file.write_text(text)
    except OSError as error:
        raise PartitionError(f"cannot write {file}", str(error)) from error


def _launch(model: str, made: Plan, options: Options, steps: int, lr: float, as_json: bool) -> int:
    """Run this command again as the ranks of a plan; the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        made.save(file)
        line = [sys.executable, "-m", "autopart.cli", "run", model, "--plan", str(file)]
        line += ["--steps", str(steps), "--lr", str(lr), *(["--json"] if as_json else [])]
        given = {name: options[name] for name in BATCH_OPTIONS if options[name]}
        line += [f"--{k}" if v is True else f"--{k}={v}" for k, v in given.items()]
        return launch(line, made.mesh.size)


def _stderr() -> Console:
    return Console(stderr=True)


def _note(text: str) -> None:
    _stderr().print(Text(text, "dim"), soft_wrap=True)


def _print(what: Any) -> None:
    typer.echo(what if isinstance(what, str) else json.dumps(what))


@contextmanager
def _planning() -> Iterator[Callable[[str], None]]:
    """A spinner on stderr; what is yielded shows beside it how far the search is."""
    with _stderr().status("planning") as status:
        yield lambda text: status.update(Text(f"planning: {text}"))


@contextmanager
def _steps(steps: int, quiet: bool) -> Iterator[Callable[[int, float], None]]:
    """A progress bar of steps on stderr, with the loss."""
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), console=_stderr(), disable=quiet) as progress:
        task = progress.add_task("", total=steps)
        yield lambda number, loss: progress.update(task, completed=number, description=f"loss {loss:.4f}")


def _run_text(result: Mapping[str, Any]) -> str:
    losses = "\n".join(f"step {number}  loss {loss:.4f}" for number, loss in enumerate(result["losses"], 1))
    return f"{losses}\n{result['tokens_per_second']:,.0f} tokens/s"


def main() -> None:
    """The entry point of the shell. Its commands are short, so that garbage in cycles is left to the system; training
    is not: `run` collects it."""
    gc.disable()
    app()


if __name__ == "__main__":
    main()
