"""Table -> numbers: seconds and bytes of every strategy, and of a whole choice at every position.

A size is four numbers: of what neither samples nor the data-parallel axis change, what that axis cuts, what grows with
samples, and what does both. So one table serves every micro-batch and every data-parallel degree: `Terms.basis` holds
the four factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autopart.comm import p2p_seconds
from autopart.cost import NO_SIZES, Seconds, Training, stream_seconds, update_seconds, work_in, work_seconds
from autopart.hardware.rows import Device, Link
from autopart.mesh import Group
from autopart.notation import G, R, kept_as
from autopart.problem import Chain, Flow, Keep, Node, Placements, Table, Value
from autopart.relayout import Relayout, Step, row_seconds

Array = NDArray[np.float64]
FOUR = slice(3, 7)
"""Where `Sizes.rest` has batch, m, n and k."""

Path = tuple[Placements, ...]
"""What a value passes through on the way to a placement."""

MODES = ("none", "selective", "full")
"""What a block keeps for its backward: everything; its inputs and what its matrix products give; its inputs alone."""


@dataclass(frozen=True)
class Terms:
    """What prices depend on besides the table.

    sizes     the ranks of every axis;  scale: samples of the micro-batch over those traced
    """

    device: Device
    sizes: Mapping[str, Group]
    scale: float
    training: Training

    @property
    def basis(self) -> Array:
        """What the four numbers of a size are multiplied by."""
        dp = self.sizes["dp"].ranks if "dp" in self.sizes else 1
        return np.array([1.0, 1.0 / dp, self.scale, self.scale / dp])


class Sizes:
    """A table's sizes, four numbers each: of every strategy, every change of placement and every kept memory.

    first     index of a node's first strategy among all
    which     of every strategy, the row that says what the operator does: strategies that do the same share it
    flops, moved, peak, rest, factors
              of these rows: FLOPs and bytes moved, peak, then again, runs, kind, sizes and grads as in `cost.Work`, and
              which of the four factors batch, m, n and k have
    holdings  what parameters cost by: bytes, if there is a gradient, if that is a partial sum over dp, if over tp
    holds     of every strategy, the row of these
    changes   (flow, placement as made, path to where it is then) of every change that can be paid
    keeps     of every keep and each of its distinct keepers, the placement of the memory under each of the keeper's
              strategies (of the root's, where it is kept as made): whole or split
    kept      (keep, placement) -> index of every memory that can be kept
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self.first = np.cumsum([0, *(len(n.options) for n in table.nodes)])
        options = [(n, o) for n in table.nodes for o in range(len(n.options))]
        rows, self.which = np.unique([self._work(n, o) for n, o in options], axis=0, return_inverse=True)
        self.flops, self.moved, self.peak, self.rest, factors = np.split(rows, [4, 8, 9, -4], axis=1)
        self.factors = factors.astype(int)
        self.made = np.array([self._made(n, o) for n, o in options])
        self.inner = np.array([self._inner(n, o) for n, o in options])
        self.means = np.array([[self._mean(n, o, axis) for axis in ("dp", "tp")] for n, o in options])
        self.grad = np.array([float(n.grad) for n, _ in options])
        self.product = np.array([float(n.product) for n, _ in options])
        weight = [self._weight(n, o) for n, o in options]
        sums = np.array([[self._sums(n, o, axis) for axis in ("dp", "tp")] for n, o in options])
        held = np.column_stack([weight, self.grad, sums])
        self.holdings, self.holds = np.unique(held, axis=0, return_inverse=True)
        self.changes: dict[tuple[int, Placements, Path], tuple[Step, Value]] = {}
        for index, flow in enumerate(table.flows):
            value = table.nodes[flow.source].values[flow.output]
            for (have, _), chain in flow.chains.items():
                for key, step in zip(paths(chain), chain, strict=True):
                    self.changes[index, have, key] = step, value
        self.kinds: dict[tuple[str, Relayout, bool], list[int]] = {}
        for i, (step, value) in enumerate(self.changes.values()):
            self.kinds.setdefault((table.axes[step.axis], step.row, value.grad), []).append(i)
        self.whole = np.array([self._whole(s, v) for s, v in self.changes.values()]).reshape(-1, 4)
        self.after = np.array([self.four(v, s.after) for s, v in self.changes.values()]).reshape(-1, 4)
        self.keeps = [[self._keeps(keep, *keeper) for keeper in dict.fromkeys(keep.keepers)] for keep in table.keeps]
        self.kept: dict[tuple[int, Placements], int] = {}
        for index, keepers in enumerate(self.keeps):
            for placed in dict.fromkeys(p for options in keepers for p in options):
                self.kept[index, placed] = len(self.kept)
        self.memory = np.array([self.root(table.keeps[k], placed) for k, placed in self.kept]).reshape(-1, 4)

    def apart(self, costs: Array, allowed: Mapping[int, Iterable[int]]) -> float:
        """A bound below every choice's cost: each node in its cheapest strategy (of those `allowed`, where a node is
        named), each memory in its least placement, no change of placement paid. `costs` may end after the
        strategies."""
        each = costs[: self.first[-1]]
        if allowed:
            each = each.copy()
            for node, left in allowed.items():
                start, end = self.first[node : node + 2]
                each[list(set(range(start, end)).difference(start + o for o in left))] = np.inf
        bound = np.minimum.reduceat(each, self.first[:-1]).sum()
        kept = costs[len(each) + len(self.changes) :]
        if len(kept):
            bound += np.minimum.reduceat(kept, self.keep_first).sum()
        return float(bound)

    @cached_property
    def keep_first(self) -> NDArray[np.int_]:
        """Index of the first memory of every keep among `kept`."""
        return np.unique([keep for keep, _ in self.kept], return_index=True)[1]

    @cached_property
    def holders(self) -> dict[int, tuple[NDArray[np.int_], NDArray[np.int_]]]:
        """Of every parameter the positions that hold one for themselves, and all that hold one."""
        return {
            index: (
                np.array([p for p, *more in places if not more], dtype=int),
                np.array([p for at in places for p in at]),
            )
            for index, places in self.table.state.items()
        }

    @cached_property
    def change_index(self) -> dict[tuple[int, Placements, Path], int]:
        """Index of every change among all."""
        return {key: i for i, key in enumerate(self.changes)}

    def four(self, value: Value, placed: Placements) -> Array:
        """A value's bytes on a rank."""
        return self._cut(value.bytes, value.batch, [p.kind == "S" for p in placed])

    def _keeps(self, keep: Keep, node: int, operand: int) -> list[Placements]:
        user, root = self.table.nodes[node], self.table.nodes[keep.root]
        if operand == -2:
            return [_kept(root.given(o)) for o in range(len(root.options))]
        return [_kept(user.given(o) if operand == -1 else user.taken(o, operand)) for o in range(len(user.options))]

    def _cut(self, amount: float, batch: bool, split: Iterable[bool]) -> Array:
        numbers, at = np.zeros(4), 2 * batch
        for axis, cut in zip(self.table.axes, split, strict=True):
            if cut and axis == "dp":
                at += 1
            elif cut:
                amount /= self.table.tp
        numbers[at] = amount
        return numbers

    def _work(self, node: Node, option: int) -> Array:
        """What an operator does, as a row."""
        flops = self._cut(node.flops, node.batch, [s.shards_work for s in node.options[option]])
        sizes, factors = self._matrix(node, option)
        rest = [node.peak, node.again, node.runs, node.kind_index, *sizes, *node.grads, *factors]
        return np.concatenate([flops, self._moved(node, option), rest])

    def _matrix(self, node: Node, option: int) -> tuple[tuple[float, ...], list[int]]:
        if node.matrix is None:
            return NO_SIZES, [0] * 4
        four, factors = list(node.matrix.sizes[:4]), [2 * grows for grows in node.matrix.grows]
        for axis, strategy in zip(self.table.axes, node.options[option], strict=True):
            role = node.matrix.role(strategy)
            if role is not None and axis == "dp":
                factors[role] += 1
            elif role is not None:
                four[role] /= self.table.tp
        return (*four, *node.matrix.sizes[4:]), factors

    def _inner(self, node: Node, option: int) -> Array:
        return self._cut(node.inner, node.batch, [s.shards_work for s in node.options[option]])

    def _made(self, node: Node, option: int) -> Array:
        made = np.zeros(4)
        for i, value in enumerate(node.values if node.kind == "op" else ()):
            made += self.four(value, node.given(option, i))
        return made

    def _moved(self, node: Node, option: int) -> Array:
        moved = self._made(node, option)
        read = {(first, node.taken(option, i)): None for i, first in enumerate(node.firsts) if node.operands[i]}
        for first, placed in read:
            source, output = node.operands[first]  # type: ignore[misc]
            moved += self.four(self.table.nodes[source].values[output], placed)
        return moved

    def _weight(self, node: Node, option: int) -> float:
        return float(self.four(node.values[0], node.given(option))[0]) if node.kind == "parameter" else 0.0

    def _sums(self, node: Node, option: int, axis: str) -> bool:
        """Whether a parameter's gradient is a partial sum over an axis."""
        if node.kind != "parameter" or not node.grad or axis not in self.table.axes:
            return False
        return node.given(option)[self.table.axes.index(axis)].kind == "C"

    def _mean(self, node: Node, option: int, axis: str) -> bool:
        """Whether ranks of an axis each take a mean, so that their results are divided by their number."""
        return axis in self.table.axes and node.options[option][self.table.axes.index(axis)].local == "mean"

    def _whole(self, step: Step, value: Value) -> Array:
        """The size that a change is priced by: the value's, whole along the axis of the change; for an exchange, which
        never makes it whole, that of a rank's share."""
        part = step.row.forward == "all_to_all"
        split = [p.kind == "S" and (part or i != step.axis) for i, p in enumerate(step.before)]
        return self._cut(value.bytes, value.batch, split)

    def root(self, keep: Keep, placed: Placements) -> Array:
        values = self.table.nodes[keep.root].values
        return np.array([self.four(v, placed) for v in values]).sum(0)


def _kept(placed: Placements) -> Placements:
    return tuple(map(kept_as, placed))


def paths(chain: Chain) -> list[Path]:
    """The path to each step of a chain."""
    after = tuple(step.after for step in chain)
    return [after[: i + 1] for i in range(len(after))]


class Prices:
    """Seconds and bytes of everything in a table, for one data-parallel degree, micro-batch and way to train.

    forward, backward  seconds of every strategy and (`change_...`) every change of placement;  change_rerun: that a
                       change adds where its run is run again
    inner, memory      bytes kept per micro-batch: a strategy's own, and every kept memory
    results            bytes of what matrix products give, with what they keep
    state, sync        bytes of a parameter with gradient and optimizer states; seconds a step takes to sum its gradient
                       and to update it that nothing hides
    beside             seconds of the sum of its gradient that computing beside it can hide, in each of so many
                       backwards: `Training.backwards`
    gathered           bytes of a parameter and its gradient that exist only while it is used
    stepping           bytes that the optimizer makes while it steps a parameter
    """

    def __init__(self, sizes: Sizes, terms: Terms) -> None:
        self.sizes, self.terms = sizes, terms
        basis, device = terms.basis, terms.device
        self.made, self.inner = sizes.made @ basis, sizes.inner @ basis
        seconds = self._computed(sizes, basis, device)
        ranks = {axis: group.ranks for axis, group in terms.sizes.items()}
        divided = sizes.means @ [ranks.get("dp", 1) > 1, ranks.get("tp", 1) > 1]
        mean = stream_seconds(2 * self.made, sizes.grad, np.minimum(divided, 1.0), device)
        self.forward, self.backward = seconds.forward + mean.forward, seconds.backward + mean.backward
        self.product = sizes.product * seconds.forward

    @cached_property
    def results(self) -> Array:
        return self.sizes.product * (self.made + self.inner)

    @cached_property
    def memory(self) -> Array:
        return self.sizes.memory @ self.terms.basis

    @cached_property
    def after(self) -> Array:
        """Bytes that every change of placement makes."""
        return self.sizes.after @ self.terms.basis

    @cached_property
    def changes(self) -> Array:
        """[3, changes]: seconds forward, backward, and added where they are run again, which does what a change that
        gathers again does anyway."""
        nbytes = self.sizes.whole @ self.terms.basis
        found = np.zeros((3, len(nbytes)))
        for (axis, row, grad), where in self.sizes.kinds.items():
            group = self.terms.sizes[axis]
            if group.ranks > 1:
                forward, backward = row_seconds(row, nbytes[where], group, grad, self.terms.device)
                found[:, where] = forward, backward, 0.0 * forward if row.again else forward
        return found

    @property
    def change_forward(self) -> Array:
        return self.changes[0]

    @property
    def change_backward(self) -> Array:
        return self.changes[1]

    @property
    def change_rerun(self) -> Array:
        return self.changes[2]

    @cached_property
    def _holdings(self) -> Array:
        """[strategies, 7]: of a parameter its `parts`, `sync`, `gathered`, `stepping` and `beside`."""
        return np.array([self._holding(*row) for row in self.sizes.holdings.tolist()])[self.sizes.holds]

    def _holding(self, weight: float, grad: bool, over_dp: bool, over_tp: bool) -> tuple[float, ...]:
        training = self.terms.training
        if not weight:
            return (0.0,) * 7
        beside = self.terms.device.beside * training.beside_seconds(weight, over_dp)
        sync = training.sync_seconds(weight, over_dp) - training.backwards * beside
        sync += update_seconds(weight, grad, over_dp, training, self.terms.device)
        if over_tp:
            sync += training.partial_sync_seconds(weight, self.terms.sizes["tp"])
        gathered, stepping = training.gathered(weight, over_dp), training.stepping(weight, bool(grad), over_dp)
        return (*training.memory(weight, grad, over_dp), sync, gathered, stepping, beside)

    @property
    def parts(self) -> Array:
        """[strategies, 3]: bytes of a parameter, its gradient, its optimizer states."""
        return self._holdings[:, :3]

    @cached_property
    def state(self) -> Array:
        return self.parts.sum(1)

    @property
    def sync(self) -> Array:
        return self._holdings[:, 3]

    @property
    def gathered(self) -> Array:
        return self._holdings[:, 4]

    @property
    def stepping(self) -> Array:
        return self._holdings[:, 5]

    @property
    def beside(self) -> Array:
        return self._holdings[:, 6]

    @staticmethod
    def _computed(sizes: Sizes, basis: Array, device: Device) -> Seconds:
        """What the operators take under every strategy."""
        rest = sizes.rest.copy()
        rest[:, FOUR] *= basis[sizes.factors]
        rows = np.column_stack([sizes.flops @ basis, sizes.moved @ basis, sizes.peak, rest])
        found = work_seconds(work_in(rows), device)
        return Seconds(found.forward[sizes.which], found.backward[sizes.which])


@dataclass(frozen=True)
class Item:
    """What a stage pays once if it has any of the positions: seconds forward and backward, bytes kept per micro-batch,
    bytes of parameters, gradients and optimizer states, seconds of gradient sync, bytes of the largest tensor; bytes
    `entered` are what several blocks take, kept where one of them is run again; `stepping` as in Weighed."""

    positions: tuple[int, ...]
    forward: float = 0.0
    backward: float = 0.0
    kept: float = 0.0
    parts: tuple[float, float, float] = (0.0, 0.0, 0.0)
    sync: float = 0.0
    largest: float = 0.0
    entered: float = 0.0
    stepping: float = 0.0


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
class Weighed:
    """What a choice costs at every position, per micro-batch.

    forward, backward  seconds, nothing run again
    again              seconds of backward that each of MODES adds
    kept               bytes under each of MODES;  entered: of what the position alone takes, kept if it is run again
    wide               bytes by which all it keeps is more once it is run again: there, what is gathered again is whole
    parts              bytes of parameters, gradients and optimizer states
    sync, beside       seconds of gradient sync, a step, that nothing hides; that the backward of positions before can
                       hide, in each of `backwards` of a step
    largest            bytes of the largest tensor;  gathered: of parameters that exist only while they are used
    stepping           bytes that the optimizer makes for the parameters while it steps them, for all of them if they
                       are stepped `together`, else for the largest
    items              what stages pay once;  crossings: values that may be sent
    """

    forward: Array
    backward: Array
    again: Array
    kept: Array
    entered: Array
    wide: Array
    parts: Array
    sync: Array
    beside: Array
    largest: Array
    gathered: Array
    stepping: Array
    together: bool = False
    backwards: int = 1
    items: list[Item] = field(default_factory=list)
    crossings: list[Crossings] = field(default_factory=list)


def weigh(prices: Prices, chosen: Sequence[int], link: Link | None) -> Weighed:
    """Price a choice (the index of every node's option); `link` is the one between stages, None where there is one."""
    table = prices.sizes.table
    n = len(table.labels)
    at = prices.sizes.first[:-1] + np.array(chosen)
    forward, backward, entered, wide, sync, beside, largest, gathered, stepping = (np.zeros(n) for _ in range(9))
    again, kept, parts = (np.zeros((3, n)) for _ in range(3))
    training = prices.terms.training
    found = Weighed(
        forward, backward, again, kept, entered, wide, parts, sync, beside, largest, gathered, stepping,
        training.together, training.backwards,
    )  # fmt: skip
    _weigh_nodes(found, prices, at)
    _weigh_parameters(found, prices, at)
    for index, flow in enumerate(table.flows):
        _weigh_flow(found, prices, chosen, index, flow, link)
    for index, keep in enumerate(table.keeps):
        _weigh_keep(found, prices, chosen, index, keep)
    return found


def _weigh_nodes(found: Weighed, prices: Prices, at: NDArray[np.int_]) -> None:
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
        found.largest[positions] = prices.made[mine].max(initial=0.0)
    for index, places in table.shared.items():
        i = at[index]
        seconds = float(prices.forward[i]), float(prices.backward[i])
        for users in places:
            found.items.append(Item(users, *seconds, float(prices.inner[i]), largest=float(prices.made[i])))


def _weigh_parameters(found: Weighed, prices: Prices, at: NDArray[np.int_]) -> None:
    for index, places in prices.sizes.table.state.items():
        i = at[index]
        own, every = prices.sizes.holders[index]
        np.add.at(found.parts.T, own, prices.parts[i])
        np.add.at(found.sync, own, prices.sync[i])
        np.add.at(found.beside, own, prices.beside[i])
        (np.add if found.together else np.maximum).at(found.stepping, own, prices.stepping[i])
        np.add.at(found.gathered, every, prices.gathered[i])
        for positions in places if len(own) < len(places) else ():
            if len(positions) > 1:
                held, sync = prices.parts[i].tolist(), float(prices.sync[i] + found.backwards * prices.beside[i])
                stepping = float(prices.stepping[i])
                found.items.append(Item(positions, parts=tuple(held), sync=sync, stepping=stepping))


def _weigh_flow(
    found: Weighed, prices: Prices, chosen: Sequence[int], index: int, flow: Flow, link: Link | None
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
                found.items.append(Item(positions, forward, backward, largest=float(prices.after[i])))
            continue
        np.add.at(found.forward, at, forward)
        np.add.at(found.backward, at, backward)
        np.add.at(found.again.T, at, [0.0, rerun, rerun])
        np.maximum.at(found.largest, at, prices.after[i])
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
                    found.items.append(Item(enters, entered=held(placed)))
    else:
        blocks = outside & np.array(table.block)[users]
        np.add.at(found.entered, users[blocks], held(wants[flow.uses[0]] if summed else have))
    taken = next(wants[use] for use, inside in zip(flow.uses, flow.inside, strict=True) if not inside)
    found.crossings += _crossings(flow, held(taken if summed else have), value.grad, link)


def _crossings(flow: Flow, size: float, grad: bool, link: Link | None) -> Iterator[Crossings]:
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


def _weigh_keep(found: Weighed, prices: Prices, chosen: Sequence[int], index: int, keep: Keep) -> None:
    placed = {
        keeper: options[chosen[keep.root if keeper[1] == -2 else keeper[0]]]
        for keeper, options in zip(dict.fromkeys(keep.keepers), prices.sizes.keeps[index], strict=True)
    }
    _weigh_wide(found, prices, chosen, keep)
    for kind in dict.fromkeys(placed.values()):
        held = float(prices.memory[prices.sizes.kept[index, kind]])
        if not keep.several:
            np.add.at(found.kept[0], keep.first, held)
            continue
        for spots in keep.spots:
            positions = tuple(sorted({p for keeper, where in spots.items() if placed[keeper] == kind for p in where}))
            found.items.append(Item(positions, kept=held))


def _weigh_wide(found: Weighed, prices: Prices, chosen: Sequence[int], keep: Keep) -> None:
    """What of a memory is gathered again, at every position that does so once."""
    nodes, wide = prices.sizes.table.nodes, dict[int, Placements]()
    for i, (node, operand) in enumerate(keep.keepers):
        taken = nodes[node].taken(chosen[node], operand) if operand >= 0 else ()
        if G in taken:
            wide[i] = taken
    for places in keep.places if wide else ():
        for position, taken in {places[i]: taken for i, taken in wide.items()}.items():
            whole = tuple(R if p == G else p for p in taken)
            found.wide[position] += (prices.sizes.root(keep, whole) - prices.sizes.root(keep, _kept(taken))) @ (
                prices.terms.basis
            )
