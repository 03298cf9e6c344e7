"""A stage's graph -> seconds: what the expanded plan costs, node by node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from autopart.comm import COLLECTIVE_SECONDS
from autopart.cost import Seconds, node_seconds
from autopart.graph import info
from autopart.mesh import Device, Link
from autopart.plan import PlanLine, shortened
from autopart.relayout import RELAYOUTS
from autopart.stages import StageGraph

BY_FUNCTION = {f"runtime.{row.function}": row for row in RELAYOUTS.values()}


@dataclass(frozen=True)
class PricedRun:
    """A run of a stage: its label, seconds forward and backward for one micro-batch, and its lines."""

    label: str
    forward: float
    backward: float
    lines: tuple[PlanLine, ...]


@dataclass(frozen=True)
class Prices:
    """What prices depend on: the device, and each axis's size and link; `scale` as in `formulate.Settings`."""

    device: Device
    axes: Mapping[str, tuple[int, Link]]
    scale: float = 1.0


def price(stage: StageGraph, prices: Prices) -> list[PricedRun]:
    """Price every run of a stage."""
    runs = []
    for label, nodes in stage.runs:
        forward = backward = 0.0
        lines = []
        for node in nodes:
            compute, comm = _node(node, prices)
            forward += compute.forward + comm.forward
            backward += compute.backward + comm.backward
            record = info(node)
            lines.append(
                PlanLine(
                    record.module.removeprefix(label).lstrip("."),
                    shortened(record.name),
                    record.note,
                    compute.forward + compute.backward,
                    comm.forward + comm.backward,
                    record.source,
                )
            )
        runs.append(PricedRun(label, forward, backward, tuple(lines)))
    return runs


def _node(node: fx.Node, prices: Prices) -> tuple[Seconds, Seconds]:
    """Seconds of compute and of communication."""
    record, nothing = info(node), Seconds(0.0, 0.0)
    row = BY_FUNCTION.get(record.name)
    if row is None:
        return node_seconds(node, prices.device, 1, prices.scale), nothing
    axis = node.args[1]
    assert isinstance(axis, str)
    size, link = prices.axes[axis]
    whole = max(record.bytes, *(info(n).bytes for n in node.all_input_nodes))
    nbytes = whole * (prices.scale if record.batch is not None else 1.0)
    launch = prices.device.launch_seconds
    forward, backward = (
        COLLECTIVE_SECONDS[name](nbytes, size, link) + launch if name else 0.0
        for name in (row.forward, row.backward if record.grad else "")
    )
    return nothing, Seconds(max(forward, 0.0 if backward else launch), backward)
