"""The iterations of unrolled loops: which operators are told to be of one, and that one variable for all of them is the
same problem as a variable for each with equations between them."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autopart import Mesh
from autopart.cost.sizes import Sizes
from autopart.ir.graph import info
from autopart.passes.ilp_solvers import minimise
from autopart.passes.loop_iterations import MIN_ITERATIONS, loop_iterations
from autopart.passes.solve import Solver
from autopart.passes.source import Source
from autopart.passes.split_problem import SplitProblem
from autopart.planner.exact_refinement import fastest_that_fit
from autopart.planner.request import Request
from autopart.planner.search_points import SearchPoint
from autopart.planner.search_space import SearchSpace

WIDTH = 4
SEEDS = range(8)


class Scan(nn.Module):
    """A block with a recurrence over its tokens, drawn at random."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.rate, self.value, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.mixes, self.squashes, self.writes, self.looks_back = (draw.random() < 0.5 for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        rate, value = self.rate(x).sigmoid(), self.value(x)
        state, seen = torch.zeros_like(x[:, 0]), torch.zeros_like(x)
        states = []
        for t in range(x.shape[1]):
            state = rate[:, t] * state + value[:, t]
            if self.mixes:
                state = state @ self.out.weight
            if self.squashes:
                state = state.tanh()
            if self.looks_back:
                state = state + value[:, : t + 1].mean(1)
            if self.writes:
                seen[:, t] = state
            states.append(state)
        return x + self.out(seen if self.writes else torch.stack(states, 1))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square().mean()


class Model(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.layers = nn.ModuleList([Scan(draw), nn.Linear(WIDTH, WIDTH), Scan(random.Random(seed))])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


@lru_cache
def space_of(seed: int, tokens: int = MIN_ITERATIONS + 1) -> SearchSpace:
    mesh = Mesh.parse("1x4:h100-80gb")
    source = Source(Model(seed), {"x": torch.randn(4, tokens, WIDTH)}, torch.float32)
    return SearchSpace(source.sampled(4, mesh), mesh, Request(4).check(mesh))


def point_of(seed: int) -> SearchPoint:
    return SearchPoint(1, 2, 1 + seed % 2, 4)


def drawn(seed: int) -> SplitProblem:
    """Random costs, in which bytes may count."""
    space, point = space_of(seed), point_of(seed)
    draw, costs = np.random.default_rng(seed), space.costs(point, {})
    seconds = costs.seconds + draw.uniform(0.0, 1.0, len(costs.seconds)) * costs.seconds.mean()
    return SplitProblem(seconds + draw.choice([0.0, 1e-9, 1e-6]) * (costs.saved + costs.state))


@pytest.mark.parametrize("seed", SEEDS)
def test_all_operators_of_a_loop_are_found_and_no_others(seed: int) -> None:
    loops = 0
    for segment in space_of(seed).layered.segments:
        found = loop_iterations(segment.nodes)
        loops += bool(found)
        for alike in found:
            assert len(alike) >= MIN_ITERATIONS
            assert len({(info(n).name, info(n).source) for n in alike}) == 1
        lines = {info(n).source for alike in found for n in alike}
        mine = [n for n in segment.nodes if info(n).source in lines]
        assert sum(map(len, found)) >= len(mine) * MIN_ITERATIONS / (MIN_ITERATIONS + 1)
    assert loops == 2


def test_a_short_loop_and_blocks_in_a_row_are_no_iterations() -> None:
    short = space_of(0, MIN_ITERATIONS - 1).layered
    deep = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(2 * MIN_ITERATIONS)), Mean())
    blocks = Source(deep, {"input": torch.randn(2, WIDTH)}, torch.float32).full(2, Mesh.parse("1:cpu"))
    for layered in (short, blocks):
        assert not loop_iterations([n for segment in layered.segments for n in segment.nodes])


