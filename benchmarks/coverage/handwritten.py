"""Models as a user writes them: plain nn.Modules that return their loss, of sizes drawn at random.

`MODELS` holds a function for each, which draws sizes from a `random.Random` and gives the model and a batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

Tensor = torch.Tensor
Built = tuple[nn.Module, dict[str, Tensor]]
MODELS: dict[str, Callable[[random.Random], Built]] = {}


def model(build: Callable[[random.Random], Built]) -> Callable[[random.Random], Built]:
    """Put a model into the table, under the name of its function."""
    MODELS[build.__name__] = build
    return build


def build(name: str, seed: int = 0) -> Built:
    """The model and its batch, the same for the same seed."""
    torch.manual_seed(seed)
    return MODELS[name](random.Random(f"{name} {seed}"))


def even(draw: random.Random, low: int, high: int) -> int:
    """A multiple of 4 between two others."""
    return 4 * draw.randint(low // 4, high // 4)


class Loss(nn.Module):
    """A model of one input with a loss that is a mean over samples."""

    def __init__(self, body: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.loss = body, loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.body(x), y)


def classified(body: nn.Module, x: Tensor, classes: int) -> Built:
    """With cross-entropy against random classes."""
    return Loss(body, F.cross_entropy), {"x": x, "y": torch.randint(classes, (len(x),))}


def regressed(body: nn.Module, x: Tensor, *shape: int) -> Built:
    """With the mean square error against random targets."""
    return Loss(body, F.mse_loss), {"x": x, "y": torch.randn(len(x), *shape)}


class Tagger(nn.Module):
    """Recurrent layers over embedded tokens, and the next token's cross-entropy."""

    def __init__(self, layers: nn.Module, words: int, d: int, out: int) -> None:
        super().__init__()
        self.words, self.layers, self.head = nn.Embedding(words, d), layers, nn.Linear(out, words)

    def forward(self, ids: Tensor) -> Tensor:
        states, _ = self.layers(self.words(ids[:, :-1]))
        return F.cross_entropy(self.head(states).flatten(0, 1), ids[:, 1:].flatten())


@model
def lstm(draw: random.Random) -> Built:
    d, hidden, words = even(draw, 8, 24), even(draw, 8, 24), even(draw, 16, 64)
    layers = nn.LSTM(d, hidden, num_layers=draw.randint(1, 3), batch_first=True)
    return Tagger(layers, words, d, hidden), {"ids": torch.randint(words, (4, draw.randint(4, 9)))}


@model
def gru_both_ways(draw: random.Random) -> Built:
    d, hidden, words = even(draw, 8, 24), even(draw, 8, 24), even(draw, 16, 64)
    layers = nn.GRU(d, hidden, num_layers=2, batch_first=True, bidirectional=True)
    return Tagger(layers, words, d, 2 * hidden), {"ids": torch.randint(words, (4, draw.randint(4, 9)))}


class Cells(nn.Module):
    """An LSTM cell and a GRU cell, step by step."""

    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.long, self.gated, self.head = nn.LSTMCell(d, hidden), nn.GRUCell(hidden, hidden), nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.long.hidden_size)
        c, g = torch.zeros_like(h), torch.zeros_like(h)
        for step in x.unbind(1):
            h, c = self.long(step, (h, c))
            g = self.gated(h, g)
        return self.head(g)


@model
def cells(draw: random.Random) -> Built:
    d, hidden = even(draw, 8, 16), even(draw, 8, 16)
    return regressed(Cells(d, hidden), torch.randn(8, draw.randint(2, 4), d), 1)


