"""Every plan of a small problem, looked at one way or another: the judge of the planner.

The space is written down once more, from the table and `position_costs` alone. A stage's choices are made one node
after the other; every partial choice is kept until another of the same kind (equal in all that nodes still to come can
see) is no worse in seconds and in every kind of byte. Choices of stages meet where they place alike what passes between
them. What is left out beyond that is slower than a plan already known, or above the limit of memory: all numbers only
grow.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from autopart.cost.liveness import MODES
from autopart.cost.offload import OFFLOADS
from autopart.cost.position_costs import (
    PerStageOnce,
    PositionCosts,
    _add_saved_tensor,
    _add_value,
    no_costs,
    position_costs,
)
from autopart.cost.prices import Prices
from autopart.hardware import DEVICES
from autopart.hardware.mesh import Mesh
from autopart.hardware.rows import Device, Host, Link
from autopart.ir.layered_graph import LayeredGraph
from autopart.passes.formulate import _Builder, formulate
from autopart.passes.source import Source
from autopart.planner.candidate import SearchResult
from autopart.planner.ilp_model import Model
from autopart.planner.request import Request
from autopart.planner.search_points import SearchPoint
from autopart.planner.search_space import SearchSpace
from autopart.sharding.strategy_table import StrategyTable

Array = NDArray[np.float64]
Whole = NDArray[np.int64]
NEVER = float("inf")
EQUAL = 1e-9
"""Relative difference below which two times are the same."""
LARGEST = 10_000
"""Arrows of a graph at most."""
TIED = 20
"""From this model on, layers share parameters, and some values are made by every stage for itself."""
SHARED = 10
"""Problems that share a model."""
REFERENCES = 12
"""Choices of a kind that all others of it are held against."""


# ---- random problems --------------------------------------------------------------------------------------


class Block(nn.Module):
    """A few operators in a row, the last of them perhaps added to what went in."""

    def __init__(self, kinds: Sequence[str], width: int, bias: bool, residual: bool) -> None:
        super().__init__()
        self.kinds, self.residual = kinds, residual
        self.steps = nn.ModuleDict()
        for i, kind in enumerate(kinds):
            if kind == "linear":
                self.steps[f"s{i}"] = nn.Linear(width, width, bias=bias)
            elif kind == "norm":
                self.steps[f"s{i}"] = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = x
        for i, kind in enumerate(self.kinds):
            if kind in ("linear", "norm"):
                x = self.steps[f"s{i}"](x)
            elif kind == "matmul":
                x = torch.matmul(x, x.transpose(-2, -1)) @ x if x.dim() > 2 else x * x
            else:
                x = {"relu": F.relu, "gelu": F.gelu, "softmax": lambda t: t.softmax(-1)}[kind](x)
        return x + before if self.residual else x


class Small(nn.Module):
    """A random model of few operators, some of them numbered blocks."""

    def __init__(self, draw: random.Random, tied: bool) -> None:
        super().__init__()
        self.tied, self.free = tied, tied and draw.random() < 0.5
        width = draw.choice([2, 4, 8])
        self.words = 8 if draw.random() < 0.3 else 0
        self.width, self.tokens = width, draw.choice([0, 0, 2, 4])
        self.embed = nn.Embedding(self.words, width) if self.words else None
        self.first = nn.Linear(width, width, bias=draw.random() < 0.5) if draw.random() < 0.3 else None
        blocks = draw.choice([0, 1, 2, 2, 3, 3])
        kinds, bias, residual = self._kinds(draw), draw.random() < 0.3, draw.random() < 0.4
        made = []
        for _ in range(blocks):
            if draw.random() < 0.15:
                kinds = self._kinds(draw)
            made.append(Block(kinds, width, bias, residual))
        self.layers = nn.ModuleList(made)
        self.head = (
            nn.Linear(width, draw.choice([2, 4]), bias=draw.random() < 0.3) if draw.random() < 0.6 or not made else None
        )
        self.out = self.head.out_features if self.head else width
        if tied and self.embed is not None:
            self.head = nn.Linear(width, self.words, bias=False)
            self.head.weight, self.out = self.embed.weight, self.words
        elif tied and self.head is not None:
            self.head = self.first = nn.Linear(width, width, bias=draw.random() < 0.3)
            self.out = width

    def _kinds(self, draw: random.Random) -> list[str]:
        first = draw.choice(["linear", "linear", "norm", "linear"])
        return [
            first,
            *draw.choices(["relu", "gelu", "norm", "softmax", "matmul", "linear"], k=draw.choice([0, 1, 1, 2])),
        ]

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.embed is not None:
            x = self.embed(x)
        if self.first is not None:
            x = self.first(x)
        mask = torch.arange(self.width).cos() if self.free else None
        for layer in self.layers:
            x = layer(x if mask is None else x * mask)
        if self.head is not None:
            x = self.head(x)
        return F.mse_loss(x, target)

    def batch(self, samples: int) -> dict[str, torch.Tensor]:
        """Samples for it."""
        shape = (samples, self.tokens) if self.tokens else (samples,)
        x = torch.zeros(shape, dtype=torch.long) if self.words else torch.zeros(*shape, self.width)
        return {"x": x, "target": torch.zeros(*shape, self.out)}


@dataclass(frozen=True)
class Problem:
    """A model traced, a mesh, and what is asked for."""

    space: SearchSpace
    seed: int


@lru_cache(maxsize=8)
def traced(seed: int, samples: int) -> LayeredGraph:
    """A random model, traced; the same for the same seed. Those with too many choices are passed over."""
    for number in itertools.count(seed, 1000):
        torch.manual_seed(number)
        model = Small(random.Random(number), tied=seed >= TIED)
        layered = Source(model, model.batch(samples), torch.float32).sampled(samples, Mesh.parse("1:cpu"))
        looked_at = Model(formulate(layered, DEVICES["cpu"], 2))
        try:
            Structure(looked_at.table, looked_at.interface_values).graph(True)
        except TooLarge:
            continue
        return layered
    raise AssertionError


def problem(seed: int) -> Problem:
    """A random problem; the same for the same seed."""
    draw = random.Random(seed)
    size = draw.choice([1, 2, 2, 3, 4, 4])
    rate, bandwidth = 10 ** draw.uniform(3, 7), 10 ** draw.uniform(5, 9)
    memory = 10 ** draw.uniform(2.8, 4.8)
    device = Device("random", {"float32": rate}, int(memory), bandwidth, 10 ** draw.uniform(-7, -4), "link", "test")
    link = Link("link", 10 ** draw.uniform(4, 8), 10 ** draw.uniform(-7, -4), "test")
    mesh = Mesh(1, size, device, link, link)
    batch = draw.choice([1, 2, 2, 3, 4, 4, 6, 8, 8])
    asked: dict[str, Any] = {}
    if draw.random() < 0.25:
        places = len(traced(seed // SHARED, min(2, batch)).labels)
        asked["pp"] = draw.choice([d for d in (1, 2, 3, 4) if size % d == 0 and d <= places])
    if draw.random() < 0.2:
        asked["recompute"] = draw.choice(MODES)
    if draw.random() < 0.2:
        asked["zero"] = draw.choice([0, 1, 2, 3])
    if draw.random() < 0.1:
        asked["schedule"] = "gpipe"
    if draw.random() < 0.1 and seed // SHARED >= TIED and "pp" not in asked:
        asked["tp"] = draw.choice([d for d in (1, 2, 4) if size % d == 0])
    optimizer = draw.choice(["sgd", "momentum", "adamw"])
    if draw.random() < 0.25:
        asked["master"] = "float64"
    if draw.random() < 0.2:  # the optimizer's step has a price then
        mesh = replace(mesh, device=replace(device, silicon=DEVICES["h100-80gb"].silicon))
    mesh = replace(mesh, device=replace(mesh.device, overlap=draw.choice([0.0, None, 1.0])))
    draw = random.Random(f"host {seed}")
    if draw.random() < 0.5:  # the optimizer's states may lie there
        host = Host(2**60, 10 ** draw.uniform(4, 8), 10 ** draw.uniform(4, 8), "test")
        mesh = replace(mesh, device=replace(mesh.device, host=host))
        asked |= {"offload": "optimizer"} if draw.random() < 0.1 else {}
    draw = random.Random(f"hosts {seed}")
    if size == 4 and draw.random() < 0.7:  # ZeRO may divide among the ranks of a host
        far = Link("far", 10 ** draw.uniform(4, 8), 10 ** draw.uniform(-7, -3), "test")
        per_host = draw.choice([1, 2])
        mesh = replace(mesh, hosts=4 // per_host, devices_per_host=per_host, inter=far)
    draw = random.Random(f"pods {seed}")
    if mesh.hosts > 1 and draw.random() < 0.5:
        mesh = replace(mesh, hosts_per_pod=mesh.hosts // 2, oversubscription=10 ** draw.uniform(0, 3))
    request = Request(batch, optimizer=optimizer, exact=True, prefetch=0, **asked).check(mesh)
    return Problem(SearchSpace(traced(seed // SHARED, min(2, batch)), mesh, request), seed)


def whole(space: SearchSpace) -> SearchSpace:
    """The same space, with every change of placement that there is: the planner leaves out some that bring nothing."""
    found = SearchSpace(space.layered, space.mesh, space.request)
    with mock.patch.object(_Builder, "_drop_reshards_before_view", lambda self, used: None):
        for point in space.points():
            found.model(point)
    return found


# ---- what is decided together -----------------------------------------------------------------------------


@dataclass
class Factor:
    """Nodes that are priced together.

    kind, index   what it is: a node, a value with its uses, a saved tensor, or a value that all stages place alike
    members       the nodes;  seen: for every member, a number for each of its options: equal, equal for the price
    """

    kind: str
    index: int
    members: list[int]
    seen: list[Whole]

    def code(self, chosen: Whole) -> Whole:
        """One number for what it sees of each row of choices."""
        total = np.zeros(len(chosen), dtype=np.int64)
        for node, seen in zip(self.members, self.seen, strict=True):
            total = total * (int(seen.max()) + 1) + seen[chosen[:, node]]
        return total


def _numbered(things: Sequence[object]) -> Whole:
    known: dict[object, int] = {}
    return np.array([known.setdefault(t, len(known)) for t in things], dtype=np.int64)


class Structure:
    """A table's factors, the pairs of options that go together, and an order to decide in."""

    def __init__(self, table: StrategyTable, interface: Sequence[tuple[int, int]]) -> None:
        self.table = table
        nodes = table.nodes
        self.factors: list[Factor] = [Factor("node", i, [i], [np.arange(len(n.options))]) for i, n in enumerate(nodes)]
        self.pairs: dict[tuple[int, int], NDArray[np.bool_]] = {}
        for index, used in enumerate(table.value_uses):
            self._flow(index)
            give = [nodes[used.source].given(o, used.output) for o in range(len(nodes[used.source].options))]
            for node, operand in used.uses:
                take = [nodes[node].taken(o, operand) for o in range(len(nodes[node].options))]
                self._pair(used.source, node, np.array([[(h, w) in used.chains for w in take] for h in give]))
        for tied in table.tied:
            for node in tied[1:]:
                self._pair(tied[0], node, np.eye(len(nodes[node].options), dtype=bool))
        for index, tensor in enumerate(table.saved_tensors):
            who = list(dict.fromkeys([tensor.root if o == -2 else n for n, o in tensor.savers]))
            seen = []
            for node in who:
                parts = []
                for n, o in tensor.savers:
                    if (tensor.root if o == -2 else n) == node:
                        parts.append(_kinds(table, tensor.root, n, o))
                seen.append(_numbered(list(zip(*parts, strict=True))))
            self.factors.append(Factor("saved", index, who, seen))
        self.interface = list(interface)
        for number, (node, output) in enumerate(interface):
            given = _numbered([nodes[node].given(o, output) for o in range(len(nodes[node].options))])
            self.factors.append(Factor("interface", number, [node], [given]))
        self.order = self._order()
        self.graphs: dict[bool, Graph] = {}

    def graph(self, alike: bool) -> Graph:
        """All ways to decide; with `alike`, told apart by what stages have to agree on."""
        if alike not in self.graphs:
            self.graphs[alike] = Graph(self, alike)
        return self.graphs[alike]

    def _flow(self, index: int) -> None:
        used, nodes = self.table.value_uses[index], self.table.nodes
        who = list(dict.fromkeys([used.source, *(n for n, _ in used.uses)]))
        seen = []
        for node in who:
            options = range(len(nodes[node].options))
            parts: list[list[object]] = [[] for _ in options]
            for o in options:
                if node == used.source:
                    parts[o].append(nodes[node].given(o, used.output))
                parts[o] += [nodes[node].taken(o, operand) for n, operand in used.uses if n == node]
            seen.append(_numbered([tuple(p) for p in parts]))
        self.factors.append(Factor("value", index, who, seen))
        outside = [u for u, inside in zip(used.uses, used.inside, strict=True) if not inside]
        summed = any(
            p.kind == "P"
            for o in range(len(nodes[used.source].options))
            for p in nodes[used.source].given(o, used.output)
        )
        if summed and outside and max(used.producers) >= 0:
            self.factors.append(Factor("wanted", index, who, seen))

    def _pair(self, one: int, other: int, allowed: NDArray[np.bool_]) -> None:
        for a, b, table in ((one, other, allowed), (other, one, allowed.T)):
            self.pairs[a, b] = self.pairs[a, b] & table if (a, b) in self.pairs else table

    def _order(self) -> list[int]:
        """Operators in order, each with what it reads right before it."""
        order: dict[int, None] = {}
        for i, node in enumerate(self.table.nodes):
            if node.kind in ("op", "end"):
                order.update(dict.fromkeys(o[0] for o in node.operands if o))
                order.update(dict.fromkeys(f.source for f in self.table.value_uses if any(n == i for n, _ in f.uses)))
                order[i] = None
        order.update(dict.fromkeys(range(len(self.table.nodes))))
        return list(order)

    def summed_alike(self, index: int, chosen: Sequence[int]) -> bool:
        """Whether all uses of a partial sum outside of the run that makes it take it alike."""
        used, nodes = self.table.value_uses[index], self.table.nodes
        if not any(p.kind == "P" for p in nodes[used.source].given(chosen[used.source], used.output)):
            return True
        wants = {
            nodes[n].taken(chosen[n], operand)
            for (n, operand), inside in zip(used.uses, used.inside, strict=True)
            if not inside
        }
        return len(wants) < 2

    def placed_alike(self, chosen: Sequence[int]) -> tuple[object, ...]:
        """What all stages have to agree on: placements, and how what is summed is taken."""
        nodes = self.table.nodes
        placed: list[object] = [nodes[n].given(chosen[n], output) for n, output in self.interface]
        for factor in self.factors:
            if factor.kind == "wanted":
                used = self.table.value_uses[factor.index]
                have = nodes[used.source].given(chosen[used.source], used.output)
                user, operand = next(u for u, inside in zip(used.uses, used.inside, strict=True) if not inside)
                placed.append(nodes[user].taken(chosen[user], operand) if any(p.kind == "P" for p in have) else None)
        return tuple(placed)


