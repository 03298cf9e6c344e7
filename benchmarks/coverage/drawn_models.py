"""Language models drawn at random: blocks of parts that people write by hand, and the settings that train them.

A model is drawn whole from its seed: the mixers of tokens, what follows them, norms, gates, skips, buffers that
training changes, parameters that are shared, and the loss. All computes in float64, so that what is exact is to 1e-9.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Tensor = torch.Tensor
VOCABULARY = 48
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


# ---- norms ------------------------------------------------------------------------------------------------


class Rms(nn.Module):
    """RMSNorm by hand, Llama's or Gemma's."""

    def __init__(self, draw: random.Random, shape: Shape) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.rand(shape.width)), draw.choice((0.0, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (self.shift + self.weight)


MIXERS: tuple[Part, ...] = (ByHand, ByHand, Fused, Fused, Module, Recurrent, Convolution, Running)
FOLLOWERS: tuple[Part, ...] = (Mlp, Mlp, Mlp, Experts, Counted)
NORMS: tuple[Part, ...] = (
    lambda draw, shape: nn.LayerNorm(shape.width, elementwise_affine=draw.random() < 0.8),
    Rms,
    lambda draw, shape: nn.RMSNorm(shape.width),
    lambda draw, shape: nn.Identity(),
)
GATES = ("none", "none", "scalar", "vector", "sigmoid", "path")


class Block(nn.Module):
    """A mixer and what follows it, each with a norm and a residual that may be gated."""

    def __init__(self, draw: random.Random, shape: Shape, mixer: Part, follower: Part, norm: Part, gate: str) -> None:
        super().__init__()
        self.mixer, self.follower = mixer(draw, shape), follower(draw, shape)
        self.norms, self.gate = nn.ModuleList([norm(draw, shape), norm(draw, shape)]), gate
        if gate == "scalar":
            self.gates = nn.ParameterList([nn.Parameter(torch.full((1,), 0.5)) for _ in range(2)])
        elif gate == "vector":
            self.gates = nn.ParameterList([nn.Parameter(torch.rand(shape.width)) for _ in range(2)])
        elif gate == "sigmoid":
            self.gates = nn.ModuleList([nn.Linear(shape.width, 1) for _ in range(2)])

    def gated(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        if self.gate == "sigmoid":
            return x + torch.sigmoid(self.gates[index](x)) * y
        if self.gate == "path" and self.training:
            return x + y * (torch.rand(len(x), 1, 1, dtype=x.dtype, device=x.device) < 0.9) / 0.9
        return x + self.gates[index] * y if self.gate in ("scalar", "vector") else x + y

    def forward(self, x: Tensor) -> Tensor:
        x = self.gated(0, x, self.mixer(self.norms[0](x)))
        return self.gated(1, x, self.follower(self.norms[1](x)))


LOSSES = ("mean", "mean", "ignored", "smoothed", "z", "sum", "contrastive", "pooled")


class Drawn(nn.Module):
    """A language model drawn at random: forward(ids, labels) gives its loss.

    ids, labels  [batch, tokens] int64; `parts` names what was drawn
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(f"model {seed}")
        heads = draw.choice((2, 4))
        shape = Shape(heads * draw.choice((4, 8)), heads, draw.choice((5, 8, 12)))
        kinds = [
            (draw.choice(MIXERS), draw.choice(FOLLOWERS), draw.choice(NORMS), draw.choice(GATES))
            for _ in range(draw.choice((1, 1, 2)))
        ]
        count = draw.choice((2, 3, 4, 6))
        self.shape, self.loss, self.skip = shape, draw.choice(LOSSES), draw.choice(("none", "none", "first", "u"))
        self.counts_blocks, self.positions = draw.random() < 0.2, draw.random() < 0.5
        self.embedding = nn.Embedding(VOCABULARY, shape.width)
        if self.positions:
            self.places = nn.Embedding(MOST_TOKENS, shape.width)
        shared = Block(draw, shape, *kinds[0]) if draw.random() < 0.15 else None
        same = random.Random(draw.random()).getstate()
        self.blocks = nn.ModuleList()
        for index in range(count):
            one = random.Random()
            one.setstate(same)  # blocks of a kind are equal
            self.blocks.append(shared or Block(one, shape, *kinds[index % len(kinds)]))
        self.norm = NORMS[draw.randrange(len(NORMS))](draw, shape)
        self.head = nn.Linear(shape.width, VOCABULARY, bias=draw.random() < 0.3)
        if draw.random() < 0.4 and self.head.bias is None:
            self.head.weight = self.embedding.weight
        self.parts = " ".join([
            f"{shape.width}x{heads}x{shape.tokens}", f"{count} blocks" + (" shared" if shared else ""),
            *(f"{type(b.mixer).__name__}{'/' + b.mixer.kind if isinstance(b.mixer, ByHand) else ''}"
              f"+{type(b.follower).__name__}+{type(b.norms[0]).__name__}+{b.gate}"
              for b in list(self.blocks)[: len(kinds)]),
            f"loss {self.loss}", f"skip {self.skip}",
        ])  # fmt: skip

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(ids)
        if self.positions:
            x = x + self.places(torch.arange(ids.shape[1], device=ids.device))
        first, passed = x, []
        for index, block in enumerate(self.blocks):
            if self.skip == "u" and index >= len(self.blocks) - index and passed:
                x = x + passed.pop()
            elif self.skip == "u":
                passed.append(x)
            x = block(x)
        x = self.norm(x + first if self.skip == "first" else x)
        if self.counts_blocks:
            x = x / len(self.blocks)
        return self.error(x, self.head(x), labels)

    def error(self, x: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        flat, wanted = logits.flatten(0, 1), labels.flatten()
        if self.loss == "ignored":
            return F.cross_entropy(flat, wanted.masked_fill(wanted < 5, -100))
        if self.loss == "smoothed":
            return F.cross_entropy(flat, wanted, label_smoothing=0.1)
        if self.loss == "z":
            return F.cross_entropy(flat, wanted) + 1e-2 * logits.logsumexp(-1).square().mean()
        if self.loss == "sum":
            return F.cross_entropy(flat, wanted, reduction="sum") / len(wanted)
        if self.loss == "contrastive":
            one, other = F.normalize(x.mean(1), dim=-1), F.normalize(logits.mean(1)[:, : x.shape[-1]], dim=-1)
            return F.cross_entropy(one @ other.T * 5, torch.arange(len(one), device=x.device))
        if self.loss == "pooled":
            return (x.mean(1).sum(-1) - labels.to(x.dtype).mean(1) / VOCABULARY).square().mean()
        return F.cross_entropy(flat, wanted)


def build(seed: int) -> tuple[Drawn, dict[str, Tensor]]:
    """The model of a seed and its batch, the same every time."""
    torch.manual_seed(seed)
    model = Drawn(seed).double()
    samples = random.Random(f"batch {seed}").choice((4, 6, 8, 8, 12))
    of_batch = (samples, model.shape.tokens)
    return model, {name: torch.randint(VOCABULARY, of_batch) for name in ("ids", "labels")}


def settings(seed: int, trial: int, samples: int) -> tuple[str, Mapping[str, Any]]:
    """A mesh and settings of `autopart.plan` for a batch of so many samples: trial 0 leaves all to the planner."""
    draw = random.Random(f"settings {seed} {trial}")
    ranks = draw.choice((2, 4, 4, 8))
    if not trial:
        return f"{ranks}:cpu", {}
    found: dict[str, Any] = {}
    left = ranks
    for axis in draw.sample(("pp", "dp", "tp"), 3)[: draw.choice((1, 2, 3))]:
        found[axis] = draw.choice([n for n in (1, 2, 4) if left % n == 0])
        left //= found[axis]
    if len(found) == 3:
        found.pop(draw.choice(list(found)))
    found |= draw.choice(({}, {"zero": 1}, {"zero": 2}, {"zero": 3}, {"zero": 3}))
    if found.get("zero") == 3 and draw.random() < 0.5:
        found["prefetch"] = draw.choice((1, 16))
    if found.get("zero") and found.get("dp", 1) == 4 and draw.random() < 0.5:
        found["shard_size"] = 2
    found |= draw.choice(({}, *({"recompute": mode} for mode in ("none", "selective", "mincut", "full"))))
    found |= draw.choice(({}, {}, {"schedule": "gpipe"}, {"schedule": "1f1b"}, {"micro_batch": samples // 2}))
    return f"{ranks}:cpu", found
