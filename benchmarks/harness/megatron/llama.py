"""A stage of Llama."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.megatron.groups import Place
from benchmarks.harness.megatron.layers import Column, Row, attention, embedded, next_token_loss, on_share


class Norm(nn.Module):
    """An RMSNorm of hidden states, whole or split along the sequence."""

    def __init__(self, norm: Any, place: Place) -> None:
        super().__init__()
        self.weight, self.eps = on_share(norm.weight, place), norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """(s, b, n) to (s, b, n)."""
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Layer(nn.Module):
    """Attention and gated perceptron. Queries, keys and values are one product, gate and up another."""

    def __init__(self, layer: Any, place: Place) -> None:
        super().__init__()
        attn, mlp = layer.self_attn, layer.mlp
        self.norm_1, self.norm_2 = Norm(layer.input_layernorm, place), Norm(layer.post_attention_layernorm, place)
        weights = [place.part(p.weight) for p in (attn.q_proj, attn.k_proj, attn.v_proj)]
        self.widths = [len(weight) for weight in weights]
        self.qkv = Column(torch.cat(weights), None, place)
        self.out = Row(place.part(attn.o_proj.weight, 1), None, place)
        self.gate_up = Column(torch.cat([place.part(p.weight) for p in (mlp.gate_proj, mlp.up_proj)]), None, place)
        self.down = Row(place.part(mlp.down_proj.weight, 1), None, place)
        self.size = attn.head_dim

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(s, b, n) to (s, b, n)."""
        parts = self.qkv(self.norm_1(x)).split(self.widths, 2)
        q, k, v = (part.unflatten(2, (-1, self.size)) for part in parts)
        x = x + self.out(attention(rotated(q, cos, sin), rotated(k, cos, sin), v))
        gate, up = self.gate_up(self.norm_2(x)).chunk(2, 2)
        return x + self.down(nn.functional.silu(gate) * up)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embeddings of (s, b, heads, size), whose halves are the two coordinates."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Llama(nn.Module):
    """The embedding on the first stage, some layers, and the head on the last."""

    def __init__(self, model: Any, place: Place) -> None:
        super().__init__()
        inner, layers = model.model, len(model.model.layers)
        mine = range(place.stage * layers // place.pp, (place.stage + 1) * layers // place.pp)
        self.place = place
        self.embedding = nn.Parameter(place.part(inner.embed_tokens.weight).detach().clone()) if place.first else None
        self.layers = nn.ModuleList(Layer(inner.layers[i], place) for i in mine)
        self.norm = Norm(inner.norm, place) if place.last else None
        self.head = nn.Parameter(place.part(model.lm_head.weight).detach().clone()) if place.last else None
        positions = torch.arange(model.config.max_position_embeddings, device=model.lm_head.weight.device)[None]
        cos, sin = inner.rotary_emb(model.lm_head.weight, positions)
        self.cos, self.sin = cos[0, :, None, None].detach(), sin[0, :, None, None].detach()

    @property
    def tied(self) -> nn.Parameter | None:
        """Nothing is shared by stages."""
        return None

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Tokens (b, s) or hidden states to hidden states or the loss."""
        if self.embedding is not None:
            x = embedded(x, self.embedding, self.place)
        cos, sin = self.cos[: labels.shape[1]], self.sin[: labels.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return x if self.norm is None else next_token_loss(self.norm(x), self.head, labels, self.place)
