"""What constraints by hand leave of the planner's choices, as numbers: options, modes of recompute, stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from autopart.cost.liveness import MODES
from autopart.cost.position_costs import PositionCosts
from autopart.errors import PartitionError
from autopart.planner.constraints import Constraint, Cuts, Positions, Setting
from autopart.sharding.notation import R
from autopart.sharding.rules import Strategy
from autopart.sharding.strategy_table import Node, StrategyTable

Options = dict[int, tuple[int, ...]]
"""Node -> the options it may take, for those that may not take all."""


def asks(constraints: Sequence[Constraint], method: str) -> list[Constraint]:
    """The constraints that have something to say of what a method of theirs is about."""
    return [c for c in constraints if getattr(type(c), method) is not getattr(Constraint, method)]


def both(one: Options, other: Options) -> Options:
    """The options that two restrictions leave."""
    common = {node: tuple(o for o in one[node] if o in other[node]) for node in one.keys() & other.keys()}
    return {**one, **other, **common}


def options_of(table: StrategyTable, constraints: Sequence[Constraint]) -> Options:
    """The options that constraints leave; a node along an axis that the table does not have is whole."""
    found: Options = {}
    for constraint in asks(constraints, "allows_strategy"):
        for index, node in enumerate(table.nodes):
            mine = found.get(index, tuple(range(len(node.options))))
            left = tuple(o for o in mine if _allows(constraint, table, node, o))
            if len(left) < len(node.options):
                found[index] = left
    return found


def _allows(constraint: Constraint, table: StrategyTable, node: Node, option: int) -> bool:
    chosen = dict(zip(table.axes, node.options[option], strict=True))
    if "tp" not in chosen:
        one = node.options[option][0]
        chosen["tp"] = Strategy("R", tuple(p and R for p in one.inputs), tuple(R for _ in one.outputs))
    return all(constraint.allows_strategy(axis, node.key, strategy) for axis, strategy in chosen.items())


def modes_of(
    labels: Sequence[str], block: Sequence[bool], constraints: Sequence[Constraint], asked: str | None
) -> tuple[tuple[str, ...], ...]:
    """Which of MODES every position may do. Raises PartitionError where that is none.

    A setting of recompute is about every block, so that "not recompute=full" is that none is run again in full.
    """
    mixed = next((c for c in constraints if isinstance(c, Setting) and c.value == "mixed"), None)
    if mixed:
        raise PartitionError(f"{mixed.text} is not possible", "it names no block", '"recompute layers.3 full"')
    every = []
    for label, isblock in zip(labels, block, strict=True):
        modes = ([asked] if asked else list(MODES)) if isblock else ["none"]
        left = [m for m in modes if all(_recomputes(c, label, isblock, m) for c in constraints)]
        if not left:
            texts = [c.text for c in constraints if not all(_recomputes(c, label, isblock, m) for m in modes)]
            why = "only numbered blocks are run again" if not isblock else "its modes are all ruled out"
            raise PartitionError(f"{label or 'the loss'} can recompute in no way: {'; '.join(texts)}", why)
        every.append(tuple(left))
    return tuple(every)


def _recomputes(constraint: Constraint, label: str, isblock: bool, mode: str) -> bool:
    return constraint.allows_recompute(label, mode) and (not isblock or constraint.allows_setting("recompute", mode))


def positions_of(
    labels: Sequence[str], classes: Mapping[str, str], table: StrategyTable, weighed: PositionCosts | None = None
) -> Positions:
    """The row of runs, and what cuts may go by."""
    parameters = [0.0] * len(labels)
    for index, places in table.state.items():
        for holders in places:
            parameters[holders[0]] += table.nodes[index].values[0].bytes
    types = tuple(classes.get(label, "") for label in labels)
    if weighed is None:
        return Positions(tuple(labels), types, tuple(parameters))
    seconds, size = weighed.forward + weighed.backward, weighed.state_bytes.sum(0) + weighed.saved_bytes[0]
    return Positions(tuple(labels), types, tuple(parameters), tuple(seconds.tolist()), tuple(size.tolist()))


def stages_of(constraints: Sequence[Constraint], stages: int, positions: Positions) -> list[NDArray[np.bool_]]:
    """For every stage, whether it may be the runs i to j - 1, for all i, j."""
    n = len(positions.labels)
    found = [np.ones((n + 1, n + 1), dtype=bool) for _ in range(stages)]
    for constraint in asks(constraints, "allows_stage"):
        if isinstance(constraint, Cuts):
            bounds = (*constraint.starts(stages, positions), n)
            for stage, mask in enumerate(found):
                only = np.zeros_like(mask)
                only[bounds[stage], bounds[stage + 1]] = True
                mask &= only
            continue
        for stage, mask in enumerate(found):
            for i, j in zip(*np.nonzero(np.triu(mask, 1)), strict=True):
                mask[i, j] = constraint.allows_stage(stage, int(i), int(j), stages, positions)
    return found
