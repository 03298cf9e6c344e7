"""Random models under random legal plans: simulated ranks give what the unmodified model gives."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import import_module
from unittest import mock

import pytest
import torch
from graphs import (
    LOSSES,
    MESH,
    SAMPLES,
    STEPS,
    Recipe,
    Split,
    build,
    draw_plan,
    error_of,
    first_choice,
    make_plan,
    recipes,
    sensitivity,
)
from hypothesis import HealthCheck, Phase, assume, given, note, seed, settings
from hypothesis import strategies as st

from autopart import PartitionError
from autopart.ir.graph import info
from autopart.passes.formulate import formulate
from autopart.passes.source import Source
from autopart.plan.data import Plan
from autopart.sharding.notation import P, Placement, R, S, Strategy

compiler = import_module("autopart.compile.simulate")

CASES = 24
"""Cases of the random test, which share the steps among them: every step is in a random model."""
EXAMPLES = int(os.environ.get("AUTOPART_EXAMPLES", CASES))
"""Random models over all cases; where AUTOPART_EXAMPLES says how many, other ones in every run."""
PLANS = 3
"""Plans of every model: to trace one takes longer than to run it."""
TOLERANCE = 1e-9
SIZES = (("s", 4), ("w", 8), ("n", 2), ("h", 4), ("v", 12))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.timeout(120 + 20 * EXAMPLES // CASES)
@pytest.mark.parametrize("case", [pytest.param(i, marks=pytest.mark.xdist_group(f"graphs{i}")) for i in range(CASES)])
def test_random_models_under_random_plans(case: int) -> None:
    @(seed(case) if "AUTOPART_EXAMPLES" not in os.environ else lambda test: test)
    @settings(
        max_examples=max(1, EXAMPLES // CASES),
        deadline=None,
        database=None,
        phases=(Phase.generate, *([Phase.shrink] if "AUTOPART_EXAMPLES" in os.environ else [])),
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(st.integers(0, 99), recipes(sorted(STEPS)[case::CASES]), st.data())
    def check(number: int, recipe: Recipe, data: st.DataObject) -> None:
        assume(number)  # hypothesis tries the simplest of all first
        source = source_of(recipe)
        for _ in range(PLANS):
            plan = draw_plan(data.draw, source)
            error, name = error_of(source, plan)
            if not error <= TOLERANCE and not sensitivity(source) > TOLERANCE / 100:
                note(f"{plan.degrees} starts {plan.starts} micro-batch {plan.micro_batch} zero {plan.zero}")
                note(f"{plan.splits} {[stage.recompute for stage in plan.stages]}")
                raise AssertionError(f"{name} is off by {error}")

    check()


@pytest.mark.parametrize("name", sorted(STEPS))
def test_every_step_on_two_ranks(name: str) -> None:
    """Each step by itself, cut between its two blocks and split as the planner's first choice is."""
    source = source_of(recipe_of(((name, 0),), ((name, 0),)))
    layered = source.full(SAMPLES, MESH)
    starts = (0, next(i for i, run in enumerate(layered.segments) if run.label != layered.segments[0].label))
    for degrees in ((1, 1, 1), (1, 2, 1), (2, 1, 1)):
        error, of = error_of(source, plan_of(source, degrees, starts[: degrees[0]]))
        assert error <= TOLERANCE, (degrees, of)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(loss: str) -> None:
    """Weighted targets, targets that are probabilities and targets that the model makes are no mean over valid ones."""
    source = source_of(recipe_of((("linear", 0),), loss=loss))
    for degrees in ((1, 1, 1), (1, 2, 1), (1, 1, 2)):
        error, of = error_of(source, plan_of(source, degrees))
        assert error <= TOLERANCE, (degrees, of)


@pytest.mark.parametrize("tied", (False, True))
def test_every_place_to_cut(tied: bool) -> None:
    """Also right behind a product that stands alone."""
    source = source_of(recipe_of((("linear_without_bias", 0),), (("linear", 0),), tied=tied))
    for start in range(1, len(source.full(SAMPLES, MESH).segments)):
        error, of = error_of(source, plan_of(source, (2, 1, 1), (0, start)))
        assert error <= TOLERANCE, (start, of)


def test_a_chain_of_blocks_whose_middle_is_read_later() -> None:
    """A loop over equal blocks keeps the last one's output only."""
    chain = (("linear_without_bias", 0),)
    source = source_of(recipe_of(chain, chain, chain, (("difference", 0),)))
    error, of = error_of(source, plan_of(source, (1, 1, 1)))
    assert error <= TOLERANCE, of


