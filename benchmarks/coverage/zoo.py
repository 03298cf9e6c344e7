"""Trains a model of every architecture in four of transformers' mappings on four ranks, against one process.

Through the public API alone: `autopart.check(model, "4:cpu", batch, ...)`, a tiny model with tp=2 and pp=2 and with
what the planner chooses by itself, and one of sizes drawn at random (`zoo_models.drawn`) with either. The loss, every
gradient and every buffer of a step must be one process's to 1e-5, relative. Ranks are threads of one process here;
tests run a sample on real ones, over gloo. Each model has a process of its own, so that none can stop the others.

    python -m benchmarks.coverage.zoo                        # all, about an hour on two cores
    python -m benchmarks.coverage.zoo --only clm:gpt2,mlm:bert --seed 3
    python -m benchmarks.coverage.zoo --outside              # other packages' models (extra `zoo`), and handwritten
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import random
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.support.alone import Row, alone, cpu_seconds
from benchmarks.support.command import command_line

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "zoo.json"
OUTSIDE = ROOT / "benchmarks" / "results" / "zoo_outside.json"
MESH = "4:cpu"
SETTINGS: dict[str, dict[str, int]] = {"tp=2 x pp=2": {"tp": 2, "pp": 2}, "own choice": {}}
TRIALS = (*(f"tiny, {setting}" for setting in SETTINGS), "drawn size, one of the two")
CPU_LIMIT = 600
SLOW = 20
"""CPU seconds above which a trial is named: planning, the split step and one process's."""
TITLES = {"clm": "causal LM", "mlm": "masked LM", "s2s": "seq2seq", "img": "image classification"}
TITLES |= {name: name for name in ("torchvision", "timm", "diffusers", "x-transformers", "peft")}
TITLES["hand"] = "written by hand"


def trial(task: str, model_type: str, seed: int) -> Row:
    """Build one architecture tiny, and train it under every setting; and in a drawn size, under a drawn one."""
    from benchmarks.coverage.zoo_models import TINY, Unbuildable, build, drawn

    row: Row = {"outcomes": {}, "seconds": {}, "plans": {}, "split": {}}
    *tiny, other = TRIALS
    one_setting = random.Random(f"{task}:{model_type}:{seed}").choice(list(SETTINGS.values()))
    for make, trials in (
        (lambda: (*build(task, model_type), TINY), dict(zip(tiny, SETTINGS.values(), strict=True))),
        (lambda: drawn(task, model_type, seed), {other: one_setting}),
    ):
        try:
            model, batch, size = make()
        except Unbuildable as error:
            row["outcomes"] |= dict.fromkeys(trials, f"not built: {error}")
            continue
        parameters = sum(p.numel() for p in model.parameters())
        row["sizes"] = [*row.get("sizes", ()), {**asdict(size), "parameters": parameters}]
        train(row, model, batch, trials)
    return row


def trial_outside(package: str, name: str) -> Row:
    """Build one model of another package, or one written by hand, and train it under every setting."""
    from benchmarks.coverage.zoo_outside import build

    row: Row = {"outcomes": {}, "seconds": {}, "plans": {}, "split": {}}
    try:
        model, batch = build(f"{package}:{name}")
    except ImportError as error:
        return {**row, "outcomes": dict.fromkeys(SETTINGS, f"not built: {error}")}
    row |= {"parameters": sum(p.numel() for p in model.parameters())}
    train(row, model, batch, SETTINGS)
    return row


def train(row: Row, model: Any, batch: Any, trials: Mapping[str, Mapping[str, int]]) -> None:
    """Train a model under the degrees of every trial, and note in its row what came of it."""
    import torch

    from benchmarks.coverage.exactness import verdict

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name, degrees in trials.items():
        started = cpu_seconds()
        row["outcomes"][name], plan = verdict(model, MESH, batch, **degrees)
        row["seconds"][name] = round(cpu_seconds() - started, 1)
        if plan is not None:
            row["plans"][name] = f"{plan.degrees} micro-batches {plan.micro_batches} zero {plan.zero}"
            row["replicated"] = list(plan.replicated)
        if plan is not None and plan.tp > 1 and not row["split"]:
            row["split"] = round(share_split(model, batch, plan), 3)


def share_split(model: Any, batch: Any, plan: Any) -> float:
    """The share of the FLOPs of matrix products and convolutions that tp splits."""
    from autopart.frontend.batch import DTYPES
    from autopart.ir.graph import info
    from autopart.passes.source import Source
    from autopart.sharding.rules import is_contraction

    layered = Source(model, batch, DTYPES[plan.precision]).full(plan.micro_batch, plan.mesh)
    split = total = 0.0
    for node in layered.representatives():
        if info(node).kind == "op" and is_contraction(info(node).name):
            work = info(node).flops * layered.count[node]
            total += work
            split += work if plan.splits[0]["tp"][layered.keys[node]].shards_work else 0.0
    return split / total if total else 0.0


def failed(row: Row, trials: Sequence[str]) -> Row:
    """A row whose process failed has that for every outcome."""
    if "failed" in row:
        row["outcomes"] = dict.fromkeys(trials, "failed: " + re.sub(r"\s+", " ", row["failed"])[:300])
    return row


def kind(outcome: str) -> str:
    return outcome.partition(":")[0]


def reason(outcome: str) -> str:
    """What outcomes have in common: without the place and the numbers."""
    head, _, rest = outcome.partition(" (")
    if head.startswith("refused: torch.export"):
        return f"{head}: {rest.rpartition('  ')[2].rstrip(')')}"
    return "exact in float64" if head.startswith("exact in float64") else head


