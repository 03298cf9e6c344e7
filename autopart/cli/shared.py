"""What the commands of the shell share: their options, what they load, and how they speak."""

import functools
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from inspect import Parameter
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args

import torch
import typer
from rich.console import Console
from rich.text import Text
from torch import nn

from autopart.cli import models as models
from autopart.compile.api import check_plan, plan
from autopart.errors import PartitionError
from autopart.frontend.batch import DTYPES, samples_of
from autopart.hardware import mesh as meshes
from autopart.plan.data import Plan
from autopart.planner.constraint_text import forbidden, parse
from autopart.planner.request import SETTINGS, Request
from autopart.runtime.watchdog import report_failure

app = typer.Typer(
    help="Find the fastest way to train a model on a mesh of devices, and train it so.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"autopart {version('autopart')}")
        raise typer.Exit


@app.callback()
def shared_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """What every command has."""


MODEL_HELP = (
    "a model type or size (gpt2, llama-3-8b), a config.json or its folder, or module:function that returns model, batch"
)
MESH_HELP = r'"[HOSTSx]DEVICES:DEVICE\[@LINK]\[/HOSTS_PER_POD:OVERSUBSCRIPTION]", as 4x8:h100-80gb or 4:cpu'
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Mesh = Annotated[str, typer.Argument(metavar="MESH", help=MESH_HELP)]
MaybeMesh = Annotated[str | None, typer.Argument(metavar="[MESH]", help=MESH_HELP)]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="take this plan instead of making one")]
ModelOf = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="the plan's model, where the file does not say it")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]

BATCH_OPTIONS: Mapping[str, tuple[type, Any, str]] = {
    "batch": (int, None, "samples of the example batch (default: --global-batch, else 8)"),
    "sequence": (int, None, f"tokens of a sample (default: the config's maximum, at most {models.LONGEST})"),
    "dropout": (bool, False, "keep the config's dropout rates (otherwise 0: attention with dropout is not fused)"),
}
PLAN_OPTIONS: Mapping[str, tuple[type, Any, str]] = {
    name: (
        (get_args(kind) or (kind,))[0],
        None if NoneType in get_args(kind) else getattr(Request, name),
        text,
    )
    for name, (kind, text) in SETTINGS.items() if name not in ("no_fuse", "constraints")
}  # fmt: skip
CONSTRAINT_OPTIONS: Mapping[str, tuple[type, Any, str]] = {
    "force": (list[str], [], 'what has to be so, as "stage 2 starts at layers.10"; may be repeated'),
    "forbid": (list[str], [], 'what may not be so, as "split lm_head.weight over tp"; may be repeated'),
    "no_fuse": (list[str], [], "a fused kernel to leave out, as swiglu; may be repeated"),
}
OPTIONS = {**BATCH_OPTIONS, **PLAN_OPTIONS, **CONSTRAINT_OPTIONS}
"""Name of a shared option -> its type, default and help. A command with an argument `options` has all of them."""

Options = dict[str, Any]

EXAMPLE = 8
"""Samples of an example batch where the user gives no number; and the most that a plan traces."""


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function. It has the shared options if the function takes `options`; a PartitionError is
    printed in red."""
    own = inspect.signature(function, eval_str=True).parameters

    @functools.wraps(function)
    def run(**given: Any) -> None:
        if "options" in own:
            given["options"] = {name: given.pop(name) for name in OPTIONS}
        try:
            function(**given)
        except PartitionError as error:
            if os.environ.get("RANK", "0") == "0":
                stderr().print(Text(str(error), "red"), soft_wrap=True)
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


def load(
    model: str, options: Options, meta: bool = True, say: Callable[[str], None] | None = None
) -> tuple[nn.Module, models.Batch]:
    samples = options["batch"] or options["global_batch"] or EXAMPLE
    if meta and ":" not in model:  # a plan needs the number of samples, not the samples
        options["global_batch"] = options["global_batch"] or samples
        samples = min(samples, EXAMPLE)
    loaded, batch = models.load(
        model,
        samples,
        options["sequence"],
        meta,
        options["dropout"],
        say or (note if meta else lambda text: None),
    )
    name = options["precision"]
    if name in DTYPES:
        batch = {
            k: v.to(DTYPES[name]) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in batch.items()
        }
    samples_of(batch)
    return loaded, batch


def make_plan(model: nn.Module, batch: models.Batch, mesh: str, options: Options) -> Plan:
    with planning() as say:
        return plan(model, mesh, batch, **settings_of(options), on_progress=say)


def settings_of(options: Options) -> Options:
    forced, without = options["force"], [forbidden(parse(text)).text for text in options["forbid"]]
    return {name: options[name] for name in PLAN_OPTIONS} | {
        "no_fuse": options["no_fuse"],
        "constraints": [*forced, *without],
    }


def saved_plan(file: Path | None, options: Options, mesh: str | None) -> Plan | None:
    """A saved plan. Precision, batch and sequence of `options` become the plan's. Raises PartitionError where a mesh is
    given too, and has another number of ranks."""
    if file is None:
        return None
    saved = Plan.load(file)
    if mesh is not None:
        check_plan(saved, meshes.Mesh.of(mesh))
    sequence = next((s[1] for s in saved.signature.inputs.values() if len(s) == 2), None)
    options.update(
        precision=saved.precision,
        master=saved.master,
        global_batch=saved.global_batch,
        sequence=options["sequence"] or sequence,
    )
    return saved


def of_plan(saved: Plan, spec: str | None) -> tuple[nn.Module, models.Batch, Options]:
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
    return *load(spec, options), options


def needed(mesh: str | None) -> str:
    if mesh is None:
        raise PartitionError("neither a mesh nor a plan is given", try_="MODEL MESH, or MODEL --plan PLAN.json")
    return mesh


def write(file: Path, writes: Callable[[Path], object]) -> None:
    """Call a function that writes a file. Raises PartitionError where the file cannot be written."""
    try:
        writes(file)
    except OSError as error:
        raise PartitionError(f"cannot write {file}", str(error)) from error


def stderr() -> Console:
    return Console(stderr=True)


def note(text: str) -> None:
    stderr().print(Text(text, "dim"), soft_wrap=True)


def tell(what: Any) -> None:
    typer.echo(what if isinstance(what, str) else json.dumps(what))


@contextmanager
def planning() -> Iterator[Callable[[str], None]]:
    """A spinner on stderr. The function that is yielded shows the search's progress next to it."""
    with stderr().status("planning") as status:
        yield lambda text: status.update(Text(f"planning: {text}"))
