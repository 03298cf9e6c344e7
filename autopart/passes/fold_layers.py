"""fx.Graph -> LayeredGraph: the graph as a row of segments, with equal segments in one class.

A segment is the nodes of one numbered module ("model.layers.3"), or of one other module between them. The results of an
operator with several are where the operator is: a kernel over an addition and a norm is of the norm's module, and its
first result is named after the addition's. Two segments are of one class if they compute the same from values of the
same shapes and dtypes, whatever the names, the floats that values are multiplied by, and which of the equal parts of a
tensor each takes. The planner decides once for each class, and cuts the model between segments.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from typing import Any

from torch import fx

from autopart.errors import PartitionError
from autopart.ir.fingerprint import Fingerprints, Token, is_own, is_own_name, parameter_token, without_values
from autopart.ir.graph import Traced, calls, info, is_pick, loss_of, updates_of
from autopart.ir.layered_graph import LayeredGraph, Segment, node_keys, parameters_of
from autopart.ir.random_ops import relative
from autopart.passes.loop_iterations import equal_iterations


def fold_layers(traced: Traced) -> LayeredGraph:
    """Find the segments and their classes."""
    graph = traced.graph
    free = _free(traced)
    segments: list[Segment] = []
    operator: fx.Node | None = None
    for node in calls(graph):
        if node in free:
            continue
        label, picked = info(node).layer or info(node).module, is_pick(node) and node.args[0] is operator
        if not segments or (segments[-1].label != label and not picked):
            segments.append(Segment(label, []))
        segments[-1].nodes.append(node)
        operator = operator if picked else node
    _merge_returning(segments)
    same: dict[fx.Node, fx.Node] = {}
    classes: dict[Any, tuple[int, Segment]] = {}
    prints = Fingerprints(graph, traced.micro_batch)
    for segment in segments:
        signature = _signature(segment)
        segment.segment_class, first = classes.setdefault(signature, (len(classes), segment))
        for node, twin in zip(segment.nodes, first.nodes, strict=True):
            for mine, other in zip(parameters_of(node), parameters_of(twin), strict=True):
                same.setdefault(mine, other)
            same[node] = twin
        for node, twin in zip(segment.externals, first.externals, strict=True):
            _pair_own(node, segment.label, twin, first.label, prints, same)
        if segment is first:
            same |= equal_iterations(segment.nodes)
    count = Counter[fx.Node]()
    for node in graph.nodes:
        if node.op != "output":
            same.setdefault(node, node)
    for node in list(same):
        while same[node] is not same[same[node]]:
            same[node] = same[same[node]]
        count[same[node]] += info(node).times
    return LayeredGraph(
        traced,
        segments,
        [n for n in graph.nodes if n in free],
        same,
        count,
        node_keys(n for n in graph.nodes if n in same and same[n] is n),
        tuple(range(len(segments))),
        tuple(segment.label for segment in segments),
    )


def _pair_own(
    node: fx.Node, label: str, twin: fx.Node, first: str, prints: Fingerprints, same: dict[fx.Node, fx.Node]
) -> None:
    """Put what a block makes of buffers and inputs into one class with what an equal block makes of its own."""
    todo = [(node, twin)]
    while todo:
        mine, other = todo.pop()
        outside = not info(mine).grad and info(mine).kind != "parameter"
        if mine is other or mine in same or not outside or not (is_own(mine, label) and is_own(other, first)):
            continue
        if prints.outside(mine, label) == prints.outside(other, first):
            same[mine] = other
            todo += zip(mine.all_input_nodes, other.all_input_nodes, strict=True)


def _free(traced: Traced) -> set[fx.Node]:
    """The operators that only inputs and buffers reach, that have no gradient, and that no numbered block makes for
    itself or for its buffers alone."""
    graph = traced.graph
    loss, free, written = loss_of(graph), set[fx.Node](), defaultdict[fx.Node, list[set[str]]](list)
    for name, value in updates_of(traced).items():
        written[value].append({name} | {alias for alias, first in traced.aliases.items() if first == name})
    for node in calls(graph):
        clean = all(n in free or info(n).kind in ("input", "buffer") for n in node.all_input_nodes)
        if clean and not info(node).grad and node is not loss:
            free.add(node)
    for node in reversed(calls(graph)):
        layer = info(node).layer
        readers = [user for user in node.users if user.op != "output"]
        own = all(_within(user, layer, free) for user in readers)
        if (
            node in free
            and layer
            and own
            and all(any(is_own_name(name, layer) for name in names) for names in written[node])
        ):
            free.remove(node)
    _refuse_late_reads(traced, free)
    return free


def _refuse_late_reads(traced: Traced, free: Collection[fx.Node]) -> None:
    """Raise PartitionError where a segment would read a buffer behind its change, which a stage makes before all its
    segments."""
    buffers = {info(n).name: n for n in traced.graph.find_nodes(op="placeholder") if info(n).kind == "buffer"}
    for name, value in updates_of(traced).items():
        late = [user for user in buffers[name].users if user.op != "output" and user not in free]
        if value in free and late:
            raise PartitionError(
                f"the forward pass reads {name} and changes it outside of the blocks that read it",
                f"ranks change it before they compute {info(late[0]).module or info(late[0]).name}",
                "change it in the block of an nn.ModuleList that reads it, or after the step",
            )


def _within(user: fx.Node, layer: str, free: Collection[fx.Node]) -> bool:
    """Whether a reader is an operator of the segment of this numbered block."""
    return user not in free and info(user).layer == layer


def _merge_returning(segments: list[Segment]) -> None:
    """Merge the segments of a numbered module that is entered several times, with all segments in between.

    Other modules may have several segments, such as a dropout before and behind all layers.
    """
    i = 0
    while i < len(segments):
        layer = info(segments[i].nodes[0]).layer
        again = next((j for j in range(len(segments) - 1, i, -1) if layer and segments[j].label == layer), i)
        if again > i:
            for segment in segments[i + 1 : again + 1]:
                segments[i].nodes += segment.nodes
            del segments[i + 1 : again + 1]
        i += 1


def _signature(segment: Segment) -> tuple[Any, ...]:
    """What a segment computes, with local numbers in place of names. Sets the segment's externals."""
    local: dict[fx.Node, tuple[str, Any]] = {n: ("node", i) for i, n in enumerate(segment.nodes)}
    externals: list[fx.Node] = []

    def token(node: fx.Node) -> tuple[Any, ...]:
        if node in local:
            return local[node]
        record = info(node)
        if record.kind == "parameter":
            return parameter_token(record, segment.label)
        if node not in externals:
            externals.append(node)
        samples = record.batch is not None
        return ("external", externals.index(node), record.shapes, record.dtypes, record.grad, samples)

    lines: list[Any] = []
    for node in segment.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: Token(token(n)))  # type: ignore[arg-type,return-value]
        record = info(node)
        args, kwargs = without_values(record.name, args, kwargs)
        does = repr(relative(args, segment.label)), repr(kwargs)
        lines.append(
            (record.name, *does, record.shapes, record.dtypes, record.view, record.inner, record.fixed, record.times)
        )
    inside = set(segment.nodes)
    outputs = tuple(i for i, n in enumerate(segment.nodes) if any(u not in inside for u in n.users))
    segment.externals = tuple(externals)
    return (*lines, outputs)
