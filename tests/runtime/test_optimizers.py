"""Optimizers over shares of parameters: as torch's over the whole ones in one process, under every way to split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from on_ranks import on_ranks, split_by
from tied_model import TiedModel as Model
from torch import Tensor, nn

import autopart
from autopart.compile.check import one_process, worst_error
from autopart.runtime.compiled import Compiled

STEPS = 3
Optimizer = torch.optim.Optimizer


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 8, generator=generator) for _ in range(count)]


def groups_by_dim(model: nn.Module) -> list[dict[str, Any]]:
    """The usual rule: decay where a parameter has two dims or more."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.5},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "lr": 0.02},
    ]


class Normalised(Optimizer):
    """A step of the length of the parameter's norm, as LAMB and LARS have it."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for p in (p for p in group["params"] if p.grad is not None):
                    p -= group["lr"] * p.norm() * p.grad / (p.grad.norm() + 1e-6)


X = batches(1)[0]
MAKE: dict[str, Callable[[nn.Module], Optimizer]] = {
    "decay by dim": lambda model: torch.optim.AdamW(groups_by_dim(model), lr=0.05),
    "states before the first step": lambda m: torch.optim.Adagrad(
        m.parameters(), initial_accumulator_value=0.3, lr=0.1
    ),
    "Lion": lambda model: autopart.Lion(groups_by_dim(model), lr=0.01),
    "one group of some": lambda model: torch.optim.SGD(list(model.parameters())[:2], lr=0.1, momentum=0.9),
}
ALL = split_by("first.weight dim 0 over tp")
WHOLE = [s for s in ALL if "tp" not in s and not s.get("zero")]
"""Ranks have whole parameters."""
SPLIT = [s for s in ALL if s not in WHOLE]


def ranks(settings: dict[str, Any]) -> int:
    size: int = settings.get("pp", 1) * settings.get("dp", 1) * settings.get("tp", 1)
    return size


def trained(run: Callable[[Compiled], Any], settings: dict[str, Any], models: list[nn.Module] | None = None) -> Any:
    """What `run` returns on rank 0, and the state afterwards."""
    models = models or [Model() for _ in range(ranks(settings))]
    found = on_ranks(models, batches(1)[0], lambda c: (run(c), c.full_state_dict()), same=True, nodes=5, **settings)
    return found[0]


@pytest.mark.parametrize("settings", ALL, ids=str)
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_groups_settings_and_states(make: Callable[[nn.Module], Optimizer], settings: dict[str, Any]) -> None:
    """With a scheduler, and with states that the optimizer has already."""

    def schedule(optimizer: Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def before(model: nn.Module) -> Optimizer:
        optimizer = make(model)
        for p in model.parameters():
            p.grad = torch.ones_like(p) * torch.arange(p.numel()).view(p.shape) / p.numel()
        optimizer.step()
        return optimizer

    alone = Model()
    optimizer = before(alone)
    scheduler, losses = schedule(optimizer), []
    for x in batches(STEPS):
        losses.append(float(one_process(alone, {"x": x})[0]))
        optimizer.step()
        scheduler.step()

    models = [Model() for _ in range(ranks(settings))]
    given = [before(model) for model in models]

    def run(compiled: Compiled) -> list[float]:
        scheduler = schedule(compiled.optimizer(given[compiled.rank]))
        found = []
        for x in batches(STEPS):
            found.append(float(compiled.step({"x": x})))
            scheduler.step()
        return found

    found, state = trained(run, settings, models)
    assert found == pytest.approx(losses, rel=1e-5)
    assert worst_error(state, alone.state_dict())[0] < 1e-5


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_gradients_of_several_batches_are_added(settings: dict[str, Any]) -> None:
    weights = [0.5, 0.3, 0.2]
    alone = Model()
    optimizer = torch.optim.AdamW(alone.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        for weight, x in zip(weights, batches(3), strict=True):
            (alone(x) * weight).backward()
        norm = nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
        optimizer.step()

    def run(compiled: Compiled) -> Any:
        compiled.optimizer(torch.optim.AdamW, lr=0.05)
        for _ in range(2):
            for weight, x in zip(weights, batches(3), strict=True):
                loss = compiled.backward({"x": x}, weight=weight)
            compiled.update(clip_grad_norm=0.1)
        with pytest.raises(autopart.PartitionError, match="no gradients"):
            compiled.update()
        return float(loss), float(compiled.grad_norm), compiled.full_gradients()

    (_, found, gradients), state = trained(run, settings)
    assert found == pytest.approx(float(norm), rel=1e-5)
    assert worst_error(gradients, {n: p.grad for n, p in alone.named_parameters() if p.grad is not None})[0] < 1e-5
    assert worst_error(state, alone.state_dict())[0] < 1e-5


class Classes(nn.Module):
    """A cross-entropy that ignores some of its targets, and a mean beside it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor, targets: float | None = None) -> Tensor:
        logits = self.second(self.first(x).relu())
        labels = x[:, :6].argmax(1).masked_fill(x[:, 6] > 0.3, -100)
        error = nn.functional.cross_entropy(logits, labels, reduction="mean" if targets is None else "sum")
        return error / (targets or 1) + 0.1 * logits.square().mean()


