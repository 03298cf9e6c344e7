"""A plan, a trace of its run, and what planning again found -> the page of the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopart.cost.training_state import amortization
from autopart.hardware.mesh import usable_bytes
from autopart.plan.breakdown import fullest_stage, model_flops_utilisation, slowest_stage
from autopart.plan.fields import PlanFields
from autopart.plan.reasons import reasons
from autopart.plan.report.accuracy import Comparison, comparisons, published
from autopart.plan.report.bench_figure import bench_figure
from autopart.plan.report.clock import LEGEND, class_of, clock_figure, predicted, seconds_by_cause
from autopart.plan.report.drawing import WIDTH
from autopart.plan.report.extras import Bench, Extras
from autopart.plan.report.graph import ARCS, layers_text, recompute_text, stage_blocks, stages_figure
from autopart.plan.report.measured import MeasuredStep, measured_step
from autopart.plan.report.memory import KINDS, LIVES, memory_tree, over_time_figure, peak_figure, shown_stages
from autopart.plan.report.mesh_figure import SHOWN, mesh_figure, ranks_of
from autopart.plan.report.numbers import numbers
from autopart.plan.report.search import alternatives, alternatives_figure, history_figure
from autopart.plan.search_summary import ENDS
from autopart.plan.text import head, kernels_text
from autopart.plan.timeline import Timeline, timeline
from autopart.plan.units import bytes_text, counted, seconds_text

if TYPE_CHECKING:
    import jinja2

Trace = str | Path | Mapping[str, Any]
"""A trace of a real run: the file that `autopart.Trace` saved, or what the file has."""


def write_report(
    plan: PlanFields,
    path: str | Path,
    *,
    trace: Trace | None = None,
    extras: Extras | None = None,
    bench: Bench | None = None,
) -> dict[str, Any]:
    """Write the report of a plan as one HTML file, in UTF-8; the numbers that it shows.

    trace   of a real run of the plan, which is shown beside the prediction
    extras  what tracing the model and planning again found (`autopart.planner.explain.report_extras`)
    bench   what other systems took for a step (`autopart bench`)

    Raises PartitionError for a trace of another plan, and for a plan whose schedule is not known; OSError where the
    file cannot be written.
    """
    text, told = report_html(plan, trace=trace, extras=extras, bench=bench)
    Path(path).write_text(text, encoding="utf-8")
    return told


def report_html(
    plan: PlanFields, *, trace: Trace | None = None, extras: Extras | None = None, bench: Bench | None = None
) -> tuple[str, dict[str, Any]]:
    """The report as HTML, and the numbers that it shows. Arguments and errors are those of `write_report`."""
    made = timeline(plan)
    measured = None if trace is None else measured_step(trace, plan)
    dots = alternatives(plan, extras)
    clock, boxes = clock_figure(made, measured)
    blocks = stage_blocks(plan)
    compared = list(comparisons(plan, made, measured)) if measured else []
    told = numbers(plan, made, measured, extras, dots, compared, bench)
    text = (
        _environment()
        .get_template("page.html")
        .render(
            plan=plan,
            version=version("autopart"),
            head=head(plan),
            reasons=list(reasons(plan)),
            notes=[*plan.notes, *kernels_text(plan)],
            facts=_facts(plan, made, measured),
            glance=_glance(plan, extras, measured),
            slowest=slowest_stage(plan),
            fullest=fullest_stage(plan),
            mesh_figure=mesh_figure(plan),
            hosts_left_out=max(0, plan.mesh.hosts - SHOWN),
            stages_figure=stages_figure(plan),
            blocks=blocks,
            first_open=max(blocks[0], key=lambda view: view.seconds * view.times, default=None),
            clock_figure=clock,
            clock_boxes=boxes,
            clock_rows=_clock_rows(made, measured),
            causes=LEGEND,
            timeline=made,
            measured=measured,
            peak_figure=peak_figure(plan, measured),
            over_time_figure=over_time_figure(plan, made, measured),
            tree=memory_tree(plan, extras),
            lives=LIVES,
            shown_stages=shown_stages(plan),
            kinds=[kind for kind in KINDS if any(stage.memory.get(kind) for stage in plan.stages)],
            usable=usable_bytes(plan.mesh),
            history_figure=history_figure(plan),
            planned_again=_planned_again(plan),
            ends=ENDS,
            dots=dots,
            alternatives_figure=alternatives_figure(plan, dots),
            extras=extras,
            compared=_by_owner(compared),
            published=published(plan),
            bench=bench,
            bench_figure=bench_figure(bench) if bench else None,
            numbers=told,
        )
    )
    return text, told


@cache
def _environment() -> jinja2.Environment:
    """The templates of this folder. Every value is escaped; an unknown one is an error."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.PackageLoader("autopart.plan.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        seconds=seconds_text,
        bytes=bytes_text,
        counted=counted,
        kind=class_of,
        layers=layers_text,
        recompute=recompute_text,
        signed=signed_text,
    )
    made.globals.update(ranks_of=ranks_of, width_of=lambda figure, kind: WIDTH if kind == "figure" else ARCS)
    return made


def signed_text(share: float, digits: int = 1) -> str:
    """``"+1.5%"``: a relative difference; "0.0%" where it rounds to nothing."""
    text = f"{100 * share:+.{digits}f}%"
    return text if any(c in "123456789" for c in text) else text[1:]


def _by_owner(compared: list[Comparison]) -> list[tuple[str, list[Comparison]]]:
    """The comparisons in groups of the same owner, in order."""
    found: dict[str, list[Comparison]] = {}
    for row in compared:
        found.setdefault(row.about, []).append(row)
    return list(found.items())


@dataclass(frozen=True)
class Fact:
    """A number at the head of the page."""

    value: str
    what: str


