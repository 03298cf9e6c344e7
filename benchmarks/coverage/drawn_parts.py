"""Parts of language models as people write them by hand, with what differs between them drawn at random.

A part takes and gives hidden states of (batch, tokens, width).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

Tensor = torch.Tensor
MOST_TOKENS = 32


@dataclass(frozen=True)
class Shape:
    """Sizes of a drawn model: `width` of the hidden state, `heads` of attention, `tokens` of a sample."""

    width: int
    heads: int
    tokens: int

    @property
    def head(self) -> int:
        return self.width // self.heads


Part = Callable[[random.Random, Shape], nn.Module]


def causal(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


# ---- mixers: [batch, tokens, width] -> the same -----------------------------------------------------------


class ByHand(nn.Module):
    """Attention as einsums or products, with a bias of the scores by kind."""

    def __init__(self, draw: random.Random, shape: Shape) -> None:
        super().__init__()
        self.shape, self.kind = shape, draw.choice(("causal", "alibi", "window", "relative", "softcap"))
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=draw.random() < 0.5)
        self.out = nn.Linear(shape.width, shape.width, bias=draw.random() < 0.5)
        self.einsum, self.drop = draw.random() < 0.5, nn.Dropout(draw.choice((0.0, 0.0, 0.1)))
        self.register_buffer("mask", causal(MOST_TOKENS), persistent=draw.random() < 0.5)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, shape.heads + 1), persistent=False)
        if self.kind == "relative":
            self.relative = nn.Embedding(MOST_TOKENS, shape.heads)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        of_heads = (batch, tokens, self.shape.heads, self.shape.head)
        q, k, v = (each.view(of_heads).transpose(1, 2) for each in self.qkv(x).split(width, dim=-1))
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) if self.einsum else q @ k.transpose(-1, -2)
        scores = scores / math.sqrt(self.shape.head)
        place = torch.arange(tokens, device=x.device)
        apart = place[:, None] - place[None, :]
        mask = self.mask[:tokens, :tokens]
        if self.kind == "alibi":
            scores = scores - self.slopes[:, None, None] * apart.abs()
        elif self.kind == "window":
            mask = mask & (apart < 3)
        elif self.kind == "relative":
            scores = scores + self.relative(apart.clamp(min=0)).permute(2, 0, 1)
        elif self.kind == "softcap":
            scores = 5 * torch.tanh(scores / 5)
        weights = self.drop(scores.masked_fill(~mask, float("-inf")).softmax(-1))
        return self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class Fused(nn.Module):
    """scaled_dot_product_attention with grouped keys."""

    def __init__(self, draw: random.Random, shape: Shape) -> None:
        super().__init__()
        self.shape, self.groups = shape, draw.choice([g for g in (1, 2, shape.heads) if shape.heads % g == 0])
        self.q = nn.Linear(shape.width, shape.width, bias=False)
        self.kv = nn.Linear(shape.width, 2 * self.groups * shape.head, bias=draw.random() < 0.5)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        self.rotary, self.norm = draw.random() < 0.5, draw.random() < 0.3

    def turned(self, x: Tensor) -> Tensor:
        angles = torch.outer(
            torch.arange(x.shape[-2], dtype=x.dtype, device=x.device),
            100.0 ** -(torch.arange(0, self.shape.head, 2, dtype=x.dtype, device=x.device) / self.shape.head),
        )
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q = self.q(x).view(batch, tokens, self.shape.heads, -1).transpose(1, 2)
        k, v = self.kv(x).view(batch, tokens, 2, self.groups, -1).permute(2, 0, 3, 1, 4)
        if self.norm:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        if self.rotary:
            q, k = self.turned(q), self.turned(k)
        k, v = (each.repeat_interleave(self.shape.heads // self.groups, dim=1) for each in (k, v))
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(found.transpose(1, 2).reshape(batch, tokens, width))


class Module(nn.Module):
    """nn.MultiheadAttention."""

    def __init__(self, draw: random.Random, shape: Shape) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(shape.width, shape.heads, batch_first=True, bias=draw.random() < 0.5)
        self.weights = draw.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        mask = ~causal(x.shape[1]).to(x.device)
        found: Tensor = self.attention(x, x, x, attn_mask=mask, need_weights=self.weights)[0]
        return found


class Recurrent(nn.Module):
    """GRU, LSTM or RNN over tokens."""

    def __init__(self, draw: random.Random, shape: Shape) -> None:
        super().__init__()
        kind = draw.choice((nn.GRU, nn.LSTM, nn.RNN))
        self.cell = kind(shape.width, shape.width, num_layers=draw.choice((1, 1, 2)), batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.cell(x)[0]
        return found


class Convolution(nn.Module):
    """A causal convolution over tokens, by channel or of all channels."""

    def __init__(self, draw: random.Random, shape: Shape) -> None:
        super().__init__()
        self.size = draw.choice((2, 3, 4))
        self.convolution = nn.Conv1d(shape.width, shape.width, self.size, groups=draw.choice((1, shape.width)))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.convolution(F.pad(x.transpose(1, 2), (self.size - 1, 0))).transpose(1, 2)
        return found


class Running(nn.Module):
    """Linear attention: running sums of keys times values."""

    def __init__(self, draw: random.Random, shape: Shape) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(shape.width, shape.width, bias=False) for _ in range(3))
        self.feature = draw.choice((lambda x: F.elu(x) + 1, F.softplus, torch.sigmoid))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.feature(self.q(x)), self.feature(self.k(x)), self.v(x)
        return q * (k * v).cumsum(1) / (k.cumsum(1) + 1)


# ---- what follows: [batch, tokens, width] -> the same -----------------------------------------------------


class Mlp(nn.Module):
    """Two linear maps around an activation, gated or not."""

    def __init__(self, draw: random.Random, shape: Shape) -> None:
        super().__init__()
        wide = shape.width * draw.choice((2, 3, 4))
        self.act = draw.choice((F.gelu, F.silu, F.relu, torch.tanh, lambda x: F.relu(x).square(), F.mish))
        self.gated = draw.random() < 0.5
        self.up = nn.Linear(shape.width, wide * (1 + self.gated), bias=draw.random() < 0.5)
        self.down = nn.Linear(wide, shape.width, bias=draw.random() < 0.5)
        self.drop = nn.Dropout(draw.choice((0.0, 0.0, 0.2)))

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        if self.gated:
            gate, up = up.chunk(2, dim=-1)
            up = self.act(gate) * up
        else:
            up = self.act(up)
        found: Tensor = self.down(self.drop(up))
        return found


class Experts(nn.Module):
    """A mixture of experts: every expert in a loop, weighted, or the chosen ones as one batched product."""

    def __init__(self, draw: random.Random, shape: Shape) -> None:
        super().__init__()
        self.count, self.chosen, self.loop = 4, draw.choice((1, 2)), draw.random() < 0.5
        self.router = nn.Linear(shape.width, self.count, bias=False)
        self.up = nn.Parameter(torch.randn(self.count, shape.width, 2 * shape.width) / 8)
        self.down = nn.Parameter(torch.randn(self.count, 2 * shape.width, shape.width) / 8)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        best, which = scores.topk(self.chosen, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, which, best / best.sum(-1, keepdim=True))
        if self.loop:
            found = torch.zeros_like(x)
            for e in range(self.count):
                found = found + weights[..., e, None] * (F.gelu(x @ self.up[e]) @ self.down[e])
            return found
        inner = F.gelu(torch.einsum("btd,edf->btef", x, self.up))
        return torch.einsum("btef,efd,bte->btd", inner, self.down, weights)


class Counted(nn.Module):
    """A linear map whose output is divided by a buffer that counts steps, or by a running size."""

    def __init__(self, draw: random.Random, shape: Shape) -> None:
        super().__init__()
        self.linear, self.running = nn.Linear(shape.width, shape.width), draw.random() < 0.5
        self.register_buffer("size", torch.ones(()) if self.running else torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(x) / self.size.clone()  # as autograd asks of what changes
        with torch.no_grad():
            if self.running:
                self.size.mul_(0.9).add_(0.1 * x.square().mean())
            else:
                self.size += 1
        return found


def _shifted(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:] += x[:, :-1]
    y[..., ::2].mul_(0.5)
    return y


def _scattered(x: Tensor) -> Tensor:
    places = torch.arange(x.shape[1], device=x.device) // 2
    sums = x.new_zeros(len(x), x.shape[1], x.shape[2]).index_add(1, places, x)
    return sums.gather(1, places[None, :, None].expand_as(x))


def _best(x: Tensor) -> Tensor:
    least = x.topk(3, dim=-1).values[..., -1:]
    return torch.where(x >= least, x, torch.zeros_like(x))


def _windows(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1).mean(-1)


def _ranked(x: Tensor) -> Tensor:
    ordered, places = x.sort(dim=-1, descending=True)
    return x.scatter(-1, places, ordered.cumsum(-1))


def _spectrum(x: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(x, dim=1) * 0.5, n=x.shape[1], dim=1)


ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted": _shifted, "scattered": _scattered, "best": _best, "windows": _windows, "ranked": _ranked,
    "spectrum": _spectrum,
    "rolled": lambda x: x.roll(1, dims=1) + x.flip(1),
    "running": lambda x: x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None],
    "soft maximum": lambda x: x.logcumsumexp(1),
    "centred": lambda x: (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1).sqrt(),
    "distances": lambda x: torch.cdist(x, x).softmax(-1) @ x,
    "outer": lambda x: torch.einsum("bti,btj,bj->bti", x, x, x.mean(1)),
    "parts": lambda x: torch.cat([p.sigmoid() for p in x.split([1, x.shape[-1] - 1], -1)], -1),
    "stacked": lambda x: torch.stack(x.unbind(1)[::-1], 1),
    "tiled": lambda x: x.repeat(1, 2, 1)[:, : x.shape[1]] + x.tile(1, 1, 2)[..., : x.shape[-1]],
    "pooled": lambda x: F.interpolate(F.avg_pool1d(x.transpose(1, 2), 2, ceil_mode=True), x.shape[1]).transpose(1, 2),
    "greatest": lambda x: F.max_pool1d(F.pad(x.transpose(1, 2), (2, 0)), 3, 1).transpose(1, 2),
    "differences": lambda x: F.pad(x.diff(dim=1), (0, 0, 1, 0)),
    "lengths": lambda x: x / (x.norm(dim=-1, keepdim=True) + x.abs().amax((1, 2), keepdim=True) + 1),
    "hot": lambda x: F.one_hot(x.argmax(-1), x.shape[-1]).to(x.dtype) * x,
    "triangle": lambda x: (x @ x.transpose(1, 2)).tril().clamp(-1, 1) @ x,
    "between": lambda x: torch.lerp(x, x.detach().abs(), 0.3).nan_to_num(),
    "folded": lambda x: x.reshape(len(x), -1, 2).prod(-1).repeat_interleave(2, -1).reshape(x.shape),
    "noise": lambda x: x + 0.1 * torch.randn_like(x),
    "gumbel": lambda x: F.gumbel_softmax(x, dim=-1) * x,
    "alpha": lambda x: F.alpha_dropout(x, 0.1, True),
    "selected": lambda x: x.index_select(1, torch.arange(x.shape[1] - 1, -1, -1, device=x.device)),
    "masked": lambda x: x.masked_fill(x.detach() > 1, 0.0).addcmul(x, x, value=0.1),
}  # fmt: skip


class Odd(nn.Module):
    """One of the operators in ODD between two linear maps."""

    def __init__(self, draw: random.Random, shape: Shape) -> None:
        super().__init__()
        self.kind = draw.choice(list(ODD))
        self.into, self.out = nn.Linear(shape.width, shape.width), nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(ODD[self.kind](self.into(x)))
        return found


class Layer(nn.Module):
    """torch's own layer of a Transformer, with cross-attention or not."""

    def __init__(self, draw: random.Random, shape: Shape) -> None:
        super().__init__()
        self.crosses = draw.random() < 0.5
        kind = nn.TransformerDecoderLayer if self.crosses else nn.TransformerEncoderLayer
        first, act = draw.random() < 0.5, draw.choice(("relu", "gelu"))
        self.layer = kind(shape.width, shape.heads, 2 * shape.width, 0.0, act, batch_first=True, norm_first=first)

    def forward(self, x: Tensor) -> Tensor:
        mask = ~causal(x.shape[1]).to(x.device)
        found: Tensor = self.layer(x, x.flip(1), tgt_mask=mask) if self.crosses else self.layer(x, src_mask=mask)
        return found


