"""fx.Graph, choices -> fx.Graph a stage: local shapes, collectives inserted, the stage cut out."""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from autopart.cost.compute import again_of
from autopart.ir.graph import KEY, Info, info, is_pick, loss_of, operands, updates_of, value_of
from autopart.ir.layered_graph import LayeredGraph
from autopart.ir.random_ops import Stream
from autopart.passes.sharded_calls import Call, sharded_call
from autopart.passes.stage_graph import (
    PRELUDE,
    PRELUDE_SEGMENT,
    Crossing,
    Kept,
    Placements,
    ShardingAssignment,
    StageGraph,
    Value,
)
from autopart.sharding.notation import P, Placement, R, kept_as
from autopart.sharding.resharding import runtime_function, steps
from autopart.sharding.rules import Shape, Strategy, flatten, is_contraction, local_args

Uses = dict[Value, list[tuple[fx.Node, int]]]


def partition(
    layered: LayeredGraph, choices: ShardingAssignment, indices: Iterable[int] | None = None
) -> list[StageGraph]:
    """Cut the graph into stages and rewrite each (those of `indices`, else all) for one rank."""
    stage_of = _stages(layered, choices)
    uses = _uses(layered)
    crossings = _crossings(layered, choices, stage_of, uses)
    wanted = range(len(choices.starts)) if indices is None else indices
    return [_Localiser(layered, choices, stage_of, crossings, uses, s).build() for s in wanted]


def _stages(layered: LayeredGraph, choices: ShardingAssignment) -> dict[fx.Node, int]:
    ends = (*choices.starts[1:], len(layered.segments))
    return {
        node: stage
        for stage, (start, end) in enumerate(zip(choices.starts, ends, strict=True))
        for segment in layered.segments[start:end]
        for node in segment.nodes
    }


def _uses(layered: LayeredGraph) -> Uses:
    """Every value's uses: (operator, operand)."""
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
    """The values that cross cuts, with the placement they cross in: as made, but partial sums only where a user takes
    them as such."""
    crossings: dict[Value, tuple[Crossing, Placements]] = {}
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
        name = node.name if len(record.shapes) == 1 else f"{node.name}_{index}"
        crossing = Crossing(name, home, consumers, shape, record.dtypes[index], record.grad, size)
        crossings[value] = crossing, placed
    return crossings


