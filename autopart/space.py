"""The numbers of a search: tables, prices and solutions, each made once, for every point that asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

from autopart.cost import Training
from autopart.folded import Folded
from autopart.mesh import Link, Mesh
from autopart.passes.formulate import formulate
from autopart.passes.solve import Solution, Solver
from autopart.plan import usable_bytes
from autopart.problem import Table
from autopart.request import Point, Request
from autopart.schedules import in_flight
from autopart.weigh import MODES, Array, Prices, Sizes, Terms

flights = lru_cache(maxsize=None)(in_flight)


class Model:
    """A table with its solver, and how often everything in it is paid.

    places   of every strategy, change and kept memory: how many positions pay for it
    group    the class of runs that pays; -1 for what stages pay once
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self.sizes = Sizes(table)
        self.parts: dict[int, Solver] = {}
        many = {g: table.group.count(g) for g in set(table.group)}
        nodes = [
            len(table.state.get(i, ())) if n.kind == "parameter" else many.get(n.group, 1)
            for i, n in enumerate(table.nodes)
        ]
        of_state = [table.group[table.state[i][0][0]] if i in table.state else n.group for i, n in enumerate(table.nodes)]
        counts = np.diff(self.sizes.first)
        places, groups = list(np.repeat(nodes, counts)), list(np.repeat(of_state, counts))
        for index, have, _ in self.sizes.changes:
            flow = table.flows[index]
            summed, several = any(p.kind == "P" for p in have), len(set(flow.users[0])) > 1
            at = flow.homes[0] if summed else -1 if several else flow.users[0][0]
            places.append(len(flow.homes))
            groups.append(table.group[at] if at >= 0 else -1)
        for index, _ in self.sizes.kept:
            keep = table.keeps[index]
            places.append(len(keep.places))
            groups.append(table.group[keep.places[0][0]] if len(set(keep.places[0])) == 1 else -1)
        self.places, self.group = np.array(places, dtype=float), np.array(groups)

    @cached_property
    def solver(self) -> Solver:
        """Made when first asked for."""
        return Solver(self.sizes)

    def part(self, group: int) -> Solver:
        """Of one class of runs alone."""
        if group not in self.parts:
            self.parts[group] = Solver(self.sizes, group)
        return self.parts[group]

    @cached_property
    def blocks(self) -> list[int]:
        """The classes of numbered blocks."""
        return sorted({g for g, b in zip(self.table.group, self.table.block, strict=True) if b})

    @cached_property
    def interface(self) -> list[tuple[int, int]]:
        """The values that all stages must place alike, so that each may be split in its own way: those that pass from
        run to run, parameters that several runs use, inputs."""
        outside = {(f.source, f.output) for f in self.table.flows if not all(f.inside) and max(f.homes) >= 0}
        outside |= {(i, 0) for i, places in self.table.state.items() if any(len(p) > 1 for p in places)}
        return sorted(outside | {(i, 0) for i, n in enumerate(self.table.nodes) if n.kind == "input"})


@dataclass(frozen=True)
class Costs:
    """Of every priced variable: seconds of a micro-batch with its share of gradient sync, bytes of state, bytes kept."""

    seconds: Array
    state: Array
    kept: Array


