"""What planning again adds to a report, and the record that a plan keeps of its search."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from models import Batch, build
from torch import nn

import autopart
from autopart import Mesh, Plan
from autopart.hardware.mesh import usable_bytes
from autopart.plan.report import report_html
from autopart.plan.search_summary import ENDS
from autopart.planner.search_history import KEPT, SearchHistory
from autopart.planner.search_points import SearchPoint

pytestmark = [pytest.mark.usefixtures("traced_once"), pytest.mark.slow]

SETTINGS: dict[str, Any] = {"micro_batch": 4, "global_batch": 8}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return autopart.plan(*_model_and_mesh(), **SETTINGS)


def _model_and_mesh() -> tuple[nn.Module, Mesh, Batch]:
    model, batch = build("gpt2", layers=4)
    return model, Mesh.of("4:a100-80gb"), batch


def test_extras_are_those_of_the_plan(plan: Plan) -> None:
    model, mesh, batch = _model_and_mesh()
    extras = autopart.report_extras(plan, model, batch, **SETTINGS)
    assert extras.slack == pytest.approx(usable_bytes(mesh) - max(plan.memory_bytes))
    for stage, blocks in zip(plan.stages, extras.memory, strict=True):
        found = dict.fromkeys(stage.memory, 0.0)
        for block in blocks:
            for _, kind, nbytes in block.rows:
                found[kind] += nbytes * block.times
        assert found == pytest.approx(dict(stage.memory))
    own = (plan.pp, plan.dp, plan.tp)
    others = {(1, 4, 1), (1, 1, 4), (2, 2, 1), (4, 1, 1)} - {own}
    assert {(row.pp, row.dp, row.tp) for row in extras.alternatives} >= others
    for row in extras.alternatives:
        assert (row.pp, row.dp, row.tp) != own and row.pp * row.dp * row.tp == 4
        assert row.seconds is not None and row.bound_seconds <= row.seconds * (1 + 1e-9)
        assert row.seconds >= plan.bound_seconds * (1 - 1e-6)
        degrees = [f"{axis}={getattr(row, axis)}" for axis in ("pp", "dp", "tp")]
        forced = autopart.plan(model, mesh, batch, constraints=degrees, **SETTINGS)
        assert forced.step_seconds <= row.seconds * (1 + 1e-6) and row.bound_seconds <= forced.step_seconds * (1 + 1e-6)
    assert any("more GiB" in row.what for row in extras.prices)
    text, told = report_html(plan, extras=extras)
    assert "Each row is another search" in text and len(told["alternatives"]) >= 4
    assert len(told["extras"]["memory"]) == plan.pp


@pytest.mark.parametrize("share", [1.0, 0.9])
def test_the_record_of_a_search(plan: Plan, share: float) -> None:
    """Of one in which memory is ample, and of one that has to recompute."""
    model, mesh, batch = _model_and_mesh()
    less = replace(mesh, device=replace(mesh.device, memory_bytes=round(max(plan.memory_bytes) / 0.92 * share)))
    found = autopart.plan(model, less, batch, pp=plan.pp, dp=plan.dp, tp=plan.tp, **SETTINGS)
    search = found.search
    assert search is not None and search.history and set(search.ended) <= set(ENDS)
    assert search.ended["chosen"] == 1 and sum(search.ended.values()) == search.points
    bounds = [moment.bound for moment in search.history]
    best = [moment.incumbent for moment in search.history if moment.incumbent is not None]
    assert bounds == sorted(bounds) and best == sorted(best, reverse=True)
    assert [m.seconds for m in search.history] == sorted(m.seconds for m in search.history)
    assert best[-1] == pytest.approx(found.step_seconds, rel=1e-6)
    (chosen,) = (point for point in search.compared if point.ended == "chosen")
    assert (chosen.pp, chosen.dp, chosen.tp, chosen.micro_batch, chosen.zero) == (
        found.pp, found.dp, found.tp, found.micro_batch, found.zero,
    )  # fmt: skip
    assert chosen.seconds == pytest.approx(found.step_seconds, rel=1e-6)
    assert chosen.memory_bytes == pytest.approx(max(found.memory_bytes), rel=0.02)
    assert found.fits and (share == 1.0 or max(found.memory_bytes) < max(plan.memory_bytes))


def test_a_long_record_is_thinned() -> None:
    history, point = SearchHistory(), SearchPoint(1, 1, 1, 1)
    for number in range(1000):
        best = float("inf") if number < 300 else 9.0 if number < 700 else 8.0
        history.note(point, 1, number + 1, best, 1.0 + number / 1000)
    history.note(point, 2, 1001, 8.0, 1.0)  # neither the incumbent nor the bound got better
    kept, visited = history.thinned(), [moment.visited for moment in history.thinned()]
    assert len(history.moments) == 1000 and len(kept) <= KEPT + 8 and visited == sorted(set(visited))
    assert {1, 300, 301, 700, 701, 1000} <= set(visited) and history.last_step == {point: 2}
    assert [m.incumbent for m in kept if m.visited in (300, 301, 701)] == [None, 9.0, 8.0]
    assert SearchHistory().thinned() == ()
