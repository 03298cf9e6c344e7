"""Ranks of tests/runtime/test_torch_compile.py: they train with torch.compile and without."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from ranks import run_forked
from torch import Tensor, nn
from torch.nn import functional as F
from traces import traced_once

import autopart
from autopart.compile.check import worst_error
from autopart.compile.variants import variant
from autopart.hardware.mesh import Mesh
from autopart.passes.source import Source
from autopart.planner.make_plan import make_plan, request_of
from autopart.runtime.torch_compile import TorchCompile

WIDTH, LENGTH = 8, 6


class Block(nn.Module):
    """Attention and an MLP, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.drop(self.down(F.gelu(self.up(x))))


class Model(nn.Module):
    """Blocks and a head, with the mean of cross-entropies over the words that are not masked."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(24, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 24)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class NoBlocks(nn.Module):
    """Layers that are all different, and batch norm, whose buffers change with every step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.first = nn.Embedding(24, WIDTH), nn.Linear(WIDTH, 12)
        self.norm, self.last = nn.BatchNorm1d(12), nn.Linear(12, 24)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.norm(self.first(self.words(ids)).flatten(0, 1)).relu()
        return F.cross_entropy(self.last(x), labels.flatten())


@cache
def made(model: type[nn.Module]) -> nn.Module:
    """One model for all programs, which do not change it."""
    return model()


def batch(samples: int, length: int) -> dict[str, Tensor]:
    """Words, of which some count towards no loss."""
    ids = torch.randint(24, (samples, length), generator=torch.Generator().manual_seed(samples))
    return {"ids": ids, "labels": torch.where(ids % 5 == 0, -100, ids)}


BATCHES = [batch(8, LENGTH), batch(4, 3), batch(8, LENGTH)]


def trained(model: nn.Module, mesh: str, compile: TorchCompile, settings: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """What steps with batches of two sizes, and an evaluation in between, lead to: losses, gradients, weights."""
    compiled = autopart.compile(model, mesh, BATCHES[0], seed=3, nodes=5, compile=compile, **settings)
    compiled.optimizer(torch.optim.SGD, lr=0.1)
    found = {f"loss {i}": compiled.step(each).detach() for i, each in enumerate(BATCHES)}
    found["evaluated"] = compiled.evaluate(BATCHES[0])
    return [found, compiled.full_gradients(), compiled.full_state_dict()]


def compared(model: type[nn.Module], mesh: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """How far training with torch.compile is from training without, and how many graphs torch.compile made."""
    graphs = list[torch.fx.GraphModule]()

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    with traced_once():
        eager = trained(made(model), mesh, False, settings)
        other = trained(made(model), mesh, {"backend": backend}, settings)
    far = [worst_error({k: v.double() for k, v in a.items()}, b) for a, b in zip(other, eager, strict=True)]
    return {"far": far, "graphs": len(graphs)}


def be_a_rank(table: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Train under every configuration; rank 0 leaves what it found in the folder."""
    found = [compared(Model, "4:cpu", settings) for settings in table]
    if os.environ["RANK"] == "0":
        (folder / "found.json").write_text(json.dumps(found))


def train(table: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """`be_a_rank` on four forks of this process, which has traced for them."""
    torch.set_num_threads(1)
    with traced_once():
        for settings in table:
            request = request_of(made(Model), BATCHES[0], nodes=5, **settings)
            source = Source.of(made(Model), BATCHES[0], request)
            plan = make_plan(source, Mesh.of("4:cpu"), request, to_run=True)
            layered = source.full(plan.micro_batch, plan.mesh)
            for batch, mode in ((BATCHES[1], None), (BATCHES[0], ())):
                variant(source, plan, layered, plan.dp, 0, lambda make: make(), batch, len(batch["ids"]), mode)
        run_forked(partial(be_a_rank, table, folder), 4)
