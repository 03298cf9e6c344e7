"""Lower bounds on the seconds of one stage, by a linear relaxation of its own, and splits made for a cut.

The bounds of `autopart.planner.lower_bounds` take every class of runs for itself. Here operators of different runs of a
stage depend on each other, and the stage's messages have a price:

    f(i, j)  >=  min over splits of  seconds of the positions i..j-1 + messages + gradient sync that cannot be hidden

Each stage of a plan has splits of its own, which agree on what passes between stages. By itself, every stage takes what
it is passed as it likes best. Cuts that still could win are bounded whole, too:

    sum over stages of f  >=  min over splits that agree of the sum of what stands above

Only stages and cuts that could win are solved, the best by the bounds so far first, until the best one is solved
itself. Memory is without end. All this is for models so small that all cuts can be listed.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from autopart.cost.collectives import p2p_seconds
from autopart.cost.compute import Array
from autopart.cost.intervals import NEVER, interval_index
from autopart.cost.prices import Prices
from autopart.hardware.rows import Link
from autopart.passes.solve import Solution
from autopart.passes.split_problem import SplitProblem
from autopart.planner.allowed_choices import Options, both
from autopart.planner.request import SearchPoint
from autopart.planner.search_space import Model, SearchSpace

VARIABLES = 200_000
"""Solver's variables of all relaxations of a search together, at most: a limit that is the same on every machine."""

FEW = 2000
"""Cuts of a model that are listed, at most."""

Span = tuple[int, int]
Starts = tuple[int, ...]


def few_cuts(space: SearchSpace, point: SearchPoint) -> bool:
    """Whether all cuts of a point can be listed."""
    return point.pp > 1 and math.comb(len(space.layered.labels) - 1, point.pp - 1) <= FEW


def cuts_by_bound(columns: Sequence[Array], positions: int, micro_batches: int) -> list[tuple[float, float, Starts]]:
    """A heap of all cuts whose stages have finite bounds, column s being those of stage s: a bound on the step, the
    largest bound of a stage, the first position of every stage."""
    found = []
    for inner in itertools.combinations(range(1, positions), len(columns) - 1):
        spans = spans_of((0, *inner), positions)
        stages = [float(f[interval_index(*span, positions)]) for f, span in zip(columns, spans, strict=True)]
        if max(stages) < NEVER:
            found.append((sum(stages) + (micro_batches - 1) * max(stages), max(stages), (0, *inner)))
    heapq.heapify(found)
    return found


def spans_of(starts: Sequence[int], positions: int) -> list[Span]:
    """The positions i..j-1 of every stage."""
    return list(zip(starts, (*starts[1:], positions), strict=True))


def stage_costs(space: SearchSpace, point: SearchPoint, span: Span) -> Array:
    """By priced variable, seconds of a micro-batch in a stage: a bound below f that is linear in the splits."""
    model, modes, link = space.model(point), space.forced(point), space.between_stages(point)
    there, (beside, _) = model.places_in(*span), space.windows(point)
    seconds = space.costs(point, modes).seconds * there / np.maximum(model.places, 1.0)
    sent = messages(model, space.priced(point), span, link, least=True)[0] if link is not None else 0.0
    alone = model.own[slice(*span)].sum(0)
    return np.asarray(seconds + sent + beside * (there - alone + model.own[span[0]]))


def relaxed_stages(
    space: SearchSpace, point: SearchPoint, spans: Sequence[Span], allowed: Options
) -> tuple[float, Solution | None]:
    """A bound below the seconds of some stages that all have the same splits, and these, where the relaxation is
    integral: of one stage it is a bound below f."""
    costs = np.sum([stage_costs(space, point, span) for span in spans], axis=0)
    bound, found = space.model(point).solver.relax(costs, allowed)
    return bound, found and replace(found, problem=SplitProblem(costs, allowed))


def relaxed_cut(space: SearchSpace, point: SearchPoint, starts: Starts) -> tuple[float, list[Solution]]:
    """A bound below the seconds of all stages of a cut together; and every stage's solution, where the relaxation is
    integral: that of the stage alone, as it agrees with the others."""
    model, options = space.model(point), space.options(point)
    costs = [stage_costs(space, point, span) for span in spans_of(starts, len(space.layered.labels))]
    bound, choices = model.pipeline(point.pp).relax(costs, options)
    agreeing = [both(options, model.agreeing(model.interface(chosen))) for chosen in choices]
    problems = map(SplitProblem, costs, agreeing)
    return bound, [Solution(chosen, 0.0, 0.0, each) for chosen, each in zip(choices, problems, strict=False)]


def messages(model: Model, prices: Prices, span: tuple[int, int], link: Link, least: bool = False) -> Array:
    """By the strategy that makes it: seconds to send what a range of positions takes from others and gives to others,
    and bytes of what it takes. Of a partial sum the bytes are those as made, or the `least` of how it may be taken."""
    sizes, table, found = model.sizes, model.table, np.zeros((2, len(model.places)))
    for flow in table.flows:
        source = table.nodes[flow.source]
        inside = [span[0] <= home < span[1] for home in flow.homes]
        given = [
            here for home, users, here in zip(flow.homes, flow.users, inside, strict=True)
            if home >= 0 and any(p >= 0 and (span[0] <= p < span[1]) != here for p in users)
        ]  # fmt: skip
        if not given or source.kind in ("parameter", "buffer"):
            continue
        value = source.values[flow.output]
        for option in range(len(source.options)):
            have = source.given(option, flow.output)
            wants = [w for h, w in flow.chains if h == have] if least and any(p.kind == "P" for p in have) else []
            size = min(float(sizes.four(value, placed) @ prices.terms.basis) for placed in wants or [have])
            cost = float(p2p_seconds(size, link)) * (1 + value.grad)
            at = sizes.first[flow.source] + option
            found[:, at] += np.array([len(given) * cost, given.count(False) * size])
    return found
