"""A stage's graph -> seconds: the price of every segment, as the sum over its nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import fx

from autopart.cost.compute import Seconds, beside_product_seconds, operator_seconds_of
from autopart.cost.liveness import MODES
from autopart.cost.resharding import row_seconds
from autopart.hardware.mesh import Group
from autopart.hardware.rows import Device
from autopart.ir.graph import info
from autopart.ir.labels import is_block
from autopart.ir.layered_graph import LayeredGraph
from autopart.passes.checkpoint_cut import stage_cut
from autopart.passes.stage_graph import StageGraph, Value
from autopart.plan.stages import PlanLine
from autopart.plan.units import printed_name
from autopart.sharding.resharding import GATHERED_AGAIN, RESHARDS

Moved = Mapping[tuple[str, str], float]
"""(axis, collective) -> bytes."""

NOTHING = Seconds(0.0, 0.0)
BY_FUNCTION = {f"runtime.{row.function}": row for row in RESHARDS.values()}


@dataclass(frozen=True)
class PricedSegment:
    """The seconds of a segment for one micro-batch.

    forward, backward  of the operators and reshards, nothing recomputed
    recompute_seconds  mode, of `liveness.MODES` -> seconds that it adds to the backward: forward of what runs again
    moved              (axis, collective) -> bytes that it takes, as `cost.collectives` counts them, nothing recomputed
    moved_again        mode -> likewise, of the collectives that recomputing runs again: it stops at the last operator
                       that saves something for its backward
    nodes              the segment's nodes
    lines              one line of the plan for each of `nodes`
    outside            the values of other segments and stages that the nodes read
    handed_on          the values that are resharded here for several other segments, as (node, output) of the model
    inner              the segment without these reshards; None where there are none
    """

    label: str
    forward: float
    backward: float
    recompute_seconds: Mapping[str, float]
    lines: tuple[PlanLine, ...]
    nodes: tuple[fx.Node, ...]
    outside: tuple[fx.Node, ...]
    moved: Moved
    moved_again: Mapping[str, Moved]
    handed_on: frozenset[Value] = frozenset()
    inner: PricedSegment | None = None


@dataclass(frozen=True)
class Prices:
    """The device, and the group of ranks of every axis."""

    device: Device
    axes: Mapping[str, Group]


def price_stage(layered: LayeredGraph, stage: StageGraph, prices: Prices) -> list[PricedSegment]:
    """The price of every segment of a stage, in order."""
    computed = _computed([n for _, nodes in stage.segments for n in nodes], prices.device)
    segments = []
    for index, (label, nodes) in enumerate(stage.segments):
        rerun = stage_cut(layered, stage, index, "mincut").rerun if is_block(label) else frozenset(nodes)
        others = _for_others(nodes)
        whole = _priced(stage, label, nodes, rerun, others, computed, prices)
        if others:
            inner = _priced(stage, label, [n for n in nodes if n not in others], rerun, (), computed, prices)
            values = frozenset(stage.values[node][0] for node in others)
            whole = replace(whole, handed_on=values, inner=inner)
        segments.append(whole)
    return segments


def _priced(
    stage: StageGraph,
    label: str,
    nodes: Sequence[fx.Node],
    rerun: Container[fx.Node],
    others: Container[fx.Node],
    computed: Mapping[fx.Node, Seconds],
    prices: Prices,
) -> PricedSegment:
    """The price of some nodes of a segment; `rerun` are those that recompute by minimum cut runs again. `others` are
    reshards whose results the segment hands on: as in the search, no mode counts their seconds a second time."""
    forward = backward = 0.0
    recompute = dict.fromkeys(MODES, 0.0)
    lines, moved_bytes = [], Counter[tuple[str, str]]()
    again = {mode: Counter[tuple[str, str]]() for mode in MODES}
    last = max((i for i, n in enumerate(nodes) if info(n).saves or info(n).inner), default=-1)
    own = {node: i for i, node in enumerate(nodes)}
    read = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in own and _is_made(n))
    place = own | {node: -1 - i for i, node in enumerate(read)}
    for node in nodes:
        compute, comm = computed.get(node, NOTHING), _moved(node, prices)
        forward += compute.forward + comm.forward
        backward += compute.backward + comm.backward
        record = info(node)
        moved = 0.0 if record.name in GATHERED_AGAIN or node in others else comm.forward
        recompute["selective"] += moved + (0.0 if record.product else compute.forward)
        recompute["mincut"] += moved + compute.forward if node in rerun else 0.0
        recompute["full"] += moved + compute.forward
        there, back = _collectives(node)
        moved_bytes.update(there)
        moved_bytes.update(back)
        if moved and own[node] < last:
            for mode in ("selective", "full", *(("mincut",) if node in rerun else ())):
                again[mode].update(there)
        lines.append(
            PlanLine(
                record.module.removeprefix(label).lstrip("."),
                printed_name(record.name),
                record.note,
                compute.forward + compute.backward,
                comm.forward + comm.backward,
                record.source,
                record.size,
                _placement(stage, node, prices),
                tuple(place[n] for n in node.all_input_nodes if n in place),
            )
        )
    made = tuple(lines), tuple(nodes), tuple(read)
    return PricedSegment(label, forward, backward, recompute, *made, moved_bytes, again)


def _for_others(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The reshards of a segment's values that only other segments read, several of them."""
    found, own = set[fx.Node](), set(nodes)
    for node in reversed(nodes):
        if info(node).several and info(node).name in BY_FUNCTION and own & node.users.keys() <= found:
            found.add(node)
    return found


