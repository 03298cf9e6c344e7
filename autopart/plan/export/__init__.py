"""A plan as the settings of another system, or its graph as a file.

Each system has a module with a function from a plan to `Exported`, and a row in SYSTEMS. `Exported` also tells where
the system would run otherwise than the plan says. Each format of graphs has a row in GRAPHS. Open `facts.py` first.
"""

import difflib
from collections.abc import Callable, Mapping

from autopart.errors import PartitionError
from autopart.plan.data import Plan
from autopart.plan.export.deepspeed import deepspeed
from autopart.plan.export.facts import Exported
from autopart.plan.export.graph_files import dot, graphml
from autopart.plan.export.megatron import megatron
from autopart.plan.export.torchtitan import torchtitan

__all__ = ["GRAPHS", "SYSTEMS", "Exported", "export"]

SYSTEMS: Mapping[str, Callable[[Plan], Exported]] = {
    "torchtitan": torchtitan,
    "megatron": megatron,
    "deepspeed": deepspeed,
}
GRAPHS: Mapping[str, Callable[[Plan], Exported]] = {"graphml": graphml, "dot": dot}


def export(plan: Plan, to: str) -> Exported:
    """The plan for one of SYSTEMS, or its graph as one of GRAPHS. Raises PartitionError for another."""
    known = {**SYSTEMS, **GRAPHS}
    if to not in known:
        near = difflib.get_close_matches(to, known, 1) or known
        why = f"the systems are {', '.join(SYSTEMS)}; graphs are written as {', '.join(GRAPHS)}"
        raise PartitionError(f"there is no export to {to!r}", why, f"--to {next(iter(near))}")
    return known[to](plan)
