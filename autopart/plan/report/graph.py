"""The partitioned graph: stages and their messages, blocks, operators with the values that go from one to another."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from autopart.ir.labels import is_block
from autopart.plan.breakdown import fullest_stage, slowest_stage
from autopart.plan.fields import PlanFields
from autopart.plan.report.drawing import WIDTH, Figure, units
from autopart.plan.report.mesh_figure import SHADES
from autopart.plan.stages import PlanLine, PlanSegment, PlanStage
from autopart.plan.units import bytes_text, counted, seconds_text

ROW = 24
"""Units of a table's row, and of an arc figure's."""
ARCS = 64
"""Units of the width of the arcs beside a table."""
MOST_ROWS = 1500
"""Operators of a report. Those of further blocks are left out, and the report says so."""
ACROSS = 4
"""Stages in a row of the figure of stages."""


@dataclass(frozen=True)
class Operator:
    """An operator's row: its line of the plan, and its share of the block's seconds."""

    line: PlanLine
    share: float

    @property
    def seconds(self) -> float:
        """Compute and communication, forward and backward, for one micro-batch."""
        return self.line.seconds + self.line.comm_seconds


@dataclass(frozen=True)
class Received:
    """A value that a block reads from outside: who makes it, where, its placement and bytes."""

    maker: str
    where: str
    placement: str
    bytes: float


@dataclass(frozen=True)
class BlockView:
    """Equal blocks of a stage.

    title      their names
    seconds    of one block, forward and backward, for one micro-batch
    times      number of blocks
    as_above   title of equal blocks above, whose operators are shown there; "" where they are shown here
    operators  their rows; none where they are shown above
    arcs       who reads whose value, beside the rows
    received   what the first of the blocks reads from outside
    left_out   operators for which the report has no room
    """

    title: str
    seconds: float
    times: int
    as_above: str
    operators: tuple[Operator, ...]
    arcs: Figure | None
    received: tuple[Received, ...]
    left_out: int


def layers_text(stage: PlanStage) -> str:
    """The blocks of a stage: ``"model.layers.0 .. 7 (8)"``."""
    labels = [label for segment in stage.segments for label in segment.labels if is_block(label)]
    if not labels:
        return "operators outside of blocks"
    return labels[0] if len(labels) == 1 else f"{span_text(labels)} ({len(labels)})"


def span_text(labels: Sequence[str]) -> str:
    """The first and the last of some labels: ``"model.layers.0 .. 7"``, where they are of one list."""
    first, last = labels[0], labels[-1]
    same = first.rpartition(".")[0] == last.rpartition(".")[0]
    return first if first == last else f"{first} .. {last.rpartition('.')[2] if same else last}"


def recompute_text(stage: PlanStage) -> str:
    """How many of the stage's positions recompute in which mode."""
    counts = Counter(mode for mode in stage.recompute if mode != "none")
    return ", ".join(f"{mode} in {number}" for mode, number in counts.items()) or "none"


def stages_figure(plan: PlanFields) -> Figure:
    """The stages in order, with an arrow for every message and its bytes."""
    figure, slowest = Figure("The pipeline's stages and the messages between them"), slowest_stage(plan)
    fullest = fullest_stage(plan)
    ranking = (("slowest", slowest), ("fullest", fullest)) if plan.pp > 1 else ()
    across = min(ACROSS, plan.pp)
    between = 96 if plan.pp > 1 else 0
    width, height, down = (WIDTH - 8 - between * (across - 1) - 62 * (plan.pp > across)) / across, 92, 132
    room = width + between
    for index, stage in enumerate(plan.stages):
        x, y = index % across * room + 4, index // across * down + 6
        figure.rect(f"box shade-{index % SHADES}", x, y, width, height)
        marks = ", ".join(word for word, at in ranking if at == index)
        blocks = sum(is_block(label) for segment in stage.segments for label in segment.labels)
        lines = [
            f"stage {index}{f': {marks}' if marks else ''}",
            counted(blocks, "block") if blocks else "no blocks",
            f"F {seconds_text(stage.forward_seconds)}",
            f"B {seconds_text(stage.backward_seconds)}",
            bytes_text(stage.memory_bytes),
        ]
        for number, text in enumerate(lines):
            figure.text(x + 8, y + 17 + 17 * number, text, "on-shade strong" if not number else "on-shade", width - 12)
        for to, nbytes, _ in stage.sends:
            if to == index + 1:
                _next_arrow(figure, (x + width, y + height / 2), to % across == 0, nbytes, room - width)
        others = [f"stage {to}: {bytes_text(nbytes)}" for to, nbytes, _ in stage.sends if to != index + 1]
        if others:
            figure.text(x + 8, y + height + 16, f"also to {', '.join(others)}", "small", room - 12)
    figure.height = (plan.pp - 1) // across * down + height + 30
    return figure