class _Localiser:
    """Builds one stage's graph; holds what is known so far of every value and its changes of placement."""

    def __init__(
        self,
        layered: LayeredGraph,
        choices: ShardingAssignment,
        stage_of: Mapping[fx.Node, int],
        crossings: Mapping[Value, tuple[Crossing, Placements]],
        uses: Uses,
        index: int,
    ) -> None:
        self.layered, self.choices, self.stage_of, self.crossings = layered, choices, stage_of, crossings
        self.stage = StageGraph(index)
        self.made: dict[tuple[Value, Placements], fx.Node] = {}
        self.moved: dict[tuple[fx.Node, Placements, int], fx.Node] = {}
        self.streams: dict[str, fx.Node] = {}
        self.segments: dict[int, tuple[str, list[fx.Node]]] = {PRELUDE_SEGMENT: (PRELUDE, [])}
        self.uses = uses
        self.segment_of = segment_of = layered.segment_of()
        self.home = {n: segment_of[n] if n in segment_of and stage_of[n] == index else -1 for n in layered.same}

    def build(self) -> StageGraph:
        stage, graph = self.stage, self.stage.graph
        mine = [n for n in self.layered.traced.graph.nodes if self.stage_of.get(n) == stage.index]
        needed = self._needed_free(mine)
        self._placeholders([*needed, *mine])
        for node in [*needed, *mine]:
            if not is_pick(node):
                self._call(node)
        results = []
        for value, (crossing, placements) in self.crossings.items():
            if crossing.producer == stage.index:
                stage.sent.append(crossing)
                results.append(self._place(value, placements, self.home[value[0]]))
        self._update_buffers()
        loss = loss_of(self.layered.traced.graph)
        if self.stage_of[loss] == stage.index:
            results = [self._place(value_of(loss), (R,) * len(self.choices.axes), self.home[loss])]
        graph.output(results[0] if len(results) == 1 else tuple(results))
        stage.indices = [i for i in sorted(self.segments) if self.segments[i][1]]
        stage.segments = [self.segments[i] for i in stage.indices]
        _reorder(stage)
        self._keep([*needed, *mine])
        return stage

    def _updates(self) -> dict[str, fx.Node]:
        """The buffers this stage changes -> their new values; those that no run computes are changed where their
        module is, or else in the first stage."""
        where = {info(n).module: stage for n, stage in self.stage_of.items()}
        return {
            name: node
            for name, node in updates_of(self.layered.traced).items()
            if self.stage_of.get(node, where.get(name.rpartition(".")[0], 0)) == self.stage.index
        }

    def _update_buffers(self) -> None:
        homes = {info(n).name: n for n in self.layered.traced.graph.nodes if n.op == "placeholder"}
        for name, node in self._updates().items():
            buffer = homes[name]
            placements = self._given((buffer, 0))
            value = self._place(value_of(node), placements, self.home[node])
            size = self._size((buffer, 0), placements)
            moved = 2 * size + self._size(value_of(node), placements)
            record = replace(info(buffer), kind="op", name="runtime.update", size=size, moved=moved)
            args = (self.made[(buffer, 0), placements], value)
            self._add(self.home[node], runtime_function("update"), args, {}, record)

    def _needed_free(self, mine: list[fx.Node]) -> list[fx.Node]:
        free, needed = set(self.layered.free), set()
        todo = [*self._updates().values(), *(n for node in mine for n in node.all_input_nodes)]
        while todo:
            node = todo.pop()
            if node in free and node not in needed:
                needed.add(node)
                todo += node.all_input_nodes
        return [n for n in self.layered.free if n in needed]

    def _placeholders(self, nodes: list[fx.Node]) -> None:
        updates = self._updates()
        used = {value_of(n) for node in nodes for n in node.all_input_nodes}
        used |= {(n, 0) for n in self.layered.traced.graph.find_nodes(op="placeholder") if info(n).name in updates}
        for value, (crossing, placements) in self.crossings.items():
            if value in used and self.stage.index in crossing.consumers:
                self.stage.received.append(crossing)
                node = self._placeholder(value, placements, "received", crossing.name)
                self.made[value, placements] = node
        sources = [n for n in self.layered.traced.graph.nodes if n.op == "placeholder" and (n, 0) in used]
        for source in sorted(sources, key=lambda n: info(n).kind != "input"):
            value = (source, 0)
            placements = self._given(value)
            record = info(source)
            if record.kind == "input":
                self.stage.inputs.append(record.name)
            self.made[value, placements] = self._placeholder(value, placements, record.kind, record.name)
        for stream in (a for node in nodes if node.op == "call_function" for a in node.args if isinstance(a, Stream)):
            self.streams[stream] = self.stage.graph.placeholder(re.sub(r"\W", "_", stream))
            self.streams[stream].meta[KEY] = Info("stream", stream, (), ())

    def _given(self, value: Value) -> Placements:
        """Where a value lies in this stage before any change."""
        crossed = self.crossings.get(value)
        if crossed is not None and crossed[0].producer != self.stage.index:
            return crossed[1]
        return self.choices.placements(self.layered, value, self.stage.index)

    def _several(self, value: Value) -> bool:
        """Whether several runs of the model use a value."""
        return len({self.segment_of.get(user, PRELUDE_SEGMENT) for user, _ in self.uses[value]}) > 1

    def _local(self, shape: Shape, placements: Placements) -> Shape:
        return self.choices.local(shape, placements)

    def _size(self, value: Value, placements: Placements) -> float:
        return self.choices.size(value, placements)

    def _placeholder(self, value: Value, placements: Placements, kind: str, name: str) -> fx.Node:
        source, index = value
        record = info(source)
        node = self.stage.graph.placeholder(source.name if index == 0 else f"{source.name}_{index}")
        node.meta[KEY] = replace(
            record,
            kind=kind,
            name=name,
            shapes=(self._local(record.shapes[index], placements),),
            dtypes=(record.dtypes[index],),
            size=self._size(value, placements),
            several=self._several(value),
            placed=tuple((axis, str(p)) for p, (axis, _) in zip(placements, self.choices.axes, strict=True)),
            whole=record.shapes[index],
        )
        return node

    def _add(self, segment: int, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], record: Info) -> fx.Node:
        node = self.stage.graph.call_function(target, args, kwargs)
        node.meta[KEY] = record
        label = self.layered.segments[segment].label if segment >= 0 else PRELUDE
        self.segments.setdefault(segment, (label, []))[1].append(node)
        return node

    def _place(self, value: Value, want: Placements, segment: int) -> fx.Node:
        """The value in another placement; the change is made in the run that needs it, or where the value is made if
        several runs do or it is a partial sum."""
        have = self._given(value)
        at = self.home[value[0]] if self._several(value) or P in have else segment
        node, record = self.made[value, have], info(value[0])
        shape = record.shapes[value[1]]
        for step in steps(have, want, record.grad):
            key = (node, step.after, at)
            if key not in self.moved:
                name, _ = self.choices.axes[step.axis]
                before, after, row = step.before[step.axis], step.after[step.axis], step.row
                back = [row.forward] * row.again + [row.backward] * bool(record.grad and row.backward)
                note = " ".join(
                    f"{way}: {what.replace('_', '-')} over {name}."
                    for way, what in (("forward", row.forward), ("backward", ", ".join(back)))
                    if what
                )
                local = replace(
                    record,
                    kind="op",
                    name=f"runtime.{row.function}",
                    shapes=(self._local(shape, step.after),),
                    dtypes=(record.dtypes[value[1]],),
                    size=self._size(value, step.after),
                    several=self._several(value),
                    note=note.rstrip(".") or f"{before} to {after} over {name}",
                    flops=0.0,
                    product=False,
                    matrix=None,
                    inner=0.0,
                    view=False,
                    logits=False,
                    weights=(),
                    times=2.0,
                )
                args = (node, name, *_arguments(row.function, before, after))
                self.moved[key] = self._add(at, runtime_function(row.function), args, {}, local)
            node = self.moved[key]
        return node

    def _grow(self, node: fx.Node) -> float:
        """How many times more an operator works, and keeps, than traced."""
        counts = any(info(n).batch is not None for n in (node, *node.all_input_nodes))
        return self.choices.scale if counts else 1.0

    def _call(self, node: fx.Node) -> None:
        record, segment = info(node), self.home[node]
        chosen = self.choices.of(self.layered, node, self.stage.index)
        local_inputs: list[Any] = []
        reads: dict[tuple[Value, Placements], None] = {}
        for index, operand in enumerate(operands(node)):
            if operand is None:
                local_inputs.append(None)
                continue
            want = tuple(w if (w := s.inputs[index]) is not None else R for s in chosen)
            local_inputs.append(self._place(value_of(operand), want, segment))
            reads[value_of(operand), want] = None
        outputs = [self._local(shape, tuple(s.outputs[i] for s in chosen)) for i, shape in enumerate(record.shapes)]
        replaced = _replace_operands(tuple(node.args), local_inputs)
        args = local_args(record.name, replaced, outputs)
        share = self.choices.shares(chosen)
        note = _note(chosen, self.choices.axes, record)
        placed = [tuple(s.outputs[i] for s in chosen) for i in range(len(record.shapes))]
        sizes = [self._size((node, i), p) for i, p in enumerate(placed)]
        grow = self._grow(node)
        local = replace(
            record,
            shapes=tuple(outputs),
            size=sum(sizes),
            several=self._several((node, 0)),
            moved=sum(sizes) + sum(self._size(*read) for read in reads),
            again=again_of(record, [info(n) for n in node.all_input_nodes]),
            flops=record.flops * grow / share,
            matrix=self.choices.matrix(record.matrix, chosen, grow),
            inner=record.inner * grow / share,
            note=note,
        )
        target, kwargs = node.target, dict(node.kwargs)
        along = [(axis, s) for s, (axis, _) in zip(chosen, self.choices.axes, strict=True)]
        found = sharded_call(Call(node, args, along, self.stage, self.streams))
        if found is not None:
            target, args, kwargs = found
            local = replace(local, name=f"runtime.{found[0].__name__}", kernel=record.name)
        result = self._add(segment, target, args, kwargs, local)
        parts = 1
        for strategy, (_, size) in zip(chosen, self.choices.axes, strict=True):
            parts *= size if strategy.local == "mean" else 1
        if parts > 1:
            moved, again = 2 * local.size, int(record.grad)
            mean = replace(
                local, name="aten.div.Tensor", kernel="", product=False, matrix=None, moved=moved, again=again
            )
            result = self._add(segment, torch.ops.aten.div.Tensor, (result, parts), {}, mean)
        for index in range(len(record.shapes)):
            picked = result
            if len(record.shapes) > 1:
                one = replace(
                    local,
                    name="autopart.getitem",
                    shapes=(outputs[index],),
                    dtypes=(record.dtypes[index],),
                    size=sizes[index],
                    several=self._several((node, index)),
                    view=True,
                )
                picked = self._add(segment, operator.getitem, (result, index), {}, one)
            self.made[(node, index), placed[index]] = picked

    def _keep(self, nodes: list[fx.Node]) -> None:
        """Note what autograd keeps for these nodes: every root once for each placement it is kept in."""
        by_name = {n.name: n for n in self.layered.traced.graph.nodes}
        for node in nodes:
            record = info(node)
            if node.op != "call_function" or is_pick(node):
                continue
            chosen = self.choices.of(self.layered, node, self.stage.index)
            inner = record.inner * self._grow(node) / self.choices.shares(chosen)
            entry = self.stage.kept.setdefault((f"{node.name} inside", ()), Kept(inner, False, record.product))
            entry.segments.add(self.home[node])
            for root in record.keeps:
                made = by_name[root]
                taken = self._read_as(node, made, chosen)
                placements = tuple(map(kept_as, taken))
                total = info(made).bytes * self.choices.grow(info(made))
                size, whole = total / self.choices.parts(placements), total / self.choices.parts(taken)
                memory = Kept(size, len(self.layered.keepers[root]) > 1, info(made).product)
                entry = self.stage.kept.setdefault((root, placements), memory)
                entry.segments.add(self.home[node])
                if whole > size:
                    entry.wide[self.home[node]] = whole - size

    def _read_as(self, node: fx.Node, root: fx.Node, chosen: Sequence[Strategy]) -> Placements:
        """The placement in which `node` keeps memory that `root` made: that of the operand it reads it through."""
        if root is node:
            return tuple(s.outputs[0] for s in chosen)
        for index, operand in enumerate(operands(node)):
            if operand is not None and info(operand).root == root.name:
                return tuple(s.inputs[index] or R for s in chosen)
        return self._given((root, 0))