def _kinds(table: StrategyTable, root: int, node: int, operand: int) -> list[object]:
    """Where memory lies as a keeper keeps it, under each of its options: split or not, along each axis."""
    held = table.nodes[root if operand == -2 else node]
    options = range(len(held.options))
    placed = [held.given(o) if operand < 0 else held.taken(o, operand) for o in options]
    return [tuple(p.kind == "S" for p in row) for row in placed]


@dataclass
class Layer:
    """One node is decided: every arrow leads from a state to one after it.

    parent, child, option   of every arrow;  closing: (factor, which of its combinations) of what is known then
    """

    node: int
    parent: Whole
    child: Whole
    option: Whole
    closing: list[tuple[int, Whole]]
    states: int


class TooLarge(Exception):
    """There are more choices than are looked at."""


class Graph:
    """All choices as paths: a state is what nodes still to come can see of those that are decided.

    combinations   of every factor, one row of choices for each
    """

    def __init__(self, structure: Structure, alike: bool) -> None:
        self.structure = structure
        self.combinations: list[Whole] = [np.zeros((0, 0))] * len(structure.factors)
        self.layers: list[Layer] = []
        nodes = structure.table.nodes
        left = {
            f: set(factor.members)
            for f, factor in enumerate(structure.factors)
            if alike or factor.kind not in ("interface", "wanted")
        }
        chosen, done = np.zeros((1, len(nodes)), dtype=np.int64), set[int]()
        for node in structure.order:
            if sum(len(layer.parent) for layer in self.layers) > LARGEST:
                raise TooLarge
            parent = np.repeat(np.arange(len(chosen)), len(nodes[node].options))
            option = np.tile(np.arange(len(nodes[node].options)), len(chosen))
            allowed = self._allowed(node, done, chosen[parent], option)
            parent, option = parent[allowed], option[allowed]
            rows = chosen[parent]
            rows[:, node] = option
            done.add(node)
            closing = []
            for f in [f for f, members in left.items() if members <= done]:
                factor = structure.factors[f]
                if factor.kind in ("interface", "wanted"):
                    continue
                del left[f]
                _, first, which = np.unique(factor.code(rows), return_index=True, return_inverse=True)
                combinations = rows[first]
                self.combinations[f] = combinations
                if factor.kind == "value":
                    good = np.array([structure.summed_alike(factor.index, c) for c in combinations.tolist()])[which]
                    parent, option, rows, which = parent[good], option[good], rows[good], which[good]
                    closing = [(other, w[good]) for other, w in closing]
                closing.append((f, which))
            key = self._key(rows, done, left)
            _, first, child = np.unique(key, return_index=True, return_inverse=True)
            self.layers.append(Layer(node, parent, child, option, closing, len(chosen)))
            chosen = rows[first]
        self.last = chosen

    def _allowed(self, node: int, done: set[int], chosen: Whole, option: Whole) -> NDArray[np.bool_]:
        allowed = np.ones(len(option), dtype=bool)
        for (one, other), table in self.structure.pairs.items():
            if other == node and (one in done or one == node):
                allowed &= table[option if one == node else chosen[:, one], option]
        return allowed

    def _key(self, rows: Whole, done: set[int], left: dict[int, set[int]]) -> Whole:
        """A number for what nodes still to come see of each row."""
        seen: dict[int, list[Whole]] = {}
        for f in left:
            factor = self.structure.factors[f]
            for member, numbers in zip(factor.members, factor.seen, strict=True):
                seen.setdefault(member, []).append(numbers)
        for (one, other), table in self.structure.pairs.items():
            if other not in done:
                seen.setdefault(one, []).append(_numbered([row.tobytes() for row in table]))
        key = np.zeros(len(rows), dtype=np.int64)
        for node, many in seen.items():
            if node in done:
                merged = _numbered([tuple(column) for column in np.stack(many, 1).tolist()])
                _, key = np.unique(key * (int(merged.max()) + 1) + merged[rows[:, node]], return_inverse=True)
        return key


