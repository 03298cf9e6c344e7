"""What models do besides straight lines of layers: state, sharing, odd sizes, experts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from emitted import sources
from torch import nn

import autopart
from autopart import PartitionError, Simulated
from autopart.compile.check import one_process, worst_error
from autopart.compile.simulate import simulate_plan
from autopart.frontend.batch import samples_of
from autopart.hardware.mesh import Mesh
from autopart.passes.source import Source
from autopart.planner.make_plan import make_plan
from autopart.planner.request import Request
from autopart.runtime.experts import grouped_linear
from autopart.runtime.process_group import Group

Tensor = torch.Tensor
Batch = dict[str, Tensor]
TOLERANCE = 1e-5
WIDTH = 8


def data(samples: int = 8, *shape: int) -> Batch:
    numbers = torch.Generator().manual_seed(1)
    x, target = (torch.randn(samples, *(shape or (WIDTH,)), generator=numbers) for _ in range(2))
    return {"x": x, "target": target}


@cache
def traced(make: Callable[..., nn.Module], *args: Any) -> Source:
    """A model in training mode with a batch for it, traced once for all its tests."""
    torch.manual_seed(0)
    model = make(*args).train()
    return Source(model, data() if isinstance(model, Stack) else words(), torch.float32)


def simulated(source: Source, pp: int = 1, dp: int = 1, tp: int = 1, **settings: Any) -> Simulated:
    """One step, held against one process: loss, gradients and state."""
    model, batch = source.model, source.batch
    request = Request(samples_of(batch), pp=pp, dp=dp, tp=tp, **settings)
    found = simulate_plan(source, make_plan(source, Mesh.of(f"{pp * dp * tp}:cpu"), request, to_run=True))
    whole = copy.deepcopy(model)
    loss, gradients = one_process(whole, batch)
    assert float(found.loss) == pytest.approx(float(loss), rel=TOLERANCE)
    error, worst = worst_error(found.gradients, gradients)
    assert error < TOLERANCE, worst
    assert found.gradients.keys() == gradients.keys()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(found.state[name], value, rtol=TOLERANCE, atol=1e-6, msg=name)
    return found


GRID = [{"tp": 2}, {"pp": 2}, {"dp": 2}, {"tp": 2, "pp": 2}]


class Residual(nn.Module):
    """A layer beside a sum; what a block does with other values is for subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


class Stack(nn.Module):
    """Blocks in a row under a mean squared error."""

    def __init__(self, block: Callable[[], nn.Module] = Residual, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(layers))

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self.run(x), target)


class Normed(nn.Module):
    """Batch norm between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(4, 8, 1, bias=False), nn.Conv1d(8, 4, 1)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.norm(self.up(x)).relu())


class Counting(Residual):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Averaging(Residual):
    """Keeps a moving average of its input's scale, and divides by the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x / self.scale.clone())
        with torch.no_grad():
            self.scale.mul_(0.9).add_(x.abs().mean(0), alpha=0.1)
        return y


