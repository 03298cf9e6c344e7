"""A plan as JSON, and the checks of a plan that was read from JSON."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from autopart.cost.offload import OFFLOADS
from autopart.cost.training_state import MASTERS, OPTIMIZER_STATES
from autopart.errors import PartitionError, not_known
from autopart.hardware.mesh import Mesh
from autopart.plan.fields import PlanFields
from autopart.plan.schedules import SCHEDULES
from autopart.plan.search_summary import ENDS, LIMITS
from autopart.plan.typecheck import hints, mistyped
from autopart.sharding.notation import Placement, Strategy

Made = TypeVar("Made", bound=PlanFields)

READERS: Mapping[Any, Callable[[Any], Any]] = {Mesh: Mesh.from_json, Placement: Placement.parse}
"""Records that JSON has in a form of their own -> what reads it."""

SCHEMA = 5
"""Version of the JSON. A plan of another version is refused."""


def plan_to_json(plan: PlanFields) -> dict[str, Any]:
    """A plan as dicts, lists, numbers and text, as `plan.schema.json` describes them."""
    return {
        "schema": SCHEMA,
        **{field.name: getattr(plan, field.name) for field in fields(plan)},
        "signature": asdict(plan.signature),
        "mesh": plan.mesh.to_json(),
        "splits": [
            {axis: {node: _strategy_to_json(s) for node, s in chosen.items()} for axis, chosen in splits.items()}
            for splits in plan.splits
        ],
        "stages": [asdict(s) for s in plan.stages],
        "kernels": [asdict(use) for use in plan.kernels],
        "search": asdict(plan.search) if plan.search else None,
    }


def plan_from_json(data: Any, kind: type[Made]) -> Made:
    """The inverse of `plan_to_json`. Raises PartitionError for anything else, with the first thing that is wrong."""
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise PartitionError(
            "this is no plan of this version of autopart",
            f"its schema is {found}, this version reads {SCHEMA}",
            "plan again with autopart.plan(...)",
        )
    try:
        plan: Made = _read({k: v for k, v in data.items() if k != "schema"}, kind)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise PartitionError("the plan file is damaged", f"{type(error).__name__}: {error}") from error
    if wrong := mistyped(plan, kind) or next(_contradictions(plan), ""):
        raise PartitionError("the plan file is damaged", wrong)
    return plan


def _read(value: Any, kind: Any) -> Any:
    """A part of a plan from JSON: lists become tuples and dicts become records, as `kind` declares. What is of another
    type stays, for `mistyped` to name it."""
    origin, args = get_origin(kind) or kind, get_args(kind)
    if origin in READERS:
        return READERS[origin](value)
    if origin in (UnionType, Union):  # the latter from Python 3.14 on
        return None if value is None else _read(value, args[0])
    if isinstance(value, dict) and isinstance(origin, type) and is_dataclass(origin):
        return origin(**{name: _read(part, hints(origin)[name]) for name, part in value.items()})
    if isinstance(value, dict) and args:
        return {key: _read(part, args[1]) for key, part in value.items()}
    if isinstance(value, (list, tuple)) and origin is tuple:  # a tuple where ranks send each other a plan
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        return tuple(_read(part, each) for part, each in zip(value, kinds, strict=True))
    return value


def _strategy_to_json(strategy: Strategy) -> dict[str, Any]:
    return {
        "name": strategy.name,
        "inputs": [None if p is None else str(p) for p in strategy.inputs],
        "outputs": [str(p) for p in strategy.outputs],
        "local": strategy.local,
        "shards_work": strategy.shards_work,
    }


def _contradictions(plan: PlanFields) -> Iterator[str]:
    """Settings of a plan that are not known, or that contradict each other."""
    for name, known in (
        ("schedule", SCHEDULES),
        ("zero", (0, 1, 2, 3)),
        ("precision", ("float64", "float32", "bfloat16", "float16")),
        ("master", (None, *MASTERS)),
        ("optimizer", OPTIMIZER_STATES),
        ("offload", OFFLOADS),
    ):
        if getattr(plan, name) not in known:
            yield str(not_known(name, getattr(plan, name), known))
    for name in ("pp", "dp", "tp", "micro_batch", "global_batch", "step_seconds"):
        if not getattr(plan, name) > 0:
            yield f"{name} is {getattr(plan, name)}"
    if plan.prefetch_bytes < 0:
        yield f"prefetch_bytes is {plan.prefetch_bytes}"
    divides = plan.zero > 0 and 1 < plan.shard_size < plan.dp and plan.dp % plan.shard_size == 0
    if plan.shard_size and not divides:
        yield f"shard_size={plan.shard_size} is no part of dp={plan.dp} ranks that ZeRO {plan.zero} divides among"
    if plan.pp * plan.dp * plan.tp != plan.mesh.size:
        yield f"{plan.degrees} does not fill {plan.mesh}"
    if plan.global_batch % plan.micro_batch:
        yield f"{plan.global_batch} samples are no multiple of micro_batch={plan.micro_batch}"
    if plan.micro_batch % plan.dp:
        yield f"{plan.micro_batch} samples do not divide over dp={plan.dp} ranks"
    if len(plan.stages) != plan.pp:
        yield f"{plan.degrees} has {len(plan.stages)} stages"
    if plan.search and plan.search.limit not in LIMITS:
        yield str(not_known("limit", plan.search.limit, LIMITS))
    for ended in [*plan.search.ended, *(point.ended for point in plan.search.compared)] if plan.search else ():
        if ended not in ENDS:
            yield str(not_known("end of a search point", ended, ENDS))
    for index, stage in enumerate(plan.stages):
        if not 0 <= stage.splits < len(plan.splits):
            yield f"stage {index} is split as {stage.splits}, there are {len(plan.splits)} ways"
        if not all(segment.labels for segment in stage.segments):
            yield f"stage {index} has a segment of no position"


def json_text(value: Any, indent: str = "") -> str:
    """JSON text in which a list or dict that holds nothing nested stands on one line."""
    nested = isinstance(value, (dict, list, tuple))
    inside = (value.values() if isinstance(value, dict) else value) if nested else ()
    if not any(v and isinstance(v, (dict, list, tuple)) for v in inside):
        return json.dumps(value)
    deeper = indent + " "
    if isinstance(value, dict):
        rows, ends = [f"{json.dumps(k)}: {json_text(v, deeper)}" for k, v in value.items()], "{}"
    else:
        rows, ends = [json_text(v, deeper) for v in value], "[]"
    return f"{ends[0]}\n{deeper}" + f",\n{deeper}".join(rows) + f"\n{indent}{ends[1]}"
