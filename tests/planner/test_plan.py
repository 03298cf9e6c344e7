"""Planning: plans that are kept, requests that are refused, and solvers against enumeration."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence, Sized
from functools import lru_cache
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from emitted import sources
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

import autopart
from autopart import PartitionError, Plan
from autopart.cost.intervals import interval_ends, interval_index
from autopart.cost.sizes import reshard_paths
from autopart.hardware.mesh import Mesh
from autopart.passes import solve
from autopart.passes.formulate import formulate
from autopart.passes.solve import Solver
from autopart.passes.source import Source
from autopart.planner.cuts import best_cut
from autopart.planner.ilp_model import Model as Split
from autopart.sharding.notation import P
from autopart.sharding.strategy_table import StrategyTable

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
        (lambda text: "[]", "its schema is list, this version reads"),
        (lambda text: text.replace('"schema": 5', '"schema": 99', 1), "its schema is 99, this version reads 5"),
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
        ({"n_embd": 64}, r"wte\.weight has shape \[96, 32\] in the plan and has shape \[96, 64\] in the model"),
        ({"layers": 3}, r"parameter transformer\.h\.2\.\S+ does not exist in the plan"),
        ({"layers": 1}, r"parameter transformer\.h\.1\.\S+ .*does not exist in the model"),
        ({"tokens": 8}, r"input input_ids has shape \[-1, 12\] in the plan and has shape \[-1, 8\] in the model"),
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
        ("mlp", None, "4:cpu", {"zero": 1, "prefetch": 64}, "prefetch=64 at ZeRO 1"),
        ("mlp", None, "4:cpu", {"tp": 2, "pp": 1, "dp": 1}, "pp=1 x dp=1 x tp=2 does not fill the mesh"),
        ("mlp", None, "4:cpu", {"tp": 0}, "tp=0"),
        ("mlp", None, "64:cpu", {"pp": 64}, "64 stages"),
        ("mlp", None, "2:cpu", {"schedule": "chimera"}, "schedule='chimera' is not known"),
        ("mlp", None, "2:cpu", {"recompute": "some"}, "recompute='some' is not known"),
        ("mlp", None, "2:cpu", {"zero": 4}, "zero=4 is not known"),
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


@pytest.mark.slow
def test_a_model_that_is_too_big_is_refused_with_the_bytes_it_lacks_but_can_be_estimated() -> None:
    model, batch = big()
    with pytest.raises(PartitionError, match=r"\d+\.\d GiB short"):
        autopart.plan(model, "1:v100-32gb", batch)
    found = autopart.estimate(model, "1:v100-32gb", batch, pp=1, tp=1, dp=1, micro_batch=8)
    assert not found.fits and found.memory_bytes[0] > 64 * 2**30 and found.step_seconds > 0


@pytest.mark.slow
def test_planning_takes_no_memory_for_weights() -> None:
    model, batch = big()
    found = autopart.plan(model, "2x8:h100-80gb", batch, pp=2, tp=8, micro_batch=2, precision="bfloat16")
    assert found.fits and all(p.is_meta for p in model.parameters())
    assert sum(found.memory_bytes) * 8 > sum(p.numel() for p in model.parameters()) * 2


def test_the_text_tells_degrees_and_stages(plan: Plan) -> None:
    text = " ".join(str(plan).split())
    assert "mesh(pp=2, dp=1, tp=2)" in text and "2 micro-batches of 4 samples" in text and "gap " in text
    assert [line[:7] for line in str(plan).splitlines() if line.startswith("stage")] == ["stage 0", "stage 1"]


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


@lru_cache
def split(model: type[nn.Module], tp: int, forced: bool) -> Split:
    """The table of a model with its solver."""
    made = model(8)
    layered = Source(made, {"x": torch.zeros(16, 8)}, torch.float32).full(2, Mesh.of("4:cpu"))
    return Split(formulate(layered, Mesh.of("4:cpu").device, tp, forced))


@lru_cache
def every_choice(model: type[nn.Module], tp: int, forced: bool) -> NDArray[np.int_]:
    """For every choice of options that is possible, which of the priced variables it pays."""
    made = split(model, tp, forced)
    rows = [paid(made, chosen) for chosen in possible(made.table, ())]
    found = np.zeros((len(rows), len(made.counts)), dtype=int)
    for row, columns in zip(found, rows, strict=True):
        row[list(columns)] = 1
    return found


def possible(table: StrategyTable, chosen: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Every choice of options that begins so: all changes of placement can be made, whoever uses a partial sum outside
    of its run takes it in the same placement, and what is tied is alike."""
    if any(len({chosen[n] for n in group if n < len(chosen)}) > 1 for group in table.tied):
        return
    for used in table.value_uses:
        uses = [(n, operand, inside) for (n, operand), inside in zip(used.uses, used.inside, strict=True)]
        if used.source < len(chosen):
            have = table.nodes[used.source].given(chosen[used.source], used.output)
            wants = [(table.nodes[n].taken(chosen[n], o), inside) for n, o, inside in uses if n < len(chosen)]
            if any((have, want) not in used.chains for want, _ in wants):
                return
            if P in have and len({want for want, inside in wants if not inside}) > 1:
                return
    if len(chosen) == len(table.nodes):
        yield chosen
        return
    for option, _ in enumerate(table.nodes[len(chosen)].options):
        yield from possible(table, (*chosen, option))