class Dividing(Residual):
    """Divides by the number of its calls, which it counts afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x) / self.calls.clone()
        with torch.no_grad():
            self.calls += 1
        return y


STATEFUL = {
    "norm": (Normed, (4, 5)), "count": (Counting, (WIDTH,)), "average": (Averaging, (WIDTH,)),
    "divisor": (Dividing, (WIDTH,)),
}  # fmt: skip


@cache
def stateful(name: str) -> Source:
    torch.manual_seed(0)
    block, shape = STATEFUL[name]
    return Source(Stack(block).train(), data(8, *shape), torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("degrees", GRID)
def test_buffers_change_as_in_one_process(name: str, degrees: dict[str, int]) -> None:
    source = stateful(name)
    before = copy.deepcopy(source.model.state_dict())
    found = simulated(source, **degrees, micro_batch=8)
    assert any(not torch.equal(found.state[name], value) for name, value in before.items())
    if name == "norm" and degrees == {"tp": 2}:
        assert any('"layers.0.norm.running_mean", [8], tp="S0"' in s or 'running_mean", [8], tp="S0"' in s
                   for s in sources(source.model, source.batch, found.plan))  # fmt: skip


class Centred(nn.Module):
    """Subtracts a mean that it keeps of its last values, or a number that falls."""

    def __init__(self, falls: bool) -> None:
        super().__init__()
        self.first, self.falls = nn.Linear(WIDTH, WIDTH), falls
        self.layers = nn.ModuleList(Residual() for _ in range(4))
        self.register_buffer("centre", torch.ones(WIDTH))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.first(x) - self.centre.clone()
        for layer in self.layers:
            x = layer(x)
        with torch.no_grad():
            self.centre.mul_(0.9)
            if not self.falls:
                self.centre.add_(x.mean(0), alpha=0.1)
        return F.mse_loss(x, target)


@pytest.mark.parametrize(
    ("falls", "settings", "told"),
    [
        (
            False,
            {"pp": 2, "constraints": ["cuts=uniform"]},
            "stage 0 and stage 1 read centre, which the forward",
        ),
        (True, {"tp": 2}, "reads centre and changes it outside of the blocks that read it"),
        (False, {"tp": 2}, ""),
    ],
    ids=str,
)
def test_a_buffer_that_a_rank_would_read_too_late_is_refused(falls: bool, settings: dict[str, Any], told: str) -> None:
    torch.manual_seed(0)
    model = Centred(falls)
    if told:
        with pytest.raises(PartitionError, match=told):
            autopart.plan(model, "2:cpu", data(), **settings)
    else:
        found = autopart.check(model, "2:cpu", data(), micro_batch=8, **settings)
        assert max(found.gradient_error, found.buffer_error) < TOLERANCE


@pytest.mark.parametrize("block", [Normed, Dividing, Averaging])
def test_a_block_that_stands_in_several_places_has_one_buffer(block: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = Stack(block).train()
    model.layers = nn.ModuleList([model.layers[0]] * 3)
    batch = data(8, *next(shape for of_block, shape in STATEFUL.values() if of_block is block))
    for degrees in ({"tp": 2}, {"dp": 2}):
        found = autopart.check(model, "2:cpu", batch, micro_batch=8, **degrees)
        assert max(found.gradient_error, found.buffer_error) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", STATEFUL)
def test_blocks_that_change_buffers_are_not_run_again(name: str) -> None:
    model, batch = stateful(name).model, stateful(name).batch
    with pytest.raises(PartitionError, match=r"changes layers\.0\.\S+\n.*recompute"):
        autopart.plan(model, "2:cpu", batch, pp=2, recompute="full")
    assert autopart.plan(model, "2:cpu", batch, pp=2).recompute == "none"


class Shared(Stack):
    """One projection used by every block, and as the head."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.again = nn.Linear(WIDTH, WIDTH)
        self.again.weight = self.layers[1].up.weight = self.shared.weight
        self.layers[1].up.bias = nn.Parameter(torch.randn(WIDTH))
        self.layers[1].down = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(self.shared(x))
        return F.mse_loss(self.again(x), target)


class Recurrent(Stack):
    """The same blocks twice over."""

    def run(self, x: Tensor) -> Tensor:
        return super().run(super().run(x))


class Masks(Stack):
    """Blocks that are alike but for the mask they get."""

    def __init__(self) -> None:
        super().__init__(layers=4)

    def run(self, x: Tensor) -> Tensor:
        even = torch.arange(WIDTH) % 2 == 0
        for number, layer in enumerate(self.layers):
            x = layer(x.masked_fill(even if number % 2 else ~even, 0.5))
        return x


class Given(nn.Module):
    """A block that takes its mask as an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.inner(x.masked_fill(mask, 0.5))


class GivenMasks(Stack):
    """Masks made once, outside, and taken by turns."""

    def __init__(self) -> None:
        super().__init__(Given, 4)

    def run(self, x: Tensor) -> Tensor:
        masks = x > 0, x < 0
        for number, layer in enumerate(self.layers):
            x = layer(x, masks[number % 2])
        return x


class Remembered(Stack):
    """A value that all later blocks use, and a block's own that skips the next."""

    def __init__(self) -> None:
        super().__init__(layers=4)
        self.first = nn.Linear(WIDTH, WIDTH)

    def run(self, x: Tensor) -> Tensor:
        memory = before = self.first(x)
        for layer in self.layers:
            x, before = layer(x * memory) + before, x
        return x


