"""What users get wrong, or do that a trace does not follow: it works exactly, or is refused with what to do."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import autopart
from autopart import Mesh, PartitionError, Plan
from autopart.compile.check import one_process, worst_error
from autopart.errors import closest
from autopart.hardware.mesh import divisors
from autopart.passes.source import Source
from autopart.planner.make_plan import make_plan
from autopart.planner.request import Request

Tensor = torch.Tensor
Loss = Callable[["Model", Tensor, Tensor], Any]


def mse(m: Model, x: Tensor, y: Tensor) -> Tensor:
    return (m.b(m.a(x).relu()) - y).square().mean()


class Model(nn.Module):
    """Two layers under a forward pass that a case gives."""

    def __init__(self, loss: Loss = mse) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.loss = loss

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.loss(self, x, y)


def batch(samples: int = 4) -> dict[str, Any]:
    torch.manual_seed(1)
    return {"x": torch.randn(samples, 8), "y": torch.randn(samples, 8)}


def plan(model: Any = None, given: Any = None, mesh: Any = "2:cpu", **settings: Any) -> Plan:
    settings = {"nodes": 5, **settings}
    return autopart.plan(model or Model(), mesh, batch() if given is None else given, **settings)


def mixed(m: Model, x: Tensor, y: Tensor) -> Tensor:
    """A float32 head on a bfloat16 body."""
    return (m.b(m.a(x.bfloat16()).relu().float()) - y).square().mean()


def reentrant(m: Model, x: Tensor, y: Tensor) -> Tensor:
    def rest(h: Tensor) -> Tensor:
        return m.b(h.relu())

    return (checkpoint(rest, m.a(x), use_reentrant=True) - y).square().mean()


def reentrant_inputs(m: Model, x: Tensor, y: Tensor) -> Tensor:
    """The first layer gets no gradient, since its input has none."""
    return (m.b(checkpoint(m.a, x, use_reentrant=True).relu()) - y).square().mean()


def packed(m: Model, x: Tensor, y: Tensor) -> dict[str, Any]:
    return {"name": "b", "step": 3, "states": x, "objective": mse(m, x, y)}


@pytest.mark.parametrize("loss", [mixed, reentrant, reentrant_inputs, packed])
@pytest.mark.parametrize("settings", [{"tp": 2}, {"dp": 2, "zero": 3}])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_it_trains_as_one_process(loss: Loss, settings: dict[str, int]) -> None:
    model = Model(loss)
    if loss is mixed:
        model.a.bfloat16()
    found = autopart.check(model, "2:cpu", batch(), nodes=5, **settings)
    assert found.loss_error < 1e-6
    assert found.gradient_error < (2**-6 if loss is mixed else 1e-6)


def test_planning_and_training_under_no_grad() -> None:
    with torch.no_grad():
        assert autopart.check(Model(), "2:cpu", batch(), tp=2, nodes=5).gradient_error < 1e-6
        compiled = autopart.compile(Model(), "1:cpu", batch())
        compiled.step(batch())
    assert compiled.full_gradients()["a.weight"].abs().sum() > 0


def hooked(m: Model, x: Tensor, y: Tensor) -> Tensor:
    h = m.a(x)
    h.register_hook(lambda g: 2 * g)
    return (m.b(h) - y).square().mean()


def failing(m: Model, x: Tensor, y: Tensor) -> Tensor:
    raise ValueError("in my own words")


class Rest(Model):
    def forward(self, *args: Tensor) -> Tensor:
        return mse(self, *args)


def changed(change: Callable[[Model], Any]) -> Model:
    model = Model()
    change(model)
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no gradient": (lambda: plan(Model(lambda m, x, y: (y.mean(), mse(m, x, y)))), r"no gradient \(test_edges.py:\d+"),
    "detached": (lambda: plan(Model(lambda m, x, y: mse(m, x, y).detach())), "through detach"),
    "frozen": (lambda: plan(Model().requires_grad_(False)), "none of the model's 4 parameters is trained"),
    "no parameters": (lambda: plan(nn.MSELoss(), {"input": batch()["x"], "target": batch()["y"]}), "no parameters"),
    "no loss": (lambda: plan(Model(lambda m, x, y: m.a(x))), "no scalar loss"),
    "raises": (lambda: plan(Model(failing)), r"test_edges.py:\d+: raise ValueError.*in my own words"),
    "hook in forward": (lambda: plan(Model(hooked)), r"hook on a gradient \(test_edges.py:\d+: h.register_hook"),
    "hook of a weight": (lambda: plan(changed(lambda m: m.a.weight.register_hook(lambda g: g))), "a.weight has a hook"),
    "hook of a module": (
        lambda: plan(changed(lambda m: m.b.register_full_backward_hook(lambda *_: None))),
        "b has a hook on its backward pass",
    ),
    "lazy": (lambda: plan(changed(lambda m: setattr(m, "a", nn.LazyLinear(8)))), "a.weight has no shape yet"),
    "complex": (
        lambda: plan(
            changed(lambda m: setattr(m, "c", nn.Parameter(torch.ones(2) * 1j))), precision="bfloat16", master="float32"
        ),
        "c is complex\n  why: a master copy",
    ),
    "no module": (lambda: plan(lambda x, y: x.mean()), "the model is a function"),
    "a class": (lambda: plan(Model), r"the model is the class Model.*\n  try: Model\("),
    "*args": (lambda: plan(Rest()), r"forward\(\*args.*without names"),
    "two dtypes": (
        lambda: plan(given={"x": batch()["x"].double(), "y": batch()["y"]}),
        r"a product of float64 and float32 \(test_edges.py:\d+\)\n  why: they are of x and a.weight",
    ),
    "no dict": (lambda: plan(given=batch()["x"]), r"the batch is a Tensor(.*\n)*.*\{\"x\": ..., \"y\": ...\}"),
    "an empty dict": (lambda: plan(given={}), "the batch lacks 'x'"),
    "no samples": (lambda: plan(given=batch(0)), "the batch has no samples"),
    "no common size": (lambda: plan(given={**batch(), "y": batch(3)["y"]}), "no common size"),
    "a number": (lambda: plan(given={**batch(), "y": torch.tensor(1.0)}), r"batch\['y'\] has no dims"),
    "nested": (lambda: plan(given={"x": batch()}), r"batch\['x'\] is a dict of tensors"),
    "numpy": (lambda: plan(given={**batch(), "x": batch()["x"].numpy()}), r"is a ndarray, not a tensor"),
    "sparse": (lambda: plan(given={**batch(), "x": batch()["x"].to_sparse()}), "not a dense tensor"),
    "missing": (lambda: plan(given={"x": batch()["x"]}), "the batch lacks 'y', which forward needs"),
    "unknown": (lambda: plan(given={**batch(), "ys": batch()["y"]}), "no argument 'ys'"),
    "no setting": (lambda: autopart.estimate(Model(), "2:cpu", batch(), microbatch=2), "try: micro_batch"),
    "no plan": (lambda: autopart.simulate(Model(), "2:cpu", batch(), plan="plan.json"), "is no Plan"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name: str) -> None:
    run, told = REFUSED[name]
    with pytest.raises(PartitionError, match=told):
        run()


@pytest.mark.parametrize("mode", [torch.autocast("cpu", torch.bfloat16), torch.inference_mode()], ids=["cast", "infer"])
def test_modes_around_a_plan_and_around_a_step(mode: Any) -> None:
    compiled = autopart.compile(Model(), "1:cpu", batch())
    for run in (plan, lambda: compiled.step(batch())):
        with mode, pytest.raises(PartitionError, match="is on around a"):
            run()


@pytest.mark.parametrize(
    ("settings", "meant"),
    [
        ({"precision": "fp16"}, "precision='float16'"),
        ({"precision": "bf16"}, "precision='bfloat16'"),
        ({"precision": "half"}, "precision='float16'"),
        ({"precision": "fp32"}, "precision='float32'"),
        ({"master": "fp32", "precision": "bfloat16"}, "master='float32'"),
        ({"schedule": "1F1B"}, "schedule='1f1b'"),
        ({"schedule": "g-pipe"}, "schedule='gpipe'"),
        ({"optimizer": "AdamW"}, "optimizer='adamw'"),
        ({"recompute": "fully"}, "recompute='full'"),
        ({"constraints": ["recompute=selectiv"]}, "selective"),
        ({"mesh": "2:h100"}, "'h100-80gb'"),
        ({"tp": "2"}, "tp=2"),
        ({"zero": 4}, "one of 0, 1, 2, 3"),
    ],
    ids=str,
)
def test_what_was_meant_is_told(settings: dict[str, Any], meant: str) -> None:
    with pytest.raises(PartitionError) as caught:
        plan(**settings)
    assert meant in caught.value.try_


def counted(m: Model, x: Tensor, y: Tensor) -> Tensor:
    """A mask of pairs from two masks of whole numbers, as an einsum that sums over nothing."""
    mask = (x > 0).long()
    return (mse(m, x, y)[None, None, None] * torch.einsum("bi,bj->bij", mask, mask)).mean()


def summed(m: Model, x: Tensor, y: Tensor) -> Tensor:
    mask = (x > 0).long()
    return (mse(m, x, y)[None, None] * torch.einsum("bi,cj->bc", mask, mask)).mean()


def test_a_gpu_multiplies_whole_numbers_but_has_no_matrix_product_of_them() -> None:
    assert plan(Model(counted), mesh="2:h100-80gb").step_seconds > 0
    with pytest.raises(PartitionError, match="computes no int64"):
        plan(Model(summed), mesh="2:h100-80gb")


def test_a_dtype_is_a_precision() -> None:
    given = {name: value.bfloat16() for name, value in batch().items()}
    made = plan(given=given, precision=torch.bfloat16, master=torch.float32)
    assert (made.precision, made.master) == ("bfloat16", "float32")


@pytest.mark.parametrize(
    ("devices", "samples", "asked"),
    [(4, 6, {"dp": 4}), (4, 4, {"tp": 3}), (6, 4, {"dp": 6, "micro_batch": 2}), (4, 6, {"dp": 2, "micro_batch": 4}),
     (8, 4, {"pp": 3, "tp": 2}), (4, 4, {"pp": 2, "dp": 2, "tp": 2})],
    ids=str,
)  # fmt: skip
def test_suggested_degrees_give_plans(devices: int, samples: int, asked: dict[str, int]) -> None:
    """Every value that is suggested for a setting, all else as it was asked."""
    with pytest.raises(PartitionError) as caught:
        plan(given=batch(samples), mesh=f"{devices}:cpu", **asked)
    ways = [way.split("=") for way in caught.value.try_.split("; ")]
    assert ways and all(name in asked for name, _ in ways)
    for name, values in ways:
        for value in values.split(" or "):
            made = plan(given=batch(samples), mesh=f"{devices}:cpu", **{**asked, name: int(value)})
            assert made.mesh.size == devices


def test_divisors() -> None:
    for number in (1, 2, 36, 97, 360):
        assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]
    assert closest("torch.half", ("float16", "float32")) == ["float16"]


class Blocks(nn.Module):
    """Equal layers, whose names differ in a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(6)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x.square().mean()