class Normed(nn.Module):
    """Convolutions with a norm by groups of channels, by channel, or by weight."""

    def __init__(self, draw: random.Random, shape: Shape) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(shape.width, shape.width, 3, padding=1, groups=draw.choice((1, 2)))
        if draw.random() < 0.3:
            self.convolution = nn.utils.parametrizations.weight_norm(self.convolution)
        norms = (nn.GroupNorm(2, shape.width), nn.InstanceNorm1d(shape.width, affine=True), nn.BatchNorm1d(shape.width))
        self.norm = draw.choice(norms)
        self.act = draw.choice((nn.PReLU(), nn.ELU(), nn.Hardswish(), nn.Softplus(), nn.GELU("tanh")))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.act(self.norm(self.convolution(x.transpose(1, 2)))).transpose(1, 2)
        return found


# ---- norms ------------------------------------------------------------------------------------------------


class Rms(nn.Module):
    """RMSNorm by hand, Llama's or Gemma's."""

    def __init__(self, draw: random.Random, shape: Shape) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.rand(shape.width)), draw.choice((0.0, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (self.shift + self.weight)


MIXERS: tuple[Part, ...] = (ByHand, ByHand, Fused, Module, Recurrent, Convolution, Running, Odd, Odd, Layer, Normed)
FOLLOWERS: tuple[Part, ...] = (Mlp, Mlp, Experts, Counted, Odd, Odd)
NORMS: tuple[Part, ...] = (
    lambda draw, shape: nn.LayerNorm(shape.width, elementwise_affine=draw.random() < 0.8),
    Rms,
    lambda draw, shape: nn.RMSNorm(shape.width),
    lambda draw, shape: nn.Identity(),
)


def named(part: nn.Module) -> str:
    """The class of a part, and its kind."""
    return "/".join([type(part).__name__, *([part.kind] if isinstance(part, ByHand | Odd) else ())])
