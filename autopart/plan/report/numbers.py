"""The numbers of a report, as plain data: what the page's JSON has."""

import math
from dataclasses import asdict
from typing import Any

from autopart.hardware.mesh import usable_bytes
from autopart.plan.breakdown import model_flops_utilisation, slowest_stage, step_breakdown
from autopart.plan.fields import PlanFields
from autopart.plan.reasons import reasons
from autopart.plan.report.accuracy import Comparison, comparison_json, published
from autopart.plan.report.clock import predicted, seconds_by_cause
from autopart.plan.report.extras import Bench, Extras
from autopart.plan.report.graph import layers_text
from autopart.plan.report.measured import MeasuredStep
from autopart.plan.report.search import Dot
from autopart.plan.text import head
from autopart.plan.timeline import Timeline


def numbers(
    plan: PlanFields, made: Timeline, measured: MeasuredStep | None, extras: Extras | None, dots: list[Dot],
    compared: list[Comparison], bench: Bench | None,
) -> dict[str, Any]:  # fmt: skip
    """Everything that the report shows, without the operators, which the plan's own JSON has. Seconds and bytes."""
    each = plan.dp * plan.tp
    return finite(
        {
            "head": head(plan),
            "model": plan.model,
            "mesh": str(plan.mesh),
            "degrees": {"pp": plan.pp, "dp": plan.dp, "tp": plan.tp},
            "step_seconds": plan.step_seconds,
            "bound_seconds": plan.bound_seconds,
            "gap": plan.gap,
            "samples_per_second": plan.global_batch / plan.step_seconds,
            "mfu": model_flops_utilisation(plan) if plan.precision in plan.mesh.device.flops else None,
            "usable_bytes": usable_bytes(plan.mesh),
            "slowest_stage": slowest_stage(plan),
            "breakdown": step_breakdown(plan),
            "reasons": list(reasons(plan)),
            "stages": [
                {
                    "ranks": [index * each, (index + 1) * each - 1],
                    "layers": layers_text(stage),
                    "forward_seconds": stage.forward_seconds,
                    "backward_seconds": stage.backward_seconds,
                    "sync_seconds": stage.sync_seconds,
                    "send_seconds": stage.send_seconds,
                    "memory_bytes": stage.memory_bytes,
                    "usable_bytes": plan.usable_bytes[index],
                    "memory": dict(stage.memory),
                    "sends": [{"to": to, "bytes": nbytes} for to, nbytes, _ in stage.sends],
                }
                for index, stage in enumerate(plan.stages)
            ],
            "timeline": {
                "seconds": made.seconds,
                "bubble": made.bubble,
                "stages": [
                    {
                        "seconds": seconds_by_cause(predicted(stage), made.seconds),
                        "peak_in_flight": stage.peak_in_flight,
                        "peak_bytes": stage.peak_bytes,
                    }
                    for stage in made.stages
                ],
            },
            "measured": measured_numbers(measured),
            "search": asdict(plan.search) if plan.search else None,
            "alternatives": [asdict(dot) for dot in dots],
            "extras": extras.to_json() if extras else None,
            "accuracy": [comparison_json(row) for row in compared],
            "published": [] if compared or bench else [asdict(row) for row in published(plan)],
            "bench": asdict(bench) if bench else None,
        }
    )


def measured_numbers(measured: MeasuredStep | None) -> dict[str, Any] | None:
    """The measured step: its seconds, and those of each stage by cause."""
    if measured is None:
        return None
    stages = [
        {"rank": rank, "seconds": seconds_by_cause(slices, measured.seconds)}
        for rank, slices in zip(measured.ranks, measured.stages, strict=True)
    ]
    found = {"step": measured.step, "of": measured.of, "seconds": measured.seconds, "stages": stages}
    messages = [[asdict(row) for row in rows] for rows in measured.messages]
    return {**found, "peak_bytes": measured.peak_bytes, "messages": messages}


def finite(value: Any) -> Any:
    """The value with null for every number that JSON has not: infinities and nan."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