@pytest.mark.parametrize("seed", SEEDS)
def test_one_variable_for_all_iterations_is_the_stated_problem(seed: int) -> None:
    space, point, asked = space_of(seed), point_of(seed), drawn(seed)
    model = space.model(point)
    assert model.table.iterations
    found, other = model.solver.minimise(asked.costs), minimise(model.sizes, asked, "cbc")
    assert found is not None
    assert other is not None
    assert other.objective == pytest.approx(found.objective, rel=1e-6)
    assert found.bound <= found.objective * (1 + 1e-9)
    for alike in model.table.iterations:
        assert len({found.chosen[n] for n in alike}) == len({other.chosen[n] for n in alike}) == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_iterations_that_choose_for_themselves_are_no_dearer(seed: int) -> None:
    space, point, asked = space_of(seed), point_of(seed), drawn(seed)
    model = space.model(point)
    apart = Solver(Sizes(replace(model.table, iterations=[])))
    assert len(model.solver.used) < 0.6 * len(apart.used)
    shared, each = model.solver.relax(asked.costs)[0], apart.relax(asked.costs)[0]
    assert each <= shared * (1 + 1e-6)
    found, best = model.solver.minimise(asked.costs), apart.minimise(asked.costs)
    assert found is not None
    assert best is not None
    assert best.objective <= found.objective * (1 + 1e-6)
    fixed = apart.minimise(asked.costs, {n: [option] for n, option in enumerate(found.chosen)})
    assert fixed is not None
    assert fixed.objective == pytest.approx(found.objective, rel=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_one_iteration_may_take_holds_for_all(seed: int) -> None:
    space, point, asked = space_of(seed), point_of(seed), drawn(seed)
    model = space.model(point)
    alike = max(model.table.iterations, key=lambda alike: len(model.table.nodes[alike[0]].options))
    options = range(len(model.table.nodes[alike[0]].options))
    free = model.solver.minimise(asked.costs)
    assert free is not None
    others = [o for o in options if o != free.chosen[alike[0]]]
    allowed = {alike[-1]: others, alike[1]: [*options]}
    narrow, stated = model.solver.minimise(asked.costs, allowed), replace(asked, allowed=allowed)
    other = minimise(model.sizes, stated, "cbc")
    assert (narrow is None) == (other is None)
    if narrow and other:
        assert narrow.chosen[alike[0]] in others
        assert narrow.objective == pytest.approx(other.objective, rel=1e-6)
    again = model.solver.minimise(asked.costs)
    assert again is not None
    assert again.objective == pytest.approx(free.objective, rel=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_bounds_are_below_the_relaxation(seed: int) -> None:
    space, point, asked = space_of(seed), point_of(seed), drawn(seed)
    model, draw = space.model(point), np.random.default_rng(seed)
    model.solver.relax(asked.costs)
    more = asked.costs * draw.uniform(0.9, 1.5, len(asked.costs))
    dual, (relaxed, _) = model.solver.dual_bound(more), model.solver.relax(more)
    assert 0 < dual <= relaxed * (1 + 1e-6)
    assert model.solver.dual_bound(more) == pytest.approx(relaxed, rel=1e-5)
    classes = [model.class_solver(c).bound(np.where(model.segment_classes == c, more, 0)) for c in model.blocks]
    assert sum(classes) <= relaxed * (1 + 1e-6)
    both, _ = model.pipeline(2).relax([asked.costs, more], {})
    each = model.solver.relax(asked.costs)[0] + relaxed
    together = model.solver.relax(asked.costs + more)[0]
    assert each * (1 - 1e-6) <= both <= together * (1 + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS if "AUTOPART_EXAMPLES" in os.environ else [3])
def test_memory_as_a_row_counts_every_iteration(seed: int) -> None:
    space, point = space_of(seed), point_of(seed)
    other = replace(space, request=replace(space.request, solver="cbc"))
    span, model = (0, len(space.layered.labels)), space.model(point)
    counts = {g: {"none": model.table.segment_classes.count(g)} for g in model.blocks}
    free = fastest_that_fit(space, point, span, 1e12, counts, 1, {})
    assert free is not None
    assert free.problem is not None
    capacity = free.problem.capacity
    assert capacity is not None
    for share in (1.0, 0.8, 0.6):
        limit = share * float(np.sort(capacity.baseline)[-10:].sum())
        found, same = (fastest_that_fit(s, point, span, limit, counts, 1, {}) for s in (space, other))
        assert (found is None) == (same is None)
        if found and same:
            assert found.objective == pytest.approx(same.objective, rel=1e-5)
