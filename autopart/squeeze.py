"""The fastest splits of one range of positions under real bytes: memory is a row of the equations, and peaks are rows.
All gradients that ranks sum together count as one message, which is more than it is where they are many.

The search takes this last, exact step where a model is small enough to try every range of its runs on its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from autopart.allowed import Options
from autopart.comm import p2p_seconds
from autopart.cost import Array
from autopart.hardware.rows import Link
from autopart.passes.solve import Entries, Solution
from autopart.prices import Prices
from autopart.request import Point
from autopart.schedules import on_its_way
from autopart.space import Model, Space

SMALL = 12, 2500
"""Runs and solver's variables of a model that is small enough."""


def is_small(space: Space, point: Point) -> bool:
    """Whether every range of runs can be tried on its own."""
    runs, variables = SMALL
    return len(space.folded.labels) <= runs and space.model(point).solver.columns <= variables


def squeeze(
    space: Space, point: Point, span: tuple[int, int], room: float, counts: Mapping[int, Mapping[str, int]],
    in_flight: int, allowed: Options,
) -> Solution | None:  # fmt: skip
    """The fastest splits of the positions `span` that fit `room` bytes, where of every class of blocks so many do as
    each of MODES says; None where there are none."""
    model, prices = space.model(point), space.priced(point)
    there = model.places_in(*span)
    nothing = np.zeros(len(prices.change_forward) + len(prices.memory))
    seconds, held, of_blocks = (np.zeros(len(there)) for _ in range(3))
    again: dict[int, list[Array]] = {}
    roots = np.array([model.table.nodes[model.table.keeps[keep].root].product for keep, _ in model.sizes.kept])
    products = np.concatenate([model.sizes.product * prices.inner, 0.0 * prices.change_forward, roots * prices.memory])
    products *= model.places
    for group in {*model.table.group, -1}:
        total = sum(counts.get(group, {}).values()) or 1
        for mode, count in (counts.get(group) or {"none": 1}).items():
            costs, mine = space.costs(point, {group: mode} if group >= 0 else {}), model.group == group
            share = np.where(mine, count / total, 0.0)
            seconds += share * costs.seconds
            kept = share * costs.kept
            if mode != "none":
                kept += count * _entering(model, prices, group)
                whole = np.where(mine, space.costs(point, {}).kept, 0.0)
                results = np.where(mine, costs.kept, 0.0)
                ways = [whole - products * mine, whole - results] if mode == "selective" else [whole, whole]
                if count:
                    known = again.get(group, ways)
                    again[group] = [np.maximum(a, b) for a, b in zip(known, ways, strict=True)]
            held += in_flight * kept
            of_blocks += kept * (group in model.blocks)
    places, link = np.maximum(model.places, 1.0), space.between_stages(point)
    sent, takes = _messages(model, prices, span, link) if link is not None else np.zeros((2, len(there)))
    own = {p: _own_gradients(model, prices, p) for p in range(*span)}
    begins = in_flight == space.micro_batches(point)
    gradients = sum(own.values()) * begins
    state = np.concatenate([prices.state, nothing]) * there - gradients
    training, summed = space.training(point), np.concatenate([prices.summed, nothing]) * (there > 0)
    largest, *in_backward = (
        np.concatenate([first, times * prices.after, 0.0 * prices.memory]) * (there > 0)
        for times, first in zip((1, 2, 2), (prices.largest, *prices.in_backward), strict=True)
    )
    kept = held * there / places
    one, kept = kept / in_flight, kept + on_its_way(takes, in_flight, space.micro_batches(point))
    alike = len(used := {m for g in model.blocks for m, count in counts.get(g, {}).items() if count}) <= 1
    mode = min(used, default="none")
    leaving = {p: _left(space, point, p, mode) for p in range(*span) if alike or not model.table.block[p]}
    of_blocks *= not alike
    first = min((p for p in range(*span) if model.table.block[p]), default=span[1])
    last, waiting = _waiting(model, prices, span)
    stepping = np.concatenate([prices.stepping, nothing]) * (there if training.together else there > 0)
    ends = [
        *([stepping] if training.together else _one_by_one(model, stepping)),
        training.ending(summed, summed) * there,
    ]
    peak = [row - kept + gradients for row in ends]
    of_stage = _one_by_one(model, np.where(model.group < 0, in_backward[1], 0.0))
    backwards = [(True, 0.0 * one), (False, one)][:in_flight] if begins else [(False, 0.0 * one)]
    for first_one, gone_before in backwards:
        gone = sum(leaving.values()) + of_blocks * there / places + gone_before - gradients
        peak += [row - gone for row in of_stage]
        peak.append((gradients - gone_before) * (not first_one))
        seen = set()
        for p in range(*span):
            mine, later = model.group == model.table.group[p], (k for q, k in leaving.items() if q > p)
            come = sum(own[q] for q in range(p, span[1])) if first_one else gradients
            gone = sum(later) + of_blocks * there / places * (p < first) + gone_before - come - waiting * (p < last)
            if (at := (model.table.group[p], gone.tobytes())) in seen:
                continue
            seen.add(at)
            gathered = np.where(mine, training.gathered(summed), 0.0) - gone
            after, within = (gathered + way / places for way in again.get(model.table.group[p], np.zeros((2, 1))))
            summing = np.where(mine, training.summing(summed, summed, model.sizes.alone[p]), 0.0) - gone
            summing -= leaving.get(p, 0.0 * gone) * model.table.block[p]
            backward = in_backward[0 if first_one else 1]
            for amounts, besides in ((largest, (after, summing)), (backward, (within,))):
                for row in (*_one_by_one(model, np.where(mine, amounts, 0.0)), np.zeros(len(there))):
                    peak += [row + beside for beside in besides]
    rows = np.array(peak)
    row, variable = np.nonzero(rows)
    entries = row, variable, rows[row, variable]
    beside, backward = space.windows(point)
    late = _late(model.own[slice(*span)], beside, backward)
    alone = model.own[slice(*span)].sum(0)
    seconds = seconds * there / places + sent + beside * (there - alone)
    return model.solver.squeeze(seconds, late, allowed, entries, kept + state, room)


def _late(own: Array, beside: Array, backward: Array) -> Entries:
    """Sums of which the largest is for how long gradients travel after the backward of positions (`ranges.exposed`)."""
    done = np.cumsum(own, 0) - own
    rows = (beside * (done + own) - backward * done) * beside.any()
    row, variable = np.nonzero(rows)
    return row, variable, rows[row, variable]


def _left(space: Space, point: Point, position: int, mode: str) -> Array:
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


def _messages(model: Model, prices: Prices, span: tuple[int, int], link: Link) -> Array:
    """By the strategy that makes it: seconds to send what a range of positions takes from others and gives to others,
    and bytes of what it takes."""
    sizes, table, found = model.sizes, model.table, np.zeros((2, len(model.places)))
    for flow in table.flows:
        inside = [span[0] <= home < span[1] for home in flow.homes]
        given = [
            here for home, users, here in zip(flow.homes, flow.users, inside, strict=True)
            if home >= 0 and any(p >= 0 and (span[0] <= p < span[1]) != here for p in users)
        ]  # fmt: skip
        value = table.nodes[flow.source].values[flow.output]
        for option in range(len(table.nodes[flow.source].options)) if given else ():
            size = sizes.four(value, table.nodes[flow.source].given(option, flow.output)) @ prices.terms.basis
            cost = float(p2p_seconds(size, link)) * (1 + value.grad)
            at = sizes.first[flow.source] + option
            found[:, at] += np.array([len(given) * cost, given.count(False) * size])
    return found


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
