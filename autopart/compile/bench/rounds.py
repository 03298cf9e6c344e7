"""Builds the systems and times them in interleaved rounds, a step of each in turn, so that whatever else the host does
falls on all alike.

All ranks start a step together, and its seconds are those of the slowest rank.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from autopart.compile.bench.judge import compare, judge
from autopart.compile.bench.own import PlannedStep
from autopart.compile.bench.setting import NotExpressibleError, Setting, Step, System, plain_step

TIMEOUT = timedelta(seconds=120)
"""Of a message between ranks; what one rank does alone may take three times as long."""

Row = dict[str, Any]


def start(device_type: str) -> None:
    """Join the ranks, over gloo and, on GPUs, nccl."""
    dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo", timeout=TIMEOUT)


@dataclass(frozen=True)
class Measured:
    """What a benchmark found.

    rows       of each system, judged and compared, the same on every rank
    reference  the losses of the unmodified model
    steps      of the systems that ran to the end, by name
    """

    rows: list[Row]
    reference: list[float]
    steps: Mapping[str, Step]


def measure(
    setting: Setting, systems: Mapping[str, System], steps: int, warm_up: int, say: Callable[[str], None]
) -> Measured:
    """Build the systems and time them.

    steps    rounds that count
    warm_up  rounds before them
    say      is called on rank 0 with a line for each system that was built
    """
    control = dist.new_group(backend="gloo", timeout=3 * TIMEOUT)
    reference = _train_alone(setting, warm_up + steps)
    rows: dict[str, Row] = {name: {"system": name, "like": system.like} for name, system in systems.items()}
    made = _build_all(setting, systems, rows, control, say)
    _run_rounds(setting, made, rows, steps, warm_up, control)
    judge(rows.values(), reference)
    compare(rows)
    dist.barrier(group=control)
    return Measured(list(rows.values()), reference, made)


def _train_alone(setting: Setting, steps: int) -> list[float]:
    """The losses of the unmodified model on one process, step by step; every rank does the same."""
    model = setting.copy_of_model()
    step = plain_step(model, setting.whole_batch(), setting.optimizer_of(model.parameters()))
    return [float(step()) for _ in range(steps)]


def _build_all(
    setting: Setting, systems: Mapping[str, System], rows: dict[str, Row], control: Any, say: Callable[[str], None]
) -> dict[str, Step]:
    """The steps of the systems that could be built and run one; the other rows are told why not."""
    made: dict[str, Step] = {}
    for name, row in rows.items():
        started = time.perf_counter()
        step, error = None, ""
        try:
            step, row["note"] = systems[name].build(setting)
            row["build_seconds"] = time.perf_counter() - started
            row["losses"] = [float(step())]
            if isinstance(step, PlannedStep):
                row["predicted_seconds"] = step.compiled.plan.step_seconds
        except NotExpressibleError as reason:
            error = f"not expressible: {reason}"
        except ImportError as reason:
            error = f"not installed: {_first_line(reason)}"
        except Exception as failure:
            error = f"failed: {type(failure).__name__}: {_first_line(failure)}"
        errors = _on_all_ranks(error, control)
        found = dict.fromkeys(filter(None, errors))
        told = [f"{e} (rank {errors.index(e)})" if len(set(errors)) > 1 else e for e in found]
        row["status"] = "; ".join(told) or "ok"
        if setting.rank == 0:
            say(f"{name}: {row['status']}, {time.perf_counter() - started:.1f} s")
        if step is not None and not any(errors):
            made[name] = step
    return made


def _first_line(error: BaseException) -> str:
    return next(filter(None, map(str.strip, str(error).splitlines())), "")[:160]


def _on_all_ranks(value: Any, control: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value, group=control)
    return everyone


def _run_rounds(
    setting: Setting, made: dict[str, Step], rows: dict[str, Row], steps: int, warm_up: int, control: Any
) -> None:
    """Note losses of all rounds, and the slowest rank's seconds of those that count. A step that fails takes its system
    out of the later rounds."""
    mine: dict[str, list[float]] = {name: [] for name in made}
    gc.collect()
    gc.freeze()
    for number in range(1, warm_up + steps):  # every system has made its first step
        for name in list(made):
            dist.barrier(group=control)
            started = _now(setting.device)
            error = ""
            try:
                loss = made[name]()
            except Exception as failure:
                error = f"failed: step {number}: {type(failure).__name__}: {_first_line(failure)}"
            taken = _now(setting.device) - started
            errors = [e for e in _on_all_ranks(error, control) if e]
            if errors:
                rows[name]["status"] = errors[0]
                del made[name]
                continue
            rows[name]["losses"].append(float(loss))
            if number >= warm_up:
                mine[name].append(taken)
    gc.unfreeze()
    for name in made:
        times = [max(ranks) for ranks in zip(*_on_all_ranks(mine[name], control), strict=True)]
        if times:
            rows[name] |= {"median_seconds": statistics.median(times), "min_seconds": min(times), "seconds": times}


def _now(device: torch.device) -> float:
    """The time once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
