"""Column- and row-parallel products, the vocabulary-parallel embedding and cross-entropy."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from benchmarks.harness.megatron.groups import ColumnProduct, Place, SumOfShares


class Column(nn.Module):
    """A product whose output is split; of `weight` (m, n) and `bias` (m), already this rank's share."""

    def __init__(self, weight: Tensor, bias: Tensor | None, place: Place) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        """(s, b, n) to (s, b, m / tp)."""
        return ColumnProduct.apply(x, self.weight, self.bias, self.place)


class Row(nn.Module):
    """A product whose input is split; `weight` (m, n / tp) is this rank's share, `bias` (m) is whole."""

    def __init__(self, weight: Tensor, bias: Tensor | None, place: Place) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else on_share(bias, place)
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        """(s, b, n / tp) to (s, b, m)."""
        summed = SumOfShares.apply(nn.functional.linear(x, self.weight), self.place)
        return summed if self.bias is None else summed + self.bias


def on_share(weight: Tensor, place: Place) -> nn.Parameter:
    """A whole parameter that works on this rank's share of the sequence: its gradients are summed over ranks."""
    parameter = nn.Parameter(weight.detach().clone())
    parameter.summed_over_shares = place.sequence  # type: ignore[attr-defined]
    return parameter


def embedded(tokens: Tensor, weight: Tensor, place: Place) -> Tensor:
    """Tokens (b, s) to (s, b, n), or to this rank's share of s, by the embedding's rows of this rank."""
    local = tokens.t() - place.share * weight.shape[0]
    if place.tp == 1:
        return nn.functional.embedding(local, weight)
    outside = (local < 0) | (local >= weight.shape[0])
    rows = nn.functional.embedding(local.masked_fill(outside, 0), weight)
    return SumOfShares.apply(rows.masked_fill(outside[..., None], 0.0), place)


class CrossEntropy(Function):
    """The mean cross-entropy of logits whose vocabulary is split, with one all-reduce of sums and one of maxima."""

    @staticmethod
    def forward(context: Any, logits: Tensor, targets: Tensor, place: Place) -> Tensor:
        """Logits (r, v / tp) and targets (r) to a scalar."""
        top = logits.amax(1)
        if place.tp > 1:
            dist.all_reduce(top, dist.ReduceOp.MAX, group=place.tensor)
        shifted = logits - top[:, None]
        local = targets - place.share * logits.shape[1]
        inside = (local >= 0) & (local < logits.shape[1])
        picked = local.clamp(0, logits.shape[1] - 1)[:, None]
        of_target = shifted.gather(1, picked)[:, 0] * inside
        exponents = shifted.exp_()
        sums = torch.stack((exponents.sum(1), of_target))
        if place.tp > 1:
            dist.all_reduce(sums, group=place.tensor)
        context.save_for_backward(exponents.div_(sums[0][:, None]), picked, inside)
        return (sums[0].log() - sums[1]).mean()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """(softmax - target) / r of this rank's vocabulary."""
        softmax, picked, inside = context.saved_tensors
        softmax = softmax.scatter_add(1, picked, -inside[:, None].to(softmax.dtype))
        return softmax.mul_(gradient / len(softmax)), None, None


def next_token_loss(x: Tensor, weight: Tensor, labels: Tensor, place: Place) -> Tensor:
    """The loss of hidden states (s, b, n) under the head's rows `weight` (v / tp, n) of this rank; labels (b, s)."""
    logits = ColumnProduct.apply(x, weight, None, place)
    return CrossEntropy.apply(logits[:-1].flatten(0, 1), labels.t()[1:].flatten(), place)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of (s, b, heads, size) to (s, b, heads x size)."""
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3).flatten(2)
