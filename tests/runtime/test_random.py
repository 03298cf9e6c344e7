"""Random numbers: as random as they should be, and the same under every plan."""

from __future__ import annotations

import functools
import itertools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import models
import pytest
import torch
from models import Exact, batch_for, gpt2, t5
from torch import nn
from torch.nn import functional as F

from autopart.compile.simulate import simulate_plan
from autopart.errors import PartitionError
from autopart.hardware.mesh import Mesh
from autopart.kernels import dropout as plain_dropout
from autopart.passes.source import Source
from autopart.planner.make_plan import make_plan, request_of
from autopart.planner.request import Request
from autopart.runtime import random
from autopart.runtime.groups import Groups
from autopart.runtime.shards import shard, unshard
from autopart.runtime.simulated import World, simulated_groups

SHAPE = (8, 256, 512)
LOW, GOLDEN = 0xFFFFFFFF, 0x9E3779B9
SIGMAS = 4.5


def groups(dp: int = 1, tp: int = 1, rank: int = 0, seed: int = 0, step: int = 0, micro_batch: int = 0) -> Groups:
    """One rank's groups."""
    made = simulated_groups(World(), 1, dp, tp, rank)
    made.rng.seed, made.rng.step, made.rng.micro_batch = seed, step, micro_batch
    return made


def bits(*arguments: Any) -> torch.Tensor:
    """The words of `random._words`, without a sign."""
    return random._words(*arguments).to(torch.int64) & LOW


def drawn(shape: Sequence[int] = SHAPE, name: str = "a", **where: Any) -> torch.Tensor:
    """All bits of one stream."""
    return bits(random.stream(groups(**where), name), shape, 0, {})


@functools.cache
def first() -> torch.Tensor:
    """All bits of stream "a" at seed 0 and step 0."""
    return drawn()


def sigmas(a: torch.Tensor, b: torch.Tensor) -> float:
    """The correlation of two tensors, in standard deviations of that of independent ones."""
    pair = torch.stack([a.flatten().double(), b.flatten().double()])
    return float(torch.corrcoef(pair)[0, 1]) * a.numel() ** 0.5


# ---- the numbers -----------------------------------------------------------------------------------------


def reference(x: int) -> int:
    """The mixer, in integers that do not wrap around."""
    x ^= x >> 16
    x = x * 0x7FEB352D & LOW
    x ^= x >> 15
    x = x * 0x846CA68B & LOW
    return x ^ x >> 16


def test_the_bits_are_the_hash_that_they_are_said_to_be() -> None:
    source = random.stream(groups(seed=3, step=2, micro_batch=5), "a.b")
    one, other = (word & LOW for word in source.root())
    found = bits(source, (2, 3, 4), 1, {})
    for i, j, k in itertools.product(range(2), range(3), range(4)):
        row = reference(reference(((j + 15) * 2 + i) ^ one) + other & LOW)
        assert found[i, j, k] == reference(row + k * GOLDEN & LOW)