def _next_arrow(figure: Figure, start: tuple[float, float], wraps: bool, nbytes: float, room: float) -> None:
    """An arrow to the next stage; short where that one is in the next row."""
    x, y = start
    end = x + (room - 6 if not wraps else 24)
    figure.path("arrow", f"M{units(x)} {units(y)}H{units(end - 4)}", f"{bytes_text(nbytes)} for a micro-batch")
    figure.path("tip", f"M{units(end)} {units(y)}l-8 -4v8z")
    figure.text(x + (4 if not wraps else 2), y - 7, bytes_text(nbytes), "small", room + 8)


def stage_blocks(plan: PlanFields) -> list[list[BlockView]]:
    """Of every stage its blocks, each with its operators where no equal one is above."""
    shown: dict[tuple[PlanLine, ...], str] = {}
    room = MOST_ROWS
    found: list[list[BlockView]] = []
    for index, stage in enumerate(plan.stages):
        views: list[BlockView] = []
        for segment in stage.segments:
            labels = segment.labels
            title = (span_text(labels) if labels else "") or "operators outside of blocks"
            above = shown.get(segment.lines, "")
            lines = () if above else segment.lines[:room]
            room -= len(lines)
            if not above:
                shown[segment.lines] = f"{title} of stage {index}"
            received = tuple(_received(plan, index, segment)) if lines else ()
            left = 0 if above else len(segment.lines) - len(lines)
            rows = tuple(_operators(lines))
            arcs = _arcs(lines) if lines else None
            views.append(BlockView(title, segment.seconds, len(labels), above, rows, arcs, received, left))
        found.append(views)
    return found


def _operators(lines: tuple[PlanLine, ...]) -> Iterator[Operator]:
    most = max((line.seconds + line.comm_seconds for line in lines), default=0.0)
    for line in lines:
        yield Operator(line, (line.seconds + line.comm_seconds) / most if most else 0.0)


def _received(plan: PlanFields, stage: int, segment: PlanSegment) -> Iterator[Received]:
    """What the first block of a segment reads from outside; nothing where the plan's numbers name no operator."""
    for home, label, at in segment.sources[0] if segment.sources else ():
        maker = _line(plan, home, label, at)
        if maker is None:
            continue
        name, line = maker
        what = f"{line.name} {line.operator}".strip()
        where = (f"stage {home}, " if home != stage else "") + (name or "operators outside of blocks")
        yield Received(what, where, line.placement, line.bytes)


def _line(plan: PlanFields, stage: int, label: int, at: int) -> tuple[str, PlanLine] | None:
    """The label and the line that (stage, label, line) of `PlanSegment.sources` are."""
    if not 0 <= stage < plan.pp:
        return None
    rows = [(label, segment) for segment in plan.stages[stage].segments for label in segment.labels]
    if not (0 <= label < len(rows) and 0 <= at < len(rows[label][1].lines)):
        return None
    name, segment = rows[label]
    return name, segment.lines[at]


def _arcs(lines: tuple[PlanLine, ...]) -> Figure:
    """An arc from every operator to those that read its value, beside the table of the operators."""
    figure = Figure("Which operator reads whose value", ROW * len(lines))
    spans = [(i, to) for to, line in enumerate(lines) for i in line.inputs if 0 <= i < len(lines) and i != to]
    for start, end in spans:
        y1, y2 = (start + 0.5) * ROW, (end + 0.5) * ROW
        out = 6 + 50 * (1 - 1 / (1 + (abs(end - start) - 1) / 4))
        made = lines[start]
        what = f"{made.name} {made.operator}".strip()
        title = f"{what}: {bytes_text(made.bytes)}{f', {made.placement}' if made.placement else ''}"
        bend = units(60 - out * 1.3)
        figure.path("arc", f"M60 {units(y1)}C{bend} {units(y1)} {bend} {units(y2)} 60 {units(y2)}", title)
    for at in range(len(lines)):
        figure.dot("node", 60, (at + 0.5) * ROW, 3)
    return figure