@dataclass
class Space:
    """All plans of a model on a mesh that a request allows, as numbers."""

    folded: Folded
    mesh: Mesh
    request: Request
    models: dict[int, Model] = field(default_factory=dict)
    prices: dict[Point, Prices] = field(default_factory=dict)

    @property
    def limit(self) -> float:
        """Bytes of a device that a plan may fill."""
        return usable_bytes(self.mesh) if self.request.must_fit else float("inf")

    def model(self, point: Point) -> Model:
        """The table and solver of a point."""
        if point.tp not in self.models:
            forced = (self.request.tp or 1) > 1
            self.models[point.tp] = Model(formulate(self.folded, self.mesh.device, point.tp, forced))
        return self.models[point.tp]

    def training(self, point: Point) -> Training:
        """What the parameters of a point cost."""
        link = self.mesh.link(point.tp, point.dp)
        return Training(self.request.optimizer, point.zero, point.dp, link, self.micro_batches(point))

    def micro_batches(self, point: Point) -> int:
        """Micro-batches of a step."""
        return self.request.global_batch // point.micro_batch

    def priced(self, point: Point) -> Prices:
        """The prices of a point."""
        if point not in self.prices:
            strides = {"dp": point.tp, "tp": 1}
            model = self.model(point)
            sizes = {
                axis: (getattr(point, axis), self.mesh.link(strides[axis], getattr(point, axis)))
                for axis in model.table.axes
            }
            scale = point.micro_batch / self.folded.traced.micro_batch
            self.prices[point] = Prices(model.sizes, Terms(self.mesh.device, sizes, scale, self.training(point)))
        return self.prices[point]

    def between_stages(self, point: Point) -> Link | None:
        """The link between stages; None where there is one stage."""
        return self.mesh.link(point.dp * point.tp, point.pp) if point.pp > 1 else None

    def in_flight(self, point: Point, stage: int) -> int:
        """Micro-batches whose activations a stage holds."""
        return flights(self.schedule, stage, point.pp, self.micro_batches(point))

    @property
    def schedule(self) -> str:
        """Of equal time, 1F1B holds least."""
        return self.request.schedule or "1f1b"

    def costs(self, point: Point, modes: Mapping[int, str]) -> Costs:
        """What everything at a point costs, in all its places; `modes` says which classes of blocks are run again."""
        model, prices = self.model(point), self.priced(point)
        again = np.concatenate([prices.forward - prices.product, prices.change_forward, 0.0 * prices.memory])
        whole = np.concatenate([prices.forward, prices.change_forward, 0.0 * prices.memory])
        seconds = np.concatenate([
            prices.forward + prices.backward + prices.sync / self.micro_batches(point),
            prices.change_forward + prices.change_backward,
            0.0 * prices.memory,
        ])  # fmt: skip
        nothing = np.zeros(len(prices.change_forward))
        kept = np.concatenate([prices.inner, nothing, prices.memory])
        results = np.concatenate([prices.results, nothing, 0.0 * prices.memory])
        state = np.concatenate([prices.state, nothing, 0.0 * prices.memory])
        for group, mode in modes.items():
            mine = model.group == group
            extra, held = {"none": (0.0, kept), "selective": (again, results), "full": (whole, 0.0 * kept)}[mode]
            seconds, kept = np.where(mine, seconds + extra, seconds), np.where(mine, held, kept)
        return Costs(seconds * model.places, state * model.places, kept * model.places)

    def least_work(self, point: Point) -> float:
        """Seconds that the operators of a micro-batch take at least, whatever is done between them."""
        model, prices = self.model(point), self.priced(point)
        each = (prices.forward + prices.backward) * model.places[: len(prices.forward)]
        return float(np.minimum.reduceat(each, model.sizes.first[:-1]).sum())

    def solve(self, point: Point, price: float, modes: Mapping[int, str]) -> Solution | None:
        """The best splits where a byte kept costs `price` seconds and a byte of state as many as its least share."""
        return self.model(point).solver.minimise(self.objective(point, price, modes))

    def objective(self, point: Point, price: float, modes: Mapping[int, str]) -> Array:
        """What `solve` minimises."""
        costs = self.costs(point, modes)
        return costs.seconds + price * (costs.kept + costs.state / self.in_flight(point, 0))

    def least_columns(self, point: Point, price: float) -> dict[int, Array]:
        """For every number of micro-batches in flight, a bound below f[i, j] of all ranges, given their memory
        (Lagrange): every class of runs in its best splits and its best mode of recompute, each for itself."""
        model = self.model(point)
        many = {g: model.table.group.count(g) for g in set(model.table.group)}
        each = {}
        for group, count in many.items():
            modes = self.modes if group in model.blocks else ("none",)
            mine = model.group == group
            objectives = (np.where(mine, self.objective(point, price, {group: mode}), 0.0) for mode in modes)
            each[group] = min(model.part(group).bound(o) for o in objectives) / count
        total = np.concatenate([[0.0], np.cumsum([each[g] for g in model.table.group])])
        whole = total[None, :] - total[:, None]
        whole[np.tril_indices(len(total))] = float("inf")
        numbers = {self.in_flight(point, stage) for stage in range(point.pp)}
        return {f: whole - (price / f * self.limit if price else 0.0) for f in numbers}

    def forced(self, point: Point) -> dict[int, str]:
        """The mode of every class of blocks, where the request fixes it."""
        return dict.fromkeys(self.model(point).blocks, self.request.recompute) if self.request.recompute else {}

    @property
    def modes(self) -> tuple[str, ...]:
        """What blocks may keep."""
        if self.request.recompute:
            return (self.request.recompute,)
        return MODES