@pytest.mark.parametrize("settings", [{"pp": 1}, {"dp": 2, "micro_batch": 2}, {"pp": 2, "micro_batch": 2}], ids=str)
def test_a_mean_over_the_targets_of_several_batches(settings: dict[str, Any]) -> None:
    total = 7
    alone = Classes()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    losses = [alone(x, total) for x in batches(3)]
    sum(losses).backward()
    optimizer.step()
    losses.append(alone(X, total))

    def run(compiled: Compiled) -> Any:
        compiled.optimizer(torch.optim.SGD, lr=0.1)
        found = [float(compiled.backward({"x": x}, targets=total)) for x in batches(3)]
        compiled.update()
        return [*found, float(compiled.evaluate({"x": X}, targets=total))]

    models: list[nn.Module] = [Classes() for _ in range(ranks(settings))]
    found, state = trained(run, settings, models)
    assert found == pytest.approx([loss.item() for loss in losses], rel=1e-5)
    assert worst_error(state, alone.state_dict())[0] < 1e-5


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_freezing_and_thawing(settings: dict[str, Any]) -> None:
    frozen = [{"second.weight", "first.weight"}, set(), {"gain"}]
    alone = Model()
    optimizer = torch.optim.AdamW(alone.parameters(), lr=0.05)

    def freeze(model: nn.Module, names: set[str]) -> None:
        for name, p in model.named_parameters():
            p.requires_grad_(name not in names)

    for names, x in zip(frozen, batches(STEPS), strict=True):
        freeze(alone, names)
        optimizer.zero_grad()
        alone(x).backward()
        nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
        optimizer.step()
    models = [Model() for _ in range(ranks(settings))]

    def run(compiled: Compiled) -> None:
        compiled.optimizer(torch.optim.AdamW, lr=0.05)
        for names, x in zip(frozen, batches(STEPS), strict=True):
            freeze(models[compiled.rank], names)
            compiled.step({"x": x}, clip_grad_norm=0.1)

    _, state = trained(run, settings, models)
    assert worst_error(state, alone.state_dict())[0] < 1e-5


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_a_group_that_is_added_in_mid_training(settings: dict[str, Any]) -> None:
    def make(model: nn.Module) -> Optimizer:
        return torch.optim.AdamW([model.get_parameter("first.weight")], lr=0.05)

    def others(model: nn.Module) -> dict[str, Any]:
        return {"params": (p for n, p in model.named_parameters() if n != "first.weight"), "lr": 0.2}

    alone = Model()
    optimizer = make(alone)
    for i, x in enumerate(batches(STEPS)):
        if i == 1:
            optimizer.add_param_group(others(alone))
        optimizer.zero_grad()
        alone(x).backward()
        optimizer.step()
    models = [Model() for _ in range(ranks(settings))]

    def run(compiled: Compiled) -> Any:
        mine = compiled.optimizer(make(models[compiled.rank]))
        for i, x in enumerate(batches(STEPS)):
            if i == 1:
                mine.add_param_group(others(models[compiled.rank]))
            compiled.step({"x": x})
        return compiled.group_names

    names, state = trained(run, settings, models)
    assert worst_error(state, alone.state_dict())[0] < 1e-5
    assert names == [["first.weight"], [n for n, _ in alone.named_parameters() if n != "first.weight"]]


