"""Small random models and random legal plans for them, drawn by hypothesis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from exact_worker import worst
from hypothesis import assume
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from autopart.compile.simulate import simulate_plan
from autopart.cost.liveness import MODES
from autopart.errors import PartitionError
from autopart.hardware.mesh import Mesh
from autopart.ir.graph import info
from autopart.ir.labels import is_block
from autopart.ir.layered_graph import LayeredGraph
from autopart.passes.formulate import formulate
from autopart.passes.source import Source
from autopart.passes.stage_graph import Splits
from autopart.plan.data import Plan
from autopart.plan.signature import Signature
from autopart.plan.stages import PlanStage
from autopart.planner.ilp_model import Model as Split
from autopart.sharding.strategy_table import Node, StrategyTable

Tensor = torch.Tensor
Sizes = Mapping[str, int]
SAMPLES = 4
MESH = Mesh.of("1x8:cpu")
STEPS: dict[str, Step] = {}
"""Every step a block may take: from [batch, seq, width] to the same."""


@dataclass(frozen=True)
class Step:
    """What a block may do: its parameters and buffers, each spelt in letters of `Sizes`, and the function."""

    parameters: Mapping[str, str]
    buffers: Mapping[str, str]
    run: Callable[..., Tensor]


@dataclass
class Context:
    """What a step may read besides its input: the sizes, the input of its block and of the one before it, the stem's
    output, the batch's ids, a mask made of them, and a weight that all blocks share."""

    sizes: Sizes
    first: Tensor
    before: Tensor
    stem: Tensor
    ids: Tensor
    mask: Tensor
    shared: Tensor


@dataclass(frozen=True)
class Recipe:
    """A model: its sizes, what it reads, its blocks (each a tuple of step and how many values back it reads), which
    weights are one, its loss, and which block's parameters are frozen (-1: those of none)."""

    sizes: tuple[tuple[str, int], ...]
    stem: str
    blocks: tuple[tuple[tuple[str, int], ...], ...]
    tied: bool
    twins: bool
    loss: str
    frozen: int = -1


