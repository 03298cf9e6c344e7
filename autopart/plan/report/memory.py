"""Memory: what fills every stage at its peak, as bars and as a tree, and how much is allocated over a step."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from autopart.plan.breakdown import fullest_stage, slowest_stage
from autopart.plan.fields import PlanFields
from autopart.plan.report.clock import class_of
from autopart.plan.report.drawing import WIDTH, Figure, Scale, area, byte_tick_text, tick_text
from autopart.plan.report.extras import Extras
from autopart.plan.report.measured import MeasuredStep
from autopart.plan.timeline import StageTimeline, Timeline
from autopart.plan.units import bytes_text

KINDS = ("parameters", "gradients", "optimizer", "messages", "activations", "transient")
"""Kinds of bytes, in the order in which bars have them: what lives for the whole step, then the rest."""
LIVES = {
    "parameters": "the whole step",
    "gradients": "from the first backward to the end of the step",
    "optimizer": "the whole step",
    "messages": "the whole step: buffers for what is on its way",
    "activations": "from a micro-batch's forward to the end of its backward",
    "transient": "while the stage computes, or at the end of the step",
}
"""Kind of bytes -> when they are allocated."""

GUTTER, ROW, GAP = 196, 24, 8
AREA = 96
"""Units of the height of a stage's area."""
SHOWN = 8
"""Stages whose memory over time is drawn; of more, the first, the last, the slowest, the fullest and others evenly."""


MOST_ROWS = 500
"""Changes of a stage's bytes that its area has."""
NEAR = {"bars": 0.1, "areas": 0.4}
"""Share of the usable bytes from which the axis of a figure reaches up to the usable bytes."""


def _top(plan: PlanFields, measured: MeasuredStep | None, figure: str) -> tuple[float, bool]:
    """The largest number of bytes of a figure's axis, and whether the usable bytes are on it."""
    most = max(*plan.memory_bytes, *(peak or 0 for peak in (measured.peak_bytes if measured else ())), 1)
    usable = max(plan.usable_bytes)
    near = most > NEAR[figure] * usable
    return (max(most, usable) * 1.02 if near else most * 1.25), near


def peak_figure(plan: PlanFields, measured: MeasuredStep | None = None) -> Figure:
    """A bar for each stage, in parts by kind, a line at the bytes that a device can give, and a mark at the peak that
    was measured."""
    top, near = _top(plan, measured, "bars")
    figure, axis = Figure("Peak bytes of a rank of every stage, by kind"), Scale(0, top, GUTTER, WIDTH - 80)
    y = 22.0
    for index, stage in enumerate(plan.stages):
        x = axis.start
        figure.text(0, y + ROW - 9, f"stage {index}", "strong")
        for kind in KINDS:
            if not (nbytes := stage.memory.get(kind, 0.0)):
                continue
            width = axis(nbytes) - axis.start
            share = f"{nbytes / sum(stage.memory.values()):.0%}"
            figure.rect(f"box {class_of(kind)}", x, y, width, ROW - 2, f"{kind}: {bytes_text(nbytes)}, {share}")
            if width > 30:
                for text in (f"{kind} {share}", share):
                    if len(text) * 6.8 < width - 4:
                        figure.text(x + width / 2, y + ROW - 8, text, f"middle on-{class_of(kind)}")
                        break
            x += width
        figure.text(GUTTER - 6, y + ROW - 8, bytes_text(stage.memory_bytes), "end small")
        if measured and (peak := measured.peak_bytes[index]) is not None:
            figure.line("measured", axis(peak), y - 3, axis(peak), y + ROW + 1)
        if near:
            limit = axis(plan.usable_bytes[index])
            figure.line("limit", limit, y - 6, limit, y + ROW + GAP / 2)
        y += ROW + GAP / 2
    usable = max(plan.usable_bytes)
    at = axis(usable) if near else axis.end
    figure.text(at, 12, f"usable: {bytes_text(usable)}{'' if near else ', far to the right'}", "end small")
    figure.height = y + 6
    return figure


def shown_stages(plan: PlanFields) -> list[int]:
    """The stages whose memory over time is drawn."""
    if plan.pp <= SHOWN:
        return list(range(plan.pp))
    fullest = fullest_stage(plan)
    first = dict.fromkeys([0, plan.pp - 1, slowest_stage(plan), fullest])
    evenly = (round(i * (plan.pp - 1) / (SHOWN - 1)) for i in range(SHOWN))
    return sorted([*first, *[i for i in evenly if i not in first]][:SHOWN])


def over_time_figure(plan: PlanFields, made: Timeline, measured: MeasuredStep | None = None) -> Figure:
    """For each stage an area over the step, in parts by kind: what is allocated all the time, then activations, then
    what lives while the stage computes. The predicted peak is marked, and the measured one."""
    figure = Figure("Allocated bytes of a rank of every stage over the step")
    clock, y = Scale(0, made.seconds, GUTTER, WIDTH - 8), 6.0
    top, near = _top(plan, measured, "areas")
    for index in shown_stages(plan):
        timed, scale = made.stages[index], Scale(0, top, y + AREA, y)
        figure.text(0, y + 14, f"stage {index}", "strong")
        figure.text(0, y + 30, f"{timed.peak_in_flight} in flight", "small", GUTTER)
        figure.rect("empty", clock.start, y, clock.end - clock.start, AREA)
        _areas(figure, plan, index, timed, made.seconds, clock, scale)
        if near:
            usable = plan.usable_bytes[index]
            figure.line("limit", clock.start, scale(usable), clock.end, scale(usable))
        _peak_mark(figure, timed, clock, scale)
        if measured and (peak := measured.peak_bytes[index]) is not None:
            figure.line("measured", clock.start, scale(peak), clock.end, scale(peak))
            figure.text(0, y + 60, f"measured {bytes_text(peak)}", "small", GUTTER)
        _byte_axis(figure, scale)
        y += AREA + 14
    for tick in clock.ticks():
        figure.text(clock(tick), y + 6, tick_text(tick), f"{'middle' if clock(tick) < clock.end - 24 else 'end'} small")
    figure.height = y + 14
    return figure