@pytest.mark.parametrize(
    ("settings", "advised"),
    [
        ({}, 'precision="bfloat16"'),
        ({"precision": "bfloat16", "optimizer": "sgd"}, ""),
        ({"recompute": "none"}, 'recompute="full"'),
        ({"recompute": "full"}, ""),
    ],
    ids=str,
)
def test_what_lacks_memory_is_told_in_groups_and_the_advice_is_new(settings: dict[str, Any], advised: str) -> None:
    mesh = Mesh.of("1:cpu")
    mesh = replace(mesh, device=replace(mesh.device, memory_bytes=1000))
    given = torch.randn(4, 64, dtype=getattr(torch, settings.get("precision", "float32")))
    with pytest.raises(PartitionError) as caught:
        make_plan(Source(Blocks(), {"x": given}, given.dtype), mesh, Request(4, **settings), advise=False)
    assert re.search(r"of these layers\.\*\.weight x 6 [\d.]+ KiB", caught.value.why), caught.value
    ways = ("precision", "recompute")
    assert advised in caught.value.try_
    assert not any(f'{name}="{settings.get(name)}"' in caught.value.try_ for name in ways)


def test_why_not_tells_what_was_asked_too() -> None:
    found = autopart.explain(Model(), "4:cpu", batch(), pp=2, nodes=5)
    impossible, possible = found.why_not("tp=4"), found.why_not("tp=2")
    assert impossible.seconds is None and str(impossible).startswith("tp=4 (with pp=2 as asked): not possible")
    assert possible.asked == ("pp=2",) and "tp=2 (with pp=2 as asked): " in str(possible)
    free = autopart.explain(Model(), "4:cpu", batch(), nodes=5)
    assert "asked" not in str(free.why_not("tp=4"))


