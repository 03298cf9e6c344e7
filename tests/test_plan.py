"""Planning: plans that are kept, requests that are refused, and solvers against enumeration."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import autopart
from autopart import PartitionError, Plan
from autopart.compile import sources
from autopart.cost import Training
from autopart.mesh import Mesh
from autopart.passes.annotate import annotate_costs
from autopart.passes.fold import fold
from autopart.passes.formulate import Axis, Settings, formulate_splits
from autopart.passes.fuse import fuse
from autopart.passes.simplify import simplify
from autopart.passes.solve import solve_cuts, solve_splits
from autopart.passes.trace import trace
from autopart.problem import CutProblem, SplitProblem

MESH = "4:cpu"
DEGREES = {"tp": 2, "pp": 2, "micro_batch": 4}
Given = tuple[nn.Module, models.Batch]


@pytest.fixture(scope="module")
def gpt2() -> Given:
    return models.build("gpt2")


@pytest.fixture(scope="module")
def plan(gpt2: Given) -> Plan:
    return autopart.plan(gpt2[0], MESH, gpt2[1], **DEGREES)


def test_a_plan_survives_a_file(plan: Plan, gpt2: Given, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.to_json() == plan.to_json() and str(again) == str(plan)
    for name in plan.__dataclass_fields__:
        assert getattr(again, name) == getattr(plan, name), name
    assert sources(*gpt2, again) == sources(*gpt2, plan)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "cannot read the plan"),
        (lambda text: "", "cannot read the plan"),
        (lambda text: "[]", "no plan of a version that is known"),
        (lambda text: text.replace('"schema": 1', '"schema": 99', 1), "schema 99, expected 1"),
        (lambda text: edited(text, "stages", 3), "damaged"),
        (lambda text: edited(text, "stages", None), "damaged"),
        (lambda text: edited(text, "mesh", {}), "not a mesh"),
        (lambda text: edited(text, "surprise", 1), "surprise"),
        (lambda text: edited(text, "signature", {}), "damaged"),
    ],
)
def test_a_damaged_file_is_refused(plan: Plan, tmp_path: Path, damage: Callable[[str], str], message: str) -> None:
    plan.save(tmp_path / "good.json")
    (tmp_path / "bad.json").write_text(damage((tmp_path / "good.json").read_text()))
    with pytest.raises(PartitionError, match=message):
        Plan.load(tmp_path / "bad.json")


def test_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PartitionError, match=r"none\.json"):
        Plan.load(tmp_path / "none.json")


def edited(text: str, key: str, value: object) -> str:
    """The JSON with one entry changed, or without it for None."""
    data = {**json.loads(text), key: value}
    return json.dumps({k: v for k, v in data.items() if v is not None})


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"n_embd": 64}, r"weight has shape \[32, 32\] in the plan and has shape \[32, 64\] in the model"),
        ({"layers": 3}, r"parameter transformer\.h\.2\.\S+ does not exist in the plan"),
        ({"layers": 1}, r"parameter transformer\.h\.1\.\S+ .*does not exist in the model"),
        ({"tokens": 8}, r"input input_ids has shape \[4, 12\] in the plan and has shape \[4, 8\] in the model"),
        ({"activation_function": "relu"}, "operator"),
        ({"dtype": torch.float64}, "float32"),
    ],
)
def test_a_plan_for_another_model_is_refused(plan: Plan, change: dict[str, Any], difference: str) -> None:
    dtype, tokens = change.pop("dtype", torch.float32), change.pop("tokens", models.TOKENS)
    model = models.gpt2(**{"layers": 2, **change}).to(dtype)
    batch = {k: v[:, :tokens] for k, v in models.batch_for("gpt2", dtype).items()}
    if dtype == torch.float64:
        plan = Plan.from_json({**plan.to_json(), "precision": "float64"})
    with pytest.raises(PartitionError, match=difference) as caught:
        sources(model, batch, plan)
    assert caught.value.what == "the plan is for another model"


class Branching(nn.Module):
    """Takes another path for other data."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # the line that is named
            x = -x
        return self.head(x).square().mean()