def _areas(
    figure: Figure, plan: PlanFields, index: int, timed: StageTimeline, whole: float, clock: Scale, scale: Scale
) -> None:
    """A stage's bytes over time, kind upon kind."""
    rows = _thinned([*timed.allocated, (whole, *timed.allocated[-1][1:])], whole)
    memory, below = plan.stages[index].memory, 0.0
    known = sum(memory.get(kind, 0.0) for kind in KINDS[:4])
    for kind in KINDS[:4]:
        # At the end of a step there may be more gradients than the stage has all the while.
        nbytes = memory.get(kind, 0.0) - (known - timed.resident if kind == "gradients" else 0.0)
        if nbytes > 0:
            low, high = scale(below), scale(below + nbytes)
            figure.rect(f"box {kind}", clock.start, high, clock.end - clock.start, low - high, _lives(kind, nbytes))
            below += nbytes
    state = timed.resident
    figure.path("box activations", area([(clock(s), scale(state), scale(state + a)) for s, a, _ in rows]),
                _lives("activations", max(a for _, a, _ in rows)))  # fmt: skip
    figure.path("box transient", area([(clock(s), scale(state + a), scale(state + a + t)) for s, a, t in rows]),
                _lives("transient", max(t for _, _, t in rows)))  # fmt: skip


def _lives(kind: str, nbytes: float) -> str:
    return f"{kind}: at most {bytes_text(nbytes)}, {LIVES[kind]}"


def _peak_mark(figure: Figure, timed: StageTimeline, clock: Scale, scale: Scale) -> None:
    """A dot at the first moment of the predicted peak."""
    second, nbytes = max(timed.memory, key=lambda row: row[1])
    figure.dot("peak-dot", clock(second), scale(nbytes), 4, f"predicted peak: {bytes_text(nbytes)}")
    figure.text(0, scale.end + 46, f"peak {bytes_text(nbytes)}", "small", GUTTER)


@dataclass(frozen=True)
class TreeBlock:
    """Equal blocks in a group of the tree: the bytes of one of them, and (name, bytes) of its parts."""

    label: str
    times: int
    bytes: float
    rows: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class TreeGroup:
    """Bytes of one kind of a stage at its peak.

    kind    one of KINDS
    share   of the stage's peak
    blocks  those that have some of them; () where the tensors are not known
    """

    kind: str
    bytes: float
    share: float
    blocks: tuple[TreeBlock, ...]


def memory_tree(plan: PlanFields, extras: Extras | None) -> list[list[TreeGroup]]:
    """Of every stage its kinds of bytes at the peak, the largest first, with their blocks and tensors."""
    found = []
    for index, stage in enumerate(plan.stages):
        whole = sum(stage.memory.values())
        groups = [
            TreeGroup(kind, nbytes, nbytes / whole, tuple(_blocks(extras, index, kind) if extras else ()))
            for kind, nbytes in stage.memory.items()
            if nbytes
        ]
        found.append(sorted(groups, key=lambda group: -group.bytes))
    return found


def _blocks(extras: Extras, stage: int, kind: str) -> Iterator[TreeBlock]:
    """The blocks of a stage that have bytes of a kind."""
    for block in extras.memory[stage]:
        rows = tuple((name, nbytes) for name, of, nbytes in block.rows if of == kind)
        if rows:
            yield TreeBlock(block.label, block.times, sum(nbytes for _, nbytes in rows), rows)


def _thinned(rows: list[tuple[float, float, float]], whole: float) -> list[tuple[float, float, float]]:
    """Rows of `StageTimeline.allocated`; of more than MOST_ROWS, in each of so many slots of time the row of most
    bytes, and the last row."""
    if len(rows) <= MOST_ROWS or not whole:
        return rows
    fullest: dict[int, tuple[float, float, float]] = {}
    for row in rows[:-1]:
        slot = int(row[0] / whole * MOST_ROWS)
        fullest[slot] = max(fullest.get(slot, row), row, key=lambda row: row[1] + row[2])
    return [*(fullest[slot] for slot in sorted(fullest)), rows[-1]]


def _byte_axis(figure: Figure, scale: Scale) -> None:
    """Bytes left of an area, at values that are round in their unit."""
    unit = 1024 ** int(math.log(max(scale.high, 1.0), 1024))
    whole = Scale(0, scale.high / unit, scale.start, scale.end)
    for tick in whole.ticks(4):
        figure.line("axis", GUTTER - 4, whole(tick), GUTTER, whole(tick))
        figure.text(GUTTER - 7, whole(tick) + 4, byte_tick_text(tick * unit / 2**30), "end small")
