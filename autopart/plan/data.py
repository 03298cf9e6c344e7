"""A plan: what was decided, what it costs, and the text and JSON it is kept as."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from autopart.cost.training_state import MASTERS, OPTIMIZER_STATES
from autopart.errors import PartitionError, not_known
from autopart.hardware.mesh import Mesh
from autopart.ir.graph import info, placeholders
from autopart.ir.layered_graph import LayeredGraph
from autopart.plan.schedules import SCHEDULES
from autopart.plan.typecheck import mistyped
from autopart.sharding.notation import Placement
from autopart.sharding.rules import Strategy

SCHEMA = 3
"""Version of the JSON; a plan of another version is refused."""


@dataclass(frozen=True)
class PlanLine:
    """One operator of a stage: `name` is its module's in the block; `seconds` of compute and `comm_seconds` are
    forward and backward, per micro-batch."""

    name: str
    operator: str
    note: str
    seconds: float
    comm_seconds: float
    source: str


@dataclass(frozen=True)
class PlanSegment:
    """Equal consecutive blocks of a stage, printed once."""

    labels: tuple[str, ...]
    seconds: float
    lines: tuple[PlanLine, ...]


@dataclass(frozen=True)
class PlanStage:
    """One pipeline stage on one rank.

    first_run         index of its first run in the model's row of runs
    splits            index of how it is split in the plan's `splits`
    recompute         what each of its runs does: keep its values for backward ("none"), keep the outputs of matrix
                      products alone ("selective") or its inputs alone ("full") and compute the others again
    forward_seconds   per micro-batch, communication included; backward_seconds likewise
    sync_seconds      a step's, to add up gradients and update parameters: what the backward does not hide
                      (`autopart.planner.interval_costs.exposed`), with the slowdown of computing meanwhile
    send_seconds      for what it sends and receives, per micro-batch
    memory            what takes how many bytes: parameters, gradients, optimizer, activations, messages on their way
                      from other stages, and transient, what is more than these at the moment when most is alive: less
                      than nothing where gradients come as activations go
    sends             (stage, bytes, seconds) for every stage it sends to: of a micro-batch, the seconds there and, of
                      gradients, back
    """

    first_run: int
    splits: int
    recompute: tuple[str, ...]
    forward_seconds: float
    backward_seconds: float
    sync_seconds: float
    send_seconds: float
    memory: Mapping[str, float]
    runs: tuple[PlanSegment, ...]
    sends: tuple[tuple[int, int, float], ...] = ()

    def turn_seconds(self, turns: int) -> float:
        """f: seconds of a turn, if so many share what is done once a step (`autopart.cost.training_state.turns`)."""
        return self.forward_seconds + self.backward_seconds + self.sync_seconds / turns + self.send_seconds

    @property
    def memory_bytes(self) -> int:
        """All of `memory`."""
        return round(sum(self.memory.values()))


@dataclass(frozen=True)
class Signature:
    """What a plan belongs to, in a form that can name a difference; the number of samples in inputs is -1."""

    hash: str
    parameters: Mapping[str, tuple[int, ...]]
    inputs: Mapping[str, tuple[int, ...]]
    operators: int
    dtype: str

    @staticmethod
    def of(layered: LayeredGraph) -> Signature:
        """The signature of a traced model."""
        graph = layered.traced.graph
        dtypes = [info(n).dtype for n in placeholders(graph, "parameter")]
        return Signature(
            layered.hash,
            layered.parameters(),
            {info(n).name: (-1, *info(n).shape[1:]) for n in placeholders(graph, "input")},
            layered.operators,
            str(dtypes[0]).removeprefix("torch.") if dtypes else "",
        )

    @property
    def tokens(self) -> int | None:
        """Tokens of a sample: the second dim of `input_ids`; None where there is no such input of two dims."""
        shape = self.inputs.get("input_ids", ())
        return shape[1] if len(shape) == 2 else None

    def difference(self, other: Signature) -> str:
        """The first difference from another signature, in words; "" if there is none."""
        if self.hash == other.hash:
            return ""
        for kind in ("parameters", "inputs"):
            mine, theirs = getattr(self, kind), getattr(other, kind)
            for name in [*mine, *theirs]:
                if mine.get(name) != theirs.get(name):
                    here = f"has shape {list(mine[name])}" if name in mine else "does not exist"
                    there = f"has shape {list(theirs[name])}" if name in theirs else "does not exist"
                    return f"{kind[:-1]} {name} {here} in the plan and {there} in the model"
        if self.dtype != other.dtype:
            return f"the plan is for {self.dtype}, the model is {other.dtype}"
        if self.operators != other.operators:
            return f"the plan has {self.operators} operators, the model {other.operators}"
        return "an operator or one of its arguments differs"


@dataclass(frozen=True)
class Plan:
    """A decided parallelisation of one model on one mesh.

    pp, dp, tp        degrees: pipeline, data, tensor
    micro_batch       samples of one micro-batch, over all data-parallel ranks; global_batch those of a step
    master            dtype of gradients, optimizer states and the optimizer's copy of the parameters; None where all is
                      in `precision` (see `autopart.cost.training_state.Training`)
    recompute         "none", "selective" or "full" where all blocks do so, else "mixed"; stages say it for their runs
    splits            the ways stages are split: axis -> node -> strategy, for one node of every class of equal blocks
    step_seconds      predicted: sum(f) + (m - 1) max(f) over the stages' seconds f for each of m micro-batches
    bound_seconds     no plan of the search space is faster
    gap               proven: 1 - bound_seconds / step_seconds
    forward_flops     of the matrix products of a step's forward pass over the whole batch, none twice; causal attention
                      counts whole
    """

    model: str
    mesh: Mesh
    pp: int
    dp: int
    tp: int
    micro_batch: int
    global_batch: int
    schedule: str
    zero: int
    recompute: str
    precision: str
    optimizer: str
    master: str | None
    splits: tuple[Mapping[str, Mapping[str, Strategy]], ...] = field(repr=False)
    stages: tuple[PlanStage, ...] = field(repr=False)
    step_seconds: float
    gap: float
    bound_seconds: float
    status: str
    planning_seconds: float
    forward_flops: float
    signature: Signature = field(repr=False)
    replicated: tuple[str, ...] = ()
    """Operators without a rule, which every rank runs whole."""
    notes: tuple[str, ...] = ()
    """What a user should know of this plan: products that no rank is spared, a loss that is not the batch's."""
    request: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """How it was asked for: the settings that are not the default, the texts of constraints, and from the shell what
    names the model ("model") and its batch ("batch", "sequence", "dropout")."""

    @property
    def micro_batches(self) -> int:
        """Micro-batches in a step."""
        return self.global_batch // self.micro_batch

    @property
    def memory_bytes(self) -> tuple[int, ...]:
        """Predicted bytes of a rank of each stage."""
        return tuple(s.memory_bytes for s in self.stages)

    @property
    def fits(self) -> bool:
        """Whether every stage's bytes are within its device's usable memory."""
        return max(self.memory_bytes) <= usable_bytes(self.mesh) * (1 + 1e-9)

    @property
    def head(self) -> str:
        """The configuration in one line."""
        return (
            f"plan {self.model} on {self.mesh}, {self.degrees}  schedule {self.schedule}  "
            f"micro-batches {self.micro_batches} of {self.micro_batch}  zero {self.zero}  recompute {self.recompute}  "
            f"{self.precision}{f', master {self.master}' if self.master else ''}"
        )

    @property
    def degrees(self) -> str:
        """``mesh(pp=2, dp=1, tp=2)``."""
        return f"mesh(pp={self.pp}, dp={self.dp}, tp={self.tp})"

    @property
    def starts(self) -> tuple[int, ...]:
        """The first run of every stage."""
        return tuple(s.first_run for s in self.stages)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(_written(self.to_json()) + "\n")

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        data = {k: getattr(self, k) for k in self.__dataclass_fields__ if k not in ("mesh", "splits", "stages")}
        return {
            "schema": SCHEMA,
            **data,
            "signature": asdict(self.signature),
            "mesh": self.mesh.to_json(),
            "splits": [
                {axis: {node: _strategy_to_json(s) for node, s in chosen.items()} for axis, chosen in splits.items()}
                for splits in self.splits
            ],
            "stages": [asdict(s) for s in self.stages],
        }

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan that `save` wrote. Raises PartitionError for anything else."""
        try:
            data = json.loads(Path(path).read_text())
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise PartitionError(f"cannot read the plan {path}", str(error)) from error
        return Plan.from_json(data)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_json`."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise PartitionError("this is no plan of a version that is known", f"schema {found}, expected {SCHEMA}")
        try:
            fields = {k: v for k, v in data.items() if k != "schema"}
            fields["mesh"] = Mesh.from_json(data["mesh"])
            fields["signature"] = Signature(
                **{
                    **data["signature"],
                    **{k: {n: tuple(s) for n, s in data["signature"][k].items()} for k in ("parameters", "inputs")},
                }
            )
            fields["splits"] = tuple(
                {axis: {node: _strategy_from_json(s) for node, s in chosen.items()} for axis, chosen in splits.items()}
                for splits in data["splits"]
            )
            fields["stages"] = tuple(_stage_from_json(s) for s in data["stages"])
            fields["replicated"] = tuple(data["replicated"])
            fields["notes"] = tuple(data.get("notes", ()))
            fields["request"] = dict(data.get("request", {}))
            plan = Plan(**fields)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise PartitionError("the plan file is damaged", f"{type(error).__name__}: {error}") from error
        if wrong := mistyped(plan, Plan) or next(_inconsistent(plan), ""):
            raise PartitionError("the plan file is damaged", wrong)
        return plan

    def check(self, layered: LayeredGraph) -> None:
        """Raise PartitionError, naming the difference, unless the plan was made for this traced model."""
        difference = self.signature.difference(Signature.of(layered))
        if difference:
            raise PartitionError("the plan is for another model", difference, "plan again with autopart.plan(...)")

    def __str__(self) -> str:
        return describe(self)


def _inconsistent(plan: Plan) -> Iterator[str]:
    """What of a plan's decisions contradicts the others, or is none that is known."""
    for name, known in (
        ("schedule", SCHEDULES),
        ("zero", (0, 1, 2, 3)),
        ("precision", ("float64", "float32", "bfloat16", "float16")),
        ("master", (None, *MASTERS)),
        ("optimizer", OPTIMIZER_STATES),
    ):
        if getattr(plan, name) not in known:
            yield str(not_known(name, getattr(plan, name), known))
    for name in ("pp", "dp", "tp", "micro_batch", "global_batch", "step_seconds"):
        if not getattr(plan, name) > 0:
            yield f"{name} is {getattr(plan, name)}"
    if plan.pp * plan.dp * plan.tp != plan.mesh.size:
        yield f"{plan.degrees} does not fill {plan.mesh}"
    if plan.global_batch % plan.micro_batch:
        yield f"{plan.global_batch} samples are no multiple of micro_batch={plan.micro_batch}"
    if plan.micro_batch % plan.dp:
        yield f"{plan.micro_batch} samples do not divide over dp={plan.dp} ranks"
    if len(plan.stages) != plan.pp:
        yield f"{plan.degrees} has {len(plan.stages)} stages"
    for index, stage in enumerate(plan.stages):
        if not 0 <= stage.splits < len(plan.splits):
            yield f"stage {index} is split as {stage.splits}, there are {len(plan.splits)} ways"


