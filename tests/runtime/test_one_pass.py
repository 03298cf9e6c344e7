"""The optimizer's step by one kernel: as torch's own step, in every way to train, and in turns with it.

The Triton interpreter is chosen when Triton is first imported: a child process (this file run as a script) trains all
cases on a CPU.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopart
from autopart.compile.check import worst_error
from autopart.runtime import one_pass
from autopart.runtime.compiled import Compiled
from benchmarks.gpu import updates
from tests.support.interpreted import interpreted as interpreted_child
from tests.support.on_ranks import on_ranks, split_by
from tests.support.tied_model import TiedModel as Model

ON, OFF, TURNS = [True] * 6, [False] * 6, [True, False, False, True, True, False]
HALF = {"precision": "bfloat16", "master": "float32"}
SCALED = {"precision": "float16", "master": "float32"}
SETTINGS: dict[str, dict[str, Any]] = {
    str(settings): settings
    for settings in [
        *(s for s in split_by("first.weight dim 0 over tp") if "master" not in s),
        {"pp": 1, **SCALED},
        {"dp": 2, "zero": 1, **HALF},  # all are slices; of whole weights the interpreter truncates bfloat16
        {"tp": 2, "constraints": ["split first.weight dim 0 over tp"], **SCALED},
        *({"dp": 2, "zero": zero, **SCALED} for zero in (2, 3)),
    ]
}
TAKEN: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], bool]] = {
    "AdamW": (torch.optim.AdamW, {}, True),
    "Adam": (torch.optim.Adam, {}, True),
    "Adam, decoupled": (torch.optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}, True),
    "Adam, coupled": (torch.optim.Adam, {"weight_decay": 0.1}, False),
    **{name: (torch.optim.AdamW, {name: True}, False) for name in ("amsgrad", "maximize", "foreach", "fused")},
    "lr as a tensor": (torch.optim.AdamW, {"lr": torch.tensor(0.05)}, False),
    "SGD": (torch.optim.SGD, {}, False),
    "a class of its own": (type("Own", (torch.optim.AdamW,), {}), {}, False),
}
"""Optimizer and its settings, and whether the kernel steps it."""


def batch(step: int) -> dict[str, Tensor]:
    return {"x": torch.randn(4, 8, generator=torch.Generator().manual_seed(step))}


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    decayed, others = [[p for p in parameters if (p.dim() >= 2) == wide] for wide in (True, False)]
    return [{"params": decayed, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0, "lr": 0.02}]


class Steps:
    """Counts launches of the kernel, one after the other: the interpreter is not made for threads."""

    def __init__(self) -> None:
        self.lock, self.count, self.launch = Lock(), 0, one_pass.adamw_together

    def __call__(self, *arguments: Any) -> None:
        with self.lock:
            self.count += 1
            self.launch(*arguments)


def train(compiled: Compiled, model: nn.Module, kernel: Sequence[bool]) -> dict[str, Any]:
    """Steps, by the kernel where `kernel` says so, with groups, a schedule, clipping, freezing and, in float16, a step
    that is skipped."""
    optimizer = compiled.optimizer(torch.optim.AdamW(groups_of(model), lr=0.05))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    losses = []
    for step, compiled.executor.one_pass in enumerate(kernel):
        model.second.weight.requires_grad_(step != 1)  # type: ignore[operator, union-attr]
        if compiled.executor.loss_scale:
            compiled.executor.loss_scale.factor = 1e30 if step == 2 else 2.0**10
        losses.append(float(compiled.step(batch(step), clip_grad_norm=0.1)))
        scheduler.step()
    states = {f"{p.origin.name} {k}": s[k].clone() for p, s in optimizer.state.items() for k in s}  # type: ignore[attr-defined]
    found = {**compiled.full_state_dict(), **states}
    return {"losses": losses, "state": found, "gradients": compiled.full_gradients(), "skipped": compiled.skipped}


def trained(settings: dict[str, Any], kernel: Sequence[bool]) -> Any:
    """What rank 0 has after the steps, and how often the kernel was launched."""
    size = settings.get("pp", 1) * settings.get("dp", 1) * settings.get("tp", 1)
    models: list[nn.Module] = [Model() for _ in range(size)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_pass, "adamw_together", counted := Steps())
        run = partial(on_ranks, models, batch(0)["x"], lambda c: train(c, models[c.rank], kernel))
        return run(same=True, nodes=5, **settings)[0], counted.count


def difference(mine: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Largest error of losses, weights, states and gradients, relative to the largest of each."""
    losses = max(abs(a - b) / abs(b) for a, b in zip(mine["losses"], theirs["losses"], strict=True))
    assert mine["skipped"] == theirs["skipped"]
    return max(losses, *(worst_error(mine[part], theirs[part])[0] for part in ("state", "gradients")))


