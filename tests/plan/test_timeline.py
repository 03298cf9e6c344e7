"""Plans on a clock: against what plans predict, closed forms, and themselves."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import autopart
from autopart import PartitionError, Plan, Timeline
from autopart.cli.main import app
from autopart.plan.schedules import SCHEDULES, in_flight
from autopart.plan.schedules.ops import Op, Order

pytestmark = pytest.mark.usefixtures("traced_once")

PLANS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "one stage": ("gpt2", "2:cpu", {"dp": 2, "zero": 1}),
    "1f1b": ("gpt2", "4:cpu", {"tp": 2, "pp": 2, "micro_batch": 4}),
    "gpipe": ("llama", "4:cpu", {"tp": 2, "pp": 2, "micro_batch": 2, "schedule": "gpipe"}),
    "4 stages": ("gpt2", "4:cpu", {"pp": 4, "micro_batch": 1}),
    "values that skip": ("mlp", "4:cpu", {"pp": 4, "micro_batch": 2}),
    "recompute": ("llama", "3:cpu", {"pp": 3, "micro_batch": 2, "recompute": "full"}),
}


@functools.cache
def planned(name: str) -> Plan:
    which, mesh, given = PLANS[name]
    model, batch = models_of(which)
    return autopart.plan(model, mesh, batch, **given)


@functools.cache
def models_of(name: str) -> tuple[Any, Any]:
    return models.build(name, layers=4)


Numbers = Sequence[float]


def having(
    schedule: str, micro_batches: int, forward: Numbers, backward: Numbers, sync: float = 0.0, message: float = 0.0
) -> Plan:
    """A plan whose stages, as many as there are numbers, take so long; `message` there and back between neighbours."""
    plan, p = planned("4 stages"), len(forward)
    stages = tuple(
        replace(
            plan.stages[0],
            forward_seconds=forward[i],
            backward_seconds=backward[i],
            sync_seconds=sync,
            send_seconds=message * ((i > 0) + (i < p - 1)),
            sends=((i + 1, 1, message),) if i < p - 1 else (),
        )
        for i in range(p)
    )
    f = [stage.turn_seconds(micro_batches + p - 1) for stage in stages]
    return replace(
        plan, schedule=schedule, pp=p, stages=stages, micro_batch=1, global_batch=micro_batches,
        step_seconds=sum(f) + (micro_batches - 1) * max(f),
    )  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_a_timeline_is_the_plans(name: str) -> None:
    plan = planned(name)
    made = autopart.timeline(plan)
    m = plan.micro_batches
    assert made.predicted_seconds == plan.step_seconds
    for index, (stage, told) in enumerate(zip(made.stages, plan.stages, strict=True)):
        assert stage.peak_bytes == pytest.approx(told.memory_bytes)
        assert stage.peak_in_flight == in_flight(plan.schedule, index, plan.pp, m)
        assert sum(stage.seconds.values()) == pytest.approx(made.seconds)
        assert stage.seconds["forward"] == pytest.approx(m * told.forward_seconds)
        assert stage.seconds["backward"] == pytest.approx(m * told.backward_seconds)
        assert stage.seconds["gradient sync"] == pytest.approx(told.sync_seconds)
        assert min(stage.seconds.values()) >= -1e-12
        assert [e for e, _, _ in stage.events if e.op is Op.STEP]
        assert stage.memory[0][0] == 0.0 and stage.memory[-1][1] == pytest.approx(
            sum(v for k, v in told.memory.items() if k not in ("activations", "transient"))
        )


def test_a_peak_at_the_end_of_a_step_is_there() -> None:
    """Stage 0 of this plan has its peak in the optimizer's step, when no activations are left."""
    plan = planned("values that skip")
    told, stage = plan.stages[0], autopart.timeline(plan).stages[0]
    assert told.memory["activations"] == 0 < told.backward_memory["activations"]
    assert sum(told.backward_memory.values()) < told.memory_bytes
    assert max(nbytes for _, nbytes, _ in stage.allocated) == pytest.approx(told.backward_memory["activations"])
    last = max(end for entry, _, end in stage.events if entry.op is Op.BACKWARD)
    assert all(second >= last for second, nbytes in stage.memory if nbytes == pytest.approx(told.memory_bytes))


@pytest.mark.parametrize("name", PLANS)
def test_the_messages_of_a_plan_are_those_its_stages_count(name: str) -> None:
    """What a stage gives counts once for it, however many take it."""
    plan = planned(name)
    taken = [0.0] * plan.pp
    for stage in plan.stages:
        for to, _, seconds in stage.sends:
            taken[to] += seconds
    for index, stage in enumerate(plan.stages):
        given = sum(seconds for _, _, seconds in stage.sends)
        if name == "values that skip":
            assert stage.send_seconds <= (given + taken[index]) * (1 + 1e-9)
        else:
            assert stage.send_seconds == pytest.approx(given + taken[index])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 1), (1, 5), (4, 2), (4, 8), (6, 9)])
def test_equal_stages_take_what_is_predicted(schedule: str, stages: int, micro_batches: int) -> None:
    plan = having(schedule, micro_batches, [2.0] * stages, [3.0] * stages)
    made = autopart.timeline(plan)
    assert made.seconds == pytest.approx(plan.step_seconds)
    assert made.bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1))


