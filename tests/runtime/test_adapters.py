"""Low-rank adapters beside frozen weights, as LoRA has them: trained as in one process, frozen weights as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from on_ranks import on_ranks, split_by
from torch import Tensor, nn

from autopart.compile.check import one_process, worst_error
from autopart.runtime.compiled import Compiled

WIDTH, RANK, STEPS = 8, 2, 3


class Adapted(nn.Module):
    """A frozen linear layer with an adapter, whose modules are called as peft calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        adapted: Tensor = self.base_layer(x) + self.lora_B(self.lora_A(x)) * 2.0
        return adapted


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = Adapted(), Adapted(), nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.first(x.to(self.head.weight.dtype)).relu())
        loss: Tensor = self.head(hidden).float().square().mean()
        return loss


@pytest.mark.parametrize("settings", split_by("first.base_layer.weight dim 0 over tp"), ids=str)
def test_adapters_alone_are_trained(settings: dict[str, Any]) -> None:
    batches = list(torch.randn(STEPS, 4, WIDTH, generator=torch.Generator().manual_seed(1)))
    alone, losses = Model(), []
    optimizer = torch.optim.AdamW((p for p in alone.parameters() if p.requires_grad), lr=0.05, weight_decay=0.5)
    for x in batches:
        losses.append(float(one_process(alone, {"x": x})[0]))
        nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
        optimizer.step()

    def run(compiled: Compiled) -> Any:
        compiled.optimizer(torch.optim.AdamW, lr=0.05, weight_decay=0.5)
        found = [float(compiled.step({"x": x}, clip_grad_norm=0.1)) for x in batches]
        return found, compiled.full_gradients(), compiled.full_state_dict()

    models: list[nn.Module] = [
        Model() for _ in range(settings.get("pp", 1) * settings.get("dp", 1) * settings.get("tp", 1))
    ]
    found, gradients, state = on_ranks(models, batches[0], run, same=True, nodes=5, **settings)[0]
    assert found == pytest.approx(losses, rel=1e-5)
    assert set(gradients) == {name for name, p in alone.named_parameters() if p.requires_grad}
    assert worst_error(state, alone.state_dict())[0] < 1e-5
    frozen = {name: p for name, p in Model().named_parameters() if not p.requires_grad}
    assert len(frozen) == 6 and all(torch.equal(state[name].to(p.dtype), p) for name, p in frozen.items())
