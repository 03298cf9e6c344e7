"""Trains a tiny model of every architecture in four of transformers' mappings, split, against one process.

Every model is planned with tp=2, pp=2 and both, and runs one step: its loss and every gradient must be one process's to
1e-5, relative. Ranks are threads of one process here (`--processes` runs a sample on real ones, over gloo). Each model
has a process of its own, so that none can stop the others.

    python benchmarks/zoo.py                        # all, about half an hour on two cores
    python benchmarks/zoo.py --only clm:gpt2,mlm:bert
    python benchmarks/zoo.py --readme               # writes the table into README.md from the last results
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import math
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "zoo.json"
SETTINGS: dict[str, dict[str, int]] = {
    "tp=2": {"pp": 1, "tp": 2},
    "pp=2": {"pp": 2, "tp": 1},
    "dp=2 x tp=2": {"dp": 2, "tp": 2, "pp": 1},
    "tp=2 x pp=2": {"pp": 2, "tp": 2},
}
HARDEST = "tp=2 x pp=2"
TOLERANCE = 1e-5
SAMPLES = 4
LIMIT_SECONDS = 300
TITLES = {"clm": "causal LM", "mlm": "masked LM", "s2s": "seq2seq", "img": "image classification"}
Row = dict[str, Any]


def trial(task: str, model_type: str) -> Row:
    """Build, plan and train one architecture under every setting."""
    import torch
    from zoo_models import Unbuildable, build

    import autopart

    row: Row = {"task": task, "model": model_type, "outcomes": {}, "errors": {}, "seconds": {}, "split": {}}
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    try:
        model, batch = build(task, model_type)
    except Unbuildable as error:
        return {**row, "outcomes": dict.fromkeys(SETTINGS, f"not built: {error}")}
    row |= {"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}
    single, double = Judge(model, batch, torch.float32), None
    for name, degrees in SETTINGS.items():
        started = time.monotonic()
        try:
            plan = single.plan(degrees)
            off, whose = single.judge(plan)
            outcome = "ok" if off <= TOLERANCE else f"wrong: {whose} off by {off:.1e}"
            if off > TOLERANCE:
                double = double or Judge(model, batch, torch.float64)
                noise, _ = difference(single, double)
                precise, _ = double.judge(double.plan(degrees))
                if precise <= TOLERANCE and off <= 10 * noise:
                    outcome = f"exact in float64: {whose} off by {off:.1e} in float32, one process by {noise:.1e}"
        except autopart.PartitionError as error:
            row["outcomes"][name] = f"refused: {error.what}" + (f" ({error.why})" if error.why else "")
            continue
        row["outcomes"][name] = outcome
        row["errors"][name], row["seconds"][name] = off, round(time.monotonic() - started, 1)
        row |= {"replicated": list(plan.replicated), "micro_batches": plan.micro_batches}
        if plan.tp > 1:
            row["split"][name] = round(single.share_split(plan), 3)
    return row


class Results(NamedTuple):
    """What a step leaves behind."""

    loss: Any
    gradients: Mapping[str, Any]
    buffers: Mapping[str, Any]


def difference(found: Any, right: Any) -> tuple[float, str]:
    """The largest error and what has it."""
    from autopart.check import worst_error

    loss = abs(float(found.loss) - float(right.loss)) / max(abs(float(right.loss)), 1e-3)
    return max(
        (loss, "the loss"),
        worst_error(found.gradients, right.gradients),
        worst_error({n: found.buffers[n] for n in right.buffers}, right.buffers),
    )


class Judge:
    """A model with one process's loss, gradients and buffers, to hold plans against."""

    def __init__(self, model: Any, batch: Mapping[str, Any], dtype: Any) -> None:
        import torch
        from zoo_models import with_batched_experts

        from autopart.check import one_process
        from autopart.compile import Source

        self.model = copy.deepcopy(model).to(dtype)
        self.batch = {
            k: v.to(dtype) if hasattr(v, "is_floating_point") and v.is_floating_point() else v for k, v in batch.items()
        }
        if dtype == torch.float64:
            with_batched_experts(self.model)  # grouped products have no float64
        self.source = Source(self.model, self.batch, dtype)
        trained = copy.deepcopy(self.model)
        self.loss, self.gradients = one_process(trained, self.batch)
        self.buffers = {n: b for n, b in trained.named_buffers() if n in trained.state_dict()}

    def plan(self, degrees: Mapping[str, int]) -> Any:
        """Two micro-batches where the loss is a mean over samples, else one."""
        from autopart.compile import make_plan
        from autopart.mesh import Mesh
        from autopart.request import Request

        mesh = Mesh.of(f"{math.prod(degrees.values())}:cpu")
        size = SAMPLES // 2 if self.source.at(SAMPLES // 2, mesh).traced.mean_of_samples else SAMPLES
        precision = str(self.source.dtype).removeprefix("torch.")
        request = Request(SAMPLES, micro_batch=size, precision=precision, **degrees)
        return make_plan(self.source, mesh, request, to_run=True)

    def judge(self, plan: Any) -> tuple[float, str]:
        """A plan's largest error, and what has it."""
        from autopart.compile import simulate_plan

        found = simulate_plan(self.source, plan)
        return difference(Results(found.loss, found.gradients, found.state), self)

    def share_split(self, plan: Any) -> float:
        """The share of the FLOPs of matrix products and convolutions that tp splits."""
        from autopart.graph import info
        from autopart.rules import is_contraction

        folded = self.source.at(plan.micro_batch, plan.mesh)
        split = total = 0.0
        for node in folded.representatives():
            if info(node).kind == "op" and is_contraction(info(node).name):
                work = info(node).flops * folded.count[node]
                total += work
                split += work if plan.splits[0]["tp"][folded.keys[node]].shards_work else 0.0
        return split / total if total else 0.0


