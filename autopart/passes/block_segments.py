"""The segments of a traced graph that are blocks of a list."""

from collections.abc import Callable

from autopart.frontend.layer_sampling import BlockList
from autopart.ir.graph import info, update_info
from autopart.ir.layered_graph import LayeredGraph, Segment, used_parameters
from autopart.ir.random_ops import Stream, renamed


def first_segments(layered: LayeredGraph, blocks: BlockList) -> dict[int, int]:
    """Block that runs -> its first segment."""
    first: dict[int, int] = {}
    for i, segment in enumerate(layered.segments):
        block = blocks.index(segment.label)
        if block is not None:
            first.setdefault(block, i)
    return first


def works_for(segment: Segment, blocks: BlockList, start: int = 0) -> bool:
    """Whether a segment has nodes, or reads parameters, of a block from `start` on that is not its own."""
    names = [*(info(n).layer for n in segment.nodes), *(info(p).name for p in used_parameters(segment))]
    others = {blocks.index(name) for name in names} - {None, blocks.index(segment.label)}
    return any(block is not None and block >= start for block in others)


def rename(layered: LayeredGraph, moved: Callable[[str], str]) -> None:
    """Give modules, tensors and streams of random numbers the names that they have in the whole model, in place."""
    for node in layered.traced.graph.nodes:
        if node.op == "output":
            continue
        record = info(node)
        new = {"module": moved(record.module), "layer": moved(record.layer)}
        if record.kind != "op":
            new["name"] = moved(record.name)
        if any(getattr(record, key) != value for key, value in new.items()):
            update_info(node, **new)
        if any(isinstance(argument, Stream) for argument in node.args):
            node.args = renamed(node.args, moved)
    for segment in layered.segments:
        segment.label = moved(segment.label)
    traced = layered.traced
    traced.buffers = {moved(name): value for name, value in traced.buffers.items()}
    traced.updated = tuple(map(moved, traced.updated))