class UNet(nn.Module):
    """Two levels down and up again, with skips."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.enter, self.down = nn.Conv2d(3, c, 3, padding=1), nn.Conv2d(c, 2 * c, 3, 2, 1)
        self.deep, self.up = nn.Conv2d(2 * c, 4 * c, 3, 2, 1), nn.ConvTranspose2d(4 * c, 2 * c, 2, 2)
        self.join, self.top = nn.Conv2d(4 * c, 2 * c, 3, padding=1), nn.ConvTranspose2d(2 * c, c, 2, 2)
        self.norm, self.leave = nn.GroupNorm(4, 4 * c), nn.Conv2d(2 * c, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = F.silu(self.enter(x))
        second = F.silu(self.down(first))
        third = F.silu(self.norm(self.deep(second)))
        third = F.silu(self.join(torch.cat([self.up(third), second], 1)))
        return self.leave(torch.cat([self.top(third), first], 1))


@model
def unet(draw: random.Random) -> Built:
    c, side = even(draw, 4, 12), even(draw, 8, 16)
    return regressed(UNet(c), torch.randn(4, 3, side, side), 3, side, side)


class GraphNet(nn.Module):
    """Messages along edges, added up where they end; every sample is a graph of its own."""

    def __init__(self, d: int, nodes: int, edges: int) -> None:
        super().__init__()
        self.sent, self.kept, self.head = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, 1)
        self.register_buffer("source", torch.randint(nodes, (edges,)))
        self.register_buffer("target", torch.randint(nodes, (edges,)))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            messages = F.relu(self.sent(x))[:, self.source]
            x = F.relu(self.kept(x) + torch.zeros_like(x).index_add(1, self.target, messages))
        return self.head(x.mean(1))


@model
def graph_net(draw: random.Random) -> Built:
    d, nodes = even(draw, 8, 16), draw.randint(5, 9)
    return regressed(GraphNet(d, nodes, draw.randint(10, 20)), torch.randn(4, nodes, d), 1)


class BatchedGraphNet(nn.Module):
    """Attention over edges that come with the batch: a softmax over those that end in a node, by scatter."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.key, self.value, self.head = nn.Linear(2 * d, 1), nn.Linear(d, d), nn.Linear(d, 4)

    def forward(self, x: Tensor, edges: Tensor, y: Tensor) -> Tensor:
        source, target = edges.unbind(1)
        wide = source[..., None].expand(-1, -1, x.shape[-1]), target[..., None].expand(-1, -1, x.shape[-1])
        sent, met = x.gather(1, wide[0]), x.gather(1, wide[1])
        score = F.leaky_relu(self.key(torch.cat([sent, met], -1))).squeeze(-1).exp()
        total = score.new_zeros(x.shape[:2]).scatter_add(1, target, score)
        weight = score / total.gather(1, target)
        out = torch.zeros_like(x).scatter_add(1, wide[1], weight[..., None] * self.value(sent))
        return F.cross_entropy(self.head(out.amax(1)), y)


@model
def graph_attention(draw: random.Random) -> Built:
    d, nodes, edges = even(draw, 8, 16), draw.randint(5, 9), draw.randint(10, 20)
    batch = {"x": torch.randn(4, nodes, d), "edges": torch.randint(nodes, (4, 2, edges)), "y": torch.randint(4, (4,))}
    return BatchedGraphNet(d), batch


class Spectral(nn.Module):
    """A linear map of the lowest frequencies."""

    def __init__(self, d: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(torch.randn(d, d, modes, dtype=torch.cfloat) / d)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        low = torch.einsum("bix,iox->box", spectrum[..., : self.modes], self.weight)
        out = torch.zeros_like(spectrum)
        out[..., : self.modes] = low
        return torch.fft.irfft(out, n=x.shape[-1])


class FourierOperator(nn.Module):
    """A Fourier neural operator in one dimension."""

    def __init__(self, d: int, modes: int, depth: int) -> None:
        super().__init__()
        self.lift, self.project = nn.Conv1d(2, d, 1), nn.Conv1d(d, 1, 1)
        self.spectral = nn.ModuleList(Spectral(d, modes) for _ in range(depth))
        self.local = nn.ModuleList(nn.Conv1d(d, d, 1) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        for spectral, local in zip(self.spectral, self.local, strict=True):
            x = F.gelu(spectral(x) + local(x))
        return self.project(x)


@model
def fourier_operator(draw: random.Random) -> Built:
    d, places = even(draw, 8, 16), even(draw, 12, 24)
    return regressed(FourierOperator(d, draw.randint(2, 5), 2), torch.randn(4, 2, places), 1, places)


class FourierMixer(nn.Module):
    """FNet: the real part of a transform over places and features, in place of attention."""

    def __init__(self, d: int, depth: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d)) for _ in range(depth)
        )
        self.head = nn.Linear(d, 8)

    def forward(self, x: Tensor) -> Tensor:
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x = x + torch.fft.fft2(norm(x), norm="ortho").real
            x = x + mlp(x)
        return self.head(x.mean(1))