def _is_made(node: fx.Node) -> bool:
    """Whether an operator makes the value, of this stage or another."""
    return info(node).kind in ("op", "received")


def _placement(stage: StageGraph, node: fx.Node, prices: Prices) -> str:
    """``"dp=S0, tp=R"``; "" where a node is no value of the model's graph."""
    _, placements = stage.values.get(node, (None, ()))
    return ", ".join(f"{axis}={p}" for axis, p in zip(prices.axes, placements, strict=False))


def _computed(nodes: Sequence[fx.Node], device: Device) -> dict[fx.Node, Seconds]:
    """Node -> seconds, for every operator that is no reshard."""
    operators = [n for n in nodes if info(n).name not in BY_FUNCTION]
    seconds = operator_seconds_of([info(n) for n in operators], device)
    extra = np.array([(*info(n).kernel_bytes[2:], info(n).grad) for n in operators], dtype=float).reshape(-1, 3).T
    streamed = beside_product_seconds(extra[:2], extra[2], device)
    forward, backward = seconds.forward + streamed.forward, seconds.backward + streamed.backward
    each = zip(operators, forward.tolist(), backward.tolist(), strict=True)
    return {n: Seconds(info(n).times * there, info(n).times * back) for n, there, back in each}


def _moved(node: fx.Node, prices: Prices) -> Seconds:
    """Seconds of a reshard; 0 for other nodes."""
    record = info(node)
    row = BY_FUNCTION.get(record.name)
    if row is None:
        return NOTHING
    each = row_seconds(row, _whole(node), prices.axes[_axis(node)], record.grad, prices.device)
    return Seconds(*(record.times * float(seconds) for seconds in each))


def _collectives(node: fx.Node) -> tuple[Moved, Moved]:
    """The bytes of a reshard's collectives in forward, and in backward; none for other nodes."""
    record = info(node)
    row = BY_FUNCTION.get(record.name)
    if row is None:
        return {}, {}
    nbytes, axis = float(record.times * _whole(node)), _axis(node)
    there = {(axis, row.forward): nbytes} if row.forward else {}
    back = Counter({(axis, row.backward): nbytes} if row.backward and record.grad else {})
    back.update(there if row.regathers else {})
    return there, back


def _axis(reshard: fx.Node) -> str:
    axis = reshard.args[1]
    assert isinstance(axis, str)
    return axis


def _whole(reshard: fx.Node) -> float:
    """Bytes of a reshard's tensor, whole along its axis."""
    return max(info(reshard).size, *(info(n).size for n in reshard.all_input_nodes))
