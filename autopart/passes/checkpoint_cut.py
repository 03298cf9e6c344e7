"""A segment -> its operators under a checkpointing mode: whose results are saved, which run again in backward.

Mode "mincut". Backward reads some values of a block. A value that is not saved is computed again, from values that are
saved and from the block's inputs. Products are never computed again. The least bytes to save are therefore a minimum
cut between products and the values that backward reads, in the graph in which a value v is an edge of capacity bytes(v)
from its operator to its users. The formulation is that of torch's partitioner for activation checkpointing (functorch's
min-cut rematerialisation). The problem is that of Jain et al., Checkmate (arXiv 1910.02653), restricted: products never
run again.

bytes(v) are of the whole value. The cut is therefore the same under every sharding of a block, and the ILP's costs of
the mode are sums over operators.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import fx

from autopart.ir.graph import info, is_pick, made_by
from autopart.ir.labels import is_block
from autopart.ir.layered_graph import LayeredGraph
from autopart.passes.codegen.spelling import joins_bias
from autopart.passes.stage_graph import StageGraph
from autopart.sharding.resharding import RESHARDS

RESHARD_CALLS = {f"runtime.{row.function}" for row in RESHARDS.values()}


class CheckpointCut(NamedTuple):
    """The operators of a block whose results are saved, and those that run again in backward. Other operators run once.

    All paths from an operator that runs once first meet the same saved operator, or all meet the end of the block. The
    operators that meet the same one are a piece: emitted code runs a piece as one function.
    """

    saved: frozenset[fx.Node]
    rerun: frozenset[fx.Node]


SAVING = ("selective", "mincut")
"""The modes that save results of a block which is recomputed."""

_KNOWN: WeakKeyDictionary[LayeredGraph, dict[tuple[int, str], CheckpointCut]] = WeakKeyDictionary()
"""Layered graph -> (segment, mode) -> the segment's cut under the mode."""


def mode_cut(layered: LayeredGraph, segment: int, mode: str) -> CheckpointCut:
    """The cut of a segment under a checkpointing mode, of `liveness.MODES`; found once for each graph. A minimum cut is
    found once for each class of segments.

    Of several minimum cuts it is the one nearest to backward, after which fewest operators run again. Segments that are
    no numbered block are never recomputed: for them no minimum cut is sought."""
    known, nodes = _KNOWN.setdefault(layered, {}), layered.segments[segment].nodes
    if (segment, mode) not in known:
        if mode == "mincut" and is_block(layered.segments[segment].label):
            first = _first_alike(layered, segment)
            cut = _least_saved(nodes) if first == segment else mode_cut(layered, first, mode)
            twins = dict(zip(layered.segments[first].nodes, nodes, strict=True))
            cut = CheckpointCut(*(frozenset(twins[node] for node in part) for part in cut))
        else:
            saved = frozenset(n for n in nodes if is_product(n) and mode == "selective")
            cut = CheckpointCut(saved, frozenset(nodes if mode != "none" else ()) - saved)
        known[segment, mode] = cut
    return known[segment, mode]


def _first_alike(layered: LayeredGraph, segment: int) -> int:
    """The first block of a block's segment class."""
    mine = layered.segments[segment].segment_class
    return next(i for i, s in enumerate(layered.segments) if s.segment_class == mine and is_block(s.label))


def stage_cut(layered: LayeredGraph, stage: StageGraph, index: int, mode: str) -> CheckpointCut:
    """The cut of a stage's segment under one of the modes SAVING: the model's cut in the stage's graph. A reshard runs
    again where an operator that runs again takes its result, or where backward reads its result."""
    (_, nodes), saved, read = stage.segments[index], set[fx.Node](), set[fx.Node]()
    inside = set(nodes)
    if mode == "selective":
        products = {n for n in nodes if is_product(n)}
        saved = {next(iter(n.users)) if joins_bias(n) else n for n in products}
        return _in_pieces(nodes, saved, set(nodes) - saved - products)
    model = mode_cut(layered, stage.indices[index], mode)
    for node in nodes:
        made = stage.values[node][0][0] if node in stage.values else None
        if info(node).name in RESHARD_CALLS or made is None:
            read |= {node} if _is_saved(node, info(node).root, inside) else set()
        elif made in model.saved:
            saved.add(node.args[0] if is_pick(node) else node)  # type: ignore[arg-type]
        elif made in model.rerun:
            read.add(node)
    return _in_pieces(nodes, saved, read)


