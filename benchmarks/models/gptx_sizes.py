"""The fewest V100s with 16 GB on which GPT-X trains, at its own size and at the sizes of GPT-3.

The number of devices is doubled until a plan fits, and bisected then: devices of one host, or whole hosts of 8. Every
plan has parameters in float16, float32 master copies and AdamW, and a global batch of `SAMPLES` for each device. The
sizes are those of Brown et al., arXiv 2005.14165, table 2.1; vocabulary and tokens are GPT-X's.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import autopart
from benchmarks.models.gptx import GPTX, Config
from benchmarks.support.command import command_line

RESULTS = Path(__file__).parents[1] / "results" / "gptx_sizes.json"
SIZES = {
    "GPT-X 1B": Config(),
    "GPT-3 XL": Config(layers=24, heads=16),
    "GPT-3 2.7B": Config(layers=32, width=2560, heads=32),
    "GPT-3 6.7B": Config(layers=32, width=4096, heads=32),
    "GPT-3 13B": Config(layers=40, width=5120, heads=40),
    "GPT-3 175B": Config(layers=96, width=12288, heads=96),
}
DEVICE, PER_HOST, MOST = "v100-16gb", 8, 4096
SAMPLES = 4
SETTINGS = {"precision": "float16", "master": "float32"}


def mesh(devices: int) -> str:
    hosts = devices // PER_HOST
    return f"{devices}:{DEVICE}" if hosts < 2 else f"{hosts}x{PER_HOST}:{DEVICE}"


def fewest(config: Config) -> dict[str, Any]:
    """The plan on the fewest devices that are found."""
    with torch.device("meta"):
        model = GPTX(config)
    started, devices = time.process_time(), 1
    plan = fitting(model, config.tokens, devices)
    while plan is None and devices < MOST:
        devices *= 2
        plan = fitting(model, config.tokens, devices)
    assert plan is not None, f"no plan fits {MOST} devices"
    least, step = devices // 2, 1 if devices <= PER_HOST else PER_HOST
    while devices - least > step:
        middle = least + (devices - least) // step // 2 * step
        if (fewer := fitting(model, config.tokens, middle)) is None:
            least = middle
        else:
            devices, plan = middle, fewer
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "devices": devices,
        "plan": f"pp={plan.pp} dp={plan.dp} tp={plan.tp}, ZeRO {plan.zero}, micro-batch {plan.micro_batch}",
        "recompute": ", ".join(sorted({mode for stage in plan.stages for mode in stage.recompute})),
        "bytes": max(plan.memory_bytes),
        "tokens_per_second": SAMPLES * devices * config.tokens / plan.step_seconds,
        "gap": plan.gap,
        "cpu": time.process_time() - started,
    }


def fitting(model: GPTX, tokens: int, devices: int) -> autopart.Plan | None:
    """The plan on so many devices; None where none fits."""
    sample = torch.zeros(2, tokens, dtype=torch.long)
    batch = {"input_ids": sample, "labels": sample}
    try:
        return autopart.plan(model, mesh(devices), batch, global_batch=SAMPLES * devices, **SETTINGS)
    except autopart.PartitionError:
        return None


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| model | parameters | fewest V100 16 GB | plan | recompute | memory of the fullest | tokens/s, predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        figures = f"{row['bytes'] / 2**30:.1f} GiB | {row['tokens_per_second']:,.0f}"
        of = f"{row['parameters'] / 1e9:.2f} B | {row['devices']} | {row['plan']} | {row['recompute']}"
        lines.append(f"| {name} | {of} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SIZES), default=list(SIZES), metavar="NAME")
    parser.add_argument("--json", type=Path, help="where the results go (of all sizes: benchmarks/results/)")
    options = parser.parse_args()
    rows = {}
    for name in options.only:
        rows[name] = fewest(SIZES[name])
        print(f"{name}: {rows[name]['devices']} devices, {rows[name]['plan']}", flush=True)
    print(table(rows))
    path = options.json or (RESULTS if options.only == list(SIZES) else None)
    if path:
        path.write_text(json.dumps({"command": command_line(__spec__.name), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
