"""A plan as another system's settings, with what that system would do otherwise.

One module a system. Each has a function from a plan to `Exported`, and a row in SYSTEMS.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

from autopart.errors import PartitionError
from autopart.plan.data import Plan
from autopart.plan.export.deepspeed import deepspeed
from autopart.plan.export.facts import Exported
from autopart.plan.export.megatron import megatron
from autopart.plan.export.torchtitan import torchtitan

__all__ = ["SYSTEMS", "Exported", "export"]

SYSTEMS: Mapping[str, Callable[[Plan], Exported]] = {
    "torchtitan": torchtitan,
    "megatron": megatron,
    "deepspeed": deepspeed,
}


def export(plan: Plan, to: str) -> Exported:
    """The plan for one of SYSTEMS. Raises PartitionError for another."""
    if to not in SYSTEMS:
        near = difflib.get_close_matches(to, SYSTEMS, 1) or SYSTEMS
        raise PartitionError(
            f"there is no export to {to!r}", f"the systems are {', '.join(SYSTEMS)}", f"--to {next(iter(near))}"
        )
    return SYSTEMS[to](plan)
