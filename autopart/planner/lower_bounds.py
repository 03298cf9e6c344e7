"""Lower bounds on f of every interval of positions in limited memory, over all its splits and checkpointing.

Lagrangian relaxation: with B(x) the bytes and L the limit, both per micro-batch in flight, for every lambda >= 0 in
seconds per byte

    min over x with B(x) <= L of seconds(x)  >=  min over x of (seconds(x) + lambda B(x)) - lambda L
    B(x) = saved(x) + state(x) / in_flight;  L = bytes of a device / in_flight

The minimum is bounded by a sum over positions, with the relaxation of each segment class (`class_bound`).
So the bound of an interval depends on how many positions of each kind it has, and on the least seconds of its messages.
An interval whose states and optimizer's temporaries exceed a device at the end of a step has an infinite bound.

A kind is a segment class with the checkpointing modes that its positions may use. The number of positions of a kind
that use a mode is an integer. An interval with at most MAX_ASSIGNMENTS assignments of modes has the least bound over
them, each at its best lambda. In another interval, every position uses its best mode at each lambda.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopart.cost.compute import Array
from autopart.cost.intervals import NEVER, interval_ends
from autopart.cost.position_costs import least_crossings
from autopart.planner.class_bounds import class_bound
from autopart.planner.interval_seconds import crossed
from autopart.planner.parameter_bounds import backward_bytes, end_of_step_bytes
from autopart.planner.search_points import MIXED, SearchPoint
from autopart.planner.search_space import SearchSpace, StageKey

MAX_ASSIGNMENTS = 400
"""The most assignments of modes to the positions of an interval that are listed."""

SLACK = 1e-6
"""Relative error of a solver's bound on bytes."""


@dataclass(frozen=True)
class KindCounts:
    """How many positions of each kind the intervals of a model have.

    kinds        [kinds]: (segment class, modes that it may use)
    first_mode   [kinds]: index of the kind's first mode, with the modes of all kinds numbered through
    counts       [rows, kinds]: the distinct combinations of counts
    row_of       [intervals]: row of `counts`
    listed       [rows]: how many assignments of modes are listed; 0 where there are more than MAX_ASSIGNMENTS
    assignments  [sum of listed, modes of all kinds]: how many positions use each mode, row after row
    """

    kinds: tuple[tuple[int, tuple[str, ...]], ...]
    first_mode: NDArray[np.int_]
    counts: NDArray[Any]
    row_of: NDArray[np.int_]
    listed: NDArray[np.int_]
    assignments: Array


@lru_cache(maxsize=8)
def kind_counts(segment_classes: tuple[int, ...], allowed: tuple[tuple[str, ...], ...]) -> KindCounts:
    """The counts for positions of these classes and allowed modes."""
    positions = list(zip(segment_classes, allowed, strict=True))
    kinds = tuple(sorted(set(positions)))
    is_kind = np.array([[position == kind for kind in kinds] for position in positions], dtype=np.int64)
    total = np.concatenate([np.zeros((1, len(kinds)), dtype=np.int64), np.cumsum(is_kind, axis=0)])
    starts, ends = interval_ends(len(positions))
    counts, row_of = np.unique(total[ends] - total[starts], axis=0, return_inverse=True)
    modes = [len(modes) for _, modes in kinds]
    assignments = [_assignments(tuple(zip(row, modes, strict=True))) for row in counts.tolist()]
    listed = np.array([len(each) for each in assignments])
    return KindCounts(kinds, np.cumsum([0, *modes])[:-1], counts, row_of, listed, np.concatenate(assignments))


