"""Where nothing fits: the stage that lacks memory, the bytes that it lacks, and its largest tensors."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autopart.cost.intervals import NEVER, interval_index
from autopart.errors import PartitionError, few
from autopart.plan.units import bytes_text
from autopart.planner.candidate import Candidate, CandidateSet, make_candidate
from autopart.planner.class_bounds import best_modes
from autopart.planner.cuts import best_cut, spans_of
from autopart.planner.request import Request
from autopart.planner.search_points import SearchPoint
from autopart.planner.search_space import SearchSpace

DEGREES = 8
"""Combinations of degrees, the closest first, that are solved for the least memory."""

MINIMAX = 10**6
"""Micro-batches with which the best cut is the one whose largest column is least."""


@dataclass(frozen=True)
class Shortfall:
    """The bytes that a stage lacks, in the splits and the checkpointing of least memory. `largest`: (name, bytes) of
    the largest parts of its memory."""

    point: SearchPoint
    stage: int
    bytes: float
    largest: tuple[tuple[str, float], ...]


def closest(
    space: SearchSpace,
    tried: Mapping[SearchPoint, Sequence[Candidate]],
    state_exceeds_memory: Sequence[SearchPoint],
) -> Shortfall | None:
    """The least shortfall of any point, in the splits of least memory; None where every point fits, so that constraints
    leave no plan. `tried`: point -> its candidates. The points `state_exceeds_memory` have no candidates."""
    found = [s for point, each in tried.items() for c in each if (s := _shortfall(space, point, c))]
    near = [s.point for s in sorted(found, key=lambda s: s.bytes)]
    oversized = sorted(state_exceeds_memory, key=lambda point: (-point.zero, point.shard_size > 0, point.micro_batch))
    for point in (*_distinct_degrees(near), *_distinct_degrees(oversized)):
        for modes in best_modes(space, space.at(point, 0), NEVER):
            solution = space.solve(space.at(point, 0), NEVER, modes)
            shortfall = _shortfall(space, point, make_candidate(space, point, solution)) if solution else None
            found += [shortfall] if shortfall else []
    least = min(found, key=lambda s: s.bytes, default=None)
    return least if least and least.bytes > 0 else None


def _distinct_degrees(points: Sequence[SearchPoint]) -> list[SearchPoint]:
    """The first point of each combination of degrees, at most DEGREES."""
    first: dict[tuple[int, int, int], SearchPoint] = {}
    for point in points:
        first.setdefault(point.degrees, point)
    return list(first.values())[:DEGREES]


def nothing_fits(space: SearchSpace, shortfall: Shortfall | None) -> PartitionError:
    """The error: the stage that lacks bytes and the largest parts of its memory; or the constraints that leave no
    plan."""
    asked = "; ".join(c.text for c in space.request.constraints)
    if shortfall is None:
        nodes = {f"{n} has no strategy left" for model in space.models.values() for n in space.stuck(model)}
        why = few(sorted(nodes), joint="; ") or "no cut, or no change of placement between operators, is left"
        return PartitionError(f"no plan does what is asked: {asked}", why, "fewer constraints")
    at = space.at(shortfall.point, shortfall.stage)
    device, limit = space.view(at).device.name, space.limit(at)
    largest = ", ".join(f"{name} {bytes_text(size)}" for name, size in shortfall.largest)
    return PartitionError(
        f"no plan fits {space.mesh}{f' that does what is asked ({asked})' if asked else ''}; "
        f"the closest has {shortfall.point}",
        f"stage {shortfall.stage} needs {bytes_text(shortfall.bytes + limit)} at its smallest of the "
        f"{bytes_text(limit)} a {device} can give: {bytes_text(shortfall.bytes)} short; largest: {largest}",
        ", ".join(_suggestions(space.request, shortfall.point)),
    )


def _suggestions(request: Request, point: SearchPoint) -> Iterator[str]:
    """Changes that take less memory, without those that the request or the point has already."""
    yield "more devices"
    if request.recompute not in (None, "full"):
        yield 'recompute="full"'
    if point.micro_batch > point.dp:
        yield "a smaller micro_batch"
    if request.precision not in ("bfloat16", "float16"):
        yield 'precision="bfloat16"'


def lacking(space: SearchSpace, point: SearchPoint, candidate: Candidate) -> tuple[tuple[int, ...], list[float]] | None:
    """The first positions of the stages in the cut whose largest shortfall is least, and the bytes that every stage
    lacks there; None where constraints allow no cut."""
    shortfall = {
        (kind, n): candidate.costs[kind].shortfall(n, space.limit(replace(point, kind=kind)), space.modes)
        for kind, n in space.stage_keys(point)
    }
    offset, allowed = min(f.min() for f in shortfall.values()), space.stages(point)
    cut = best_cut(
        lambda s: np.where(allowed[s], shortfall[space.stage_key(point, s)] - offset, NEVER), point.pp, MINIMAX
    )
    if cut is None:
        return None
    n = len(space.layered.labels)
    spans = enumerate(spans_of(cut.starts, n))
    return cut.starts, [float(shortfall[space.stage_key(point, s)][interval_index(*span, n)]) for s, span in spans]


def missing_bytes(found: CandidateSet) -> float:
    """The bytes that a stage lacks in the candidate and the cut with the least such; 0 where constraints allow no
    cut."""
    cuts = [lacking(found.space, found.point, candidate) for candidate in found.candidates]
    return min((max(cut[1]) if cut else 0.0 for cut in cuts), default=0.0)


def _shortfall(space: SearchSpace, point: SearchPoint, candidate: Candidate) -> Shortfall | None:
    """The largest shortfall of any stage, in the cut with the least such; None where constraints allow no cut."""
    found = lacking(space, point, candidate)
    if found is None:
        return None
    starts, missing = found
    spans = spans_of(starts, len(space.layered.labels))
    stage = max(range(point.pp), key=missing.__getitem__)
    costs = candidate.costs[space.at(point, stage).kind]
    here, in_flight = costs.index(*spans[stage]), space.in_flight(point, stage)
    parts = {
        "all parameters, gradients and optimizer states": costs.state_bytes[here],
        f"activations of {in_flight} micro-batches before any is recomputed": in_flight * costs.saved_bytes[here],
        "messages on their way": float(costs.message_bytes(np.array([here]), in_flight)[0]),
        "the largest tensors of the moment": costs.later_backward.mixed[0, here],
    }
    parameters = sorted(_parameters(space, point, candidate, spans[stage]).items(), key=lambda item: -item[1])
    parts |= {f"of these {name}": size for name, size in parameters[:2]}
    largest = sorted(parts.items(), key=lambda item: -item[1])[:5]
    return Shortfall(point, stage, missing[stage], tuple(largest))


def _parameters(
    space: SearchSpace, point: SearchPoint, candidate: Candidate, span: tuple[int, int]
) -> dict[str, float]:
    """Bytes of a stage's parameters with their gradients and optimizer states, one sum for names that differ in the
    numbers of blocks alone: "layers.*.up_proj.weight x 80"."""
    model, prices = space.model(point), space.priced(space.at(point, 0))
    sizes: dict[str, float] = defaultdict(float)
    names: dict[str, list[str]] = defaultdict(list)
    for index, positions in model.table.state.items():
        here = sum(any(span[0] <= p < span[1] for p in readers) for readers in positions)
        each = prices.state[model.sizes.first[index] + candidate.solution.chosen[index]]
        key = model.table.nodes[index].key
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", key)
        sizes[pattern] += here * float(each)
        names[pattern] += [key] * here
    return {
        f"{pattern} x {len(names[pattern])}" if len(names[pattern]) > 1 else names[pattern][0]: size
        for pattern, size in sizes.items()
        if names[pattern]
    }
