"""Optimal bases of relaxations that were solved, from which HiGHS solves others."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import highspy
import numpy as np

from autopart.cost.compute import Array

BASES, SKETCH = 24, 4096
"""How many bases are kept, and of about how many variables the costs are compared."""


class _Optimum(NamedTuple):
    """The optimal basis of one objective.

    objective  hash of the costs of all variables
    sketch     the costs of some variables, evenly spaced
    """

    objective: int
    sketch: Array
    basis: highspy.HighsBasis


class WarmStarts:
    """The bases of the last BASES objectives with the same constraints.

    Costs of seconds, of bytes and of single stages alternate: the basis of the objective before is often far away.
    """

    def __init__(self, highs: highspy.Highs) -> None:
        self.highs, self.rows = highs, highs.getNumRow()
        self.known: deque[_Optimum] = deque(maxlen=BASES)
        self.last: highspy.HighsBasis | None = None
        """The basis that HiGHS has at present; None where that is not known."""

    def start(self, objective: Array, restricted: bool) -> bool:
        """Give HiGHS the basis of the most similar objective; where strategies are ruled out, only that of the very
        same: the last basis is often of a choice that is allowed. Returns whether the basis is of the very same one."""
        last, self.last = self.last, None
        if not self.known or self.highs.getNumRow() != self.rows:
            return False
        sketch = _sketch(objective)
        nearest = min(reversed(self.known), key=lambda optimum: float(np.abs(optimum.sketch - sketch).sum()))
        same = nearest.objective == hash(objective.tobytes())
        if nearest.basis is not last and (same or not restricted):
            self.highs.setBasis(nearest.basis)
        return same

    def record(self, objective: Array) -> None:
        """Keep the basis with which HiGHS has solved an objective."""
        if self.highs.getNumRow() == self.rows:
            self.last = self.highs.getBasis()
            self.known.append(_Optimum(hash(objective.tobytes()), _sketch(objective), self.last))


def _sketch(objective: Array) -> Array:
    return objective[:: 1 + len(objective) // SKETCH].copy()
