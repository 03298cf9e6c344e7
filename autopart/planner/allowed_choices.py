"""Constraints by hand -> the choices that they allow: options of nodes, checkpointing modes, intervals of stages."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from autopart.cost.liveness import AUTOMATIC, MODES
from autopart.cost.position_costs import PositionCosts
from autopart.errors import PartitionError
from autopart.planner.constraints import Constraint, Positions, Setting
from autopart.planner.cut_constraints import Cuts
from autopart.sharding.notation import R, Strategy
from autopart.sharding.strategy_table import Node, StrategyTable

Options = dict[int, tuple[int, ...]]
"""Node -> the options it may take, for those that may not take all."""


def overriding(constraints: Sequence[Constraint], method: str) -> list[Constraint]:
    """The constraints whose class has its own version of one of `Constraint`'s methods; the others allow all."""
    return [c for c in constraints if getattr(type(c), method) is not getattr(Constraint, method)]


def both(one: Options, other: Options) -> Options:
    """The options that two restrictions allow together."""
    common = {node: tuple(o for o in one[node] if o in other[node]) for node in one.keys() & other.keys()}
    return {**one, **other, **common}


def options_of(table: StrategyTable, constraints: Sequence[Constraint]) -> Options:
    """The options that constraints allow. Where the table has no axis `tp`, constraints on it see every node whole."""
    found: Options = {}
    for constraint in overriding(constraints, "allows_strategy"):
        for index, node in enumerate(table.nodes):
            before = found.get(index, tuple(range(len(node.options))))
            left = tuple(o for o in before if _allows(constraint, table, node, o))
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
    """The MODES that every position may take. Of blocks: the mode that is asked for; else those of AUTOMATIC; others
    where constraints allow none of these. Of other positions: "none" alone. Raises PartitionError where constraints
    allow no mode.

    A constraint on the setting `recompute` is about every block: "not recompute=full" forbids each to recompute in
    full.
    """
    mixed = next((c for c in constraints if isinstance(c, Setting) and c.value == "mixed"), None)
    if mixed:
        raise PartitionError(f"{mixed.text} is not possible", "it names no block", '"recompute layers.3 full"')
    allowed = []
    for label, is_block in zip(labels, block, strict=True):
        modes = ([asked] if asked else list(MODES)) if is_block else ["none"]
        possible = [m for m in modes if all(_allows_mode(c, label, is_block, m) for c in constraints)]
        left = [m for m in possible if m in AUTOMATIC] or possible
        if not left:
            texts = [c.text for c in constraints if not all(_allows_mode(c, label, is_block, m) for m in modes)]
            why = "only numbered blocks are recomputed" if not is_block else "its modes are all ruled out"
            raise PartitionError(f"{label or 'the loss'} can recompute in no way: {'; '.join(texts)}", why)
        allowed.append(tuple(left))
    return tuple(allowed)


def _allows_mode(constraint: Constraint, label: str, is_block: bool, mode: str) -> bool:
    of_setting = not is_block or constraint.allows_setting("recompute", mode)
    return of_setting and constraint.allows_recompute(label, mode)


def positions_of(
    labels: Sequence[str], classes: Mapping[str, str], table: StrategyTable, costs: PositionCosts | None = None
) -> Positions:
    """The `Positions` that constraints on cuts read; with predicted seconds and bytes where `costs` are given."""
    parameters = [0.0] * len(labels)
    for index, readers in table.state.items():
        for positions in readers:
            parameters[positions[0]] += table.nodes[index].values[0].bytes
    types = tuple(classes.get(label, "") for label in labels)
    if costs is None:
        return Positions(tuple(labels), types, tuple(parameters))
    seconds, size = costs.forward + costs.backward, costs.state_bytes.sum(0) + costs.saved_bytes[0]
    return Positions(tuple(labels), types, tuple(parameters), tuple(seconds.tolist()), tuple(size.tolist()))


def stages_of(constraints: Sequence[Constraint], stages: int, positions: Positions) -> list[NDArray[np.bool_]]:
    """For every stage a mask [i, j]: whether it may be the positions i..j-1."""
    n = len(positions.labels)
    masks = [np.ones((n + 1, n + 1), dtype=bool) for _ in range(stages)]
    for constraint in overriding(constraints, "allows_stage"):
        if isinstance(constraint, Cuts):
            bounds = (*constraint.starts(stages, positions), n)
            for stage, mask in enumerate(masks):
                only = np.zeros_like(mask)
                only[bounds[stage], bounds[stage + 1]] = True
                mask &= only
            continue
        for stage, mask in enumerate(masks):
            for i, j in zip(*np.nonzero(np.triu(mask, 1)), strict=True):
                mask[i, j] = constraint.allows_stage(stage, int(i), int(j), stages, positions)
    return masks