def test_a_sync_is_paid_once() -> None:
    plan = having("1f1b", 8, [2.0] * 4, [3.0] * 4, sync=1.6)
    assert autopart.timeline(plan).seconds == pytest.approx(11 * 5 + 1.6) == plan.step_seconds


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6), st.integers(1, 12), st.floats(0.5, 4.0), st.floats(0, 0.2)
)
def test_1f1b_takes_no_longer_than_predicted(
    forward: list[float], micro_batches: int, ratio: float, message: float
) -> None:
    """Where backward is in the same proportion to forward in all stages."""
    plan = having("1f1b", micro_batches, forward, [ratio * f for f in forward], message=message)
    made = autopart.timeline(plan)
    assert made.seconds <= plan.step_seconds * (1 + 1e-9)
    if not message:
        work = [(1 + ratio) * f for f in forward]
        assert made.seconds >= micro_batches * max(work) * (1 - 1e-9)


def test_1f1b_of_uneven_proportions_can_take_longer() -> None:
    made = autopart.timeline(having("1f1b", 6, [0.0, 0.84, 0.0, 0.0], [0.81, 0.0, 0.0, 0.19]))
    assert made.seconds > made.predicted_seconds


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6).filter(
        lambda s: sum(map(sum, s)) > 0
    ),
    st.integers(1, 12),
)
def test_gpipe_takes_its_closed_form(stages: list[tuple[float, float]], micro_batches: int) -> None:
    forward, backward = map(list, zip(*stages, strict=True))
    made = autopart.timeline(having("gpipe", micro_batches, forward, backward))
    slowest = max(forward) + max(backward)
    assert made.seconds == pytest.approx(sum(forward) + sum(backward) + (micro_batches - 1) * slowest)


def test_a_deadlock_names_who_waits_for_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(stage: int, stages: int, micro_batches: int) -> Order:
        """The last stage wants two forwards before the backward that the first one waits for."""
        first = [Op.FORWARD, Op.BACKWARD] if stage == 0 else [Op.FORWARD, Op.FORWARD]
        last = [Op.FORWARD, Op.BACKWARD] if stage == 0 else [Op.BACKWARD, Op.BACKWARD]
        return list(zip([*first, *last], [0, 0, 1, 1] if stage == 0 else [0, 1, 0, 1], strict=True))

    monkeypatch.setitem(SCHEDULES, "stuck", stuck)
    with pytest.raises(PartitionError) as caught:
        autopart.timeline(having("stuck", 2, [1.0] * 2, [1.0] * 2))
    assert "these wait for each other" in caught.value.why
    assert "stage 0 RECV_GRAD micro-batch 0 from stage 1" in caught.value.why
    assert "stage 1 RECV micro-batch 1 from stage 0" in caught.value.why


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(PartitionError, match="unknown schedule 'zigzag'"):
        autopart.timeline(replace(planned("4 stages"), schedule="zigzag"))


def test_the_chart() -> None:
    made = autopart.timeline(having("1f1b", 3, [1.0] * 2, [1.0] * 2, sync=1.0))
    rows = made.chart(18).plain.splitlines()
    assert [row[10:28] for row in rows[1:3]] == ["FFff--BBFFbb--BB==", "--FFBBffbbFFBB==.."]
    assert rows[0] == "step 9.00 s simulated, 9.00 s predicted   bubble 22.2%"
    assert "2 in flight" in rows[1] and "1 in flight" in rows[2] and "gradient sync" in rows[3]
    assert str(made).splitlines()[0] == rows[0]


def slices(trace: dict[str, Any], phase: str) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == phase]


@pytest.mark.parametrize("name", ["1f1b", "values that skip"])
def test_the_trace_is_the_timeline(name: str) -> None:
    made: Timeline = autopart.timeline(planned(name))
    trace = json.loads(json.dumps(made.trace()))
    for number, stage in enumerate(made.stages):
        mine = [e for e in slices(trace, "X") if e["tid"] == number]
        for what in ("forward", "backward"):
            total = sum(e["dur"] for e in mine if e["cat"] == what)
            assert total == pytest.approx(stage.seconds[what] * 1e6)
        assert all(b["ts"] >= a["ts"] + a["dur"] - 1e-6 for a, b in pairwise(mine))
        held = [e["args"]["bytes"] for e in slices(trace, "C") if e["name"] == f"bytes of stage {number}"]
        assert max(held) == pytest.approx(stage.peak_bytes)
    begun, ended = ({e["id"]: e["ts"] for e in slices(trace, phase)} for phase in "be")
    assert begun.keys() == ended.keys() and len(begun) == len(slices(trace, "b"))
    assert len(begun) == 2 * planned(name).micro_batches * sum(len(s.sends) for s in planned(name).stages)
    assert all(ended[key] >= begun[key] for key in begun)


def test_the_shell_shows_a_timeline(tmp_path: Path) -> None:
    plan, trace = tmp_path / "plan.json", tmp_path / "trace.json"
    planned("1f1b").save(plan)
    made = autopart.timeline(planned("1f1b"))
    shown = CliRunner().invoke(app, ["show", str(plan), "--timeline", "--trace", str(trace)])
    assert shown.exit_code == 0 and shown.stdout.splitlines()[0] == str(made).splitlines()[0]
    assert json.loads(trace.read_text()) == json.loads(json.dumps(made.trace()))
    told = json.loads(CliRunner().invoke(app, ["show", str(plan), "--timeline", "--json"]).stdout)
    assert told == json.loads(json.dumps(made.to_json()))
