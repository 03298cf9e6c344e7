"""The fastest splits of one range of positions under real bytes: memory is a row of the equations, and peaks are rows.
All gradients that ranks sum together count as one message, which is more than it is where they are many.

The search takes this last, exact step where a model is small enough to try every range of its runs on its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from autopart.cost.compute import Array
from autopart.cost.prices import Prices
from autopart.passes.constraint_matrix import Entries
from autopart.passes.solve import Solution
from autopart.passes.split_problem import Capacity, SplitProblem
from autopart.plan.schedules import receive_buffer_bytes
from autopart.planner.allowed_choices import Options
from autopart.planner.request import SearchPoint
from autopart.planner.search_space import Model, SearchSpace
from autopart.planner.stage_bounds import messages

SMALL = 12, 2500
"""Runs and solver's variables of a model that is small enough."""


def is_small(space: SearchSpace, point: SearchPoint) -> bool:
    """Whether every range of runs can be tried on its own."""
    runs, variables = SMALL
    return len(space.layered.labels) <= runs and space.model(point).solver.columns <= variables


def fastest_that_fit(
    space: SearchSpace, point: SearchPoint, span: tuple[int, int], room: float, counts: Mapping[int, Mapping[str, int]],
    in_flight: int, allowed: Options,
) -> Solution | None:  # fmt: skip
    """The fastest splits of the positions `span` that fit `room` bytes, where of every class of blocks so many do as
    each of MODES says; None where there are none."""
    found = _Stretch(space, point, span, counts, in_flight)
    model, there, link = found.model, found.there, space.between_stages(point)
    sent, takes = messages(model, found.prices, span, link) if link is not None else np.zeros((2, len(there)))
    held = in_flight * found.kept + receive_buffer_bytes(takes, in_flight, space.micro_batches(point))
    beside, backward = space.windows(point)
    late = _late(model.own[slice(*span)], beside, backward)
    alone = model.own[slice(*span)].sum(0)
    seconds = found.seconds + sent + beside * (there - alone)
    peaks = _entries(np.array([*_ends(found, held), *_backwards(found)]))
    return space.minimise(point, SplitProblem(seconds, allowed, Capacity(late, peaks, held + found.state, room)))


