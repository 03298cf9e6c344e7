"""Why plans are as they are: constraints that hold, answers that are what planning again says, plans priced again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build
from torch import nn
from typer.testing import CliRunner

import autopart
from autopart import Mesh, PartitionError, Plan
from autopart.cli.main import app
from autopart.frontend.batch import DTYPES
from autopart.hardware.mesh import usable_bytes
from autopart.ir.labels import is_block
from autopart.passes.source import Source
from autopart.plan.units import seconds_text
from autopart.planner.explain.price_plan import price_traced
from autopart.planner.explain.why import Explanation, explain_traced
from autopart.planner.make_plan import make_plan, request_of

pytestmark = pytest.mark.usefixtures("traced_once")

LAYERS = 10
"""So many that plans are not looked for exhaustively, as they are for the smallest models."""
MESH = "4:cpu"
POINTS = 30
"""Of a search: that it is as good on tiny models as it gets is for other tests."""


SHORT: list[tuple[str, dict[str, Any]]] = [(MESH, {"recompute": "none", "zero": 0, "pp": 1, "tp": 1}), ("2:cpu", {})]
if "AUTOPART_EXAMPLES" in os.environ:  # larger, and between the two
    SHORT += [(MESH, {}), (MESH, {"micro_batch": 8, "recompute": "none"})]


@lru_cache
def source(name: str = "llama") -> Source:
    """A tiny model, traced once."""
    model, batch = build(name, torch.float32, LAYERS)
    return Source(model, batch, torch.float32)


def planned(*constraints: str, mesh: str | Mesh = MESH, name: str = "llama", **settings: Any) -> Plan:
    """A plan of the tiny model."""
    made = source(name)
    settings = {"nodes": POINTS, **settings}
    return make_plan(made, Mesh.of(mesh), request_of(made.model, made.batch, constraints=constraints, **settings))


@lru_cache
def known(*constraints: str) -> Plan:
    """`planned`, once for all tests."""
    return planned(*constraints)


@lru_cache
def explanation(**settings: Any) -> Explanation:
    """Of the tiny model's plan."""
    made = source()
    return explain_traced(made, Mesh.of(MESH), request_of(made.model, made.batch, **settings))


def modes(plan: Plan) -> dict[str, str]:
    """What every numbered block of a plan recomputes."""
    labels = source().sampled(2, plan.mesh).labels
    every = [mode for stage in plan.stages for mode in stage.recompute]
    return {label: mode for label, mode in zip(labels, every, strict=True) if is_block(label)}


def starts(plan: Plan) -> list[str]:
    """The labels that stages start with."""
    labels = source().sampled(2, plan.mesh).labels
    return [labels[start] for start in plan.starts]


def strategy(plan: Plan, key: str, axis: str = "tp") -> str:
    """The name of what a plan does with an operator or a tensor of its first stage."""
    return plan.splits[0][axis][key].name


