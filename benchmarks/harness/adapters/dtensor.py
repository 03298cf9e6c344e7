"""DTensor's tensor parallelism (torch.distributed.tensor.parallel) with a plan by hand.

GPT-2's products are Conv1D, which ColwiseParallel and RowwiseParallel do not take. They are rewritten into nn.Linear
first, and c_attn into three of them, since equal shares of its rows would mix queries with keys. Its head is its
embedding: both are split by vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module

from autopart.compile.bench.setting import Setting, Step, plain_step
from benchmarks.harness.models import name_of


class Projections(nn.Module):
    """c_attn as a product each for queries, keys and values."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        parts = zip(conv.weight.chunk(3, dim=1), conv.bias.chunk(3), strict=True)
        self.q, self.k, self.v = (linear(weight, bias) for weight, bias in parts)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to (..., 3 x width of this rank)."""
        return torch.cat((self.q(x), self.k(x), self.v(x)), dim=-1)


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A Conv1D's product as nn.Linear, whose weight is transposed."""
    made = nn.Linear(weight.shape[0], weight.shape[1], device=weight.device)
    with torch.no_grad():
        made.weight.copy_(weight.t())
        made.bias.copy_(bias)
    return made


def parallel_gpt2(model: Any, setting: Setting) -> dict[str, Any]:
    """Rewrites the model for DTensor; which of its layers are split how."""
    for block in model.transformer.h:
        block.attn.c_attn = Projections(block.attn.c_attn)
        block.attn.split_size //= setting.size
        for owner, name in ((block.attn, "c_proj"), (block.mlp, "c_fc"), (block.mlp, "c_proj")):
            conv = getattr(owner, name)
            setattr(owner, name, linear(conv.weight, conv.bias))
    columns, rows = ("attn.c_attn.q", "attn.c_attn.k", "attn.c_attn.v", "mlp.c_fc"), ("attn.c_proj", "mlp.c_proj")
    return {
        "transformer.wte": RowwiseParallel(input_layouts=Replicate()),
        **{f"transformer.h.*.{name}": ColwiseParallel() for name in columns},
        **{f"transformer.h.*.{name}": RowwiseParallel() for name in rows},
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }


def parallel_llama(model: Any, setting: Setting) -> dict[str, Any]:
    """Which of Llama's layers are split how; the loss takes logits that are split along the vocabulary."""
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    rows = ("self_attn.o_proj", "mlp.down_proj")
    return {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        **{f"model.layers.*.{name}": ColwiseParallel() for name in columns},
        **{f"model.layers.*.{name}": RowwiseParallel() for name in rows},
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }


PLANS: Mapping[str, Callable[[Any, Setting], dict[str, Any]]] = {"gpt2": parallel_gpt2, "llama": parallel_llama}


def build(setting: Setting) -> tuple[Step, str]:
    """All ranks split every layer; embedding and loss are split by vocabulary."""
    model: Any = setting.copy_of_model()
    plan = PLANS[name_of(model)](model, setting)
    tied = model.config.tie_word_embeddings
    model = parallelize_module(model, setting.device_mesh(("tp", setting.size)), plan)
    if tied:  # which parallelize_module splits apart: each style makes a parameter of its own
        model.lm_head.weight = model.transformer.wte.weight
    return dtensor_step(model, setting), f"tp={setting.size}, embedding and loss split by vocabulary"


def dtensor_step(model: nn.Module, setting: Setting) -> Step:
    """A step of a model that has parameters that are DTensors, and others, which an optimizer does not mix."""
    kinds: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        kinds[isinstance(parameter, DTensor)].append(parameter)
    groups = [{"params": kind} for kind in kinds.values() if kind]
    step = plain_step(model, setting.whole_batch(), setting.optimizer_of(groups))

    def parallel_step() -> Tensor:
        with loss_parallel():
            loss = step()
        return loss.full_tensor() if isinstance(loss, DTensor) else loss

    return parallel_step
