"""A choice of strategies -> what it costs at every position of the model, and what stages pay once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopart.cost.collectives import p2p_seconds
from autopart.cost.compute import Array
from autopart.cost.prices import Prices
from autopart.cost.sizes import Path, as_kept, paths
from autopart.cost.training_state import Training
from autopart.hardware.rows import Link
from autopart.sharding.notation import G, R
from autopart.sharding.strategy_table import Placements, SavedTensor, ValueUses

MODES = ("none", "selective", "full")
"""What a block keeps for its backward: everything; its inputs and what its matrix products give; its inputs alone."""


@dataclass(frozen=True)
class PerStageOnce:
    """What a stage pays once if it has any of the positions: seconds forward and backward, bytes kept per micro-batch,
    bytes of parameters, gradients and optimizer states, seconds of gradient sync, bytes of the largest tensor; bytes
    `entered` are what several blocks take, kept where one of them is run again; `stepping` as in Weighed, `summed` and
    `waiting` as in Prices."""

    positions: tuple[int, ...]
    forward: float = 0.0
    backward: float = 0.0
    kept: float = 0.0
    parts: tuple[float, float, float] = (0.0, 0.0, 0.0)
    sync: float = 0.0
    largest: float = 0.0
    entered: float = 0.0
    stepping: float = 0.0
    summed: float = 0.0
    waiting: float = 0.0


@dataclass(frozen=True)
class Crossings:
    """Values of one kind that cross cuts: the positions that make them and those that use them, in pairs, the bytes of
    each, seconds to send one and its gradient.

    one   whether the pairs are of one value
    """

    homes: NDArray[np.int_]
    users: NDArray[np.int_]
    size: float
    seconds: float
    one: bool = False


@dataclass
class PositionCosts:
    """What a choice costs at every position, per micro-batch.

    forward, backward  seconds, nothing run again
    again              seconds of backward that each of MODES adds
    kept               bytes under each of MODES;  entered: of what the position alone takes, kept if it is run again
    products           bytes of kept[0] that matrix products give or keep
    wide               bytes by which all it keeps is more once it is run again: there, what is gathered again is whole
    parts              bytes of parameters, gradients and optimizer states
    sync, beside       seconds of gradient sync, a step, that nothing hides; that the backward of positions before can
                       hide, in each of `Training.backwards`
    largest            bytes of the largest gradient;  in_backward: that exist in an operator's backward besides what
                       is kept, in the first of a step and in others
    summed             bytes of parameters whose gradients ranks sum, in three rows: of those it reads, the largest of
                       them, those that it alone reads in any stage;  alone: where it reads one
    stepping           bytes that the optimizer makes for the parameters while it steps them, for all of them if they
                       are stepped `Training.together`, else for the largest
    items              what stages pay once;  crossings: values that may be sent
    """

    forward: Array
    backward: Array
    again: Array
    kept: Array
    entered: Array
    products: Array
    wide: Array
    parts: Array
    sync: Array
    beside: Array
    largest: Array
    in_backward: Array
    summed: Array
    stepping: Array
    training: Training
    alone: NDArray[np.bool_]
    items: list[PerStageOnce] = field(default_factory=list)
    crossings: list[Crossings] = field(default_factory=list)

    def alive(self, modes: Any, first: bool) -> Array:
        """Bytes that exist in every position's backward, the `first` of a step or another, besides what is held, if it
        does as one of MODES says: where it is run again what it keeps otherwise, all of it whole. Selectively, what
        products gave is let go of on the way: right after the second run it is all there, with one gradient."""
        whole, backward = self.kept[0] + self.wide, self.in_backward[0 if first else 1]
        selective = np.maximum(self.largest + whole - self.products, backward + whole - self.kept[1])
        return np.select([modes == 0, modes == 1], [backward, selective], backward + whole)


def nothing_weighed(prices: Prices) -> PositionCosts:
    """Of all positions."""
    n = len(prices.sizes.table.labels)
    forward, backward, entered, products, wide, sync, beside, largest, stepping = (np.zeros(n) for _ in range(9))
    again, kept, parts, summed = (np.zeros((3, n)) for _ in range(4))
    in_backward = np.zeros((2, n))
    return PositionCosts(
        forward, backward, again, kept, entered, products, wide, parts, sync, beside, largest, in_backward, summed,
        stepping, prices.terms.training, prices.sizes.alone,
    )  # fmt: skip


def weigh(prices: Prices, chosen: Sequence[int], link: Link | None) -> PositionCosts:
    """Price a choice (the index of every node's option); `link` is the one between stages, None where there is one."""
    table = prices.sizes.table
    at = prices.sizes.first[:-1] + np.array(chosen)
    found = nothing_weighed(prices)
    _weigh_nodes(found, prices, at)
    _weigh_parameters(found, prices, at)
    for index, flow in enumerate(table.flows):
        _weigh_flow(found, prices, chosen, index, flow, link)
    for index, keep in enumerate(table.keeps):
        _weigh_keep(found, prices, chosen, index, keep)
    for item in found.items:
        np.maximum.at(found.largest, list(item.positions), item.largest)
        np.maximum.at(found.in_backward.T, list(item.positions), 2 * item.largest)
    return found


def _weigh_nodes(found: PositionCosts, prices: Prices, at: NDArray[np.int_]) -> None:
    """Operators, by the class of their run."""
    table = prices.sizes.table
    groups, where = np.array([n.group for n in table.nodes]), np.array(table.group)
    for group in sorted(set(table.group)):
        mine, positions = at[groups == group], where == group
        forward = prices.forward[mine].sum()
        found.forward[positions] = forward
        found.backward[positions] = prices.backward[mine].sum()
        found.again[1][positions] = forward - prices.product[mine].sum()
        found.again[2][positions] = forward
        found.kept[0][positions] = prices.inner[mine].sum()
        found.kept[1][positions] = prices.results[mine].sum()
        found.products[positions] = (prices.sizes.product * prices.inner)[mine].sum()
        found.largest[positions] = prices.largest[mine].max(initial=0.0)
        found.in_backward[:, positions] = prices.in_backward[:, mine].max(1, initial=0.0, keepdims=True)
    for index, places in table.shared.items():
        i = at[index]
        seconds = float(prices.forward[i]), float(prices.backward[i])
        for users in places:
            found.items.append(
                PerStageOnce(users, *seconds, float(prices.inner[i]), largest=float(prices.in_backward[1, i] / 2))
            )


def _weigh_parameters(found: PositionCosts, prices: Prices, at: NDArray[np.int_]) -> None:
    for index, places in prices.sizes.table.state.items():
        i = at[index]
        own, every = prices.sizes.holders[index]
        np.add.at(found.parts.T, own, prices.parts[i])
        np.add.at(found.sync, own, prices.sync[i])
        np.add.at(found.beside, own, prices.beside[i])
        (np.add if found.training.together else np.maximum).at(found.stepping, own, prices.stepping[i])
        summed = float(prices.summed[i])
        np.add.at(found.summed[0], every, summed)
        np.maximum.at(found.summed[1], every, summed)
        np.add.at(found.summed[2], own, summed)
        for positions in places if len(own) < len(places) else ():
            if len(positions) > 1:
                sync = float(prices.sync[i] + found.training.backwards * prices.beside[i])
                held, stepping, waiting = prices.parts[i].tolist(), float(prices.stepping[i]), float(prices.waiting[i])
                shared = PerStageOnce(
                    positions, parts=tuple(held), sync=sync, stepping=stepping, summed=summed, waiting=waiting
                )
                found.items.append(shared)


def _weigh_flow(
    found: PositionCosts, prices: Prices, chosen: Sequence[int], index: int, flow: ValueUses, link: Link | None
) -> None:
    """The changes of a value's placement, what blocks take of it, and what sending it costs."""
    sizes, table = prices.sizes, prices.sizes.table
    source = table.nodes[flow.source]
    value = source.values[flow.output]
    have = source.given(chosen[flow.source], flow.output)
    wants = {use: table.nodes[use[0]].taken(chosen[use[0]], use[1]) for use in dict.fromkeys(flow.uses)}
    summed = any(p.kind == "P" for p in have)
    paid: dict[Path, list[tuple[int, int]]] = {}
    for use, want in wants.items():
        for key in paths(flow.chains[have, want]):
            paid.setdefault(key, []).append(use)
    homes, users = flow.ends
    at = homes if summed else users
    for key, uses in paid.items():
        i = sizes.change_index[index, have, key]
        forward, backward, rerun = prices.changes[:, i].tolist()
        if at[0] < 0 or (flow.several and not summed):
            for needed in flow.needed:
                positions = tuple(sorted({p for use in uses for p in needed[use]}))
                found.items.append(PerStageOnce(positions, forward, backward, largest=float(prices.after[i])))
            continue
        np.add.at(found.forward, at, forward)
        np.add.at(found.backward, at, backward)
        np.add.at(found.again.T, at, [0.0, rerun, rerun])
        np.maximum.at(found.largest, at, prices.after[i])
        np.maximum.at(found.in_backward.T, at, 2 * prices.after[i])
    outside = (users != homes) & (users >= 0)
    if source.kind in ("parameter", "buffer") or not (flow.several or outside.any()):
        return

    def held(placed: Placements) -> float:
        return float(sizes.four(value, placed) @ prices.terms.basis)

    if flow.several:
        for home, spots in zip(flow.homes, flow.spots, strict=True):
            for placed in dict.fromkeys(wants[use] for use in spots):
                taking = {p for use, where in spots.items() if wants[use] == placed for p in where}
                enters = tuple(sorted(p for p in taking if p not in (home, -1) and table.block[p]))
                if enters:
                    found.items.append(PerStageOnce(enters, entered=held(placed)))
    else:
        blocks = outside & np.array(table.block)[users]
        np.add.at(found.entered, users[blocks], held(wants[flow.uses[0]] if summed else have))
    taken = next(wants[use] for use, inside in zip(flow.uses, flow.inside, strict=True) if not inside)
    found.crossings += _crossings(flow, held(taken if summed else have), value.grad, link)


def _crossings(flow: ValueUses, size: float, grad: bool, link: Link | None) -> Iterator[Crossings]:
    """Where a value of a size crosses cuts."""
    seconds = float(p2p_seconds(size, link)) * (1 + grad) if link is not None else 0.0
    if not flow.several:
        homes, users = flow.ends
        away = (users != homes) & (users >= 0) & (homes >= 0)
        yield Crossings(homes[away], users[away], size, seconds)
        return
    for home, at in zip(flow.homes, flow.users, strict=True):
        taking = np.array(sorted(set(at) - {home, -1}), dtype=int)
        if len(taking) and home >= 0:
            yield Crossings(np.full(len(taking), home), taking, size, seconds, True)


def least_crossings(prices: Prices, link: Link | None) -> list[Crossings]:
    """Where values cross cuts, each in the fewest bytes of any placement."""
    table, found = prices.sizes.table, list[Crossings]()
    for flow in table.flows:
        source = table.nodes[flow.source]
        if source.kind in ("parameter", "buffer") or all(flow.inside):
            continue
        value = source.values[flow.output]
        placements = {placed for chain in flow.chains for placed in chain}
        least = min(float(prices.sizes.four(value, p) @ prices.terms.basis) for p in placements)
        found += _crossings(flow, least, value.grad, link)
    return found


def _weigh_keep(found: PositionCosts, prices: Prices, chosen: Sequence[int], index: int, keep: SavedTensor) -> None:
    placed = {
        keeper: options[chosen[keep.root if keeper[1] == -2 else keeper[0]]]
        for keeper, options in zip(dict.fromkeys(keep.keepers), prices.sizes.keeps[index], strict=True)
    }
    _weigh_wide(found, prices, chosen, keep)
    for kind in dict.fromkeys(placed.values()):
        held = float(prices.memory[prices.sizes.kept[index, kind]])
        if not keep.several:
            np.add.at(found.kept[0], keep.first, held)
            np.add.at(found.products, keep.first, held * prices.sizes.table.nodes[keep.root].product)
            continue
        for spots in keep.spots:
            positions = tuple(sorted({p for keeper, where in spots.items() if placed[keeper] == kind for p in where}))
            found.items.append(PerStageOnce(positions, kept=held))


def _weigh_wide(found: PositionCosts, prices: Prices, chosen: Sequence[int], keep: SavedTensor) -> None:
    """What of a memory is gathered again, at every position that does so once."""
    nodes, wide = prices.sizes.table.nodes, dict[int, Placements]()
    for i, (node, operand) in enumerate(keep.keepers):
        taken = nodes[node].taken(chosen[node], operand) if operand >= 0 else ()
        if G in taken:
            wide[i] = taken
    for places in keep.places if wide else ():
        for position, taken in {places[i]: taken for i, taken in wide.items()}.items():
            whole = tuple(R if p == G else p for p in taken)
            found.wide[position] += (prices.sizes.root(keep, whole) - prices.sizes.root(keep, as_kept(taken))) @ (
                prices.terms.basis
            )