def test_groups_of_other_parameters_or_of_known_ones_are_refused() -> None:
    model = Model()
    compiled = autopart.compile(model, "1:cpu", {"x": batches(1)[0]}, nodes=5)
    optimizer = compiled.optimizer(torch.optim.AdamW(model.parameters()))
    with pytest.raises(autopart.PartitionError, match=r"first\.weight is in a group of the optimizer already"):
        optimizer.add_param_group({"params": model.get_parameter("first.weight")})
    with pytest.raises(autopart.PartitionError, match="1 of the optimizer's parameters are none of the model's"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_gradients_before_an_update_and_batches_of_no_samples_are_refused() -> None:
    compiled = autopart.compile(Model(), "1:cpu", {"x": batches(1)[0]}, nodes=5)
    compiled.backward({"x": batches(1)[0]})
    with pytest.raises(autopart.PartitionError, match="the gradients are not complete"):
        compiled.full_gradients()
    compiled.update()
    assert compiled.full_gradients()
    with pytest.raises(autopart.PartitionError, match="a batch of 0 samples"):
        compiled.step({"x": batches(1)[0][:0]})


def test_what_was_frozen_at_compile_cannot_be_thawed() -> None:
    model = Model()
    model.second.weight.requires_grad_(False)
    compiled = autopart.compile(model, "1:cpu", {"x": batches(1)[0]}, nodes=5)
    compiled.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    compiled.step({"x": batches(1)[0]})
    assert torch.equal(compiled.full_state_dict()["second.weight"], model.second.weight)
    model.second.weight.requires_grad_()
    with pytest.raises(autopart.PartitionError, match=r"second\.weight requires a gradient, and did not at compile"):
        compiled.step({"x": batches(1)[0]})


@pytest.mark.parametrize("settings", SPLIT, ids=str)
def test_updates_that_depend_on_the_whole_are_refused(settings: dict[str, Any]) -> None:
    models = [Model() for _ in range(ranks(settings))]
    with pytest.raises(autopart.PartitionError, match="Normalised cannot train parts of parameters"):
        trained(lambda c: c.optimizer(Normalised(models[c.rank].parameters(), lr=0.1)), settings, models)


@pytest.mark.parametrize("settings", WHOLE, ids=str)
def test_updates_that_depend_on_the_whole_train_whole_parameters(settings: dict[str, Any]) -> None:
    alone, x = Model(), batches(1)[0]
    optimizer = Normalised(alone.parameters(), lr=0.1)
    alone(x).backward()
    optimizer.step()

    def run(compiled: Compiled) -> None:
        compiled.optimizer(Normalised, lr=0.1)
        compiled.step({"x": x})

    _, state = trained(run, settings)
    assert worst_error(state, alone.state_dict())[0] < 1e-5


def test_elementwise_optimizers_of_torch_are_taken() -> None:
    kinds = ("SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "ASGD")
    for kind in kinds:
        trained(lambda c, kind=kind: c.optimizer(getattr(torch.optim, kind), lr=0.1), {"dp": 2, "zero": 1})


@pytest.mark.parametrize("kind", ["Muon", "Adafactor"])
@pytest.mark.parametrize(
    "settings", [{"tp": 2, "constraints": ["split second.weight dim 0 over tp"]}, {"dp": 2, "zero": 1}], ids=str
)
def test_optimizers_of_matrices_are_refused(kind: str, settings: dict[str, Any]) -> None:
    models = [Model() for _ in range(2)]
    with pytest.raises(autopart.PartitionError, match=f"{kind} cannot train parts of parameters"):
        trained(lambda c: c.optimizer(getattr(torch.optim, kind)([models[c.rank].first.weight])), settings, models)


def test_misuse_is_refused() -> None:
    model, x = Model(), batches(1)[0]
    compiled = autopart.compile(model, "1:cpu", {"x": x}, nodes=5)
    with pytest.raises(autopart.PartitionError, match="1 of the optimizer's parameters are none of the model's"):
        compiled.optimizer(torch.optim.SGD([nn.Parameter(torch.ones(1))]))
    given = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.ConstantLR(given)
    with pytest.raises(autopart.PartitionError, match="a learning-rate scheduler was made"):
        compiled.optimizer(given)
    with pytest.raises(autopart.PartitionError, match="LBFGS asks for a closure"):
        compiled.optimizer(torch.optim.LBFGS(model.parameters()))
    optimizer = compiled.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    compiled.step({"x": x})
    with pytest.raises(autopart.PartitionError, match="outside of a step"):
        optimizer.step()
    for use in (torch.optim.SGD, nn.utils.clip_grad_norm_):
        with pytest.raises(autopart.PartitionError, match="one rank's shares"):
            use(compiled.stage.parameters(), 1.0)  # type: ignore[operator]
    with torch.no_grad():
        model.gain.zero_()
    with pytest.raises(autopart.PartitionError, match="the model's weights were changed after compile"):
        compiled.step({"x": x})
    compiled.load_state_dict(model.state_dict())
    compiled.step({"x": x})
    assert not compiled.full_gradients()["first.weight"].any()


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_gradients_that_are_not_finite_change_nothing(settings: dict[str, Any]) -> None:
    def run(compiled: Compiled) -> Any:
        compiled.optimizer(torch.optim.AdamW, lr=0.05)
        compiled.step({"x": batches(1)[0] * float("inf")}, only_finite=True)
        return compiled.skipped

    skipped, state = trained(run, settings)
    assert skipped == 1
    assert worst_error(state, Model().state_dict())[0] == 0


@pytest.mark.parametrize("settings", [s for s in ALL if "master" not in s], ids=str)
def test_a_state_dict_is_loaded_back(settings: dict[str, Any]) -> None:
    """Whole on rank 0; what others give is not read. Another order of names, and names that are lacking or strange."""
    other = {name: torch.randn_like(value) for name, value in reversed(Model().state_dict().items())}
    other["last.weight"] = other["first.weight"]

    def run(compiled: Compiled) -> None:
        compiled.load_state_dict({} if compiled.rank else other)

    _, state = trained(run, settings)
    assert worst_error(state, other)[0] == 0
    lacking = {("gains" if name == "gain" else name): value for name, value in other.items()}
    with pytest.raises(autopart.PartitionError, match="it lacks gain; it has gains"):
        trained(lambda c: c.load_state_dict({} if c.rank else lacking), settings)
    with pytest.raises(autopart.PartitionError, match=r"gain is \[2, 2\], not \[7, 3\]"):
        trained(lambda c: c.load_state_dict({**other, "gain": torch.ones(2, 2)}), settings)


@pytest.mark.parametrize("settings", [{"pp": 1}, {"pp": 2}, {"dp": 2, "zero": 2}, {"tp": 2}], ids=str)
def test_float16_is_scaled(settings: dict[str, Any]) -> None:
    """Gradients below float16's smallest number are there, those that overflow are not taken and halve the scale."""
    x = batches(1)[0]
    small = {name: value * (0.01 if name == "last.bias" else 0.02) for name, value in Model().state_dict().items()}
    alone = Model().double()
    alone.load_state_dict(small)
    one_process(alone, {"x": x.double()})

    def run(compiled: Compiled) -> Any:
        compiled.load_state_dict(small)
        compiled.optimizer(torch.optim.SGD, lr=0.0)
        compiled.step({"x": x})
        gradients, factor = compiled.full_gradients(), compiled.executor.loss_scale.factor  # type: ignore[union-attr]
        compiled.executor.loss_scale.factor = 1e30  # type: ignore[union-attr]
        compiled.step({"x": x})
        return gradients, factor, compiled.skipped, compiled.executor.loss_scale.factor  # type: ignore[union-attr]

    (gradients, _, skipped, factor), _ = trained(run, {**settings, "precision": "float16", "master": "float32"})
    expected = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
    assert expected["second.weight"].abs().max() < 2**-24
    assert worst_error(gradients, expected)[0] < 0.02
    assert (skipped, factor) == (1, 5e29)
