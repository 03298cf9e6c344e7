"""The step on a clock: what every stage does when, predicted and measured, on one axis."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from autopart.plan.report.drawing import WIDTH, Figure, Scale, tick_text
from autopart.plan.report.measured import MeasuredStep, Slice
from autopart.plan.timeline import CAUSES, SENDS, StageTimeline, Timeline
from autopart.plan.units import seconds_text

LEGEND = tuple(dict.fromkeys(CAUSES.values()))
"""The causes in the order in which tables and the legend have them."""

GUTTER = 140
"""Units left of the axis, for the rows' names."""
ROW, GAP, TOP = 22, 12, 6
"""Units of a row, between two stages, and above the first."""
MOST_BOXES = 3000
"""Slices of a figure up to which each has a box of its own, which tells its seconds. More are drawn as slots of equal
length, each divided by the shares of its time."""
MOST_SLOTS = 8_000
"""Slots of a figure."""
DIGIT, AROUND = 7.5, 5.0
"""Units of a digit, and of what is left and right of a number: a box has the number of its micro-batch where there is
room for that of the last."""


def predicted(stage: StageTimeline) -> list[Slice]:
    """What a stage does, as predicted. Messages that are sent take none of its time."""
    return [Slice(i.op, i.micro_batch, start, end) for i, start, end in stage.events if i.op not in SENDS]


def seconds_by_cause(slices: Iterable[Slice], whole: float) -> dict[str, float]:
    """Cause -> seconds of a step that takes `whole`; "idle" is the rest of it."""
    found = dict.fromkeys(LEGEND, 0.0)
    for slice in slices:
        found[CAUSES[slice.op]] += slice.end - slice.start
    return {**found, "idle": max(0.0, whole - sum(found.values()))}


def clock_figure(made: Timeline, measured: MeasuredStep | None) -> tuple[Figure, bool]:
    """A row for each stage; with a measured step two, the predicted one first. And whether every slice has a box."""
    whole = max(made.seconds, measured.seconds if measured else 0.0)
    figure, axis = Figure("What every stage does when"), Scale(0.0, whole, GUTTER, WIDTH - 8)
    rows: list[tuple[str, str, list[Slice]]] = []
    for index, stage in enumerate(made.stages):
        if measured:
            rows.append((f"stage {index}", "predicted", predicted(stage)))
            rows.append(("", f"rank {measured.ranks[index]} measured", list(measured.stages[index])))
        else:
            rows.append((f"stage {index}", "", predicted(stage)))
    boxes = sum(len(slices) for _, _, slices in rows) <= MOST_BOXES
    y = float(TOP)
    for name, which, slices in rows:
        y += GAP * bool(name) * bool(measured) * (y > TOP)
        figure.text(0, y + ROW - 7, name, "strong", 60)
        figure.text(GUTTER - 6, y + ROW - 7, which, "end small")
        figure.rect("empty", GUTTER, y + 2, axis.end - GUTTER, ROW - 4)
        if boxes:
            _boxes(figure, axis, y + 2, slices)
        else:
            _slots(figure, axis, y + 2, slices, MOST_SLOTS // len(rows))
        y += ROW
    _time_axis(figure, axis, y + 2)
    figure.height = y + 34
    return figure, boxes


def _boxes(figure: Figure, axis: Scale, y: float, slices: Sequence[Slice]) -> None:
    """A box for each slice, with the number of its micro-batch where there is room."""
    numbered = AROUND + DIGIT * len(str(max((slice.micro_batch for slice in slices), default=0)))
    for slice in slices:
        x, end, kind = axis(slice.start), axis(slice.end), CAUSES[slice.op]
        if end - x < 0.05:
            continue
        of = f" of micro-batch {slice.micro_batch}" if slice.micro_batch >= 0 else ""
        title = f"{slice.op.value.replace('_', ' ')}{of}: {seconds_text(slice.end - slice.start)}"
        figure.rect(f"box {class_of(kind)}", x, y, end - x, ROW - 4, title)
        if end - x >= numbered and slice.micro_batch >= 0 and kind in ("forward", "backward"):
            figure.text((x + end) / 2, y + ROW - 8, str(slice.micro_batch), f"middle on-{class_of(kind)}")


def _slots(figure: Figure, axis: Scale, y: float, slices: Sequence[Slice], slots: int) -> None:
    """Slots of equal length, one above the other the kinds of which each has, by their shares of its time; one path for
    each kind."""
    if not axis.high:
        return
    slots, height = max(50, min(int(axis.end - axis.start), slots)), ROW - 4
    shares, each = _shares(slices, slots, (axis.high - axis.low) / slots), (axis.end - axis.start) / slots
    tops = [tuple(round(height * sum(row[: at + 1]), 1) for at in range(len(LEGEND))) for row in shares.tolist()]
    paths: dict[str, list[str]] = {}
    start = 0
    for end in range(1, slots + 1):
        if end < slots and tops[end] == tops[start]:
            continue
        x, width = axis.start + start * each, (end - start) * each
        for kind, low, high in zip(LEGEND, (0.0, *tops[start]), tops[start], strict=False):
            if high > low:
                box = f"M{x:.1f} {y + height - high:.1f}h{width:.1f}v{high - low:.1f}h-{width:.1f}z"
                paths.setdefault(kind, []).append(box)
        start = end
    for kind, commands in paths.items():
        figure.path(class_of(kind), "".join(commands), kind)


def _shares(slices: Sequence[Slice], slots: int, each: float) -> NDArray[np.float64]:
    """[slots, kinds of LEGEND]: the share of the slot's `each` seconds that the kind has."""
    found = np.zeros((slots, len(LEGEND)))
    for slice in slices:
        kind = LEGEND.index(CAUSES[slice.op])
        for at in range(int(slice.start / each), min(slots, int(slice.end / each) + 1)):
            found[at, kind] += max(0.0, min(slice.end, (at + 1) * each) - max(slice.start, at * each)) / each
    return found


def _time_axis(figure: Figure, axis: Scale, y: float) -> None:
    """Ticks and seconds under the rows."""
    figure.line("axis", axis.start, y, axis.end, y)
    for tick in axis.ticks():
        x = axis(tick)
        figure.line("axis", x, y, x, y + 4)
        middle = "middle" if x < axis.end - 24 else "end"
        figure.text(x, y + 18, tick_text(tick), f"{middle} small")


def class_of(cause: str) -> str:
    """The style class of a cause or kind: its name without spaces."""
    return cause.replace(" ", "-")
