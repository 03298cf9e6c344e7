"""How far predictions are off: of the run that was traced, and of published runs where none was."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

from autopart.plan.fields import PlanFields
from autopart.plan.report.clock import predicted, seconds_by_cause
from autopart.plan.report.measured import MeasuredStep
from autopart.plan.report.memory import shown_stages
from autopart.plan.timeline import Timeline
from autopart.plan.units import bytes_text, seconds_text

COLLECTIVES = ("forward", "backward")
"""Instructions within which collectives over tp, and those of ZeRO 3 over dp, run."""


@dataclass(frozen=True)
class Comparison:
    """A prediction beside its measurement: seconds of a step, or bytes.

    about     what it belongs to: "step", "stage 2", "dp"
    what      the name of the quantity
    measured  None: not measured
    """

    about: str
    what: str
    predicted: float
    measured: float | None
    bytes: bool = False

    @property
    def error(self) -> float | None:
        """predicted / measured - 1; None where nothing, or 0, was measured."""
        return self.predicted / self.measured - 1 if self.measured else None

    def text(self, value: float | None) -> str:
        """A value of it as text."""
        return "" if value is None else (bytes_text if self.bytes else seconds_text)(value)


@dataclass(frozen=True)
class Published:
    """How far the predicted steps of published runs are off; nothing is fitted on them.

    source  whose runs
    device  its name without its memory: "h100"
    rows    number of runs
    mean    mean of |predicted / measured - 1|
    signed  mean of predicted / measured - 1
    worst   that of the largest absolute value
    """

    source: str
    device: str
    rows: int
    mean: float
    signed: float
    worst: float


def comparisons(plan: PlanFields, made: Timeline, measured: MeasuredStep) -> Iterator[Comparison]:
    """The step, then every stage, then every kind of message, predicted and measured."""
    yield Comparison("step", "all of it", plan.step_seconds, measured.seconds)
    for index in shown_stages(plan):
        yield from _of_stage(plan, made, measured, index)
    yield from _of_messages(plan, measured)


def _of_stage(plan: PlanFields, made: Timeline, measured: MeasuredStep, index: int) -> Iterator[Comparison]:
    stage, about, m = plan.stages[index], f"stage {index}", plan.micro_batches
    told = seconds_by_cause(predicted(made.stages[index]), made.seconds)
    real = seconds_by_cause(measured.stages[index], measured.seconds)
    yield Comparison(about, "forward", told["forward"], real["forward"])
    yield Comparison(about, "backward", told["backward"], real["backward"])
    if messages := measured.messages[index]:
        comm = m * sum(len(s.labels) * line.comm_seconds for s in stage.segments for line in s.lines)
        inside = [row.seconds for row in messages if row.op in COLLECTIVES and row.axis != "pp"]
        if comm or inside:
            yield Comparison(about, "collectives within these", comm, sum(inside))
    after = real["gradient sync"] + real["optimizer"]
    yield Comparison(about, "gradient sync and optimizer", told["gradient sync"] + told["optimizer"], after)
    if plan.pp > 1:
        of_told, of_real = (found["waiting"] + found["sending"] + found["idle"] for found in (told, real))
        yield Comparison(about, "messages, waiting, idle", of_told, of_real)
    on_host = stage.host_bytes if plan.mesh.device.type == "cpu" else 0  # a CPU's own memory
    if (peak := measured.peak_bytes[index]) is not None:
        yield Comparison(about, "peak memory", stage.memory_bytes + on_host, peak, bytes=True)


def _of_messages(plan: PlanFields, measured: MeasuredStep) -> Iterator[Comparison]:
    """Bytes of every kind of message, over one rank of each stage; tied weights are in no measurement."""
    if not all(measured.messages):
        return
    told, real = defaultdict[tuple[str, str], float](float), defaultdict[tuple[str, str], float](float)
    for stage in plan.stages:
        for traffic in stage.traffic:
            if traffic.axis != "pp" or traffic.collective == "send":
                told[traffic.axis, traffic.collective] += traffic.bytes
    for row in (row for rows in measured.messages for row in rows):
        real[row.axis, row.collective] += row.bytes
    for axis, name in sorted({*told, *real}):
        what = "messages between stages" if axis == "pp" else name.replace("_", "-")
        yield Comparison(f"over {axis}", what, told[axis, name], real[axis, name], bytes=True)


def published(plan: PlanFields) -> tuple[Published, ...]:
    """How far predictions of runs on the plan's kind of device are off; where there are none, of those on all GPUs."""
    text = files("autopart.plan.report").joinpath("published.json").read_text(encoding="utf-8")
    rows = [Published(**row) for row in json.loads(text)["sources"]]
    kind = "cpu" if plan.mesh.device.type == "cpu" else plan.mesh.device.name.partition("-")[0]
    return tuple([row for row in rows if row.device == kind] or [row for row in rows if row.device != "cpu"])


def comparison_json(row: Comparison) -> Mapping[str, Any]:
    """The comparison with its error."""
    return {**asdict(row), "error": row.error}
