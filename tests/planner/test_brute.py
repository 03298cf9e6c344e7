"""The planner against all plans there are."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from brute import EQUAL, NEVER, SHARED, Judge, problem, steps_of, whole

from autopart.errors import PartitionError
from autopart.planner.branch_and_bound import Search
from autopart.planner.candidate import SearchResult
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
    assert max(held) <= judge.space.limit * (1 + EQUAL)
    plan = write_out(judge.space, replace(found, bound=min(found.bound, found.seconds)), 0.0, "small")
    assert plan.step_seconds == pytest.approx(found.seconds, rel=EQUAL)


@pytest.mark.slow
@pytest.mark.timeout(900)  # of ten problems, one of which alone may take a minute
@pytest.mark.parametrize("chunk", [pytest.param(i, marks=pytest.mark.xdist_group(f"brute{i}")) for i in range(CHUNKS)])
def test_no_plan_is_faster(chunk: int) -> None:
    for seed in range(chunk * SHARED, chunk * SHARED + TRIED):
        space = problem(seed).space
        judge, found = Judge(whole(space)), planned(space)
        if found is not None:
            check_found(judge, found)
        best = judge.best(found.seconds * (1 - EQUAL) if found else NEVER)
        if best.plan is not None:
            check_found(judge, best.plan)
        optimum = best.seconds if best.plan or not found else found.seconds
        quick = planned(replace(space, request=replace(space.request, exact=False)))
        for plan in filter(None, (found, quick)):
            assert plan.bound <= optimum * (1 + EQUAL), f"seed {seed}: the bound is above the optimum"
        told = f"{found.point}: {found.seconds} s" if found else "nothing"
        assert best.plan is None, f"seed {seed}: the planner found {told}, but {best.plan.point} takes {best.seconds} s"
