"""Lower bounds that need no ILP of a whole model: of every operator by itself, and of the positions of one segment
class; and the checkpointing modes of least bound."""

from functools import partial

import numpy as np

from autopart.cost.intervals import NEVER
from autopart.planner.search_points import SearchPoint
from autopart.planner.search_space import SearchSpace


def best_modes(space: SearchSpace, point: SearchPoint, multiplier: float) -> list[dict[int, str]]:
    """The assignments (segment class -> mode) to try at a memory multiplier: every class of blocks in the mode of
    its least `class_bound`; and for each mode, all classes of blocks in it."""
    blocks = space.model(point).blocks
    uniform = [dict.fromkeys(blocks, mode) for mode in space.modes]
    best = {g: min(space.modes, key=partial(class_bound, space, point, multiplier, g)) for g in blocks}
    return uniform if best in uniform else [best, *uniform]


def class_bound(space: SearchSpace, point: SearchPoint, multiplier: float, segment_class: int, mode: str) -> float:
    """Lower bound on the objective over one segment class with its blocks in a mode.

    multiplier infinite             `Sizes.separable_bound` of the bytes
    multiplier 0, mode not "none"   the bound for "none" + `Sizes.separable_bound` of the recompute seconds
    else                            the LP relaxation over the class
    """
    options = space.options(point)
    key = point, multiplier, segment_class, mode, tuple(options.items())
    if key not in space.bounds:
        model = space.model(point)
        mine = model.segment_classes == segment_class
        costs = np.where(mine, space.objective(point, multiplier, {segment_class: mode}), 0.0)
        if multiplier == NEVER:
            space.bounds[key] = model.sizes.separable_bound(costs, options)
        elif multiplier == 0.0 and mode != "none":
            more = costs - np.where(mine, space.objective(point, multiplier, {}), 0.0)
            none = class_bound(space, point, multiplier, segment_class, "none")
            space.bounds[key] = none + model.sizes.separable_bound(more, options)
        else:
            space.bounds[key] = model.class_solver(segment_class).bound(costs, options)
    return space.bounds[key]


def least_work(space: SearchSpace, point: SearchPoint) -> float:
    """Lower bound on the sum of all stages' seconds: every operator in its fastest strategy."""
    model, prices = space.model(point), [space.priced(at) for at in space.each_kind(point)]
    each = np.minimum.reduce([kind.forward + kind.backward for kind in prices])
    return model.sizes.separable_bound(each * model.counts[: len(each)], space.options(point))


def state_fits(space: SearchSpace, point: SearchPoint) -> bool:
    """Whether parameters, gradients and optimizer states fit in all stages together, in the strategies of fewest
    bytes."""
    model, state = space.model(point), space.priced(space.at(point, 0)).state
    limit = sum(space.limit(space.at(point, stage)) for stage in range(point.pp))
    return model.sizes.separable_bound(state * model.counts[: len(state)], {}) <= limit
