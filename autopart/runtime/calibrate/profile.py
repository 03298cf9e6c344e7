"""Measurements -> rows of the tables of devices and links -> TOML."""

import json
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from autopart.hardware.mesh import Mesh
from autopart.runtime.calibrate.measure import Measurements

Row = dict[str, Any]


def middle(rounds: Sequence[Sequence[float]]) -> tuple[list[float], float]:
    """The median of every column over rounds, and the greatest relative distance of a round from it."""
    each = np.array(rounds)
    median = np.median(each, axis=0)
    distance = np.abs(each - median) / np.where(median > 0, median, 1.0)
    return median.tolist(), float(distance.max())


def line(points: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Latency and bandwidth of seconds = latency + bytes / bandwidth, fitted to rows (bytes, seconds, ...).

    Minimises the squares of relative errors, with a latency of at least 0.
    """
    sizes, seconds = np.array([row[:2] for row in points], dtype=float).T
    weighted = np.stack([1 / seconds, sizes / seconds], 1)
    latency, slope = np.linalg.lstsq(weighted, np.ones(len(sizes)), rcond=None)[0]
    if latency < 0 or slope <= 0:
        latency, slope = 0.0, 1 / np.exp(np.log(sizes / seconds).mean())
    return float(latency), float(1 / slope)


def tables_of(found: Measurements) -> dict[str, dict[str, list[list[float]]]]:
    """Table -> entry -> rows of sizes, medians and spread."""
    tables: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for (table, entry, sizes), rounds in found.cases.items():
        seconds, spread = middle(rounds)
        tables[table][entry].append([*sizes, *seconds, spread])
    return tables


def profile(found: Measurements, mesh: Mesh, name: str, type_: str) -> tuple[Row, Row]:
    """The rows of the device and of its link, both called `name`: those of `mesh` with what was measured in their
    place."""
    tables = tables_of(found)
    flops = {
        dtype: max(2 * m * n * k / seconds for m, n, k, seconds, _ in rows)
        for dtype, rows in tables["products"].items()
    }
    streams = tables["operators"]["stream"]
    threads = f"{found.threads} thread{'s' * (found.threads > 1)}"
    source = f"measured by autopart calibrate, {found.ranks} at once with {threads} each, torch {torch.__version__}"
    machine = torch.cuda.get_device_name() if type_ == "cuda" else platform.machine()
    device: Row = {
        "like": mesh.device.name,
        "flops": flops,
        "bandwidth": max(nbytes / forward for nbytes, forward, _, _ in streams),
        "launch_seconds": min(forward for _, forward, _, _ in streams),
        "link": name,
        "source": f"{source}, {machine}",
        "measured": {
            "type": type_,
            "ranks": found.ranks,
            "threads": found.threads,
            "alone": min(tables["alone"][""][0][0], max(1.0, found.ranks * found.threads / found.cores)),
            "overlap": tables["overlap"][""][0][0],
            **{table: tables[table] for table in ("products", "attention", "operators", "updates")},
            "accumulate": tables["accumulate"][""],
        },
    }
    link: Row = {"like": mesh.intra.name, "source": source}
    if found.ranks > 1:
        collectives = {table: rows for table, rows in tables.items() if all(entry.isdecimal() for entry in rows)}
        p2p = tables["p2p"][""]
        link["latency_seconds"], link["bandwidth"] = line(p2p)
        link["measured"] = {"collectives": collectives, "p2p": p2p}
    return device, link


def to_toml(device: Row, link: Row, name: str) -> str:
    """A file of both rows, which `load_hardware` reads."""
    lines = [
        "# Written by `autopart calibrate`. What the numbers of a row are is told in autopart/hardware/measured.py."
    ]
    for section, row in ((f"links.{name}", link), (f"devices.{name}", device)):
        lines += ["", *_section(section, row)]
    return "\n".join(lines) + "\n"


def _section(name: str, values: Mapping[str, Any]) -> list[str]:
    """A table of TOML: plain values first, then the tables in it."""
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    lines = [f"[{name}]", *(f"{_key(key)} = {_value(value)}" for key, value in plain.items())]
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += ["", *_section(f"{name}.{_key(key)}", value)]
    return lines


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() else json.dumps(key)


def _value(value: Any) -> str:
    """Rows a line each; numbers to five digits."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "\n".join(["[", *(f"  {_value(row)}," for row in value), "]"])
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:.5g}" if isinstance(value, float) else str(value)