HOLDS: dict[tuple[str, ...], Callable[[Plan], bool]] = {
    ("tp=2", "pp=1"): lambda p: (p.pp, p.dp, p.tp) == (1, 2, 2),
    ("tp!=1", "dp<2"): lambda p: p.tp > 1 and p.dp == 1,
    ("micro_batch=4",): lambda p: p.micro_batch == 4,
    ("zero=2", "dp=4"): lambda p: p.zero == 2,
    ("schedule=gpipe", "pp=2"): lambda p: p.schedule == "gpipe",
    ("recompute=full",): lambda p: p.recompute == "full",
    ("not recompute=none",): lambda p: "none" not in modes(p).values(),
    ("recompute layers.1 full", "recompute layers.3 selective"): lambda p: (
        [list(modes(p).values())[i] for i in (1, 3)] == ["full", "selective"]
    ),
    ("stage 1 starts at layers.1",): lambda p: starts(p)[1] == "model.layers.1",
    ("cut before layers.3",): lambda p: "model.layers.3" in starts(p),
    ("pp=2", "no cut before layers.2", "no cut before layers.1"): lambda p: (
        starts(p)[1] not in ("model.layers.1", "model.layers.2")
    ),
    ("cuts=manual:layers.1,layers.2,layers.5",): lambda p: starts(p)[2:] == ["model.layers.2", "model.layers.5"],
    ("cuts=uniform", "pp=4"): lambda p: p.pp == 4,
    ("cuts=time", "pp=2"): lambda p: p.pp == 2,
    ("cuts=memory", "pp=2"): lambda p: p.pp == 2,
    ("cuts=parameters", "pp=2"): lambda p: p.pp == 2,
    ("cuts=type:decoder", "pp=2"): lambda p: p.pp == 2,
    ("split layers.*.up_proj.weight dim 0 over tp",): lambda p: (
        p.tp > 1 and strategy(p, "model.layers.0.mlp.up_proj.weight") == "d0"
    ),
    ("keep lm_head.weight whole over tp", "tp=4"): lambda p: strategy(p, "lm_head.weight") in "RC",
    ("layers.*.up_proj/linear: k/tp",): lambda p: strategy(p, "model.layers.0.mlp.up_proj/linear") == "k",
}


@pytest.mark.slow
@pytest.mark.parametrize("texts", HOLDS, ids="; ".join)
def test_constraints_hold(texts: tuple[str, ...]) -> None:
    plan = planned(*texts)
    assert HOLDS[texts](plan)
    assert plan.step_seconds * (1 + 1e-9) >= plan.bound_seconds >= 0
    assert plan.gap < 0.2
    assert plan.step_seconds >= known().bound_seconds * (1 - 1e-6), "a constraint makes no plan faster"
    assert plan.request["constraints"] == [" ".join(t.split()) for t in texts]


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (("stage 1 starts at layers.99",), "there is no segment 'layers.99'"),
        (("split nothing over tp",), "no operator or tensor is called nothing"),
        (("recompute lm_head full",), "lm_head can recompute in no way: recompute lm_head full"),
        (("recompute=full", "recompute layers.1 none"), "layers.1 can recompute in no way"),
        (("tp=3",), "asked for: tp=3"),
        (("pp=1", "cut before layers.2"), "asked for: cut before layers.2"),
        (("split lm_head.weight over tp", "tp=1"), "lm_head.weight has no strategy left"),
        (("pp=2", "stage 1 starts at layers.2", "no cut before layers.2"), "no plan does what is asked: pp=2"),
        (("schedule=gpipe", "schedule=1f1b"), "no schedule is left"),
    ],
)
def test_impossible_constraints(texts: tuple[str, ...], told: str) -> None:
    with pytest.raises(PartitionError, match=re.escape(told)):
        planned(*texts)


@pytest.mark.slow
def test_why() -> None:
    """Every number is above what is proven for the strategy, and no better than the best plan can be."""
    found = explanation(tp=4)
    reasons = found.why()
    assert {"model.embed_tokens/embedding", "lm_head/linear"} <= {reason.key for reason in reasons}
    others = [other for reason in reasons for other in reason.others if other.seconds is not None]
    assert len(others) >= 4
    for other in others:
        assert other.bound <= other.seconds * (1 + 1e-9) and other.seconds >= found.found.bound * (1 - 1e-9)
    assert len(found.why(everything=True)) > len(reasons)
    assert "  " in str(found)


@pytest.mark.parametrize(
    "text",
    ["tp=2", "zero=3", "pp=2", "micro_batch=2", "recompute=full", "recompute layers.1 full", "cut before layers.2",
     "stage 1 starts at layers.3", "cuts=uniform", "do not split lm_head.weight over tp"],
)  # fmt: skip
def test_why_not(text: str) -> None:
    answer = explanation().why_not(text, None)
    assert answer.seconds == pytest.approx(planned(text).step_seconds, rel=1e-3)
    assert answer.plan is not None
    assert answer.bound <= answer.plan.step_seconds * (1 + 1e-9)
    quick = explanation().why_not(text)
    assert quick.seconds is not None
    assert answer.bound <= quick.seconds * (1 + 1e-9)
    assert quick.bound <= answer.seconds * (1 + 1e-9)
    assert text in str(quick)