class Flat(Residual):
    """A block that takes two rows a sample as one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, (-1, 2))


class Widened(Stack):
    """Blocks that flatten what they get, of which the first has to copy it."""

    def __init__(self) -> None:
        super().__init__(Flat, 4)

    def run(self, x: Tensor) -> Tensor:
        return super().run(x.unsqueeze(1).expand(-1, 2, -1)).mean(1)


class Streams(Stack):
    """Three tensors from block to block."""

    def __init__(self) -> None:
        super().__init__(layers=4)

    def run(self, x: Tensor) -> Tensor:
        a, b, c = x, x * 2, (x > 0).to(x.dtype)
        for layer in self.layers:
            a, b, c = layer(b), a + c, c * layer.down.bias
        return a + b + c


@pytest.mark.parametrize("kind", [Shared, Recurrent, Masks, GivenMasks, Remembered, Widened, Streams])
@pytest.mark.parametrize("degrees", [{"dp": 2}, {"pp": 3}, {"tp": 2, "pp": 2}])
def test_values_and_weights_are_where_they_are_used(kind: type[Stack], degrees: dict[str, int]) -> None:
    simulated(traced(kind), **degrees, micro_batch=4)


class FirstState(nn.Module):
    """A recurrence that begins with a trained state, and with zeros as long as it, which have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.first = nn.LSTMCell(WIDTH, WIDTH), nn.Parameter(torch.randn(1, WIDTH))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        state = self.first.expand(len(x), -1)
        state, _ = self.cell(x, (state, torch.zeros_like(state)))
        return F.mse_loss(state, target)


def test_zeros_as_long_as_a_state_go_to_the_next_stage_without_a_gradient() -> None:
    found = autopart.check(FirstState(), "2:cpu", data(), pp=2, constraints=["stage 1 starts at cell"])
    assert max(found.loss_error, found.gradient_error) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Masks, GivenMasks, Remembered])
def test_blocks_are_run_again_with_their_own_values(kind: type[Stack]) -> None:
    simulated(traced(kind), pp=2, micro_batch=4, recompute="full")


class Heads(nn.Module):
    """Attention whose heads are `heads`, before a layer of `width`."""

    def __init__(self, heads: int, width: int, size: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.into, self.out = nn.Linear(6, 3 * heads * size), nn.Linear(heads * size, 6)
        self.up, self.down = nn.Linear(6, width), nn.Linear(width, 6)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, self.size)).transpose(1, 2) for t in self.into(x).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return F.mse_loss(self.down(self.up(x).relu()), target)


def test_three_heads_on_two_ranks() -> None:
    torch.manual_seed(0)
    plan = simulated(Source(Heads(3, 16), data(8, 5, 6), torch.float32), tp=2, micro_batch=8).plan
    (note,) = plan.notes
    assert note.startswith("tp splits ") and "whole on every rank: " in note and "down" not in note
    assert float(note.split()[2].rstrip("%")) > 20


def test_nothing_to_split_is_refused() -> None:
    with pytest.raises(PartitionError, match="tp=4 splits nothing") as caught:
        autopart.plan(Heads(3, 15, 3), "4:cpu", data(9, 7, 6), tp=4, micro_batch=9)
    assert caught.value.try_.startswith("tp=2, 3") and "15" in caught.value.why
    simulated(Source(Heads(3, 15, 3), data(9, 7, 6), torch.float32), tp=3, micro_batch=9)


