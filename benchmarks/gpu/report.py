"""Tables of what a run found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

Record = Mapping[str, Any]


def show(records: Iterable[Record], console: Console) -> None:
    """Print a table of every group, and what is not ok."""
    rows = list(records)
    for group, table in TABLES.items():
        made = table([r for r in rows if r["group"] == group and r["status"] == "ok"])
        if made.row_count:
            console.print(made)
    for r in rows:
        if r["status"] != "ok":
            console.print(f"{r['item']}: {r['status']}", markup=False, highlight=False)


def correct(records: list[Record]) -> Table:
    """The largest error of each kernel in each dtype, and the reference's."""
    made = Table("kernel", "largest error", "the reference's", "Triton launches")
    for r in records:
        worst = max(r["errors"].values(), key=lambda row: row["kernel"])
        made.add_row(
            _short(r),
            f"{worst['kernel']:.1e}",
            f"{worst['reference']:.1e}",
            "" if r["launches"] is None else str(r["launches"]),
        )
    return made


def speed(records: list[Record]) -> Table:
    """Microseconds of kernels, what they are of the copy's, and of others over the kernel's."""
    made = Table("kernel", "pass", "us", "over a copy", "eager", "compile", "liger")
    for r in records:
        for direction, found in r["microseconds"].items():
            if found.get("kernel"):
                own = found["kernel"]
                others = [f"{found[k] / own:.2f}" if k in found else "" for k in ("eager", "compile", "liger")]
                made.add_row(_short(r), direction, f"{own:.1f}", f"{own / found['copy']:.2f}", *others)
    return made


def steps(records: list[Record]) -> Table:
    """Seconds and bytes of steps."""
    made = Table("system", "ms", "GiB", "loss", "off by")
    for r in (r for r in records if "seconds" in r or "loss_error" in r):
        ms = f"{1e3 * r['seconds']:.1f}" if "seconds" in r else ""
        size = f"{r['bytes'] / 2**30:.2f}" if "bytes" in r else ""
        off = f"{r['loss_error']:.1e}" if "loss_error" in r else ""
        made.add_row(_short(r), ms, size, f"{r['loss']:.4f}", off)
    return made


def updates(records: list[Record]) -> Table:
    """Milliseconds of an optimizer's step, its temporaries, and how far its weights are from the kernel's."""
    made = Table("model", "way", "ms", "workspace GiB", "off by")
    for r in records:
        for way, found in ((k, v) for k, v in r.items() if isinstance(v, Mapping)):
            ms = f"{1e-3 * found['microseconds']:.1f}" if found.get("microseconds") else ""
            size = f"{found['workspace'] / 2**30:.2f}" if "workspace" in found else ""
            made.add_row(_short(r), way, ms, size, f"{found['error']:.1e}")
    return made


def memory(records: list[Record]) -> Table:
    """Predicted and measured bytes."""
    made = Table("configuration", "predicted GiB", "measured GiB", "error")
    errors = [r["bytes_error"] for r in records if "bytes_error" in r]
    for r in (r for r in records if "bytes_error" in r):
        sizes = (f"{r[key] / 2**30:.2f}" for key in ("predicted_bytes", "measured_bytes"))
        made.add_row(_short(r), *sizes, f"{r['bytes_error']:+.1%}")
    if errors:
        made.add_row("mean of absolute errors", "", "", f"{fmean(map(abs, errors)):.1%}")
    return made


TABLES: Mapping[str, Callable[[list[Record]], Table]] = {
    "correct": correct,
    "time": speed,
    "step": steps,
    "update": updates,
    "compile": steps,
    "memory": memory,
}


def _short(record: Record) -> str:
    return str(record["item"]).removeprefix(record["group"] + " ")