class _Stretch:
    """What the positions of a span cost, by priced variable.

    there            how many of its places are in the span;  share: of all
    seconds, kept    of a micro-batch;  of_blocks: of the bytes kept those of blocks that do not all do the same
    again            class of blocks that are run again -> bytes that exist because of it, right after the second run
                     and in its backward
    leaving          position -> bytes it keeps for a micro-batch, where they are taken to be gone afterwards
    own, gradients   bytes of the gradients of the parameters that a position alone reads, and of all of these, where
                     there are none before backward;  state: bytes of state besides
    largest, in_backward, summed  as in `Prices`, of what is in the span
    """

    def __init__(
        self,
        space: SearchSpace,
        point: SearchPoint,
        span: tuple[int, int],
        counts: Mapping[int, Mapping[str, int]],
        in_flight: int,
    ) -> None:
        self.space, self.point, self.span, self.in_flight = space, point, span, in_flight
        self.model, self.prices, self.training = space.model(point), space.priced(point), space.training(point)
        self.there = self.model.places_in(*span)
        self.share = self.there / np.maximum(self.model.places, 1.0)
        self.begins = in_flight == space.micro_batches(point)
        used = {mode for g in self.model.blocks for mode, count in counts.get(g, {}).items() if count}
        self.seconds, self.kept, self.of_blocks = (np.zeros(len(self.there)) for _ in range(3))
        self.again: dict[int, list[Array]] = {}
        for group in {*self.model.table.group, -1}:
            self._count(group, counts.get(group) or {"none": 1}, len(used) > 1)
        self.leaving = {
            p: _left(space, point, p, min(used, default="none"))
            for p in range(*span)
            if len(used) <= 1 or not self.model.table.block[p]
        }
        self.own = {p: _own_gradients(self.model, self.prices, p) for p in range(*span)}
        self.gradients = sum(self.own.values()) * self.begins
        self.state = self.of_nodes(self.prices.state) * self.there - self.gradients
        self.summed = self.of_nodes(self.prices.summed) * (self.there > 0)
        self.largest = self._existing(self.prices.largest, 1)
        self.in_backward = [self._existing(each, 2) for each in self.prices.in_backward]

    def of_nodes(self, amounts: Array) -> Array:
        """What strategies have and nothing else."""
        return np.concatenate([amounts, np.zeros(len(self.there) - len(amounts))])

    def _existing(self, amounts: Array, times: int) -> Array:
        after = self.prices.after
        return np.concatenate([amounts, times * after, 0.0 * self.prices.memory]) * (self.there > 0)

    def _count(self, group: int, counts: Mapping[str, int], differ: bool) -> None:
        """Count what a class of runs costs of which so many do as each of MODES says."""
        space, point, model = self.space, self.point, self.model
        mine, whole = model.group == group, space.costs(point, {}).kept
        for mode, count in counts.items():
            costs = space.costs(point, {group: mode} if group >= 0 else {})
            part = np.where(mine, count / (sum(counts.values()) or 1), 0.0) * self.share
            taken = count * _entering(model, self.prices, group) * self.share if mode != "none" else 0.0
            self.seconds += part * costs.seconds
            self.kept += part * costs.kept + taken
            self.of_blocks += (part * costs.kept + taken) * (group in model.blocks and differ)
            if mode != "none" and count:
                gone = (self._products(), costs.kept) if mode == "selective" else (0.0, 0.0)
                ways = [np.where(mine, (whole - results) / np.maximum(model.places, 1.0), 0.0) for results in gone]
                known = self.again.get(group, ways)
                self.again[group] = [np.maximum(a, b) for a, b in zip(known, ways, strict=True)]

    def _products(self) -> Array:
        """Bytes kept that matrix products give or keep."""
        sizes, prices, table = self.model.sizes, self.prices, self.model.table
        roots = np.array([table.nodes[table.keeps[keep].root].product for keep, _ in sizes.kept])
        rows = [sizes.product * prices.inner, 0.0 * prices.change_forward, roots * prices.memory]
        return np.concatenate(rows) * self.model.places


def _ends(found: _Stretch, held: Array) -> Iterator[Array]:
    """What exists at the end of a step, less what is held in backward, in rows that are sums."""
    training = found.training
    stepping = found.of_nodes(found.prices.stepping) * (found.there if training.together else found.there > 0)
    for row in [stepping] if training.together else _one_by_one(found.model, stepping):
        yield row - held + found.gradients
    yield training.ending(found.summed, found.summed) * found.there - held + found.gradients


def _backwards(found: _Stretch) -> Iterator[Array]:
    """What exists besides in the backwards of a step, less what is gone or not there yet, likewise."""
    one = found.kept
    if not found.begins:
        yield from _backward(found, False, 0.0 * one)
        return
    for first in (True, False)[: found.in_flight]:
        yield from _backward(found, first, 0.0 * one if first else one)


def _backward(found: _Stretch, first: bool, gone_before: Array) -> Iterator[Array]:
    """In the `first` backward of a step, or in others, where so much is gone before."""
    model, table, training, span = found.model, found.model.table, found.training, range(*found.span)
    backward, gradients = found.in_backward[0 if first else 1], found.gradients
    all_gone = sum(found.leaving.values()) + found.of_blocks + gone_before - gradients
    for row in _one_by_one(model, np.where(model.group < 0, found.in_backward[1], 0.0)):
        yield row - all_gone
    yield (gradients - gone_before) * (not first)
    block = min((p for p in span if table.block[p]), default=span.stop)
    last, waiting = _waiting(model, found.prices, found.span)
    seen = set()
    for p in span:
        group, later = table.group[p], (kept for q, kept in found.leaving.items() if q > p)
        come = sum(found.own[q] for q in span if q >= p) if first else gradients
        gone = sum(later) + found.of_blocks * (p < block) + gone_before - come - waiting * (p < last)
        if (group, gone.tobytes()) in seen:
            continue
        seen.add((group, gone.tobytes()))
        mine = model.group == group
        gathered = np.where(mine, training.gathered(found.summed), 0.0) - gone
        after, within = (gathered + again for again in found.again.get(group, [0.0 * gone] * 2))
        summing = np.where(mine, training.summing(found.summed, found.summed, model.sizes.alone[p]), 0.0) - gone
        for amounts, besides in ((found.largest, (after, summing)), (backward, (within,))):
            for row in (*_one_by_one(model, np.where(mine, amounts, 0.0)), 0.0 * gone):
                yield from (row + beside for beside in besides)


