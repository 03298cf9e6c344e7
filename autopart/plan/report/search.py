"""The search: incumbent and bound over time, how it was done with its points, and plans by seconds and bytes."""

from dataclasses import dataclass

from autopart.hardware.mesh import usable_bytes
from autopart.plan.fields import PlanFields
from autopart.plan.report.drawing import LETTER, WIDTH, Figure, Scale, byte_tick_text, stairs, tick_text
from autopart.plan.report.extras import Extras
from autopart.plan.search_summary import PointPlan, SearchMoment
from autopart.plan.units import bytes_text, seconds_text, zero_text

LEFT, TOP, HEIGHT = 74, 22, 190
"""Units left of the axis, above it, and of the axis upwards."""


def history_figure(plan: PlanFields) -> Figure | None:
    """The incumbent's seconds and the lower bound over the seconds of the search; None where a plan has no record."""
    history = plan.search.history if plan.search else ()
    if not history:
        return None
    figure, last = Figure("The incumbent and the lower bound over time", TOP + HEIGHT + 44), history[-1]
    found = [m for m in history if m.incumbent is not None]
    values = [m.bound for m in history] + [m.incumbent for m in found if m.incumbent is not None]
    low, high = min(values), max(values)
    pad = (high - low or high) * 0.08
    time = Scale(0.0, last.seconds, LEFT, WIDTH - 150)
    step = Scale(low - pad, high + pad, TOP + HEIGHT, TOP)
    _axes(figure, time, step, "seconds of the search", "step")
    bound = [(time(m.seconds), step(m.bound)) for m in history]
    figure.path("curve bound", stairs(bound))
    ends = [(step(last.bound), f"bound {seconds_text(last.bound)}")]
    for moment, before in zip(found, [None, *found], strict=False):
        if before is None or moment.incumbent != before.incumbent:
            _incumbent(figure, time, step, moment)
    if found:
        curve = [(time(m.seconds), step(m.incumbent or 0.0)) for m in found]
        figure.path("curve incumbent", stairs([*curve, (time(last.seconds), curve[-1][1])]))
        ends.append((curve[-1][1], f"best {seconds_text(found[-1].incumbent or 0.0)}"))
    _labels(figure, time.end + 8, ends)
    return figure


def _incumbent(figure: Figure, time: Scale, step: Scale, moment: SearchMoment) -> None:
    assert moment.incumbent is not None
    gap = 1 - moment.bound / moment.incumbent
    told = f"{seconds_text(moment.incumbent)} after {moment.visited} steps of the search, gap {gap:.2%}"
    figure.dot("incumbent-dot", time(moment.seconds), step(moment.incumbent), 3.5, told)


def _labels(figure: Figure, x: float, rows: list[tuple[float, str]]) -> None:
    """Texts at the ends of curves, kept 15 units apart."""
    below = -100.0
    for y, text in sorted(rows):
        below = max(y + 4, below + 15)
        figure.text(x, below, text, "", WIDTH - x)


def _axes(figure: Figure, across: Scale, up: Scale, x_name: str, y_name: str, gib: bool = False) -> None:
    """Both axes with their ticks; the one upwards in seconds, or in GiB."""
    figure.line("axis", across.start, TOP + HEIGHT, across.end, TOP + HEIGHT)
    figure.line("axis", across.start, TOP, across.start, TOP + HEIGHT)
    for tick in across.ticks():
        x = across(tick)
        figure.line("axis", x, TOP + HEIGHT, x, TOP + HEIGHT + 4)
        figure.text(x, TOP + HEIGHT + 18, tick_text(tick), "middle small")
    for tick in up.ticks(6):
        figure.line("grid", across.start, up(tick), across.end, up(tick))
        told = byte_tick_text(tick) if gib else tick_text(tick)
        figure.text(across.start - 6, up(tick) + 4, told, "end small")
    figure.text((across.start + across.end) / 2, TOP + HEIGHT + 38, x_name, "middle small")
    figure.text(4, 13, y_name, "small")


@dataclass(frozen=True)
class Dot:
    """A plan of the figure of alternatives: its name, seconds of a step, peak bytes, and whether it is the plan."""

    name: str
    seconds: float
    bytes: float
    chosen: bool


