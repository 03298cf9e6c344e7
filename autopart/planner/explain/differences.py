"""What two plans of one model decide differently, in words."""

from collections.abc import Iterator, Mapping, Sequence

from autopart.plan.data import Plan
from autopart.plan.units import bytes_text
from autopart.sharding.notation import Strategy


def differences(before: Plan, after: Plan, labels: Sequence[str]) -> Iterator[str]:
    """A text for each decision in which two plans of a model differ. `labels` are those of the model's positions."""
    for name in ("pp", "dp", "tp", "micro_batch", "zero", "shard_size", "schedule", "recompute"):
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
    """(axis, key, strategy before, strategy after) of what the first stages of two plans split differently.

    Weights come first. Axes that only one of the plans has are left out.
    """
    old, new = (plan.splits[plan.stages[0].splits] for plan in (before, after))
    for axis in old.keys() & new.keys():
        known: Mapping[str, Strategy] = new[axis]
        for key, strategy in sorted(old[axis].items(), key=lambda item: not item[0].endswith("weight")):
            if key in known and known[key].outputs != strategy.outputs and {known[key].name, strategy.name} != {*"RC"}:
                yield axis, key, strategy.name, known[key].name