def test_places_past_32_bits_differ() -> None:
    huge = 2**33
    rows = [random._hashes(random.stream(groups(micro_batch=m), "a"), (4, huge // 4, 1)[::2], 0, {})[0] for m in (0, 1)]
    assert not torch.equal(*rows)
    far = groups(micro_batch=2**31)
    assert (bits(random.stream(far, "a"), (4, 3), 0, {}) != drawn((4, 3))).all()


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_every_byte_is_uniform(shift: int) -> None:
    """Chi-square of 256 cells: 255 +- 22.6."""
    counts = torch.bincount(first().flatten() >> shift & 255, minlength=256).double()
    expected = counts.sum() / 256
    assert abs(float(((counts - expected) ** 2 / expected).sum()) - 255) < SIGMAS * 22.6


@pytest.mark.parametrize("far", [1, 2, 64])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_neighbours_are_unrelated(dim: int, far: int) -> None:
    if far < SHAPE[dim]:
        near, other = (first().narrow(dim, at, SHAPE[dim] - far) for at in (0, far))
        assert abs(sigmas(near, other)) < SIGMAS
        assert abs(sigmas(near & 1, other & 1)) < SIGMAS


OTHERS: list[dict[str, Any]] = [
    *({"seed": seed} for seed in (1, 2, 2**31, 2**32, 2**63)), {"step": 1}, {"step": 2**20}, {"seed": 1, "step": 1},
    {"micro_batch": 1}, {"micro_batch": 7}, *({"name": name} for name in ("b", "a#2", "a.a", "")),
]  # fmt: skip


def _name(where: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in where.items())


@pytest.mark.parametrize("where", OTHERS, ids=_name)
def test_other_seeds_steps_streams_and_micro_batches_are_unrelated(where: dict[str, Any]) -> None:
    second = drawn(**where)
    assert abs(sigmas(first(), second)) < SIGMAS
    assert int((first() == second).sum()) < 4
    rows = [set(x[..., 0].flatten().tolist()) for x in (first(), second)]
    assert len(rows[0] & rows[1]) < 4, "the rows of one are those of the other"


def test_seeds_and_steps_do_not_make_up_for_each_other() -> None:
    places = itertools.product(range(20), range(20), ("a", "b", "a#2", "1 a"))
    roots = {random.stream(groups(seed=s, step=t), n).root() for s, t, n in places}
    assert len(roots) == 20 * 20 * 4


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_the_share_kept_is_that_asked_for(p: float) -> None:
    x = torch.ones(SHAPE)
    y = random.dropout(x, p, random.stream(groups(), "a"), SHAPE, 0)
    kept = (y != 0).double()
    tolerance = SIGMAS * (p * (1 - p)) ** 0.5
    assert abs(float(kept.mean()) - (1 - p)) < tolerance / x.numel() ** 0.5
    for dim, size in enumerate(SHAPE if 0.1 <= p <= 0.9 else ()):
        others = [d for d in range(3) if d != dim]
        assert float((kept.mean(others) - (1 - p)).abs().max()) < 1.3 * tolerance / (x.numel() / size) ** 0.5
    assert set(y.unique().tolist()) <= {0.0, float(torch.ones(()) * (1 / (1 - p)))}


def test_uniform_and_normal_numbers_have_their_moments() -> None:
    u = random.uniform(random.stream(groups(), "a"), SHAPE, 0).double()
    n = u.numel() ** 0.5
    assert abs(float(u.mean()) - 1 / 2) < SIGMAS * 12**-0.5 / n
    assert abs(float(u.var()) - 1 / 12) < SIGMAS * 180**-0.5 / n
    z = torch.erfinv(2 * u - 1) * 2**0.5
    for power, (mean, deviation) in enumerate([(0, 1), (1, 2**0.5), (0, 15**0.5), (3, 96**0.5)], 1):
        assert abs(float((z**power).mean()) - mean) < SIGMAS * deviation / n


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("word", [0, -1, 2**31 - 1, -(2**31), 255, 256])
def test_uniform_numbers_are_between_0_and_1(dtype: torch.dtype, word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "_words", lambda *_: torch.tensor([word], dtype=torch.int32))
    drawn = random.uniform(random.stream(groups(), "a"), [1], 0, dtype)
    assert drawn.dtype == dtype and 0 < float(drawn) < 1
    if dtype in (torch.float32, torch.float64):
        assert torch.erfinv(2 * drawn - 1).isfinite()


@pytest.mark.parametrize("p", [0.0, 1e-12, 0.5, 1 - 1e-12, 1.0])
@pytest.mark.parametrize(
    "shape", [(), (1,), (0,), (0, 3), (3, 0), (1, 1, 1), (2, 0, 3), (1, 70000), (70000, 1)], ids=str
)
def test_odd_shapes_and_shares(p: float, shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 2.0, requires_grad=True)
    y = random.dropout(x, p, random.stream(groups(), "a"), shape, 0 if shape else None)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.shape == x.shape and torch.equal(gradient * 2, y)
    if p in (0.0, 1e-12):
        assert torch.equal(y, x)
    if p > 0.9:
        assert not y.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dropout_keeps_dtype_and_strides_and_drops_by_the_bits(dtype: torch.dtype) -> None:
    x = torch.randn(4, 6, 5, 300).to(dtype).transpose(1, 2)
    source = random.stream(groups(micro_batch=2), "a")
    y = random.dropout(x, 0.3, source, x.shape, 0)
    kept = bits(source, x.shape, 0, {}) >= int(0.3 * 2**32)
    assert y.dtype == dtype and y.stride() == torch.empty_like(x).stride()
    assert torch.equal(y, torch.where(kept, x * (1 / 0.7), 0.0))


# ---- shares ----------------------------------------------------------------------------------------------

WHOLE = (4, 6, 8, 12)


@pytest.mark.parametrize("batch", [None, 0, 2])
@pytest.mark.parametrize("parts", [(), "halves", "unequal"], ids=str)
@pytest.mark.parametrize("dim", range(4))
def test_shares_are_parts_of_the_whole(dim: int, parts: Any, batch: int | None) -> None:
    size = WHOLE[dim]
    sizes = {"halves": [size // 2] * 2, "unequal": [2, size - 2]}.get(parts, [])
    split = (dim, sizes) if sizes else dim
    whole = bits(random.stream(groups(micro_batch=3), "a"), WHOLE, batch, {})
    shares = [
        bits(random.stream(groups(tp=2, rank=rank, micro_batch=3), "a"), WHOLE, batch, {"tp": split})
        for rank in range(2)
    ]
    if parts == "halves" and size // 2 % 2:
        return
    assert torch.equal(unshard(shares, dim, sizes), whole)


@pytest.mark.parametrize("dims", [(0, 1), (1, 0), (0, 3), (3, 2), (0, 0)], ids=str)
def test_two_axes_split_at_once(dims: tuple[int, int]) -> None:
    whole = bits(random.stream(groups(), "a"), WHOLE, 0, {})
    axes = dict(zip(("dp", "tp"), dims, strict=True))

    def share(rank: int) -> torch.Tensor:
        return bits(random.stream(groups(dp=2, tp=2, rank=rank), "a"), WHOLE, 0, axes)

    rows = [torch.cat([share(2 * d + t) for t in range(2)], dims[1]) for d in range(2)]
    assert torch.equal(torch.cat(rows, dims[0]), whole)


@pytest.mark.parametrize("p", [0.0, 0.3, 1 - 1e-12, 1.0])
@pytest.mark.parametrize("dims", [(0, 1), (1, 0), (0, 0), (1, 1), (0, 2)], ids=str)
def test_attention_s_hashes_drop_what_dropout_drops_of_the_whole_scores(dims: tuple[int, int], p: float) -> None:
    scores, axes = torch.rand(WHOLE) + 1, dict(zip(("dp", "tp"), dims, strict=True))
    dropped = random.dropout(scores, p, random.stream(groups(micro_batch=1), "a"), WHOLE, 0)
    for rank in range(4):
        source = random.stream(groups(dp=2, tp=2, rank=rank, micro_batch=1), "a")
        given, wanted = (
            shard(shard(x, dims[0], (), 2, rank // 2), dims[1], (), 2, rank % 2) for x in (scores, dropped)
        )
        rows, columns, threshold, scale = random.dropout_hashes(p, source, WHOLE, 0, **axes)
        assert rows.shape == given.shape[:3] and columns.shape == given.shape[3:]
        assert (rows.dtype, columns.dtype) == (torch.int32, torch.int32)
        assert torch.equal(plain_dropout.dropped(given, rows, columns, threshold, scale), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_attention_s_hashes_drop_gradients_alike(dtype: torch.dtype) -> None:
    x = torch.randn(4, 6, 5, 7).to(dtype).transpose(1, 2).requires_grad_()
    source, size = random.stream(groups(), "a"), list(x.shape)
    dropped = plain_dropout.dropped(x, *random.dropout_hashes(0.3, source, size, 0))
    whole = random.dropout(x, 0.3, source, size, 0)
    gradients = [torch.autograd.grad(y, x, torch.ones_like(y))[0] for y in (dropped, whole)]
    assert torch.equal(dropped, whole) and torch.equal(*gradients)


@pytest.mark.parametrize("batch", range(4))
@pytest.mark.parametrize("count", [2, 4])
def test_micro_batches_are_parts_of_the_batch(batch: int, count: int) -> None:
    size = [n // count if d == batch else n for d, n in enumerate((4, 4, 8, 12))]
    whole = bits(random.stream(groups(), "a"), (4, 4, 8, 12), batch, {})
    pieces = [bits(random.stream(groups(micro_batch=i), "a"), size, batch, {}) for i in range(count)]
    assert torch.equal(torch.cat(pieces, batch), whole)


# ---- models ----------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """One of each kind of randomness, in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(NoisyLayer() for _ in range(2))
        self.head = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.mse_loss(self.head(F.dropout(x, 0.1, inplace=True)), target)


class NoisyLayer(nn.Module):
    """Noise of `Noisy`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32)
        self.drop, self.channels = nn.Dropout(0.1), nn.Dropout2d(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.drop(F.gelu(self.first(x)))
        h = self.channels(h[..., None, None])[..., 0, 0]
        h = h * torch.bernoulli(torch.sigmoid(h)) + 0.1 * torch.randn_like(h)
        h = h * torch.empty_like(h).uniform_(0.5, 1.5) + torch.empty_like(h).normal_(0.0, 0.1)
        h = F.dropout(self.second(h + 0.1 * torch.rand(h.shape)), 0.1)
        path = torch.floor(0.9 + torch.rand((x.shape[0], 1))) / 0.9
        again = torch.rand((x.shape[0], 1))
        return x + h * path * again * h.new_empty((x.shape[0], 1)).bernoulli_(0.9)


class Attending(nn.Module):
    """Attention with dropout, every kind of mask."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.mask, self.heads = mask, 2 if mask == "shared" else 4
        self.query, self.rest = nn.Linear(32, 32), nn.Linear(32, 2 * 8 * self.heads)
        self.head = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        query = self.query(x).unflatten(-1, (4, 8)).transpose(1, 2)
        key, value = self.rest(x).unflatten(-1, (2, self.heads, 8)).permute(2, 0, 3, 1, 4)
        how: dict[str, Any] = {"dropout_p": 0.2}
        if self.mask in ("bool", "float"):
            seen = (x[..., 0] > -0.5)[:, None, None] | torch.eye(x.shape[1], dtype=torch.bool)
            how["attn_mask"] = seen if self.mask == "bool" else torch.where(seen, 0.0, -5.0)
        if self.mask == "causal":
            how |= {"is_causal": True, "scale": 0.3}
        if self.mask == "shared":
            how["enable_gqa"] = True
        y = F.scaled_dot_product_attention(query, key, value, **how)
        return F.mse_loss(self.head(y.transpose(1, 2).flatten(2)), target)


def vectors(*middle: int) -> dict[str, torch.Tensor]:
    """A batch of inputs and targets."""
    source = torch.Generator().manual_seed(1)
    return {"x": torch.randn(8, *middle, 32, generator=source), "target": torch.randn(8, *middle, 8, generator=source)}


GPT2 = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1)


def noisy_t5() -> nn.Module:
    """A T5 with dropout."""
    model = t5(1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.1
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, torch.Tensor]]]] = {
    "gpt2": (lambda: gpt2(2, **GPT2), lambda: batch_for("gpt2", torch.float32)),
    "t5": (noisy_t5, lambda: batch_for("t5", torch.float32)),
    "noisy": (Noisy, vectors),
    **{mask: (lambda mask=mask: Attending(mask), lambda: vectors(6)) for mask in ("bool", "float", "causal", "shared")},
}  # type: ignore[misc]
PLANS: dict[str, tuple[int, dict[str, Any]]] = {
    "one-by-one": (1, {"tp": 1, "micro_batch": 2}),
    "four": (1, {"tp": 1, "micro_batch": 4}),
    "tp": (2, {"tp": 2}),
    "tp-micro": (2, {"tp": 2, "micro_batch": 4}),
    "pp": (2, {"pp": 2, "micro_batch": 4}),
    "dp": (2, {"dp": 2}),
    "dp-micro": (2, {"dp": 2, "micro_batch": 4}),
    "tp-pp-recompute": (4, {"tp": 2, "pp": 2, "recompute": "full", "micro_batch": 2}),
}


@functools.cache
def source(name: str) -> Any:
    """A model with its batch, traced once for every size of micro-batch."""
    torch.manual_seed(0)
    make, batch = MODELS[name]
    return Source(make().train(), batch(), torch.float32)


def step(name: str, ranks: int, seed: int = 5, **how: Any) -> Any:
    """One step of a model."""
    plan = make_plan(source(name), Mesh.of(f"{ranks}:cpu"), Request(8, **{"micro_batch": 8, **how}))
    return simulate_plan(source(name), plan, seed)


@functools.cache
def alone(name: str) -> Any:
    """The step on one rank, in one micro-batch."""
    return step(name, 1, tp=1)


def simulated(source: Source, ranks: int, **how: Any) -> Any:
    """One step of any model."""
    request = request_of(source.model, source.batch, **{"micro_batch": 8, **how})
    return simulate_plan(source, make_plan(source, Mesh.of(f"{ranks}:cpu"), request, to_run=True), 5)


def doing(function: Callable[[torch.Tensor], torch.Tensor]) -> Source:
    """A function between two layers, with a batch."""
    torch.manual_seed(0)
    return Source(Doing(function), vectors(), torch.float32)


SPLIT = ("tp-micro", "dp-micro")
FEW = {name: (*SPLIT, "pp", "tp-pp-recompute") for name in ("gpt2", "noisy")} | {"t5": ("dp-micro", "tp-pp-recompute")}
"""Plans of a model; without a mention those over several ranks with micro-batches of four samples."""
CASES = [
    (name, plan) for name in MODELS for plan in (PLANS if "AUTOPART_EXAMPLES" in os.environ else FEW.get(name, SPLIT))
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "plan"), CASES)
def test_every_plan_draws_the_same(name: str, plan: str) -> None:
    ranks, how = PLANS[plan]
    result, expected = step(name, ranks, **how), alone(name)
    torch.testing.assert_close(result.loss.float(), expected.loss.float(), rtol=1e-5, atol=1e-6)
    assert result.gradients.keys() == expected.gradients.keys()
    for path, gradient in expected.gradients.items():
        torch.testing.assert_close(
            result.gradients[path], gradient, rtol=1e-5, atol=1e-5 * max(1.0, float(gradient.abs().max())), msg=path
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_another_seed_gives_another_loss(name: str) -> None:
    assert abs(float(step(name, 1, seed=6, tp=1).loss - alone(name).loss)) > 1e-4


def test_without_dropout_the_loss_is_the_model_s() -> None:
    made = models.source("gpt2")
    torch.testing.assert_close(simulated(made, 1, tp=1).loss, made.model(**made.batch).loss.detach())


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["alone", "tp-pp-recompute"] if "AUTOPART_EXAMPLES" in os.environ else ["alone"])
def test_the_model_itself_with_these_masks(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unchanged model, its dropout replaced by one that drops what the streams say, each of its module's name."""
    torch.manual_seed(0)
    model = Exact(gpt2(2, attn_implementation="eager", **GPT2)).train()
    batch = batch_for("gpt2", torch.float32)
    where = groups(seed=5)
    inside, drawn = [""], Counter[str]()

    def masked(x: torch.Tensor, p: float, *_: Any, **__: Any) -> torch.Tensor:
        drawn[inside[-1]] += 1
        kept = bits(random.stream(where, inside[-1]), x.shape, 0, {}) >= int(p * 2**32)
        return x * kept / (1 - p)

    hooks = [
        m.register_forward_pre_hook(lambda *_, path=path: inside.append(path)) for path, m in model.named_modules()
    ]
    hooks += [m.register_forward_hook(lambda *_: inside.__delitem__(-1)) for m in model.modules()]
    monkeypatch.setattr(F, "dropout", masked)
    loss = model(**batch)
    gradients = dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True)
    )
    monkeypatch.undo()
    for hook in hooks:
        hook.remove()
    assert len(drawn) == sum(drawn.values()) == 7
    ranks, how = {"alone": (1, {"tp": 1}), **PLANS}[plan]
    result = simulated(Source(model, batch, torch.float32), ranks, **how)
    torch.testing.assert_close(result.loss.float(), loss.detach(), rtol=1e-5, atol=1e-6)
    for path, gradient in gradients.items():
        torch.testing.assert_close(result.gradients[path], gradient, rtol=1e-4, atol=1e-5, msg=path)


# ---- operators -------------------------------------------------------------------------------------------


class Doing(nn.Module):
    """A function between two layers."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function, self.first, self.second = function, nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.second(self.function(self.first(x))), target)


REFUSED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "randperm": lambda h: h[:, torch.randperm(32)],
    "randint": lambda h: h * torch.randint(0, 2, h.shape),
    "randint_like": lambda h: h * torch.randint_like(h, 2),
    "multinomial": lambda h: h * torch.multinomial(torch.softmax(h, 1), 1),
    "poisson": lambda h: h + torch.poisson(h.exp()),
    "normal": lambda h: torch.normal(h, 1.0),
    "gamma": lambda h: h + torch._standard_gamma(h.exp()),
    "rrelu": lambda h: F.rrelu(h, training=True),
    "complex": lambda h: h * torch.randn(h.shape, dtype=torch.complex64).abs(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_randomness_is_refused_by_its_line(name: str) -> None:
    with pytest.raises(PartitionError) as refusal:
        simulated(doing(REFUSED[name]), 1, tp=1)
    line = Doing.forward.__code__.co_firstlineno + 1
    assert f"draws random numbers (test_random.py:{line})" in str(refusal.value)


SAME: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "alpha_dropout": lambda h: F.alpha_dropout(h, 0.1, training=True),
    "feature_alpha_dropout": lambda h: F.feature_alpha_dropout(h, 0.1, training=True),
    "dropout1d": lambda h: F.dropout1d(h[..., None], 0.3)[..., 0],
    "all": lambda h: F.dropout(h, 1.0) + F.dropout2d(h[..., None, None], 1.0)[..., 0, 0],
    "exponential": lambda h: h + torch.empty_like(h).exponential_(2.0),
    "gumbel": lambda h: F.gumbel_softmax(h),
    "double": lambda h: h + torch.rand_like(h, dtype=torch.float64).float() + torch.randn(h.shape),
    "scalar": lambda h: h * torch.rand(()) + torch.rand(1),
    "bool": lambda h: h * torch.empty(h.shape, dtype=torch.bool).bernoulli_(0.5),
}


@pytest.mark.parametrize("name", SAME)
def test_what_else_is_drawn_is_the_same_too(name: str) -> None:
    made = doing(SAME[name])
    one, two = simulated(made, 1, tp=1), simulated(made, 2, dp=2, micro_batch=4)
    torch.testing.assert_close(one.loss, two.loss, rtol=1e-5, atol=1e-6)
    for path, gradient in one.gradients.items():
        torch.testing.assert_close(two.gradients[path], gradient, rtol=1e-5, atol=1e-5, msg=path)


def test_two_draws_are_two() -> None:
    twice = doing(lambda h: h * (torch.rand((h.shape[0], 1)) - torch.rand((h.shape[0], 1))))
    gradient = simulated(twice, 1, tp=1).gradients["first.weight"]
    assert gradient.abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_drawn_in_float32(dtype: torch.dtype) -> None:
    """In 16 bits one number of some hundreds would round to 1, and the normal number of it be infinite."""
    torch.manual_seed(0)
    model = Doing(lambda h: h + torch.randn_like(h) + torch.rand(h.shape, dtype=h.dtype).log1p()).to(dtype)
    batch = {k: v.to(dtype).repeat(64, 1) for k, v in vectors().items()}
    assert simulated(Source(model, batch, dtype), 1, tp=1, micro_batch=512).loss.isfinite()


def test_what_does_not_train_draws_nothing() -> None:
    made = doing(
        lambda h: F.dropout2d(h[..., None, None], 0.5, training=False)[..., 0, 0] + F.rrelu(h) + F.dropout(h, 0.0)
    )
    torch.testing.assert_close(simulated(made, 1, tp=1).loss, made.model(**made.batch).detach())
