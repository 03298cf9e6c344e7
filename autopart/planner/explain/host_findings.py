"""What a certificate finds wrong with a plan's bytes on hosts, and with those that its collectives move."""

import math
from collections.abc import Iterator, Mapping, Sequence

from autopart.cost.training_state import Training
from autopart.passes.price_stage import PricedSegment
from autopart.plan.data import Plan
from autopart.plan.stages import PlanStage
from autopart.planner.stage_parameters import Parameter
from autopart.planner.stage_traffic import collectives_of

EQUAL = 1e-6
"""The relative difference that rounding may make between two sums of the same numbers."""

TOLERANCE = 5e-4
"""The largest relative difference of what is moved: as that of seconds in a certificate."""


def traffic_findings(
    stage: PlanStage,
    segments: Mapping[int, PricedSegment],
    read: Sequence[Parameter],
    span: range,
    training: Training,
    name: str,
) -> Iterator[str]:
    """Findings in the bytes that a stage's collectives move."""
    modes = dict(zip(span, stage.recompute, strict=True))
    counted = [(segment, modes.get(at, "none")) for at, segment in segments.items()]
    made = {(row.axis, row.collective): row.bytes for row in collectives_of(counted, read, training)}
    stated = {(row.axis, row.collective): row.bytes for row in stage.traffic if row.axis != "pp"}
    for key in sorted(made.keys() | stated.keys()):
        if not math.isclose(made.get(key, 0), stated.get(key, 0), rel_tol=TOLERANCE):
            yield f"{name}: {key[1]} over {key[0]} moves {made.get(key, 0)} bytes, the plan says {stated.get(key, 0)}"


def host_findings(plan: Plan, nbytes: float, stated: float, name: str) -> Iterator[str]:
    """Findings in the bytes of a stage's rank on its host, and where the host has fewer."""
    if not math.isclose(nbytes, stated, rel_tol=EQUAL):
        yield f"{name}: on the host are {nbytes} bytes, the plan says {stated}"
    if plan.request.get("must_fit", True) and nbytes > plan.mesh.device.usable_host_bytes * (1 + EQUAL):
        yield f"{name}: {nbytes} bytes do not fit the {plan.mesh.device.usable_host_bytes} of a rank's host"
