"""Writes what a benchmark found: a table, JSON, CSV."""

import csv
import io
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.markup import escape
from rich.table import Table

from autopart.compile.bench.judge import quartiles, shows_gradients
from autopart.compile.bench.rounds import Measured
from autopart.compile.bench.setting import Setting
from autopart.plan.report import Bench, BenchRow
from autopart.plan.units import counted

Row = Mapping[str, Any]
COLUMNS = (
    *("system", "note", "status", "like", "median_seconds", "min_seconds", "predicted_seconds", "to_autopart"),
    *("to_like", "first_gap", "later_gap", "build_seconds"),
)
"""The columns of the CSV, in seconds and ratios; a cell that does not apply is empty."""


def record(setting: Setting, measured: Measured, **config: Any) -> dict[str, Any]:
    """What was run, on what, and what was found, as plain data. Every rank calls it."""
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "machine": torch.cuda.get_device_name() if setting.device.type == "cuda" else platform.machine(),
        },
        "config": {
            **config,
            "parameters": sum(p.numel() for p in setting.model.parameters()),
            "ranks": setting.size,
            "device": setting.device.type,
            "backend": dist.get_backend(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "threads_per_rank": torch.get_num_threads(),
            "micro_batches": setting.micro_batches,
            "optimizer": setting.optimizer,
            "lr": setting.lr,
            "losses": measured.reference,
            "gradients_shown": shows_gradients(measured.reference),
        },
        "rows": measured.rows,
    }


def of_report(found: Mapping[str, Any]) -> Bench:
    """What a record has for the report of a plan."""
    config = found["config"]
    threads = counted(config["threads_per_rank"], "thread")
    where = f"{config['ranks']} {config['device']} ranks of {threads} on {counted(config['cores'], 'core')}"
    return Bench(tuple(map(_reported, found["rows"])), config["rounds"], where)


def _reported(row: Row) -> BenchRow:
    ranked = row["status"] == "ok" and "seconds" in row
    return BenchRow(
        row["system"],
        "; ".join(filter(None, ["" if ranked else row["status"], row.get("note", "")])),
        row["median_seconds"] if ranked else None,
        quartiles(row["seconds"]) if ranked else None,
        row.get("predicted_seconds"),
        row.get("to_autopart"),
        row.get("later_gap"),
    )


def write_json(found: Mapping[str, Any], file: Path) -> None:
    """All of it, with the seconds and the losses of every round."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")


def csv_text(found: Mapping[str, Any]) -> str:
    """A line for each system, under COLUMNS."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(found["rows"])
    return text.getvalue()


def table(found: Mapping[str, Any], title: str) -> Table:
    """The systems in the order of their turns, with those that are not ranked told why."""
    config = found["config"]
    doubt = "" if config["gradients_shown"] else "; they hardly change, so that wrong gradients would not be seen"
    made = Table(
        title=title,
        caption="medians of interleaved rounds; ratios above 1 where autopart is faster, with their quartiles; losses "
        f"of the unmodified model: {config['losses'][0]:.5f} to {config['losses'][-1]:.5f}{doubt}",
    )
    made.add_column("system")
    for name in ("median ms", "min ms", "predicted", "to autopart", "to like plan", "loss gap"):
        made.add_column(name, justify="right")
    made.add_column("as", overflow="fold")
    for row in found["rows"]:
        ranked = row["status"] == "ok"
        cells = (
            _cell(row, "median_seconds", 1e3, ".1f"),
            _cell(row, "min_seconds", 1e3, ".1f"),
            _cell(row, "predicted_seconds", 1e3, ".1f"),
            _ratio(row, "to_autopart"),
            _ratio(row, "to_like"),
            _cell(row, "later_gap", 1, ".0e"),
        )
        words = [*([] if ranked else [row["status"]]), *[row[k] for k in ("note",) if k in row]]
        made.add_row(row["system"], *cells, escape("; ".join(words)), style=None if ranked else "dim")
    return made


def _cell(row: Row, key: str, scale: float, form: str) -> str:
    return format(row[key] * scale, form) if key in row else ""


def _ratio(row: Row, key: str) -> str:
    if key not in row:
        return ""
    low, high = row[f"{key}_spread"]
    return f"{row[key]:.2f} ({low:.2f} to {high:.2f})"