def one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()[:300]


def in_process(task: str, model_type: str, folder: Path) -> Row:
    """`trial` in a process of its own, which is killed when it takes too long."""
    path = folder / f"{task}-{model_type}.json"
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(LIMIT_SECONDS)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            row = trial(task, model_type)
        except BaseException as error:
            where = traceback.format_exc()[-3000:]
            text = one_line(f"failed: {type(error).__name__}: {error}")
            row = {"task": task, "model": model_type, "outcomes": dict.fromkeys(SETTINGS, text), "traceback": where}
        path.write_text(json.dumps(row))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not path.exists():
        reason = f"failed: killed after {LIMIT_SECONDS} s" if status else "failed: no result"
        return {"task": task, "model": model_type, "outcomes": dict.fromkeys(SETTINGS, reason)}
    row = json.loads(path.read_text())
    path.unlink()
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
    """The results as Markdown: by task, then every refusal with its reason."""
    heads = [*(f"exact, {s}" for s in SETTINGS), "in float64", "refused", "not built", "wrong or failed"]
    lines = [f"| mapping | architectures | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    groups = [*((TITLES[t], [r for r in rows if r["task"] == t]) for t in TITLES), ("all", list(rows))]
    for title, group in groups:
        exact = [str(sum(r["outcomes"].get(s) == "ok" for r in group)) for s in SETTINGS]
        kinds = collections.Counter(kind(r["outcomes"][HARDEST]) for r in group)
        known = ("exact in float64", "refused", "not built")
        others = [str(kinds[k]) for k in known]
        others.append(str(len(group) - kinds["ok"] - sum(kinds[k] for k in known)))
        lines.append("| " + " | ".join([title, str(len(group)), *exact, *others]) + " |")
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["outcomes"][HARDEST] != "ok":
            reasons.setdefault(reason(row["outcomes"][HARDEST]), []).append(f"{row['task']}:{row['model']}")
    lines += ["", f"| under {HARDEST}, not exact in float32 | which |", "|---|---|"]
    for text, names in sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0])):
        lines.append(f"| {text.replace('|', '/')} | {', '.join(names)} |")
    shares = sorted(row["split"][HARDEST] for row in rows if HARDEST in row.get("split", {}))
    if shares:
        least = [f"{r['task']}:{r['model']}" for r in rows if r.get("split", {}).get(HARDEST, 1.0) < 0.5]
        lines += ["", f"Of the FLOPs of products, tp splits {shares[len(shares) // 2]:.0%} (median of the models), at "]
        lines[-1] += f"least {shares[0]:.0%}; less than half in {', '.join(least) or 'none'}."
    replicated = collections.Counter(op for row in rows for op in row.get("replicated", ()))
    if replicated:
        lines += ["", "Operators without a row, replicated: "]
        lines[-1] += ", ".join(f"{op} ({n})" for op, n in replicated.most_common())
    return "\n".join(lines)


def into_readme(text: str) -> None:
    readme = ROOT / "README.md"
    old = readme.read_text()
    start, end = "<!-- zoo -->", "<!-- /zoo -->"
    before, after = old.split(start)[0], old.split(end)[1]
    readme.write_text(f"{before}{start}\n{text}\n{end}{after}")


def wanted(only: str) -> Iterator[tuple[str, str]]:
    from zoo_models import architectures

    for task, model_type in architectures():
        if not only or f"{task}:{model_type}" in only.split(","):
            yield task, model_type


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="task:model_type, comma-separated")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument("--readme", action="store_true", help="write the table of the last results into README.md")
    arguments = parser.parse_args()
    if arguments.readme:
        into_readme(table(json.loads(arguments.json.read_text())["rows"]))
        return
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"}
    started = time.monotonic()
    import zoo_models  # noqa: F401  # imported once, before the forks

    import autopart  # noqa: F401

    todo = list(wanted(arguments.only))
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"zoo-{os.getpid()}"
    folder.mkdir()
    rows = []
    with ThreadPoolExecutor(arguments.workers) as pool:
        for row in pool.map(lambda pair: in_process(*pair, folder), todo):
            rows.append(row)
            print(f"{len(rows)}/{len(todo)} {row['task']}:{row['model']}", row["outcomes"][HARDEST], flush=True)
    folder.rmdir()
    arguments.json.parent.mkdir(exist_ok=True)
    command = " ".join(["python", "benchmarks/zoo.py", *sys.argv[1:]])
    result = {"command": command, "seconds": round(time.monotonic() - started), "rows": rows}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
