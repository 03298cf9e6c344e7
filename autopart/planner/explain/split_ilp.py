"""The ILP of one stage's splits as a problem of PuLP, which any of its solvers takes and which writes LP and MPS."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopart.errors import PartitionError
from autopart.planner.candidate import SearchResult
from autopart.planner.search_space import SearchSpace

if TYPE_CHECKING:
    from autopart.passes.ilp import LpProblem


def split_ilp(space: SearchSpace, found: SearchResult, stage: int) -> LpProblem:
    """The ILP in which a search found the splits of a stage. Raises PartitionError where the plan has no such stage."""
    from autopart.passes.ilp import state  # PuLP takes half a second to load

    if not 0 <= stage < len(found.problems):
        last = len(found.problems) - 1
        raise PartitionError(f"the plan has no stage {stage}", try_=f"stage 0 to {last}" if last else "stage 0")
    asked = found.problems[stage]
    if asked.unit == "seconds":
        asked = asked.scaled(1e6, "microseconds")
    problem = state(space.model(found.point).sizes, asked).problem
    problem.name = f"splits_of_stage_{stage}"
    return problem