def test_a_loss_inside_of_equal_blocks() -> None:
    """How many targets count is known to the stage, not to its blocks."""
    block = (("auxiliary_loss", 0),)
    source = source_of(recipe_of(block, block, block))
    error, of = error_of(source, plan_of(source, (1, 2, 1)))
    assert error <= TOLERANCE, of


def test_two_losses_of_the_same_split_targets() -> None:
    """What is done to targets before they are counted is done once."""
    block = (("auxiliary_loss", 0),)
    source = source_of(recipe_of(block, block))
    layered = source.full(SAMPLES, MESH)
    model = Split(formulate(layered, MESH.device, 1))
    kinds = {layered.keys[n]: info(n).name for n in layered.representatives()}
    split = {"aten.reshape": S(0), "aten.embedding": S(0)}
    allowed = {
        i: [o for o, _ in enumerate(node.options) if node.given(o) == (split.get(kinds.get(node.key, ""), R),)]
        for i, node in enumerate(model.table.nodes)
        if node.values
    }
    chosen = first_choice(model, {i: options for i, options in allowed.items() if options})
    error, of = error_of(source, make_plan(layered, (1, 2, 1), SAMPLES, (0,), model.table, [chosen]))
    assert error <= TOLERANCE, of


def test_a_block_that_nobody_reads() -> None:
    """It is called no more, though attention may draw random numbers."""
    source = source_of(recipe_of((("attention", 0),), (("linear", 1),)))
    layered = source.full(SAMPLES, MESH)
    assert "blocks.0" not in layered.labels
    error, of = error_of(source, plan_of(source, (1, 1, 1)))
    assert error <= TOLERANCE, of


@pytest.mark.parametrize("frozen", (0, 1))
def test_a_frozen_block_among_equal_ones(frozen: int) -> None:
    """It shares no class with those that train."""
    block = (("linear", 0), ("gelu", 0))
    source = source_of(replace(recipe_of(block, block, block), frozen=frozen))
    error, of = error_of(source, plan_of(source, (1, 1, 1)))
    assert error <= TOLERANCE, of


@pytest.mark.parametrize(
    ("operator", "given", "wrong"),
    [
        ("aten.softmax.int", R, S(2)),
        ("aten.cumsum", R, S(1)),
        ("aten.gelu", P, P),
    ],
)
def test_a_wrong_strategy_shows(operator: str, given: Placement, wrong: Placement) -> None:
    """The comparison fails where an operator is split along a dim it may not be, or passes partial sums it may not; it
    is refused before it runs, unless nobody looks."""
    steps = {
        "aten.softmax.int": "softmax",
        "aten.layer_norm": "layer_norm",
        "aten.cumsum": "cumsum",
        "aten.gelu": "gelu",
    }
    source = source_of(recipe_of((("linear_without_bias", 0), (steps[operator], 0), ("linear", 0))))
    plan = plan_of(source, (1, 1, 2))
    layered = source.full(SAMPLES, MESH)
    node = next(n for n in layered.representatives() if info(n).name == operator)
    chosen = dict(plan.splits[0]["tp"])
    before, key = layered.keys[layered.same[node.all_input_nodes[0]]], layered.keys[node]
    inputs = tuple(None if p is None else wrong if i == 0 else R for i, p in enumerate(chosen[key].inputs))
    chosen[key] = Strategy("wrong", inputs, (wrong,), shards_work=True)
    if given == P:
        product = next(n for n in formulate(layered, MESH.device, 2).nodes if n.key == before)
        chosen[before] = next(s for _, s in product.options if s.outputs[0] == P and s.inputs[0] != P)
    tampered = replace(plan, splits=({"tp": chosen},))
    with pytest.raises(PartitionError):
        error_of(source, tampered)
    with mock.patch.object(compiler, "validate"):
        error, _ = error_of(source, tampered)
    assert not error <= 1e-3


def source_of(recipe: Recipe) -> Source:
    model, batch = build(recipe)
    return Source(model, batch, torch.float64)


def recipe_of(*blocks: tuple[tuple[str, int], ...], loss: str = "cross_entropy", tied: bool = False) -> Recipe:
    return Recipe(SIZES, "both", blocks, tied, False, loss)


def plan_of(source: Source, degrees: tuple[int, int, int], starts: tuple[int, ...] = (0,)) -> Plan:
    """A plan of first strategies: samples over dp where the operators allow it, all whole over tp."""
    layered = source.full(SAMPLES, MESH)
    model = Split(formulate(layered, MESH.device, degrees[2]))
    chosen = first_choice(model)
    return make_plan(layered, degrees, SAMPLES, starts, model.table, [chosen] * degrees[0])
