"""Plans held against one process: from the shell, with operators without a rule, and with ranks that fail."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS, build
from torch import nn
from typer.testing import CliRunner, Result

import autopart
from autopart.cli.main import app
from autopart.plan.data import Plan
from autopart.plan.text import missing
from autopart.runtime.groups import Groups
from autopart.runtime.simulated import run_simulated

pytestmark = pytest.mark.usefixtures("traced_once")

Tensor = torch.Tensor
TINY = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 16}


def shell(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """The config of a tiny model."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY))
    return str(file)


@pytest.mark.slow
def test_check_tells_how_far_a_plan_is_off(tiny: str, tmp_path: Path) -> None:
    degrees = ("--pp", 2, "--tp", 2, "--batch", 4, "--micro-batch", 2)
    result = shell("check", tiny, "4:cpu", *degrees, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    errors = {"loss_error", "gradient_error", "worst", "buffer_error", "worst_buffer"}
    assert set(told) == {"loss", "against", *errors}
    assert told["against"] == "the model" and told["loss_error"] < 1e-5 and told["gradient_error"] < 1e-5
    assert shell("plan", tiny, "4:cpu", *degrees, "--save", tmp_path / "plan.json").exit_code == 0
    saved = shell("check", tiny, "--plan", tmp_path / "plan.json")
    assert saved.stdout.startswith(f"{told['loss']:.6g} is the loss, off by "), saved.output
    for command in (("check",), ("emit", "--to", tmp_path / "emitted"), ("run",)):
        other = shell(*command[:1], tiny, "2:cpu", "--plan", tmp_path / "plan.json", *command[1:])
        assert other.exit_code == 2 and "the plan is for 4 ranks, the mesh has 2" in other.output


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS if "AUTOPART_EXAMPLES" in os.environ else ["llama", "bert", "t5", "mlp"])
def test_one_sample_at_a_time(name: str, tmp_path: Path) -> None:
    """One sample may be traced as another graph than several, of which the planner thinks."""
    model, batch = build(name, layers=1 if name == "t5" else 2)
    plan = autopart.plan(model, "4:cpu", batch, pp=2, tp=2, micro_batch=1)
    assert plan.micro_batches == len(next(iter(batch.values())))
    plan.save(tmp_path / "plan.json")
    saved = Plan.load(tmp_path / "plan.json")
    autopart.certify(saved, model, batch)
    assert autopart.price_plan(saved, model, batch).step_seconds == pytest.approx(plan.step_seconds, rel=1e-9)
    found = autopart.check(model, "4:cpu", batch, plan=saved)
    assert found.loss_error < 1e-5 and found.gradient_error < 1e-5


class Moody(nn.Module):
    """A model that is not in the mood it was traced in."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.line(x) * (1.0 if torch.compiler.is_exporting() else 2.0)).square().mean()


def test_check_finds_what_is_wrong() -> None:
    found = autopart.check(Moody(), "2:cpu", {"x": torch.randn(4, 8)}, dp=2, micro_batch=4)
    assert found.loss_error == pytest.approx(0.75, rel=1e-3) and found.worst.startswith("line.")
    assert found.gradient_error == pytest.approx(0.75, rel=1e-3)


@pytest.mark.slow
def test_random_models_are_held_against_one_rank(tiny: str) -> None:
    result = shell("check", tiny, "2:cpu", "--tp", 2, "--batch", 4, "--micro-batch", 4, "--dropout", "--json")
    told = json.loads(result.stdout)
    assert told["against"] == "its one-rank program" and told["gradient_error"] < 1e-5


@torch.library.custom_op("autopart_tests::fold", mutates_args=())
def fold(x: Tensor) -> Tensor:
    """An operator that no rule knows."""
    return x * x.flip(-1)


@torch.library.custom_op("autopart_tests::flat", mutates_args=())
def flat(x: Tensor) -> Tensor:
    """Another, of less work."""
    return x.sum(-1)


def keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def fold_backward(ctx: Any, gradient: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return gradient * x.flip(-1) + (gradient * x).flip(-1)


def flat_backward(ctx: Any, gradient: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return gradient[..., None].expand_as(x).clone()


fold.register_fake(torch.empty_like)
flat.register_fake(lambda x: x.new_empty(x.shape[:-1]))
fold.register_autograd(fold_backward, setup_context=keep)
flat.register_autograd(flat_backward, setup_context=keep)


class Unruly(nn.Module):
    """Blocks with an operator without a rule, and a cheaper one at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + fold(layer(x).tanh())
        return flat(x.narrow(-1, 0, 2)).square().mean()