def paid(made: Split, chosen: Sequence[int]) -> set[int]:
    """The indices of the priced variables that a choice pays: options, changes once each, kept memory once each."""
    table, sizes = made.table, made.sizes
    columns = {int(sizes.first[n]) + option for n, option in enumerate(chosen)}
    start = int(sizes.first[-1])
    for index, used in enumerate(table.value_uses):
        have = table.nodes[used.source].given(chosen[used.source], used.output)
        for node, operand in used.uses:
            chain = used.chains[have, table.nodes[node].taken(chosen[node], operand)]
            columns |= {start + sizes.reshard_index[index, have, path] for path in reshard_paths(chain)}
    start += len(sizes.reshards)
    for index, tensor in enumerate(table.saved_tensors):
        for saver, (node, operand) in enumerate(dict.fromkeys(tensor.savers)):
            placed = sizes.saved_placements[index][saver][chosen[tensor.root if operand == -2 else node]]
            columns.add(start + sizes.saved_index[index, placed])
    return columns


TABLES = [(Two, 1, False), (Two, 2, True), (Gated, 1, False), (Gated, 2, False), (Gated, 2, True)]


@pytest.mark.parametrize(("model", "tp", "forced"), TABLES)
def test_a_choice_is_the_best_of_all(model: type[nn.Module], tp: int, forced: bool) -> None:
    """For whatever everything costs; nothing is below the bound."""
    made, choices = split(model, tp, forced), every_choice(model, tp, forced)
    assert 1 < len(choices) < 2e5
    numbers = np.random.default_rng(0)
    for _ in range(20):
        weight = np.repeat(numbers.choice([0.0, 0.2, 1.0, 3.0], 3), [made.sizes.first[-1], *map(len, late(made))])
        costs = numbers.random(len(made.counts)) * weight
        best = (choices @ costs).min()
        found = made.solver.minimise(costs)
        assert found is not None
        assert found.objective == pytest.approx(best, abs=1e-6) and found.bound <= best + 1e-6
        assert costs[list(paid(made, found.chosen))].sum() == pytest.approx(best, abs=1e-6)


def test_large_problems_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice of a rounded relaxation costs what it says, and at most so much more than the bound as is allowed; the
    bound is below the best choice. Nearly all relaxations choose one strategy of each node by themselves."""
    monkeypatch.setattr(solve, "LARGE", 0)
    monkeypatch.setattr(solve, "ROUNDING", 0.1)
    made, choices = split(*TABLES[-1]), every_choice(*TABLES[-1])
    numbers, rounded = np.random.default_rng(3), 0
    for _ in range(40):
        costs = numbers.random(len(made.counts)) * np.where(np.arange(len(made.counts)) < made.sizes.first[-1], 0.1, 1)
        found = made.solver.minimise(costs)
        assert found is not None
        best = (choices @ costs).min()
        assert found.bound <= best + 1e-6 and best - 1e-6 <= found.objective <= found.bound * 1.1 + 1e-6
        assert costs[list(paid(made, found.chosen))].sum() == pytest.approx(found.objective, abs=1e-6)
        rounded += found.objective > found.bound + 1e-6
    assert rounded


def late(made: Split) -> tuple[Sized, Sized]:
    """The priced variables that are no options."""
    return made.sizes.reshards, made.sizes.saved_index


@pytest.mark.parametrize(("model", "tp", "forced"), TABLES)
def test_options_may_be_ruled_out(model: type[nn.Module], tp: int, forced: bool) -> None:
    """Also all of one node, which leaves nothing; then all are there again."""
    made, choices = split(model, tp, forced), every_choice(model, tp, forced)
    costs = np.random.default_rng(1).random(len(made.counts))
    node = max(range(len(made.table.nodes)), key=lambda n: len(made.table.nodes[n].options))
    before = made.solver.minimise(costs)
    assert before is not None
    others = [o for o, _ in enumerate(made.table.nodes[node].options) if o != before.chosen[node]]
    left = choices[choices[:, made.sizes.first[node] + before.chosen[node]] == 0]
    found = made.solver.minimise(costs, {node: others})
    assert found is not None and found.chosen[node] in others
    assert found.objective == pytest.approx((left @ costs).min(), abs=1e-6)
    assert made.solver.minimise(costs, {node: []}) is None
    assert made.solver.minimise(costs) == before


@pytest.mark.parametrize(("model", "tp", "forced"), TABLES)
def test_what_was_learnt_bounds_other_costs(model: type[nn.Module], tp: int, forced: bool) -> None:
    """The nearer they are to costs that were solved for, the better: it is the relaxation's own for these."""
    made, numbers = split(model, tp, forced), np.random.default_rng(2)
    solver = Solver(made.sizes)
    learnt = numbers.random(len(made.counts))
    assert solver.dual_bound(learnt) == 0.0
    least, _ = solver.relax(learnt)
    assert solver.dual_bound(learnt) == pytest.approx(least, rel=1e-6)
    ratios = []
    for distance in (0.01, 0.1, 1.0) * 10:
        costs = learnt + distance * numbers.random(len(made.counts))
        least, _ = Solver(made.sizes).relax(costs)
        ratios.append(solver.dual_bound(costs) / least)
    assert max(ratios) <= 1 + 1e-6
    assert min(ratios[::3]) > 0.9


