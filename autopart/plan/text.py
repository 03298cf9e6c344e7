"""A plan as text: its configuration, why it was chosen, and its stages with every block once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from autopart.plan.stages import PlanLine, PlanSegment
from autopart.plan.units import bytes_text, printed_name, seconds_text

if TYPE_CHECKING:
    from autopart.plan.data import Plan


def describe(plan: Plan) -> str:
    """The plan as text: a head, then every stage with its blocks once each; operators that stand above already are
    not told again."""
    shown: dict[tuple[PlanLine, ...], str] = {}
    lines = [
        plan.head,
        f"step {seconds_text(plan.step_seconds)}, {plan.global_batch / plan.step_seconds:,.1f} samples/s   "
        f"# {plan.status}, gap {plan.gap:.2%}, planned in {plan.planning_seconds:.1f} s",
    ]
    for index, stage in enumerate(plan.stages):
        lines.append(
            f"stage {index}   {bytes_text(stage.memory_bytes)} ({', '.join(_parts(stage.memory))})   "
            f"forward {seconds_text(stage.forward_seconds)}  backward {seconds_text(stage.backward_seconds)}  "
            f"gradient sync {seconds_text(stage.sync_seconds)}"
        )
        for run in stage.runs:
            lines += _described(run, index, shown)
        lines += [f"  send to stage {to}   {bytes_text(size)} a micro-batch" for to, size, _ in stage.sends]
    if plan.replicated:
        lines.append(f"without a rule, run whole on every rank: {', '.join(plan.replicated)}")
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines)


def _parts(memory: Mapping[str, float]) -> Iterator[str]:
    """The kinds of bytes of a stage; what is transient may be less than nothing, where the others are not all alive at
    the peak."""
    for kind, number in memory.items():
        if number > 0:
            yield f"{kind} {bytes_text(number)}"
        elif number < 0:
            yield f"less {bytes_text(-number)} not alive at the peak"


def _described(run: PlanSegment, stage: int, shown: dict[tuple[PlanLine, ...], str]) -> Iterator[str]:
    """A run's name and seconds, then its operators, or of what run it has the same."""
    name = run.labels[0] if len(run.labels) == 1 else f"{run.labels[0]} .. {run.labels[-1]}"
    times = f" x {len(run.labels)}" if len(run.labels) > 1 else ""
    known = shown.get(run.lines, "")
    if name:
        as_known = f"   as {known}" if known else ""
        yield f"  {name}{times}   {seconds_text(run.seconds)}{' each' if times else ''}{as_known}"
    elif known:
        yield f"    as {known}"
    if known or not run.lines:
        return
    shown[run.lines] = run.labels[0] or f"in stage {stage}"
    for line in run.lines:
        if line.note or line.seconds + line.comm_seconds > 0.02 * run.seconds:
            time = seconds_text(line.seconds + line.comm_seconds)
            what = f"{line.name} {line.operator}".strip()
            yield f"    {what:<44} {line.note:<60} {time:>10}   {line.source}".rstrip()


def missing(plan: Plan) -> list[tuple[str, int, float]]:
    """Operators without a rule with the number of their calls and the seconds of a micro-batch they take, forward and
    backward, the costliest first."""
    calls: dict[str, list[float]] = {name: [] for name in plan.replicated}
    for run in (run for stage in plan.stages for run in stage.runs):
        for line in run.lines:
            for name in calls:
                if line.operator == printed_name(name):
                    calls[name] += [line.seconds] * len(run.labels)
    return sorted(((name, len(s), sum(s)) for name, s in calls.items()), key=lambda row: -row[2])
