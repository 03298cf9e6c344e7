"""fx.Graph, Mesh -> Problem: the planner's equations, one function each.

Splits. For one mesh axis, one binary x[v, s] for each node v of a class and each of its strategies s:

    (1)  sum_s x[v, s] = 1
    (2)  e[u, v, p, q] moves u's value from placement p to the placement q that v takes; its marginals are
         the x of u that give p, and the x of v that take q
    (3)  c[u, p, q] >= e[u, v, p, q] for every v: a change is paid once however many use it
    (4)  minimise  sum x * seconds + sum c * change seconds
    (5)  sum x * state + in-flight * sum x * kept <= budget

Equal blocks are one class, so the number of variables does not grow with depth. The axes are decided one after
the other: `dp` takes the letter that counts samples wherever the rules allow it, `tp` any letter that `dp`
left whole.

Cuts. Units are the runs of the folded graph; f[s, i, j] is the time of stage s with units i..j-1:

    (6)  minimise sum_s f_s + (m - 1) max_s f_s over all ways to cut, each stage within its memory
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from autopart.cost import Training, node_seconds, sync_seconds
from autopart.folded import Folded
from autopart.graph import info, is_pick, loss_of, operands, shape_args, value_of
from autopart.mesh import Device, Link
from autopart.notation import C, Placement, R, S, splits
from autopart.problem import Edge, SplitProblem
from autopart.relayout import possible, relayout_seconds
from autopart.rules import Strategy, is_contraction, strategies

LOSS = "loss"
"""The pseudo-node that takes the loss, whole on every rank."""


@dataclass(frozen=True)
class Axis:
    """A mesh axis inside a stage: its name, size and slowest link."""

    name: str
    size: int
    link: Link

    @property
    def shards(self) -> int:
        """Into how many pieces shapes are cut: `dp` takes samples, which `Settings.scale` counts, so none."""
        return 1 if self.name == "dp" else self.size


@dataclass(frozen=True)
class Settings:
    """What a split problem depends on besides the graph.

    passes     how often the time of all stages together counts in a step: 1 + (micro-batches - 1) / stages
    stages     over which gradient sums run side by side
    scale      samples of one data-parallel rank's micro-batch over samples traced
    forced     whether the user asked for this axis's degree: then products must use it
    """

    device: Device
    training: Training
    passes: float
    stages: int
    scale: float
    forced: bool = False


def formulate_splits(
    folded: Folded,
    axis: Axis,
    settings: Settings,
    before: Mapping[str, Strategy],
) -> SplitProblem:
    """The split problem along `axis`; `before` holds what `dp` chose, if it was solved before."""
    problem = SplitProblem(axis.name, axis.size)
    nodes = folded.representatives()
    hints = _hints(folded, nodes, axis.shards)
    for node in nodes:
        problem.strategies[node.name] = _allowed(node, axis, settings, before, hints)
        _price(problem, folded, node, axis, settings, before)
    _connect(problem, folded, axis, settings, before)
    problem.tied = [[n.name for n in nodes if info(n).kind == "input"]]
    return problem


def _hints(folded: Folded, nodes: list[fx.Node], size: int) -> dict[tuple[fx.Node, int], set[Placement]]:
    """Placements with parts that consumers would like, walked from the end: a fused q, k, v product learns from
    the split behind it."""
    hints: dict[tuple[fx.Node, int], set[Placement]] = defaultdict(set)
    for node in reversed(nodes):
        if info(node).kind != "op":
            continue
        wanted = tuple(hints[node, 0])
        options = strategies(info(node).name, shape_args(node), info(node).shapes, size, wanted)
        for index, operand in enumerate(operands(node)):
            if operand is not None:
                source, output = value_of(operand)
                hints[folded.same[source], output] |= {
                    p for s in options if (p := s.inputs[index]) is not None and (p.parts or p.kind == "M")
                }
    return hints


def _allowed(
    node: fx.Node,
    axis: Axis,
    settings: Settings,
    before: Mapping[str, Strategy],
    hints: Mapping[tuple[fx.Node, int], set[Placement]],
) -> list[Strategy]:
    """The strategies of a node that suit the axis."""
    record = info(node)
    wanted = tuple(sorted(hints.get((node, 0), ()), key=str))
    if record.kind == "op":
        options = strategies(record.name, shape_args(node), record.shapes, axis.shards, wanted)
    else:
        options = [Strategy(p.kind, (), (p,)) for p in (R, *((C,) if record.kind == "parameter" else ()))] + [
            Strategy(f"d{p.dim}", (), (p,))
            for p in (*map(S, range(len(record.shape))), *wanted)
            if (record.kind == "parameter" or p == S(0)) and splits(p, record.shape, axis.shards)
        ]
    if not record.dtype.is_floating_point:
        options = [o for o in options if o.name != "P"]
    earlier = before.get(node.name)
    if earlier is not None:
        options = [o for o in options if not _collides(o, earlier)]
    places = [info(n).batch if n is not None else None for n in operands(node)]

    def counts_samples(option: Strategy) -> bool:
        pairs = [*zip(option.inputs, places, strict=True), *zip(option.outputs, [record.batch], strict=False)]
        return any(p is not None and p.kind == "S" and p.dim == b for p, b in pairs if b is not None)

    if axis.name == "dp":
        by_sample = [o for o in options if counts_samples(o)]
        if record.kind == "parameter":
            return [o for o in options if o.name in "RC"]
        return by_sample or [o for o in options if o.name in "RCP"]
    if settings.forced or before:
        options = [o for o in options if not counts_samples(o)]
    weights = [i for i, n in enumerate(operands(node)) if n is not None and info(n).kind == "parameter"]
    if settings.forced and is_contraction(record.name):
        split = [o for o in options if all(_is_split(o.inputs[i]) for i in weights) and o.shards_work]
        options = split or options
    return options


def _is_split(placement: Placement | None) -> bool:
    return placement is not None and placement.kind == "S"


def _collides(option: Strategy, earlier: Strategy) -> bool:
    """Whether both split the same dim of the same tensor."""
    mine, theirs = (*option.inputs, *option.outputs), (*earlier.inputs, *earlier.outputs)
    return any(
        a is not None and b is not None and a.kind == b.kind == "S" and a.dim == b.dim
        for a, b in zip(mine, theirs, strict=True)
    )


def _price(
    problem: SplitProblem,
    folded: Folded,
    node: fx.Node,
    axis: Axis,
    settings: Settings,
    before: Mapping[str, Strategy],
) -> None:
    """Equations (4) and (5): seconds, state and kept bytes of every strategy of a node."""
    record, count = info(node), folded.count[node]
    seconds, state, kept = [], [], []
    for option in problem.strategies[node.name]:
        share = axis.shards if option.shards_work else 1
        parts = axis.shards if option.outputs[0].kind == "S" else 1
        if record.kind == "op":
            work = node_seconds(node, settings.device, share, settings.scale)
            seconds.append(count * settings.passes * (work.forward + work.backward))
        else:
            sync = sync_seconds(record, option.outputs[0], axis.size, axis.link, 1, settings.training)
            seconds.append(count * sync / settings.stages)
        elements = torch.Size(record.shape).numel() / parts
        is_parameter = record.kind == "parameter"
        state.append(count * elements * settings.training.state_bytes(record.dtype) if is_parameter else 0.0)
        scale = settings.scale if record.batch is not None or record.inner else 1.0
        kept.append(count * scale * (_kept_here(folded, node) / parts + record.inner / share))
    problem.seconds[node.name], problem.state[node.name], problem.kept[node.name] = seconds, state, kept


def _kept_here(folded: Folded, node: fx.Node) -> float:
    """Bytes of the node's own outputs that some backward keeps."""
    if info(node).kind != "op" or node.name not in folded.kept:
        return 0.0
    return float(info(node).bytes)


