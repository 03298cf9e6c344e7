"""Time planning from nothing: a fresh process that imports, builds the model on meta, traces, searches, writes a plan.

Every row is the shell's own command, started anew each time. What it took is what the system counted for it and its
children: user and system CPU seconds, and the most memory it held. The gap, the degrees and the step are read from the
plan that it wrote. The rows of one model with ever more blocks show what depth costs: the search looks at one of equal
blocks, so it should cost little.

AutoParallel and Galvatron are beside them as they were measured earlier on a machine of this kind; neither is installed
here, and their searches are for other spaces: AutoParallel takes the mesh's shape as given, which is chosen here.

`--zoo` plans every architecture of transformers at the sizes that its configuration has by default, and large models at
the sizes that their authors published, on 8x8:h100-80gb, in bfloat16, through the public API: `every_model.py`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.planning import every_model
from benchmarks.support.command import command_line

HERE = Path(__file__).resolve().parents[1]
DEPTHS = (4, 16, 64, 126)
DEPTH_RATIO = 1.5
"""How many times as long the deepest may take to plan as the shallowest."""


@dataclass(frozen=True)
class Row:
    """What is planned, and what it may cost: CPU seconds, bytes held, gap."""

    name: str
    model: str
    mesh: str
    sequence: int
    global_batch: int
    cpu_limit: float | None = None
    memory_limit: float | None = None
    gap_limit: float | None = None
    layers: int | None = None


ROWS = (
    Row("llama-3-8b", "llama-3-8b", "8x8:h100-80gb", 8192, 64, 5, 2**30, 0.01),
    Row("llama-3-405b", "llama-3-405b", "128x8:h100-80gb", 8192, 1024, 10),
    Row("gpt3-175b", "gpt3-175b", "96x8:a100-80gb", 2048, 1536, 10),
    Row("mixtral-8x7b", "mixtral-8x7b", "4x8:h100-80gb", 4096, 128, 20),
    Row("t5-11b", "t5-11b", "2x8:a100-80gb", 512, 64, 20),
    Row("gpt-1t", "gpt-1t", "384x8:a100-80gb", 2048, 3072, 20),
    *(Row(f"depth-{layers}", "llama-3-405b", "128x8:h100-80gb", 8192, 1024, layers=layers) for layers in DEPTHS),
)

PEERS = (
    ("AutoParallel", "Llama-3-8B on 8x8", "181.5 CPU s, 4.3 GB"),
    ("AutoParallel", "Llama-3-8B on 64, one axis", "42.3 CPU s"),
    ("Galvatron", "Llama-2-7B", "172 to 234 CPU s"),
)
"""Who, what was planned, what it took: measured earlier on a machine of this kind."""


@dataclass(frozen=True)
class Run:
    """One process: CPU seconds of user and system, seconds by the clock, bytes held at most; and its plan's figures."""

    user: float
    system: float
    wall: float
    memory: int
    plan: Mapping[str, Any] | None
    problem: str = ""

    @property
    def cpu(self) -> float:
        """User and system together."""
        return self.user + self.system


def command(row: Row, folder: Path) -> list[str]:
    """The shell's command that plans a row and saves the plan in a folder."""
    model = row.model if row.layers is None else str(shortened(row, folder))
    settings = [f"--sequence={row.sequence}", f"--global-batch={row.global_batch}", "--precision=bfloat16"]
    line = ["plan", model, row.mesh, "--batch=2", *settings, f"--save={folder / 'plan.json'}"]
    return [sys.executable, "-m", "autopart.cli.main", *line]


def shortened(row: Row, folder: Path) -> Path:
    """A config.json of a row's model with its own number of layers."""
    from autopart.cli.models import SIZES

    kind, settings = SIZES[row.model]
    file = folder / "config.json"
    file.write_text(json.dumps({"model_type": kind, **settings, "num_hidden_layers": row.layers}))
    return file


def run(row: Row, limit: int) -> Run:
    """Plan a row in a process of its own, which the system ends after `limit` CPU seconds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        line = command(row, folder)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with (folder / "said").open("w") as said:
            started = time.monotonic()
            child = subprocess.Popen(
                line,
                stdout=said,
                stderr=said,
                env=environment,
                cwd=HERE.parent,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (limit, limit)),
            )
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            wall = time.monotonic() - started
        plan, problem = None, ""
        if child.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            problem = f"not done after {usage.ru_utime + usage.ru_stime:.0f} CPU s"
        elif child.returncode:
            problem = ((folder / "said").read_text().strip().splitlines() or ["no output"])[-1]
        else:
            plan = figures(json.loads((folder / "plan.json").read_text()))
        return Run(usage.ru_utime, usage.ru_stime, wall, usage.ru_maxrss * 1024, plan, problem)


def yardstick() -> float:
    """CPU seconds that `import torch` takes in a process of its own."""
    child = subprocess.Popen([sys.executable, "-c", "import torch"])
    _, _, usage = os.wait4(child.pid, 0)
    child.returncode = 0
    return usage.ru_utime + usage.ru_stime


def figures(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What is reported of a saved plan."""
    names = ("pp", "dp", "tp", "micro_batch", "zero", "recompute", "step_seconds", "gap", "status", "planning_seconds")
    return {name: plan[name] for name in names}


