"""Language models drawn at random: blocks of parts that people write by hand, and the settings that train them.

A model is drawn whole from its seed: the mixers of tokens, what follows them, norms, gates, skips, buffers that
training changes, parameters that are shared, and the loss. All computes in float64, so that what is exact is to 1e-9.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.coverage.drawn_parts import FOLLOWERS, MIXERS, MOST_TOKENS, NORMS, Part, Shape, named

Tensor = torch.Tensor
VOCABULARY = 48


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
            *("+".join([*map(named, (b.mixer, b.follower, b.norms[0])), b.gate])
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
            return (x.mean(1)[:, 0] - labels.to(x.dtype).mean(1) / VOCABULARY).square().mean()
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
