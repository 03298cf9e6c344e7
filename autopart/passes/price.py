"""A stage's graph -> seconds: what the expanded plan costs, node by node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from autopart.cost import Seconds, Work, rate_of, work_seconds
from autopart.graph import info
from autopart.hardware.rows import Device, Link
from autopart.plan import PlanLine, shortened
from autopart.relayout import RELAYOUTS, row_seconds
from autopart.stages import StageGraph

BY_FUNCTION = {f"runtime.{row.function}": row for row in RELAYOUTS.values()}


@dataclass(frozen=True)
class PricedRun:
    """A run of a stage: its label, seconds forward and backward for one micro-batch, and its lines; `cheap` are those
    of the forward pass that matrix products do not take."""

    label: str
    forward: float
    backward: float
    cheap: float
    lines: tuple[PlanLine, ...]


@dataclass(frozen=True)
class Prices:
    """What prices depend on: the device, and each axis's size and link."""

    device: Device
    axes: Mapping[str, tuple[int, Link]]


def price(stage: StageGraph, prices: Prices) -> list[PricedRun]:
    """Price every run of a stage."""
    runs = []
    for label, nodes in stage.runs:
        forward = backward = cheap = 0.0
        lines = []
        for node in nodes:
            compute, comm = _node(node, prices)
            forward += compute.forward + comm.forward
            backward += compute.backward + comm.backward
            record = info(node)
            cheap += comm.forward + (0.0 if record.product else compute.forward)
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
        runs.append(PricedRun(label, forward, backward, cheap, tuple(lines)))
    return runs


def _node(node: fx.Node, prices: Prices) -> tuple[Seconds, Seconds]:
    """Seconds of compute and of communication."""
    record, nothing = info(node), Seconds(0.0, 0.0)
    inputs = [info(n) for n in node.all_input_nodes]
    row = BY_FUNCTION.get(record.name)
    if row is None:
        work = Work(record.flops, record.moved, rate_of(record, prices.device), record.again, int(not record.view))
        return work_seconds(work, prices.device), nothing
    axis = node.args[1]
    assert isinstance(axis, str)
    whole = max(record.size, *(i.size for i in inputs))
    return nothing, Seconds(*row_seconds(row, whole, *prices.axes[axis], record.grad, prices.device.launch_seconds))