# ---- what it costs ----------------------------------------------------------------------------------------


@dataclass
class Atom:
    """What one combination adds: (field, position) -> number, and what is paid once."""

    each: Array
    per_stage: list[PerStageOnce]
    crossings: list[Any]


class Priced:
    """A table at one point: what every combination that factors see adds."""

    def __init__(self, space: SearchSpace, structure: Structure, point: SearchPoint) -> None:
        self.space, self.structure, self.point = space, structure, point
        self.table = structure.table
        self.prices: Prices = space.priced(point)
        self.m = space.micro_batches(point)
        assert space.training(point).foreach, "what optimizers make is summed here"
        self.amortization = space.amortization(point)
        self.share = space.training(point).backwards / self.amortization
        self.n = len(self.table.labels)
        self.known: dict[tuple[bool, int], list[Atom]] = {}

    def atoms(self, alike: bool, factor: int) -> list[Atom]:
        """What each combination of a factor costs."""
        if (alike, factor) not in self.known:
            combinations = self.structure.graph(alike).combinations[factor].tolist()
            self.known[alike, factor] = [self._atom(self.structure.factors[factor], c) for c in combinations]
        return self.known[alike, factor]

    def _atom(self, factor: Factor, chosen: Sequence[int]) -> Atom:
        found = no_costs(self.prices)
        if factor.kind == "node":
            self._node(found, factor.index, chosen[factor.index])
        elif factor.kind == "value":
            used = self.table.value_uses[factor.index]
            _add_value(found, self.prices, chosen, factor.index, used, self.space.between_stages(self.point))
        elif factor.kind == "saved":
            _add_saved_tensor(found, self.prices, chosen, factor.index, self.table.saved_tensors[factor.index])
        return self.atom(found)

    def atom(self, found: PositionCosts) -> Atom:
        """The numbers that count of what is weighed."""
        each = np.stack([
            found.forward + found.backward + found.sync_seconds / self.amortization,
            self.share * found.overlappable_seconds,
            self.share * found.backward * self.prices.overlappable_seconds.any(), *found.recompute_seconds[1:],
            *found.saved_bytes[:-1], found.block_input_bytes, found.state_bytes.sum(0), found.largest_gradient,
            *found.backward_bytes, *found.reduced_bytes, found.optimizer_workspace, found.state_bytes[1],
            found.regathered_bytes, *found.reused_bytes[1:-1],
        ])  # fmt: skip
        return Atom(each, found.per_stage, found.crossings)

    def _node(self, found: PositionCosts, index: int, option: int) -> None:
        node, prices = self.table.nodes[index], self.prices
        i = int(prices.sizes.first[index]) + option
        for p in range(self.n) if node.segment_class >= 0 else ():
            if self.table.segment_classes[p] == node.segment_class:
                found.forward[p] += prices.forward[i]
                found.backward[p] += prices.backward[i]
                found.saved_bytes[0][p] += prices.inner[i]
                for mode in range(1, len(MODES)):
                    if self.table.rerun[mode, index]:
                        found.recompute_seconds[mode][p] += prices.forward[i]
                    else:
                        found.saved_bytes[mode][p] += prices.inner[i]
                        found.reused_bytes[mode][p] += prices.inner[i]
                    if self.table.saved[mode, index]:
                        found.saved_bytes[mode][p] += prices.output_bytes[i]
                found.largest_gradient[p] = max(found.largest_gradient[p], prices.largest_gradient[i])
                found.backward_bytes[:, p] = np.maximum(found.backward_bytes[:, p], prices.backward_bytes[:, i])
        for users in self.table.shared.get(index, ()):
            seconds = float(prices.forward[i]), float(prices.backward[i])
            found.per_stage.append(
                PerStageOnce(
                    users, *seconds, float(prices.inner[i]), largest_gradient=float(prices.backward_bytes[1, i] / 2)
                )
            )
        for users in self.table.state.get(index, ()):
            summed = float(prices.reduced_bytes[i])
            found.reduced_bytes[0, list(users)] += summed
            found.reduced_bytes[1, list(users)] = np.maximum(found.reduced_bytes[1, list(users)], summed)
            if len(users) == 1:
                found.reduced_bytes[2, users[0]] += summed
                found.state_bytes[:, users[0]] += prices.state_bytes[i]
                found.optimizer_workspace[users[0]] += prices.optimizer_workspace[i]
                found.sync_seconds[users[0]] += prices.sync_seconds[i]
                found.overlappable_seconds[users[0]] += prices.overlappable_seconds[i]
            else:
                held, stepping = tuple(prices.state_bytes[i].tolist()), float(prices.optimizer_workspace[i])
                sync = float(prices.sync_seconds[i] + self.amortization * self.share * prices.overlappable_seconds[i])
                waiting = float(prices.pending_grad_bytes[i])
                found.per_stage.append(
                    PerStageOnce(
                        users,
                        state_bytes=held,
                        sync_seconds=sync,
                        optimizer_workspace=stepping,
                        reduced_bytes=summed,
                        pending_grad_bytes=waiting,
                    )
                )


