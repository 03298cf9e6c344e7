"""A plan as a graph: a node an operator, an edge a value, for networkx and what reads its formats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from autopart.errors import PartitionError
from autopart.plan.fields import PlanFields

if TYPE_CHECKING:
    import networkx

    from autopart.plan.stages import PlanSegment


def graph(plan: PlanFields) -> networkx.DiGraph:
    """The operators of every stage of a plan on one rank, for one micro-batch.

    A node is named "STAGE.LABEL.LINE", labels numbered within the stage. Its attributes are those of `PlanLine` without
    `inputs`, with `stage`, `label` (the block, as "model.layers.3") and `recompute` ("none" where no block is). An edge
    goes from the operator that makes a value to one that reads it, and has its `bytes`; an edge between stages has
    `message` too, as "stage 0 to stage 1". Raises PartitionError where the plan's lines name no operator.
    """
    import networkx

    found = networkx.DiGraph(model=plan.model, mesh=str(plan.mesh), step_seconds=plan.step_seconds)
    rows = [row for index in range(len(plan.stages)) for row in _labels(plan, index)]
    for (stage, number), label, mode, segment, _ in rows:
        for place, line in enumerate(segment.lines):
            what = {k: v for k, v in vars(line).items() if k != "inputs"}
            found.add_node(f"{stage}.{number}.{place}", stage=stage, label=label, recompute=mode, **what)
    for (stage, number), _, _, segment, sources in rows:
        for place, line in enumerate(segment.lines):
            for i in line.inputs:
                _add_edge(found, sources, (stage, number, i), f"{stage}.{number}.{place}")
    return found


Sources = tuple[tuple[int, int, int], ...]


def _labels(plan: PlanFields, index: int) -> Iterator[tuple[tuple[int, int], str, str, PlanSegment, Sources]]:
    """((stage, number of the label), label, checkpointing mode, segment, sources) of every label of a stage. Labels in
    front of those that `recompute` tells of are the prelude's."""
    stage = plan.stages[index]
    rows = [(label, segment, segment.sources[i] if i < len(segment.sources) else ())
            for segment in stage.segments for i, label in enumerate(segment.labels)]  # fmt: skip
    modes = ["none"] * (len(rows) - len(stage.recompute)) + list(stage.recompute)
    for number, ((label, segment, sources), mode) in enumerate(zip(rows, modes[-len(rows) :], strict=False)):
        yield (index, number), label, mode, segment, sources


def _add_edge(found: networkx.DiGraph, sources: Sources, read: tuple[int, int, int], reader: str) -> None:
    """An edge to `reader` from what it reads: `read` is (stage, label, one of the line's inputs)."""
    stage, number, i = read
    try:
        home, label, line = (stage, number, i) if i >= 0 else sources[-1 - i]
        maker = f"{home}.{label}.{line}"
        edge = {"bytes": found.nodes[maker]["bytes"]}
    except (IndexError, KeyError) as error:
        raise PartitionError(
            f"operator {reader} of the plan reads input {i}", "the plan has no such operator"
        ) from error
    if home != stage:
        edge["message"] = f"stage {home} to stage {stage}"
    found.add_edge(maker, reader, **edge)
