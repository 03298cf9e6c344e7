"""The memory that autograd saves in a stage for backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from autopart.ir.graph import info, made_by, operands
from autopart.ir.layered_graph import LayeredGraph
from autopart.passes.stage_graph import Placements, SavedMemory, ShardingAssignment, StageGraph, Value
from autopart.sharding.notation import R, Strategy, saved_as


def note_saved(
    stage: StageGraph,
    layered: LayeredGraph,
    choices: ShardingAssignment,
    node: fx.Node,
    segment: int,
    given: Callable[[Value], Placements],
) -> None:
    """Add to `stage.saved` what autograd saves for the backward of `node`, an operator of `segment`.

    Memory that several operators save is counted once for each placement in which it is saved. `given` tells the
    placement of a value in the stage before any reshard.
    """
    record = info(node)
    chosen = choices.of(layered, node, stage.index)
    inner = record.times * choices.inner(node, chosen)
    entry = stage.saved.setdefault((f"{node.name} inside", ()), SavedMemory(inner, False))
    entry.segments.add(segment)
    for name in record.saves:
        maker, output = made_by(name)
        root = layered.by_name[maker]
        taken = _read_as(node, name, chosen) or given((root, output))
        placements = tuple(map(saved_as, taken))
        total = info(root).times * info(root).output_bytes[output] * choices.grow(info(root))
        size, whole = total / choices.parts(placements), total / choices.parts(taken)
        memory = SavedMemory(size, len(layered.savers[name]) > 1)
        entry = stage.saved.setdefault((name, placements), memory)
        entry.segments.add(segment)
        if whole > size:
            entry.regathered_bytes[segment] = whole - size


def _read_as(node: fx.Node, root: str, chosen: Sequence[Strategy]) -> Placements | None:
    """The placement in which `node` saves the memory `root`: that of the operand it is read through.

    None where it is read through no operand.
    """
    maker, output = made_by(root)
    if maker == node.name:
        return tuple(s.outputs[output] for s in chosen)
    for index, operand in enumerate(operands(node)):
        if operand is not None and info(operand).root == root:
            return tuple(s.inputs[index] or R for s in chosen)
    return None