@dataclass(frozen=True)
class Span:
    """A stage: positions i..j-1, with so many micro-batches in flight, on devices of a kind (`SearchPoint.kind`)."""

    i: int
    j: int
    in_flight: int
    kind: int = 0


PER_BLOCK = 10


class Totals:
    """What a stage costs, from what its combinations add, in columns: bytes before backward, what several blocks take,
    state with what the optimizer makes while it steps, state, parameters whose gradients ranks sum, gradients that wait
    for those of an earlier position, what several positions keep, the largest tensor of what stages make for
    themselves; at every position the largest gradient, those of an operator's backward, a step's first and others, the
    largest parameter whose gradient ranks sum, bytes of all such, kept if it is no block, gradients that were not there
    before backward, seconds of the stage if the link is busy from the end of the position's backward until the
    gradients of all before it have come; then for every block (`PER_BLOCK` columns): seconds of what modes run again;
    bytes that it keeps whole, that modes save of its results, that it takes, that are more than whole once it is run
    again, and that are whole besides what modes reuse."""

    def __init__(self, priced: Priced, span: Span) -> None:
        self.priced, self.span = priced, span
        self.positions = range(span.i, span.j)
        self.blocks = [p for p in self.positions if priced.table.block[p]]
        self.plain = [p - span.i for p in self.positions if not priced.table.block[p]]
        self.count = len(self.positions)
        self.training = priced.prices.terms.training
        self.single_parameter = priced.prices.sizes.single_parameter[span.i : span.j]
        places = itertools.chain.from_iterable(priced.table.state.values())
        shared = [[p for p in users if p in self.positions] for users in places]
        self.last = max((p for inside in shared if len(inside) > 1 for p in inside), default=span.i)
        self.largest_gradient, self.at = slice(7, 8 + 4 * self.count), 8 + 8 * self.count
        self.times = slice(8 + 7 * self.count, self.at)
        self.begins = span.in_flight == priced.m
        self.backwards = [True, False][: span.in_flight] if self.begins else [False]
        self.seconds_at = 8 + 5 * self.count + len(self.backwards) * (3 * self.count + 2)

    def of(self, atoms: Sequence[Atom]) -> Array:
        """The columns of every atom."""
        span = self.span
        each = np.stack([a.each[:, span.i : span.j] for a in atoms])
        time, beside, hides, *each_mode = each.transpose(1, 0, 2)
        again, (kept, *results, entered, state), rest = each_mode[:3], each_mode[3:8], each_mode[8:]
        largest, begun, others, summed, most, own, stepping, gradients, wide, *reused = rest
        numbers = np.zeros((len(atoms), self.at))
        gradients = gradients * self.begins
        numbers[:, 0] = (state - gradients).sum(1) + span.in_flight * kept[:, self.plain].sum(1)
        numbers[:, 2:5] = np.stack([state + stepping, state, own]).sum(2).T
        plain = np.zeros(kept.shape)
        plain[:, self.plain] = kept[:, self.plain]
        times = time.sum(1)[:, None] + beside.cumsum(1) - (hides.cumsum(1) - hides)
        numbers[:, 8:] = np.concatenate([largest, begun, others, most, summed, plain, gradients, times], 1)
        for row, atom in zip(numbers, atoms, strict=True):
            self._once(row, atom)
        blocks = [p - span.i for p in self.blocks]
        columns = [*again, kept, *results, entered, wide, *(kept - each for each in reused)]
        rerun = np.stack(columns, 2)[:, blocks].reshape(len(atoms), -1)
        return np.concatenate([numbers, rerun], 1)

    def _once(self, row: Array, atom: Atom) -> None:
        """What a stage pays once, and what it sends and receives."""
        span, m = self.span, self.priced.m
        for item in atom.per_stage:
            if any(span.i <= p < span.j for p in item.positions):
                row[self.times] += item.forward + item.backward + item.sync_seconds / self.priced.amortization
                row[0] += sum(item.state_bytes) + span.in_flight * item.saved_bytes
                row[1] += span.in_flight * item.block_input_bytes
                row[2:5] += sum(item.state_bytes) + item.optimizer_workspace, sum(item.state_bytes), item.reduced_bytes
                row[6] += item.saved_bytes
                row[7] = max(row[7], item.largest_gradient)
                inside = {*item.positions}.intersection(self.positions)
                row[5] += item.pending_grad_bytes * (len(inside) > 1)
                for p in inside:
                    for k, size in enumerate((1, 2, 2)):
                        at = 8 + k * self.count + p - span.i
                        row[at] = max(row[at], size * item.largest_gradient)
        for many in atom.crossings:
            pairs = list(zip(many.producers.tolist(), many.consumers.tolist(), strict=True))
            for values in [pairs] if many.one else [[pair] for pair in pairs]:
                home, users = values[0][0], [user for _, user in values]
                gives = span.i <= home < span.j <= max(users)
                takes = home < span.i and any(span.i <= p < span.j for p in users)
                row[self.times] += (gives + takes) * many.seconds
                row[0] += takes * many.size * (m > span.in_flight)
                saved = any(span.i <= p < span.j for p in many.consumers[many.saves].tolist() if p in users)
                row[0] += takes * (not saved) * many.size * span.in_flight
                row[6] += takes * (not saved) * many.size

    def block(self, numbers: Array, b: int) -> Array:
        """The columns of a block."""
        return numbers[:, self.at + PER_BLOCK * b :][:, :PER_BLOCK]

    def add(self, total: Array, more: Array) -> Array:
        """Sums, and the largest of the largest."""
        both = total + more
        both[:, self.largest_gradient] = np.maximum(total[:, self.largest_gradient], more[:, self.largest_gradient])
        return both

    def under(self, numbers: Array, modes: Whole) -> Array:
        """Seconds, bytes before backward, the next six columns of `numbers`; of every position the largest tensor, the
        largest parameter whose gradient ranks sum, bytes of all such; for every of `backwards` all that are there
        besides at every position right after its second run, in its backward, and while ranks sum its gradients, all
        besides what stages make for themselves, and all before it; and seconds as in `times`: of every row under its
        own modes. More of anything is no column less."""
        count = self.count
        found = np.zeros((len(numbers), self.seconds_at + count))
        base, before = 8 + 5 * count, self.blocks[0] - self.span.i if self.blocks else 0
        found[:, 1], found[:, 2:base] = numbers[:, 0], numbers[:, 2:base]
        times, alike = numbers[:, self.times].copy(), (modes == modes[:, :1]).all(1)
        rows, of_blocks, several = np.arange(len(numbers)), np.zeros(len(numbers)), numbers[:, 1] * (modes > 0).any(1)
        rerun, in_backward, leaves = np.zeros((3, len(numbers), count))
        for b in range(len(self.blocks)):
            *again, kept, selective, mincut, entered, wide, besides, besides_cut = self.block(numbers, b).T
            mode, place = modes[:, b], self.blocks[b] - self.span.i
            times += np.stack([0.0 * kept, *again])[mode, rows][:, None]
            holds = np.stack([kept, selective + entered, mincut + entered, entered])[mode, rows]
            of_blocks += holds
            all_again = kept + wide
            rerun[:, place] = np.stack([0.0 * kept, besides + wide, besides_cut + wide, all_again])[mode, rows]
            in_backward[:, place] = np.stack([0.0 * kept, all_again - selective, all_again - mincut, all_again])[
                mode, rows
            ]
            leaves[:, place] = holds * alike
        found[:, 0], found[:, self.seconds_at :] = times.max(1), times
        found[:, 1] += several + self.span.in_flight * of_blocks
        plain, gradients = np.split(numbers[:, base : base + 2 * count], 2, axis=1)
        later = (plain + leaves)[:, ::-1].cumsum(1)[:, ::-1] - plain - leaves
        one = (plain.sum(1) + of_blocks + numbers[:, 6] + several / self.span.in_flight)[:, None]
        for k, first in enumerate(self.backwards):
            come = gradients[:, ::-1].cumsum(1)[:, ::-1] if first else gradients.sum(1, keepdims=True)
            held = found[:, 1:2] - (one if self.begins and not first else 0.0)
            there, at = held - later + come, base + k * (3 * count + 2)
            there[:, :before] -= (of_blocks * ~alike)[:, None]
            there[:, : max(self.last - self.span.i, 0)] += numbers[:, 5:6]
            moments = np.concatenate([there + rerun, there + in_backward, there], 1)
            found[:, at : at + 3 * count] = moments
            found[:, at + 3 * count] = held[:, 0] - plain.sum(1) - of_blocks + gradients.sum(1)
            found[:, at + 3 * count + 1] = held[:, 0] + (0.0 if first else gradients.sum(1))
        return found

    def bytes(self, found: Array) -> Array:
        """Bytes on a rank, of what `under` gives."""
        count, training = self.count, self.training
        largest, begun, others, most, summed = np.split(found[:, 8 : 8 + 5 * count], 5, axis=1)
        each = [
            found[:, 1],
            found[:, 2],
            found[:, 3] + training.end_of_step_workspace(found[:, 4], most.max(1, initial=0.0)),
        ]
        gathered, summing = (
            training.gathered_bytes(summed),
            training.grad_reduce_workspace(summed, most, self.single_parameter),
        )
        for k, first in enumerate(self.backwards):
            there = found[:, 8 + 5 * count + k * (3 * count + 2) :][:, : 3 * count + 2]
            gradients = [largest + gathered, (begun if first else others) + gathered, largest + summing]
            moments = there[:, :-2] + np.concatenate(gradients, 1)
            each += [moments.max(1, initial=0.0), there[:, -2] + 2 * found[:, 7], there[:, -1]]
        return np.maximum.reduce(each)

    def least_bytes(self, found: Array, ahead: Array) -> Array:
        """Bytes on a rank at least, if so many are still to come: nothing is gone when the first backward starts, and
        of what its position makes there are a largest tensor and its parameters, where it gathers them."""
        largest, summed = (found[:, 7 + k * self.count] for k in (1, 5))
        moment = (largest + self.training.gathered_bytes(summed)) * (self.priced.m > 1)
        return np.maximum(self.bytes(found), found[:, 1] + ahead + moment)


