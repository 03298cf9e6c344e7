"""The numbers of a search: tables, prices and solutions, each made once, for every point that asks for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from autopart.cost.compute import Array
from autopart.cost.intervals import NEVER, interval_ends
from autopart.cost.liveness import MODES
from autopart.cost.position_costs import PositionCosts, position_costs
from autopart.cost.prices import Prices, Terms
from autopart.cost.sizes import Sizes
from autopart.cost.training_state import Training, amortization, widening
from autopart.hardware.mesh import Mesh, usable_bytes
from autopart.hardware.rows import Device, Link
from autopart.ir.labels import is_block
from autopart.ir.layered_graph import LayeredGraph
from autopart.passes.formulate import formulate
from autopart.passes.solve import HIGHS, Solution, Solver
from autopart.passes.solve_stages import Coupled
from autopart.passes.split_problem import SplitProblem
from autopart.plan.schedules import SCHEDULES, in_flight
from autopart.planner.allowed_choices import Options, both, modes_of, options_of, positions_of, stages_of
from autopart.planner.constraints import Cuts, check
from autopart.planner.request import Request, SearchPoint
from autopart.sharding.strategy_table import Placements, StrategyTable, ValueUses

flights = lru_cache(maxsize=None)(in_flight)

Interface = tuple[Placements | None, ...]


class Model:
    """A table with its solver, and how often everything in it is paid.

    places   of every strategy, change and kept memory: how many positions pay for it
    group    the class of runs that pays; -1 for what stages pay once
    """

    def __init__(self, table: StrategyTable) -> None:
        self.table = table
        self.sizes = Sizes(table)
        self.parts: dict[int, Solver] = {}
        self.pipelines: dict[int, Coupled] = {}
        state, nodes = table.state, enumerate(table.nodes)
        held = [table.group[state[i][0][0]] if i in state else node.group for i, node in nodes]
        groups = list(np.repeat(held, np.diff(self.sizes.first)))
        for index, have, _ in self.sizes.changes:
            flow = table.flows[index]
            summed, several = any(p.kind == "P" for p in have), flow.several
            at = flow.homes[0] if summed else -1 if several else flow.users[0][0]
            groups.append(table.group[at] if at >= 0 else -1)
        for index, _ in self.sizes.kept:
            keep = table.keeps[index]
            groups.append(table.group[keep.places[0][0]] if not keep.several else -1)
        self.places, self.group = self.places_in(0, len(table.labels)), np.array(groups)

    def places_in(self, i: int, j: int) -> Array:
        """How many places of everything positions i..j-1 pay for."""
        table, counts = self.table, np.diff(self.sizes.first)

        def inside(positions: Iterable[int]) -> bool:
            return any(i <= p < j for p in positions)

        many = {g: table.group[i:j].count(g) for g in set(table.group)}
        nodes = [
            sum(map(inside, table.state.get(n, ()))) if node.kind == "parameter"
            else many.get(node.group, sum(map(inside, table.shared.get(n, ()))))
            for n, node in enumerate(table.nodes)
        ]  # fmt: skip
        places = list(np.repeat(nodes, counts))
        paid: dict[tuple[int, bool], int] = {}
        for index, have, _ in self.sizes.changes:
            flow = table.flows[index]
            summed = any(p.kind == "P" for p in have)
            if (index, summed) not in paid:
                pays = zip(flow.homes, flow.needs, strict=True)
                paid[index, summed] = sum(inside([h] if summed and h >= 0 else chain(*needs)) for h, needs in pays)
            places.append(paid[index, summed])
        keeping = [sum(map(inside, keep.places)) for keep in table.keeps]
        places += [keeping[index] for index, _ in self.sizes.kept]
        return np.array(places, dtype=float)

    @cached_property
    def own(self) -> Array:
        """How often every position pays for everything by itself, in a row for each."""
        table, sizes, group = self.table, self.sizes, np.array(self.table.group)
        found = np.zeros((len(group), len(self.places)))
        for n, node in enumerate(table.nodes):
            mine = sizes.holders[n][0] if n in sizes.holders else np.flatnonzero(group == node.group)
            found[mine, sizes.first[n] : sizes.first[n + 1]] = 1.0
        for i, (index, have, _) in enumerate(sizes.changes, start=int(sizes.first[-1])):
            flow, summed = table.flows[index], any(p.kind == "P" for p in have)
            homes, users = flow.ends
            mine = homes if summed else users
            if mine[0] >= 0 and (summed or not flow.several):
                np.add.at(found[:, i], mine, 1.0)
        return found

    @cached_property
    def solver(self) -> Solver:
        """Made when first asked for."""
        return Solver(self.sizes)

    def part(self, group: int) -> Solver:
        """Of one class of runs alone."""
        if group not in self.parts:
            self.parts[group] = Solver(self.sizes, group)
        return self.parts[group]

    def pipeline(self, stages: int) -> Coupled:
        """Of so many stages, each with splits of its own that agree on how `passing` lies."""
        if stages not in self.pipelines:
            alike: dict[object, list[int]] = {}
            for n, output in self.passing:
                for option in range(len(self.table.nodes[n].options)):
                    key = n, output, self.table.nodes[n].given(option, output)
                    alike.setdefault(key, []).append(int(self.sizes.first[n]) + option)
            self.pipelines[stages] = Coupled(self.solver, stages, list(alike.values()))
        return self.pipelines[stages]

    @cached_property
    def blocks(self) -> list[int]:
        """The classes of numbered blocks."""
        return sorted({g for g, b in zip(self.table.group, self.table.block, strict=True) if b})

    @cached_property
    def passing(self) -> list[tuple[int, int]]:
        """The values that all stages must place alike, so that each may be split in its own way: those that pass from
        run to run, parameters that several runs use, inputs."""
        outside = {(f.source, f.output) for f in self.table.flows if not all(f.inside) and max(f.homes) >= 0}
        outside |= {(i, 0) for i, places in self.table.state.items() if any(len(p) > 1 for p in places)}
        return sorted(outside | {(i, 0) for i, n in enumerate(self.table.nodes) if n.kind == "input"})

    @cached_property
    def awaited(self) -> list[tuple[ValueUses, list[tuple[int, int]]]]:
        """The flows that pass from run to run and may be partial sums, with the uses that all take such a sum alike."""
        flows = [f for f in self.table.flows if not all(f.inside) and max(f.homes) >= 0]
        summed = [f for f in flows if any(p.kind == "P" for have, _ in f.chains for p in have)]
        return [(f, [use for use, inside in zip(f.uses, f.inside, strict=True) if not inside]) for f in summed]

    def interface(self, chosen: Sequence[int]) -> Interface:
        """What all stages must agree on under a choice: how `passing` lies, and how partial sums are taken, None for
        what is none."""
        nodes = self.table.nodes
        given = [nodes[n].given(chosen[n], output) for n, output in self.passing]
        taken = [
            nodes[n].taken(chosen[n], operand) if any(p.kind == "P" for p in have) else None
            for flow, ((n, operand), *_) in self.awaited
            for have in [nodes[flow.source].given(chosen[flow.source], flow.output)]
        ]
        return tuple([*given, *taken])

    def agreeing(self, interface: Interface) -> Options:
        """The options of nodes that agree with an interface."""
        given, taken = interface[: len(self.passing)], interface[len(self.passing) :]
        wanted = [(n, output, False, placed) for (n, output), placed in zip(self.passing, given, strict=True)]
        for (_, uses), placed in zip(self.awaited, taken, strict=True):
            wanted += [(n, operand, True, placed) for n, operand in uses if placed is not None]
        left: Options = {}
        for n, i, takes, placed in wanted:
            node = self.table.nodes[n]
            lies = node.taken if takes else node.given
            left = both(left, {n: tuple(o for o in range(len(node.options)) if lies(o, i) == placed)})
        return left


@dataclass(frozen=True)
class Costs:
    """Of every priced variable: seconds of a micro-batch with its share of gradient sync but what can be hidden, bytes
    of state and kept. Where all micro-batches are in flight at once gradients are no state: there are none when most is
    kept."""

    seconds: Array
    state: Array
    kept: Array


@dataclass
class SearchSpace:
    """All plans of a model on a mesh that a request allows, as numbers.

    What constraints change is none of what is kept in `models`, `prices`, `solved` and what follows them: a space with
    others may share it. Only links and devices change prices, only devices and a degree of `tp` that is asked for the
    models.
    """

    layered: LayeredGraph
    mesh: Mesh
    request: Request
    models: dict[int, Model] = field(default_factory=dict)
    prices: dict[SearchPoint, Prices] = field(default_factory=dict)
    solved: dict[object, Solution | None] = field(default_factory=dict)
    bounds: dict[object, float] = field(default_factory=dict)
    weights: dict[tuple[SearchPoint, tuple[int, ...]], PositionCosts] = field(default_factory=dict)
    costs_of: dict[SearchPoint, tuple[Costs, ...]] = field(default_factory=dict)
    relaxations: dict[object, tuple[float, Solution | None]] = field(default_factory=dict)
    late_of: dict[SearchPoint, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise PartitionError where constraints name what the model does not have."""
        self._options: dict[int, Options] = {}
        self._stages: dict[object, list[NDArray[np.bool_]]] = {}
        check(self.request.constraints, self.layered.labels, self.layered.keys.values())

    def options(self, point: SearchPoint) -> Options:
        """The options that constraints leave, of those nodes where they leave not all."""
        if point.tp not in self._options:
            found = options_of(self.model(point).table, self.request.constraints) if self.request.constraints else {}
            self._options[point.tp] = found
        return self._options[point.tp]

    def stuck(self, model: Model) -> list[str]:
        """The nodes for which constraints leave no option."""
        found = options_of(model.table, self.request.constraints)
        return [model.table.nodes[node].key for node, left in found.items() if not left]

    @cached_property
    def allowed_modes(self) -> tuple[tuple[str, ...], ...]:
        """What every position may keep; none is run again where the forward pass changes buffers: it would do so
        twice."""
        labels = self.layered.labels
        recompute = self.request.recompute or ("none" if self.layered.traced.updated else None)
        return modes_of(labels, [is_block(x) for x in labels], self.request.constraints, recompute)

    def stages(self, point: SearchPoint) -> list[NDArray[np.bool_]]:
        """For every stage, whether it may be each of the ranges. Cuts by time or bytes go by what the fastest splits
        of the point take."""
        weighs = any(isinstance(c, Cuts) and c.method in ("time", "memory") for c in self.request.constraints)
        key = point if weighs else point.pp
        if key not in self._stages:
            solution = self.solve(point, 0.0, self.forced(point)) if weighs else None
            weighed = self.position_costs(point, solution.chosen) if solution else None
            labels, classes = self.layered.labels, self.layered.traced.classes
            row = positions_of(labels, classes, self.model(point).table, weighed)
            masks = stages_of(self.request.constraints, point.pp, row)
            self._stages[key] = [mask[interval_ends(len(labels))] for mask in masks]
        return self._stages[key]

    def position_costs(self, point: SearchPoint, chosen: tuple[int, ...]) -> PositionCosts:
        """What a choice costs at every position."""
        if (point, chosen) not in self.weights:
            self.weights[point, chosen] = position_costs(self.priced(point), chosen, self.between_stages(point))
        return self.weights[point, chosen]

    @property
    def limit(self) -> float:
        """Bytes of a device that a plan may fill."""
        return usable_bytes(self.mesh) if self.request.must_fit else float("inf")

    def model(self, point: SearchPoint) -> Model:
        """The table and solver of a point."""
        if point.tp not in self.models:
            forced = (self.request.tp or 1) > 1
            self.models[point.tp] = Model(formulate(self.layered, self.mesh.device, point.tp, forced))
        return self.models[point.tp]

    def training(self, point: SearchPoint) -> Training:
        """What the parameters of a point cost."""
        group = self.mesh.group(point.tp, point.dp)
        wide = widening(self.request.precision, self.request.master)
        together = self.mesh.device.type != "cpu"
        return Training(self.request.optimizer, point.zero, group, self.micro_batches(point), wide, together)

    def device(self, point: SearchPoint) -> Device:
        """The device as busy as a point has it."""
        return self.mesh.busy_device(point.pp, self.micro_batches(point))

    def micro_batches(self, point: SearchPoint) -> int:
        """Micro-batches of a step."""
        return self.request.global_batch // point.micro_batch

    def amortization(self, point: SearchPoint) -> int:
        """See `training_state.amortization`."""
        return amortization(point.zero, self.micro_batches(point), point.pp)

    def priced(self, point: SearchPoint) -> Prices:
        """The prices of a point."""
        if point not in self.prices:
            strides = {"dp": point.tp, "tp": 1}
            model = self.model(point)
            sizes = {axis: self.mesh.group(strides[axis], getattr(point, axis)) for axis in model.table.axes}
            scale = point.micro_batch / self.layered.traced.micro_batch
            self.prices[point] = Prices(model.sizes, Terms(self.device(point), sizes, scale, self.training(point)))
        return self.prices[point]

    def between_stages(self, point: SearchPoint) -> Link | None:
        """The link between stages; None where there is one stage."""
        return self.mesh.between(point.dp * point.tp, point.pp, self.micro_batches(point)) if point.pp > 1 else None

    def in_flight(self, point: SearchPoint, stage: int) -> int:
        """Micro-batches whose activations a stage holds."""
        return flights(self.schedule, stage, point.pp, self.micro_batches(point))

    @property
    def schedule(self) -> str:
        """Of equal time, 1F1B holds least."""
        known = sorted(SCHEDULES, key="1f1b".__ne__)
        return self.request.schedule or next((s for s in known if self.request.allows("schedule", s)), "")

    def costs(self, point: SearchPoint, modes: Mapping[int, str]) -> Costs:
        """What everything at a point costs, in all its places; `modes` says which classes of blocks are run again."""
        model, (usual, *others) = self.model(point), self._usual(point)
        seconds, kept = usual.seconds, usual.kept
        for group, mode in modes.items():
            if mode != "none":
                mine, other = model.group == group, others[MODES.index(mode) - 1]
                seconds, kept = np.where(mine, other.seconds, seconds), np.where(mine, other.kept, kept)
        return Costs(seconds, usual.state, kept)

    def _usual(self, point: SearchPoint) -> tuple[Costs, ...]:
        """What everything costs where all do as each of MODES says."""
        if point not in self.costs_of:
            model, prices = self.model(point), self.priced(point)
            places, nothing = model.places, np.zeros(len(prices.change_forward) + len(prices.saved_tensor_bytes))
            seconds = np.concatenate([
                prices.forward + prices.backward + prices.sync_seconds / self.amortization(point),
                prices.change_forward + prices.change_backward,
                0.0 * prices.saved_tensor_bytes,
            ])  # fmt: skip
            again = np.concatenate(
                [prices.forward - prices.product, prices.change_rerun, 0.0 * prices.saved_tensor_bytes]
            )
            whole = np.concatenate([prices.forward, prices.change_rerun, 0.0 * prices.saved_tensor_bytes])
            kept = np.concatenate([prices.inner, 0.0 * prices.change_forward, prices.saved_tensor_bytes])
            results = np.concatenate([prices.product_results, nothing])
            none_yet = self.in_flight(point, 0) == self.micro_batches(point)
            state = np.concatenate([prices.state - none_yet * prices.state_bytes[:, 1], nothing]) * places
            self.costs_of[point] = tuple(
                Costs((seconds + extra) * places, state, held * places)
                for extra, held in ((0.0, kept), (again, results), (whole, 0.0 * kept))
            )
        return self.costs_of[point]

    def _hides(self, point: SearchPoint) -> bool:
        """Whether the backward hides gradients on their way."""
        return point.dp > 1 and self.mesh.device.overlapped_share > 0

    def windows(self, point: SearchPoint) -> tuple[Array, Array]:
        """By priced variable, seconds of a turn that the gradients of a place travel and computing can hide, and that
        the backward of a place takes which can hide them (see `interval_seconds.exposed`)."""
        prices, nothing = self.priced(point), np.zeros(len(self.priced(point).saved_tensor_bytes))
        share = self.training(point).backwards / self.amortization(point)
        backward = np.concatenate([prices.backward, prices.change_backward, nothing])
        return share * np.concatenate(
            [prices.overlappable_seconds, 0.0 * prices.change_backward, nothing]
        ), share * backward

    def early(self, point: SearchPoint) -> tuple[Array, Array]:
        """Two bounds below the share of a turn of gradients that travel after the backward, by priced variable,
        both with all of those that several positions add to: what the first position sends, and all that is sent but
        what the backward of all positions but the last takes. The first and the last count where no other is of their
        class, so that no range pays for one that it has not."""
        model, group = self.model(point), self.model(point).table.group
        beside, backward = self.windows(point)
        first, last = (group.count(group[end]) == 1 for end in (0, -1))
        alone = model.own.sum(0)
        begun = beside * (model.places - alone + first * model.own[0])
        return begun, beside * model.places - backward * (alone - last * model.own[-1])

    def late(self, point: SearchPoint) -> Array:
        """The mean of `early`'s two bounds by the weights that make the best splits' time most: then it is what it
        would be with the larger of them."""
        if point not in self.late_of:
            begun, done = self.early(point)
            costs, more = self.costs(point, {}).seconds, done - begun
            share = self.model(point).solver.share(costs + begun, more)
            self.late_of[point] = begun + share * more
        return self.late_of[point]

    def least_work(self, point: SearchPoint) -> float:
        """Seconds that the operators of a micro-batch take at least, whatever is done between them."""
        model, prices = self.model(point), self.priced(point)
        each = (prices.forward + prices.backward) * model.places[: len(prices.forward)]
        return model.sizes.apart(each, self.options(point))

    def has_room(self, point: SearchPoint) -> bool:
        """Whether the states of all parameters, spread evenly over the stages, leave any room."""
        model, prices = self.model(point), self.priced(point)
        each = prices.state * model.places[: len(prices.state)]
        return model.sizes.apart(each, {}) <= point.pp * self.limit

    def solve(self, point: SearchPoint, price: float, modes: Mapping[int, str]) -> Solution | None:
        """The best splits where a byte kept costs `price` seconds and a byte of state as many as its least share. At a
        price between none and an endless one they are one way among many: None where it takes branching to find them.
        """
        options = self.options(point)
        key = point, price, tuple(sorted(modes.items())), tuple(options.items())
        if key not in self.solved:
            unit = "bytes" if price == NEVER else "seconds"
            problem = SplitProblem(self.objective(point, price, modes), options, unit=unit)
            self.solved[key] = self.minimise(point, problem, price in (0.0, NEVER))
        return self.solved[key]

    def minimise(self, point: SearchPoint, problem: SplitProblem, branch: bool = True) -> Solution | None:
        """The best splits, by the solver that is asked for; None where there are none, or where it takes branching to
        find them and is not to `branch`."""
        solver, costs, allowed = self.model(point).solver, problem.costs, problem.allowed
        if branch and self.request.solver != HIGHS:
            return self._by_solver(point, problem)
        if problem.capacity is not None:
            found = solver.minimise_in_room(costs, allowed, problem.capacity)
        else:
            found = solver.minimise(costs, allowed, branch)
        return self.confirmed(point, replace(found, problem=problem)) if found else None

    def confirmed(self, point: SearchPoint, found: Solution) -> Solution | None:
        """A solution that a relaxation gave, or what the solver that is asked for makes of the same problem."""
        assert found.problem is not None
        return found if self.request.solver == HIGHS else self._by_solver(point, found.problem)

    def _by_solver(self, point: SearchPoint, problem: SplitProblem) -> Solution | None:
        from autopart.passes.ilp_solvers import minimise  # PuLP takes half a second to load

        return minimise(self.model(point).sizes, problem, self.request.solver)

    def relaxed(self, point: SearchPoint) -> float:
        """A bound below the time of the best splits, memory without end; infinite where there are none. It is
        `solve`'s wherever that takes no branching."""
        options, modes = self.options(point), self.forced(point)
        key = point, 0.0, tuple(sorted(modes.items())), tuple(options.items())
        if key not in self.bounds and key in self.solved:
            known = self.solved[key]
            self.bounds[key] = known.bound if known else NEVER
        elif key not in self.bounds:
            objective = self.objective(point, 0.0, modes)
            same = point.tp, objective.tobytes(), *key[2:]  # of ZeRO level 1 as of level 0, without updates
            if same not in self.relaxations:
                self.relaxations[same] = self.model(point).solver.relax(objective, options)
            bound, solution = self.relaxations[same]
            self.bounds[key] = bound
            if bound == NEVER:
                self.solved[key] = None
            elif solution is not None and self.request.solver == HIGHS:
                self.solved[key] = replace(solution, problem=SplitProblem(objective, options))
        return self.bounds[key]

    def below(self, point: SearchPoint) -> float:
        """A bound below `relaxed`, in a small part of its time."""
        seconds = self.costs(point, self.forced(point)).seconds
        return self.model(point).solver.below(seconds + self.early(point)[0] if self._hides(point) else seconds)

    def objective(self, point: SearchPoint, price: float, modes: Mapping[int, str]) -> Array:
        """What `solve` minimises; at an endless price bytes alone."""
        costs = self.costs(point, modes)
        held = costs.kept + costs.state / self.in_flight(point, 0)
        if price == NEVER:
            return held
        seconds = costs.seconds + price * held
        return seconds + self.late(point) if self._hides(point) else seconds

    def known_bound(self, point: SearchPoint) -> float:
        """The least time of any splits, where it is known already: no constraint makes it less."""
        known = self.solved.get((point, 0.0, (), ()))
        return known.bound if known else 0.0

    def best_modes(self, point: SearchPoint, price: float) -> list[dict[int, str]]:
        """What blocks may do at a price of a byte: all the same, and each class what costs it least."""
        blocks = self.model(point).blocks
        alike = [dict.fromkeys(blocks, mode) for mode in self.modes]
        best = {g: min(self.modes, key=partial(self.least, point, price, g)) for g in blocks}
        return alike if best in alike else [best, *alike]

    def least(self, point: SearchPoint, price: float, group: int, mode: str) -> float:
        """A bound below what a class of runs costs where its blocks do as `mode` says."""
        options = self.options(point)
        key = point, price, group, mode, tuple(options.items())
        if key not in self.bounds:
            model = self.model(point)
            costs = np.where(model.group == group, self.objective(point, price, {group: mode}), 0.0)
            if price == NEVER:
                self.bounds[key] = model.sizes.apart(costs, options)
            elif price == 0.0 and mode != "none":
                more = costs - np.where(model.group == group, self.objective(point, price, {}), 0.0)
                self.bounds[key] = self.least(point, price, group, "none") + model.sizes.apart(more, options)
            else:
                self.bounds[key] = model.part(group).bound(costs, options)
        return self.bounds[key]

    def forced(self, point: SearchPoint) -> dict[int, str]:
        """The mode of every class of blocks that may not keep everything: the one that keeps most."""
        least: dict[int, int] = {}
        for group, modes in zip(self.model(point).table.group, self.allowed_modes, strict=True):
            least[group] = min(least.get(group, len(MODES)), MODES.index(modes[0]))
        return {group: MODES[mode] for group, mode in least.items() if mode}

    @cached_property
    def modes(self) -> tuple[str, ...]:
        """What blocks may keep."""
        labels = self.layered.labels
        found = {m for modes, x in zip(self.allowed_modes, labels, strict=True) if is_block(x) for m in modes}
        return tuple(m for m in MODES if m in found)
