"""Systems of a benchmark by seconds of a step."""

from autopart.plan.report.drawing import WIDTH, Figure, Scale, tick_text
from autopart.plan.report.extras import Bench
from autopart.plan.units import seconds_text

GUTTER, ROW = 250, 22
"""Units left of the axis, and of a row."""


def bench_figure(bench: Bench) -> Figure | None:
    """A bar for each ranked system from 0 to its median, a line from quartile to quartile, and a mark at what a plan of
    autopart's foretold; None where no system is ranked."""
    ranked = [row for row in bench.rows if row.seconds is not None]
    if not ranked:
        return None
    figure = Figure("Seconds of a step of every system")
    ends = [*(r.seconds or 0.0 for r in ranked), *(r.predicted or 0.0 for r in ranked)]
    axis = Scale(0.0, max(*ends, *(r.quartiles[1] for r in ranked if r.quartiles)) * 1.02, GUTTER, WIDTH - 80)
    y = 6.0
    for row in ranked:
        assert row.seconds is not None
        middle, end = y + (ROW - 4) / 2, axis(row.seconds)
        figure.text(0, y + ROW - 8, row.system, "strong" if row.predicted else "", GUTTER - 8)
        told = f"{row.system}: {seconds_text(row.seconds)}"
        figure.rect(f"box {'own' if row.predicted else 'rival'}", axis.start, y, end - axis.start, ROW - 6, told)
        if row.quartiles:
            low, high = (axis(value) for value in row.quartiles)
            figure.line("spread", low, middle, high, middle)
            end = max(end, high)
        if row.predicted:
            at = axis(row.predicted)
            figure.path("foretold", f"M{at:.1f} {y - 1:.1f}v{ROW - 4}", f"predicted: {seconds_text(row.predicted)}")
            end = max(end, at)
        figure.text(end + 6, y + ROW - 9, seconds_text(row.seconds), "small")
        y += ROW
    figure.line("axis", axis.start, y, axis.end, y)
    for tick in axis.ticks():
        figure.line("axis", axis(tick), y, axis(tick), y + 4)
        figure.text(axis(tick), y + 18, tick_text(tick), "middle small")
    figure.height = y + 24
    return figure
