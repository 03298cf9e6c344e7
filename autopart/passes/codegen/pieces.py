"""The pieces of a recomputed block that run once: `saved(function, ...)` and `run_once(function, ...)` in its class."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from autopart.ir.graph import info, is_pick
from autopart.passes.checkpoint_cut import CheckpointCut, pieces

END = None
"""Stands for the end of the block among the nodes that pieces end in."""


@dataclass(frozen=True)
class Piece:
    """Nodes of a block that run in forward alone.

    nodes     in order
    outputs   those of the nodes that the rest of the block reads
    rerun     nodes of the block that backward runs again
    function  of `autopart.runtime` that runs the piece; "" where the nodes are lines of the block
    """

    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    rerun: frozenset[fx.Node]
    function: str


def find_pieces(nodes: Sequence[fx.Node], cut: CheckpointCut | None, outputs: Sequence[fx.Node]) -> list[Piece]:
    """The pieces of a block that gives `outputs`, in order: one for each saved node, and one for the end of the block.

    The second run of a block ends once all that backward reads is there, before the last product. The piece at the end
    of the block needs a function only if it has several products.
    """
    if cut is None:
        return []
    ends, found = pieces(nodes, cut.saved, cut.rerun), []
    for end in [*(n for n in nodes if n in cut.saved), END]:
        mine = tuple(n for n in nodes if n in ends and (ends[n] or {END}) == {end})
        if end is not END:
            found.append(Piece(mine, (end,), cut.rerun, "saved"))
        elif mine:
            several = sum(info(n).product and not is_pick(n) for n in mine) > 1
            given = tuple(o for o in outputs if o in mine)
            found.append(Piece(mine, given, cut.rerun, "run_once" if several else ""))
    return found


def in_order(nodes: Sequence[fx.Node], found: Sequence[Piece]) -> list[fx.Node | Piece]:
    """The nodes of a block, with each piece in place of its last node. The piece at the end of the block is last."""
    last = {piece.nodes[-1]: piece for piece in found if piece.function == "saved"}
    others = {node for piece in found for node in piece.nodes} - last.keys()
    items: list[fx.Node | Piece] = [last.get(node, node) for node in nodes if node not in others]
    for piece in found:
        items += [piece] if piece.function == "run_once" else piece.nodes if not piece.function else ()
    return items