class Lossless(nn.Module):
    """Returns no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


NAMED = "# the line that is named"
LINE = 1 + [line.endswith(NAMED) for line in Path(__file__).read_text().splitlines()].index(True)
SQUARE = {"x": torch.ones(8, 4)}


@pytest.mark.parametrize(
    ("model", "batch", "mesh", "settings", "message"),
    [
        (Branching, SQUARE, "2:cpu", {}, rf"{Path(__file__).name}:{LINE}: if x\.sum\(\) > 0"),
        (Lossless, SQUARE, "2:cpu", {}, r"returns no scalar loss[^$]*\(2, 4\)"),
        ("mlp", None, "2:cpu", {"micro_batch": 3}, "8 samples are no multiple of micro_batch=3"),
        ("mlp", None, "2:cpu", {"micro_batch": 1, "dp": 2}, "do not divide over dp=2"),
        ("mlp", {"x": torch.ones(8, 32), "target": torch.ones(4, 8)}, "2:cpu", {}, "no common size"),
        ("mlp", None, "4:cpu", {"tp": 3}, "tp=3 does not fill the mesh"),
        ("mlp", None, "4:cpu", {"tp": 2, "pp": 1, "dp": 1}, "pp=1 x dp=1 x tp=2 does not fill the mesh"),
        ("mlp", None, "4:cpu", {"tp": 0}, "tp=0"),
        ("mlp", None, "64:cpu", {"pp": 64}, "64 stages"),
        ("mlp", None, "2:cpu", {"schedule": "chimera"}, "schedule='chimera' is not known"),
        ("mlp", None, "2:cpu", {"recompute": "some"}, "recompute='some' is not known"),
        ("mlp", None, "2:cpu", {"zero": 3}, "zero=3 is not known"),
        ("mlp", None, "2:cpu", {"optimizer": "lion"}, "optimizer='lion' is not known"),
        ("mlp", None, "2:cpu", {"precision": "int8"}, "precision='int8' is not known"),
        ("mlp", None, "2:abacus", {}, "unknown device 'abacus'"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(
    model: Any, batch: models.Batch | None, mesh: str, settings: dict[str, Any], message: str
) -> None:
    made, own = models.build(model) if isinstance(model, str) else (model(), None)
    with pytest.raises(PartitionError, match=message):
        autopart.plan(made, mesh, batch or own, **settings)


@pytest.mark.parametrize(
    ("mesh", "where", "message"),
    [
        ("2:cpu", "cpu", "the mesh has 2 devices, and 1 of the processes"),
        ("1:cpu", "meta", "meta"),
    ],
)
def test_what_cannot_be_trained_is_not_compiled(mesh: str, where: str, message: str) -> None:
    with torch.device(where):
        model = models.gpt2(1)
    with pytest.raises(PartitionError, match=message):
        autopart.compile(model.train(), mesh, models.batch_for("gpt2", torch.float32))


def big() -> Given:
    """A GPT-2 of 6.4 billion parameters without memory."""
    with torch.device("meta"):
        model = models.gpt2(32, n_embd=4096, n_head=32, vocab_size=50257, n_positions=1024)
    ids = torch.zeros(8, 1024, dtype=torch.long)
    return model, {"input_ids": ids, "labels": ids.clone()}


def test_a_model_that_is_too_big_is_refused_with_the_bytes_it_lacks_but_can_be_estimated() -> None:
    model, batch = big()
    with pytest.raises(PartitionError, match=r"\d+\.\d GiB short"):
        autopart.plan(model, "1:v100-32gb", batch)
    found = autopart.estimate(model, "1:v100-32gb", batch, pp=1, tp=1, dp=1, micro_batch=8)
    assert not found.fits and found.memory_bytes[0] > 64 * 2**30 and found.step_seconds > 0


def test_planning_takes_no_memory_for_weights() -> None:
    model, batch = big()
    found = autopart.plan(model, "2x8:h100-80gb", batch, pp=2, tp=8, micro_batch=2, precision="bfloat16")
    assert found.fits and all(p.is_meta for p in model.parameters())
    assert sum(found.memory_bytes) * 8 > sum(p.numel() for p in model.parameters()) * 2


def test_the_text_tells_degrees_and_stages(plan: Plan) -> None:
    text = str(plan)
    assert "mesh(pp=2, dp=1, tp=2)" in text and "micro-batches 2 of 4" in text and "gap " in text
    assert [line[:7] for line in text.splitlines() if line.startswith("stage")] == ["stage 0", "stage 1"]


class Two(nn.Module):
    """Two products in a row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width, False), nn.Linear(2 * width, width, False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.relu(self.up(x))).square().mean()