@lru_cache
def saved(**settings: int) -> str:
    return json.dumps(plan(**settings).to_json())


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all parts of plain data."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(deeper for key, value in items for deeper in places(value, (*path, key)))]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("settings", [{"tp": 2}, {"dp": 2, "zero": 3}, {"pp": 2}], ids=str)
def test_a_plan_edited_by_hand_runs_exactly_or_is_refused(seed: int, settings: dict[str, int]) -> None:
    """A strategy is put where another was, a placement is changed, or a stage's first position or modes."""
    draw, data = random.Random(seed), json.loads(saved(**settings))
    splits, stage = data["splits"][0], draw.choice(data["stages"])
    axis = next(iter(splits), None)
    if axis:
        node, other = draw.choice(list(splits[axis])), draw.choice(list(splits[axis].values()))
        if seed % 3:
            splits[axis][node] = other
        else:
            splits[axis][node]["outputs"] = [draw.choice(["R", "C", "G", "P", "S0", "S1"])]
    elif seed % 2:
        stage["first_position"] = draw.choice([-1, 0, 1, 2, 9])
    else:
        stage["recompute"] = draw.choice([[], ["full"] * 2, ["none"] * 9, ["some"]])
    model, given = Model(), batch()
    try:
        found = autopart.simulate(model, "2:cpu", given, plan=Plan.from_json(data))
    except PartitionError as error:
        assert re.search("the plan cannot run|damaged", error.what)
    else:
        _, gradients = one_process(model, given)
        assert worst_error(found.gradients, gradients)[0] < 1e-6


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_plan_is_refused_or_shown(seed: int) -> None:
    """Whatever stands at a random place of the file, it is told of as damaged, or read and shown."""
    draw, data = random.Random(seed), json.loads(saved(tp=2))
    *path, last = draw.choice([p for p in places(data) if 0 < len(p) <= draw.choice([1, 2, 9])])
    inside = data
    for key in path:
        inside = inside[key]
    junk = draw.choice([None, -1, 0, "x", [], {}, 1e308, True, [1], {"a": 1}, float("nan"), 10**30])
    inside[last] = junk
    try:
        made = Plan.from_json(copy.deepcopy(data))
    except PartitionError as error:
        assert re.search("damaged|not a mesh|version|devices|axes|cards", str(error)), error
    else:
        assert str(made) and str(autopart.Estimate.of(made)) and autopart.timeline(made)
