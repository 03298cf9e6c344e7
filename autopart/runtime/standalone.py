"""A folder of emitted code that trains on its own: what is written into it, and what its run.py calls.

stage_0.py, ...         the stages, free to be edited
plan.json               the plan they were emitted from
program.json            instructions, messages, tied parameters, and what a batch looks like
constants.safetensors   the model's buffers, where it has any
run.py                  python run.py, or torchrun --nproc-per-node RANKS run.py
"""

import argparse
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autopart.errors import PartitionError
from autopart.plan.data import Plan
from autopart.plan.schedules.ops import Instruction, Op
from autopart.plan.schedules.verify import verify
from autopart.runtime.compiled import Compiled
from autopart.runtime.emitted import Message, Program
from autopart.runtime.groups import make_groups
from autopart.runtime.launch import launch
from autopart.runtime.optimizers import OPTIMIZERS
from autopart.runtime.watchdog import report_failure, start_watchdog

RUN = '''"""{model} on {degrees}: python run.py --help. Written by autopart."""

from pathlib import Path

from autopart.runtime.standalone import main

main(Path(__file__).parent)
'''

Say = Callable[[int, float], None]


def write(
    folder: Path,
    plan: Plan,
    programs: Sequence[Program],
    aliases: Mapping[str, str],
    constants: Mapping[str, Tensor | None],
    batch: Mapping[str, Any],
) -> list[Path]:
    """Write the folder; the files of its stages.

    aliases    name of a tied parameter -> the name of the parameter it is tied to
    constants  the values of buffers
    batch      gives random batches their dtypes and ranges; its values are not written

    Raises PartitionError where a buffer has no value.
    """
    lacking = [name for name, value in constants.items() if value is None]
    if lacking:
        raise PartitionError(
            f"the buffer {lacking[0]} has no value", "it is on the meta device", "build the model on the CPU"
        )
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"stage_{program.stage}.py" for program in programs]
    for file, program in zip(files, programs, strict=True):
        file.write_text(program.source)
    for old in set(folder.glob("stage_*.py")) - set(files):
        old.unlink()
    plan.save(folder / "plan.json")
    data = _program_to_json(programs, aliases, {k: batch[k] for k in plan.signature.inputs})
    (folder / "program.json").write_text(json.dumps(data, indent=1) + "\n")
    save_file(
        {k: v.detach().cpu().contiguous().clone() for k, v in constants.items() if v is not None},
        folder / "constants.safetensors",
    )
    (folder / "run.py").write_text(RUN.format(model=plan.model, degrees=plan.degrees))
    return files


def _program_to_json(
    programs: Sequence[Program], aliases: Mapping[str, str], inputs: Mapping[str, Tensor]
) -> dict[str, Any]:
    first = programs[0]
    return {
        "instructions": [[f"{i.op} {i.micro_batch} {i.peer}" for i in p.instructions] for p in programs],
        "messages": [{**vars(m), "dtype": _dtype_name(m.dtype)} for m in first.messages],
        "tied": first.tied,
        "sample_axes": first.sample_axes,
        "aliases": aliases,
        "inputs": {
            name: {
                "dtype": _dtype_name(v.dtype),
                "below": None if v.is_floating_point() else int(v.max()) + 1,
            }
            for name, v in inputs.items()
        },
    }


def read_program(folder: Path, stage: int) -> Program:
    """What a stage runs, from a folder that `write` made. Raises PartitionError where the folder is damaged."""
    try:
        data = json.loads((folder / "program.json").read_text())
        lists = [[_instruction(text, s) for text in texts] for s, texts in enumerate(data["instructions"])]
        verify(lists)
        messages = [
            Message(
                m["name"],
                m["producer"],
                tuple(m["consumers"]),
                tuple(m["shape"]),
                _dtype(m["dtype"]),
                m["grad"],
            )
            for m in data["messages"]
        ]
        tied = {name: tuple(at) for name, at in data["tied"].items()}
        source = (folder / f"stage_{stage}.py").read_text()
        return Program(source, stage, lists[stage], messages, tied, tuple(data["sample_axes"]))
    except PartitionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise PartitionError(
            f"cannot read the stages in {folder}", f"{type(error).__name__}: {error}", "autopart emit, again"
        ) from error


def _instruction(text: str, stage: int) -> Instruction:
    op, micro_batch, peer = text.split()
    return Instruction(Op(op), stage, int(micro_batch), int(peer))


def read(folder: Path, weights: Path | None = None) -> Compiled:
    """This rank's stage from a folder, ready for `step`, in one of the processes of its plan; the watchdog runs.

    weights  a safetensors file by the model's names; None: `random_weight`

    Raises PartitionError for a damaged folder, for weights that lack a parameter, and for another number of processes.
    """
    plan = Plan.load(folder / "plan.json")
    groups = make_groups(plan.pp, plan.dp, plan.tp, plan.shard_size)
    program = read_program(folder, groups.pp.rank)
    constants = load_file(folder / "constants.safetensors")
    whole = {name: torch.zeros(()).expand(shape) for name, shape in plan.signature.parameters.items()}
    compiled = Compiled(_Names(whole), plan, groups, program, {}, constants)
    here = {p.origin.name: p.origin.whole for _, p in compiled.stage.named_parameters()}  # type: ignore[attr-defined]
    values = {name: random_weight(name, shape) for name, shape in here.items()}
    if weights is not None:
        values = _given(weights, here, json.loads((folder / "program.json").read_text())["aliases"])
    compiled.fill({**constants, **values})
    start_watchdog(compiled.executor.activity)
    return compiled