def _facts(plan: PlanFields, made: Timeline, measured: MeasuredStep | None) -> list[Fact]:
    tokens = plan.signature.tokens
    rate = plan.global_batch / plan.step_seconds
    found = [Fact(seconds_text(plan.step_seconds), "a step, predicted")]
    if measured:
        found.append(Fact(seconds_text(measured.seconds), "a step, measured"))
    found.append(Fact(f"{rate * (tokens or 1):,.0f}", "tokens/s" if tokens else "samples/s"))
    if plan.precision in plan.mesh.device.flops:
        found.append(Fact(f"{model_flops_utilisation(plan):.1%}", "model FLOPs utilisation"))
    found.append(Fact(f"{plan.gap:.2%}", "gap to the lower bound"))
    found.append(Fact(f"{made.bubble:.1%}", "pipeline bubble"))
    at = fullest_stage(plan)
    share = plan.memory_bytes[at] / plan.usable_bytes[at]
    used = f"{share:.0%}" if share >= 0.005 else "under 1%"
    found.append(Fact(bytes_text(plan.memory_bytes[at]), f"peak memory, {used} of usable"))
    return found


def _glance(plan: PlanFields, extras: Extras | None, measured: MeasuredStep | None) -> list[str]:
    """Which stage is slowest, by how much and by what; what fills its memory; what a run showed of both."""
    at = slowest_stage(plan)
    stage, others = plan.stages[at], [s for i, s in enumerate(plan.stages) if i != at]

    name = f"Stage {at} is the slowest" if others else "The only stage"
    sync = f", and {seconds_text(stage.sync_seconds)} a step for gradient sync and optimizer"
    text = (
        f"{name}: forward {seconds_text(stage.forward_seconds)} and backward {seconds_text(stage.backward_seconds)} "
        f"a micro-batch{sync if stage.sync_seconds else ''}."
    )
    if others:
        shared = amortization(plan.zero, plan.micro_batches, plan.pp)
        turns = [each.turn_seconds(shared) for each in plan.stages]
        mean = sum(turns) / plan.pp
        more = f", {turns[at] / mean - 1:.1%} more than the mean stage" if mean else ""
        text += f" With its share of these and its messages a micro-batch takes it {seconds_text(turns[at])}{more}."
    kinds = sorted(((nbytes, kind) for kind, nbytes in stage.memory.items() if nbytes), reverse=True)
    first = " and ".join(f"{kind} ({nbytes / sum(stage.memory.values()):.0%})" for nbytes, kind in kinds[:2])
    held = f"Its memory, {bytes_text(stage.memory_bytes)} at the peak, is filled by {first or 'nothing'}."
    if extras:
        held += f" {_largest(extras, at)}"
    fullest = fullest_stage(plan)
    found = [text, held]
    if fullest != at:
        full = plan.stages[fullest]
        nbytes, kind = max((nbytes, kind) for kind, nbytes in full.memory.items())
        found.append(
            f"Stage {fullest} has the fullest memory: {bytes_text(full.memory_bytes)}, "
            f"most of it {kind} ({nbytes / sum(full.memory.values()):.0%})."
        )
    return [*found, *_glance_at_run(plan, measured)]


def _glance_at_run(plan: PlanFields, measured: MeasuredStep | None) -> list[str]:
    """What a traced step says of the slowest stage and of the peak."""
    if not measured:
        return []
    found = []
    if measured.seconds:
        error = plan.step_seconds / measured.seconds - 1
        way = "less" if error < 0 else "more"
        found.append(
            f"The traced step took {seconds_text(measured.seconds)}; the prediction is {abs(error):.1%} {way}."
        )
    if plan.pp > 1:
        work = [seconds_by_cause(slices, measured.seconds) for slices in measured.stages]
        busy = [row["forward"] + row["backward"] for row in work]
        at = max(range(plan.pp), key=busy.__getitem__)
        found.append(f"In the traced step stage {at} computed longest: {seconds_text(busy[at])} of it.")
    if peaks := [(peak, stage) for stage, peak in enumerate(measured.peak_bytes) if peak is not None]:
        peak, stage = max(peaks)
        of = f" of stage {stage}" if plan.pp > 1 else ""
        told = bytes_text(plan.memory_bytes[stage])
        found.append(f"The largest measured peak{of} was {bytes_text(peak)}; {told} were predicted there.")
    return found


def _largest(extras: Extras, stage: int) -> str:
    """The tensor, of all equal blocks of a stage together, that takes most bytes."""
    rows = [(n * block.times, kind, name, block) for block in extras.memory[stage] for name, kind, n in block.rows]
    if not rows:
        return ""
    nbytes, kind, name, block = max(rows, key=lambda row: row[0])
    where = counted(block.times, "block") if block.times > 1 else block.label or "what blocks share"
    return f"The largest part of one operator or tensor, {bytes_text(nbytes)}, is {kind} of {name} in {where}."


def _planned_again(plan: PlanFields) -> bool:
    """Whether the plan was made again from the graph of its own micro-batch, after the search of the record."""
    last = plan.search.history[-1].incumbent if plan.search and plan.search.history else None
    return last is not None and abs(last / plan.step_seconds - 1) > 1e-3


Causes = dict[str, float]


def _clock_rows(made: Timeline, measured: MeasuredStep | None) -> list[tuple[Causes, Causes | None]]:
    """Of every stage the seconds by cause, predicted and measured."""
    rows: list[tuple[Causes, Causes | None]] = []
    for index, stage in enumerate(made.stages):
        real = seconds_by_cause(measured.stages[index], measured.seconds) if measured else None
        rows.append((seconds_by_cause(predicted(stage), made.seconds), real))
    return rows
