"""What a report says besides its plan: shadow prices, the best plans of other degrees, and memory by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Unpack

from torch import nn

from autopart.errors import PartitionError
from autopart.frontend.batch import Batch
from autopart.frontend.with_loss import Loss, with_loss
from autopart.passes.source import Source
from autopart.plan.data import Plan
from autopart.plan.report.extras import AlternativeRow, Extras, PriceRow
from autopart.planner.branch_and_bound import Search
from autopart.planner.constraint_text import parse
from autopart.planner.explain.memory_report import equal_blocks, report_traced
from autopart.planner.explain.why import Explanation, explain_traced
from autopart.planner.make_plan import request_of
from autopart.planner.progress import OnProgress, silent
from autopart.planner.request import Settings

DEGREES = 24
"""Degrees other than the plan's whose best plan is searched: those of the least bounds first."""
TIME_LIMIT = 0.4
"""Seconds of each of these searches, after which it gives its incumbent."""


def report_extras(
    plan: Plan,
    model: nn.Module,
    batch: Batch,
    *,
    loss: Loss | None = None,
    on_progress: OnProgress = silent,
    **settings: Unpack[Settings],
) -> Extras:
    """Trace the model and plan again, for what `plan.report` says besides the plan.

    batch, loss, settings  those that the plan was made with

    Raises PartitionError as `autopart.explain` and `autopart.memory_report` do.
    """
    model = with_loss(model, loss)
    request = request_of(model, batch, **settings)
    explained = explain_traced(Source.of(model, batch, request), plan.mesh, request, on_progress)
    prices = tuple(PriceRow(price.what, price.seconds) for price in explained.prices())
    return Extras(memory_extras(plan, model, batch).memory, prices, explained.slack, tuple(alternatives(explained)))


def memory_extras(plan: Plan, model: nn.Module, batch: Batch) -> Extras:
    """Trace the model for the memory of the plan's stages by tensor alone. Arguments and errors as `report_extras`."""
    stages = report_traced(plan, Source.of(model, batch, plan))
    return Extras(tuple(tuple(equal_blocks(stage)) for stage in stages))


def alternatives(explained: Explanation) -> Iterator[AlternativeRow]:
    """The best plan of each of other degrees that the request allows, with no other search space than its own."""
    own = explained.found.point.degrees
    points = (*explained.near, *explained.space.points())
    others = list(dict.fromkeys(point.degrees for point in points if point.degrees != own))
    for pp, dp, tp in others[:DEGREES]:
        pinned = [parse(f"{axis}={degree}") for axis, degree in (("pp", pp), ("dp", dp), ("tp", tp))]
        search = Search(explained.constrained(pinned, time_limit=TIME_LIMIT), silent, heuristic=True)
        try:
            found = search.run()
        except PartitionError:
            yield AlternativeRow(pp, dp, tp, 0, 0, None, search.bound, None)
            continue
        samples, zero = found.point.micro_batch, found.point.zero
        yield AlternativeRow(
            pp, dp, tp, samples, zero, found.seconds, found.bound, max(found.peak_bytes), offload=found.point.offload,
            shard_size=found.point.shard_size,
        )  # fmt: skip
