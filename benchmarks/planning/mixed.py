"""Hosts of two kinds: what it is worth that every stage of a pipeline is cut by the time of its own devices.

A model is planned on 2 hosts of A100 beside 2 of H100, and again with the same degrees and micro-batch under the
constraint ``cuts=uniform``, which gives every stage as many blocks. Both plans are certified, and the step of both is
simulated by `autopart.timeline`.

    python -m benchmarks.planning.mixed
    python -m benchmarks.planning.mixed llama-3-70b --batch 256
"""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

import autopart
from autopart.cli import models
from autopart.ir.labels import is_block

MESH = "2x8:a100-80gb+2x8:h100-80gb"


def main() -> None:
    """Plan, certify, simulate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="llama-3-8b")
    parser.add_argument("--mesh", default=MESH)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--pp", type=int, help="pipeline stages (default: the planner's choice)")
    options = parser.parse_args()
    model, batch = models.load(options.model, options.batch, options.sequence, meta=True)
    asked = {"precision": "bfloat16", "master": "float32"}
    mine = autopart.plan(model, options.mesh, batch, pp=options.pp, **asked)
    same = {"pp": mine.pp, "dp": mine.dp, "tp": mine.tp, "micro_batch": mine.micro_batch}
    even = autopart.plan(model, options.mesh, batch, **same, **asked, constraints=["cuts=uniform"])
    table = Table(title=f"{options.model} on {options.mesh}, {options.batch} samples a step")
    for name in ("cuts", "degrees", "blocks of a stage", "predicted", "simulated", "gap", "planned in"):
        table.add_column(name, overflow="fold")
    steps = []
    for name, plan in (("by time", mine), ("uniform", even)):
        autopart.certify(plan, model, batch)
        steps.append(autopart.timeline(plan).seconds)
        blocks = [sum(is_block(label) for s in stage.segments for label in s.labels) for stage in plan.stages]
        table.add_row(
            name, plan.degrees, ", ".join(map(str, blocks)), f"{plan.step_seconds:.4g} s", f"{steps[-1]:.4g} s",
            f"{plan.gap:.2%}", f"{plan.planning_seconds:.1f} s",
        )  # fmt: skip
    console = Console(width=140)
    console.print(table)
    console.print(f"both are certified; cuts by time are {steps[1] / steps[0]:.2f} times as fast")


if __name__ == "__main__":
    main()