def table(rows: Sequence[Row]) -> str:
    """The results as Markdown: by task, then whatever was not exact in float32 in every trial, with the reason."""
    trials = list(rows[0]["outcomes"])
    headings = [*(f"exact: {trial}" for trial in trials), "exact in all, or in float64", "wrong or failed"]
    lines = [f"| mapping | architectures | {' | '.join(headings)} |", "|---" * (len(headings) + 2) + "|"]
    found = dict.fromkeys(row["task"] for row in rows)
    groups = [*((TITLES[t], [r for r in rows if r["task"] == t]) for t in TITLES if t in found), ("all", list(rows))]
    for title, group in groups:
        exact = [str(sum(kind(r["outcomes"][t]).startswith("exact") for r in group)) for t in trials]
        every = [{kind(outcome) for outcome in r["outcomes"].values()} for r in group]
        whole = sum(kinds <= {"exact", "exact in float64"} for kinds in every)
        broken = sum(bool(kinds & {"wrong", "failed"}) for kinds in every)
        lines.append("| " + " | ".join([title, str(len(group)), *exact, str(whole), str(broken)]) + " |")
    reasons: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for name, outcome in row["outcomes"].items():
            if outcome != "exact":
                of_model = reasons.setdefault(reason(outcome), {}).setdefault(f"{row['task']}:{row['model']}", [])
                of_model.append(name)
    lines += ["", "| not exact in float32 | which |", "|---|---|"]
    for text, models in sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0])):
        told = [m if len(names) == len(trials) else f"{m} ({'; '.join(names)})" for m, names in models.items()]
        lines.append(f"| {text.replace('|', '/')} | {', '.join(told)} |")
    lines += ["", *notes(rows)]
    return "\n".join(lines)


def notes(rows: Sequence[Row]) -> Iterator[str]:
    """What else the results say, a sentence each."""
    shares = sorted(row["split"] for row in rows if row.get("split"))
    if shares:
        median = shares[len(shares) // 2]
        yield f"Of the FLOPs of products, tp=2 splits {median:.0%} (median), at least {shares[0]:.0%}."
    seconds = sorted(value for row in rows for value in row.get("seconds", {}).values())
    if seconds:
        slow = [f"{r['task']}:{r['model']}" for r in rows if max(r.get("seconds", {}).values(), default=0) > SLOW]
        yield (
            f"CPU seconds of a trial (planning, the split step, one process): median {seconds[len(seconds) // 2]:.1f}, "
            f"at most {seconds[-1]:.1f}; above {SLOW}: {', '.join(slow) or 'none'}."
        )
    replicated = collections.Counter(op for row in rows for op in row.get("replicated", ()))
    if replicated:
        yield f"Operators without a rule: {', '.join(f'{op} ({n})' for op, n in replicated.most_common())}."


def wanted(only: str, outside: bool) -> Iterator[tuple[str, str]]:
    if outside:
        from benchmarks.coverage.zoo_outside import MODELS

        every: Iterator[tuple[str, str]] = (tuple(name.split(":")) for name in MODELS)  # type: ignore[misc]
    else:
        from benchmarks.coverage.zoo_models import architectures

        every = architectures()
    for task, model_type in every:
        if not only or f"{task}:{model_type}" in only.split(","):
            yield task, model_type


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="task:model_type, comma-separated")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one of N models")
    parser.add_argument("--seed", type=int, default=1, help="of the drawn sizes")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--outside", action="store_true", help="models of other packages and written by hand")
    parser.add_argument(
        "--json", type=Path, help="where the results go, row by row (of all models: benchmarks/results/)"
    )
    parser.add_argument("--resume", action="store_true", help="keep the rows that a stopped run left there")
    arguments = parser.parse_args()
    if not (arguments.json or arguments.only or arguments.every > 1):
        arguments.json = OUTSIDE if arguments.outside else RESULTS
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"}
    started = time.monotonic()
    import autopart  # noqa: F401
    from benchmarks.coverage import zoo_models  # noqa: F401  # imported once, before the forks

    wished = list(wanted(arguments.only, arguments.outside))[:: arguments.every]
    resumes = arguments.resume and arguments.json and arguments.json.exists()
    earlier = json.loads(arguments.json.read_text()) if resumes else {"seconds": 0, "rows": []}
    rows = earlier["rows"]
    known = {(row["task"], row["model"]) for row in rows}
    todo = [pair for pair in wished if pair not in known]
    if arguments.json:
        arguments.json.parent.mkdir(exist_ok=True)

    def tried(pair: tuple[str, str]) -> Row:
        run = trial_outside if arguments.outside else functools.partial(trial, seed=arguments.seed)
        row = alone(functools.partial(run, *pair), CPU_LIMIT)
        return {"task": pair[0], "model": pair[1], **failed(row, list(SETTINGS) if arguments.outside else TRIALS)}

    with ThreadPoolExecutor(arguments.workers) as pool:
        for row in pool.map(tried, todo):
            rows.append(row)
            told = "; ".join(f"{name}: {outcome}" for name, outcome in row["outcomes"].items())
            same = set(row["outcomes"].values())
            told = same.pop() if len(same) == 1 else told
            print(f"{len(rows)}/{len(wished)} {row['task']}:{row['model']} {row['cpu']:.0f} s {told}", flush=True)
            seconds = earlier["seconds"] + round(time.monotonic() - started)
            result = {"command": command_line(__spec__.name), "seconds": seconds, "rows": rows}
            if arguments.json:
                arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