def report(row: Row, runs: Sequence[Run]) -> dict[str, Any]:
    """The medians of a row's runs, and whether they are within what they may be."""
    done = [r for r in runs if r.plan is not None]
    plan = done[0].plan if done else None
    medians: dict[str, Any] = {
        name: statistics.median(getattr(r, name) for r in runs) for name in ("cpu", "user", "system", "wall", "memory")
    }
    wanted = (
        (medians["cpu"], row.cpu_limit),
        (medians["memory"], row.memory_limit),
        (plan and plan["gap"], row.gap_limit),
    )
    problem = next((r.problem for r in runs if r.problem), "")
    met = not problem and all(limit is None or value <= limit for value, limit in wanted)
    return {**asdict(row), **medians, "plan": plan, "problem": problem, "met": met, "runs": [asdict(r) for r in runs]}


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows as a table."""
    made = Table(
        "row",
        "mesh",
        "CPU s",
        "import torch",
        "target",
        "memory",
        "gap",
        "step",
        "plan",
        "search s",
        title="cold planning",
    )
    for row in rows:
        plan = row["plan"]
        colour = "green" if row["met"] else "red"
        made.add_row(
            row["name"],
            row["mesh"],
            f"[{colour}]{row['cpu']:.2f}[/]",
            f"{row['import_torch']:.2f}",
            " ".join(targets(row)),
            f"{row['memory'] / 2**30:.2f} GiB",
            *(
                [f"{plan['gap']:.2%}", f"{plan['step_seconds']:.4g} s", text(plan)]
                if plan
                else ["", "", row["problem"]]
            ),
            f"{plan['planning_seconds']:.2f}" if plan else "",
        )
    return made


def targets(row: Mapping[str, Any]) -> Iterator[str]:
    """What a row may cost, in words."""
    if row["cpu_limit"]:
        yield f"{row['cpu_limit']:g} s"
    if row["memory_limit"]:
        yield f"{row['memory_limit'] / 2**30:g} GiB"
    if row["gap_limit"]:
        yield f"gap {row['gap_limit']:.0%}"


def text(plan: Mapping[str, Any]) -> str:
    """A plan's degrees in a line."""
    degrees = f"pp {plan['pp']} dp {plan['dp']} tp {plan['tp']}"
    return f"{degrees} micro-batch {plan['micro_batch']} zero {plan['zero']} recompute {plan['recompute']}"


def peers() -> list[dict[str, str]]:
    """The peers' figures, with whether they could be run here."""
    installed = {"AutoParallel": "autoparallel", "Galvatron": "galvatron"}
    return [
        {
            "peer": name,
            "here": "installed" if importlib.util.find_spec(installed[name]) else "not installed",
            "planned": what,
            "measured earlier": took,
        }
        for name, what, took in PEERS
    ]


def main() -> int:
    """Time the rows asked for; the exit status is 1 where one misses what it may cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(r.name for r in ROWS)} (default: all)")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="medians of N runs, in rounds over all rows")
    parser.add_argument("--limit", type=int, default=120, metavar="SECONDS", help="CPU seconds of one run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--zoo", action="store_true", help="every architecture and large models; rows: task:model_type")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="with --zoo: one of N architectures")
    options = parser.parse_args()
    if options.zoo:
        return every_model.main(options.rows, options.every, options.limit, options.json)
    unknown = set(options.rows) - {r.name for r in ROWS}
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    console = Console(width=None if sys.stdout.isatty() else 200)
    asked = [row for row in ROWS if not options.rows or row.name in options.rows]
    runs: dict[str, list[Run]] = {row.name: [] for row in asked}
    torch_seconds: dict[str, list[float]] = {row.name: [] for row in asked}
    for row in asked * options.repeat:
        torch_seconds[row.name].append(yardstick())
        runs[row.name].append(run(row, options.limit))
        told = report(row, runs[row.name][-1:])
        console.print(f"{row.name}: {told['cpu']:.2f} CPU s {told['problem']}", markup=False, highlight=False)
    rows = [{**report(r, runs[r.name]), "import_torch": statistics.median(torch_seconds[r.name])} for r in asked]
    console.print(table(rows))
    ratio = depth_ratio(rows)
    if ratio is not None:
        console.print(
            f"{DEPTHS[-1]} layers take {ratio:.2f} times the CPU seconds of {DEPTHS[0]} (target {DEPTH_RATIO})"
        )
    for peer in peers():
        console.print(", ".join(f"{k} {v}" if k != "peer" else v for k, v in peer.items()), highlight=False)
    if options.json:
        machine = {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
        found = {
            "command": command_line(__spec__.name),
            **machine,
            "depth ratio": ratio,
            "rows": rows,
            "peers": peers(),
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(r["met"] for r in rows) and (ratio is None or ratio < DEPTH_RATIO) else 1


def depth_ratio(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """CPU seconds of the deepest row over those of the shallowest; None where one was not run to its end."""
    cpu = {r["layers"]: r["cpu"] for r in rows if r["layers"] and not r["problem"]}
    return cpu[DEPTHS[-1]] / cpu[DEPTHS[0]] if {DEPTHS[0], DEPTHS[-1]} <= cpu.keys() else None


if __name__ == "__main__":
    sys.exit(main())