class LagrangianBounds:
    """The bounds of one search point for the stages of its kind, higher with every multiplier.

    capacity     [rows of `counts`]: bytes of a device - the least that the backward of the interval's last position
                 takes besides. Which position is last is known only for the model's last; else the least over kinds
                 counts. With one micro-batch, bytes of a device: B counts gradients that may not be allocated yet. -inf
                 for an interval that leaves other stages without a position, and for one that does not fit at the end
                 of a step
    multipliers  lambda, in seconds per byte
    seconds      for every multiplier, [modes of all kinds]: bound of seconds + lambda B of one position
    bytes        [modes of all kinds]: bound of B of one position
    """

    def __init__(self, space: SearchSpace, point: SearchPoint) -> None:
        self.space, self.point = space, point
        classes = space.model(point).table.segment_classes
        self.kind_counts, self.class_sizes = kind_counts(classes, space.allowed_modes), Counter(classes)
        self.capacity = self._capacity(classes)
        keys = space.stage_keys(replace(point, kind=MIXED))
        self.in_flight = np.array([in_flight for kind, in_flight in keys if kind == point.kind])
        self.messages, *_ = crossed(least_crossings(space.priced(point), space.between_stages(point)), len(classes))
        self.multipliers: list[float] = []
        self.seconds: list[Array] = []
        self.bytes = np.zeros(sum(len(modes) for _, modes in self.kind_counts.kinds))

    def _capacity(self, segment_classes: Sequence[int]) -> Array:
        space, point, of = self.space, self.point, self.kind_counts
        prices, nodes = space.priced(point), space.model(point).table.nodes
        each = prices.backward_bytes[0], prices.largest_gradient
        operators = [np.minimum.reduceat(row, prices.sizes.first[:-1]) for row in each]
        classes = np.array([node.segment_class for node in nodes])
        kind_of = [of.kinds.index(kind) for kind in zip(segment_classes, space.allowed_modes, strict=True)]
        gathered, reducing, end = (
            np.array([nbytes[[k == kind for k in kind_of]].min() for kind in range(len(of.kinds))])
            for nbytes in (*backward_bytes(prices), end_of_step_bytes(prices))
        )
        least = np.zeros(len(of.kinds))
        for kind, (segment_class, modes) in enumerate(of.kinds):
            first, gradient = (row[classes == segment_class].max(initial=0.0) for row in operators)
            saves_more = bool({"selective", "mincut"} & {*modes})  # than "none" does, of which the rest is recomputed
            least[kind] = max(gradient if saves_more else first + gathered[kind], gradient + reducing[kind])
        has_end = (of.counts[:, kind_of[-1]] > 0) & (of.counts[:, kind_of[-1]].max() == 1)
        last = np.where(has_end, least[kind_of[-1]], np.where(of.counts > 0, least, np.inf).min(1))
        capacity = space.limit(point) - last * (space.micro_batches(point) > 1)
        fits = of.counts @ end <= space.limit(point) * (1 + SLACK)
        leaves_positions = of.counts.sum(1) <= len(segment_classes) - point.pp + 1
        return np.where(fits & leaves_positions, capacity, -np.inf)

    def add_multiplier(self, multiplier: float) -> None:
        """Solve the relaxations of all kinds at a multiplier in seconds per byte. At an infinite one: of bytes
        alone."""
        space, point = self.space, self.point
        terms = np.array([
            class_bound(space, point, multiplier, segment_class, mode) / self.class_sizes[segment_class]
            for segment_class, modes in self.kind_counts.kinds for mode in modes
        ])  # fmt: skip
        if multiplier == NEVER:
            self.bytes = terms
        else:
            self.multipliers.append(multiplier)
            self.seconds.append(terms)

    def columns(self, most: float) -> dict[StageKey, Array]:
        """Key of a stage -> [intervals]: bound on f in seconds; infinite where it is above `most`, or where
        the interval cannot fit."""
        of = self.kind_counts
        best = [np.minimum.reduceat(terms, of.first_mode) for terms in (self.bytes, *self.seconds)]
        bounds = self._bounds(self.capacity, *(of.counts @ least for least in best))
        listed = (bounds <= most).any(0) & (of.listed > 0)
        if listed.any():
            lengths = of.listed[listed]
            assigned = of.assignments[np.repeat(listed, of.listed)]
            each = self._bounds(
                np.repeat(self.capacity[listed], lengths), *np.array([self.bytes, *self.seconds]) @ assigned.T
            )
            bounds[:, listed] = np.minimum.reduceat(each, np.cumsum([0, *lengths[:-1]]), axis=1)
        columns = {}
        for in_flight, bound in zip(self.in_flight.tolist(), bounds, strict=True):
            found = bound[of.row_of] + self.messages
            columns[self.point.kind, in_flight] = np.where(found <= most, found, NEVER)
        return columns

    def _bounds(self, capacity: Any, least: Array, *seconds: Array) -> Array:
        """[in flight, rows]: max over multipliers of (seconds - lambda L), L = capacity / in flight; infinite where
        `least`, the least B of a row, is above L."""
        limit = capacity / self.in_flight[:, None]
        best = np.zeros((len(self.in_flight), len(least)))
        for multiplier, each in zip(self.multipliers, seconds, strict=True):
            best = np.maximum(best, each - (multiplier * limit if multiplier else 0.0))
        return np.where(least <= limit * (1 + SLACK), best, NEVER)


@lru_cache(maxsize=4096)
def _assignments(kinds: tuple[tuple[int, int], ...]) -> Array:
    """[assignments, modes of all kinds]: every assignment of modes to positions; `kinds` are (positions, modes) of
    each kind. Empty where there are more than MAX_ASSIGNMENTS."""

    def of(count: int, modes: int) -> Sequence[tuple[int, ...]]:
        bars = itertools.combinations(range(count + modes - 1), modes - 1)
        return [tuple(b - a - 1 for a, b in itertools.pairwise((-1, *bar, count + modes - 1))) for bar in bars]

    if math.prod(math.comb(count + modes - 1, modes - 1) for count, modes in kinds) > MAX_ASSIGNMENTS:
        return np.zeros((0, sum(modes for _, modes in kinds)))
    return np.array([sum(split, ()) for split in itertools.product(*(of(*kind) for kind in kinds))], dtype=float)
