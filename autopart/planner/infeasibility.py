"""Where nothing fits: the stage that lacks bytes, how many, and who takes most."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autopart.cost.intervals import NEVER
from autopart.errors import PartitionError, few
from autopart.plan.units import bytes_text
from autopart.planner.candidate import Candidate, way_of
from autopart.planner.cuts import best_cut
from autopart.planner.request import Request, SearchPoint
from autopart.planner.search_space import SearchSpace

LOOKED_AT = 8
"""Degrees, those that come closest, that are looked at closer."""


@dataclass(frozen=True)
class Shortage:
    """How many bytes a stage lacks at its smallest, and its largest tenants."""

    point: SearchPoint
    stage: int
    bytes: float
    largest: tuple[tuple[str, float], ...]


def closest(
    space: SearchSpace, tried: Mapping[SearchPoint, Sequence[Candidate]], hopeless: Sequence[SearchPoint]
) -> Shortage | None:
    """What the point that comes closest lacks, in the splits that take least memory; None where it is not memory that
    keeps all from being a plan. Of points that are `hopeless` none was tried."""
    short = [s for point, ways in tried.items() for way in ways if (s := _shortage(space, point, way))]
    near = [s.point for s in sorted(short, key=lambda s: s.bytes)]
    for point in (*_distinct(near), *_distinct(sorted(hopeless, key=lambda p: (-p.zero, p.micro_batch)))):
        for modes in space.best_modes(point, NEVER):
            solution = space.solve(point, NEVER, modes)
            found = _shortage(space, point, way_of(space, point, solution)) if solution else None
            short += [found] if found else []
    found = min(short, key=lambda s: s.bytes, default=None)
    return found if found and found.bytes > 0 else None


def _distinct(points: Sequence[SearchPoint]) -> list[SearchPoint]:
    """The first points of different degrees."""
    near: dict[tuple[int, int, int], SearchPoint] = {}
    for point in points:
        near.setdefault((point.pp, point.dp, point.tp), point)
    return list(near.values())[:LOOKED_AT]


def nothing_fits(space: SearchSpace, short: Shortage | None) -> PartitionError:
    """The stage that lacks bytes, and who takes most; or the constraints that leave nothing."""
    asked = "; ".join(c.text for c in space.request.constraints)
    if short is None:
        nodes = {f"{n} has no strategy left" for model in space.models.values() for n in space.stuck(model)}
        why = few(sorted(nodes), joint="; ") or "no cut, or no change of placement between operators, is left"
        return PartitionError(f"no plan does what is asked: {asked}", why, "fewer constraints")
    device, limit = space.mesh.device.name, space.limit
    largest = ", ".join(f"{name} {bytes_text(size)}" for name, size in short.largest)
    return PartitionError(
        f"no plan fits {space.mesh}{f' that does what is asked ({asked})' if asked else ''}; "
        f"the closest has {short.point}",
        f"stage {short.stage} needs {bytes_text(short.bytes + limit)} at its smallest of the {bytes_text(limit)} a "
        f"{device} can give: {bytes_text(short.bytes)} short; largest: {largest}",
        ", ".join(_ways_out(space.request, short.point)),
    )


def _ways_out(request: Request, point: SearchPoint) -> Iterator[str]:
    """What takes less memory and is not so already."""
    yield "more devices"
    if request.recompute not in (None, "full"):
        yield 'recompute="full"'
    if point.micro_batch > point.dp:
        yield "a smaller micro_batch"
    if request.precision not in ("bfloat16", "float16"):
        yield 'precision="bfloat16"'


def _shortage(space: SearchSpace, point: SearchPoint, way: Candidate) -> Shortage | None:
    """Of the cut that leaves the most crowded stage the most room; None where there is no cut."""
    lacks = {
        flights: way.costs.shortfall(flights, space.limit, space.modes)
        for flights in {space.in_flight(point, s) for s in range(point.pp)}
    }
    offset, allowed = min(f.min() for f in lacks.values()), space.stages(point)
    cut = best_cut(lambda s: np.where(allowed[s], lacks[space.in_flight(point, s)] - offset, NEVER), point.pp, 10**6)
    if cut is None:
        return None
    ends = (*cut.starts[1:], len(space.layered.labels))
    stages = list(zip(cut.starts, ends, strict=True))
    stage = max(range(point.pp), key=lambda s: lacks[space.in_flight(point, s)][way.costs.index(*stages[s])])
    here, flights = way.costs.index(*stages[stage]), space.in_flight(point, stage)
    parts = {
        "all parameters, gradients and optimizer states": way.costs.state_bytes[here],
        f"activations of {flights} micro-batches before any is recomputed": flights * way.costs.saved_bytes[here],
        "messages on their way": float(way.costs.message_bytes(np.array([here]), flights)[0]),
        "the largest tensors of the moment": way.costs.others.late[0, here],
    }
    for name, size in sorted(_parameters(space, point, way, stages[stage]).items(), key=lambda item: -item[1])[:2]:
        parts[f"of these {name}"] = size
    largest = sorted(parts.items(), key=lambda item: -item[1])[:5]
    return Shortage(point, stage, float(lacks[flights][here]), tuple(largest))


def _parameters(space: SearchSpace, point: SearchPoint, way: Candidate, span: tuple[int, int]) -> dict[str, float]:
    """Bytes of a stage's parameters with their gradients and optimizer states, one sum for names that differ in the
    numbers of blocks alone: "layers.*.up_proj.weight x 80"."""
    table, prices = space.model(point).table, space.priced(point)
    sizes: dict[str, float] = defaultdict(float)
    names: dict[str, list[str]] = defaultdict(list)
    for index, places in table.state.items():
        here = sum(any(span[0] <= p < span[1] for p in holders) for holders in places)
        each = prices.state[space.model(point).sizes.first[index] + way.solution.chosen[index]]
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", table.nodes[index].key)
        sizes[pattern] += here * float(each)
        names[pattern] += [table.nodes[index].key] * here
    return {
        f"{pattern} x {len(names[pattern])}" if len(names[pattern]) > 1 else names[pattern][0]: size
        for pattern, size in sizes.items()
        if names[pattern]
    }