class Stage:
    """One stage's graph with what its arrows add, and what is still to come at least: seconds, and bytes."""

    def __init__(self, priced: Priced, span: Span, modes: Sequence[int], alike: bool) -> None:
        self.totals, self.modes, self.alike = Totals(priced, span), modes, alike
        self.priced, self.graph = priced, priced.structure.graph(alike)
        columns = {f: self.totals.of(priced.atoms(alike, f)) for layer in self.graph.layers for f, _ in layer.closing}
        self.arrows: list[Array] = []
        for layer in self.graph.layers:
            more = np.zeros((len(layer.parent), self.totals.at + PER_BLOCK * len(self.totals.blocks)))
            for f, which in layer.closing:
                more = self.totals.add(more, columns[f][which])
            self.arrows.append(more)
        ahead = np.zeros((len(self.graph.last), self.totals.count + 1))
        self.ahead = [ahead]
        for layer, more in zip(reversed(self.graph.layers), reversed(self.arrows), strict=True):
            least = self._least(more) + ahead[layer.child]
            ahead = np.full((layer.states, self.totals.count + 1), NEVER)
            np.minimum.at(ahead, layer.parent, least)
            self.ahead.insert(0, ahead)

    def _least(self, more: Array) -> Array:
        """Seconds, as in `Totals.times`, and bytes that arrows add at least, whatever blocks do."""
        blocks = len(self.totals.blocks)
        seconds, held = more[:, self.totals.times].copy(), more[:, 0].copy()
        for b in range(blocks):
            *again, kept, selective, mincut, entered, _, _, _ = self.totals.block(more, b).T
            seconds += np.min([[0.0 * kept, *again][m] for m in self.modes], axis=0)[:, None]
            by_mode = kept, selective + entered, mincut + entered, entered
            held += self.totals.span.in_flight * np.min([by_mode[m] for m in self.modes], axis=0)
        return np.column_stack([seconds, held])

    @property
    def least(self) -> float:
        """Seconds of the stage at least, with memory without end."""
        return float(self.ahead[0][0, :-1].max())

    def choices(self, most: float, limit: float) -> Rows:
        """The choices of at most so many seconds and bytes that none beats."""
        totals, graph = self.totals, self.graph
        start = np.array(list(itertools.product(self.modes, repeat=len(totals.blocks))), dtype=np.int64)
        count = len(start)
        rows = Rows(
            np.zeros(count, dtype=np.int64),
            np.zeros((count, len(graph.structure.table.nodes)), dtype=np.int64),
            start.reshape(count, -1),
            np.zeros((count, totals.at + PER_BLOCK * len(totals.blocks))),
        )
        for number, (layer, more) in enumerate(zip(graph.layers, self.arrows, strict=True)):
            order = np.argsort(layer.parent, kind="stable")
            first = np.searchsorted(layer.parent[order], np.arange(layer.states + 1))
            many = first[rows.state + 1] - first[rows.state]
            repeat = np.repeat(np.arange(len(rows.state)), many)
            offset = np.arange(len(repeat)) - np.repeat(np.cumsum(many) - many, many)
            arrow = order[first[rows.state[repeat]] + offset]
            rows = rows.pick(repeat)
            rows.state = layer.child[arrow]
            rows.chosen[:, layer.node] = layer.option[arrow]
            rows.numbers = totals.add(rows.numbers, more[arrow])
            found, ahead = totals.under(rows.numbers, rows.modes), self.ahead[number + 1][rows.state]
            seconds = (found[:, -totals.count :] + ahead[:, :-1]).max(1)
            fits = (seconds <= most) & (totals.least_bytes(found, ahead[:, -1]) <= limit)
            rows, found = rows.pick(fits), found[fits]
            if not len(rows.state):
                break
            rows = _unbeaten(rows, found)
        return rows


