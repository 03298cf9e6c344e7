"""The bytes of one stage at its peak, by segment and tensor: the events of `cost.liveness` for a partitioned graph.

`PlanStage.memory` has their sums by kind.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import fx

from autopart.cost import liveness
from autopart.cost.intervals import interval_index
from autopart.cost.liveness import ACTIVATIONS, MESSAGES, MODES, Moment, SegmentBytes, StageBytes, moments
from autopart.cost.training_state import OPTIMIZER_STATES, Training
from autopart.ir.graph import info, made_by
from autopart.ir.labels import is_block
from autopart.ir.layered_graph import LayeredGraph
from autopart.passes.checkpoint_cut import is_product, mode_cut, stage_cut
from autopart.passes.stage_graph import OWNED, PRELUDE, PRELUDE_SEGMENT, ShardingAssignment, StageGraph, backward_of
from autopart.plan.schedules import receive_buffer_bytes
from autopart.plan.units import printed_name
from autopart.planner.candidate import SearchResult
from autopart.planner.interval_seconds import crossed
from autopart.planner.search_space import SearchSpace
from autopart.planner.stage_parameters import Parameter, distinct, own_gradient, parameters, pending_gradients

KINDS = (liveness.PARAMETERS, liveness.GRADIENTS, liveness.OPTIMIZER, ACTIVATIONS, MESSAGES, "transient")
"""Kinds of bytes in plans; "transient" is the sum of `liveness.TRANSIENT`."""

TRANSIENT_NAMES = {
    liveness.RECOMPUTED: "what is recomputed",
    liveness.GATHERED: "parameters gathered",
    liveness.PENDING: "gradients of shared parameters, until the last is added",
    liveness.WORKSPACE: "gradients that ranks sum, with messages",
}
"""Kind of transient bytes -> its name in a tree."""


@dataclass(frozen=True)
class Allocation:
    """Bytes on a rank of a stage at its peak.

    block  label of the segment that allocates them; "" where several share them
    name   parameter or operator
    kind   one of KINDS
    """

    block: str
    name: str
    kind: str
    bytes: float


@dataclass(frozen=True)
class StageMemory:
    """The bytes of one rank of a stage.

    layered        the model
    choices        its strategies
    graph          the stage's partitioned graph
    stage          the stage's index in `choices`
    span           the positions of the stage
    modes          for every position one of MODES
    training       the training setting
    in_flight      micro-batches in flight
    micro_batches  micro-batches of a step
    received       bytes of a micro-batch's values from other stages
    """

    layered: LayeredGraph
    choices: ShardingAssignment
    graph: StageGraph
    stage: int
    span: tuple[int, int]
    modes: Sequence[str]
    training: Training
    in_flight: int
    micro_batches: int
    received: float

    @property
    def labels(self) -> Sequence[str]:
        """The label of every position."""
        return self.layered.labels[slice(*self.span)]

    @cached_property
    def reads(self) -> list[list[Parameter]]:
        """The parameters of every position."""
        return parameters(self.layered, self.choices, self.span, self.stage)

    @cached_property
    def nodes(self) -> dict[int, list[fx.Node]]:
        """Segment of the layered graph, or PRELUDE_SEGMENT -> its operators."""
        return dict(zip(self.graph.indices, (nodes for _, nodes in self.graph.segments), strict=True))

    @cached_property
    def peak(self) -> Moment:
        """The moment at which most bytes are alive."""
        return max(self.moments, key=lambda moment: moment.bytes)

    @cached_property
    def moments(self) -> list[Moment]:
        """All moments of a step at which the peak may be."""
        return list(moments(self._events(), self.training, self.in_flight, self.micro_batches))

    def by_kind(self, moment: Moment | None = None) -> dict[str, float]:
        """Bytes of each of KINDS at a moment: the peak where none is given."""
        moment = moment or self.peak
        return {kind: float(moment.alive.get(kind, 0.0)) for kind in KINDS[:-1]} | {"transient": moment.transient}

    def backward_by_kind(self) -> dict[str, float]:
        """`by_kind` at the fullest moment of a backward, where the peak is at the end of a step; {} otherwise."""
        inside = [moment for moment in self.moments if moment.backward] if self.peak.backward is None else []
        return self.by_kind(max(inside, key=lambda moment: moment.bytes)) if inside else {}

    def allocations(self) -> Iterator[Allocation]:
        """All bytes that are alive at the peak."""
        yield from self._state()
        yield from self._activations()
        moment = self.peak
        yield Allocation(PRELUDE, "of other stages, on its way", MESSAGES, moment.alive.get(MESSAGES, 0.0))
        inside = 0 <= moment.position < len(self.labels)
        label = self.labels[moment.position] if inside else PRELUDE
        segment = self._segment_at(moment.position) if inside else PRELUDE_SEGMENT
        for kind in liveness.TRANSIENT:
            nbytes = moment.alive.get(kind, 0.0)
            name = TRANSIENT_NAMES.get(kind) or f"{self._operator_with(segment, nbytes)}, gradients"
            name = name if moment.backward else "made at the end of a step"
            yield Allocation(label, name, "transient", float(nbytes))

    # ---- the stage as `liveness.StageBytes` ------------------------------------------------------------------------

    def _events(self) -> StageBytes:
        training, indices = self.training, self.layered.sequence[slice(*self.span)]
        each = {index: self._segment(index) for index in dict.fromkeys(indices)}
        segments = liveness.gathering_ahead([each[index] for index in indices], training)
        modes, every = [MODES.index(mode) for mode in self.modes], distinct(self.reads)
        state = [training.state_bytes(p.bytes, p.record.grad, p.over_dp) for p in every]
        stepped, reduced = (
            [of(p.bytes, p.record.grad, p.over_dp) for p in every]
            for of in (training.optimizer_workspace, training.reduced_bytes)
        )
        step = sum(stepped) if training.foreach else max(stepped, default=0.0)
        shared = sum(
            memory.size for memory in self.graph.saved.values() if memory.shared or PRELUDE_SEGMENT in memory.segments
        )
        saved = np.array([s.saved_under(mode) for s, mode in zip(segments, modes, strict=True)])
        own = [sum(own_gradient(self.layered, self.training, p) for p in row) for row in self.reads]
        return StageBytes(
            segments=segments,
            modes=[(mode,) for mode in modes],
            prelude=self._segment(PRELUDE_SEGMENT),
            saved=saved,
            shared_saved=shared
            + sum(info(node).size for node in (*self._shared_block_inputs(), *self._unsaved_received())),
            gradients=np.array(own, dtype=float),
            state=(sum(s[0] for s in state), sum(s[1] for s in state), sum(s[2] for s in state)),
            pending=pending_gradients(self.layered, training, self.reads, self.span),
            messages=receive_buffer_bytes(self.received, self.in_flight, self.micro_batches),
            end=[max(step, float(training.end_of_step_workspace(sum(reduced), max(reduced, default=0.0))))],
        )

    def _segment(self, segment: int) -> SegmentBytes:
        nodes = self.nodes.get(segment, [])
        memory = [k for k in self.graph.saved.values() if segment in k.segments and not k.shared]
        gradients = [[backward_of(n, self.training.grad_alloc_ratio(first)) for n in nodes] for first in (True, False)]
        positions = [p for p, at in enumerate(self.layered.sequence[slice(*self.span)]) if at == segment]
        read = self.reads[positions[0]] if positions else []
        reduced = [self.training.reduced_bytes(p.bytes, p.record.grad, p.over_dp) for p in read]
        results = [sum(size for _, size in self._results(segment, mode)) for mode in MODES[1:]]
        return SegmentBytes(
            saved_bytes=(sum(k.size for k in memory), *results),
            reused_bytes=(0.0, *(self._reused(segment, mode) for mode in MODES[1:])),
            block_input_bytes=sum(size for _, size in _inputs(nodes)),
            regathered_bytes=sum(k.regathered_bytes.get(segment, 0.0) for k in self.graph.saved.values()),
            largest_gradient=max((largest for largest, _ in gradients[0]), default=0.0),
            backward_bytes=[max((most for _, most in rows), default=0.0) for rows in gradients],
            reduced_bytes=(sum(reduced), max(reduced, default=0.0)),
            single_parameter=len(read) == 1,
            ahead_bytes=0.0,
        )

    def _results(self, segment: int, mode: str) -> list[tuple[str, float]]:
        """(name, bytes) of the results that a segment saves under a mode with recomputation, without its inputs."""
        nodes = self.nodes.get(segment, [])
        if mode == "selective":
            return [(_operator(n), info(n).size + info(n).inner) for n in nodes if is_product(n)]
        if mode != "mincut" or not nodes or segment == PRELUDE_SEGMENT:
            return []
        saved = stage_cut(self.layered, self.graph, self.graph.indices.index(segment), mode).saved
        rerun = mode_cut(self.layered, segment, mode).rerun
        own = [(n, self.graph.saved.get((f"{n.name} inside", ()))) for n in self.layered.segments[segment].nodes]
        return [
            *((_operator(n), info(n).size) for n in nodes if n in saved),
            *((f"{_operator(n)}, its own", m.size) for n, m in own if n not in rerun and m and m.size),
        ]

    @cached_property
    def _saved_names(self) -> dict[str, set[str]]:
        """Mode -> names of the nodes whose results it saves, in any segment."""
        every = range(len(self.layered.segments))
        return {mode: {n.name for s in every for n in mode_cut(self.layered, s, mode).saved} for mode in MODES[1:]}

    def _reused(self, segment: int, mode: str) -> float:
        """Bytes that a segment saves in mode "none" and that recomputing it in `mode` does not allocate."""
        reused = set(self._saved_names[mode])
        if segment != PRELUDE_SEGMENT:
            rerun = mode_cut(self.layered, segment, mode).rerun
            reused |= {f"{n.name} inside" for n in self.layered.segments[segment].nodes if n not in rerun}
        saved = self.graph.saved.items()
        mine = [(made_by(root)[0], m) for (root, _), m in saved if segment in m.segments and not m.shared]
        return sum(m.size for name, m in mine if name in reused)

    def _shared_block_inputs(self) -> list[fx.Node]:
        """Values that several blocks read; saved if any block of the stage is recomputed."""
        if all(mode == "none" for mode in self.modes):
            return []
        labelled = zip(self.layered.sequence, self.layered.labels, strict=True)
        blocks = {segment for segment, label in labelled if is_block(label)}
        taken = (n for segment in sorted(blocks & self.nodes.keys()) for n in _taken(self.nodes[segment]))
        return list(dict.fromkeys(n for n in taken if info(n).several))

    def _unsaved_received(self) -> Iterator[fx.Node]:
        """The received values that no segment saves. The stage holds them until its backward is done."""
        several = self._shared_block_inputs()
        for node in self.graph.graph.find_nodes(op="placeholder"):
            if info(node).kind != "received" or node in several:
                continue
            source, output = self.graph.values[node][0]
            own = info(source).root == source.name and output
            root = f"{source.name}:{output}" if own else info(source).root
            taking = [p for p in range(len(self.labels)) if node in _taken(self.nodes.get(self._segment_at(p), ()))]
            taking = taking if info(node).several else taking[:1]
            if not any(self._saves(position, root) for position in taking):
                yield node

    def _saves(self, position: int, root: str) -> bool:
        """Whether a position saves the memory of a value that it takes (`Info.root`)."""
        segment, mode = self._segment_at(position), self.modes[position]
        saved = (m.segments for (name, _), m in self.graph.saved.items() if name == root)
        return mode != "none" or any(segment in segments for segments in saved)

    def _segment_at(self, position: int) -> int:
        """The segment of the layered graph at a position of the stage."""
        return self.layered.sequence[self.span[0] + position]

    # ---- allocations at the peak ------------------------------------------------------------------------------------

    def _state(self) -> Iterator[Allocation]:
        """Parameters, gradients and optimizer states."""
        states, moment, seen = OPTIMIZER_STATES[self.training.optimizer], self.peak, set[str]()
        for position, (label, row) in enumerate(zip(self.labels, self.reads, strict=True)):
            for p in row:
                if p.name in seen:
                    continue
                seen.add(p.name)
                weight, gradient, optimizer = self.training.state_bytes(p.bytes, p.record.grad, p.over_dp)
                yield Allocation(label, p.name, liveness.PARAMETERS, weight)
                first = moment.backward is not None and moment.backward.first
                if not (first and position < moment.position and own_gradient(self.layered, self.training, p)):
                    yield Allocation(label, p.name, liveness.GRADIENTS, gradient)
                copies = states + (self.training.widening > 1 and not self.training.sliced(p.over_dp))
                if copies > states:
                    yield Allocation(label, f"{p.name}, master copy", liveness.OPTIMIZER, optimizer / copies)
                yield Allocation(label, f"{p.name}, states", liveness.OPTIMIZER, optimizer * states / max(copies, 1))

    def _activations(self) -> Iterator[Allocation]:
        """Saved activations that are not freed at the peak."""
        moment = self.peak
        if moment.backward is None:
            return
        for position, label, name, nbytes in self.saved():
            gone = position >= 0 and position > moment.position
            yield Allocation(label, name, ACTIVATIONS, (moment.backward.in_flight - gone) * nbytes)

    def saved(self) -> Iterator[tuple[int, str, str, float]]:
        """(position, label, name, bytes) of every activation that one micro-batch saves; position -1: several
        positions share it."""
        named = {node.name: _operator(node) for node in self.layered.traced.graph.nodes if node.op != "output"}
        inside: dict[int, list[tuple[str, float]]] = defaultdict(list)
        for (key, _), memory in self.graph.saved.items():
            name = named.get(made_by(key)[0], "") or f"{named[key.removesuffix(' inside')]}, its own"
            for segment in memory.segments if not memory.shared else ():
                inside[segment].append((name, memory.size))
            if memory.shared or PRELUDE_SEGMENT in memory.segments:
                yield -1, PRELUDE, name, memory.size
        for node in self._shared_block_inputs():
            yield -1, PRELUDE, f"{_operator(node)}, taken by blocks", info(node).size
        for node in self._unsaved_received():
            yield -1, PRELUDE, f"{_operator(node)}, received", info(node).size
        for position, (label, mode) in enumerate(zip(self.labels, self.modes, strict=True)):
            segment = self._segment_at(position)
            nodes = self.nodes.get(segment, [])
            when_recomputed = [*self._results(segment, mode), *_inputs(nodes)]
            for name, nbytes in inside[segment] if mode == "none" else when_recomputed:
                yield position, label, self._within(name, segment), nbytes

    def _operator_with(self, segment: int, nbytes: float) -> str:
        """The operator of a segment whose gradients take `nbytes`; "" where there is none."""
        ratios = [self.training.grad_alloc_ratio(first) for first in (True, False)]
        found = (n for n in self.nodes.get(segment, []) if any(nbytes in backward_of(n, ratio) for ratio in ratios))
        node = next(found, None)
        return self._within(_operator(node), segment) if node is not None else ""

    def _within(self, name: str, segment: int) -> str:
        """A name without that of the segment it is in."""
        label = self.layered.segments[segment].label if segment != PRELUDE_SEGMENT else ""
        return name.removeprefix(label).lstrip(". ") if label else name


def stage_memory(
    space: SearchSpace, found: SearchResult, choices: ShardingAssignment, graph: StageGraph, span: tuple[int, int],
    modes: Sequence[str], index: int,
) -> StageMemory:  # fmt: skip
    """The bytes of the `index`-th stage of a search's result, of the positions `span`, which use `modes`."""
    flights, m = space.in_flight(found.point, index), space.micro_batches(found.point)
    _, received = messages(space, found, span, index)
    return StageMemory(space.layered, choices, graph, 0, span, modes, space.training(found.point), flights, m, received)


def messages(space: SearchSpace, found: SearchResult, span: tuple[int, int], index: int) -> tuple[float, float]:
    """Of the `index`-th stage, which has the positions `span`: seconds of a micro-batch's messages, and bytes of the
    values that it takes from other stages."""
    n = len(space.layered.labels)
    rows = crossed(space.position_costs(found.point, found.chosen[index]).crossings, n)
    seconds, takes, _ = (float(row[interval_index(*span, n)]) for row in rows)
    return seconds, takes


def _inputs(nodes: Sequence[fx.Node]) -> Iterator[tuple[str, float]]:
    """(name, bytes) of the values from outside that one segment alone takes."""
    for node in _taken(nodes):
        if not info(node).several:
            yield f"{_operator(node)}, taken", info(node).size


def _taken(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The values that a segment takes from outside, without parameters and buffers."""
    inside = set(nodes)
    taken = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside)
    return [n for n in taken if info(n).kind not in OWNED]


def _operator(node: fx.Node) -> str:
    """The name of a node for readers: its module and operator; of a placeholder, its name."""
    record = info(node)
    return f"{record.module} {printed_name(record.name)}".strip() if record.kind == "op" else record.name
