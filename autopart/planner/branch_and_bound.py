"""The search over what the tables leave open: degrees, micro-batch size, ZeRO level, recompute, cuts.

Every point (degrees, micro-batch, ZeRO level) has a lower bound that rises as more is asked of it:

    work     the operators' time, each in its fastest strategy, nothing between them
    splits   the best splits, changes of placement and what no backward hides of gradient sync paid, memory without end
    room     stages whose bytes fit in the splits and the recompute that take least of them
    memory   the same with a price on bytes (Lagrange), each class of blocks in its best way to recompute
    stages   the splits of every stage by itself, with its messages, in the cuts that could win

Points are taken from a queue by least bound. One that has room is cut into stages exactly (`autopart.planner.cuts`),
which gives a plan; where the bound that knows of memory is still below the best, splits for less memory are tried,
and those made for its cuts. Last, where memory binds and enough may be won, a small model's stages are refined one by
one (`autopart.planner.exact_refinement`) within a limit; `Request.exact` asks for all of that. The search
ends when no bound is below the best plan's time. The least bound that was left is what the plan's gap is proven
against: no plan of this space is faster by this cost model.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopart.cost.compute import Array
from autopart.cost.intervals import NEVER, interval_ends, interval_index
from autopart.cost.training_state import update_seconds
from autopart.errors import PartitionError, few
from autopart.hardware.mesh import divisors
from autopart.passes.solve import Solution
from autopart.passes.split_problem import SplitProblem
from autopart.plan.search_summary import SearchSummary
from autopart.plan.units import seconds_text
from autopart.planner.allowed_choices import Options, both
from autopart.planner.candidate import Candidate, way_of
from autopart.planner.cuts import best_cut
from autopart.planner.exact_refinement import fastest_that_fit, is_small
from autopart.planner.infeasibility import Shortage, closest, nothing_fits
from autopart.planner.lower_bounds import Bounds
from autopart.planner.request import Request, SearchPoint
from autopart.planner.search_space import SearchSpace
from autopart.planner.stage_bounds import (
    VARIABLES,
    Span,
    Starts,
    cuts_by_bound,
    few_cuts,
    relaxed_cut,
    relaxed_stages,
    spans_of,
)

OnProgress = Callable[[str], None]
"""Told how far the search is: the best plan's time, the bound, the gap between them."""

SPLITS, ROOM, CUT, MEMORY, OTHERS = range(5)
"""What is next for a point: its bounds by rising level, its first cut in between, last splits for less memory."""

EXACT_TRIES, TRIES = 500, 24
"""Ranges of positions that a search refines at most: where the optimum is asked for, and else."""

WORTH = 0.01
"""Share of a step that refining must be able to win where the optimum is not asked for."""

TOLERANCE = 1e-9
"""Relative difference below which two times are the same."""

OFTEN = 0.5
"""Seconds between two words where no better plan is found."""