def usable_bytes(mesh: Mesh) -> float:
    """Bytes of a device that a plan may fill: the rest is the context, the allocator's slack and libraries."""
    return mesh.device.memory_bytes * 0.92


def _written(value: Any, indent: str = "") -> str:
    """JSON in which what holds nothing nested stands on one line."""
    nested = isinstance(value, (dict, list, tuple))
    inside = (value.values() if isinstance(value, dict) else value) if nested else ()
    if not any(v and isinstance(v, (dict, list, tuple)) for v in inside):
        return json.dumps(value)
    deeper = indent + " "
    if isinstance(value, dict):
        rows, ends = [f"{json.dumps(k)}: {_written(v, deeper)}" for k, v in value.items()], "{}"
    else:
        rows, ends = [_written(v, deeper) for v in value], "[]"
    return f"{ends[0]}\n{deeper}" + f",\n{deeper}".join(rows) + f"\n{indent}{ends[1]}"


def _strategy_to_json(strategy: Strategy) -> dict[str, Any]:
    return {
        "name": strategy.name,
        "inputs": [None if p is None else str(p) for p in strategy.inputs],
        "outputs": [str(p) for p in strategy.outputs],
        "local": strategy.local,
        "shards_work": strategy.shards_work,
    }


def _strategy_from_json(data: Mapping[str, Any]) -> Strategy:
    return Strategy(
        data["name"],
        tuple(None if p is None else Placement.parse(p) for p in data["inputs"]),
        tuple(Placement.parse(p) for p in data["outputs"]),
        data["local"],
        data["shards_work"],
    )


def _stage_from_json(data: Mapping[str, Any]) -> PlanStage:
    runs = tuple(
        PlanSegment(tuple(r["labels"]), r["seconds"], tuple(PlanLine(**line) for line in r["lines"]))
        for r in data["runs"]
    )
    sends, recompute = tuple((s, b, t) for s, b, t in data["sends"]), tuple(data["recompute"])
    return PlanStage(**{**data, "runs": runs, "sends": sends, "recompute": recompute})


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


COLLECTIVES = {
    "all_gather": "all-gather",
    "all_gather_again": "all-gather (again in backward)",
    "all_reduce": "all-reduce",
    "all_to_all": "all-to-all",
}
"""Functions of `autopart.runtime.collectives` that are one collective -> its name in a printed plan."""


def printed_name(name: str) -> str:
    """An operator's name as plans print it."""
    family, _, rest = name.partition(".")
    if family == "runtime":
        return COLLECTIVES.get(rest, rest)
    return rest if family in ("aten", "autopart") else name


def bytes_text(count: float) -> str:
    """``"41.2 GiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def seconds_text(value: float) -> str:
    """``"3.10 ms"``."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value * 1e6:.2f} us" if value else "0"
