"""Plans models drawn at random under settings drawn at random, certifies the plans and trains one step of each.

A plan goes the whole way of a user's: made, written to a file, read again, certified, and run by simulated ranks,
against one process, in float64. Loss, gradients and buffers must agree to 1e-9, relative. A refusal is listed with its
reason. Each model has a process of its own.

    python -m benchmarks.coverage.drawn                      # 60 models by 4 settings, about 15 minutes on two cores
    python -m benchmarks.coverage.drawn --first 1000 --models 200
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

import autopart
from benchmarks.coverage.drawn_models import build, settings
from benchmarks.coverage.exactness import error_of
from benchmarks.support.alone import Row, alone

TOLERANCE = 1e-9
CPU_LIMIT = 300


def verdict(model: nn.Module, batch: Mapping[str, torch.Tensor], mesh: str, chosen: Mapping[str, Any]) -> str:
    """What comes of a model under some settings: "exact ...", "wrong: ...", "refused: ..."; "noted" where a micro-batch
    that was asked for gives another function than the whole batch, which the plan's notes say."""
    try:
        made = autopart.plan(model, mesh, batch, **chosen)
        with tempfile.TemporaryDirectory() as folder:
            made.save(Path(folder) / "plan.json")
            plan = autopart.Plan.load(Path(folder) / "plan.json")
        autopart.certify(plan, model, batch)
        off, whose = error_of(autopart.check(model, mesh, batch, plan=plan))
    except autopart.PartitionError as error:
        verb = "wrong" if error.what == "the plan does not hold" else "refused"
        return f"{verb}: {error.what}" + (f" ({error.why})" if error.why else "")
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"
    if off <= TOLERANCE:
        return f"exact ({off:.0e}) {plan.degrees}"
    noted = "micro_batch" in chosen and any("micro-batch" in note for note in plan.notes)
    return f"{'noted' if noted else 'wrong'}: {whose} off by {off:.1e} {plan.degrees}"


def trial(seed: int, count: int) -> Row:
    """A model under so many settings."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    outcomes = {}
    for number in range(count):
        model, batch = build(seed)
        mesh, chosen = settings(seed, number, len(batch["ids"]))
        outcomes[f"{mesh} {chosen}"] = verdict(model, batch, mesh, chosen)
    return {"parts": model.parts, "outcomes": outcomes}


def lines(seed: int, row: Row) -> Iterator[str]:
    """A row as text: the model, and whatever was not exact."""
    outcomes = row.get("outcomes", {"": f"failed: {row.get('failed')}"})
    exact = sum(outcome.startswith("exact") for outcome in outcomes.values())
    yield f"{seed}: {exact} of {len(outcomes)} exact, {row['cpu']:.0f} s: {row.get('parts', '')}"
    for chosen, outcome in outcomes.items():
        if not outcome.startswith("exact"):
            yield f"    {chosen}: {outcome}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="seed of the first model")
    parser.add_argument("--models", type=int, default=60)
    parser.add_argument("--settings", type=int, default=4, help="of each model")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    asked = parser.parse_args()
    seeds, counted = range(asked.first, asked.first + asked.models), Counter[str]()
    with ThreadPoolExecutor(asked.workers) as pool:
        rows = pool.map(lambda seed: alone(functools.partial(trial, seed, asked.settings), CPU_LIMIT), seeds)
        for seed, row in zip(seeds, rows, strict=True):
            print(*lines(seed, row), sep="\n", flush=True)
            counted.update(o.partition(":")[0].split()[0] for o in row.get("outcomes", {"": "failed"}).values())
    print(", ".join(f"{count} {what}" for what, count in counted.most_common()))


if __name__ == "__main__":
    main()
