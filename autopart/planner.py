"""The search over what the tables leave open: degrees, micro-batch size, ZeRO level, recompute, cuts.

Every point (degrees, micro-batch, ZeRO level) has a lower bound that rises as more is asked of it:

    work     the operators' time, each in its fastest strategy, nothing between them
    splits   the best splits, changes of placement and gradient sync paid, memory without end
    memory   the same with a price on bytes (Lagrange), each class of blocks in its best way to recompute

Points are taken from a queue by least bound. One whose splits are known is cut into stages exactly (`autopart.cuts`),
which gives a plan; the search ends when no bound is below the best plan's time. The least bound that was left is what
the plan's gap is proven against: no plan of this space is faster by this cost model.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from autopart.cuts import NEVER, Ranges, best_cut, ranges
from autopart.errors import PartitionError
from autopart.passes.solve import Solution
from autopart.plan import bytes_text
from autopart.request import Point, Request, divisors
from autopart.space import Space
from autopart.weigh import Array, Weighed, weigh

Say = Callable[[str], None]
"""Told of every better plan."""


def silent(text: str) -> None:
    """Say nothing."""


TOLERANCE = 1e-9
"""Relative difference below which two times are the same."""


@dataclass(frozen=True)
class Found:
    """A plan before it is written out.

    chosen     the option of every node, in each stage
    starts     the first position of every stage;  recompute: what every position does
    seconds    of a step;  bound: no plan of the search space is faster
    """

    point: Point
    chosen: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    recompute: tuple[str, ...]
    stage_seconds: tuple[float, ...]
    seconds: float
    bound: float = 0.0


@dataclass(frozen=True)
class Way:
    """One way to split, with what every range of positions costs under it."""

    solution: Solution
    weighed: Weighed
    ranges: Ranges
    interface: tuple[object, ...]


@dataclass
class Search:
    """The queue, the best plan so far, and the least bound of all points that are done with."""

    space: Space
    say: Say
    best: Found | None = None
    closed: float = NEVER
    ways: dict[Point, list[Way]] = field(default_factory=dict)
    solutions: dict[Point, Solution] = field(default_factory=dict)
    """Of points whose ways are not looked at yet."""
    queue: list[tuple[float, int, Point]] = field(default_factory=list)
    number: int = 0

    def run(self) -> Found:
        """The best plan. Raises PartitionError where none fits."""
        request = self.space.request
        started = time.monotonic()
        for point in points(self.space):
            heapq.heappush(self.queue, (self._passes(point) * self.space.least_work(point), 0, point))
        while self.queue and self.queue[0][0] < self._time() * (1 - TOLERANCE):
            late = request.time_limit is not None and time.monotonic() - started > request.time_limit
            if self.best is not None and (late or (request.nodes is not None and self.number >= request.nodes)):
                break
            self.number += 1
            bound, level, point = heapq.heappop(self.queue)
            following = (self._splits, self._cut, self._memory)[level](point, bound)
            for raised, at in following:
                if level == 2:
                    self.closed = min(self.closed, raised)
                else:
                    heapq.heappush(self.queue, (max(bound, raised), level + 1, at))
        if self.best is None:
            raise _nothing_fits(self.space, self.ways)
        bound = min(self.closed, self.queue[0][0] if self.queue else NEVER, self.best.seconds)
        return replace(self.best, bound=bound)

    def _time(self) -> float:
        return self.best.seconds if self.best else NEVER

    def _passes(self, point: Point) -> float:
        return point.passes(self.space.request.global_batch)

    def _splits(self, point: Point, bound: float) -> Iterator[tuple[float, Point]]:
        """The best splits with memory without end, and from them the bound of every ZeRO level."""
        levels = zero_levels(self.space.request, point)
        point = replace(point, zero=levels[0])
        way = self._way(point, self.space.solve(point, 0.0, self.space.forced(point)))
        self.ways[point] = [way]
        for zero in levels:
            at = replace(point, zero=zero)
            more = self._least_sync(at) - self._least_sync(point)
            yield self._passes(point) * (way.solution.bound + more), at
            self.solutions[at] = way.solution

    def _least_sync(self, point: Point) -> float:
        """Seconds of gradient sync that every plan of a point has, as a share of a micro-batch."""
        model, prices = self.space.model(point), self.space.priced(point)
        each = prices.sync * model.places[: len(prices.sync)] / self.space.micro_batches(point)
        return float(np.minimum.reduceat(each, model.sizes.first[:-1]).sum())

    def _way(self, point: Point, solution: Solution | None) -> Way:
        assert solution is not None
        space, model = self.space, self.space.model(point)
        weighed = weigh(space.priced(point), solution.chosen, space.between_stages(point))
        nodes = model.table.nodes
        interface = tuple(nodes[n].given(solution.chosen[n], output) for n, output in model.interface)
        table, m = model.table, space.micro_batches(point)
        forced = space.request.recompute
        return Way(solution, weighed, ranges(weighed, table.group, table.block, m, forced), interface)

    def _cut(self, point: Point, bound: float) -> Iterator[tuple[float, Point]]:
        """The best cut with the splits known; the point is done with if that reaches its bound."""
        if point not in self.ways:
            self.ways[point] = [self._way(point, self.solutions[point])]
        found = self._best(point)
        if found is None or found.seconds > bound * (1 + TOLERANCE):
            yield bound, point
        else:
            self.closed = min(self.closed, bound)

    def _memory(self, point: Point, bound: float) -> Iterator[tuple[float, Point]]:
        """Better bounds, and splits that take less memory."""
        space, ways, m = self.space, self.ways[point], self.space.micro_batches(point)
        least = bound / self._passes(point)
        columns: dict[int, Array] = {}
        for price in [0.0, *self._price_list(ways[0])]:
            for flights, f in space.least_columns(point, price).items():
                columns[flights] = np.maximum(columns.get(flights, f), f)
            found = best_cut(lambda stage: columns[space.in_flight(point, stage)], point.pp, m)
            assert found is not None
            bound = max(bound, found.seconds, least + (m - 1) * found.largest)
            if bound >= self._time():
                break
            for mode in space.modes if price else ():
                solution = space.solve(point, price, dict.fromkeys(space.model(point).blocks, mode))
                if solution and all(solution.chosen != w.solution.chosen for w in ways):
                    ways.append(self._way(point, solution))
        if len(ways) > 1 and bound < self._time():
            self._best(point)
        yield bound, point

    def _price_list(self, way: Way) -> list[float]:
        """Prices of a byte at which blocks begin to be run again, and above; none where memory is without end."""
        if not np.isfinite(self.space.limit):
            return []
        ratios = sorted(s.seconds / s.bytes for group in way.ranges.savings.values() for s in group)
        ratios = ratios or [way.ranges.seconds[0, -1] / max(way.ranges.kept[0, -1], 1.0)]
        return [*ratios, *(ratios[-1] * factor for factor in (3, 30, 1000))]

    def _best(self, point: Point) -> Found | None:
        """The best plan of the ways known for a point."""
        best: Found | None = None
        by_interface: dict[tuple[object, ...], list[Way]] = {}
        for way in self.ways[point]:
            by_interface.setdefault(way.interface, []).append(way)
        for ways in by_interface.values():
            found = self._stages(point, ways)
            if found and (best is None or found.seconds < best.seconds):
                best = found
        if best and best.seconds < self._time():
            self.best = best
            self.say(f"{point}: {best.seconds * 1e3:.4g} ms")
        return best

    def _stages(self, point: Point, ways: Sequence[Way]) -> Found | None:
        """The best cut where every stage takes any of some ways that agree on what passes between them."""
        space = self.space
        held: dict[int, Array] = {}

        def columns(stage: int) -> Array:
            flights = space.in_flight(point, stage)
            if flights not in held:
                held[flights] = np.minimum.reduce([w.ranges.least(flights, space.limit, space.modes) for w in ways])
            return held[flights]

        cut = best_cut(columns, point.pp, space.micro_batches(point))
        if cut is None:
            return None
        ends = (*cut.starts[1:], len(space.folded.labels))
        chosen, modes, times = [], [], []
        for stage, (i, j) in enumerate(zip(cut.starts, ends, strict=True)):
            flights = space.in_flight(point, stage)
            way = min(ways, key=lambda w: w.ranges.least(flights, space.limit, space.modes)[i, j])
            mine = way.ranges.modes(i, j, flights, space.limit, space.modes)
            chosen.append(way.solution.chosen)
            modes += mine
            times.append(way.ranges.exact(i, j, mine))
        seconds = sum(times) + (space.micro_batches(point) - 1) * max(times)
        return Found(point, tuple(chosen), cut.starts, tuple(modes), tuple(times), seconds)


def search(space: Space, say: Say = silent) -> Found:
    """The best plan of a space. Raises PartitionError where none fits."""
    return Search(space, say).run()


def zero_levels(request: Request, point: Point) -> list[int]:
    """The ZeRO levels to try: without a data-parallel axis they are all the same."""
    return [request.zero or 0] if request.zero is not None else [0, 1, 2, 3] if point.dp > 1 else [0]


def points(space: Space) -> Iterator[Point]:
    """Every combination of degrees and micro-batch that divides; PartitionError if there is none."""
    mesh, request, folded = space.mesh, space.request, space.folded
    units, rejected = len(folded.labels), []
    found = False
    for pp in [request.pp] if request.pp else divisors(mesh.size):
        if pp > units:
            rejected.append(f"pp={pp} stages but the model has {units} places to cut")
            continue
        for tp in [request.tp] if request.tp else divisors(mesh.size // pp):
            dp = mesh.size // pp // tp
            if request.dp not in (None, dp) or pp * dp * tp != mesh.size:
                continue
            if tp > mesh.devices_per_host and not request.tp:
                continue
            sizes = [request.micro_batch] if request.micro_batch else _micro_batches(request.global_batch, dp)
            if not request.micro_batch and not folded.traced.mean_of_samples:
                sizes = [request.global_batch]
            for size in sizes:
                if size % dp or request.global_batch % size:
                    rejected.append(f"{size} samples do not divide over dp={dp} ranks")
                    continue
                found = True
                yield Point(pp, dp, tp, size)
            if not sizes:
                rejected.append(f"{request.global_batch} samples do not divide over dp={dp} ranks")
    if not found:
        near = divisors(request.global_batch)
        raise PartitionError(
            "no degrees fit the batch and the mesh", "; ".join(dict.fromkeys(rejected)),
            f"a dp of {', '.join(map(str, near[:8]))}, or fewer stages",
        )  # fmt: skip


def _micro_batches(global_batch: int, dp: int) -> list[int]:
    """dp x 1, 2, 4, ... samples, as far as they divide the batch."""
    sizes, size = [], dp
    while size <= global_batch:
        if global_batch % size == 0:
            sizes.append(size)
        size *= 2
    return sizes


def _nothing_fits(space: Space, tried: Mapping[Point, Sequence[Way]]) -> PartitionError:
    """What the point that comes closest lacks: the stage, its bytes, who takes most."""
    short = min((_shortage(space, point, way) for point, ways in tried.items() for way in ways), key=lambda s: s.bytes)
    device, limit = space.mesh.device.name, space.limit
    tenants = ", ".join(f"{name} {bytes_text(size)}" for name, size in short.tenants)
    return PartitionError(
        f"no plan fits {space.mesh}; the closest has {short.point}",
        f"stage {short.stage} needs {bytes_text(short.bytes + limit)} at its smallest of the {bytes_text(limit)} a "
        f"{device} can give: {bytes_text(short.bytes)} short; largest: {tenants}",
        'more devices, a smaller micro_batch, or precision="bfloat16"',
    )


@dataclass(frozen=True)
class Shortage:
    """How many bytes a stage lacks at its smallest, and its largest tenants."""

    point: Point
    stage: int
    bytes: float
    tenants: tuple[tuple[str, float], ...]


def _shortage(space: Space, point: Point, way: Way) -> Shortage:
    """Of the cut that leaves the most crowded stage the most room."""
    lacks = {
        flights: way.ranges.lacks(flights, space.limit, space.modes)
        for flights in {space.in_flight(point, s) for s in range(point.pp)}
    }
    offset = min(f.min() for f in lacks.values())
    cut = best_cut(lambda s: lacks[space.in_flight(point, s)] - offset, point.pp, 10**6)
    assert cut is not None
    ends = (*cut.starts[1:], len(space.folded.labels))
    spans = list(zip(cut.starts, ends, strict=True))
    stage = max(range(point.pp), key=lambda s: lacks[space.in_flight(point, s)][spans[s]])
    i, j = spans[stage]
    parts = {
        "parameters, gradients and optimizer states": way.ranges.state[i, j],
        "kept activations": space.in_flight(point, stage) * way.ranges.kept[i, j],
        "the largest tensors of the moment": way.ranges.transient[i, j],
    }
    crowded = int(np.argmax(way.weighed.parts.sum(0)[i:j])) + i
    label = space.folded.labels[crowded] or "the loss"
    parts[f"parameters of {label}"] = float(way.weighed.parts[:, crowded].sum())
    tenants = sorted(parts.items(), key=lambda item: -item[1])[:3]
    return Shortage(point, stage, float(lacks[space.in_flight(point, stage)][i, j]), tuple(tenants))