def compared(settings: dict[str, Any]) -> dict[str, Any]:
    """The steps by the kernel, and by the kernel and by torch in turns, against all steps by torch."""
    (torchs, none), (kernel, launches), (turns, _) = (trained(settings, ways) for ways in (OFF, ON, TURNS))
    found = {"launches": launches, "none": none, "skipped": kernel["skipped"]}
    return found | {"error": difference(kernel, torchs), "turns": difference(turns, torchs)}


def resumed() -> float:
    """The largest difference of steps that go on from a checkpoint, saved and loaded with and without the kernel."""
    ends = []
    for first, second in itertools.product((True, False), repeat=2):
        with tempfile.TemporaryDirectory() as folder:
            for kernel, steps in ((first, range(3)), (second, range(3, 6))):
                model = Model()
                compiled = autopart.compile(model, "1:cpu", batch(0), nodes=5, no_fuse=[] if kernel else ["adamw"])
                optimizer = compiled.optimizer(torch.optim.AdamW(groups_of(model), lr=0.05))
                scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
                if steps.start:
                    compiled.load(Path(folder), scheduler=scheduler)
                for step in steps:
                    compiled.step(batch(step), clip_grad_norm=0.1)
                    scheduler.step()
                compiled.save(Path(folder), scheduler=scheduler)
            ends.append(compiled.full_state_dict())
    return max(worst_error(end, ends[-1])[0] for end in ends)


def launches(name: str) -> int:
    """Launches of the kernel in a step of an optimizer."""
    make, options, _ = TAKEN[name]
    model = Model()
    compiled = autopart.compile(model, "1:cpu", batch(0), nodes=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_pass, "adamw_together", counted := Steps())
        compiled.optimizer(make(model.parameters(), **{"lr": 0.05, **options}))
        compiled.step(batch(0))
    return counted.count


def hooked() -> tuple[int, float]:
    """Launches where hooks are called before and after a step, and the norm that they see of clipped gradients."""
    model = Model()
    compiled = autopart.compile(model, "1:cpu", batch(0), nodes=5)
    optimizer = compiled.optimizer(torch.optim.AdamW, lr=0.05)
    seen = []

    def hook(optimizer: Any, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        seen.append(float(torch.stack([g.norm() for g in gradients]).norm()))

    optimizer.register_step_post_hook(hook)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_pass, "adamw_together", counted := Steps())
        compiled.step(batch(0), clip_grad_norm=0.01)
    return counted.count, seen[0]


def lions() -> float:
    """The largest difference of Lion's steps by its kernel from those of the formula."""
    torch.manual_seed(0)
    weights = [torch.randn(5, 3), torch.randn(7)]
    parameters, means = [nn.Parameter(w.clone()) for w in weights], [torch.zeros_like(w) for w in weights]
    optimizer = autopart.Lion(parameters, lr=0.1, weight_decay=0.5)
    for _ in range(3):
        for w, m, p in zip(weights, means, parameters, strict=True):
            p.grad = torch.randn_like(p)
            w.mul_(1 - 0.1 * 0.5).sub_(0.1 * (0.9 * m + 0.1 * p.grad).sign())
            m.mul_(0.99).add_(p.grad, alpha=0.01)
        optimizer.step()
    return max(float((a - b.detach()).abs().max()) for a, b in zip(weights, parameters, strict=True))


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    return interpreted_child(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_steps_by_the_kernel_are_torchs(name: str, interpreted: dict[str, Any]) -> None:
    found = interpreted[name]
    assert found["launches"] >= sum(ON) - 1 and found["none"] == 0, found
    assert max(found["error"], found["turns"]) < 2e-6, found
    assert found["skipped"] == (SETTINGS[name].get("precision") == "float16"), found


@pytest.mark.slow
def test_checkpoints_go_on_with_and_without_the_kernel(interpreted: dict[str, Any]) -> None:
    assert interpreted["resumed"] < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", TAKEN)
def test_the_kernel_steps_only_what_it_computes(name: str, interpreted: dict[str, Any]) -> None:
    assert interpreted["launches"][name] == TAKEN[name][2]


@pytest.mark.slow
def test_hooks_see_clipped_gradients(interpreted: dict[str, Any]) -> None:
    launched, norm = interpreted["hooked"]
    assert launched == 0 and norm == pytest.approx(0.01, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("model", ["GPT-2 XL"])
def test_on_a_gpu_the_kernel_steps_as_torch_does(model: str) -> None:
    found = updates.measure(model, "cuda")
    assert found["status"] == "ok", found
    assert found["autopart"]["workspace"] < found["torch"]["workspace"]


@pytest.mark.slow
def test_lion_steps_by_its_formula(interpreted: dict[str, Any]) -> None:
    assert interpreted["lion"] < 1e-6 and lions() < 1e-6


def test_on_a_cpu_torch_steps() -> None:
    assert launches("AdamW") == 0


if __name__ == "__main__":
    results: dict[str, Any] = {name: compared(settings) for name, settings in SETTINGS.items()}
    results |= {"launches": {name: launches(name) for name in TAKEN}}
    results |= {"resumed": resumed(), "hooked": hooked(), "lion": lions()}
    print(json.dumps(results))
