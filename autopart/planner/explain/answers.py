"""The answers of an explanation as records, each printed as text; and what two plans decide differently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from autopart.plan.data import Plan
from autopart.plan.units import bytes_text, seconds_text
from autopart.sharding.rules import Strategy


@dataclass(frozen=True)
class Alternative:
    """A strategy that was not taken.

    seconds  of the step of the best plan found with it, at the same degrees; None where there is none
    bound    lower bound on the step of every such plan
    why      there is no plan with it
    """

    strategy: str
    seconds: float | None
    bound: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Reason:
    """An operator or tensor: its chosen strategy, the step's seconds, and its other strategies, the fastest first.

    times  how many equal ones the model has
    """

    key: str
    times: int
    chosen: str
    seconds: float
    others: tuple[Alternative, ...]

    def __str__(self) -> str:
        times = f" x {self.times}" if self.times > 1 else ""
        lines = [f"{self.key}{times}: {self.chosen}"]
        for other in self.others:
            told = other.why if other.seconds is None else bounded_step_text(other.seconds, other.bound, self.seconds)
            lines.append(f"    {other.strategy:<28} {told}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Answer:
    """The step with a constraint.

    seconds  of the best plan found with it; None where there is none
    bound    lower bound on the step of every plan with it, in seconds
    against  seconds of the step of the plan in question
    differs  what the two plans decide differently, a line each
    why      there is no such plan
    took     CPU seconds of the answer
    asked    settings and constraints that the plan in question was made with, which hold as well
    """

    text: str
    seconds: float | None
    bound: float
    against: float
    differs: tuple[str, ...]
    why: str
    took: float
    asked: tuple[str, ...]
    plan: Plan | None = field(repr=False)

    def __str__(self) -> str:
        text = f"{self.text} (with {', '.join(self.asked)} as asked)" if self.asked else self.text
        if self.seconds is None:
            free = "\n  try: a plan that is not asked for so, and then why not" if self.asked else ""
            return f"{text}: not possible\n  {self.why}{free}"
        told = bounded_step_text(self.seconds, self.bound, self.against)
        lines = [f"  {line}" for line in self.differs] or ["  the plan does so already, or what is as fast"]
        return "\n".join([f"{text}: {told}", *lines])


@dataclass(frozen=True)
class Price:
    """The step's seconds after a change of the mesh; None where nothing fits. `against`: before the change."""

    what: str
    seconds: float | None
    against: float

    def __str__(self) -> str:
        return f"{self.what:<52} {'nothing fits' if self.seconds is None else step_text(self.seconds, self.against)}"


def step_text(seconds: float, before: float) -> str:
    """``"906 ms, +44.6 ms, +5.2 %"``."""
    more = seconds - before
    if abs(more) < 1e-6 * before:
        return f"{seconds_text(seconds)}, the same"
    sign = "+" if more > 0 else "-"
    return f"{seconds_text(seconds)}, {sign}{seconds_text(abs(more))}, {more / before:+.1%}"


def bounded_step_text(seconds: float, bound: float, before: float) -> str:
    """`step_text`, with the lower bound where it is more than 0.1 % below."""
    far = bound < seconds * (1 - 1e-3)
    return step_text(seconds, before) + (f", proven at least {seconds_text(bound)}" if far else "")


def differences(before: Plan, after: Plan, labels: Sequence[str]) -> Iterator[str]:
    """What two plans of a model decide differently, a line each."""
    for name in ("pp", "dp", "tp", "micro_batch", "zero", "schedule", "recompute"):
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            yield f"{name} {new} instead of {old}"
    if before.starts != after.starts:
        starts = ", ".join(labels[s] or str(s) for s in after.starts[1:])
        yield f"stages start at {starts}" if starts else "one stage"
    modes = [sum((s.recompute for s in plan.stages), ()) for plan in (before, after)]
    if before.recompute == after.recompute and modes[0] != modes[1]:
        yield f"{sum(a != b for a, b in zip(*modes, strict=True))} blocks recompute otherwise"
    moved = [f"{key}: {new}/{axis} instead of {old}/{axis}" for axis, key, old, new in _moved(before, after)]
    if moved:
        more = f" and {len(moved) - 3} more" if len(moved) > 3 else ""
        yield f"split otherwise: {'; '.join(moved[:3])}{more}"
    most = [max(plan.memory_bytes) for plan in (before, after)]
    if round(most[0]) != round(most[1]):
        yield f"{bytes_text(most[1])} on the fullest device instead of {bytes_text(most[0])}"


def _moved(before: Plan, after: Plan) -> Iterator[tuple[str, str, str, str]]:
    """(axis, key, strategy before, strategy after) of what the first stages split differently, weights first."""
    old, new = (plan.splits[plan.stages[0].splits] for plan in (before, after))
    for axis in old.keys() & new.keys():
        known: Mapping[str, Strategy] = new[axis]
        for key, strategy in sorted(old[axis].items(), key=lambda item: not item[0].endswith("weight")):
            if key in known and known[key].outputs != strategy.outputs and {known[key].name, strategy.name} != {*"RC"}:
                yield axis, key, strategy.name, known[key].name