@model
def fourier_mixer(draw: random.Random) -> Built:
    d = even(draw, 8, 24)
    return classified(FourierMixer(d, 2), torch.randn(4, even(draw, 4, 12), d), 8)


class SplineLayer(nn.Module):
    """Of a Kolmogorov-Arnold network: a function of one variable on every edge, a sum of bumps on a grid."""

    def __init__(self, inside: int, outside: int, bumps: int) -> None:
        super().__init__()
        self.register_buffer("grid", torch.linspace(-2, 2, bumps))
        self.base = nn.Parameter(torch.randn(outside, inside) / inside)
        self.spline = nn.Parameter(torch.randn(outside, inside, bumps) / inside)
        self.scale = nn.Parameter(torch.ones(outside, inside))
        self.all = [self.base, self.spline, self.scale]

    def forward(self, x: Tensor) -> Tensor:
        bumps = torch.exp(-((x[..., None] - self.grid) ** 2))
        base, spline, scale = self.all
        return F.linear(F.silu(x), base) + torch.einsum("nib,oib,oi->no", bumps, spline, scale)


@model
def kolmogorov_arnold(draw: random.Random) -> Built:
    d, hidden = even(draw, 4, 12), even(draw, 8, 16)
    body = nn.Sequential(SplineLayer(d, hidden, draw.randint(4, 7)), SplineLayer(hidden, 4, 5))
    return regressed(body, torch.randn(8, d), 4)