def step(buffers: Mapping[str, str] | None = None, **parameters: str) -> Callable[[Callable[..., Tensor]], Any]:
    """Put a function among STEPS."""

    def add(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        STEPS[run.__name__] = Step(parameters, buffers or {}, run)
        return run

    return add


@step(weight="w w", bias="w")
def linear(c: Context, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


@step(weight="w w")
def linear_without_bias(c: Context, x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


@step(weight="s s", bias="s")
def linear_over_seq(c: Context, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x.transpose(1, 2), weight, bias).transpose(1, 2)


@step(up="2w w", down="w 2w", bias="w")
def mlp(c: Context, x: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, up)), down, bias)


@step(up="4w w", down="w 2w")
def gated_mlp(c: Context, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gate, value = F.linear(x, up).chunk(2, -1)
    return F.linear(F.silu(gate) * value, down)


@step(up="2w w")
def glu(c: Context, x: Tensor, up: Tensor) -> Tensor:
    return F.glu(F.linear(x, up), -1)


@step(weight="w", bias="w")
def layer_norm(c: Context, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


@step(weight="s w")
def layer_norm_of_two(c: Context, x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-2:], weight)


@step(weight="w")
def rms_norm(c: Context, x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3))


@step(weight="w", bias="w")
def group_norm(c: Context, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x.transpose(1, 2), c.sizes["n"], weight, bias).transpose(1, 2)


@step({"mean": "w", "var": "w"}, weight="w", bias="w")
def batch_norm(c: Context, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x.transpose(1, 2), mean, var, weight, bias, training=True).transpose(1, 2)


@step({"mean": "w"})
def running_mean(c: Context, x: Tensor, mean: Tensor) -> Tensor:
    mean.copy_(0.9 * mean + 0.1 * x.detach().mean((0, 1)))
    return x - mean


@step({"scale": "s w"})
def constant(c: Context, x: Tensor, scale: Tensor) -> Tensor:
    return x * scale


@step()
def softmax(c: Context, x: Tensor) -> Tensor:
    return x.softmax(-1) * x.shape[-1]


@step()
def softmax_over_seq(c: Context, x: Tensor) -> Tensor:
    return x.log_softmax(1)


@step()
def logsumexp(c: Context, x: Tensor) -> Tensor:
    return x - x.logsumexp(-1, keepdim=True)


@step()
def gelu(c: Context, x: Tensor) -> Tensor:
    return F.gelu(x)


@step()
def tanh(c: Context, x: Tensor) -> Tensor:
    return torch.tanh(x) + torch.sin(x)


@step()
def scaled(c: Context, x: Tensor) -> Tensor:
    return -x * 0.5 + x / 4


@step()
def square(c: Context, x: Tensor) -> Tensor:
    return x.square() / (1 + x.abs())


@step()
def residual(c: Context, x: Tensor) -> Tensor:
    return x + c.first


@step()
def difference(c: Context, x: Tensor) -> Tensor:
    return x - 0.5 * c.before


@step()
def lerp_to_stem(c: Context, x: Tensor) -> Tensor:
    return torch.lerp(x, c.stem, 0.25)


@step()
def maximum(c: Context, x: Tensor) -> Tensor:
    return torch.maximum(x, c.stem)


@step(weight="w")
def times_width(c: Context, x: Tensor, weight: Tensor) -> Tensor:
    return x * weight


@step(weight="s 1", bias="w")
def times_seq(c: Context, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addcmul(bias, x, weight)


@step(weight="1")
def times_one(c: Context, x: Tensor, weight: Tensor) -> Tensor:
    return x * weight + weight.sum()


@step()
def product_with_first(c: Context, x: Tensor) -> Tensor:
    return (x @ c.first.transpose(1, 2)) @ c.before / (x.shape[-1] * x.shape[1]) ** 0.5


@step()
def product_of_samples(c: Context, x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    return (flat.t() @ flat / flat.shape[0]).sum(0) + x


@step(weight="w h")
def einsum(c: Context, x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("bsw,wh,bth->btw", x, weight, F.linear(c.first, weight.t())) / x.shape[1]


@step(weight="3w w", bias="3w", out="w w")
def attention(c: Context, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    parts = F.linear(x, weight, bias).split(x.shape[-1], -1)
    q, k, v = (_heads(c, p) for p in parts)
    return F.linear(_merged(F.scaled_dot_product_attention(q, k, v, is_causal=True)), out)


@step(q="w w", k="w w", v="w w", out="w w")
def masked_attention(c: Context, x: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
    query, key, value = (_heads(c, F.linear(y, p)) for y, p in ((x, q), (c.stem, k), (c.stem, v)))
    size = x.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    mask = c.mask[:, None, None, :] | causal
    return F.linear(_merged(F.scaled_dot_product_attention(query, key, value, attn_mask=mask)), out)


@step(q="w w", k="h w", v="h w")
def eager_attention(c: Context, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = c.sizes["n"]
    query = _heads(c, F.linear(x, q))
    key, value = (F.linear(x, p)[:, None].expand(-1, heads, -1, -1) for p in (k, v))
    scores = query @ key.transpose(2, 3) / c.sizes["h"] ** 0.5
    scores = scores.masked_fill(~c.mask[:, None, None, :], -1e4)
    return _merged(scores.softmax(-1) @ value)


@step(k="h w", v="h w")
def grouped_attention(c: Context, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    key, value = (F.linear(x, p)[:, None] for p in (k, v))
    return _merged(F.scaled_dot_product_attention(_heads(c, x), key, value, enable_gqa=True))


def _heads(c: Context, x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], c.sizes["n"], c.sizes["h"]).transpose(1, 2)


def _merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


@step()
def rotary(c: Context, x: Tensor) -> Tensor:
    a, b = x.split([x.shape[-1] // 2, x.shape[-1] - x.shape[-1] // 2], -1)
    place = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
    return x * place.cos() + torch.cat((-b, a), -1) * place.sin()


@step()
def uneven_split(c: Context, x: Tensor) -> Tensor:
    a, b = x.split([1, x.shape[-1] - 1], -1)
    return torch.cat((b * 2, a), -1)


@step()
def cat_over_seq(c: Context, x: Tensor) -> Tensor:
    long = torch.cat((x, c.first, c.stem), 1)
    return long[:, ::3] + long[:, : x.shape[1]]


@step()
def cat_over_samples(c: Context, x: Tensor) -> Tensor:
    a, b = torch.tanh(torch.cat((x, c.first), 0)).chunk(2, 0)
    return a + 2 * b


@step()
def stack_and_unbind(c: Context, x: Tensor) -> Tensor:
    a, b = torch.stack((x, c.before), 2).softmax(2).unbind(2)
    return a * x + b


@step()
def minus_mean(c: Context, x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


@step()
def minus_mean_of_samples(c: Context, x: Tensor) -> Tensor:
    return x - 0.5 * x.mean((0, 2), keepdim=True)


@step()
def over_total(c: Context, x: Tensor) -> Tensor:
    return x / (1 + x.square().mean())


@step()
def over_std(c: Context, x: Tensor) -> Tensor:
    return x / (1 + x.std(-1, keepdim=True) + x.var(1, keepdim=True, unbiased=False))


@step()
def over_norm(c: Context, x: Tensor) -> Tensor:
    return x / (1 + torch.linalg.vector_norm(x, dim=-1, keepdim=True))


@step()
def plus_sum(c: Context, x: Tensor) -> Tensor:
    return x + x.sum(-1).unsqueeze(-1).expand_as(x) / x.shape[-1]


@step()
def plus_amax(c: Context, x: Tensor) -> Tensor:
    return x - x.amax(-1, keepdim=True) + x.amin(1, keepdim=True)


@step()
def max_with_indices(c: Context, x: Tensor) -> Tensor:
    values, indices = x.max(1, keepdim=True)
    return x + values + x.gather(1, indices.flip(2))


@step(weight="w w")
def pooled(c: Context, x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.sigmoid(F.linear(x[:, 0], weight))[:, None]


@step()
def cumsum(c: Context, x: Tensor) -> Tensor:
    return x.cumsum(1) / x.shape[1] + x.cumsum(-1) / x.shape[-1]


@step()
def sort(c: Context, x: Tensor) -> Tensor:
    return x.sort(-1).values + x


@step()
def top_two(c: Context, x: Tensor) -> Tensor:
    values, indices = x.topk(2, -1)
    return torch.zeros_like(x).scatter(-1, indices, values.softmax(-1)) + x


@step()
def gather_by_ids(c: Context, x: Tensor) -> Tensor:
    index = (c.ids % x.shape[1])[:, :, None].expand_as(x)
    return x.gather(1, index)


@step()
def rows_by_number(c: Context, x: Tensor) -> Tensor:
    return x.index_select(1, torch.arange(x.shape[1] - 1, -1, -1)) + x[:, [0] * x.shape[1]]


@step(weight="v w")
def embedding(c: Context, x: Tensor, weight: Tensor) -> Tensor:
    return x + F.embedding(c.ids, weight)


@step(weight="s w")
def positions(c: Context, x: Tensor, weight: Tensor) -> Tensor:
    return x + F.embedding(torch.arange(x.shape[1])[None], weight)


@step(weight="v w")
def one_hot(c: Context, x: Tensor, weight: Tensor) -> Tensor:
    return x * (F.one_hot(c.ids, c.sizes["v"]).to(x.dtype) @ weight)


@step()
def shifted(c: Context, x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 0))[:, :-1] + x


@step()
def padded(c: Context, x: Tensor) -> Tensor:
    return F.pad(x, (1, 1))[..., 2:] + x.roll(1, 1) + x.flip(2)


@step()
def narrowed(c: Context, x: Tensor) -> Tensor:
    return torch.cat((x[:, 1:], x.narrow(1, 0, 1)), 1) * x[:, -1:]


@step(weight="w w 3", bias="w")
def conv1d(c: Context, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv1d(x.transpose(1, 2), weight, bias, padding=1).transpose(1, 2)


@step(weight="w 1 3")
def depthwise_conv1d(c: Context, x: Tensor, weight: Tensor) -> Tensor:
    return F.conv1d(x.transpose(1, 2), weight, padding=1, groups=x.shape[-1]).transpose(1, 2)


@step()
def pool1d(c: Context, x: Tensor) -> Tensor:
    return F.avg_pool1d(x, 3, 1, 1) + F.max_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2)


@step()
def where(c: Context, x: Tensor) -> Tensor:
    return torch.where(x > c.stem, x, 0.5 * c.first)


@step()
def masked_fill(c: Context, x: Tensor) -> Tensor:
    return x.masked_fill(c.mask[..., None], 0.25)


@step()
def masked_mean(c: Context, x: Tensor) -> Tensor:
    weight = c.mask[..., None].to(x.dtype)
    return x + (x * weight).sum(1, keepdim=True) / (1 + weight.sum(1, keepdim=True))


@step()
def tril(c: Context, x: Tensor) -> Tensor:
    return x.tril() + 0.5 * x


@step()
def clamp(c: Context, x: Tensor) -> Tensor:
    return x.clamp(-1.0, 1.0) + F.relu(x)


@step()
def detached(c: Context, x: Tensor) -> Tensor:
    return x + x.detach().square().mean(-1, keepdim=True).sqrt()


@step()
def without_grad(c: Context, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = 1 / (1 + x.abs().amax((1, 2), keepdim=True))
    return x * scale


@step(weight="w w")
def reshaped(c: Context, x: Tensor, weight: Tensor) -> Tensor:
    flat = F.linear(x.reshape(-1, x.shape[-1]), weight)
    return flat.reshape(x.shape)


@step(weight="n")
def scaled_heads(c: Context, x: Tensor, weight: Tensor) -> Tensor:
    return (x.unflatten(2, (c.sizes["n"], c.sizes["h"])) * weight[:, None]).flatten(2)


@step()
def swapped_heads(c: Context, x: Tensor) -> Tensor:
    return x.unflatten(2, (c.sizes["n"], c.sizes["h"])).transpose(2, 3).flatten(2)


@step(weight="w w")
def batch_second(c: Context, x: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh(x.permute(1, 0, 2) @ weight).permute(1, 0, 2)


@step(weight="sw w")
def whole_sample(c: Context, x: Tensor, weight: Tensor) -> Tensor:
    return x + (x.flatten(1) @ weight).unsqueeze(1)


@step()
def repeated(c: Context, x: Tensor) -> Tensor:
    return x.repeat(1, 2, 1)[:, 1 : x.shape[1] + 1] + x.repeat_interleave(2, dim=2)[..., : x.shape[2]]


@step(weight="w+2h w", out="w w")
def fused_grouped_attention(c: Context, x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    size = c.sizes["h"]
    q, k, v = F.linear(x, weight).split([x.shape[-1], size, size], -1)
    return F.linear(_merged(F.scaled_dot_product_attention(_heads(c, q), k[:, None], v[:, None], enable_gqa=True)), out)


@step(weight="3w w", place="n s s")
def interleaved_attention(c: Context, x: Tensor, weight: Tensor, place: Tensor) -> Tensor:
    parts = F.linear(x, weight).view(*x.shape[:2], c.sizes["n"], 3, c.sizes["h"])
    q, k, v = (p.transpose(1, 2) for p in parts.unbind(3))
    return _merged(F.scaled_dot_product_attention(q, k, v, attn_mask=place))


@step(into="3w w", over="3w w", bias="3w", hidden="3w")
def gru(c: Context, x: Tensor, into: Tensor, over: Tensor, bias: Tensor, hidden: Tensor) -> Tensor:
    start = torch.zeros(1, x.shape[0], x.shape[2], dtype=x.dtype)
    return torch.gru(x, start, [into, over, bias, hidden], True, 1, 0.0, True, False, True)[0]


@step(weight="n n 3 3", bias="n")
def conv2d(c: Context, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    image = x.unflatten(2, (c.sizes["n"], c.sizes["h"])).permute(0, 2, 3, 1)
    return F.conv2d(image, weight, bias, padding=1).permute(0, 3, 1, 2).flatten(2)


@step()
def scatter_add(c: Context, x: Tensor) -> Tensor:
    index = (c.ids % x.shape[1])[:, :, None].expand_as(x)
    return x + torch.zeros_like(x).scatter_add(1, index, x)


@step()
def index_add(c: Context, x: Tensor) -> Tensor:
    return x.index_add(1, torch.zeros(x.shape[1], dtype=torch.long), c.first / x.shape[1])


@step()
def outer(c: Context, x: Tensor) -> Tensor:
    return (x[..., None] * c.first[..., None, :]).softmax(-1).sum(2)


@step()
def unfolded(c: Context, x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 1)).unfold(1, 3, 1).mean(-1)


@step()
def cosine(c: Context, x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1) * F.cosine_similarity(x, c.stem, dim=-1)[..., None] + x


@step()
def expanded_samples(c: Context, x: Tensor) -> Tensor:
    return (x[:, None].expand(-1, 2, -1, -1).flatten(0, 1).tanh()).unflatten(0, (-1, 2)).sum(1)


@step()
def first_sample(c: Context, x: Tensor) -> Tensor:
    return x + x[0]


@step(a="w 2h", b="2h w")
def low_rank(c: Context, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, a @ b)


@step(weight="w w", gain="w")
def scaled_weight(c: Context, x: Tensor, weight: Tensor, gain: Tensor) -> Tensor:
    return F.linear(x, weight * gain[:, None] / (1 + weight.norm(dim=1, keepdim=True)))


@step(weight="v w")
def auxiliary_loss(c: Context, x: Tensor, weight: Tensor) -> Tensor:
    return x * (1 + 0.1 * F.cross_entropy(F.linear(x, weight).flatten(0, 1), c.ids.flatten()))


@step(weight="v w")
def padded_embedding(c: Context, x: Tensor, weight: Tensor) -> Tensor:
    return x + F.embedding(c.ids, weight, padding_idx=1)


@step()
def shared_linear(c: Context, x: Tensor) -> Tensor:
    return F.linear(x, c.shared)


@step()
def shared_bias(c: Context, x: Tensor) -> Tensor:
    return x + c.shared[0]


@step()
def dropout(c: Context, x: Tensor) -> Tensor:
    return F.dropout(x, 0.25)


LOSSES = ("cross_entropy", "smooth", "mse", "mean_square", "sum_of_two", "two_means", "per_sample", "total",
          "nll", "weighted", "soft", "own_labels", "z", "binary", "huber")  # fmt: skip


class Block(nn.Module):
    """A numbered block of a recipe."""

    def __init__(self, steps: tuple[tuple[str, int], ...], sizes: Sizes) -> None:
        super().__init__()
        self.steps = steps
        for number, (name, _) in enumerate(steps):
            for key, letters in STEPS[name].buffers.items():
                self.register_buffer(f"{key}{number}", torch.rand(_shape(letters, sizes)) + 0.5)
            for key, letters in STEPS[name].parameters.items():
                self.register_parameter(f"{key}{number}", _parameter(_shape(letters, sizes)))

    def forward(self, x: Tensor, c: Context) -> Tensor:
        values = [c.before, x]
        for number, (name, back) in enumerate(self.steps):
            spec = STEPS[name]
            own = {key: getattr(self, f"{key}{number}") for key in (*spec.buffers, *spec.parameters)}
            values.append(spec.run(c, values[max(-1 - back, -len(values))], **own))
        return values[-1]


class Model(nn.Module):
    """A recipe's model; forward returns the loss."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        sizes = dict(recipe.sizes)
        self.recipe, self.sizes = recipe, sizes
        self.words = nn.Embedding(sizes["v"], sizes["w"])
        self.gain = _parameter((sizes["w"],))
        self.shared = _parameter((sizes["w"], sizes["w"]))
        self.blocks = nn.ModuleList(Block(steps, sizes) for steps in recipe.blocks)
        self.head = nn.Linear(sizes["w"], sizes["v"], bias=not recipe.tied)
        if recipe.tied:
            self.head.weight = self.words.weight
        if recipe.twins:
            _tie(self.blocks[0], self.blocks[-1])
        if recipe.frozen >= 0:
            self.blocks[recipe.frozen].requires_grad_(False)

    def forward(self, ids: Tensor, x: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        stem = {"ids": lambda: self.words(ids), "x": lambda: x, "both": lambda: self.words(ids) + x}[self.recipe.stem]()
        before = value = stem
        mask = ids > self.sizes["v"] // 3
        for block in self.blocks:
            before, value = value, block(value, Context(self.sizes, value, before, stem, ids, mask, self.shared))
        return self._loss(value, labels, target)

    def _loss(self, x: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        x = x * self.gain
        logits = self.head(x)
        flat, words = logits.flatten(0, 1), labels.flatten()
        match self.recipe.loss:
            case "cross_entropy":
                return F.cross_entropy(flat, words)
            case "smooth":
                return F.cross_entropy(logits.transpose(1, 2), labels, label_smoothing=0.1)
            case "mse":
                return F.mse_loss(x, target)
            case "mean_square":
                return logits.square().mean()
            case "sum_of_two":
                return F.cross_entropy(flat, words) + 0.1 * F.mse_loss(x, target)
            case "two_means":
                return x.mean() * 0.5 + (x.sum(-1) - target.sum(-1)).abs().mean()
            case "per_sample":
                each = F.cross_entropy(flat, words.clamp(min=0), reduction="none").view(labels.shape)
                return (each.mean(1) + x.square().mean((1, 2))).mean()
            case "nll":
                return F.nll_loss(flat.log_softmax(-1), words)
            case "weighted":
                return F.cross_entropy(flat, words, torch.arange(flat.shape[-1], dtype=x.dtype) + 1)
            case "soft":
                return F.cross_entropy(flat, target.flatten(0, 1).mean(-1, keepdim=True).expand_as(flat).softmax(-1))
            case "own_labels":
                return F.cross_entropy(flat, flat.argmax(-1))
            case "z":
                return F.cross_entropy(flat, words) + 1e-2 * logits.logsumexp(-1).square().mean()
            case "binary":
                return F.binary_cross_entropy_with_logits(x, target.sigmoid())
            case "huber":
                return F.smooth_l1_loss(x, target)
        return F.cross_entropy(flat, words, reduction="sum") / words.numel() + (x * target).sum() / x.numel()


def _shape(letters: str, sizes: Sizes) -> tuple[int, ...]:
    more = {**sizes, "1": 1, "3": 3, "2w": 2 * sizes["w"], "3w": 3 * sizes["w"], "4w": 4 * sizes["w"],
            "sw": sizes["s"] * sizes["w"], "2h": 2 * sizes["h"], "w+2h": sizes["w"] + 2 * sizes["h"]}  # fmt: skip
    return tuple(more[letter] for letter in letters.split())


def _parameter(shape: tuple[int, ...]) -> nn.Parameter:
    fan = torch.Size(shape[1:]).numel()
    return nn.Parameter(torch.randn(shape) / fan**0.5 + (1.0 if len(shape) == 1 else 0.0))


def _tie(first: nn.Module, last: nn.Module) -> None:
    """Give two blocks one tensor for every parameter that both have in the same shape."""
    have = dict(first.named_parameters())
    for name, parameter in list(last.named_parameters()):
        if name in have and have[name].shape == parameter.shape:
            setattr(last, name, have[name])


def build(recipe: Recipe) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model and a batch, in float64, the same for the same recipe."""
    sizes = dict(recipe.sizes)
    torch.manual_seed(0)
    model = Model(recipe).double()
    shape = SAMPLES, sizes["s"]
    ids, labels = (torch.randint(0, sizes["v"], shape) for _ in range(2))
    labels[torch.rand(shape) < torch.linspace(0.0, 0.9, SAMPLES)[:, None]] = -100
    labels[0, 0] = 0
    x, target = (torch.randn(*shape, sizes["w"], dtype=torch.float64) for _ in range(2))
    return model, {"ids": ids, "x": x, "labels": labels, "target": target}


@st.composite
def recipes(draw: st.DrawFn, steps: Sequence[str]) -> Recipe:
    """A recipe of two to four blocks, some of them equal, one of which has these steps and the others any."""
    heads, size = draw(st.sampled_from(((2, 4), (4, 4), (4, 2), (2, 3), (4, 3), (1, 5))))
    sizes = {"s": draw(st.sampled_from((4, 6, 8, 3))), "w": heads * size, "n": heads, "h": size,
             "v": draw(st.sampled_from((12, 16, 10, 7)))}  # fmt: skip
    back = st.sampled_from((0, 0, 0, 1, 2))
    first = tuple((name, draw(back)) for name in draw(st.permutations(steps)))
    block = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), back), min_size=1, max_size=4).map(tuple)
    kinds = [first, *draw(st.lists(block, max_size=2))]
    row = draw(st.permutations([0, *draw(st.lists(st.sampled_from(range(len(kinds))), min_size=1, max_size=3))]))
    return Recipe(
        tuple(sizes.items()),
        draw(st.sampled_from(("both", "ids", "x"))),
        tuple(kinds[i] for i in row),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from(LOSSES)),
        draw(st.sampled_from((-1, -1, -1, 0, 1))),
    )


def draw_plan(draw: st.DrawFn, source: Source) -> Plan:
    """A random plan out of those the planner may choose from: every stage split in a way of its own, as far as ways
    agree on what passes between stages."""
    dp, tp = draw(st.sampled_from(((1, 2), (2, 1), (1, 4), (2, 2), (1, 1))))
    micro_batch = draw(st.sampled_from((SAMPLES, SAMPLES // 2, dp)))
    if not source.full(max(2, micro_batch), MESH).traced.mean_of_samples:  # one sample shows nothing of it
        micro_batch = SAMPLES
    layered = source.full(micro_batch, MESH)
    positions = len(layered.labels)
    pp = draw(st.integers(1, min(3 if dp * tp < 4 else 2, positions)))
    cuts = draw(st.lists(st.integers(1, positions - 1), min_size=pp - 1, max_size=pp - 1, unique=True)
                if pp > 1 else st.just([]))  # fmt: skip
    mode = st.sampled_from(("none",) if layered.traced.updated else MODES)
    modes = [draw(mode) if is_block(label) else "none" for label in layered.labels]
    schedule = draw(st.sampled_from(("gpipe", "1f1b")))
    zero = draw(st.integers(0, 3))
    try:
        table = formulate(layered, MESH.device, tp, draw(st.booleans()))
    except PartitionError as error:  # no product has a dim that tp divides: refused, as `tests/compile/` shows
        assume("splits nothing" not in str(error))
        raise
    model = Split(table)
    first = draw_choice(draw, model, {})
    alike = {
        n: [o for o, _ in enumerate(node.options) if all(node.given(o, i) == node.given(first[n], i) for i in outputs)]
        for n, outputs in interface(model).items()
        for node in [model.table.nodes[n]]
    }
    chosen = [first if stage == 0 or draw(st.booleans()) else draw_choice(draw, model, alike) for stage in range(pp)]
    starts = (0, *sorted(cuts))
    return make_plan(layered, (pp, dp, tp), micro_batch, starts, model.table, chosen, schedule, modes, zero)


def draw_choice(draw: st.DrawFn, model: Split, allowed: Mapping[int, list[int]]) -> tuple[int, ...]:
    """The index of an option for every node, so that every change of placement is possible: what is best under random
    costs. Changes of placement cost little or much, partial sums likewise."""
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    near, passing = draw(st.sampled_from((0.0, 0.1, 0.5, 2.0))), draw(st.sampled_from((0.0, 1.0)))
    sums = [
        passing * any(p is not None and p.kind == "P" for s in option for p in s.inputs)
        for node in model.table.nodes
        for option in node.options
    ]
    count = len(model.sizes.reshards)
    costs = np.concatenate(
        [numbers.random(len(sums)) - sums, near * numbers.random(count), np.zeros(len(model.sizes.saved_index))]
    )
    found = model.solver.minimise(costs, allowed)
    assume(found is not None)  # products that must be split over tp may leave no choice: the planner refuses the degree
    assert is_possible(model.table, found.chosen)
    return found.chosen


def interface(model: Split) -> dict[int, list[int]]:
    """Nodes whose outputs all stages have to place alike -> those outputs."""
    outputs: dict[int, list[int]] = {}
    for node, output in model.interface_values:
        outputs.setdefault(node, []).append(output)
    return outputs


def is_possible(table: StrategyTable, chosen: Sequence[int]) -> bool:
    """Whether every change of placement of a choice is possible, whoever uses a partial sum outside of its run takes it
    in the same placement, and what is tied is alike."""
    for used in table.value_uses:
        have = table.nodes[used.source].given(chosen[used.source], used.output)
        wants = [table.nodes[node].taken(chosen[node], operand) for node, operand in used.uses]
        if any((have, want) not in used.chains for want in wants):
            return False
        outside = {want for want, inside in zip(wants, used.inside, strict=True) if not inside}
        if any(p.kind == "P" for p in have) and len(outside) > 1:
            return False
    return all(len({chosen[node] for node in group}) == 1 for group in table.tied)


def make_plan(
    layered: LayeredGraph,
    degrees: tuple[int, int, int],
    micro_batch: int,
    starts: tuple[int, ...],
    table: StrategyTable,
    chosen: Sequence[Sequence[int]],
    schedule: str = "1f1b",
    modes: Sequence[str] = (),
    zero: int = 0,
) -> Plan:
    """A plan with these decisions (`chosen`: the option of every node, in each stage) and no predictions."""
    pp, dp, tp = degrees
    modes, ends = modes or ["none"] * len(layered.labels), (*starts[1:], len(layered.labels))
    return Plan(
        "Model", MESH, pp, dp, tp, micro_batch, SAMPLES, schedule, zero, "mixed", "float64", "sgd", None,
        tuple(splits_of(table, c, {"dp": dp, "tp": tp}) for c in chosen),
        tuple(
            PlanStage(start, stage, tuple(modes[start:end]), 0.0, 0.0, 0.0, 0.0, {}, ())
            for stage, (start, end) in enumerate(zip(starts, ends, strict=True))
        ),
        0.0, 0.0, 0.0, "feasible", 0.0, 0.0, Signature.of(layered),
    )  # fmt: skip


def splits_of(table: StrategyTable, chosen: Sequence[int], degrees: Mapping[str, int]) -> Splits:
    """Axis -> node -> strategy, along the axes that have more than one rank."""
    return {
        axis: {n.key: n.options[o][i] for n, o in zip(table.nodes, chosen, strict=True) if is_decided(n)}
        for i, axis in enumerate(table.axes)
        if degrees[axis] > 1
    }


def is_decided(node: Node) -> bool:
    """Whether a node is one of the model's."""
    return node.kind != "end" and not node.key.endswith("/update")


def first_choice(model: Split, allowed: Mapping[int, list[int]] | None = None) -> tuple[int, ...]:
    """The option of every node that comes first, as far as the others allow: samples over dp where operators allow it,
    all whole over tp."""
    order = [float(o) for node in model.table.nodes for o, _ in enumerate(node.options)]
    costs = np.array(order + [0.0] * (len(model.sizes.reshards) + len(model.sizes.saved_index)))
    found = model.solver.minimise(costs, allowed)
    assert found is not None
    return found.chosen


def whole(model: nn.Module, batch: Mapping[str, Tensor], parts: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """The unmodified model's loss on a batch with every gradient, and its buffers after that many micro-batches."""
    kept = {n: b.clone() for n, b in model.named_buffers()}
    model.zero_grad()
    loss = model(**batch)
    loss.backward()
    values = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    _restore(model, kept)
    with torch.no_grad():
        for i in range(parts):
            model(**{k: v.chunk(parts)[i] for k, v in batch.items()})
    values |= {n: b.clone() for n, b in model.named_buffers()}
    _restore(model, kept)
    return loss.detach(), values


def _restore(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def error_of(source: Source, plan: Plan) -> tuple[float, str]:
    """The largest relative error of a plan's loss, gradients and buffers, and whose it is; dropout is compared with
    that of a plan for one rank."""
    found = _simulated(source, plan)
    if "dropout" in {name for block in source.model.recipe.blocks for name, _ in block}:
        layered = source.full(plan.micro_batch, MESH)
        alone = Split(formulate(layered, MESH.device, 1))
        plain = make_plan(layered, (1, 1, 1), plan.micro_batch, (0,), alone.table, [first_choice(alone)])
        wanted = _simulated(source, plain)
    else:
        loss, values = whole(source.model, source.batch, plan.micro_batches)
        wanted = {"loss": loss, **values}
    unused = {n: torch.zeros_like(t) for n, t in wanted.items() if not t.any()}
    return worst({**unused, **found}, wanted)


def _simulated(source: Source, plan: Plan) -> dict[str, Tensor]:
    """The loss, gradients and buffers under a plan."""
    result = simulate_plan(source, plan, seed=0)
    buffers = {n: result.state[n] for n, _ in source.model.named_buffers()}
    return {"loss": result.loss, **result.gradients, **buffers}


class _Noise(TorchDispatchMode):
    """Every operator's result is off by a rounding."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view or func._schema.is_mutable:
            return result
        return tree_map_only(Tensor, _shaken, result)


def _shaken(x: Tensor) -> Tensor:
    return x * (1 + 4e-16 * torch.randn_like(x)) if x.is_floating_point() else x


def sensitivity(source: Source) -> float:
    """How far roundings alone take the whole model's gradients: ties that they break, differences of equals."""
    loss, values = whole(source.model, source.batch)
    errors = []
    for _ in range(3):
        with _Noise():
            other, again = whole(source.model, source.batch)
        errors.append(worst({"loss": other, **again}, {"loss": loss, **values})[0])
    return max(errors)


def used(layered: LayeredGraph, plan: Plan) -> list[tuple[str, str, str]]:
    """(operator, axis, strategy) of every decision of a plan."""
    kinds = {layered.keys[n]: info(n) for n in layered.representatives()}
    return [
        (kinds[name].name if kinds[name].kind == "op" else kinds[name].kind, axis, strategy.name)
        for splits in plan.splits
        for axis, chosen in splits.items()
        for name, strategy in chosen.items()
    ]