def silent(text: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class SearchResult:
    """A plan before it is written out.

    chosen     the option of every node, in each stage
    starts     the first position of every stage;  recompute: what every position does
    seconds    of a step;  bound: no plan of the search space is faster
    """

    point: SearchPoint
    chosen: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    recompute: tuple[str, ...]
    stage_seconds: tuple[float, ...]
    seconds: float
    bound: float = 0.0
    refined: int = 0
    """Ranges of positions whose splits were refined;  stopped: whether a limit left others that could win."""
    stopped: bool = False
    summary: SearchSummary | None = None
    problems: tuple[SplitProblem, ...] = ()
    """The ILP that the splits of every stage solve."""


@dataclass
class Search:
    """The queue, the best plan so far, and the least bound of all points that are done with."""

    space: SearchSpace
    on_progress: OnProgress
    best: SearchResult | None = None
    closed: float = NEVER
    ways: dict[SearchPoint, list[Candidate]] = field(default_factory=dict)
    bounds: dict[SearchPoint, Bounds] = field(default_factory=dict)
    """Of points whose room was looked at."""
    higher: set[SearchPoint] = field(default_factory=set)
    """Points of which the next ZeRO level is in the queue, or was."""
    reached: dict[SearchPoint, float] = field(default_factory=dict)
    """The best time of a point's plans."""
    open: dict[SearchPoint, tuple[list[float], dict[int, Array]]] = field(default_factory=dict)
    """Prices of a byte to try and bounds of all ranges, at points whose splits for less memory wait for their turn."""
    hopeless: list[SearchPoint] = field(default_factory=list)
    """Points at which parameters and their states alone are too much."""
    queue: list[tuple[float, int, SearchPoint]] = field(default_factory=list)
    pushed: dict[SearchPoint, float] = field(default_factory=dict)
    """Every point that was ever in the queue, with its last lower bound in seconds."""
    number: int = 0
    tries: int = 0
    """Ranges that were refined;  stopped: whether others were left for there were too many."""
    stopped: bool = False
    variables: int = 0
    """Of all relaxations of single cuts that were solved."""
    quick: bool = False
    """Whether to leave out what only brings bounds nearer, and splits for less memory where a plan is known."""
    short: Shortage | None = None
    """What is lacking where nothing fits."""
    said: tuple[float, float] = (0.0, NEVER)
    """When something was said last, and the time of the best plan then."""

    def run(self) -> SearchResult:
        """The best plan. Raises PartitionError where none fits."""
        request = self.space.request
        started = time.monotonic()
        for point in points(self.space):
            levels = zero_levels(self.space, point)
            if levels and all(self.space.options(point).values()):
                work = self.space.least_work(point)
                for at in (replace(point, zero=zero) for zero in self._heads(point, levels)):
                    self._push(self._passes(point) * max(work, self.space.known_bound(at)), SPLITS, at)
        while self.queue and self.queue[0][0] < self._time() * (1 - TOLERANCE):
            late = request.time_limit is not None and time.monotonic() - started > request.time_limit
            if self.best is not None and (late or (request.nodes is not None and self.number >= request.nodes)):
                break
            self.number += 1
            bound, level, point = heapq.heappop(self.queue)
            if level >= MEMORY and self.quick and self.best is not None:
                self._close(bound)
                continue
            (self._splits, self._room, self._cut, self._memory, self._others)[level](point, bound)
            self._tell()
        if self.best is None:
            self.short = closest(self.space, self.ways, self.hopeless)
            raise nothing_fits(self.space, self.short)
        return replace(self.best, bound=self._bound(), refined=self.tries, stopped=self.stopped)

    def begin(self, near: Sequence[SearchPoint]) -> None:
        """Look at some points first, with their fastest splits, from their ZeRO level on: what they give the search
        need not look below. `near` is in the order of known bounds."""
        known, started = set(points(self.space)), time.monotonic()
        for point in near:
            late = time.monotonic() - started > (self.space.request.time_limit or NEVER)
            if self.best and (late or self._passes(point) * self.space.known_bound(point) >= self._time()):
                break
            levels = zero_levels(self.space, point) if replace(point, zero=0) in known else []
            levels = levels[levels.index(point.zero) if point.zero in levels else 0 :]
            if not levels or not all(self.space.options(point).values()):
                continue
            at = replace(point, zero=levels[0])
            solution = self.space.solve(at, 0.0, self.space.forced(at))
            if solution is None:
                continue
            for at in (replace(point, zero=zero) for zero in levels):
                self.ways[at] = [way_of(self.space, at, solution)]
                if self._best(at):
                    break

    @property
    def _updates(self) -> bool:
        """Whether the optimizer's step was measured, which higher ZeRO levels make shorter by so much or so little that
        each is a point of its own from the start."""
        return self.space.mesh.device.measured is not None

    def _heads(self, point: SearchPoint, levels: Sequence[int]) -> Sequence[int]:
        """The levels that are a point of their own from the start: those that the one before does not bound."""
        if self._updates:
            return levels
        unsure = point.dp > 1 and levels[0] == 0 and slower(self.space, point, 0, 1) > TOLERANCE
        return levels[: 1 + unsure]

    def _bound(self) -> float:
        """No plan that was or will be looked at is faster."""
        return min(self.closed, self.queue[0][0] if self.queue else NEVER, self._time())

    def _push(self, bound: float, level: int, point: SearchPoint) -> None:
        self.pushed[point] = bound
        heapq.heappush(self.queue, (bound, level, point))

    def _close(self, bound: float) -> None:
        self.closed = min(self.closed, bound)

    def _tell(self) -> None:
        """Say how far the search is, where the best plan is new, or it is time to."""
        if self.best is None or (self.best.seconds >= self.said[1] and time.monotonic() - self.said[0] < OFTEN):
            return
        self.said = time.monotonic(), self.best.seconds
        best, bound = self.best.seconds, self._bound()
        gap = max(0.0, 1 - bound / best)
        self.on_progress(f"best {seconds_text(best)}, bound {seconds_text(bound)}, gap {gap:.1%}, {self.number} points")

    def _time(self) -> float:
        return self.best.seconds if self.best else NEVER

    def _passes(self, point: SearchPoint) -> float:
        return point.passes(self.space.request.global_batch)

    def _splits(self, point: SearchPoint, bound: float) -> None:
        """The best splits with memory without end, unless what was learnt from other points' says that others are to
        come first. A point without room is left for higher ZeRO levels, and to be told of where nothing fits."""
        below = self._passes(point) * self.space.below(point)
        if below > bound and below > self._bound():
            self._push(below, SPLITS, point)
            return
        if not self.space.has_room(point):
            self.hopeless.append(point)
            self._more_zero(point, bound)
            return
        self._push(max(bound, self._passes(point) * self.space.relaxed(point)), CUT if self.quick else ROOM, point)

    def _room(self, point: SearchPoint, bound: float) -> None:
        """A better bound where not all stages have room for all that the fastest splits keep."""
        least, _ = self._least(point, self._bounds(point))
        if least > bound * (1 + TOLERANCE):
            self._more_zero(point, bound)
        if least < self._time():
            self._push(max(bound, least), CUT, point)
        elif self.best is None:
            self._push(bound, CUT, point)  # to be told of where nothing fits

    def _cut(self, point: SearchPoint, bound: float) -> None:
        """The best cut with the splits known. If it reaches its bound, the point is done with, and so are higher ZeRO
        levels, which take no less time."""
        solution = self.space.solve(point, 0.0, self.space.forced(point))
        assert solution is not None
        bound = max(bound, self._passes(point) * solution.bound)
        self.ways[point] = [way_of(self.space, point, solution)]
        found = self._best(point)
        if found is not None and found.seconds <= bound * (1 + TOLERANCE):
            self._close(bound)
            return
        self._push(bound, MEMORY, point)
        self._more_zero(point, bound)

    def _more_zero(self, point: SearchPoint, bound: float) -> None:
        """Put the point in the queue that has the next ZeRO level, once."""
        levels = zero_levels(self.space, point)
        following = levels[levels.index(point.zero) + 1 :]
        if following and following[0] not in self._heads(point, levels) and point not in self.higher:
            self.higher.add(point)
            self._push(bound, SPLITS, replace(point, zero=following[0]))

    def _memory(self, point: SearchPoint, bound: float) -> None:
        """Better bounds, as long as a higher price of a byte brings any."""
        bounds, prices = self._bounds(point), self._price_list(point)
        least, columns = self._least(point, bounds)
        for price in prices[1:] if least < self._time() else ():
            before = least
            bounds.look(price)
            least, columns = self._least(point, bounds)
            if least >= self._time() or least <= before * (1 + TOLERANCE):
                break
        bound = max(bound, least)
        if bound >= self._time():
            return
        self.open[point] = prices, columns
        self._push(bound, OTHERS, point)

    def _bounds(self, point: SearchPoint) -> Bounds:
        """The bounds of a point, at first of bytes alone and of time alone."""
        if point not in self.bounds:
            self.bounds[point] = bounds = Bounds(self.space, point)
            bounds.look(NEVER)
            bounds.look(0.0)
        return self.bounds[point]

    def _least(self, point: SearchPoint, bounds: Bounds) -> tuple[float, dict[int, Array]]:
        """A bound below the best cut, endless where none can be better than the best plan; and that of every range."""
        space, m = self.space, self.space.micro_batches(point)
        columns = bounds.columns(self._most(point))
        found = best_cut(_masked(columns, space, point, space.stages(point)), point.pp, m)
        if found is None:
            return NEVER, columns
        return max(found.seconds, space.relaxed(point) + (m - 1) * found.largest), columns

    def _others(self, point: SearchPoint, bound: float) -> None:
        """Splits that take less memory; where not even those that take least fit, and a plan is known, no others."""
        space, ways, (prices, columns) = self.space, self.ways[point], self.open.pop(point)
        self._add(point, NEVER, {group: mode for group in space.model(point).blocks for mode in space.modes[-1:]})
        if self._best(point) or self.best is None:
            for price in prices:
                for modes in space.best_modes(point, price):
                    self._add(point, price, modes)
            if len(ways) > 2:
                self._best(point)
        if few_cuts(space, point):
            bound = max(bound, self._bound_stages(point, columns))
        if self._may_refine(point, bound, bool(prices)):
            self._refine(point, columns)
        self._close(bound)

    def _bound_stages(self, point: SearchPoint, columns: Mapping[int, Array]) -> float:
        """A bound on the plans of a point, better with every stage that is bounded by itself, as far as the limit on
        variables allows; endless where no cut can win. The splits of the best cut are tried. Raises `columns`."""
        space, m, solved = self.space, self.space.micro_batches(point), set[Span]()
        masked, positions = _masked(columns, space, point, space.stages(point)), len(space.layered.labels)
        while (cut := best_cut(masked, point.pp, m)) and cut.seconds < self._time():
            spans = spans_of(cut.starts, positions)
            left = [span for span in spans if span not in solved]
            if not left or not self._may_relax(point):
                self._split_for(point, spans)
                break
            for span in left:
                bound, _ = relaxed_stages(space, point, [span], space.options(point))
                for column in columns.values():
                    at = interval_index(*span, positions)
                    column[at] = max(column[at], bound)
            solved.update(left)
            self.variables += len(left) * space.model(point).solver.columns
        if cut is None or cut.seconds >= self._time():
            return cut.seconds if cut else NEVER
        return max(cut.seconds, self._bound_cuts(point, [masked(stage) for stage in range(point.pp)]))

    def _bound_cuts(self, point: SearchPoint, columns: Sequence[Array]) -> float:
        """The same by cuts that are bounded whole, whose splits are tried."""
        space, m, solved = self.space, self.space.micro_batches(point), set[Starts]()
        cuts = cuts_by_bound(columns, len(space.layered.labels), m)
        while cuts and cuts[0][0] < self._time() and cuts[0][2] not in solved and self._may_relax(point):
            bound, largest, starts = cuts[0]
            self.variables += point.pp * space.model(point).solver.columns
            solved.add(starts)
            total, choices = relaxed_cut(space, point, starts)
            if sum(self._take(point, space.confirmed(point, found)) for found in choices):
                self._best(point)
            heapq.heapreplace(cuts, (max(bound, total + (m - 1) * max(largest, total / point.pp)), largest, starts))
        return cuts[0][0] if cuts else NEVER

    def _may_relax(self, point: SearchPoint) -> bool:
        """Whether the limit leaves the relaxations of one more cut."""
        return self.variables + point.pp * self.space.model(point).solver.columns <= VARIABLES

    def _split_for(self, point: SearchPoint, spans: Sequence[Span]) -> None:
        """Try the splits that are best for a cut: the same in all stages, then of each where it agrees with these."""
        space, model = self.space, self.space.model(point)
        _, whole = relaxed_stages(space, point, spans, space.options(point))
        whole = whole and space.confirmed(point, whole)
        if whole is not None:
            self._take(point, whole)
            agreeing = both(space.options(point), model.agreeing(model.interface(whole.chosen)))
            for span in spans:
                _, found = relaxed_stages(space, point, [span], agreeing)
                self._take(point, found and space.confirmed(point, found))
        self._best(point)

    def _may_refine(self, point: SearchPoint, bound: float, binds: bool) -> bool:
        """Whether a small model's stages are refined one by one: where that can win, and the optimum is asked for or
        memory `binds` and the gap is worth it."""
        if not is_small(self.space, point) or bound >= min(self._time(), self.reached.get(point, NEVER)):
            return False
        return self.space.request.exact or (binds and bound < self._time() * (1 - WORTH))

    def _add(self, point: SearchPoint, price: float, modes: Mapping[int, str]) -> None:
        """One more way, if there is one at a price of a byte."""
        self._take(point, self.space.solve(point, price, modes))

    def _take(self, point: SearchPoint, solution: Solution | None) -> bool:
        """Keep a solution as one more way of a point, if there is one and it is new."""
        if solution is None or any(solution.chosen == way.solution.chosen for way in self.ways[point]):
            return False
        self.ways[point].append(way_of(self.space, point, solution))
        return True

    def _refine(self, point: SearchPoint, least: Mapping[int, Array]) -> None:
        """The last step, for small models: wherever memory makes a range slower than its bound, the fastest splits that
        fit, for every way to pass values between stages that is known and every number of blocks run again."""
        space, ways = self.space, self.ways[point]
        model, blocks = space.model(point), set(space.model(point).blocks)
        stages = sorted({(s, space.in_flight(point, s)) for s in range(point.pp)})

        def rounds() -> Iterator[tuple[Candidate | None, tuple[int, int]]]:
            """Without regard to other stages first, then again so that stages agree."""
            yield from itertools.product([None], stages)
            alone = {way.interface: way for way in ways}.values() if point.pp > 1 else ()
            yield from itertools.product(list(alone), stages)

        for near, (stage, flights) in rounds():
            allowed = space.options(point)
            if near is not None:
                allowed = both(allowed, model.agreeing(near.interface))
            same = [w for w in ways if near is None or w.interface == near.interface]
            known = self._fastest(same, [flights], NEVER)[flights]
            open_ = (least[flights] < self._time()) & (known > least[flights] * (1 + TOLERANCE))
            every = np.transpose(interval_ends(len(space.layered.labels)))
            for i, j in every[open_ & space.stages(point)[stage]].tolist():
                if (i == 0) != (stage == 0) or (j == len(space.layered.labels)) != (stage == point.pp - 1):
                    continue
                many = {g: model.table.group[i:j].count(g) for g in blocks & set(model.table.group[i:j])}
                for counts in _counts(many, space.modes):
                    if self.tries >= (EXACT_TRIES if space.request.exact else TRIES):
                        self.stopped = True
                        break
                    self.tries += 1
                    self._refine_range(point, (i, j), counts, flights, allowed)
        self._best(point)

    def _refine_range(
        self, point: SearchPoint, span: tuple[int, int], counts: Mapping[int, Mapping[str, int]], flights: int,
        allowed: Options,
    ) -> None:  # fmt: skip
        """The fastest splits of a range that fit. What stages make for themselves is not among the solver's bytes:
        where it is too much, there is so much less room."""
        space, ways, room = self.space, self.ways[point], self.space.limit
        for _ in range(4):
            found = fastest_that_fit(space, point, span, room, counts, flights, allowed)
            if found is None:
                return
            way = next((w for w in ways if w.solution.chosen == found.chosen), None)
            if way is None:
                way = way_of(space, point, found)
                ways.append(way)
            lack = way.costs.shortfall(flights, space.limit, space.modes)[way.costs.index(*span)]
            if lack <= 0:
                return
            room -= lack

    def _price_list(self, point: SearchPoint) -> list[float]:
        """A price of a byte that only tells splits of equal time apart, those at which blocks begin to be run again,
        and above; none where memory does not bind."""
        space, way = self.space, self.ways[point][0]
        reached = self.reached.get(point, NEVER)
        if reached < NEVER:
            held = {space.in_flight(point, stage): way.costs.seconds for stage in range(point.pp)}
            free = best_cut(_masked(held, space, point, space.stages(point)), point.pp, space.micro_batches(point))
            if free and reached <= free.seconds * (1 + TOLERANCE):
                return []
        ratios = sorted(s.seconds / s.bytes for group in way.costs.savings[-1].values() for s in group)
        whole = way.costs.index(0, len(space.layered.labels))
        rows = way.costs.seconds, way.costs.saved_bytes, way.costs.state_bytes
        seconds, kept, state = (float(row[whole]) for row in rows)
        ratios = ratios or [seconds / max(kept, 1.0)]
        least = 1e-6 * seconds / max(kept + state, 1.0)
        return [min(least, ratios[0]), *ratios, *(ratios[-1] * factor for factor in (3, 30, 1000))]

    def _best(self, point: SearchPoint) -> SearchResult | None:
        """The best plan of the ways known for a point."""
        best: SearchResult | None = None
        by_interface: dict[tuple[object, ...], list[Candidate]] = {}
        for way in self.ways[point]:
            by_interface.setdefault(way.interface, []).append(way)
        for ways in by_interface.values():
            found = self._stages(point, ways)
            if found and (best is None or found.seconds < best.seconds):
                best = found
        self.reached[point] = best.seconds if best else NEVER
        if best and best.seconds < self._time() * (1 - TOLERANCE):
            self.best = best
        return best

    def _most(self, point: SearchPoint) -> float:
        """Seconds of a micro-batch above which no stage is part of a better plan."""
        m, total = self.space.micro_batches(point), self.space.relaxed(point)
        return (self._time() - total) / (m - 1) if m > 1 else self._time()

    def _fastest(self, ways: Sequence[Candidate], flights: Iterable[int], most: float) -> dict[int, Array]:
        """For every number of micro-batches in flight f of the best of some ways, as far as it is at most
        `most`."""
        space, columns = self.space, dict[int, Array]()
        places = [(way.costs, way.costs.within(most)) for way in ways]
        for number in flights:
            columns[number] = column = np.full_like(ways[0].costs.seconds, NEVER)
            for ranges, where in places:
                f = ranges.least_seconds(where, number, space.limit, space.modes)
                column[where] = np.minimum(column[where], np.where(f <= most, f, NEVER))
        return columns

    def _stages(self, point: SearchPoint, ways: Sequence[Candidate]) -> SearchResult | None:
        """The best cut where every stage takes any of some ways that agree on what passes between them."""
        space, m, most = self.space, self.space.micro_batches(point), self._most(point)
        held = self._fastest(ways, {space.in_flight(point, stage) for stage in range(point.pp)}, most)
        cut = best_cut(_masked(held, space, point, space.stages(point)), point.pp, m)
        if cut is None:
            return None
        ends = (*cut.starts[1:], len(space.layered.labels))
        chosen, modes, times, problems = [], [], [], []
        for stage, (i, j) in enumerate(zip(cut.starts, ends, strict=True)):
            flights, where = space.in_flight(point, stage), np.array([ways[0].costs.index(i, j)])
            times_of = [way.costs.least_seconds(where, flights, space.limit, space.modes)[0] for way in ways]
            way = ways[int(np.argmin(times_of))]
            mine = way.costs.modes(i, j, flights, space.limit, space.modes)
            chosen.append(way.solution.chosen)
            problems.append(way.solution.problem)
            modes += mine
            times.append(way.costs.exact_seconds(i, j, mine))
        seconds = sum(times) + (m - 1) * max(times)
        splits = tuple(filter(None, problems))
        return SearchResult(point, tuple(chosen), cut.starts, tuple(modes), tuple(times), seconds, problems=splits)


def _counts(many: Mapping[int, int], modes: Sequence[str]) -> Iterator[dict[int, dict[str, int]]]:
    """All ways to have so many blocks of every class do as each of the modes says."""

    def of(count: int) -> list[dict[str, int]]:
        picks = itertools.combinations_with_replacement(modes, count)
        return [{mode: pick.count(mode) for mode in set(pick)} for pick in picks]

    for chosen in itertools.product(*(of(count) for count in many.values())):
        yield dict(zip(many, chosen, strict=True))


def _masked(
    columns: Mapping[int, Array], space: SearchSpace, point: SearchPoint, allowed: Sequence[NDArray[np.bool_]]
) -> Callable[[int], Array]:
    """f[s, i, j] from that of every number of micro-batches in flight, infinite where constraints say no."""
    every = all(mask.all() for mask in {id(mask): mask for mask in allowed}.values())

    def column(stage: int) -> Array:
        f = columns[space.in_flight(point, stage)]
        return f if every else np.where(allowed[stage], f, NEVER)

    return column


def search(space: SearchSpace, on_progress: OnProgress = silent) -> SearchResult:
    """The best plan of a space. Raises PartitionError where none fits."""
    return Search(space, on_progress).run()


def zero_levels(space: SearchSpace, point: SearchPoint) -> list[int]:
    """The ZeRO levels to try, by the time they take: without a data-parallel axis they are all the same; level 1 takes
    less memory than level 0 where an optimizer keeps states, and often less time: with a master copy, or where the
    optimizer's step is counted. Where the backward hides enough of level 0's messages, either may take less."""
    request = space.request
    levels = [zero for zero in (0, 1, 2, 3) if request.zero in (None, zero) and request.allows("zero", zero)]
    if point.dp == 1:
        return levels[:1]
    faster = levels[:2] == [0, 1] and slower(space, point, 1, 0) < -TOLERANCE
    return levels[1:] if faster and _held_at_end(space, point, 1) <= _held_at_end(space, point, 0) else levels


def _held_at_end(space: SearchSpace, point: SearchPoint, zero: int) -> float:
    """Bytes a byte of parameters takes at the end of a step at a ZeRO level, all in one message."""
    training = space.training(replace(point, zero=zero))
    return sum(training.state_bytes(1.0, True, True)) + float(training.end_of_step_workspace(1.0, 1.0))


def slower(space: SearchSpace, point: SearchPoint, one: int, other: int) -> float:
    """Of ZeRO levels 0 and 1, how many seconds longer parameters take at `one` than at `other` at most, whatever the
    backward hides of either, to those they take where it hides nothing: the messages that it can hide count as far as
    those of one are more."""
    seconds, device = [], space.device(point)
    for training in (space.training(replace(point, zero=zero)) for zero in (one, other)):
        beside = device.overlapped_share * training.overlappable_seconds(1.0, True)
        whole = training.sync_seconds(1.0, True) + update_seconds(1.0, True, True, training, device)
        seconds.append((whole, beside))
    (mine, hidden), (theirs, others) = seconds
    return (mine - hidden - (theirs - others) + max(0.0, hidden - others)) / theirs


def points(space: SearchSpace) -> Iterator[SearchPoint]:
    """Every combination of degrees and micro-batch that divides; PartitionError if there is none. `tp` stays inside a
    host, unless constraints want it otherwise or there are fewer samples than hosts."""
    mesh, request, layered = space.mesh, space.request, space.layered
    units, rejected = len(layered.labels), [f"asked for: {c.text}" for c in request.constraints]
    if not space.schedule:
        raise PartitionError("no schedule is left", "; ".join(rejected))
    found, within = False, divisors(mesh.devices_per_host)
    for pp in filter(partial(request.allows, "pp"), [request.pp] if request.pp else divisors(mesh.size)):
        if pp > units:
            rejected.append(f"pp={pp} stages but the model has {units} places to cut")
            continue
        for tp in filter(partial(request.allows, "tp"), [request.tp] if request.tp else divisors(mesh.size // pp)):
            dp = mesh.size // pp // tp
            if request.dp not in (None, dp) or pp * dp * tp != mesh.size or not request.allows("dp", dp):
                continue
            narrow = any(map(partial(request.allows, "tp"), within)) and request.global_batch >= mesh.hosts
            if tp > mesh.devices_per_host and not request.tp and narrow:
                continue
            sizes = [request.micro_batch] if request.micro_batch else _micro_batches(request.global_batch, dp)
            if not request.micro_batch and not layered.traced.mean_of_samples:
                sizes = [request.global_batch]
            for size in filter(partial(request.allows, "micro_batch"), _all_sizes(request, sizes, dp)):
                if size % dp or request.global_batch % size:
                    rejected.append(f"{size} samples do not divide over dp={dp} ranks")
                    continue
                found = True
                yield SearchPoint(pp, dp, tp, size)
            if not sizes:
                rejected.append(f"{request.global_batch} samples do not divide over dp={dp} ranks")
    if not found:
        why = few(list(dict.fromkeys(rejected)), joint="; ")
        raise PartitionError("no degrees fit the batch and the mesh", why, _instead(space))


def _instead(space: SearchSpace) -> str:
    """Every setting that is asked for, with the values at which there would be points, all else as it is."""
    ways = []
    for name in ("dp", "tp", "pp", "micro_batch"):
        if getattr(space.request, name) is not None and name not in dict(space.mesh.axes):
            left: dict[str, Any] = {name: None}
            free = replace(space, request=replace(space.request, **left))
            with suppress(PartitionError):
                ways.append(f"{name}={' or '.join(map(str, sorted({getattr(p, name) for p in points(free)})))}")
    return "; ".join(ways) or "other degrees, or another batch"


def _all_sizes(request: Request, sizes: list[int], dp: int) -> list[int]:
    """The sizes to try; where constraints leave none of them, every one that divides."""
    if any(request.allows("micro_batch", size) for size in sizes):
        return sizes
    return [size for size in divisors(request.global_batch) if size % dp == 0]


def _micro_batches(global_batch: int, dp: int) -> list[int]:
    """dp x 1, 2, 4, ... samples, as far as they divide the batch."""
    sizes, size = [], dp
    while size <= global_batch:
        if global_batch % size == 0:
            sizes.append(size)
        size *= 2
    return sizes
