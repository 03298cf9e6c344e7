"""autopart bench: step times of a model under autopart's plans and under PyTorch's own ways."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.distributed as dist
import typer

from autopart.cli.report import writable, write_report
from autopart.cli.shared import Json, Mesh, Model, Options, command, load, note, settings_of, tell, write
from autopart.errors import PartitionError
from autopart.frontend.batch import samples_of
from autopart.hardware import mesh as meshes
from autopart.plan.report import Bench
from autopart.runtime.launch import launch
from autopart.runtime.measurement import Measurement

if TYPE_CHECKING:
    from autopart.compile.bench.rounds import Measured
    from autopart.compile.bench.setting import Setting

TRACED = 7
"""Steps of the own plan that its report is of, after the rounds; bytes are counted in the first two."""


@command
def bench_command(
    model: Model,
    mesh: Mesh,
    options: Options,
    rounds: Annotated[int, typer.Option(help="steps of every system that count")] = 10,
    warm_up: Annotated[int, typer.Option(help="steps of every system before them")] = 3,
    micro_batches: Annotated[
        int | None, typer.Option(help="of pipelines (default: two a rank, if they divide)")
    ] = None,
    lr: Annotated[float, typer.Option(help="learning rate")] = 1e-3,
    csv: Annotated[Path | None, typer.Option(help="write the table here, as CSV")] = None,
    report: Annotated[
        Path | None, typer.Option(help="write the own plan, a measured step of it and the table as one HTML page")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time a training step of every uniform configuration, one process, DDP, ZeroRedundancyOptimizer and FSDP2 beside
    the planner's own plan, on processes started here, or as one of torchrun's. The other options shape that plan.

    Example: autopart bench gpt2 2:cpu --sequence 64 --rounds 5
    """
    from autopart.compile.bench import report as reports  # FSDP2 takes a while to load
    from autopart.compile.bench.rounds import measure, start
    from autopart.compile.bench.setting import OPTIMIZERS, Setting
    from autopart.compile.bench.systems import systems

    gc.enable()
    where = meshes.Mesh.of(mesh)
    _check(options, rounds, warm_up, list(OPTIMIZERS))
    for file in filter(None, (csv, report)):
        writable(file)
    if "RANK" not in os.environ:
        status = launch([sys.executable, "-m", "autopart.cli.main", *sys.argv[1:]], where.size)
        raise typer.Exit(status)
    torch.manual_seed(0)
    loaded, batch = load(model, options, meta=False)
    device = _device(where.size)
    start(device.type)
    samples = samples_of(batch)
    parts = micro_batches or next(n for n in (2 * where.size, where.size, samples) if samples % n == 0)
    setting = Setting(loaded.train(), batch, device, where, parts, options["optimizer"] or "adamw", lr)
    wanted = {k: v for k, v in settings_of(options).items() if k != "optimizer"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the systems' own, a dozen times
        measured = measure(setting, systems(where.size, **wanted), rounds, warm_up, note)
    found = reports.record(setting, measured, model=model, samples=samples, rounds=rounds, warm_up=warm_up)
    if report:
        _write_report(measured, setting, reports.of_report(found), report)
    if dist.get_rank() == 0:
        if csv:
            write(csv, lambda file: file.write_text(reports.csv_text(found)))
        tell(found if as_json else _text(found, f"{model} on {mesh}, {samples} samples a step"))
    dist.destroy_process_group()


def _write_report(measured: Measured, setting: Setting, bench: Bench, file: Path) -> None:
    """Run a few more steps of the own plan, and write its report on rank 0. All ranks call it."""
    from autopart.compile.bench.own import OWN, PlannedStep

    own = measured.steps.get(OWN)
    if not isinstance(own, PlannedStep):
        if not dist.get_rank():
            note(f"no report: {next(row['status'] for row in measured.rows if row['system'] == OWN)}")
        return
    own.compiled.callbacks.append(measurement := Measurement(own.compiled, TRACED))
    for _ in range(TRACED):
        own()
    write_report(own.compiled, setting.model, setting.batch, measurement, file, bench)


def _check(options: Options, rounds: int, warm_up: int, optimizers: list[str]) -> None:
    if rounds < 1 or warm_up < 1:
        raise PartitionError(
            f"{rounds} rounds after {warm_up}", "a median needs one at least", "--rounds 10 --warm-up 3"
        )
    if options["precision"] not in (None, "float32"):
        raise PartitionError(
            f"--precision {options['precision']}", "all systems are compared in float32", "--precision float32"
        )
    if options["optimizer"] not in (None, *optimizers):
        raise PartitionError(
            f"--optimizer {options['optimizer']}", "not all systems have it", f"--optimizer {' or '.join(optimizers)}"
        )


def _device(ranks: int) -> torch.device:
    """This rank's GPU where there is one for every rank, else the CPU."""
    if torch.cuda.device_count() < ranks:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def _text(found: dict[str, Any], title: str) -> str:
    from rich.console import Console

    from autopart.compile.bench import report as reports

    console = Console(width=None if sys.stdout.isatty() else 170)
    with console.capture() as captured:
        console.print(reports.table(found, title))
    return captured.get().rstrip()
