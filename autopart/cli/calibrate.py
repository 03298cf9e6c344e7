"""The shell's `autopart calibrate`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from autopart.cli.shared import Json, command
from autopart.runtime.calibrate.run import DEFAULT_ROUNDS, calibrate


@command
def calibrate_command(
    mesh: Annotated[str, typer.Argument(metavar="MESH", help="DEVICES:DEVICE of this host, as 4:cpu or 8:h100-80gb")],
    to: Annotated[Path, typer.Option("--to", help="the file to write")],
    name: Annotated[str, typer.Option(help="of the device there (default: DEVICE-DEVICES)")] = "",
    dtype: Annotated[list[str] | None, typer.Option(help="to measure products of; may be repeated")] = None,
    rounds: Annotated[int, typer.Option(help="of which the medians are taken")] = DEFAULT_ROUNDS,
    quick: Annotated[bool, typer.Option("--quick", help="few sizes: to try whether it runs")] = False,
    as_json: Json = False,
) -> None:
    """Measure the devices and links of this host, and write them as rows that a mesh can name.

    Example: autopart calibrate 4:cpu --to my.toml && AUTOPART_HARDWARE=my.toml autopart plan gpt2 4:cpu-4
    """
    made = calibrate(mesh, to, name=name, dtypes=tuple(dtype or ()), rounds=rounds, quick=quick)
    text = f"{made} is in {to}; AUTOPART_HARDWARE={to} makes it known"
    typer.echo(json.dumps({"name": made, "file": str(to)}) if as_json else text)
