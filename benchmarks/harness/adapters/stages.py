"""Stages of GPT-2 and Llama for torch.distributed.pipelining, cut by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Gpt2Stage(nn.Module):
    """Some of GPT-2's blocks, with the embeddings before the first of them and the head after the last."""

    def __init__(self, model: Any, blocks: range) -> None:
        super().__init__()
        inner = model.transformer
        self.blocks = nn.ModuleList(inner.h[i] for i in blocks)
        first, last = blocks.start == 0, blocks.stop == len(inner.h)
        self.wte, self.wpe = (inner.wte, inner.wpe) if first else (None, None)
        self.ln_f, self.lm_head = (inner.ln_f, model.lm_head) if last else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens or hidden states to hidden states or logits."""
        if self.wte is not None and self.wpe is not None:
            x = self.wte(x) + self.wpe(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            x = block(x)
        return x if self.lm_head is None or self.ln_f is None else self.lm_head(self.ln_f(x))


class LlamaStage(nn.Module):
    """Some of Llama's layers, with the embedding before the first of them and the head after the last."""

    def __init__(self, model: Any, blocks: range) -> None:
        super().__init__()
        inner = model.model
        self.blocks = nn.ModuleList(inner.layers[i] for i in blocks)
        first, last = blocks.start == 0, blocks.stop == len(inner.layers)
        self.embed_tokens = inner.embed_tokens if first else None
        self.rotary_emb = inner.rotary_emb
        self.norm, self.lm_head = (inner.norm, model.lm_head) if last else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens or hidden states to hidden states or logits."""
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        rotary = self.rotary_emb(x, position_ids=positions)
        for block in self.blocks:
            x = block(x, position_embeddings=rotary)
        return x if self.lm_head is None or self.norm is None else self.lm_head(self.norm(x))


STAGES: Mapping[str, tuple[Callable[[Any, range], nn.Module], Callable[[Any], Tensor | None]]] = {
    "gpt2": (Gpt2Stage, lambda model: model.transformer.wte.weight),
    "llama": (LlamaStage, lambda model: None),
}
"""What makes a stage, and the weight that the first and the last stage share."""