def _connect(
    problem: SplitProblem,
    folded: Folded,
    axis: Axis,
    settings: Settings,
    before: Mapping[str, Strategy],
) -> None:
    """Equations (2) and (3): every use of a value once for each pair of classes, and the price of changes."""
    edges: dict[Edge, None] = {}
    for node in folded.traced.graph.nodes:
        if node.op != "call_function" or is_pick(node):
            continue
        for index, operand in enumerate(operands(node)):
            if operand is not None:
                source, output = value_of(operand)
                edges[Edge(folded.same[source].name, output, folded.same[node].name, index)] = None
    loss, output = value_of(loss_of(folded.traced.graph))
    edges[Edge(folded.same[loss].name, output, LOSS, 0)] = None
    problem.strategies[LOSS] = [Strategy("R", (R,), ())]
    problem.seconds[LOSS], problem.state[LOSS], problem.kept[LOSS] = [0.0], [0.0], [0.0]
    problem.edges = list(edges)
    by_name = {n.name: n for n in folded.representatives()}
    for edge in problem.edges:
        record = info(by_name[edge.source])
        scale = settings.scale if record.batch is not None else 1.0
        scale *= axis.size // axis.shards
        nbytes = torch.Size(record.shapes[edge.output]).numel() * record.dtypes[edge.output].itemsize * scale
        weight = folded.count[by_name[edge.source]] * settings.passes
        changes = problem.changes.setdefault((edge.source, edge.output), {})
        for given in problem.strategies[edge.source]:
            for taken in problem.strategies[edge.target]:
                have, want = given.outputs[edge.output], taken.inputs[edge.operand]
                if want is None or (have, want) in changes or not possible(have, want):
                    continue
                changes[have, want] = weight * relayout_seconds(
                    have, want, nbytes, axis.size, axis.link, record.grad, settings.device.launch_seconds
                )
