"""Time a training step of autopart's plans beside other systems and hand-written code.

Every system trains the same model from the same weights on the same batch with the same optimizer, in the same
processes. They take turns, a step each, so that whatever else the machine does falls on all alike. A step is the
forward and backward pass, the optimizer, and the loss of the whole batch on every rank. A system whose losses are not
those of the unmodified model on one process is shown and not ranked; one that cannot run says why.

    python -m benchmarks.harness --ranks 4 --model llama --json FILE --csv FILE
    make bench      both models on 2 and on 4 ranks, and the tables of docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from rich.console import Console
from torch.distributed.device_mesh import init_device_mesh

import autopart
from autopart.compile.bench import report, rounds
from autopart.compile.bench.setting import OPTIMIZERS, Setting
from autopart.runtime.launch import launch
from benchmarks.harness.models import MODELS, make
from benchmarks.harness.systems import systems
from benchmarks.runtime.ranks import profiled
from benchmarks.support.command import command_line

CALIBRATION_ROUNDS = 5
"""Of a profile that is not there."""


def main() -> None:
    """Start the ranks, or be one."""
    options = parse(sys.argv[1:])
    if "RANK" in os.environ:
        run_rank(options)
        return
    devices = torch.cuda.device_count()
    if torch.cuda.is_available() and devices < options.ranks:
        sys.exit(f"{options.ranks} ranks need as many GPUs, torch finds {devices}; CUDA_VISIBLE_DEVICES= takes CPUs")
    command = [sys.executable, "-m", "benchmarks.harness", *sys.argv[1:]]
    if options.profile and not options.profile.exists():
        profiled(options.ranks, options.profile, CALIBRATION_ROUNDS)
    sys.exit(launch(command, options.ranks))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, those that do not fit each other refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", choices=list(MODELS), default="gpt2")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="samples of a step, over all ranks")
    parser.add_argument("--micro-batches", type=int, help="of the pipelines (default: two a rank, at most the batch)")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="sgd")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=10, help="steps of every system that count")
    parser.add_argument("--warm-up", type=int, default=3, help="steps of every system before them")
    parser.add_argument("--profile", type=Path, help="that autopart plans on; calibrated first where it is not there")
    parser.add_argument("--systems", nargs="+", help="only these (default: all)")
    parser.add_argument("--json", type=Path, help="write all of the results here")
    parser.add_argument("--csv", type=Path, help="write a line for each system here")
    options = parser.parse_args(arguments)
    options.micro_batches = options.micro_batches or min(2 * options.ranks, options.batch)
    for name, divisor in (("ranks", options.ranks), ("micro-batches", options.micro_batches)):
        if options.batch % divisor:
            parser.error(f"--batch {options.batch} does not divide by the {divisor} {name}")
    known = list(systems(options.ranks))
    if unknown := [name for name in options.systems or () if name not in known]:
        parser.error(f"no system {unknown[0]!r}: {', '.join(known)}")
    return options


def run_rank(options: argparse.Namespace) -> None:
    """Measure, and let rank 0 report."""
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    setting = make_setting(options)
    chosen = {k: v for k, v in systems(options.ranks).items() if not options.systems or k in options.systems}
    measured = rounds.measure(setting, chosen, options.rounds, options.warm_up, say)
    config = {k: v for k, v in vars(options).items() if k not in ("json", "csv", "systems", "profile")}
    found = {"command": command_line("benchmarks.harness"), **report.record(setting, measured, **config)}
    if setting.rank == 0:
        title = f"{options.model}, {found['config']['parameters'] / 1e6:.1f}M parameters, batch {options.batch} x "
        title += f"{options.sequence}, {options.ranks} ranks on {setting.device.type}"
        Console(width=None if sys.stdout.isatty() else 170).print(report.table(found, title))
        if options.json:
            report.write_json(found, options.json)
        if options.csv:
            options.csv.write_text(report.csv_text(found))
    dist.destroy_process_group()


def make_setting(options: argparse.Namespace) -> Setting:
    """The same model and batch on every rank, and where they go."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    rounds.start(device.type)
    model, batch = make(options)
    if options.profile:
        autopart.load_hardware(options.profile)
        where = autopart.Mesh.of(f"{options.ranks}:cpu-{options.ranks}")
    else:
        mesh = init_device_mesh(device.type, (options.ranks,), mesh_dim_names=("dp",))
        where = replace(autopart.Mesh.of(mesh), axes=())
    return Setting(model, batch, device, where, options.micro_batches, options.optimizer, options.lr)


def say(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
