"""The graph of one stage as one rank runs it: operators of local shapes, and reshards between them."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from autopart.cost.compute import backward_ratio_of
from autopart.ir.graph import KEY, Info, info, is_pick, loss_of, operands, updates_of, value_of, with_operands
from autopart.ir.layered_graph import LayeredGraph
from autopart.ir.random_ops import Stream
from autopart.passes.loop_iterations import first_same_operand
from autopart.passes.saved_memory import note_saved
from autopart.passes.sharded_calls import Call, sharded_call
from autopart.passes.stage_graph import (
    PRELUDE,
    PRELUDE_SEGMENT,
    Crossing,
    Placements,
    ShardingAssignment,
    StageGraph,
    Value,
)
from autopart.sharding.notation import P, R, Strategy
from autopart.sharding.resharding import Step, reshard_arguments, runtime_function, steps
from autopart.sharding.rules import is_contraction, local_args

Uses = dict[Value, list[tuple[fx.Node, int]]]
"""Value -> its uses as (operator, index of the operand)."""


class StageBuilder:
    """Builds the graph of one stage.

    made      (value, placement) -> the stage's node that has it, without any reshard
    reshards  (node, placement, segment) -> the stage's node that reshards it there
    streams   name of a stream of random numbers -> its placeholder
    segments  index of a segment -> its label and the stage's nodes
    home      node of the model -> the index of its segment, or PRELUDE_SEGMENT
    """

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
        self.stage, self.uses = StageGraph(index), uses
        self.made: dict[tuple[Value, Placements], fx.Node] = {}
        self.reshards: dict[tuple[fx.Node, Placements, int], fx.Node] = {}
        self.streams: dict[str, fx.Node] = {}
        self.segments: dict[int, tuple[str, list[fx.Node]]] = {PRELUDE_SEGMENT: (PRELUDE, [])}
        self.segment_of = segment_of = layered.segment_of()
        self.home = {
            n: segment_of[n] if n in segment_of and stage_of[n] == index else PRELUDE_SEGMENT for n in layered.same
        }

    def build(self) -> StageGraph:
        """The stage: what it takes, its operators in order, what it updates, sends and returns."""
        stage = self.stage
        mine = [n for n in self.layered.traced.graph.nodes if self.stage_of.get(n) == stage.index]
        nodes = [*self._needed_free(mine), *mine]
        self._placeholders(nodes)
        for node in nodes:
            if not is_pick(node):
                self._call(node)
        results = self._results()
        stage.graph.output(results[0] if len(results) == 1 else tuple(results))
        stage.indices = [i for i in sorted(self.segments) if self.segments[i][1]]
        stage.segments = [self.segments[i] for i in stage.indices]
        _reorder(stage)
        stage.values = {node: placed for placed, node in self.made.items()}
        for (source, placements, _), node in self.reshards.items():
            stage.values[node] = stage.values[source][0], placements
        for node in nodes:
            if node.op == "call_function" and not is_pick(node):
                note_saved(stage, self.layered, self.choices, node, self.home[node], self._given)
        return stage

    def _results(self) -> list[fx.Node]:
        """What the stage sends, or the loss; before that the buffers that it changes are written."""
        stage, results = self.stage, []
        for value, (crossing, placements) in self.crossings.items():
            if crossing.producer == stage.index:
                stage.sent.append(crossing)
                results.append(self._placed(value, placements, self.home[value[0]]))
        self._update_buffers()
        loss = loss_of(self.layered.traced.graph)
        if self.stage_of[loss] == stage.index:
            return [self._placed(value_of(loss), (R,) * len(self.choices.axes), self.home[loss])]
        return results

    # ---- what comes from outside -------------------------------------------------------------------------

    def _updates(self) -> dict[str, fx.Node]:
        """The buffers that this stage changes -> their new values.

        A value that no segment computes is written by the stage of the buffer's module, or else by the first stage.
        """
        where = {info(n).module: stage for n, stage in self.stage_of.items()}
        return {
            name: node
            for name, node in updates_of(self.layered.traced).items()
            if self.stage_of.get(node, where.get(name.rpartition(".")[0], 0)) == self.stage.index
        }

    def _update_buffers(self) -> None:
        """Write the new values of buffers."""
        homes = {info(n).name: n for n in self.layered.traced.graph.find_nodes(op="placeholder")}
        for name, node in self._updates().items():
            buffer = homes[name]
            placements = self._given((buffer, 0))
            value = self._placed(value_of(node), placements, self.home[node])
            size = self.choices.size((buffer, 0), placements)
            moved = 2 * size + self.choices.size(value_of(node), placements)
            record = replace(info(buffer), kind="op", name="runtime.update", size=size, moved=moved)
            args = (self.made[(buffer, 0), placements], value)
            self._add(self.home[node], runtime_function("update"), args, {}, record)

    def _needed_free(self, mine: list[fx.Node]) -> list[fx.Node]:
        """The nodes outside of all segments that the stage's nodes are made from."""
        free, needed = set(self.layered.free), set()
        todo = [*self._updates().values(), *(n for node in mine for n in node.all_input_nodes)]
        while todo:
            node = todo.pop()
            if node in free and node not in needed:
                needed.add(node)
                todo += node.all_input_nodes
        return [n for n in self.layered.free if n in needed]

    def _placeholders(self, nodes: list[fx.Node]) -> None:
        """Placeholders for what `nodes` read: received values, inputs, parameters, buffers, streams."""
        updates = self._updates()
        used = {value_of(n) for node in nodes for n in node.all_input_nodes}
        used |= {(n, 0) for n in self.layered.traced.graph.find_nodes(op="placeholder") if info(n).name in updates}
        for value, (crossing, placements) in self.crossings.items():
            if value in used and self.stage.index in crossing.consumers:
                self.stage.received.append(crossing)
                node = self._placeholder(value, placements, "received", crossing.name)
                self.made[value, placements] = node
        sources = [n for n in self.layered.traced.graph.find_nodes(op="placeholder") if (n, 0) in used]
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

    def _placeholder(self, value: Value, placements: Placements, kind: str, name: str) -> fx.Node:
        source, index = value
        record = info(source)
        node = self.stage.graph.placeholder(source.name if index == 0 else f"{source.name}_{index}")
        node.meta[KEY] = replace(
            record,
            kind=kind,
            name=name,
            shapes=(self.choices.local(record.shapes[index], placements),),
            dtypes=(record.dtypes[index],),
            size=self.choices.size(value, placements),
            several=self._several(value),
            placed=tuple((axis, str(p)) for p, (axis, _) in zip(placements, self.choices.axes, strict=True)),
            whole=record.shapes[index],
        )
        return node

    # ---- placements --------------------------------------------------------------------------------------

    def _given(self, value: Value) -> Placements:
        """The placement of a value in this stage before any reshard."""
        crossed = self.crossings.get(value)
        if crossed is not None and crossed[0].producer != self.stage.index:
            return crossed[1]
        return self.choices.placements(self.layered, value, self.stage.index)

    def _several(self, value: Value) -> bool:
        """Whether several segments of the model use a value."""
        return len({self.segment_of.get(user, PRELUDE_SEGMENT) for user, _ in self.uses[value]}) > 1

    def _placed(self, value: Value, want: Placements, segment: int) -> fx.Node:
        """The value in the placement `want`.

        The reshard is part of `segment`, which needs it. It is part of the segment that makes the value if several
        segments use the value or the value is a partial sum.
        """
        have = self._given(value)
        at = self.home[value[0]] if self._several(value) or P in have else segment
        node = self.made[value, have]
        for step in steps(have, want, info(value[0]).grad):
            key = (node, step.after, at)
            if key not in self.reshards:
                self.reshards[key] = self._reshard(value, node, step, at)
            node = self.reshards[key]
        return node

    def _reshard(self, value: Value, node: fx.Node, step: Step, segment: int) -> fx.Node:
        """A node that changes the placement of `node` along one axis."""
        record, row = info(value[0]), step.row
        axis, _ = self.choices.axes[step.axis]
        before, after = step.before[step.axis], step.after[step.axis]
        backward = [row.forward] * row.regathers + [row.backward] * bool(record.grad and row.backward)
        note = " ".join(
            f"{direction}: {what.replace('_', '-')} over {axis}."
            for direction, what in (("forward", row.forward), ("backward", ", ".join(backward)))
            if what
        )
        local = replace(
            record,
            kind="op",
            name=f"runtime.{row.function}",
            shapes=(self.choices.local(record.shapes[value[1]], step.after),),
            dtypes=(record.dtypes[value[1]],),
            size=self.choices.size(value, step.after),
            several=self._several(value),
            note=note.rstrip(".") or f"{before} to {after} over {axis}",
            flops=0.0,
            product=False,
            matrix=None,
            inner=0.0,
            view=False,
            logits=False,
            weights=(),
            gradient_copies=2.0,
            kernel_bytes=Info.kernel_bytes,
        )
        args = (node, axis, *reshard_arguments(row.function, before, after))
        return self._add(segment, runtime_function(row.function), args, {}, local)

    # ---- operators ---------------------------------------------------------------------------------------

    def _add(self, segment: int, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], record: Info) -> fx.Node:
        node = self.stage.graph.call_function(target, args, kwargs)
        node.meta[KEY] = record
        label = self.layered.segments[segment].label if segment >= 0 else PRELUDE
        self.segments.setdefault(segment, (label, []))[1].append(node)
        return node

    def _call(self, node: fx.Node) -> None:
        """The operator on local operands, and what of its outputs is a value of its own."""
        record, segment = info(node), self.home[node]
        chosen = self.choices.of(self.layered, node, self.stage.index)
        local_operands, read_bytes = self._operands(node, chosen)
        placed = [tuple(s.outputs[i] for s in chosen) for i in range(len(record.shapes))]
        sizes = [self.choices.size((node, i), p) for i, p in enumerate(placed)]
        local = self._local_record(node, chosen, placed, sum(sizes), read_bytes)
        args = local_args(record.name, with_operands(tuple(node.args), local_operands), list(local.shapes))
        target, kwargs = node.target, dict(node.kwargs)
        along = [(axis, s) for s, (axis, _) in zip(chosen, self.choices.axes, strict=True)]
        found = sharded_call(Call(node, args, along, self.stage, self.streams))
        if found is not None:
            target, args, kwargs = found
            local = replace(local, name=f"runtime.{found[0].__name__}", kernel=record.name)
        result = self._add(segment, target, args, kwargs, local)
        sizes_of_means = [n for s, (_, n) in zip(chosen, self.choices.axes, strict=True) if s.local == "mean"]
        if (shards := math.prod(sizes_of_means)) > 1:
            moved, ratio = 2 * local.size, int(record.grad)
            mean = replace(
                local, name="aten.div.Tensor", kernel="", product=False, matrix=None, moved=moved, backward_ratio=ratio
            )
            result = self._add(segment, torch.ops.aten.div.Tensor, (result, shards), {}, mean)
        if len(placed) == 1:
            self.made[(node, 0), placed[0]] = result
            return
        for index, placements in enumerate(placed):
            one = replace(
                local,
                name="autopart.getitem",
                shapes=(local.shapes[index],),
                dtypes=(record.dtypes[index],),
                size=sizes[index],
                several=self._several((node, index)),
                view=True,
            )
            self.made[(node, index), placements] = self._add(segment, operator.getitem, (result, index), {}, one)

    def _operands(self, node: fx.Node, chosen: Sequence[Strategy]) -> tuple[list[Any], float]:
        """The operands in the placements that the strategies take (None for those that are no tensors), and the bytes
        that they have on a rank, each value counted once for each placement."""
        local: list[Any] = []
        reads: dict[tuple[int, Placements], float] = {}
        first = first_same_operand(node)
        for index, operand in enumerate(operands(node)):
            if operand is None:
                local.append(None)
                continue
            want = tuple(w if (w := s.inputs[index]) is not None else R for s in chosen)
            local.append(self._placed(value_of(operand), want, self.home[node]))
            reads[first[index], want] = self.choices.size(value_of(operand), want)
        return local, sum(reads.values())

    def _local_record(
        self, node: fx.Node, chosen: Sequence[Strategy], placed: list[Placements], size: float, read: float
    ) -> Info:
        """The node's record on one rank, at the planned micro-batch."""
        record, share, grow = info(node), self.choices.shares(chosen), self.choices.growth(node)
        return replace(
            record,
            shapes=tuple(self.choices.local(shape, p) for shape, p in zip(record.shapes, placed, strict=True)),
            size=size,
            several=self._several((node, 0)),
            moved=size + read,
            backward_ratio=backward_ratio_of(record, [info(n) for n in node.all_input_nodes]),
            flops=record.flops * grow / share,
            matrix=self.choices.matrix(record.matrix, chosen, grow),
            inner=self.choices.inner(node, chosen),
            kernel_bytes=self.choices.kernel_bytes(node, chosen),
            note=_note(chosen, self.choices.axes, record),
        )


def _note(chosen: Sequence[Strategy], axes: Sequence[tuple[str, int]], record: Info) -> str:
    """What a reader should know of a split matrix product: what of its output a rank has, by axis."""
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
    """Bring the graph's nodes into the order of the segments."""
    anchor = stage.graph.output_node()
    for _, nodes in stage.segments:
        for node in nodes:
            anchor.prepend(node)
    stage.graph.lint()