def test_forced_products_have_split_weights() -> None:
    table = split(Two, 2, True).table
    weights = {n for node in table.nodes if node.product for n, _ in filter(None, node.operands[1:])}
    for node in table.nodes:
        for option in node.options if node.product else ():
            assert option[1].inputs[1] is not None and option[1].inputs[1].kind == "S"
    assert len(weights) == 2


@st.composite
def column_sets(draw: st.DrawFn) -> tuple[list[NDArray[np.float64]], int]:
    """f[i, j] of every stage, some of them infinite, and micro-batches."""
    units = draw(st.integers(1, 7))
    stages = draw(st.integers(1, min(4, units)))
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    top, holes = draw(st.sampled_from((3, 20, 1000))), draw(st.sampled_from((0.0, 0.2, 0.6)))
    columns = []
    for _ in range(stages):
        f = numbers.integers(1, top, (units + 1, units + 1)).astype(float)
        f[numbers.random(f.shape) < holes] = np.inf
        f[np.tril_indices(units + 1)] = np.inf
        columns.append(f)
    return columns, draw(st.integers(1, 9))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_ranges_are_told_in_order(n: int) -> None:
    assert [interval_index(i, j, n) for i, j in zip(*interval_ends(n), strict=True)] == list(range(n * (n + 1) // 2))


@settings(max_examples=200, deadline=None)
@given(column_sets())
def test_the_cuts_are_the_best_of_all(case: tuple[list[NDArray[np.float64]], int]) -> None:
    columns, micro_batches = case
    units, stages = len(columns[0]) - 1, len(columns)
    seconds, largest = math.inf, math.inf
    for inner in itertools.combinations(range(1, units), stages - 1):
        times = [float(columns[s][i, j]) for s, (i, j) in enumerate(itertools.pairwise((0, *inner, units)))]
        seconds = min(seconds, sum(times) + (micro_batches - 1) * max(times))
        largest = min(largest, max(times))
    found = best_cut([f[interval_ends(units)] for f in columns].__getitem__, stages, micro_batches)
    if found is None:
        assert seconds == math.inf
    else:
        times = [columns[s][i, j] for s, (i, j) in enumerate(itertools.pairwise((*found.starts, units)))]
        assert found.seconds == pytest.approx(seconds) == sum(times) + (micro_batches - 1) * max(times)
        assert found.least_max == largest


@pytest.mark.slow
def test_a_value_that_others_read_is_gathered_by_the_last_of_equal_blocks() -> None:
    """All blocks of the decoder read what the encoder's last block gives. The trace has one block for the last three,
    which are priced node by node: with a message that the last one has alone."""
    from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

    sizes = {"hidden_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 12, "intermediate_size": 3072}
    encoder, decoder = (BertConfig(**sizes, vocab_size=128, **more) for more in ({}, {"is_decoder": True}))
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder.add_cross_attention, config.decoder_start_token_id, config.pad_token_id = True, 0, 0
    with torch.device("meta"):
        model = EncoderDecoderModel(config)
    ids = torch.full((16, 512), 3)
    plan = autopart.plan(model, "1x4:h100-80gb", {"input_ids": ids, "labels": ids}, tp=2, pp=2)
    labels = [segment.labels for segment in plan.stages[0].segments]
    assert ("encoder.encoder.layer.1", "encoder.encoder.layer.2") in labels and ("encoder.encoder.layer.3",) in labels