class Contrastive(nn.Module):
    """Images and texts, each to find its own among the batch's others (CLIP's loss)."""

    def __init__(self, image: int, text: int, d: int) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(image, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.text = nn.Sequential(nn.Linear(text, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        a, b = F.normalize(self.image(image), dim=-1), F.normalize(self.text(text), dim=-1)
        scores = self.temperature.exp() * a @ b.T
        own = torch.arange(len(a), device=a.device)
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


@model
def contrastive(draw: random.Random) -> Built:
    image, text = even(draw, 8, 24), even(draw, 8, 24)
    return Contrastive(image, text, 8), {"image": torch.randn(8, image), "text": torch.randn(8, text)}


class Multitask(nn.Module):
    """One body, three heads, their losses summed with weights that are learnt."""

    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(d, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
        self.kind, self.value, self.marks = nn.Linear(hidden, 8), nn.Linear(hidden, 1), nn.Linear(hidden, 4)
        self.weights = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor, kind: Tensor, value: Tensor, marks: Tensor) -> dict[str, Tensor]:
        h = self.body(x)
        losses = torch.stack(
            [
                F.cross_entropy(self.kind(h), kind),
                F.smooth_l1_loss(self.value(h).squeeze(-1), value),
                F.binary_cross_entropy_with_logits(self.marks(h), marks),
            ]
        )
        return {"loss": (self.weights.neg().exp() * losses + self.weights).sum()}


@model
def several_losses(draw: random.Random) -> Built:
    d, hidden, n = even(draw, 8, 16), even(draw, 8, 24), 8
    batch = {"kind": torch.randint(8, (n,)), "value": torch.randn(n), "marks": torch.randint(2, (n, 4)).float()}
    return Multitask(d, hidden), {"x": torch.randn(n, d), **batch}


def separable(inside: int, outside: int, stride: int) -> nn.Module:
    """A depthwise and a pointwise convolution, each with a batch norm."""
    return nn.Sequential(
        nn.Conv2d(inside, inside, 3, stride, 1, groups=inside, bias=False),
        nn.BatchNorm2d(inside),
        nn.ReLU6(),
        nn.Conv2d(inside, outside, 1, bias=False),
        nn.BatchNorm2d(outside),
        nn.ReLU6(),
    )


@model
def depthwise_cnn(draw: random.Random) -> Built:
    c = even(draw, 8, 16)
    blocks = [separable(c, 2 * c, 2), separable(2 * c, 2 * c, 1), separable(2 * c, 4 * c, 2)]
    body = nn.Sequential(nn.Conv2d(3, c, 3, 2, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * c, 8))
    return classified(body, torch.randn(4, 3, even(draw, 16, 32), 16), 8)


class Capsules(nn.Module):
    """Capsules that agree by routing, and the margin loss of their lengths."""

    def __init__(self, d: int, low: int, high: int, out: int) -> None:
        super().__init__()
        self.low, self.enter = low, nn.Linear(d, 8 * low)
        self.weight = nn.Parameter(torch.randn(low, high, 8, out) / 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        low = self.squash(self.enter(x).unflatten(-1, (self.low, 8)))
        votes = torch.einsum("nid,ijdo->nijo", low, self.weight)
        agreement = torch.zeros_like(votes[..., 0])
        for _ in range(3):
            high = self.squash((agreement.softmax(-1)[..., None] * votes).sum(1))
            agreement = agreement + (votes * high[:, None]).sum(-1)
        length, wanted = high.norm(dim=-1), F.one_hot(y, high.shape[1])
        return (wanted * F.relu(0.9 - length) ** 2 + 0.5 * (1 - wanted) * F.relu(length - 0.1) ** 2).sum(-1).mean()

    @staticmethod
    def squash(x: Tensor) -> Tensor:
        square = x.square().sum(-1, keepdim=True)
        return square / (1 + square) * x / (square + 1e-8).sqrt()


@model
def capsules(draw: random.Random) -> Built:
    d, high = even(draw, 8, 16), even(draw, 4, 8)
    batch = {"x": torch.randn(4, d), "y": torch.randint(high, (4,))}
    return Capsules(d, draw.randint(4, 7), high, draw.randint(4, 8)), batch


class Hopfield(nn.Module):
    """A modern Hopfield network: queries that settle among stored patterns."""

    def __init__(self, d: int, patterns: int, steps: int) -> None:
        super().__init__()
        self.patterns, self.steps = nn.Parameter(torch.randn(patterns, d)), steps
        self.sharpness, self.head = nn.Parameter(torch.ones(())), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.steps):
            x = (self.sharpness * x @ self.patterns.T).softmax(-1) @ self.patterns
        return self.head(x)


@model
def hopfield(draw: random.Random) -> Built:
    d = even(draw, 8, 24)
    return regressed(Hopfield(d, even(draw, 8, 32), draw.randint(2, 4)), torch.randn(4, d), d)


class Mixture(nn.Module):
    """A mixture of experts whose stacked weights every token meets, weighed by its two best gates, and the loss that
    balances their load."""

    def __init__(self, d: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, d, hidden) / d**0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, d) / hidden**0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.gate(x).softmax(-1)
        best, which = gates.topk(2, -1)
        chosen = torch.zeros_like(gates).scatter(-1, which, best / best.sum(-1, keepdim=True))
        h = F.gelu(torch.einsum("ntd,edh->nteh", x, self.up))
        out = torch.einsum("nteh,ehd,nte->ntd", h, self.down, chosen)
        load = (chosen > 0).to(x.dtype).mean((0, 1))
        return out, gates.shape[-1] * (load * gates.mean((0, 1))).sum()


class MixtureModel(nn.Module):
    def __init__(self, d: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mixture(d, hidden, experts) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        balance = x.new_zeros(())
        for norm, layer in zip(self.norms, self.layers, strict=True):
            out, load = layer(norm(x))
            x, balance = x + out, balance + load
        return F.mse_loss(x, y) + 0.01 * balance


@model
def mixture_of_experts(draw: random.Random) -> Built:
    d, hidden, places = even(draw, 8, 16), even(draw, 8, 24), draw.randint(3, 6)
    batch = {"x": torch.randn(4, places, d), "y": torch.randn(4, places, d)}
    return MixtureModel(d, hidden, even(draw, 4, 8)), batch


class RootNorm(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class LlamaBlock(nn.Module):
    """Rotary attention with fewer key heads than query heads, and a gated MLP."""

    def __init__(self, d: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.size = heads, d // heads
        self.first, self.second = RootNorm(d), RootNorm(d)
        self.q, self.o = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.k, self.v = nn.Linear(d, d // 2, bias=False), nn.Linear(d, d // 2, bias=False)
        self.gate, self.up = nn.Linear(d, hidden, bias=False), nn.Linear(d, hidden, bias=False)
        self.down = nn.Linear(hidden, d, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        n, t, d = x.shape
        h = self.first(x)
        q, k, v = (p(h).view(n, t, -1, self.size).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = self.turned(q, turns), self.turned(k, turns)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(h.transpose(1, 2).reshape(n, t, d))
        h = self.second(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

    @staticmethod
    def turned(x: Tensor, turns: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns).flatten(-2)


class Llama(nn.Module):
    """As Meta's own code: rotary positions are complex numbers of modulus 1, precomputed in a buffer."""

    def __init__(self, words: int, d: int, heads: int, hidden: int, depth: int, places: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, d)
        self.blocks = nn.ModuleList(LlamaBlock(d, heads, hidden) for _ in range(depth))
        self.norm, self.head = RootNorm(d), nn.Linear(d, words, bias=False)
        speed = 10000.0 ** -(torch.arange(0, d // heads, 2) / (d // heads))
        angles = torch.outer(torch.arange(places), speed)
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids[:, :-1])
        for block in self.blocks:
            x = block(x, self.turns[: x.shape[1]])
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), ids[:, 1:].flatten())


@model
def llama(draw: random.Random) -> Built:
    words, size = even(draw, 16, 64), draw.choice([4, 8])
    built = Llama(words, 4 * size, 4, even(draw, 16, 48), draw.randint(2, 4), 16)
    return built, {"ids": torch.randint(words, (4, draw.randint(5, 12)))}


@model
def weight_norm(draw: random.Random) -> Built:
    d, hidden = even(draw, 8, 16), even(draw, 8, 24)
    norm = parametrizations.weight_norm
    body = nn.Sequential(norm(nn.Linear(d, hidden)), nn.ELU(), norm(nn.Linear(hidden, hidden)), nn.ELU())
    return regressed(body, torch.randn(4, d), hidden)


@model
def spectral_norm(draw: random.Random) -> Built:
    d, hidden = even(draw, 8, 16), even(draw, 8, 24)
    norm = parametrizations.spectral_norm
    body = nn.Sequential(norm(nn.Linear(d, hidden)), nn.ELU(), norm(nn.Linear(hidden, hidden)), nn.ELU())
    return regressed(body, torch.randn(4, d), hidden)


class Residual(nn.Module):
    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, hidden), nn.Linear(hidden, d)
        self.gain = nn.Parameter(torch.full((1,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain.reshape(()) * self.down(F.gelu(self.up(self.norm(x))))


@model
def residual_mlp(draw: random.Random) -> Built:
    d, hidden = even(draw, 8, 16), even(draw, 8, 32)
    body = nn.Sequential(*(Residual(d, hidden) for _ in range(draw.randint(2, 5))), nn.Linear(d, 8))
    return classified(body, torch.randn(8, d), 8)


class NeuralOde(nn.Module):
    """A differential equation, integrated by a few steps of Runge and Kutta's method."""

    def __init__(self, d: int, hidden: int, steps: int) -> None:
        super().__init__()
        self.steps, self.enter, self.leave = steps, nn.Linear(d + 1, hidden), nn.Linear(hidden, d)

    def slope(self, t: float, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.enter(torch.cat([x, torch.full_like(x[:, :1], t)], -1))))

    def forward(self, x: Tensor) -> Tensor:
        h = 1 / self.steps
        for i in range(self.steps):
            a = self.slope(i * h, x)
            b = self.slope((i + 0.5) * h, x + h / 2 * a)
            c = self.slope((i + 0.5) * h, x + h / 2 * b)
            x = x + h / 6 * (a + 2 * b + 2 * c + self.slope((i + 1) * h, x + h * c))
        return x


@model
def neural_ode(draw: random.Random) -> Built:
    d = even(draw, 4, 12)
    return regressed(NeuralOde(d, even(draw, 8, 16), draw.randint(2, 3)), torch.randn(8, d), d)


class SetTransformer(nn.Module):
    """Attention by inducing points, and by a seed that pools the set."""

    def __init__(self, d: int, points: int) -> None:
        super().__init__()
        self.points, self.seed = nn.Parameter(torch.randn(points, d)), nn.Parameter(torch.randn(1, d))
        self.inward, self.outward, self.pool = (nn.MultiheadAttention(d, 4, batch_first=True) for _ in range(3))
        self.mix, self.head = nn.Linear(d, d), nn.Linear(d, 1)

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        points = self.points.expand(n, -1, -1)
        points = points + self.inward(points, x, x)[0]
        x = x + self.outward(x, points, points)[0]
        x = x + F.relu(self.mix(x))
        return self.head(self.pool(self.seed.expand(n, -1, -1), x, x)[0].squeeze(1))


@model
def set_transformer(draw: random.Random) -> Built:
    d = 4 * draw.randint(2, 4)
    return regressed(SetTransformer(d, draw.randint(2, 5)), torch.randn(4, draw.randint(5, 9), d), 1)


class Siamese(nn.Module):
    """Two inputs through one body, and a triplet's margin."""

    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(d, hidden), nn.ReLU(), nn.Linear(hidden, hidden))

    def forward(self, anchor: Tensor, near: Tensor, far: Tensor) -> Tensor:
        return F.triplet_margin_loss(self.body(anchor), self.body(near), self.body(far))


@model
def siamese(draw: random.Random) -> Built:
    d = even(draw, 8, 24)
    return Siamese(d, even(draw, 8, 24)), {k: torch.randn(8, d) for k in ("anchor", "near", "far")}


class Vae(nn.Module):
    """A variational autoencoder whose noise comes with the batch."""

    def __init__(self, d: int, hidden: int, code: int) -> None:
        super().__init__()
        self.enter, self.narrow = nn.Linear(d, hidden), nn.Linear(hidden, 2 * code)
        self.back, self.leave = nn.Linear(code, hidden), nn.Linear(hidden, d)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = self.narrow(F.relu(self.enter(x))).chunk(2, -1)
        found = torch.sigmoid(self.leave(F.relu(self.back(mean + noise * (spread / 2).exp()))))
        apart = -0.5 * (1 + spread - mean.square() - spread.exp()).sum(-1).mean()
        return F.binary_cross_entropy(found, x) + 0.1 * apart, found


@model
def vae(draw: random.Random) -> Built:
    d, code = even(draw, 12, 32), even(draw, 4, 8)
    return Vae(d, even(draw, 8, 24), code), {"x": torch.rand(4, d), "noise": torch.randn(4, code)}


class Teacher(nn.Module):
    """A student that learns from a teacher at rest, and a buffer that remembers the last features."""

    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.student, self.head = nn.Linear(d, hidden), nn.Linear(hidden, 8)
        self.teacher = nn.Linear(d, 8).requires_grad_(False)
        self.register_buffer("last", torch.zeros(hidden))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.student(x))
        with torch.no_grad():
            self.last.copy_(h.mean(0))
            wanted = (self.teacher(x) / 2).softmax(-1)
        return F.kl_div(self.head(h).log_softmax(-1), wanted, reduction="batchmean")


@model
def distilled(draw: random.Random) -> Built:
    d = even(draw, 8, 24)
    return Teacher(d, even(draw, 8, 24)), {"x": torch.randn(8, d)}


class Transcriber(nn.Module):
    """Convolutions over sound, a recurrent layer, and the CTC loss of transcripts of several lengths."""

    def __init__(self, bands: int, d: int, words: int) -> None:
        super().__init__()
        self.conv, self.layer = nn.Conv1d(bands, d, 3, 2, 1), nn.GRU(d, d, batch_first=True)
        self.head, self.loss = nn.Linear(d, words), nn.CTCLoss(zero_infinity=True)

    def forward(self, sound: Tensor, text: Tensor, heard: Tensor, written: Tensor) -> Tensor:
        h, _ = self.layer(F.relu(self.conv(sound)).transpose(1, 2))
        return self.loss(self.head(h).log_softmax(-1).transpose(0, 1), text, heard, written)


@model
def transcriber(draw: random.Random) -> Built:
    bands, frames, words, longest = even(draw, 8, 16), even(draw, 24, 32), even(draw, 8, 16), draw.randint(3, 5)
    batch = {"sound": torch.randn(4, bands, frames), "text": torch.randint(1, words, (4, longest))}
    heard = torch.tensor([frames // 2 - draw.randint(0, 1) for _ in range(4)])
    batch |= {"heard": heard, "written": torch.tensor([draw.randint(2, longest) for _ in range(4)])}
    return Transcriber(bands, even(draw, 8, 16), words), batch


class Recommender(nn.Module):
    """Bags of items and features that meet in pairs: a deep recommendation model."""

    def __init__(self, items: int, d: int, dense: int) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(items, d, mode=m, padding_idx=0) for m in ("sum", "mean"))
        self.dense = nn.Sequential(nn.Linear(dense, d), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(d + 3, d), nn.ReLU(), nn.Linear(d, 1))

    def forward(self, dense: Tensor, items: Tensor, clicked: Tensor) -> Tensor:
        seen = self.dense(dense)
        features = torch.stack([seen, *(bag(items[:, i]) for i, bag in enumerate(self.bags))], 1)
        pairs = (features @ features.transpose(1, 2))[:, *torch.triu_indices(3, 3, 1)]
        return F.binary_cross_entropy_with_logits(self.top(torch.cat([seen, pairs], -1)).squeeze(-1), clicked)


@model
def recommender(draw: random.Random) -> Built:
    items, dense = even(draw, 16, 64), even(draw, 8, 16)
    batch = {"dense": torch.randn(8, dense), "items": torch.randint(items, (8, 2, 5)), "clicked": torch.rand(8).round()}
    return Recommender(items, even(draw, 8, 16), dense), batch


class Field(nn.Module):
    """A picture as a function of place: a grid of coordinates through sines, modulated by each sample's code."""

    def __init__(self, code: int, hidden: int, side: int) -> None:
        super().__init__()
        self.side, self.code = side, nn.Linear(code, hidden)
        self.place, self.mix, self.leave = nn.Linear(2, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 3)

    def forward(self, code: Tensor) -> Tensor:
        line = torch.linspace(-1, 1, self.side, device=code.device)
        places = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).flatten(0, 1)
        h = torch.sin(3 * self.place(places) + self.code(code)[:, None])
        return self.leave(torch.sin(self.mix(h)))


@model
def implicit_field(draw: random.Random) -> Built:
    code, side = even(draw, 4, 12), draw.randint(3, 6)
    return regressed(Field(code, even(draw, 8, 16), side), torch.randn(4, code), side * side, 3)
