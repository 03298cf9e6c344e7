"""Which operator of a plan makes the values that the segments of its stages read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from autopart.ir.graph import value_of
from autopart.ir.layered_graph import LayeredGraph
from autopart.passes.price_stage import PricedSegment
from autopart.passes.stage_graph import PRELUDE_SEGMENT, StageGraph
from autopart.plan.stages import PlanStage

Source = tuple[int, int, int]
"""(stage, label, line), labels numbered over the segments of the stage."""


@dataclass(frozen=True)
class Written:
    """A stage as it is written out.

    graph   the stage's graph, every segment of the model's graph in it once
    priced  segment of the model's graph -> its lines
    labels  position of the model -> its label's number in the stage; the prelude's is at PRELUDE_SEGMENT
    """

    graph: StageGraph
    priced: Mapping[int, PricedSegment]
    labels: Mapping[int, int]


def with_sources(
    layered: LayeredGraph,
    stages: Sequence[PlanStage],
    spans: Sequence[tuple[int, int]],
    written: Sequence[tuple[StageGraph, Mapping[int, PricedSegment]]],
) -> list[PlanStage]:
    """The stages, with the sources of every segment; `spans` has the positions of each stage."""
    rows = [Written(graph, priced, _labels(layered, priced, span))
            for (graph, priced), span in zip(written, spans, strict=True)]  # fmt: skip
    stage_of = {position: index for index, span in enumerate(spans) for position in range(*span)}
    made = []
    for index, stage in enumerate(stages):
        sources = iter([tuple(_sources(layered, rows, stage_of, index, at)) for at in rows[index].labels])
        segments = (replace(s, sources=tuple(next(sources) for _ in s.labels)) for s in stage.segments)
        made.append(replace(stage, segments=tuple(segments)))
    return made


def _labels(layered: LayeredGraph, priced: Mapping[int, PricedSegment], span: tuple[int, int]) -> dict[int, int]:
    printed = [p for p in range(*span) if layered.sequence[p] in priced]
    prelude = [PRELUDE_SEGMENT] if PRELUDE_SEGMENT in priced else []
    return {position: number for number, position in enumerate([*prelude, *printed])}


def _sources(
    layered: LayeredGraph, rows: Sequence[Written], stage_of: Mapping[int, int], stage: int, position: int
) -> Iterator[Source]:
    """The sources of the values that the lines at a position read from other segments."""
    row = rows[stage]
    prelude = row.priced[PRELUDE_SEGMENT].nodes if PRELUDE_SEGMENT in row.priced else ()
    index = layered.sequence[position] if position >= 0 else PRELUDE_SEGMENT
    for node in row.priced[index].outside:
        if node in prelude:
            yield stage, row.labels[PRELUDE_SEGMENT], prelude.index(node)
            continue
        value, _ = row.graph.values[node]
        source = _source(layered, position, value)
        assert source is not None, f"{node} at position {position} is made nowhere"
        home, place = source
        maker = rows[stage_of[home]]
        twin = value_of(layered.segments[layered.sequence[home]].nodes[place])
        yield stage_of[home], maker.labels[home], _line(maker, layered.sequence[home], twin, row.graph.values[node][1])


def _source(layered: LayeredGraph, position: int, value: tuple[fx.Node, int]) -> tuple[int, int] | None:
    """(position, index of the node in its segment) of the node that makes a value, which the segment at `position` or
    the prelude reads. None where the prelude's value is made nowhere."""
    if position != PRELUDE_SEGMENT:
        externals = [value_of(n) for n in layered.segments[layered.sequence[position]].externals]
        return layered.sources(position)[externals.index(value)]
    location = layered.locations.get(value[0])
    return location and (layered.sequence.index(location[0]), location[1])


def _line(maker: Written, index: int, value: tuple[fx.Node, int], placements: object) -> int:
    """The line of a segment that gives a value in the placement that is read; else the first line that gives it."""
    lines = {
        placed: line
        for line, node in reversed(list(enumerate(maker.priced[index].nodes)))
        for known, placed in [maker.graph.values.get(node, (None, None))]
        if known == value
    }
    return lines.get(placements, min(lines.values()))  # type: ignore[call-overload]