@dataclass
class Rows:
    """Partial choices: the state each has led to, the option of every node, the mode of every block, the columns."""

    state: Whole
    chosen: Whole
    modes: Whole
    numbers: Array

    def pick(self, where: Any) -> Rows:
        return Rows(self.state[where], self.chosen[where], self.modes[where], self.numbers[where])


def _unbeaten(rows: Rows, found: Array) -> Rows:
    """Rows without those that another in the same state and under the same modes beats in every number."""
    key = rows.state
    for column in rows.modes.T:
        key = key * len(MODES) + column
    order = np.lexsort((found[:, 1], found[:, 0], key))
    rows, key, found = rows.pick(order), key[order], found[order]
    for k in range(REFERENCES):
        start = np.searchsorted(key, key)
        size = np.searchsorted(key, key, side="right") - start
        if k >= size.max():
            break
        at = np.arange(len(key))
        reference = np.minimum(start + k, len(key) - 1)
        beaten = (k < size) & (at > reference) & (found[reference] <= found).all(1)
        rows, key, found = rows.pick(~beaten), key[~beaten], found[~beaten]
    return rows


# ---- all plans --------------------------------------------------------------------------------------------


@dataclass
class Best:
    """The best plan found so far, below what was known before."""

    seconds: float = NEVER
    plan: SearchResult | None = None
    looked_at: int = 0