def alternatives(plan: PlanFields, extras: Extras | None) -> list[Dot]:
    """The plan, the plans of other points that its search found, and the best of other degrees where `extras` has
    them; the fastest first, one of each point."""
    name = _name(plan, plan.offload == "optimizer")
    dots = {name: Dot(name, plan.step_seconds, max(plan.memory_bytes), True)}
    for point in plan.search.compared if plan.search else ():
        name = _name(point, point.offload)
        if point.seconds is not None and point.memory_bytes is not None:
            dots.setdefault(name, Dot(name, point.seconds, point.memory_bytes, False))
    for row in extras.alternatives if extras else ():
        if row.seconds is not None and row.memory_bytes is not None:
            name = _name(row, row.offload)
            dots.setdefault(name, Dot(name, row.seconds, row.memory_bytes, False))
    return sorted(dots.values(), key=lambda dot: dot.seconds)


def _name(at: PlanFields | PointPlan, offload: bool) -> str:
    state = zero_text(at.zero, offload, at.shard_size)
    return f"pp={at.pp} dp={at.dp} tp={at.tp}, micro-batch {at.micro_batch}, {state}"


def alternatives_figure(plan: PlanFields, dots: list[Dot]) -> Figure | None:
    """Every plan by seconds of a step and peak bytes; None for fewer than two plans."""
    if len(dots) < 2:
        return None
    figure = Figure("Plans by seconds of a step and peak bytes of a rank", TOP + HEIGHT + 44)
    low, high = dots[0].seconds, dots[-1].seconds
    pad, limit = (high - low or high) * 0.05, usable_bytes(plan.mesh)
    most = max(limit, *(dot.bytes for dot in dots))
    across = Scale(max(0.0, low - pad), high + pad, LEFT, WIDTH - 20)
    up, in_gib = Scale(0, most * 1.05, TOP + HEIGHT, TOP), Scale(0, most * 1.05 / 2**30, TOP + HEIGHT, TOP)
    _axes(figure, across, in_gib, "seconds of a step", "peak bytes of a rank", gib=True)
    figure.line("limit", across.start, up(limit), across.end, up(limit))
    figure.text(across.end, up(limit) - 5, f"usable: {bytes_text(limit)}", "end small")
    taken: list[tuple[float, float, float, float]] = [
        (across.end - 120, up(limit) - 16, across.end, up(limit)),
        (across.start, up(limit) - 1, across.end, up(limit) + 1),
        (0.0, 0.0, 150.0, 17.0),
    ]
    for dot in sorted(dots, key=lambda dot: not dot.chosen):
        x, y = across(dot.seconds), up(dot.bytes)
        told = f"{dot.name}: {seconds_text(dot.seconds)}, {bytes_text(dot.bytes)}"
        figure.dot("chosen" if dot.chosen else "other", x, y, 6 if dot.chosen else 4.5, told)
        taken.append((x - 6, y - 6, x + 6, y + 6))
    named = {dot.name.split(",")[0]: dot for dot in reversed(dots)}
    for dot in sorted(named.values(), key=lambda dot: (not dot.chosen, dot.seconds)):
        _dot_name(figure, dot, across(dot.seconds), up(dot.bytes), taken)
    return figure


def _dot_name(figure: Figure, dot: Dot, x: float, y: float, taken: list[tuple[float, float, float, float]]) -> None:
    """A plan's degrees beside its dot, or "the plan", where no other text or dot is; else none: the table has it."""
    text = "the plan" if dot.chosen else dot.name.split(",")[0]
    width = len(text) * LETTER
    around = [(x + 9, y + 4), (x - 9 - width, y + 4), (x - width / 2, y - 10), (x - width / 2, y + 19)]
    for left, base in (*around, *((x - 6, y + below) for below in (22, 38, 54) if dot.chosen)):
        box = (left, base - 13, left + width, base + 4)
        inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 2 and box[3] <= TOP + HEIGHT
        apart = all(box[2] <= t[0] or t[2] <= box[0] or box[3] <= t[1] or t[3] <= box[1] for t in taken)
        if inside and apart:
            figure.text(left, base, text, "strong" if dot.chosen else "")
            taken.append(box)
            return