def test_why_not_another_schedule() -> None:
    """GPipe has more micro-batches in flight: nothing that was computed for 1F1B holds for it."""
    settings: dict[str, Any] = {"global_batch": 16, "micro_batch": 2, "pp": 2, "tp": 2}
    unlimited = planned(**settings)
    device = replace(unlimited.mesh.device, memory_bytes=int(0.99 * max(unlimited.memory_bytes)))
    mesh, made = replace(unlimited.mesh, device=device), source()
    found = explain_traced(made, mesh, request_of(made.model, made.batch, **settings))
    answer, fresh = found.why_not("schedule=gpipe", None), planned(mesh=mesh, nodes=None, schedule="gpipe", **settings)
    assert (answer.seconds, answer.bound) == pytest.approx((fresh.step_seconds, fresh.bound_seconds))
    assert found.plan.step_seconds < fresh.bound_seconds


def test_why_not_possible() -> None:
    answer = explanation().why_not("tp=3")
    assert answer.seconds is None
    assert "not possible" in str(answer)
    with pytest.raises(PartitionError, match="there is no segment"):
        explanation().why_not("cut before layers.77")
    plan = explanation().plan
    assert "same" in str(explanation().why_not(f"tp={plan.tp}"))


@pytest.mark.slow
def test_prices() -> None:
    """Every price is the time of a plan for the changed machine."""
    found = explanation()
    told = {price.what: price.seconds for price in found.prices()}
    mesh = found.space.mesh
    faster = replace(mesh, intra=replace(mesh.intra, bandwidth=mesh.intra.bandwidth * 1.1))
    flops = replace(mesh.device, flops={k: v * 1.1 for k, v in mesh.device.flops.items()})
    moved = replace(mesh.device, bandwidth=mesh.device.bandwidth * 1.1)
    meshes = {"links between devices": faster, "products": replace(mesh, device=flops),
              "memory of the devices": replace(mesh, device=moved)}  # fmt: skip
    for what, other in meshes.items():
        (seconds,) = (s for name, s in told.items() if name.startswith(what))
        assert seconds == pytest.approx(make_plan(fresh(), other, found.space.request).step_seconds, rel=1e-3)
    assert found.slack > 0


def fresh() -> Source:
    """A source that was traced for no mesh: its graphs are kept by the name of the device."""
    return replace(source(), prepared={}, planned={})


def small(nbytes: float, text: str = MESH) -> Mesh:
    """A mesh, with so many bytes a plan may fill."""
    mesh = Mesh.of(text)
    return replace(mesh, device=replace(mesh.device, memory_bytes=round(nbytes / 0.92)))


def test_memory_price() -> None:
    """Less memory than the fastest plan takes: more of it makes the step no longer."""
    free = planned("pp=1", "dp=4")
    mesh = small(max(free.memory_bytes) * 0.8)
    made = source()
    found = explain_traced(made, mesh, request_of(made.model, made.batch, constraints=["pp=1", "dp=4"]))
    assert max(found.plan.memory_bytes) <= usable_bytes(mesh)
    more = next(price for price in found.prices() if price.what == "one more GiB per device")
    assert free.step_seconds * (1 - 1e-6) <= more.seconds <= found.plan.step_seconds * (1 + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("text", "settings"), SHORT)
