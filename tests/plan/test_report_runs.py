"""What a report says of real runs: a traced step, measured peaks and messages, a benchmark, and published runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reports import PLANS, Page, numbers_of, page, planned, trace_of

import autopart
from autopart import Mesh, PartitionError, Plan
from autopart.plan.report import Bench, BenchRow, Extras, report_html
from autopart.plan.report.extras import MemoryBlock
from autopart.plan.report.measured import measured_step
from autopart.plan.report.memory import memory_tree
from autopart.plan.report.page import signed_text

pytestmark = pytest.mark.usefixtures("traced_once")


def counted(ranks: int, op: str = "forward", seconds: float = 0.5) -> list[dict[str, Any]]:
    """What `Measurement` would add of ranks, the peaks of which are 1000, 1001, ... bytes, over two steps."""
    message = {"op": op, "axis": "tp", "collective": "all_reduce", "calls": 8, "bytes": 4096, "seconds": seconds}
    return [{"peak_bytes": 1000 + rank, "steps": 2, "messages": [message]} for rank in range(ranks)]


def test_a_measured_step_stands_beside_the_prediction(tmp_path: Path) -> None:
    plan = planned("1f1b")
    file = tmp_path / "trace.json"
    file.write_text(json.dumps(trace_of(plan, 2.0)))
    step = measured_step(file, plan)
    assert (step.step, step.of, step.ranks) == (2, 4, (0, 2))
    seconds = 2.0 * 1.2 * max(end for s in autopart.timeline(plan).stages for _, _, end in s.events)
    assert step.seconds == pytest.approx(seconds)
    plan.report(tmp_path / "report.html", trace=file)
    told = numbers_of((tmp_path / "report.html").read_text())
    for stage, row in zip(plan.stages, told["measured"]["stages"], strict=True):
        assert row["seconds"]["forward"] == pytest.approx(2.4 * plan.micro_batches * stage.forward_seconds)
        assert sum(row["seconds"].values()) == pytest.approx(step.seconds, rel=0.01) or row["seconds"]["idle"] == 0
    assert "measured" in Page((tmp_path / "report.html").read_text()).text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["traceEvents"].clear(), "no whole step"),
        (lambda t: t["traceEvents"].pop(0), None),
        (lambda t: t.pop("traceEvents"), "no trace of a run"),
        (lambda t: t["traceEvents"][0].update(pid=7), "another plan"),
        (lambda t: t["traceEvents"][0]["args"].update(op="dance"), "no trace of a run"),
        (lambda t: t["traceEvents"][0].update(dur=float("nan")), "no trace of a run"),
        (lambda t: t["traceEvents"][0].pop("args"), "no trace of a run"),
        (lambda t: t.update(traceEvents=7), "no trace of a run"),
        (lambda t: t.update(ranks=[{"peak_bytes": 1}]), "no trace of a run"),
        (lambda t: t.update(ranks=counted(4, seconds=float("inf"))), "no trace of a run"),
        (lambda t: t.update(ranks=counted(4, op="dance")), "no trace of a run"),
    ],
)
def test_other_traces_are_refused(change: Any, message: str | None) -> None:
    plan = planned("1f1b")
    trace = json.loads(json.dumps(trace_of(plan, 1.0)))
    change(trace)
    if message is None:
        assert measured_step(trace, plan).of == 4  # another rank of the stage has what this one lacks
        return
    with pytest.raises(PartitionError, match=message):
        report_html(plan, trace=trace)


def test_a_recompute_is_a_part_of_its_backward() -> None:
    plan = planned("1f1b")
    trace = trace_of(plan, 1.0)
    before = measured_step(trace, plan)
    again = next(event for event in trace["traceEvents"] if event["args"]["op"] == "backward")
    trace["traceEvents"].append({**again, "args": {**again["args"], "op": "recompute"}})
    assert measured_step(trace, plan) == before


def test_the_scoreboard_has_the_step_stages_peaks_and_messages() -> None:
    plan = planned("1f1b")
    trace = {**trace_of(plan, 2.0), "ranks": counted(4)}
    step = measured_step(trace, plan)
    assert step.peak_bytes == (1001, 1003)  # of the fullest rank of each stage
    assert [(row.calls, row.bytes, row.seconds) for rows in step.messages for row in rows] == [(4, 2048, 0.25)] * 2
    text, told = report_html(plan, trace=trace)
    rows = {(row["about"], row["what"]): row for row in told["accuracy"]}
    assert rows["step", "all of it"]["error"] == pytest.approx(plan.step_seconds / step.seconds - 1)
    for index, stage in enumerate(plan.stages):
        assert rows[f"stage {index}", "forward"]["error"] == pytest.approx(1 / 2.4 - 1)
        peak = rows[f"stage {index}", "peak memory"]
        assert (peak["predicted"], peak["measured"]) == (stage.memory_bytes, 1001 + 2 * index)
        lines = [(len(segment.labels), line.comm_seconds) for segment in stage.segments for line in segment.lines]
        within = rows[f"stage {index}", "collectives within these"]
        assert within["predicted"] == pytest.approx(plan.micro_batches * sum(n * comm for n, comm in lines))
        assert within["measured"] == 0.25
    moved = [t.bytes for stage in plan.stages for t in stage.traffic if (t.axis, t.collective) == ("tp", "all_reduce")]
    assert rows["over tp", "all-reduce"]["predicted"] == sum(moved)
    assert rows["over tp", "all-reduce"]["measured"] == 2 * 2048
    shown = Page(text).text
    assert "measured 1003 B" in shown and "The largest measured peak of stage 1 was 1003 B" in shown
    assert told["published"] == []


@pytest.mark.parametrize(
    ("mesh", "runs", "told"),
    [
        ("2:cpu", "small models on 1, 2 and 4 CPU ranks", "are assumed, not measured"),
        ("2:h100-80gb", "torchtitan, December 2024", "on such devices"),
        ("2:b200", "Megatron-LM, January 2021", "No published run is on b200"),
    ],
)
def test_without_a_run_published_ones_say_how_far_predictions_are_off(mesh: str, runs: str, told: str) -> None:
    plan = replace(planned("1f1b"), mesh=Mesh.of(mesh))
    text, numbers = report_html(plan)
    assert runs in Page(text).text and told in Page(text).text
    assert numbers["accuracy"] == [] and all(0 < row["mean"] < 0.2 for row in numbers["published"])
    devices = {row["device"] for row in numbers["published"]}
    assert devices == ({mesh[2:].partition("-")[0]} if "b200" not in mesh else {"v100", "a100", "h100"})


def owners(plan: Plan) -> Extras:
    """Two blocks of each stage that share its bytes of every kind, one of them three times."""
    return Extras(
        tuple(
            tuple(
                MemoryBlock(label, times, tuple(("weight", kind, n / 4) for kind, n in stage.memory.items() if n))
                for label, times in (("first", 1), ("rest", 3))
            )
            for stage in plan.stages
        )
    )


@pytest.mark.parametrize("name", PLANS)
def test_the_tree_adds_up_to_the_peak(name: str) -> None:
    plan = planned(name)
    for extras in (None, owners(plan)):
        for stage, groups in zip(plan.stages, memory_tree(plan, extras), strict=True):
            assert {group.kind: group.bytes for group in groups} == {k: n for k, n in stage.memory.items() if n}
            assert sum(group.share for group in groups) == pytest.approx(1)
            for group in groups if extras else ():
                assert sum(block.times * block.bytes for block in group.blocks) == pytest.approx(group.bytes)
    shown = Page(report_html(plan, extras=owners(plan))[0]).text
    assert "rest x 3: " in shown and "has them by block and tensor" not in shown
    assert "has them by block and tensor" in Page(page(name)).text


def test_a_benchmark_stands_in_its_report() -> None:
    plan = planned("1f1b")
    rows = (
        BenchRow("autopart", "tp=2", 0.2, (0.19, 0.22), plan.step_seconds, 1.0, 1e-7),
        BenchRow("a rival", "dp=4", 0.3, (0.29, 0.31), None, 1.5, 2e-7),
        BenchRow("a wrong rival", "differs: losses off", None, None, None, None, 0.3),
    )
    text, told = report_html(plan, bench=Bench(rows, 5, "4 ranks"))
    shown = Page(text).text
    assert "Medians of 5 interleaved rounds, 4 ranks" in shown and "differs: losses off" in shown
    assert [row["seconds"] for row in told["bench"]["rows"]] == [0.2, 0.3, None] and told["published"] == []
    assert signed_text(plan.step_seconds / 0.2 - 1) in shown
    nothing = tuple(replace(row, seconds=None, quartiles=None, ratio=None) for row in rows)
    assert "a wrong rival" in Page(report_html(plan, bench=Bench(nothing, 5, "4 ranks"))[0]).text
    assert numbers_of(text)["bench"]["where"] == "4 ranks"


def test_differences_that_round_to_nothing_have_no_sign() -> None:
    assert [signed_text(x) for x in (0.0149, -0.0004, 0.0, -1.0)] == ["+1.5%", "0.0%", "0.0%", "-100.0%"]
    assert signed_text(-0.00004, 2) == "0.00%"
