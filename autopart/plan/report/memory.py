"""Memory: what fills every stage at its peak, and how much is allocated over a step."""

from autopart.hardware.mesh import usable_bytes
from autopart.plan.breakdown import fullest_stage, slowest_stage
from autopart.plan.fields import PlanFields
from autopart.plan.report.clock import class_of
from autopart.plan.report.drawing import WIDTH, Figure, Scale, area, byte_tick_text, tick_text
from autopart.plan.timeline import Timeline
from autopart.plan.units import bytes_text

KINDS = ("parameters", "gradients", "optimizer", "activations", "messages", "transient")
"""Kinds of bytes, in the order in which bars have them."""

GUTTER, ROW, GAP = 130, 24, 8
AREA = 96
"""Units of the height of a stage's area."""
SHOWN = 8
"""Stages whose memory over time is drawn; of more, the first, the last, the slowest, the fullest and others evenly."""


MOST_ROWS = 500
"""Changes of a stage's bytes that its area has."""
NEAR = 0.4
"""Share of the usable bytes from which a peak's axis over time reaches up to the usable bytes."""


def _top(plan: PlanFields) -> float:
    """The largest number of bytes of the bars."""
    return max(*plan.memory_bytes, usable_bytes(plan.mesh)) * 1.02


def peak_figure(plan: PlanFields) -> Figure:
    """A bar for each stage, in parts by kind, and a line at the bytes that a device can give."""
    figure, axis = Figure("Peak bytes of a rank of every stage, by kind"), Scale(0, _top(plan), GUTTER, WIDTH - 80)
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
        y += ROW + GAP / 2
    limit = axis(usable_bytes(plan.mesh))
    figure.line("limit", limit, 16, limit, y)
    figure.text(limit, 12, f"usable: {bytes_text(usable_bytes(plan.mesh))}", "end small")
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


def over_time_figure(plan: PlanFields, made: Timeline) -> Figure:
    """For each stage an area over the step: what is allocated all the time, then activations, then what lives in one
    backward alone."""
    figure = Figure("Allocated bytes of a rank of every stage over the step")
    clock, y, usable = Scale(0, made.seconds, GUTTER, WIDTH - 8), 6.0, usable_bytes(plan.mesh)
    near = max(plan.memory_bytes) > NEAR * usable
    top = _top(plan) if near else max(plan.memory_bytes) * 1.25
    for index in shown_stages(plan):
        timed, scale = made.stages[index], Scale(0, top, y + AREA, y)
        rows = _thinned([*timed.allocated, (made.seconds, *timed.allocated[-1][1:])], made.seconds)
        state = timed.resident
        figure.text(0, y + 14, f"stage {index}", "strong")
        figure.text(0, y + 30, f"{timed.peak_in_flight} in flight", "small", GUTTER)
        figure.rect("empty", clock.start, y, clock.end - clock.start, AREA)
        figure.rect("box state", clock.start, scale(state), clock.end - clock.start, scale(0) - scale(state),
                    f"parameters, gradients, optimizer states, messages: {bytes_text(state)}")  # fmt: skip
        figure.path("box activations", area([(clock(s), scale(state), scale(state + a)) for s, a, _ in rows]),
                    f"activations: at most {bytes_text(max(a for _, a, _ in rows))}")  # fmt: skip
        figure.path("box transient", area([(clock(s), scale(state + a), scale(state + a + t)) for s, a, t in rows]),
                    f"transient: at most {bytes_text(max(t for _, _, t in rows))}")  # fmt: skip
        if near:
            figure.line("limit", clock.start, scale(usable), clock.end, scale(usable))
        _byte_axis(figure, scale)
        y += AREA + 14
    for tick in clock.ticks():
        figure.text(clock(tick), y + 6, tick_text(tick), f"{'middle' if clock(tick) < clock.end - 24 else 'end'} small")
    figure.height = y + 14
    return figure


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
    """Bytes left of an area, at round values."""
    whole = Scale(0, scale.high / 2**30, scale.start, scale.end)
    for tick in whole.ticks(4):
        figure.line("axis", GUTTER - 4, whole(tick), GUTTER, whole(tick))
        figure.text(GUTTER - 7, whole(tick) + 4, byte_tick_text(tick), "end small")