@pytest.mark.parametrize(
    ("samples", "settings", "message"),
    [
        (7, {"dp": 2}, "7 samples do not divide over dp=2 ranks"),
        (6, {"dp": 4}, "6 samples do not divide over dp=4 ranks"),
        (7, {"pp": 2, "micro_batch": 2}, "no multiple of micro_batch=2"),
        (6, {"dp": 2, "micro_batch": 3}, "3 samples do not divide over dp=2 ranks"),
    ],
)
def test_a_remainder_is_refused(samples: int, settings: dict[str, int], message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        autopart.plan(Stack(), f"{settings.get('dp', 2)}:cpu", data(samples), **settings)


def mixtral(routers: bool) -> nn.Module:
    """A Mixtral of which tp can split nothing but the experts."""
    config = hf.MixtralConfig(
        vocab_size=97, hidden_size=33, intermediate_size=33, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=3, head_dim=10, num_local_experts=4, num_experts_per_tok=2, use_cache=False,
        max_position_embeddings=32, output_router_logits=routers, experts_implementation="batched_mm",
    )  # fmt: skip
    return hf.MixtralForCausalLM(config)


def gpt_oss() -> nn.Module:
    """A GPT-OSS, whose experts have biases."""
    config = hf.GptOssConfig(
        vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, sliding_window=4, use_cache=False,
        max_position_embeddings=32, attention_dropout=0.0, experts_implementation="batched_mm",
    )  # fmt: skip
    return hf.GptOssForCausalLM(config)


def words() -> Batch:
    numbers = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(3, 90, (4, 7), generator=numbers) for _ in range(2))
    return {"input_ids": ids, "labels": labels}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("degrees", "routers"),
    [({"tp": 4}, False), ({"dp": 2}, True), ({"tp": 2, "pp": 2}, True)],
)
def test_experts_are_split(degrees: dict[str, int], routers: bool) -> None:
    plan = simulated(traced(mixtral, routers), **degrees, micro_batch=4).plan
    chosen = [s for name, s in plan.splits[0].get("tp", {}).items() if "grouped_linear" in name]
    assert len(chosen) == (2 if "tp" in degrees else 0)
    assert [s.name for s in chosen] == ["e"] * len(chosen)
    assert [str(s.outputs[0]) for s in chosen] == ["M0", "P"][: len(chosen)]


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [{"dp": 2}, {"tp": 2, "pp": 2}])
def test_experts_with_biases(degrees: dict[str, int]) -> None:
    simulated(traced(gpt_oss), **degrees, micro_batch=4)


def experts(ids: list[int], transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(1)
    x = torch.randn(len(ids), 3, generator=numbers, dtype=torch.float64, requires_grad=True)
    shape = (4, 3, 5) if transposed else (4, 5, 3)
    weight = torch.randn(shape, generator=numbers, dtype=torch.float64, requires_grad=True)
    return x, weight, torch.tensor(ids, dtype=torch.long)


ROWS = {
    "all": [3, 0, 1, 0, 2, 2],
    "some without": [3, 1, 1, 3],
    "one alone": [2, 2, 2],
    "none": [],
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("ids", ROWS.values(), ids=list(ROWS))
def test_products_with_experts(ids: list[int], ranks: int, transposed: bool) -> None:
    x, weight, index = experts(ids, transposed)
    dense = torch.einsum("sk,skn->sn", x, (weight if transposed else weight.transpose(1, 2))[index])
    given = torch.randn(dense.shape, dtype=torch.float64)
    wanted = torch.autograd.grad(dense, (x, weight), given)
    out, of_x, of_weight = torch.zeros_like(dense), torch.zeros_like(x), []
    for rank, share in enumerate(weight.chunk(ranks)):
        share = share.detach().requires_grad_()
        group = Group("tp", ranks, rank, None) if ranks > 1 else None
        part = grouped_linear(x, share, index, transposed, group)
        gradients = torch.autograd.grad(part, (x, share), given)
        elsewhere = (index < rank * len(share)) | (index >= (rank + 1) * len(share))
        assert not part[elsewhere].any() and not gradients[0][elsewhere].any()
        out, of_x = out + part, of_x + gradients[0]
        of_weight.append(gradients[1])
    for found, right in ((out, dense), (of_x, wanted[0]), (torch.cat(of_weight), wanted[1])):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("group", [None, Group("tp", 2, 1, None)])
def test_derivatives_of_products_with_experts(transposed: bool, group: Group | None) -> None:
    x, weight, index = experts(ROWS["all"], transposed)
    assert torch.autograd.gradcheck(lambda a, b: grouped_linear(a, b, index, transposed, group), (x, weight))
