"""The planner against all plans there are."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest
from brute import EQUAL, NEVER, SHARED, Judge, problem, steps_of, whole

from autopart.errors import PartitionError
from autopart.hardware.mesh import Mesh, joined
from autopart.planner.branch_and_bound import Search
from autopart.planner.candidate import SearchResult
from autopart.planner.search_points import MIXED
from autopart.planner.search_space import SearchSpace
from autopart.planner.write_plan import write_out

CHUNKS = 30
TRIED = SHARED if "AUTOPART_EXAMPLES" in os.environ else 2
"""Problems of every model: each is a request, a mesh and a limit of memory of its own."""


def planned(space: SearchSpace) -> SearchResult | None:
    """The planner's plan; None where nothing fits."""
    try:
        return Search(space).run()
    except PartitionError as error:
        assert "fits" in error.what, error
        return None


def check_found(judge: Judge, found: SearchResult) -> None:
    """A plan is in the space, fits, and takes the time it is said to, by `position_costs` and node by node."""
    seconds, held = judge.worth(found)
    step = steps_of(seconds, judge.space.micro_batches(found.point))
    assert step == pytest.approx(found.seconds, rel=EQUAL)
    for stage, nbytes in enumerate(held):
        assert nbytes <= judge.space.limit(judge.space.at(found.point, stage)) * (1 + EQUAL)
    plan = write_out(judge.space, replace(found, bound=min(found.bound, found.seconds)), 0.0, "small")
    assert plan.step_seconds == pytest.approx(found.seconds, rel=EQUAL)


@pytest.mark.slow
@pytest.mark.timeout(900)  # of ten problems, one of which alone may take a minute
@pytest.mark.parametrize("chunk", [pytest.param(i, marks=pytest.mark.xdist_group(f"brute{i}")) for i in range(CHUNKS)])
def test_no_plan_is_faster(chunk: int) -> None:
    for seed in range(chunk * SHARED, chunk * SHARED + TRIED):
        check_optimal(problem(seed).space, f"seed {seed}")


def check_optimal(space: SearchSpace, name: str) -> None:
    """The plan of a space is the fastest of all that there are, and no lower bound is above its seconds."""
    judge, found = Judge(whole(space)), planned(space)
    if found is not None:
        check_found(judge, found)
    best = judge.best(found.seconds * (1 - EQUAL) if found else NEVER)
    if best.plan is not None:
        check_found(judge, best.plan)
    optimum = best.seconds if best.plan or not found else found.seconds
    quick = planned(replace(space, request=replace(space.request, exact=False)))
    for plan in filter(None, (found, quick)):
        assert plan.bound <= optimum * (1 + EQUAL), f"{name}: the bound is above the optimum"
    told = f"{found.point}: {found.seconds} s" if found else "nothing"
    assert best.plan is None, f"{name}: the planner found {told}, but {best.plan.point} takes {best.seconds} s"


def two_kinds(seed: int) -> SearchSpace | None:
    """A random problem on hosts of two kinds, which differ in everything that a device has; None where no degrees give
    stages of both kinds."""
    space, draw = problem(seed).space, random.Random(f"kinds {seed}")
    mesh, size = space.mesh, space.mesh.size
    if size == 1:
        return None
    first = mesh.device
    second = replace(
        first,
        name="other",
        flops={"float32": first.flops["float32"] * 10 ** draw.uniform(-1, 1)},
        bandwidth=first.bandwidth * 10 ** draw.uniform(-1, 1),
        memory_bytes=int(first.memory_bytes * 10 ** draw.uniform(-0.5, 0.5)),
        launch_seconds=first.launch_seconds * 10 ** draw.uniform(-1, 1),
        overlap=draw.choice([first.overlap, 1.0]),
        host=first.host and replace(first.host, bandwidth=first.host.bandwidth * 10 ** draw.uniform(-1, 1)),
    )
    per_host = draw.choice([1, 2]) if size == 4 else 1
    hosts = draw.randrange(1, size // per_host)
    links = [replace(mesh.inter, name=f"link {i}", bandwidth=10 ** draw.uniform(4, 8)) for i in range(4)]
    kinds = [(hosts, first), (size // per_host - hosts, second)]
    parts = [Mesh(n, per_host, device, *links[2 * i : 2 * i + 2]) for i, (n, device) in enumerate(kinds)]
    space = SearchSpace(space.layered, joined(parts), space.request)
    try:
        return space if any(point.kind == MIXED for point in space.points()) else None
    except PartitionError:  # no degrees fit the batch
        return None


TWO_KINDS = (202, 204, 208, 209, 211, 212, 213, 217, 218, 221, 223, 225)
"""The first dozen of seeds from 200 on that give a problem on hosts of two kinds, but for that of the next test."""


@pytest.mark.parametrize("seed", TWO_KINDS)
def test_no_plan_is_faster_on_two_kinds(seed: int) -> None:
    space = two_kinds(seed)
    assert space is not None
    check_optimal(space, f"seed {seed} on two kinds")


def test_bound_where_stages_take_a_tied_weight_in_different_placements() -> None:
    """The fastest plan has the tied weight resharded in the first stage alone; what the other stage does not need has
    no price there."""
    space = two_kinds(219)
    assert space is not None
    found = planned(space)
    assert found is not None
    best = Judge(whole(space)).best(found.seconds)
    assert best.plan is not None and best.plan.point.pp == 2
    assert found.bound <= best.seconds * (1 + EQUAL)
