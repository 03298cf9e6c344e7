"""LayeredGraph, sharding assignment -> one graph per stage, of local shapes, with collectives and messages."""

import itertools
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping

from torch import fx

from autopart.errors import PartitionError
from autopart.ir.graph import info, is_pick, operands, updates_of, value_of
from autopart.ir.layered_graph import LayeredGraph
from autopart.passes.stage_builder import StageBuilder, Uses
from autopart.passes.stage_graph import PRELUDE_SEGMENT, Crossing, Placements, ShardingAssignment, StageGraph, Value
from autopart.sharding.notation import P, R


def partition(
    layered: LayeredGraph, choices: ShardingAssignment, indices: Iterable[int] | None = None
) -> list[StageGraph]:
    """Cut the graph into stages and rewrite the stages of `indices` (None: all of them) for one rank. Raises
    PartitionError where one stage changes a buffer that another reads."""
    stage_of = _stages(layered, choices)
    _refuse_copies(layered, stage_of)
    uses = _uses(layered)
    crossings = _crossings(layered, choices, stage_of, uses)
    wanted = range(len(choices.starts)) if indices is None else indices
    return [StageBuilder(layered, choices, stage_of, crossings, uses, index).build() for index in wanted]


def without_idle_prelude(stage: StageGraph, segments: Container[int]) -> StageGraph:
    """The stage, whose prelude has what these segments alone need, by their indices in the layered graph. Buffers of
    the modules of its other segments are not written."""
    each = list(zip(stage.indices, stage.segments, strict=True))
    blocks = [(index in segments, nodes) for index, (_, nodes) in each if index != PRELUDE_SEGMENT]
    read = {node for stands, nodes in blocks if stands for node in nodes}
    idle = {info(node).module for stands, nodes in blocks if not stands for node in nodes}
    read.add(stage.graph.output_node())
    for _, nodes in (segment for index, segment in each if index == PRELUDE_SEGMENT):
        for node in reversed(nodes):
            if _updates(node, idle) or not read.isdisjoint(node.users):
                read.add(node)
        nodes[:] = [node for node in nodes if node in read]
    kept = [(index, segment) for index, segment in each if segment[1]]
    stage.indices, stage.segments = [index for index, _ in kept], [segment for _, segment in kept]
    return stage


def _updates(node: fx.Node, idle: Container[str]) -> bool:
    """Whether a node writes a buffer of another module than these."""
    buffer = node.args[0] if info(node).name == "runtime.update" else None
    return isinstance(buffer, fx.Node) and info(buffer).name.rpartition(".")[0] not in idle


def _refuse_copies(layered: LayeredGraph, stage_of: Mapping[fx.Node, int]) -> None:
    """Raise PartitionError for a buffer that stages read or change of which one alone would see the change."""
    placeholders = {info(n).name: n for n in layered.traced.graph.find_nodes(op="placeholder")}
    modules = {info(n).module: stage for n, stage in stage_of.items()}
    for name, value in updates_of(layered.traced).items():
        stages, todo = set[int](), [value, *placeholders[name].users]
        while todo:
            node = todo.pop()
            if node in stage_of:
                stages.add(stage_of[node])
            elif node.op == "call_function" and node is not value:
                todo += node.users
        if stages and value not in stage_of:
            stages.add(modules.get(name.rpartition(".")[0], 0))
        if len(stages) > 1:
            raise PartitionError(
                f"stage {min(stages)} and stage {max(stages)} read {name}, which the forward pass changes",
                "each stage has a copy of its own, and one of them is changed",
                "pp=1, or constraints that cut the model elsewhere",
            )


def _stages(layered: LayeredGraph, choices: ShardingAssignment) -> dict[fx.Node, int]:
    """Every node of a segment -> its stage."""
    spans = itertools.pairwise((*choices.starts, len(layered.segments)))
    return {
        node: stage
        for stage, span in enumerate(spans)
        for segment in layered.segments[slice(*span)]
        for node in segment.nodes
    }


def _uses(layered: LayeredGraph) -> Uses:
    """Every value -> its uses as (operator, index of the operand)."""
    uses: Uses = defaultdict(list)
    for node in layered.traced.graph.nodes:
        if node.op == "call_function" and not is_pick(node):
            for index, operand in enumerate(operands(node)):
                if operand is not None:
                    uses[value_of(operand)].append((node, index))
    return uses


def _crossings(
    layered: LayeredGraph, choices: ShardingAssignment, stage_of: Mapping[fx.Node, int], uses_of: Uses
) -> dict[Value, tuple[Crossing, Placements]]:
    """The values that stages send, each with the placement it is sent in.

    A value is sent in the placement in which it is made. A partial sum is sent as such only if a user takes it so;
    otherwise it is sent in the placement of its users, or whole if they differ.
    """
    crossings: dict[Value, tuple[Crossing, Placements]] = {}
    segment_of, names = layered.segment_of(), set[str]()
    for value, uses in uses_of.items():
        node, index = value
        home = stage_of.get(node)
        away = [(user, i) for user, i in uses if home is not None and stage_of.get(user, home) != home]
        if home is None or not away:
            continue
        placements = []
        for axis, have in enumerate(choices.placements(layered, value, home)):
            wants = {choices.of(layered, user, stage_of[user])[axis].inputs[i] for user, i in away}
            only = next(iter(wants)) if len(wants) == 1 else None
            placements.append(have if have != P or P in wants else only or R)
        placed = tuple(placements)
        shape, size = choices.local(info(node).shapes[index], placed), choices.size(value, placed)
        consumers = tuple(sorted({stage_of[user] for user, _ in away}))
        record = info(node)
        name = re.sub(r"\W", "_", layered.segments[segment_of[node]].label) or node.name
        name = name if name not in names else f"{name}_{node.name}_{index}"
        names.add(name)
        crossing = Crossing(name, home, consumers, shape, record.dtypes[index], record.grad, size)
        crossings[value] = crossing, placed
    return crossings
