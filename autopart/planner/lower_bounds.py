"""Bounds below the time of every range of positions under its memory, whatever its splits and its recompute.

A byte is given a price (Lagrange): at any price, seconds + price * (bytes - limit) of the best splits is below the time
of every plan that fits. Every class of runs is taken for itself, so that a range's bound depends on nothing but how
many runs of each kind it has, and on what it must take and give. How many of them do as each of MODES says is a whole
number: where there are few ways to give it, all are listed, and a range's bound is the least over them, each at its
best price.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopart.cost.compute import Array
from autopart.cost.intervals import NEVER, interval_ends
from autopart.cost.position_costs import least_crossings
from autopart.planner.interval_seconds import crossed
from autopart.planner.request import SearchPoint
from autopart.planner.search_space import SearchSpace

Counts = tuple[tuple[int, int], ...]
"""Of every kind: how many there are, and how many modes each of them may take."""

LISTED = 400
"""Ways to give the blocks of a range their modes, above which they are not listed."""

SLACK = 1e-6
"""Relative error of a solver's bound on bytes."""


@dataclass(frozen=True)
class Row:
    """A row of positions and its ranges.

    kinds   of position: the class of a run, and what it may do of MODES;  first: the first mode of each among all
    counts  how many of each kind a range has, once for all ranges that are alike
    alike   of every range the row of `counts`
    many    of every row of `counts`, the ways to give all their modes that are listed: 0 where there are too many
    ways    these, one row after the other: how many of each kind take each mode
    """

    kinds: tuple[tuple[int, tuple[str, ...]], ...]
    first: NDArray[np.int_]
    counts: NDArray[Any]
    alike: NDArray[np.int_]
    many: NDArray[np.int_]
    ways: Array


@lru_cache(maxsize=8)
def row_of(group: tuple[int, ...], allowed: tuple[tuple[str, ...], ...]) -> Row:
    """The row of positions of these classes, each of which may do what is `allowed` it."""
    rows = list(zip(group, allowed, strict=True))
    kinds = tuple(sorted(set(rows)))
    stands = np.array([[row == kind for kind in kinds] for row in rows], dtype=np.int64)
    total = np.concatenate([np.zeros((1, len(kinds)), dtype=np.int64), np.cumsum(stands, axis=0)])
    starts, ends = interval_ends(len(rows))
    counts, alike = np.unique(total[ends] - total[starts], axis=0, return_inverse=True)
    modes = [len(modes) for _, modes in kinds]
    ways = [_listed(tuple(zip(row, modes, strict=True))) for row in counts.tolist()]
    many = np.array([len(listed) for listed in ways])
    return Row(kinds, np.cumsum([0, *modes])[:-1], counts, alike, many, np.concatenate(ways))


class Bounds:
    """The bounds of one point, better with every price that is looked at.

    room    what the backward of the last run, or its largest gradient if it may let go of products' results, leaves of
            a device's bytes, for every row of `counts`: when its backward starts nothing is gone yet. Gradients may not
            be there: then all bytes. Nothing has room that leaves other stages no position
    terms   for every price the bound of one run of each kind in each of its modes, in a row;  bytes: the same of bytes
    """

    def __init__(self, space: SearchSpace, point: SearchPoint) -> None:
        self.space, self.point = space, point
        group = space.model(point).table.group
        self.row, self.many = row_of(tuple(group), space.allowed_modes), Counter(group)
        prices, nodes = space.priced(point), space.model(point).table.nodes
        each = prices.backward_bytes[0], prices.largest_gradient
        least = [np.minimum.reduceat(row, prices.sizes.first[:-1]) for row in each]
        largest = [
            max((b for b, n in zip(least["selective" in modes], nodes, strict=True) if n.group == group), default=0.0)
            for group, modes in self.row.kinds
        ]
        counts, end = self.row.counts, self.row.kinds.index((group[-1], space.allowed_modes[-1]))
        ends = (counts[:, end] > 0) & (counts[:, end].max() == 1)
        last = np.where(ends, largest[end], np.where(counts > 0, largest, np.inf).min(1))
        room = space.limit - last * (space.micro_batches(point) > 1)
        self.room = np.where(counts.sum(1) > len(group) - point.pp + 1, -np.inf, room)
        self.flights = np.array(sorted({space.in_flight(point, stage) for stage in range(point.pp)}))
        crossings = least_crossings(prices, space.between_stages(point))
        self.messages, _ = crossed(crossings, len(group))
        self.prices: list[float] = []
        self.terms: list[Array] = []
        self.bytes = np.zeros(sum(len(modes) for _, modes in self.row.kinds))

    def look(self, price: float) -> None:
        """Look at a price of a byte, in seconds; at an endless one at bytes alone."""
        space, point = self.space, self.point
        terms = [
            space.least(point, price, group, m) / self.many[group] for group, modes in self.row.kinds for m in modes
        ]
        if price == NEVER:
            self.bytes = np.array(terms)
        else:
            self.prices.append(price)
            self.terms.append(np.array(terms))

    def columns(self, most: float) -> dict[int, Array]:
        """For every number of micro-batches in flight a bound below f of all ranges; infinite where it is above
        `most`, or where a range cannot fit."""
        best = [np.minimum.reduceat(terms, self.row.first) for terms in (self.bytes, *self.terms)]
        bounds = self._bounds(self.room, *(self.row.counts @ least for least in best))
        rows = (bounds <= most).any(0) & (self.row.many > 0)
        if rows.any():
            many = self.row.many[rows]
            listed = self.row.ways[np.repeat(rows, self.row.many)]
            each = self._bounds(np.repeat(self.room[rows], many), *(listed @ t for t in (self.bytes, *self.terms)))
            bounds[:, rows] = np.minimum.reduceat(each, np.cumsum([0, *many[:-1]]), axis=1)
        columns = {}
        for flights, bound in zip(self.flights.tolist(), bounds, strict=True):
            found = bound[self.row.alike] + self.messages
            columns[flights] = np.where(found <= most, found, NEVER)
        return columns

    def _bounds(self, room: Any, held: Array, *seconds: Array) -> Array:
        """[flights, ways]: the best bound of any price for ways that take so many bytes and cost so much at each, in so
        many bytes of room."""
        limit = room / self.flights[:, None]
        best = np.zeros((len(self.flights), len(held)))
        for price, each in zip(self.prices, seconds, strict=True):
            best = np.maximum(best, each - (price * limit if price else 0.0))
        return np.where(held <= limit * (1 + SLACK), best, NEVER)


@lru_cache(maxsize=4096)
def _listed(counts: Counts) -> Array:
    """All ways to give every run its mode: how many of each kind take each mode. None where they are too many."""

    def of(count: int, modes: int) -> Sequence[tuple[int, ...]]:
        bars = itertools.combinations(range(count + modes - 1), modes - 1)
        return [tuple(b - a - 1 for a, b in itertools.pairwise((-1, *bar, count + modes - 1))) for bar in bars]

    if math.prod(math.comb(count + modes - 1, modes - 1) for count, modes in counts) > LISTED:
        return np.zeros((0, sum(modes for _, modes in counts)))
    return np.array([sum(way, ()) for way in itertools.product(*(of(*kind) for kind in counts))], dtype=float)
