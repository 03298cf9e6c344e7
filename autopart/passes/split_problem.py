"""A problem for the ILP of splits: the costs, the options that each node may take, and the memory of one stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from autopart.cost.compute import Array
from autopart.passes.constraint_matrix import Entries


@dataclass(frozen=True)
class Capacity:
    """The rows of a stage whose bytes have to fit its device: baseline + max of the rows of `peak` <= limit. Variables
    are those of `SplitProblem.costs`.

    sync      rows of seconds by variable; the maximum of the rows is the exposed gradient sync, a term of the objective
    peak      rows of bytes by variable: at each moment of a backward, alive bytes - baseline
    baseline  bytes by variable before any backward: state, saved activations, messages
    limit     bytes of the device
    """

    sync: Entries
    peak: Entries
    baseline: Array
    limit: float


@dataclass(frozen=True)
class SplitProblem:
    """One objective over the equations of a table (`autopart.passes.ilp`).

    costs     of every strategy, reshard and saved tensor in the order of `Sizes`, in `unit`
    allowed   node -> the options that it may take; nodes that are not named may take all
    capacity  the rows of memory; None where memory has no limit or is part of the costs
    unit      of the costs: "seconds", "bytes", ...
    """

    costs: Array
    allowed: Mapping[int, Sequence[int]] = field(default_factory=dict)
    capacity: Capacity | None = None
    unit: str = "seconds"

    def scaled(self, factor: float, unit: str, most: float = np.inf) -> SplitProblem:
        """The same problem with its objective in another unit, in which no single cost is above `most`."""
        costs, capacity = np.minimum(self.costs * factor, most), self.capacity
        if capacity is not None:
            row, variable, seconds = capacity.sync
            capacity = replace(capacity, sync=(row, variable, seconds * factor))
        return replace(self, costs=costs, capacity=capacity, unit=unit)
