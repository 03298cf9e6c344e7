"""Plans a tiny model of every architecture on four ranks, with the planner's own choice, and certifies every plan.

Through the public API alone: `autopart.plan(model, "4:cpu", batch)`, then `autopart.certify`. Every model has a process
of its own, with autopart and transformers imported before. Printed are how many plans were certified, the CPU seconds
of planning (user and system, tracing counted) and the proven gaps, beside those of a baseline for the same models.

    python -m benchmarks.planning.certificates                           # all
    python -m benchmarks.planning.certificates --only clm:gpt2,img:vit
    python -m benchmarks.planning.certificates --every 12 --json FILE    # a sample
    python -m benchmarks.planning.certificates --degrees tp=2,pp=2       # degrees that are asked for

A baseline is an earlier file of results, of the same settings: --baseline FILE.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.support.alone import Row, alone, cpu_seconds
from benchmarks.support.command import command_line

RESULTS = Path(__file__).parents[1] / "results"
CPU_LIMIT = 3.0
"""CPU seconds that planning a tiny model may take over imports."""
GIVEN_UP = 300
"""CPU seconds after which a model's process is ended."""
FIGURES = ("pp", "dp", "tp", "micro_batch", "zero", "recompute", "step_seconds", "bound_seconds", "gap", "status")


def trial(task: str, model_type: str, settings: Mapping[str, Any]) -> Row:
    """Build, plan and certify one architecture."""
    import torch

    import autopart
    from benchmarks.coverage.zoo_models import Unbuildable, build

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    try:
        model, batch = build(task, model_type)
    except Unbuildable as error:
        return {"outcome": f"not built: {error}"}
    started = cpu_seconds()
    try:
        plan = autopart.plan(model, "4:cpu", batch, **settings)
    except autopart.PartitionError as error:
        return {"outcome": f"refused: {error}", "planning_cpu": cpu_seconds() - started}
    told = plan.to_json()
    row = {"planning_cpu": cpu_seconds() - started, **{name: told[name] for name in FIGURES}}
    try:
        autopart.certify(plan, model, batch)
    except autopart.PartitionError as error:
        return {**row, "outcome": f"not certified: {error}"}
    return {**row, "outcome": "certified"}


def summary(rows: Sequence[Row], before: Mapping[str, Row]) -> list[str]:
    """What is printed of all rows; `before` are those of a baseline, by model."""
    kinds = Counter(row["outcome"].partition(":")[0] for row in rows)
    planned = [row for row in rows if "gap" in row]
    lines = [f"{len(rows)} architectures: {', '.join(f'{many} {kind}' for kind, many in kinds.most_common())}"]
    lines += [f"  {row['model']}: {row['outcome']}" for row in rows if row["outcome"] != "certified"]
    if not planned:
        return lines
    cpu, gaps = [row["planning_cpu"] for row in planned], [row["gap"] for row in planned]
    slow = [f"{row['model']} {row['planning_cpu']:.1f}" for row in planned if row["planning_cpu"] > CPU_LIMIT]
    lines.append(f"CPU s to plan: median {statistics.median(cpu):.2f}, max {max(cpu):.2f}")
    lines.append(f"  above {CPU_LIMIT:g}: {', '.join(slow) or 'none'}")
    lines.append(f"gap: median {statistics.median(gaps):.2%}, max {max(gaps):.2%}")
    pairs = [(before[row["model"]], row) for row in planned if "gap" in before.get(row["model"], {})]
    if pairs:
        lines.append(f"{len(pairs)} of them in the baseline:")
        for name, unit in (("planning_cpu", "{:.2f}"), ("gap", "{:.2%}")):
            both = [[pair[i][name] for pair in pairs] for i in range(2)]
            told = [f"median {unit.format(statistics.median(x))}, max {unit.format(max(x))}" for x in both]
            lines.append(f"  {name}: {told[0]} before; {told[1]} now")
        wider = [
            f"{new['model']} {old['gap']:.2%} -> {new['gap']:.2%}"
            for old, new in pairs
            if new["gap"] > old["gap"] + 1e-6
        ]
        longer = [new["step_seconds"] / old["step_seconds"] - 1 for old, new in pairs]
        lines.append(f"  gaps that are wider: {', '.join(wider) or 'none'}")
        lines.append(f"  steps: {max(longer):+.3%} at most, {min(longer):+.3%} at least")
    return lines


def settings_of(text: str) -> dict[str, Any]:
    """ "tp=2,pp=2" as keywords."""
    pairs = (pair.split("=") for pair in text.split(",") if pair)
    return {name: int(value) for name, value in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="task:model_type, comma-separated")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one of N architectures")
    parser.add_argument("--degrees", default="", metavar="NAME=DEGREE,...", help="settings that are asked for")
    parser.add_argument("--json", type=Path, default=RESULTS / "certificates.json", help="where the results go")
    parser.add_argument("--baseline", type=Path, default=RESULTS / "certificates_baseline.json", metavar="FILE")
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"}
    import autopart  # noqa: F401  # imported once, before the forks
    from benchmarks.coverage.zoo_models import architectures

    names = set(arguments.only.split(",")) - {""}
    todo = [pair for pair in architectures() if not names or ":".join(pair) in names][:: arguments.every]
    before: dict[str, Row] = {}
    if arguments.baseline.exists():
        before = {row["model"]: row for row in json.loads(arguments.baseline.read_text())["rows"]}
    rows: list[Row] = []
    started = time.monotonic()

    def tried(pair: tuple[str, str]) -> Row:
        row = {"model": ":".join(pair), **alone(functools.partial(trial, *pair, settings), GIVEN_UP)}
        return {"outcome": f"failed: {row.get('failed')}", **row}

    settings = settings_of(arguments.degrees)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row in pool.map(tried, todo):
            rows.append(row)
            told = f"gap {row['gap']:.2%}, {row['planning_cpu']:.2f} CPU s" if "gap" in row else ""
            print(f"{len(rows)}/{len(todo)} {row['model']}: {row['outcome']}", told, flush=True)
            machine = {"python": platform.python_version(), "seconds": round(time.monotonic() - started)}
            command = command_line(__spec__.name)
            arguments.json.write_text(json.dumps({"command": command, **machine, "rows": rows}, indent=1) + "\n")
    print("\n".join(summary(rows, before)))


if __name__ == "__main__":
    main()