def _is_saved(node: fx.Node, root: str, inside: Container[fx.Node]) -> bool:
    """Whether a user of the node or of a view of it, among the nodes `inside`, saves the memory `root`."""
    users = [user for user in node.users if user in inside]
    return any(root in info(u).saves or (is_view(u) and _is_saved(u, root, inside)) for u in users)


def is_product(node: fx.Node) -> bool:
    """Whether the node is the call of a matrix product, a convolution or attention."""
    return info(node).product and not is_view(node)


def is_view(node: fx.Node) -> bool:
    """Whether the node's memory is that of another."""
    return info(node).view or is_pick(node)


def _read_by_backward(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes of a block whose memory autograd saves for the backward of the block."""
    roots = {made_by(root)[0] for node in nodes for root in info(node).saves}
    return {node for node in nodes if node.name in roots}


def _least_saved(nodes: Sequence[fx.Node]) -> CheckpointCut:
    """The minimum cut nearest to backward. A node that runs once and leads to several saved nodes, or to a saved node
    and the end of the block, is added to the saved ones, and the minimum cut is sought again."""
    read, given = _read_by_backward(nodes), set[fx.Node]()
    while True:
        saved = given | _minimum_cut(nodes, read, given)
        rerun = _rerun(nodes, saved, read)
        ends = pieces(nodes, saved, rerun)
        several = next((n for n in reversed(nodes) if len(ends.get(n, ())) > 1), None)
        if several is None:
            return CheckpointCut(frozenset(saved), frozenset(rerun))
        root = next((n for n in nodes if n.name == made_by(info(several).root)[0]), several)
        if root in saved | rerun or is_view(root):
            read.add(several)
        else:
            given.add(root)


def _minimum_cut(nodes: Sequence[fx.Node], read: set[fx.Node], given: set[fx.Node]) -> set[fx.Node]:
    """The nodes that the minimum cut nearest to backward goes through, where the nodes `given` are saved anyway."""
    import networkx

    inside, net = set(nodes), networkx.DiGraph()
    net.add_nodes_from(["products", "backward"])
    for node in nodes:
        if node not in given:  # a view is saved as what it is a view of
            net.add_edge(
                (node, "in"),
                (node, "out"),
                **({} if is_view(node) else {"capacity": info(node).times * info(node).bytes}),
            )
        net.add_edges_from(((node, "out"), (user, "in")) for user in node.users if user in inside)
        if is_product(node):
            net.add_edge("products", (node, "in"))
        if node in read:
            net.add_edge((node, "out"), "backward")
    residual = networkx.algorithms.flow.boykov_kolmogorov(net, "products", "backward")
    behind, todo = set[object]({"backward"}), list[object](["backward"])
    while todo:
        for start, edge in residual.pred[todo.pop()].items():
            if start not in behind and edge["flow"] < edge["capacity"]:
                behind.add(start)
                todo.append(start)
    return {n for n in nodes if (n, "in") not in behind and (n, "out") in behind}


def _in_pieces(nodes: Sequence[fx.Node], saved: set[fx.Node], read: set[fx.Node]) -> CheckpointCut:
    """The smallest cut that saves the nodes `saved` and runs the nodes `read` again. A product that several pieces read
    is saved; another node that several pieces read runs again."""
    saved, read = set(saved), set(read)
    while True:
        rerun = _rerun(nodes, saved, read)
        several = [node for node, ends in pieces(nodes, saved, rerun).items() if len(ends) > 1]
        if not several:
            return CheckpointCut(frozenset(saved), frozenset(rerun))
        saved |= {n for n in several if is_product(n)}
        read |= set(several) - saved


def _rerun(nodes: Sequence[fx.Node], saved: set[fx.Node], read: set[fx.Node]) -> set[fx.Node]:
    """The nodes that run again: the nodes `read`, and the nodes from which these are computed. Products among them are
    added to `saved` instead."""
    rerun = read - saved
    for node in reversed(nodes):
        if node not in saved and (node in rerun or any(user in rerun for user in node.users)):
            (saved if is_product(node) else rerun).add(node)
    return rerun - saved


def pieces(
    nodes: Sequence[fx.Node], saved: Iterable[fx.Node], rerun: Iterable[fx.Node]
) -> dict[fx.Node, set[fx.Node | None]]:
    """Every node that does not run again -> the saved nodes that it leads to without another between them; None for the
    end of the block. A saved node leads to itself."""
    saved, rerun = set(saved), set(rerun)
    found = dict[fx.Node, set[fx.Node | None]]()
    for node in reversed(nodes):
        if node in saved:
            found[node] = {node}
        elif node not in rerun:
            found[node] = set().union(*(found.get(user, {None}) for user in node.users))
    return found
