"""Models that return no loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

import autopart
from autopart.compile.check import one_process, worst_error
from autopart.frontend.with_loss import with_loss


class Classifier(nn.Module):
    """Returns logits; a batch also has targets, and the weights of samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.drop, self.first, self.last = nn.Dropout(0.0), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(F.dropout(self.first(x).relu(), 0.0, self.training))
        return logits


def weighted(logits: Tensor, batch: Any) -> Tensor:
    return (F.cross_entropy(logits, batch["target"], reduction="none") * batch["weight"]).mean()


BATCH = {"x": torch.randn(4, 8), "target": torch.tensor([0, 3, 1, 2]), "weight": torch.rand(4)}


@pytest.mark.parametrize("settings", [{"tp": 2}, {"dp": 2, "micro_batch": 2}, {"pp": 2}], ids=str)
def test_a_loss_of_outputs_and_batch(settings: dict[str, Any]) -> None:
    found = autopart.check(Classifier(), "2:cpu", BATCH, loss=weighted, nodes=5, **settings)
    assert found.loss == pytest.approx(float(weighted(Classifier()(BATCH["x"]), BATCH).detach()), rel=1e-6)
    assert max(found.loss_error, found.gradient_error) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_stage_returns_the_loss_in_its_dtype(dtype: torch.dtype) -> None:
    """Those without the loss too, from the first step on."""
    from autopart.compile.simulate import simulate

    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in BATCH.items()}
    found = simulate(Classifier().to(dtype), "2:cpu", batch, loss=weighted, nodes=5, pp=2)
    assert found.loss.dtype == dtype


def test_questions_about_its_plan() -> None:
    plan = autopart.plan(Classifier(), "2:cpu", BATCH, loss=weighted, nodes=5, tp=2)
    explained = autopart.explain(Classifier(), "2:cpu", BATCH, loss=weighted, nodes=5, tp=2)
    assert explained.plan.signature == plan.signature and explained.why()
    assert autopart.price_plan(plan, Classifier(), BATCH, loss=weighted).step_seconds == pytest.approx(
        plan.step_seconds
    )
    (report,) = autopart.memory_report(plan, Classifier(), BATCH, loss=weighted)
    assert sum(report.memory.values()) == pytest.approx(plan.memory_bytes[0])
    autopart.certify(plan, Classifier(), BATCH, loss=weighted)
    best, *_ = autopart.search_mesh(Classifier(), BATCH, loss=weighted, devices="2x1:cpu", nodes=5, tp=2)
    assert best.plan is not None and best.plan.signature == plan.signature


def test_training_with_it() -> None:
    """By the names and the modes of the model itself."""
    model, alone = Classifier(), Classifier()
    compiled = autopart.compile(model, "1:cpu", BATCH, loss=weighted, nodes=5)
    compiled.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        wanted = weighted(alone(BATCH["x"]), BATCH)
        wanted.backward()
        optimizer.step()
        assert float(compiled.step(BATCH)) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert worst_error(compiled.full_state_dict(), alone.state_dict())[0] < 1e-5
    with torch.no_grad():
        assert float(compiled.evaluate(BATCH)) == pytest.approx(float(weighted(alone(BATCH["x"]), BATCH)), rel=1e-5)
        _, outputs = compiled.evaluate(BATCH, outputs=["output"])
        assert worst_error(outputs, {"output": alone(BATCH["x"])})[0] < 1e-5
    assert compiled.plan.model == "Classifier"


def test_outputs_of_transformers() -> None:
    """A loss of an output with names, on a model that has a loss of its own for labels."""
    torch.manual_seed(0)
    config = hf.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=32, n_positions=8, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = hf.GPT2LMHeadModel(config)
    batch = {"input_ids": torch.randint(32, (4, 8)), "reward": torch.rand(4)}

    def loss(outputs: Any, batch: Any) -> Tensor:
        value: Tensor = (outputs.logits.float().logsumexp(-1).mean(-1) * batch["reward"]).mean()
        return value

    wanted, gradients = one_process(with_loss(model, loss), batch)
    found = autopart.simulate(model, "2:cpu", batch, loss=loss, pp=2, nodes=5)
    assert float(found.loss) == pytest.approx(float(wanted), rel=1e-6)
    assert worst_error(found.gradients, gradients)[0] < 1e-5


def test_a_mode_is_the_models() -> None:
    model = Classifier()
    wrapped = with_loss(model, weighted)
    model.eval()
    assert not wrapped.training
    wrapped.train()
    assert model.training and model.drop.training
    assert with_loss(model, None) is model
    with pytest.raises(autopart.PartitionError, match="loss=1 is no function"):
        with_loss(model, 1)  # type: ignore[arg-type]
