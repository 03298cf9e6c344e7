"""GPT-X: a decoder with ReZero gates in place of norms and with explicit sparse attention, and the recipe beyond it.

ReZero (Bachlechner et al., arXiv 2003.04887) is x + a f(x), with a number a for each sublayer f that begins at 0. In
explicit sparse attention (Zhao et al., arXiv 1912.11637) a query attends to the `top_k` keys of the largest scores.

Three switches make the recipe:

    macaron             half of an MLP before attention and half of another behind it (Lu et al., arXiv 1906.02762)
    residual_attention  scores are added to those of the layer before, ahead of masks (He et al., arXiv 2012.11747)
    alibi               minus a slope times the distance is added to the scores that are not handed on (Press et al.,
                        arXiv 2108.12409); there are no learned positions then

With `residual_attention` two tensors pass from block to block: states (samples, tokens, width) and scores (samples,
heads, tokens, tokens).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    """The sizes of GPT-X 1B unless told."""

    vocabulary: int = 22000
    tokens: int = 1024
    width: int = 2048
    layers: int = 20
    heads: int = 16
    top_k: int = 8
    macaron: bool = False
    residual_attention: bool = False
    alibi: bool = False


class Embedding(nn.Module):
    """Tokens (samples, tokens) -> states (samples, tokens, width), with learned positions unless ALiBi is on."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocabulary, config.width)
        self.positions = None if config.alibi else nn.Embedding(config.tokens, config.width)

    def forward(self, input_ids: Tensor) -> Tensor:
        states: Tensor = self.words(input_ids)
        if self.positions is None:
            return states
        return states + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))


class SparseAttention(nn.Module):
    """Causal attention of every query to the keys of its `top_k` largest scores; of equal scores to all."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.top_k, self.residual = config.heads, config.top_k, config.residual_attention
        self.query, self.key, self.value, self.out = (nn.Linear(config.width, config.width) for _ in range(4))
        slopes = 2.0 ** (-8.0 * torch.arange(1, config.heads + 1) / config.heads) if config.alibi else None
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(self, states: Tensor, carried: Tensor | None) -> tuple[Tensor, Tensor | None]:
        q, k, v = (
            part(states).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if carried is not None:
            scores = scores + carried
        handed_on = scores if self.residual else None
        place = torch.arange(states.shape[1], device=states.device)
        distance = place[:, None] - place
        if self.slopes is not None:
            scores = scores - (self.slopes[:, None, None] * distance).to(scores.dtype)
        scores = scores.masked_fill(distance < 0, -torch.inf)
        least = scores.topk(min(self.top_k, len(place)), dim=-1).values[..., -1:]
        weights = scores.masked_fill(scores < least, -torch.inf).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2)), handed_on


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(states)))
        return out


class Block(nn.Module):
    """Attention and an MLP of 4 x width; with `macaron` an MLP of 2 x width on either side of attention."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        d = config.width
        self.before = Mlp(d, 2 * d) if config.macaron else None
        self.attention = SparseAttention(config)
        self.mlp = Mlp(d, 2 * d if config.macaron else 4 * d)
        self.gate_before = nn.Parameter(torch.zeros(())) if config.macaron else None
        self.gate_attention, self.gate_mlp = (nn.Parameter(torch.zeros(())) for _ in range(2))

    def forward(self, states: Tensor, carried: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if self.before is not None:
            states = states + self.gate_before * self.before(states)
        attended, carried = self.attention(states, carried)
        states = states + self.gate_attention * attended
        return states + self.gate_mlp * self.mlp(states), carried


class Head(nn.Module):
    """The untied last linear map, and the mean cross-entropy of every token after the first."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.words = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, states: Tensor, labels: Tensor) -> Tensor:
        logits = self.words(states[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


class GPTX(nn.Module):
    """Tokens (samples, tokens) and labels of the same shape -> the loss."""

    def __init__(self, config: Config = Config()) -> None:
        super().__init__()
        self.embedding = Embedding(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = Head(config)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        states, carried = self.embedding(input_ids), None
        for layer in self.layers:
            states, carried = layer(states, carried)
        loss: Tensor = self.head(self.norm(states), labels)
        return loss
