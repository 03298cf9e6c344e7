"""What the ILP of splits is asked: the costs, the options that are left, and the memory of one stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from autopart.cost.compute import Array
from autopart.passes.constraint_matrix import Entries


@dataclass(frozen=True)
class Capacity:
    """The rows of one stage whose bytes have to fit its device. Their variables are those of `SplitProblem.costs`.

    sync      rows of seconds by variable; their maximum, the exposed gradient sync, is added to the objective
    peak      rows of bytes by variable, of moments of a backward: alive bytes less `baseline`
    baseline  bytes by variable before any backward: state, saved activations, messages
    limit     bytes of the device: baseline + max of the rows of `peak` <= limit
    """

    sync: Entries
    peak: Entries
    baseline: Array
    limit: float


@dataclass(frozen=True)
class SplitProblem:
    """One objective over the equations of a table (`autopart.passes.ilp`).

    costs     of every strategy, reshard and saved tensor in the order of `Sizes`: seconds, or bytes where seconds do
              not count
    allowed   node -> the options that are left of its strategies; nodes that are not named keep all
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