@dataclass
class Judge:
    """Looks for plans faster than one that is known."""

    space: SearchSpace
    structures: dict[int, Structure] = field(default_factory=dict)

    @cached_property
    def modes(self) -> list[int]:
        return [MODES.index(m) for m in self.space.modes]

    def structure(self, point: SearchPoint) -> Structure:
        if point.tp not in self.structures:
            model = self.space.model(point)
            self.structures[point.tp] = Structure(model.table, model.interface_values)
        return self.structures[point.tp]

    def all_points(self) -> Iterator[SearchPoint]:
        for point in self.space.points():
            asked = self.space.request.zero
            for zero in range(4) if asked is None and point.dp > 1 else [asked or 0]:
                for offload in (False, True) if self.space.mesh.device.host else (False,):
                    if self.space.request.offload in (None, OFFLOADS[offload]):
                        for size in self._shard_sizes(point, zero):
                            yield replace(point, zero=zero, offload=offload, shard_size=size)

    def _shard_sizes(self, point: SearchPoint, zero: int) -> list[int]:
        """What ZeRO may divide among: all, or the ranks of so many hosts."""
        mesh, sizes = self.space.mesh, [0]
        here = math.gcd(point.dp, max(1, mesh.devices_per_host // point.tp))
        sizes += [s for s in range(2, point.dp) if zero and point.dp % s == 0 and s % here == 0]
        return sizes

    def best(self, known: float) -> Best:
        """The best plan below `known` seconds."""
        best = Best(known)
        for point in sorted(self.all_points(), key=self._at_least):
            if self._at_least(point) < best.seconds:
                self._point(point, best)
        return best

    def _at_least(self, point: SearchPoint) -> float:
        """A time that no plan of a point is below: every operator in its fastest option."""
        kinds, model = [self.space.priced(at) for at in self.space.each_kind(point)], self.space.model(point)
        seconds, table, total = [prices.forward + prices.backward for prices in kinds], model.table, 0.0
        for i, node in enumerate(table.nodes):
            mine = slice(*map(int, model.sizes.first[i : i + 2]))
            places = table.segment_classes.count(node.segment_class) if node.segment_class >= 0 else 0
            total += places * min(float(each[mine].min()) for each in seconds)
        return total * (1 + (self.space.micro_batches(point) - 1) / point.pp)

    def _point(self, point: SearchPoint, best: Best) -> None:
        space, m = self.space, self.space.micro_batches(point)
        priced = {at.kind: Priced(space, self.structure(point), at) for at in space.each_kind(point)}
        best.looked_at += 1
        n, pp = len(space.layered.labels), point.pp
        keys = [(space.in_flight(point, s), space.at(point, s).kind) for s in range(pp)]
        cuts = [(0, *c) for c in itertools.combinations(range(1, n), pp - 1)]
        spans = {c: [Span(i, j, *key) for i, j, key in zip(c, (*c[1:], n), keys, strict=True)] for c in cuts}
        every = {span for row in spans.values() for span in row}
        light = {span: Stage(priced[span.kind], span, self.modes, False).least for span in every}

        def times(row: Sequence[Span]) -> list[float]:
            return [light[s] for s in row]

        def step(parts: Sequence[float]) -> float:
            return sum(parts) + (m - 1) * max(parts)

        spans = {c: row for c, row in spans.items() if step(times(row)) < best.seconds}
        most: dict[Span, float] = {}
        for row in spans.values():
            for k, span in enumerate(row):
                others = times(row)[:k] + times(row)[k + 1 :]
                spare = best.seconds - sum(others)
                here = min(spare / m, NEVER) if not others else min(spare - (m - 1) * max(others), spare)
                here = max(here, spare / m) if others and spare / m >= max(others) else here
                most[span] = max(most.get(span, 0.0), here)
        heavy: dict[Span, dict[tuple[object, ...], tuple[float, Whole, Whole]]] = {}
        for span, seconds in most.items():
            stage = Stage(priced[span.kind], span, self.modes, pp > 1)
            rows = stage.choices(seconds, space.limit(replace(point, kind=span.kind)))
            kinds: dict[tuple[object, ...], tuple[float, Whole, Whole]] = {}
            times_of = stage.totals.under(rows.numbers, rows.modes)[:, 0]
            for k in range(len(rows.chosen)):
                alike = self.structure(point).placed_alike(rows.chosen[k].tolist()) if pp > 1 else ()
                if alike not in kinds or times_of[k] < kinds[alike][0]:
                    kinds[alike] = float(times_of[k]), rows.chosen[k], rows.modes[k]
            heavy[span] = kinds
        for cut, row in spans.items():
            for alike in heavy[row[0]]:
                if all(alike in heavy[s] for s in row):
                    found = [heavy[s][alike] for s in row]
                    parts = [f[0] for f in found]
                    if step(parts) < best.seconds:
                        best.seconds = step(parts)
                        best.plan = self._found(priced[row[0].kind], point, cut, row, found, parts, best.seconds)

    def _found(
        self, priced: Priced, point: SearchPoint, cut: Sequence[int], row: Sequence[Span], found: Sequence[Any],
        parts: Sequence[float], seconds: float,
    ) -> SearchResult:  # fmt: skip
        modes = ["none"] * priced.n
        for span, (_, _, mine) in zip(row, found, strict=True):
            for p, mode in zip(Totals(priced, span).blocks, mine.tolist(), strict=True):
                modes[p] = MODES[mode]
        chosen = tuple(tuple(c.tolist()) for _, c, _ in found)
        return SearchResult(point, chosen, tuple(cut), tuple(modes), tuple(parts), seconds)

    def worth(self, plan: SearchResult) -> tuple[list[float], list[float]]:
        """Seconds and bytes of every stage of it, by all that `position_costs` says. Raises AssertionError for a plan
        that is not in the space."""
        space, point = self.space, plan.point
        structure = self.structure(point)
        table = structure.table
        ends = (*plan.starts[1:], len(table.labels))
        alike = {structure.placed_alike(c) for c in plan.chosen}
        assert len(alike) == 1, "stages place differently what passes between them"
        seconds, held = [], []
        for stage, (i, j, chosen) in enumerate(zip(plan.starts, ends, plan.chosen, strict=True)):
            for (one, other), allowed in structure.pairs.items():
                assert allowed[chosen[one], chosen[other]], f"{table.nodes[one].key}, {table.nodes[other].key}"
            assert all(structure.summed_alike(f, chosen) for f in range(len(table.value_uses)))
            priced = Priced(space, structure, space.at(point, stage))
            totals = Totals(priced, Span(i, j, space.in_flight(point, stage)))
            weighed = position_costs(priced.prices, chosen, space.between_stages(point))
            modes = np.array([[MODES.index(plan.recompute[p]) for p in totals.blocks]], dtype=np.int64)
            numbers = totals.under(totals.of([priced.atom(weighed)]), modes)
            seconds.append(float(numbers[0, 0]))
            held.append(float(totals.bytes(numbers)[0]))
        return seconds, held


def steps_of(seconds: Sequence[float], micro_batches: int) -> float:
    """A step's time from its stages'."""
    return sum(seconds) + (micro_batches - 1) * max(seconds)