class Gated(nn.Module):
    """One value with several uses, whose change of placement is paid once."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, width, False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.gate(x)
        return (h * torch.tanh(h) + x).mean()


def split_problem(model: type[nn.Module], mesh: str, axis: str, width: int, forced: bool) -> SplitProblem:
    where = Mesh.of(mesh)
    with torch.device("meta"):
        made = model(width)
    traced = trace(made, {"x": torch.zeros(16, width)})
    for step in (simplify, fuse):
        step(traced)
    annotate_costs(traced, where.device.name)
    settings = Settings(where.device, Training(), 2.0, 1, 1.0, forced)
    return formulate_splits(fold(traced), Axis(axis, where.size, where.link(1, where.size)), settings, {})


def every_choice(problem: SplitProblem) -> Iterator[tuple[float, float]]:
    """Seconds and bytes of every choice of strategies that is possible."""
    names = list(problem.strategies)
    for picks in itertools.product(*(range(len(problem.strategies[n])) for n in names)):
        chosen = dict(zip(names, picks, strict=True))
        if any(len({chosen[n] for n in group}) > 1 for group in problem.tied):
            continue
        moves = {
            (e.source, e.output, problem.strategies[e.source][chosen[e.source]].outputs[e.output],
             problem.strategies[e.target][chosen[e.target]].inputs[e.operand])
            for e in problem.edges
        }  # fmt: skip
        if any((have, want) not in problem.changes[s, o] for s, o, have, want in moves):
            continue
        seconds = sum(problem.seconds[n][k] for n, k in chosen.items())
        seconds += sum(problem.changes[s, o][have, want] for s, o, have, want in moves)
        kept = problem.in_flight * sum(problem.kept[n][k] for n, k in chosen.items())
        yield seconds, kept + sum(problem.state[n][k] for n, k in chosen.items())


@pytest.mark.parametrize("width", [8, 1024, 16384])
@pytest.mark.parametrize("mesh", ["2:cpu", "4:h100-80gb"])
@pytest.mark.parametrize(
    ("model", "axis", "forced"),
    [(Two, "tp", True), (Gated, "tp", False), (Gated, "tp", True), (Two, "dp", False)],
)
def test_the_splits_are_the_best_of_all(model: type[nn.Module], axis: str, forced: bool, mesh: str, width: int) -> None:
    problem = split_problem(model, mesh, axis, width, forced)
    assert 1 < math.prod(map(len, problem.strategies.values())) < 1e5
    choices = list(every_choice(problem))
    best, least = min(choices), min(nbytes for _, nbytes in choices)
    found = solve_splits(problem)
    assert found.seconds == pytest.approx(best[0], rel=1e-5) and found.bound <= found.seconds
    problem.budget = (best[1] + least) / 2 + 1
    within = min(seconds for seconds, nbytes in choices if nbytes <= problem.budget)
    assert solve_splits(problem).seconds == pytest.approx(within, rel=1e-5)
    problem.budget = least / 2
    with pytest.raises(PartitionError, match="no choice of splits fits"):
        solve_splits(problem)


@st.composite
def cut_problems(draw: st.DrawFn) -> CutProblem:
    units = draw(st.integers(1, 7))
    stages = draw(st.integers(1, min(4, units)))

    def row(low: int, high: int, length: int = units) -> list[float]:
        return [float(n) for n in draw(st.lists(st.integers(low, high), min_size=length, max_size=length))]

    users = st.lists(st.integers(0, units - 1), min_size=2, max_size=3, unique=True).map(sorted)
    shared = draw(st.lists(st.tuples(users, st.integers(1, 9).map(float)), max_size=2)) if units > 2 else []
    return CutProblem(
        stages, draw(st.integers(1, 8)), row(1, 20), row(0, 9), row(0, 5), row(0, 5), shared,
        row(0, 5), [stages - s for s in range(stages)], float(draw(st.integers(10, 120))),
    )  # fmt: skip


def cost_of(problem: CutProblem, starts: Sequence[int]) -> float:
    """The objective of one cut; infinity where a stage does not fit."""
    ends, times = (*starts[1:], len(problem.seconds)), []
    for stage, (start, end) in enumerate(zip(starts, ends, strict=True)):
        nbytes = sum(problem.state[start:end]) + max(problem.transient[start:end])
        nbytes += problem.in_flight[stage] * sum(problem.kept[start:end])
        nbytes += sum(size for users, size in problem.shared if set(users) & set(range(start, end)))
        if nbytes > problem.limit:
            return math.inf
        borders = [b for b in (start, end) if 0 < b < len(problem.seconds)]
        times.append(sum(problem.seconds[start:end]) + sum(problem.cut_seconds[b] for b in borders))
    return sum(times) + (problem.micro_batches - 1) * max(times)


@settings(max_examples=60, deadline=None)
@given(cut_problems())
def test_the_cuts_are_the_best_of_all(problem: CutProblem) -> None:
    inner = itertools.combinations(range(1, len(problem.seconds)), problem.stages - 1)
    best = min(cost_of(problem, (0, *cut)) for cut in inner)
    found = solve_cuts(problem)
    if best == math.inf:
        assert found is None
    else:
        assert found is not None and found.seconds == pytest.approx(best)
        assert cost_of(problem, found.starts) == pytest.approx(best)
