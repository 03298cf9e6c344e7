"""The ILP as it is stated against the arrays that HiGHS solves: the same variables, rows and optimum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache

import highspy
import numpy as np
import pulp
import pytest
from brute import SHARED, problem
from numpy.typing import NDArray

from autopart.passes.ilp import EQUATIONS, LONGEST, Ilp, resharded_once, state
from autopart.passes.ilp_solvers import minimise
from autopart.passes.solve import MAX_COST_RATIO, OBJECTIVE_SCALE, unit_of
from autopart.passes.split_problem import SplitProblem
from autopart.planner.exact_refinement import fastest_that_fit
from autopart.planner.search_points import SearchPoint
from autopart.planner.search_space import SearchSpace

SEEDS = range(0, 300, 25)
Row = tuple[frozenset[tuple[int, float]], float, float]


@lru_cache
def table(seed: int) -> tuple[SearchSpace, SearchPoint]:
    """A random small table, of one or two axes."""
    space = problem(seed).space
    space = SearchSpace(space.layered, replace(space.mesh, devices_per_host=4), space.request)
    return space, SearchPoint(1, 2, 1 + seed // SHARED % 2, 1)


def drawn(seed: int) -> SplitProblem:
    """Random costs for it, in which bytes may count."""
    space, point = table(seed)
    draw, costs = np.random.default_rng(seed), space.costs(point, {})
    seconds = costs.seconds + draw.uniform(0.0, 1.0, len(costs.seconds)) * costs.seconds.mean()
    return SplitProblem(seconds + draw.choice([0.0, 1e-6, 1e-3]) * (costs.saved + costs.state))


def columns(ilp: Ilp) -> dict[str, int]:
    """Of every variable of the statement, that of the arrays: x, c, k, then e."""
    moves = (e for moves in ilp.e.values() for e in moves.values())
    return {variable.name: i for i, variable in enumerate([*ilp.z, *moves])}


def row(terms: Iterable[tuple[int, float]], least: float, most: float) -> Row:
    """A row in one way of writing it: terms of a variable added up; of an equation, its first coefficient positive."""
    total: dict[int, float] = {}
    for variable, number in terms:
        total[variable] = total.get(variable, 0.0) + number
    if least == most and total[min(total)] < 0:
        total, least, most = {v: -n for v, n in total.items()}, -most, -least
    return frozenset(total.items()), least + 0.0, most + 0.0


def stated(place: dict[str, int], constraint: pulp.LpConstraint) -> Row:
    inf = highspy.kHighsInf
    terms = [(place[variable.name], float(number)) for variable, number in constraint.items()]
    right = -float(constraint.constant)
    least = -inf if constraint.sense == pulp.LpConstraintLE else right
    return row(terms, least, inf if constraint.sense == pulp.LpConstraintGE else right)


def of_one_operand(ilp: Ilp) -> Iterator[pulp.LpConstraint]:
    """The rows of (7) for values with one operand, which the arrays have substituted."""
    single = {f for (f, _), number in Counter((f, 0) for f, _ in ilp.e).items() if number == 1}
    mine = {variable.name for (f, _, _), variable in ilp.c.items() if f in single}
    yield from (r for _, r in resharded_once(ilp) if any(v.name in mine for v in r))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_row_of_the_arrays_is_stated_and_no_other(seed: int) -> None:
    space, point = table(seed)
    solver, ilp = space.model(point).solver, state(space.model(point).sizes, drawn(seed))
    place = columns(ilp)
    assert len(place) == solver.columns
    left = Counter(row(zip(variables, numbers, strict=True), *ends) for variables, numbers, *ends in solver.rows)
    for equation in EQUATIONS:
        mine = Counter(stated(place, constraint) for _, constraint in equation(ilp))
        if equation is resharded_once:
            mine -= Counter(stated(place, constraint) for constraint in of_one_operand(ilp))
        assert mine <= left, f"{equation.__name__} states what the arrays have not"
        left -= mine
    assert not left, "the arrays have what no equation states"


@pytest.mark.parametrize("seed", SEEDS)
def test_the_objective_is_that_of_the_arrays(seed: int) -> None:
    space, point = table(seed)
    solver, asked = space.model(point).solver, drawn(seed)
    ilp = state(space.model(point).sizes, asked)
    assert solver.minimise(asked.costs) is not None
    place = columns(ilp)
    mine: NDArray[np.float64] = np.zeros(len(place))
    for variable, number in ilp.problem.objective.items():
        mine[place[variable.name]] += number
    for constraint in of_one_operand(ilp):  # c >= sum of e, and no other row has this c
        variables = {place[variable.name]: number for variable, number in constraint.items()}
        (resharded,) = (v for v, number in variables.items() if number > 0)
        for move in variables.keys() - {resharded}:
            mine[move] += mine[resharded]
    for constraint in of_one_operand(ilp):
        mine[[place[variable.name] for variable, number in constraint.items() if number > 0]] = 0.0
    unit = unit_of(space.model(point).sizes, asked.costs)
    assert np.array(solver.highs.getLp().col_cost_) == pytest.approx(
        np.minimum(mine * unit, OBJECTIVE_SCALE * MAX_COST_RATIO), rel=1e-9
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_cbc_finds_the_same_optimum(seed: int) -> None:
    space, point = table(seed)
    sizes, asked = space.model(point).sizes, drawn(seed)
    found, other = space.model(point).solver.minimise(asked.costs), minimise(sizes, asked, "cbc")
    assert found is not None
    assert other is not None
    assert other.objective == pytest.approx(found.objective, rel=1e-6)
    assert found.bound <= other.objective * (1 + 1e-6)
    some = next(n for n, options in enumerate(state(sizes, asked).x) if len(options) > 1 and n not in _tied(space))
    narrow = replace(asked, allowed={some: [1]})
    found, other = space.model(point).solver.minimise(asked.costs, narrow.allowed), minimise(sizes, narrow, "cbc")
    assert (found is None) == (other is None)
    if found and other:
        assert other.chosen[some] == 1
        assert other.objective == pytest.approx(found.objective, rel=1e-6)


def _tied(space: SearchSpace) -> set[int]:
    return {node for model in space.models.values() for tied in model.table.tied for node in tied}


@pytest.mark.parametrize("seed", SEEDS)
def test_cbc_finds_the_same_optimum_where_memory_is_a_row(seed: int) -> None:
    space, point = table(seed)
    other = replace(space, request=replace(space.request, solver="cbc"))
    span = (0, len(space.layered.labels))
    counts = {g: {"none": space.model(point).table.segment_classes.count(g)} for g in space.model(point).blocks}
    free = fastest_that_fit(space, point, span, 1e12, counts, 1, {})
    assert free is not None
    capacity, shares = free.problem.capacity, (1.0, 0.9, 0.7, 0.4)
    assert capacity is not None
    largest = float(np.sort(capacity.baseline)[-10:].sum())
    answers = set()
    for share in shares:
        found, same = (fastest_that_fit(s, point, span, share * largest, counts, 1, {}) for s in (space, other))
        assert (found is None) == (same is None)
        answers.add(found is None)
        if found and same:
            assert same.objective == pytest.approx(found.objective, rel=1e-5)


def test_names_say_what_they_stand_for_and_are_legal() -> None:
    space, point = table(SEEDS[-1])
    ilp = state(space.model(point).sizes, drawn(SEEDS[-1]))
    names = [v.name for v in ilp.problem.variables()] + [c.name for c in ilp.problem.constraints()]
    assert len(set(names)) == len(names)
    assert all(len(name) <= LONGEST and name.replace("_", "").replace(".", "").isalnum() for name in names)
    for node, options in zip(ilp.table.nodes, ilp.x, strict=True):
        key = node.key.replace("/", "_").replace("#", "_")
        assert all(key in variable.name for variable in options)
    assert len(ilp.name("x " + "long." * 40)) <= LONGEST
    assert ilp.name("x twice") != ilp.name("x twice")
