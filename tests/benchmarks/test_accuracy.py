"""The scoreboard of the cost model: how rows are read, and how they are scored."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from autopart import Mesh
from autopart.plan.schedules.program import instructions
from autopart.plan.schedules.simulate import simulate
from benchmarks.accuracy.published import Bench, Published, read
from benchmarks.accuracy.published_runs import (
    FILES,
    Scored,
    again_seconds,
    differences,
    figure_of,
    fsdp,
    kendall,
    plan_of,
    predicted_seconds,
    scattered,
    score,
    sharing_seconds,
    step_seconds,
    why_not,
)

pytestmark = pytest.mark.slow

ROWS = {file: list(read(file)) for file in FILES}
BENCH = Bench()
"""Traces that the tests share."""


def row_of(name: str) -> Published:
    """The row of a name."""
    return next(row for rows in ROWS.values() for row in rows if row.name == name)


@pytest.mark.parametrize(
    ("xs", "ys", "tau"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3], [1, 3, 2], 1 / 3),
        ([1, 2, 2], [1, 2, 3], 2 / math.sqrt(6)),
    ],
)
def test_kendall(xs: list[float], ys: list[float], tau: float) -> None:
    assert kendall([("one", x, y) for x, y in zip(xs, ys, strict=True)]) == pytest.approx(tau)


def test_kendall_looks_at_pairs_of_one_sweep() -> None:
    rows = [("one", 1.0, 1.0), ("one", 2.0, 2.0), ("other", 9.0, 0.1), ("other", 8.0, 0.2)]
    assert kendall(rows) == 0


def test_kendall_of_equals() -> None:
    assert math.isnan(kendall([("one", 1, y) for y in (1, 2, 3)]))


@pytest.mark.parametrize("stages", [2, 4, 7])
def test_whole_stages_are_what_the_simulator_says(stages: int) -> None:
    lists = instructions("1f1b", stages, 16, [(i, i + 1) for i in range(stages - 1)])
    links = {(i, i + 1): 0.0 for i in range(stages - 1)}
    found = simulate(lists, [1.0] * stages, [2.0] * stages, links)
    assert step_seconds([3.0] * stages, [0.0] * stages, [0.0] * stages, 16) == pytest.approx(found.seconds)


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_interleaving_divides_the_bubble(pieces: int) -> None:
    """The bubble is (p - 1) / (v m) of the ideal time: Narayanan et al., arXiv 2104.04473, section 2.2."""
    found = step_seconds([3.0] * 4, [0.0] * 4, [0.0] * 4, 8, pieces)
    assert found / (8 * 3.0) - 1 == pytest.approx((4 - 1) / (pieces * 8))


def test_interleaving_multiplies_the_messages() -> None:
    """Of 3 stages in 2 pieces, the middle one has 8 messages for one micro-batch, the others 6: each sends or receives
    at 2 pieces' 2 sides, forward and backward, but for the model's two ends."""
    whole = step_seconds([0.0] * 3, [0.0] * 3, [2.0, 4.0, 2.0], 1)
    pieces = step_seconds([0.0] * 3, [0.0] * 3, [2.0, 4.0, 2.0], 1, 2)
    assert (whole, pieces) == (2 + 4 + 2, 8 + (6 + 6) / 2)


@pytest.mark.parametrize("file", FILES)
def test_rows_are_read(file: str) -> None:
    for row in ROWS[file]:
        if not row.skipped:
            degrees = row.forced["pp"] * row.forced["dp"] * row.forced["tp"]
            assert degrees == Mesh.parse(row.mesh).size and row.global_batch % row.micro_batch == 0, row.name
        assert row.skipped or row.measured or row.apart, row.name


def test_counts_of_rows() -> None:
    counts = [(len(rows), sum(not why_not(row) for row in rows)) for rows in ROWS.values()]
    assert counts == [(10, 10), (12, 12), (10, 9), (32, 6)]


def test_seconds_of_rows() -> None:
    """TFLOP/s as Megatron-LM counts them give the iteration times it publishes beside them, to their digits."""
    flops = 96 * 8 * 1024 * 24 * 1920**2 * (1 + 1024 / 6 / 1920 + 51200 / 16 / 24 / 1920)
    assert row_of("megatron_jan2021:1").measured == pytest.approx(flops / 71.9e12, rel=2e-3)
    assert row_of("torchtitan_2024_12:1").measured == pytest.approx(2 * 8192 / 5762)


def test_models_that_are_not_in_the_table_of_sizes() -> None:
    row = row_of("seqsel_t5:1")
    sizes = {"n_layer": 48, "n_embd": 6144, "n_head": 64, "n_positions": 2048, "vocab_size": 51200}
    assert row.model == "gpt-22b" and row.config == {"model_type": "gpt2", **sizes}
    assert row_of("megatron_sc21_t1:1").config == {}


def test_a_small_row_from_end_to_end() -> None:
    found = score(BENCH, row_of("megatron_jan2021:1"))
    assert abs(math.log2(found.predicted / 1.121)) < 1
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.clock == pytest.approx(0, abs=1e-9)


def test_a_pipeline_is_interleaved() -> None:
    """A plan's own stages: in one piece its step, in several a shorter one where messages are few."""
    row = replace(row_of("seqsel_t5:3"), overlapped=False, replicated=False)
    plan = plan_of(BENCH, row)
    assert predicted_seconds(plan, replace(row, pieces=1)) == pytest.approx(plan.step_seconds)
    assert predicted_seconds(plan, row) < plan.step_seconds
    stage = plan.stages[0]
    assert not any(differences(plan, stage, row).values())
    later = differences(plan, stage, replace(row, overlapped=True, replicated=True))
    comm = sum(len(run.labels) * line.comm_seconds for run in stage.segments for line in run.lines)
    assert later["communication"] == pytest.approx(-plan.micro_batches * comm / 2)
    assert -stage.sync_seconds < later["gradient sync"] < -0.5 * stage.sync_seconds
    assert later["p2p"] < 0 == later["recompute"]