def _entries(rows: Array) -> Entries:
    row, variable = np.nonzero(rows)
    return row, variable, rows[row, variable]


def _late(own: Array, beside: Array, backward: Array) -> Entries:
    """Sums of which the largest is for how long gradients travel after the backward of positions (`ranges.exposed`)."""
    done = np.cumsum(own, 0) - own
    return _entries((beside * (done + own) - backward * done) * beside.any())


def _left(space: SearchSpace, point: SearchPoint, position: int, mode: str) -> Array:
    """Bytes that a position keeps for a micro-batch; a block that does as one of MODES says."""
    model, group = space.model(point), space.model(point).table.group[position]
    again = model.table.block[position] and mode != "none"
    kept = np.where(model.group == group, space.costs(point, {group: mode} if again else {}).kept, 0.0)
    taken = _entering(model, space.priced(point), group) if again else 0.0
    return np.asarray(kept / np.maximum(model.places, 1.0) + taken)


def _waiting(model: Model, prices: Prices, span: tuple[int, int]) -> tuple[int, Array]:
    """The last position of a range that reads a parameter which an earlier one reads too, and bytes of the gradients of
    all such by their strategies."""
    last, bytes_ = span[0], np.zeros(len(model.places))
    for index, places in model.table.state.items():
        mine = slice(*model.sizes.first[index : index + 2])
        for inside in ([p for p in positions if span[0] <= p < span[1]] for positions in places):
            if len(inside) > 1 and prices.waiting[mine].any():
                bytes_[mine] += prices.waiting[mine]
                last = max(last, *inside)
    return last, bytes_


def _own_gradients(model: Model, prices: Prices, position: int) -> Array:
    """Bytes of the gradients of the parameters that a position alone reads, by their strategies."""
    bytes_ = np.zeros(len(model.places))
    for index, places in model.table.state.items():
        if (position,) in places:
            mine = slice(*model.sizes.first[index : index + 2])
            bytes_[mine] = prices.parts[mine, 1]
    return bytes_


def _entering(model: Model, prices: Prices, group: int) -> Array:
    """Bytes that one block of a class takes from other runs, by the strategy that makes them."""
    sizes, table, bytes_ = model.sizes, model.table, np.zeros(len(model.places))
    for flow in table.flows:
        source = table.nodes[flow.source]
        inside = flow.homes[0] == flow.users[0][0] or flow.users[0][0] < 0
        if flow.several or inside or source.kind in ("parameter", "buffer"):
            continue
        if group in {table.group[u[0]] for u in flow.users}:
            for option in range(len(source.options)):
                four = sizes.four(source.values[flow.output], source.given(option, flow.output))
                bytes_[sizes.first[flow.source] + option] += four @ prices.terms.basis
    return bytes_


def _one_by_one(model: Model, amounts: Array) -> Array:
    """Rows of a peak: of every node its strategies, of every change itself."""
    first, rows = model.sizes.first, []
    for node in range(len(model.table.nodes)):
        row = np.zeros(len(amounts))
        row[first[node] : first[node + 1]] = amounts[first[node] : first[node + 1]]
        rows.append(row)
    for change in np.flatnonzero(amounts[first[-1] :]) + first[-1]:
        row = np.zeros(len(amounts))
        row[change] = amounts[change]
        rows.append(row)
    return np.array([row for row in rows if row.any()]).reshape(-1, len(amounts))