@pytest.fixture(scope="module")
def unruly() -> autopart.Check:
    torch.manual_seed(0)
    return autopart.check(Unruly(), "4:cpu", {"x": torch.randn(8, 64)}, pp=2, tp=2, micro_batch=4)


@pytest.mark.slow
def test_operators_without_a_rule_train_exactly(unruly: autopart.Check) -> None:
    assert unruly.loss_error < 1e-5 and unruly.gradient_error < 1e-5
    assert set(unruly.plan.replicated) == {"autopart_tests.fold", "autopart_tests.flat"}


@pytest.mark.slow
def test_the_costliest_missing_rule_comes_first(unruly: autopart.Check, tmp_path: Path) -> None:
    rows = missing(unruly.plan)
    assert [(name, calls) for name, calls, _ in rows] == [("autopart_tests.fold", 4), ("autopart_tests.flat", 1)]
    assert rows[0][2] > rows[1][2] > 0
    file = tmp_path / "plan.json"
    unruly.plan.save(file)
    told = json.loads(shell("show", file, "--missing", "--json").stdout)
    assert [(row["operator"], row["calls"], row["seconds"]) for row in told] == rows
    lines = shell("show", file, "--missing").stdout.splitlines()
    assert [line.split()[:3] for line in lines] == [[name, str(calls), "calls"] for name, calls, _ in rows]


class Numbered(nn.Module):
    """Blocks whose layers are called by numbers; no gradient flows into the first."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@pytest.mark.parametrize("settings", [{"pp": 2, "dp": 1, "tp": 1}, {"pp": 1, "dp": 2, "tp": 1}])
def test_layers_called_by_numbers(settings: dict[str, int]) -> None:
    torch.manual_seed(0)
    model, batch = Numbered(), {"x": torch.randn(4, 8)}
    found = autopart.check(model, "2:cpu", batch, **settings)
    assert max(found.loss_error, found.gradient_error) < 1e-5
    autopart.certify(found.plan, model, batch)


class Streams(nn.Module):
    """Two streams a sample, whose elements are picked by indices that no input reaches, streams first."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(24, 16)

    def forward(self, ids: Tensor) -> Tensor:
        n, length = ids.shape
        values = self.words(ids).unflatten(2, (2, 8)).transpose(1, 2).flatten(0, 2)
        index = (torch.arange(length)[:, None] + torch.arange(length)) % 8
        index = index.expand(1, n, length, length).repeat(2, 1, 1, 1).reshape(-1, length)
        return values.gather(1, index).square().mean()


@pytest.mark.parametrize("dp", [2, 4])
def test_a_dim_that_only_seems_to_count_samples(dp: int) -> None:
    """Two streams are as many as the samples that the planner traces, and fewer than the ranks."""
    batch = {"ids": torch.randint(24, (4, 6), generator=torch.Generator().manual_seed(0))}
    found = autopart.check(Streams(), f"{dp}:cpu", batch, dp=dp)
    assert max(found.loss_error, found.gradient_error) < 1e-5, found


@pytest.mark.slow
def test_no_missing_rules_are_told(tiny: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert shell("plan", tiny, "2:cpu", "--tp", 2, "--batch", 4, "--micro-batch", 4, "--save", file).exit_code == 0
    assert Plan.load(file).replicated == ()
    assert shell("show", file, "--missing").stdout == "every operator has a rule\n"
    assert json.loads(shell("show", file, "--missing", "--json").stdout) == []


class Own(Exception):
    """What a rank raises."""


def in_a_collective(groups: Groups) -> None:
    groups.tp.all_reduce(torch.ones(2))


def in_a_receive(groups: Groups) -> None:
    groups.pp.receive(torch.ones(2), 1 - groups.pp.rank).wait()


def late(groups: Groups) -> None:
    time.sleep(0.3)
    in_a_collective(groups)


def late_receive(groups: Groups) -> None:
    time.sleep(0.3)
    in_a_receive(groups)


@pytest.mark.timeout(60)  # others would wait for ever
@pytest.mark.parametrize("others", [in_a_collective, in_a_receive, late, late_receive])
@pytest.mark.parametrize("delay", [0.0, 0.2])
@pytest.mark.parametrize("failing", [0, 3])
def test_a_rank_that_fails_ends_all(others: Callable[[Groups], Any], delay: float, failing: int) -> None:
    def run(groups: Groups) -> None:
        if groups.pp.rank * 2 + groups.tp.rank == failing:
            time.sleep(delay)
            raise Own(failing)
        while True:
            others(groups)

    with pytest.raises(Own, match=str(failing)):
        run_simulated(2, 1, 2, run)
