"""Random models under random legal plans: simulated ranks give what the unmodified model gives."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from graphs import LOSSES, SAMPLES, STEPS, Recipe, build, draw_plan, error_of, make_plan, recipes, sensitivity
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from autopart.compile import Source
from autopart.cost import Training
from autopart.folded import Folded
from autopart.graph import info
from autopart.mesh import Mesh
from autopart.notation import P, Placement, R, S
from autopart.passes.formulate import LOSS, Axis, Settings, formulate_splits
from autopart.plan import Plan
from autopart.rules import Strategy

EXAMPLES = int(os.environ.get("AUTOPART_EXAMPLES", "40"))
PLANS = 4
"""Plans of every model: to trace one takes longer than to run it."""
TOLERANCE = 1e-9
MESH = Mesh.of("1x8:cpu")
SIZES = (("s", 4), ("w", 8), ("n", 2), ("h", 4), ("v", 12))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.timeout(60 + 20 * EXAMPLES)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="AUTOPART_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(recipes(), st.data())
def test_random_models_under_random_plans(recipe: Recipe, data: st.DataObject) -> None:
    source = source_of(recipe)
    for _ in range(PLANS):
        plan = draw_plan(data.draw, source)
        error, name = error_of(source, plan)
        if not error <= TOLERANCE and not sensitivity(source) > TOLERANCE / 100:
            note(f"{plan.degrees} starts {plan.starts} micro-batch {plan.micro_batch} {plan.strategies}")
            raise AssertionError(f"{name} is off by {error}")


@pytest.mark.parametrize("name", sorted(STEPS))
def test_every_step_on_two_ranks(name: str) -> None:
    """Each step by itself, cut between its two blocks and split as the planner's first choice is."""
    source = source_of(recipe_of(((name, 0),), ((name, 0),)))
    folded = source.at(SAMPLES, MESH)
    starts = (0, next(i for i, run in enumerate(folded.runs) if run.label != folded.runs[0].label))
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
    for start in range(1, len(source.at(SAMPLES, MESH).runs)):
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
    folded = source.at(SAMPLES, MESH)
    kinds = {n.name: info(n).name for n in folded.representatives()}
    split = {"aten.reshape": S(0), "aten.embedding": S(0)}
    chosen = {
        node: next((o for o in options if o.outputs[0] == split.get(kinds[node], R)), options[0])
        for node, options in options_of(folded, "tp", 2).items()
        if node != LOSS
    }
    error, of = error_of(source, make_plan(folded, MESH, (1, 1, 2), SAMPLES, (0,), {"tp": chosen}))
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
    """The comparison fails where an operator is split along a dim it may not be, or passes partial sums it may not."""
    steps = {
        "aten.softmax.int": "softmax",
        "aten.layer_norm": "layer_norm",
        "aten.cumsum": "cumsum",
        "aten.gelu": "gelu",
    }
    source = source_of(recipe_of((("linear_without_bias", 0), (steps[operator], 0), ("linear", 0))))
    plan = plan_of(source, (1, 1, 2))
    folded = source.at(SAMPLES, MESH)
    node = next(n for n in folded.representatives() if info(n).name == operator)
    inputs = tuple(
        None if p is None else wrong if i == 0 else R for i, p in enumerate(plan.strategies["tp"][node.name].inputs)
    )
    chosen = {**plan.strategies["tp"], node.name: Strategy("wrong", inputs, (wrong,), shards_work=True)}
    if given == P:
        chosen[node.all_input_nodes[0].name] = partial_sums(folded, node.all_input_nodes[0].name)
    error, _ = error_of(source, make_plan(folded, MESH, (1, 1, 2), SAMPLES, (0,), {"tp": chosen}))
    assert not error <= 1e-3


def source_of(recipe: Recipe) -> Source:
    model, batch = build(recipe)
    return Source(model, batch, torch.float64)


def recipe_of(*blocks: tuple[tuple[str, int], ...], loss: str = "cross_entropy", tied: bool = False) -> Recipe:
    return Recipe(SIZES, "both", blocks, tied, False, loss)


def plan_of(source: Source, degrees: tuple[int, int, int], starts: tuple[int, ...] = (0,)) -> Plan:
    """A plan of first strategies: samples over dp where the operators allow it, all whole over tp."""
    folded = source.at(SAMPLES, MESH)
    strategies = {
        name: {node: options[0] for node, options in options_of(folded, name, size).items() if node != LOSS}
        for name, size in zip(("dp", "tp"), degrees[1:], strict=True)
        if size > 1
    }
    return make_plan(folded, MESH, degrees, SAMPLES, starts, strategies)


def options_of(folded: Folded, name: str, size: int) -> dict[str, list[Strategy]]:
    """The strategies of every node along one axis."""
    settings = Settings(MESH.device, Training("sgd", 0, 1), 1.0, 1, 1.0)
    return formulate_splits(folded, Axis(name, size, MESH.link(1, size)), settings, {}).strategies


def partial_sums(folded: Folded, node: str) -> Strategy:
    """A product's strategy that gives partial sums."""
    return next(s for s in options_of(folded, "tp", 2)[node] if s.outputs[0] == P and s.inputs[0] != P)
