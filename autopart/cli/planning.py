"""autopart plan | mesh | estimate: planning needs no devices and no weights."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from autopart.cli import models as models
from autopart.cli.shared import (
    BATCH_OPTIONS,
    MODEL_HELP,
    Json,
    MaybeMesh,
    Mesh,
    Model,
    ModelOf,
    Options,
    command,
    load,
    make_plan,
    note,
    of_plan,
    planning,
    settings_of,
    stderr,
    tell,
    write,
)
from autopart.compile.api import estimate
from autopart.errors import PartitionError
from autopart.plan.data import Plan
from autopart.plan.estimate import Estimate
from autopart.plan.units import seconds_text
from autopart.planner.explain.mesh_search import PER_HOST, MeshChoice, search_mesh
from autopart.planner.explain.price_plan import price_plan


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
        write(save, made.save)
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
        write(save, best.save)
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
    """A line for each mesh, the best first. A star marks a mesh that no other beats in both time and cost (in devices,
    without prices)."""
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


def _asked(made: Plan, model: str, options: Options) -> Plan:
    """The plan, with the model and the batch that the command line names in its request."""
    given = {name: options[name] for name in BATCH_OPTIONS if options[name]}
    return replace(made, request={**made.request, "model": model, **given})


@command
def estimate_command(
    model: Annotated[str, typer.Argument(metavar="MODEL|PLAN.json", help=f"{MODEL_HELP}; or a saved plan")],
    options: Options,
    mesh: MaybeMesh = None,
    of: ModelOf = None,
    as_json: Json = False,
) -> None:
    """What a configuration costs, whether it fits or not. Without MESH: what a saved plan, which may have been edited
    by hand, costs.

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
    """A saved plan, priced again where its model is known."""
    if spec is None and "model" not in saved.request:
        note("the plan does not say which model it is for: these are the numbers in the file; --model prices it again")
        return saved
    loaded, batch, _ = of_plan(saved, spec)
    return price_plan(saved, loaded, batch)