def test_advice_fits(text: str, settings: dict[str, Any]) -> None:
    """Where nothing fits, what is said to fit does."""
    smallest = min(max(planned(f"pp={pp}", mesh=text, recompute="full", zero=3).memory_bytes) for pp in (1, 2))
    scarce = small(smallest * (0.3 if not settings else 0.95), text)
    with pytest.raises(PartitionError) as error:
        planned(mesh=scarce, **settings)
    assert "short; largest: " in error.value.why
    ways = error.value.try_.removeprefix("what fits: ").split(", or ")
    assert error.value.try_.startswith("what fits: ")
    for way in ways:
        if match := re.fullmatch(r"(\d+) devices \((.*)\)", way):
            mesh = replace(scarce, devices_per_host=int(match[1]))
            if mesh.size > 8:
                mesh = replace(mesh, devices_per_host=4, hosts=mesh.size // 4)
            assert planned(mesh=mesh, **settings).fits
        elif match := re.fullmatch(r"(\w+)=\"?(\w+)\"?", way):
            value = int(match[2]) if match[2].isdigit() else match[2]
            dtype = DTYPES[value if match[1] == "precision" else "float32"]
            made = replace(source(), dtype=dtype, prepared={}, planned={})
            request = request_of(made.model, made.batch, **{**settings, match[1]: value})
            assert make_plan(made, scarce, request).fits
        elif way == "other degrees":
            free = {k: v for k, v in settings.items() if k not in ("pp", "dp", "tp")}
            assert planned(mesh=scarce, **free).fits


def changed(plan: Plan, change: Callable[[dict[str, Any]], None]) -> Plan:
    """A plan whose JSON was edited."""
    data = json.loads(json.dumps(plan.to_json()))
    change(data)
    return Plan.from_json(data)


def moved_cut(data: dict[str, Any]) -> None:
    """The second stage begins one run later."""
    one, two = data["stages"]
    two["first_position"] += 1
    one["recompute"].append(two["recompute"].pop(0))


@pytest.mark.slow
def test_reprice() -> None:
    plan = planned("pp=2", "tp=2", "micro_batch=2", "stage 1 starts at layers.2")
    again = price_traced(plan, source())
    assert again.step_seconds == pytest.approx(plan.step_seconds, rel=1e-9)
    assert [s.memory for s in again.stages] == [s.memory for s in plan.stages]
    assert again.request == plan.request
    later = price_traced(changed(plan, moved_cut), source())
    assert starts(later) == ["model.embed_tokens", "model.layers.3"]
    assert later.step_seconds != plan.step_seconds

    def full(data: dict[str, Any]) -> None:
        one, _ = data["stages"]
        one["recompute"] = ["none", "full", "full"]
        data["zero"] = 1

    heavy = price_traced(changed(plan, full), source())
    assert heavy.recompute == "mixed"
    assert heavy.stages[0].backward_seconds > plan.stages[0].backward_seconds
    assert heavy.stages[1].backward_seconds == plan.stages[1].backward_seconds
    assert heavy.stages[0].memory["activations"] < plan.stages[0].memory["activations"]
    model, batch = source().model, source().batch
    assert autopart.price_plan(plan, model, batch).step_seconds == pytest.approx(plan.step_seconds, rel=1e-9)


def edit(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Put a value at a path of keys and indices."""

    def change(data: Any) -> None:
        *keys, last = (int(k) if k.isdigit() else k for k in path.split("|"))
        for key in keys:
            data = data[key]
        if value is None:
            del data[last]
        else:
            data[last] = value

    return change


WHOLE = {"name": "R", "inputs": [], "outputs": ["R"], "local": "", "shards_work": False}
REFUSED = {
    "degrees": (edit("tp", 4), "does not fill 4:cpu"),
    "micro-batch": (edit("micro_batch", 3), "8 samples are no multiple of micro_batch=3"),
    "stages": (edit("stages|1|first_position", 0), "the first starts at 0, each behind"),
    "modes": (edit("stages|1|recompute", []), "and 0 modes of recompute"),
    "no block": (edit("stages|0|recompute|0", "full"), "numbered blocks alone"),
    "no mode": (edit("stages|0|recompute|1", "some"), "cannot recompute 'some'"),
    "no split": (edit("stages|0|splits", 7), "is split as 7"),
    "unknown": (edit("splits|0|tp|nobody.weight", WHOLE), "nobody.weight over tp: the model has no such"),
    "missing": (edit("splits|0|tp|lm_head.weight", None), "lm_head.weight over tp: the plan has no strategy"),
    "no option": (edit("splits|0|tp|lm_head/linear|name", "zz"), "lm_head/linear cannot be zz/tp"),
    "no axis": (edit("splits|0|tp", None), "the plan splits over nothing"),
    "other model": (edit("signature|hash", "0"), "the plan is for another model"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", REFUSED)
def test_price_plan_refuses(what: str) -> None:
    change, told = REFUSED[what]
    with pytest.raises(PartitionError, match=re.escape(told)):
        price_traced(changed(known("pp=2", "tp=2", "stage 1 starts at layers.2"), change), source())


def test_price_plan_refuses_a_change_that_does_not_exist() -> None:
    """A product that gives a partial sum of what is then taken as if it were split, and no step leads there."""
    plan = planned("pp=1", "tp=4")
    table = explanation(tp=4).space.model(explanation(tp=4).found.point).table
    for used in table.value_uses:
        source_node, (user, operand) = table.nodes[used.source], used.uses[0]
        if source_node.kind == "end" or table.nodes[user].kind == "end":
            continue
        for one in source_node.options:
            for other in table.nodes[user].options:
                have = tuple(s.outputs[used.output] for s in one)
                want = tuple(s.inputs[operand] for s in other)
                if (have, want) in used.chains or None in want or have[0] != want[0]:
                    continue
                tp = table.axes.index("tp")
                splits = {**plan.splits[0]["tp"], source_node.key: one[tp], table.nodes[user].key: other[tp]}
                edited = replace(plan, splits=({**plan.splits[0], "tp": splits}, *plan.splits[1:]))
                with pytest.raises(PartitionError, match=r"cannot take|do not go together"):
                    price_traced(edited, source())
                return
    pytest.skip("every change of placement exists here")


def make() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """For the shell."""
    return build("llama", torch.float32, 3)


@pytest.mark.slow
def test_shell(tmp_path: Path) -> None:
    run, file = CliRunner().invoke, tmp_path / "plan.json"
    spec = f"{Path(__file__)}:make"
    made = run(app, ["plan", spec, MESH, "--force", "tp=2", "--forbid", "cut before layers.1", "--save", str(file)])
    assert made.exit_code == 0, made.output
    plan = Plan.load(file)
    assert plan.request["model"] == spec
    assert plan.request["constraints"] == ["tp=2", "not cut before layers.1"]
    shown = run(app, ["show", str(file), "--why", "--why-not", "tp=1", "--prices"])
    assert shown.exit_code == 0, shown.output
    assert "tp=1 (with tp=2, not cut before layers.1 as asked): not possible" in shown.stdout
    assert "products 10 % faster" in shown.stdout
    assert "lm_head/linear" in shown.stdout
    told = run(app, ["show", str(file), "--why-not", "tp=1", "--json"])
    assert json.loads(told.stdout)["why_not"][0]["against"] == plan.step_seconds
    assert f"\nstep     {seconds_text(plan.step_seconds)}, " in run(app, ["estimate", str(file)]).stdout
    nameless = tmp_path / "nameless.json"
    replace(plan, request={}).save(nameless)
    refused = run(app, ["show", str(nameless), "--why"])
    assert refused.exit_code == 2
    assert "--model" in refused.output
    assert run(app, ["show", str(nameless), "--why-not", "tp=1", "--model", spec]).exit_code == 0
    assert "--model prices it again" in " ".join(run(app, ["estimate", str(nameless)]).output.split())


def test_live_line() -> None:
    said: list[str] = []
    made = source()
    make_plan(made, Mesh.of(MESH), request_of(made.model, made.batch), said.append)
    assert said
    assert re.fullmatch(r"best \S+ \S+, bound \S+ \S+, gap \S+%, \d+ points", said[0])
