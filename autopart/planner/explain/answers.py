"""The answers of an explanation as records, each printed as text."""

from dataclasses import dataclass, field

from autopart.plan.data import Plan
from autopart.plan.units import seconds_text


@dataclass(frozen=True)
class Alternative:
    """A strategy that the plan does not take.

    strategy  its name along every axis, such as "k/tp"
    seconds   of the step of the best plan found that takes the strategy at the same degrees; None: no plan does
    bound     lower bound on the step of every such plan, in seconds
    why       why there is no such plan; "" where there is one
    """

    strategy: str
    seconds: float | None
    bound: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Reason:
    """An operator or tensor with the strategy that the plan takes, and with the others.

    key      name of the operator or tensor
    times    number of equal operators or tensors in the model
    chosen   the strategy that the plan takes
    seconds  of the plan's step
    others   the strategies that the plan does not take, by rising seconds of the step
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
    """The step of the best plan that satisfies a constraint.

    text     the constraint
    seconds  of the step of the best plan found; None: no plan satisfies the constraint
    bound    lower bound on the step of every plan that satisfies the constraint, in seconds
    against  seconds of the step of the plan that the question is about
    differs  a line for each decision in which the two plans differ
    why      why no plan satisfies the constraint; "" where one does
    took     CPU seconds of the answer
    asked    settings and constraints that the plan in question was made with; the found plan satisfies them too
    plan     the plan that was found; None where there is none
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
            free = "\n  try: plan again without these settings, then ask --why-not" if self.asked else ""
            return f"{text}: not possible\n  {self.why}{free}"
        told = bounded_step_text(self.seconds, self.bound, self.against)
        lines = [f"  {line}" for line in self.differs] or ["  the plan does so already, or what is as fast"]
        return "\n".join([f"{text}: {told}", *lines])


@dataclass(frozen=True)
class Price:
    """The step after a change of the mesh.

    what     the change, in words
    seconds  of the step after the change; None: no plan fits
    against  seconds of the step before the change
    """

    what: str
    seconds: float | None
    against: float

    def __str__(self) -> str:
        return f"{self.what:<52} {'nothing fits' if self.seconds is None else step_text(self.seconds, self.against)}"


def step_text(seconds: float, before: float) -> str:
    """Seconds with their difference to those `before`: ``"906.00 ms, +44.60 ms, +5.2%"``."""
    more = seconds - before
    if abs(more) < 1e-6 * before:
        return f"{seconds_text(seconds)}, the same"
    sign = "+" if more > 0 else "-"
    return f"{seconds_text(seconds)}, {sign}{seconds_text(abs(more))}, {more / before:+.1%}"


def bounded_step_text(seconds: float, bound: float, before: float) -> str:
    """`step_text`, with the lower bound where it is more than 0.1 % below `seconds`."""
    far = bound < seconds * (1 - 1e-3)
    return step_text(seconds, before) + (f", proven at least {seconds_text(bound)}" if far else "")
