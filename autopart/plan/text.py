"""A plan as text: its configuration, why it was chosen, and its stages with every block once."""

from collections import Counter
from collections.abc import Iterator, Mapping

from autopart.ir.labels import is_block
from autopart.plan.fields import PlanFields
from autopart.plan.host_traffic import bytes_between_hosts
from autopart.plan.layout import paragraph, row, text_width
from autopart.plan.reasons import reasons
from autopart.plan.stages import PlanLine, PlanSegment
from autopart.plan.units import bytes_text, counted, printed_name, seconds_text, zero_text

TIME, SOURCE = 11, 24
"""Columns of an operator's seconds and of its place in the user's code."""

WITH_SOURCE = 100
"""The fewest columns in which the place in the user's code is printed."""

SHOWN = 0.02
"""An operator that is not split is printed from this share of its block's seconds on."""


def describe(plan: PlanFields, width: int | None = None) -> str:
    """The plan as text of at most `width` columns (default: the terminal's, at most 120). Operators of a block that is
    equal to one above are not repeated."""
    width = width or text_width()
    printed: dict[tuple[PlanLine, ...], str] = {}
    lines = [
        *paragraph(head(plan), width),
        *paragraph(
            f"step {seconds_text(plan.step_seconds)}, {plan.global_batch / plan.step_seconds:,.1f} samples/s, "
            f"{plan.status}, gap {plan.gap:.2%}, planned in {plan.planning_seconds:.1f} s",
            width,
        ),
    ]
    for sentence in reasons(plan):
        lines += paragraph(sentence, width)
    for index, stage in enumerate(plan.stages):
        forward, backward = seconds_text(stage.forward_seconds), seconds_text(stage.backward_seconds)
        sync = f"gradient sync and optimizer {seconds_text(stage.sync_seconds)} a step"
        lines += paragraph(
            f"stage {index}{plan.device_text(index)}   forward {forward}, backward {backward} a micro-batch; {sync}",
            width,
        )
        on_host = f"; on the host {bytes_text(stage.host_bytes)}" if stage.host_bytes else ""
        lines += paragraph(f"{bytes_text(stage.memory_bytes)}: {memory_text(stage.memory)}{on_host}", width, 2)
        for segment in stage.segments:
            lines += _segment(segment, index, printed, width)
        lines += [f"  send to stage {to}   {bytes_text(size)} a micro-batch" for to, size, _ in stage.sends]
    if crossing := bytes_between_hosts(plan) if plan.mesh.hosts > 1 else 0.0:
        lines.append(f"between hosts {bytes_text(crossing)} a step")
    if plan.replicated:
        lines += paragraph(f"without a rule, run whole on every rank: {', '.join(plan.replicated)}", width)
    for sentence in kernels_text(plan):
        lines += paragraph(sentence, width)
    for note in plan.notes:
        lines += paragraph(f"note: {note}", width)
    return "\n".join(lines)


def kernels_text(plan: PlanFields) -> Iterator[str]:
    """``"fused kernels: rms_norm x 65, swiglu x 32; they move 1.2 GiB a micro-batch forward, unfused 4.5 GiB"``, and
    ``"optimizer's step: one kernel, adamw; it moves 2.0 GiB a step, unfused 6.1 GiB"``."""
    if forward := [use for use in plan.kernels if not use.step]:
        calls = ", ".join(f"{use.name} x {use.calls}" for use in forward)
        fused, unfused = (bytes_text(sum(b)) for b in zip(*((u.bytes, u.unfused) for u in forward), strict=True))
        yield f"fused kernels: {calls}; they move {fused} a micro-batch forward, unfused {unfused}"
    for use in (use for use in plan.kernels if use.step):
        moved, unfused = bytes_text(use.bytes), bytes_text(use.unfused)
        yield f"optimizer's step: one kernel, {use.name}; it moves {moved} a step, unfused {unfused}"


def head(plan: PlanFields) -> str:
    """The configuration in one line."""
    return (
        f"plan {plan.model} on {plan.mesh}: {plan.degrees}, schedule {plan.schedule}, "
        f"{counted(plan.micro_batches, 'micro-batch')} of {counted(plan.micro_batch, 'sample')}, "
        f"{zero_text(plan.zero, plan.offload == 'optimizer', plan.shard_size)}"
        f"{' with prefetch' if plan.prefetch_bytes else ''}, "
        f"recompute {recompute_text(plan)}, {plan.precision}{f', master {plan.master}' if plan.master else ''}"
    )


def recompute_text(plan: PlanFields) -> str:
    """``"none"``, or how many layers recompute in which granularity: ``"full in 12 of 20 layers"``."""
    if plan.recompute != "mixed":
        return plan.recompute
    modes = Counter(mode for stage in plan.stages for mode in stage.recompute)
    layers = sum(is_block(label) for stage in plan.stages for segment in stage.segments for label in segment.labels)
    if not layers:
        return plan.recompute
    counts = [f"{mode} in {modes[mode]}" for mode in ("selective", "mincut", "full") if modes[mode]]
    return f"{' and '.join(counts)} of {layers} layers"


def memory_text(memory: Mapping[str, float]) -> str:
    """The kinds of bytes of a stage at its memory peak, which add up to the peak."""
    return ", ".join(f"{kind} {bytes_text(number)}" for kind, number in memory.items() if number)


def _segment(segment: PlanSegment, stage: int, printed: dict[tuple[PlanLine, ...], str], width: int) -> Iterator[str]:
    """The name and the seconds of equal blocks, then their operators or the name of equal blocks above."""
    labels, equal = segment.labels, printed.get(segment.lines, "")
    name = labels[0] if len(labels) == 1 else f"{labels[0]} .. {labels[-1]} x {len(labels)}"
    if name:
        as_above = f"   as {equal}" if equal else ""
        each = " each" if len(labels) > 1 else ""
        yield from paragraph(f"{name}   {seconds_text(segment.seconds)}{each}{as_above}", width, 2)
    elif equal:
        yield f"    as {equal}"
    if equal or not segment.lines:
        return
    printed[segment.lines] = labels[0] or f"in stage {stage}"
    for line in segment.lines:
        if line.note or line.seconds + line.comm_seconds > SHOWN * segment.seconds:
            yield from _operator(line, width)


def _operator(line: PlanLine, width: int) -> Iterator[str]:
    cells = [f"{line.name} {line.operator}".strip(), line.note, seconds_text(line.seconds + line.comm_seconds)]
    room = width - 4 - TIME - 2
    widths = [0, 0, -TIME]
    if width >= WITH_SOURCE:
        room -= SOURCE + 1
        cells, widths = [*cells, f" {line.source}"], [*widths, SOURCE]
    widths[:2] = [room - room * 4 // 9, room * 4 // 9]
    return row(cells, widths, 4)


def missing(plan: PlanFields) -> list[tuple[str, int, float]]:
    """(operator, calls, seconds) of the operators without a rule, the costliest first. The seconds are those of a
    micro-batch, forward and backward."""
    calls: dict[str, list[float]] = {name: [] for name in plan.replicated}
    for segment in (segment for stage in plan.stages for segment in stage.segments):
        for line in segment.lines:
            for name in calls:
                if line.operator == printed_name(name):
                    calls[name] += [line.seconds] * len(segment.labels)
    return sorted(((name, len(s), sum(s)) for name, s in calls.items()), key=lambda row: -row[2])