class _Names(nn.Module):
    """Stands for the model in `Compiled`: parameters of the right names and shapes, without memory."""

    def __init__(self, whole: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.whole = whole

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, Any]]:
        return iter(self.whole.items())


def random_weight(name: str, shape: Sequence[int]) -> Tensor:
    """A parameter's initial value, the same on every rank, seeded by its name.

    Normal with a standard deviation of 0.02 where it has two dims or more; otherwise 1 for a weight, as of a norm, and
    0 for a bias.
    """
    if len(shape) < 2:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))) * 0.02


def _given(file: Path, here: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str]) -> dict[str, Tensor]:
    try:
        values = {aliases.get(name, name): value for name, value in load_file(file).items()}
    except Exception as error:  # safetensors has an error class of its own, and raises OSError too
        raise PartitionError(f"cannot read the weights {file}", str(error)) from error
    for name, shape in here.items():
        found = tuple(values[name].shape) if name in values else None
        if found != shape:
            why = "it is not there" if found is None else f"it has shape {list(found)}"
            raise PartitionError(f"{file} has no {name} of shape {list(shape)}", why)
    return values


def random_batch(folder: Path, plan: Plan, seed: int) -> dict[str, Tensor]:
    """A whole random batch of a plan, the same on every rank: floats are normal, integers below the largest that
    `write` saw."""
    generator = torch.Generator().manual_seed(seed)
    batch: dict[str, Tensor] = {}
    for name, like in json.loads((folder / "program.json").read_text())["inputs"].items():
        shape = (plan.global_batch, *plan.signature.inputs[name][1:])
        below = like["below"]
        drawn = (
            torch.randn(shape, generator=generator)
            if below is None
            else torch.randint(below, shape, generator=generator)
        )
        batch[name] = drawn.to(_dtype(like["dtype"]))
    return batch


def train(compiled: Compiled, batch: Mapping[str, Any], steps: int, lr: float, say: Say) -> dict[str, Any]:
    """Train on one batch repeatedly: losses, seconds of every step, samples/s and tokens/s.

    lr   learning rate of the plan's optimizer
    say  called with every step's number, from 1, and its loss

    Rates are those of the median step. Tokens/s are None where samples have no known sequence (`Signature.tokens`).
    """
    plan = compiled.plan
    kind, settings = OPTIMIZERS[plan.optimizer]
    compiled.optimizer(kind, lr=lr, **settings)
    losses, seconds = [], []
    for number in range(1, steps + 1):
        started = time.perf_counter()
        losses.append(float(compiled.step(batch)))
        seconds.append(time.perf_counter() - started)
        say(number, losses[-1])
    median = sorted(seconds)[len(seconds) // 2] if seconds else float("inf")
    rate, tokens = plan.global_batch / median, plan.signature.tokens
    rates = {"samples_per_second": rate, "tokens_per_second": tokens and tokens * rate}
    return {"losses": losses, "step_seconds": seconds, **rates}


def rate_text(result: Mapping[str, Any]) -> str:
    """The rate of what `train` gave: tokens/s where they are known, else samples/s."""
    tokens = result["tokens_per_second"]
    return f"{result['samples_per_second']:,.0f} samples/s" if tokens is None else f"{tokens:,.0f} tokens/s"


def main(folder: Path, arguments: Sequence[str] | None = None) -> None:
    """Train the plan of `folder`: as one of torchrun's processes, or by starting as many processes here as the plan has
    ranks."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _options(given)
    try:
        plan = Plan.load(folder / "plan.json")
        if "RANK" not in os.environ and plan.mesh.size > 1:
            sys.exit(launch([sys.executable, str(folder / "run.py"), *given], plan.mesh.size))
        compiled = read(folder, options.weights)
        batch = random_batch(folder, plan, options.seed)
        result = train(compiled, batch, options.steps, options.lr, _printer(options.json or compiled.rank > 0))
    except PartitionError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"autopart: {error}", file=sys.stderr)
        report_failure(error)
        sys.exit(2)
    if compiled.rank == 0:
        print(json.dumps(result) if options.json else rate_text(result))
    if dist.is_initialized():
        dist.destroy_process_group()


def _printer(quiet: bool) -> Say:
    return lambda number, loss: None if quiet else print(f"step {number}  loss {loss:.4f}", flush=True)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the stages in this folder on random data.")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (default: 10)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: 1e-3)")
    parser.add_argument("--weights", type=Path, help="a safetensors file by the model's names (default: random)")
    parser.add_argument("--seed", type=int, default=0, help="of the random batch (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the losses and times as JSON")
    return parser.parse_args(arguments)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
