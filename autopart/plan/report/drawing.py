"""SVG as data: marks of a figure, scales, and text that fits. The page's template writes it out and escapes it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from autopart.plan.units import bytes_text, seconds_text

WIDTH = 960
"""Width of every figure, in units of its view box."""

LETTER = 8.3
"""Width of a letter of the figures' text, in units of the view box: an upper estimate for the largest size, 13."""


@dataclass(frozen=True)
class Mark:
    """An element of SVG.

    tag         "rect", "path", "line", "circle" or "text"
    attributes  name -> value
    text        content of a text
    title       what a pointer that rests on the mark is told
    """

    tag: str
    attributes: Mapping[str, str | float]
    text: str = ""
    title: str = ""


@dataclass
class Figure:
    """A drawing of WIDTH x `height` units. `label` says in words what it shows."""

    label: str
    height: float = 0.0
    marks: list[Mark] = field(default_factory=list)

    def rect(self, kind: str, x: float, y: float, width: float, height: float, title: str = "") -> None:
        """A rectangle of the class `kind`."""
        self._add("rect", kind, {"x": x, "y": y, "width": width, "height": height}, title=title)

    def line(self, kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
        """A line of the class `kind`."""
        self._add("line", kind, {"x1": x1, "y1": y1, "x2": x2, "y2": y2})

    def path(self, kind: str, commands: str, title: str = "") -> None:
        """A path of the class `kind`."""
        self.marks.append(Mark("path", {"class": kind, "d": commands}, title=title))

    def text(self, x: float, y: float, text: str, kind: str = "", width: float = math.inf) -> None:
        """A text at its baseline, cut to `width`; classes "end" and "middle" say which part of it is at `x`."""
        if shown := fitting(text, width):
            self._add("text", kind, {"x": x, "y": y}, shown, "" if shown == text else text)

    def dot(self, kind: str, x: float, y: float, radius: float, title: str = "") -> None:
        """A circle of the class `kind`."""
        self._add("circle", kind, {"cx": x, "cy": y, "r": radius}, title=title)

    def _add(self, tag: str, kind: str, place: Mapping[str, float], text: str = "", title: str = "") -> None:
        named: dict[str, str | float] = {"class": kind} if kind else {}
        self.marks.append(Mark(tag, {**named, **{key: units(value) for key, value in place.items()}}, text, title))


def units(value: float) -> float:
    """A coordinate with two decimals, which is finer than a pixel."""
    return round(value, 2)


def fitting(text: str, width: float) -> str:
    """The text, cut with an ellipsis where it is wider than `width`; "" where not even three letters fit."""
    room = int(min(width, 1e6) / LETTER)
    if len(text) <= room:
        return text
    return text[: room - 1] + "…" if room >= 3 else ""


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` on a figure's units from `start` to `end`, evenly."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        return self.start + (value - self.low) / span * (self.end - self.start) if span else self.start

    def ticks(self, most: int = 8) -> list[float]:
        """At most `most` round values within the scale."""
        span = self.high - self.low
        if not span > 0:
            return [self.low]
        power = 10.0 ** math.floor(math.log10(span / most))
        step = next(f * power for f in (1, 2, 5, 10, 20) if span / (f * power) <= most - 1)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, int(self.high / step + 1e-9) + 1)]


def tick_text(seconds: float) -> str:
    """``"20 ms"``: seconds without zeros behind the point."""
    number, _, unit = seconds_text(seconds).partition(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}".rstrip()


def byte_tick_text(gib: float) -> str:
    """``"20 GiB"``: bytes without a zero behind the point."""
    return bytes_text(gib * 2**30).replace(".0 ", " ")


def area(points: Sequence[tuple[float, float, float]]) -> str:
    """The path of an area between stairs: (x, lower y, upper y), each of which holds until the next x."""
    upper, lower = _stairs([(x, y) for x, _, y in points]), _stairs([(x, y) for x, y, _ in points])
    return "M" + "L".join(f"{units(x)} {units(y)}" for x, y in [*upper, *reversed(lower)]) + "Z"


def stairs(points: Iterable[tuple[float, float]]) -> str:
    """The path of stairs: (x, y), each of which holds until the next x."""
    return "M" + "L".join(f"{units(x)} {units(y)}" for x, y in _stairs(list(points)))


def _stairs(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    found = list(points[:1])
    for (_, before), (x, y) in pairwise(points):
        found += [(x, before), (x, y)] if y != before else [(x, y)]
    return found
