"""The parameters that each position of a stage reads, with their bytes and those of their gradients on a rank."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import fx

from autopart.cost.training_state import Training
from autopart.ir.graph import Info, info
from autopart.ir.layered_graph import LayeredGraph, used_parameters
from autopart.passes.stage_graph import ShardingAssignment


class Parameter(NamedTuple):
    """A parameter that a position reads: its name there, its record, its bytes on a rank, and whether its gradient is a
    partial sum over the axes dp and tp."""

    name: str
    record: Info
    bytes: float
    over_dp: bool
    over_tp: bool


def parameters(
    layered: LayeredGraph, choices: ShardingAssignment, span: tuple[int, int], stage: int = 0
) -> list[list[Parameter]]:
    """The parameters that each position of a span reads; `stage` is the index of the stage in `choices`."""
    known: dict[fx.Node, tuple[Info, float, bool, bool]] = {}
    names, found = [name for name, _ in choices.axes], []
    for position in range(*span):
        nodes = dict.fromkeys(used_parameters(layered.segments[layered.sequence[position]]))
        for node in nodes:
            if node not in known:
                record, placed = info(node), choices.placements(layered, (node, 0), stage)
                partial = {name for name, p in zip(names, placed, strict=True) if p.kind == "C" and record.grad}
                known[node] = record, choices.size((node, 0), placed), "dp" in partial, "tp" in partial
        found.append([Parameter(layered.parameter_at(position, node), *known[node]) for node in nodes])
    return found


def distinct(reads: Sequence[Sequence[Parameter]]) -> list[Parameter]:
    """Every parameter of some positions once."""
    return list({parameter.name: parameter for row in reads for parameter in row}.values())


def on_host(reads: Sequence[Sequence[Parameter]], training: Training) -> float:
    """Bytes on the host of what some positions train: the optimizer's states and its copy of the parameters."""
    return sum(training.host_bytes(p.bytes, p.record.grad, p.over_dp) for p in distinct(reads))


def own_gradient(layered: LayeredGraph, training: Training, parameter: Parameter) -> float:
    """Bytes of the gradient of a parameter that one position of the model reads, else 0."""
    if len(layered.readers[parameter.name]) > 1:
        return 0.0
    return training.state_bytes(parameter.bytes, parameter.record.grad, parameter.over_dp)[1]


def pending_gradients(
    layered: LayeredGraph, training: Training, reads: Sequence[Sequence[Parameter]], span: tuple[int, int]
) -> tuple[int, float]:
    """Of a span whose positions read the parameters `reads`: the last position, counted from its first, that reads a
    parameter which an earlier one reads too, and bytes of the gradients of all such parameters."""
    last, pending = 0, 0.0
    for p in distinct(reads):
        nbytes = training.pending_grad_bytes(p.bytes, p.record.grad, p.over_dp)
        inside = [at - span[0] for at in layered.readers[p.name] if span[0] <= at < span[1]]
        if len(inside) > 1 and nbytes:
            last, pending = max(last, inside[-1]), pending + nbytes
    return last, pending


class StageMessages(NamedTuple):
    """Seconds of the messages of a stage's parameters over dp: the `total` of a step, and by position those of one
    backward's gradient sync (`scatter`), of what the last backward has besides (`crossing`), and of one pass's gathers
    (`gather`) that computing may hide."""

    total: float
    scatter: list[float]
    crossing: list[float]
    gather: list[float]


def messages_of(
    layered: LayeredGraph, training: Training, reads: Sequence[Sequence[Parameter]], tp: int
) -> StageMessages:
    """The messages of a stage whose positions read the parameters `reads`, split over `tp` ranks."""
    total, scatters, crossings, gathers, seen = 0.0, list[float](), list[float](), list[float](), set[str]()
    for row in reads:
        alone = {p.name: len(layered.readers[p.name]) == 1 for p in row}
        every = sum(p.record.output_bytes[0] * p.record.grad for p in row) / tp
        scatter = crossing = gather = 0.0
        for p in row:
            together = every if alone[p.name] else p.record.output_bytes[0] * p.record.grad / tp
            total += training.sync_seconds(p.bytes, p.over_dp, together) if p.name not in seen else 0.0
            scatter += training.overlappable_seconds(p.bytes, p.over_dp, together) if alone[p.name] else 0.0
            crossing += training.crossing_seconds(p.bytes, p.over_dp, together) if alone[p.name] else 0.0
            gather += training.gather_seconds(p.bytes, p.over_dp, together) if alone[p.name] else 0.0
            seen.add(p.name)
        nbytes = sum(training.reduced_bytes(p.bytes, p.record.grad, p.over_dp) for p in row)
        scatters.append(scatter - crossing / training.backwards)
        crossings.append(crossing)
        gathers.append(gather if training.ahead_bytes(nbytes) else 0.0)
    return StageMessages(float(total), scatters, crossings, gathers)