def test_a_scattered_message_is_sent_in_parts() -> None:
    """8 ranks each send an eighth, then gather over links that are twelve times as fast as a card."""
    assert 1 / 8 < scattered(Mesh.parse("2x8:a100-80gb"), 8) < 1 / 4
    assert scattered(Mesh.parse("2x8:a100-80gb"), 1) == 1


def test_every_second_product_is_run_again() -> None:
    """Of a Llama's seven, k, o and up: a third of forward and backward each."""
    stage = plan_of(BENCH, row_of("torchtitan_2024_12:1")).stages[0]
    (blocks,) = (run for run in stage.segments if len(run.labels) > 1)
    found = {line.name: line.seconds for line in blocks.lines if line.operator == "linear"}
    again = found["self_attn.k_proj"] + found["self_attn.o_proj"] + found["mlp.up_proj"]
    assert again_seconds(stage) == pytest.approx(32 * again / 3)


def test_messages_of_fsdp() -> None:
    """A block is one message, of fewer latencies than the planned ones of 64 MiB, which are longer on more hosts; they
    are copied through buffers: 14 bytes an element."""
    small, large = (row_of(f"torchtitan_2024_12:{n}") for n in (1, 4))
    near, far = (plan_of(BENCH, row, "float32") for row in (small, large))
    (late, copied), (later, same) = (fsdp(plan, plan.stages[0]) for plan in (near, far))
    assert later < 5 * late < 0
    assert copied == pytest.approx(14 * 8.03e9 / 2.4e12 / 0.92, rel=1e-2) == pytest.approx(same, rel=1e-2)
    assert Scored(small, 3.0, {}, {}, True, sharing=0.1).hidden == pytest.approx(2.7 / (small.measured or 0) - 1)
    assert 0 < sharing_seconds(near) < sharing_seconds(far) < far.step_seconds / 5


def test_a_norm_of_several_kernels_takes_longer() -> None:
    """Without torch.compile RMSNorm is not one kernel, though the model is the same."""
    row, bench = row_of("torchtitan_2024_12:1"), Bench(as_run=True)
    assert row.eager and not row_of("torchtitan_2024_12:2").eager
    several, one = (plan_of(bench, replace(row, eager=eager)) for eager in (True, False))
    names = [{line.operator for run in plan.stages[0].segments for line in run.lines} for plan in (several, one)]
    assert "rms_norm" in names[1] - names[0] and "mean.dim" in names[0] - names[1]
    assert 1.03 < several.step_seconds / one.step_seconds < 1.15


def test_zero_is_shared() -> None:
    """8 ranks hold an eighth of Llama-3-8B each, though all of it would be faster and need not fit."""
    plan = plan_of(BENCH, row_of("torchtitan_2024_12:1"))
    assert plan.stages[0].memory["parameters"] == pytest.approx(2 * 8.03e9 / 8, rel=1e-2)


def test_every_source_is_drawn(tmp_path: Path) -> None:
    """All runs of all sources beside the line of equals, and each source in the order of its published seconds."""
    groups = {
        title: [Scored(r, 1.5 * (r.measured or 0), {}, {}, True) for r in ROWS[file] if not why_not(r)]
        for file, title in FILES.items()
    }
    pytest.importorskip("matplotlib")
    figure = figure_of(groups)
    scatter, *panels = figure.get_axes()
    lines = {line.get_label(): line for line in scatter.get_lines()}
    assert set(lines) == {*groups, "equal"}
    assert lines["equal"].get_xdata().tolist() == lines["equal"].get_ydata().tolist()
    for panel, (title, scored) in zip(panels, groups.items(), strict=True):
        published = lines[title].get_xdata()
        assert published.tolist() == [s.row.measured for s in scored]
        assert lines[title].get_ydata().tolist() == pytest.approx((1.5 * published).tolist())
        drawn, predicted = panel.get_lines()
        assert drawn.get_ydata().tolist() == sorted(published)
        assert predicted.get_ydata().tolist() == pytest.approx([1.5 * t for t in sorted(published)])
        assert panel.get_title() == f"{title}\ntau 1.00"
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
