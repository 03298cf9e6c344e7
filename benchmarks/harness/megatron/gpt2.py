"""A stage of GPT-2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.megatron.groups import Place
from benchmarks.harness.megatron.layers import Column, Row, attention, embedded, next_token_loss, on_share


class Norm(nn.Module):
    """A LayerNorm of hidden states, whole or split along the sequence."""

    def __init__(self, norm: nn.LayerNorm, place: Place) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = on_share(norm.weight, place), on_share(norm.bias, place), norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """(s, b, n) to (s, b, n)."""
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Block(nn.Module):
    """Attention and perceptron. The queries, keys and values of this rank's heads are one product."""

    def __init__(self, block: Any, place: Place) -> None:
        super().__init__()
        attn, mlp = block.attn, block.mlp
        self.ln_1, self.ln_2 = Norm(block.ln_1, place), Norm(block.ln_2, place)
        thirds = (attn.c_attn.weight.t().chunk(3), attn.c_attn.bias.chunk(3))
        weight, bias = (torch.cat([place.part(third) for third in each]) for each in thirds)
        self.qkv = Column(weight, bias, place)
        self.out = Row(place.part(attn.c_proj.weight.t(), 1), attn.c_proj.bias, place)
        self.up = Column(place.part(mlp.c_fc.weight.t()), place.part(mlp.c_fc.bias), place)
        self.down = Row(place.part(mlp.c_proj.weight.t(), 1), mlp.c_proj.bias, place)
        self.size = attn.head_dim

    def forward(self, x: Tensor) -> Tensor:
        """(s, b, n) to (s, b, n)."""
        q, k, v = self.qkv(self.ln_1(x)).unflatten(2, (3, -1, self.size)).unbind(2)
        x = x + self.out(attention(q, k, v))
        return x + self.down(nn.functional.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class Gpt2(nn.Module):
    """Embeddings on the first stage, some blocks, and the head, which is the embedding, on the last."""

    def __init__(self, model: Any, place: Place) -> None:
        super().__init__()
        inner, layers = model.transformer, len(model.transformer.h)
        mine = range(place.stage * layers // place.pp, (place.stage + 1) * layers // place.pp)
        self.place = place
        ends = place.first or place.last
        self.wte = nn.Parameter(place.part(inner.wte.weight).detach().clone()) if ends else None
        self.wpe = on_share(inner.wpe.weight, place) if place.first else None
        self.blocks = nn.Sequential(*(Block(inner.h[i], place) for i in mine))
        self.norm = Norm(inner.ln_f, place) if place.last else None

    @property
    def tied(self) -> nn.Parameter | None:
        """What the first and the last stage share."""
        return self.wte

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Tokens (b, s) or hidden states to hidden states or the loss."""
        place = self.place
        if self.wpe is not None:
            positions = self.wpe[: x.shape[1]]
            positions = positions.chunk(place.tp)[place.share] if place.sequence else positions
            x = embedded(x, self.wte, place) + positions[:, None]
        x = self.blocks(x)
        return x if self.norm is None else next_token_loss(self.norm(x), self.wte, labels, place)