def _arguments(function: str, have: Placement, want: Placement) -> tuple[Any, ...]:
    """What a change of placement is called with, after the tensor and the axis."""
    if function == "all_to_all":
        return (have.dim, want.dim)
    split = want if want.kind == "S" else have
    if split.kind != "S":
        return ()
    return (split.dim, list(split.parts)) if split.parts else (split.dim,)


def _replace_operands(args: tuple[Any, ...], operands: list[Any]) -> tuple[Any, ...]:
    """Put local values where the operator's arguments have tensors."""
    assert len(flatten(args)) == len(operands)
    rest = iter(operands)

    def put(arg: Any) -> Any:
        if (
            isinstance(arg, (list, tuple))
            and len(flatten((arg,))) == len(arg)
            and any(isinstance(a, fx.Node) for a in arg)
        ):
            return [put(a) for a in arg]
        local = next(rest)
        return arg if local is None else local

    return tuple(put(a) for a in args)


def _note(chosen: Sequence[Strategy], axes: Sequence[tuple[str, int]], record: Info) -> str:
    """What is split over what, for a reader."""
    notes = []
    for strategy, (axis, _) in zip(chosen, axes, strict=True):
        if not strategy.shards_work or not is_contraction(record.name):
            continue
        first = strategy.outputs[0]
        if first.kind == "P":
            notes.append(f"partial sums over {axis}")
        elif first.kind == "M":
            notes.append(f"rows of this rank's experts over {axis}")
        elif first.kind == "S" and first.dim != record.batch:
            notes.append(f"dim {first.dim} split over {axis}")
    return ", ".join(notes)


def _reorder(stage: StageGraph) -> None:
    """Bring the graph's nodes into the order of the runs."""
    anchor = stage.graph.output_node()
    for _, nodes in stage.segments:
        for node in nodes:
            anchor.prepend(node)
    stage.graph.lint()
