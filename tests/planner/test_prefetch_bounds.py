"""Lower bounds where weights are gathered ahead: no splits that are priced whole are below them."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import replace

import pytest
from models import source

from autopart.hardware.mesh import Mesh
from autopart.planner.candidate import costs_of
from autopart.planner.request import Request
from autopart.planner.search_points import SearchPoint
from autopart.planner.search_space import SearchSpace
from autopart.planner.stage_bounds import relaxed_stages

DRAWN = 200
EQUAL = 1e-9


def space_of(name: str, bandwidth: float, **settings: int) -> SearchSpace:
    """A search on two hosts of two GPUs between which the network has so many bytes/s."""
    mesh = Mesh.of("2x2:h100-80gb")
    mesh = replace(mesh, inter=replace(mesh.inter, bandwidth=bandwidth))
    layered = source(name).sampled(2, mesh)
    return SearchSpace(layered, mesh, Request(8, zero=3, recompute="none", must_fit=False, **settings).check(mesh))


@pytest.mark.parametrize("bandwidth", [1e8, 2e9, 5e10])
@pytest.mark.parametrize("tp", [1, 2])
def test_no_splits_are_below_the_bounds(bandwidth: float, tp: int) -> None:
    """Of the whole model, and of its first and its second half as stages: the optimum of the ILP, and splits near."""
    space = space_of("gpt2", bandwidth, prefetch=64)
    point = SearchPoint(pp=1, dp=4 // tp, tp=tp, micro_batch=8, zero=3)
    solution = space.solve(point, 0.0, {})
    assert solution is not None
    bound, n = space.lp_bound(point), len(space.layered.labels)
    spans = [(0, n), (0, n // 2), (n // 2, n)]
    bounds = [relaxed_stages(space, [(point, span)], space.options(point))[0] for span in spans]
    assert space.priced(point).gather_seconds.any(), "weights may be gathered ahead"
    nodes, draw, priced, hidden = space.model(point).table.nodes, random.Random(0), 0, 0
    for _ in range(DRAWN):
        chosen = list(solution.chosen)
        for node in draw.sample(range(len(nodes)), draw.choice((0, 1, 1, 2, 4))):
            chosen[node] = draw.randrange(len(nodes[node].options))
        with suppress(KeyError):  # a change of placement that there is none for
            costs = costs_of(space, point, tuple(chosen), space.allowed_modes)
            seconds = [costs.seconds[costs.index(*span)] for span in spans]
            assert seconds[0] >= bound * (1 - EQUAL)
            assert all(found >= least * (1 - EQUAL) for found, least in zip(seconds, bounds, strict=True))
            priced += 1
            hidden += space.position_costs(point, tuple(chosen)).gather_seconds.any()
    assert priced > 10 and hidden, "some were priced, with weights gathered ahead"


def test_hiding_takes_time_off() -> None:
    """Over a slow network gathers are waited for, over a fast one they are hidden; never more than all of them."""
    for bandwidth in (1e8, 5e10):
        seconds = {}
        for mib in (0, 64):
            space = space_of("gpt2", bandwidth, prefetch=mib, tp=1, pp=1)
            point = SearchPoint(pp=1, dp=4, tp=1, micro_batch=8, zero=3)
            solution = space.solve(point, 0.0, {})
            assert solution is not None
            costs = costs_of(space, point, solution.chosen, space.allowed_modes)
            seconds[mib] = float(costs.seconds[costs.index(0, len(space.layered.labels))])
        assert seconds[64] <= seconds[0] * (1 + EQUAL)
