"""What a trace of the forward pass alone would get wrong: put right, or refused with the user's line."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

import autopart
from autopart import PartitionError
from autopart.compile.check import one_process, worst_error
from autopart.compile.simulate import simulate_plan
from autopart.frontend.autograd_functions import CustomFunction
from autopart.hardware.mesh import Mesh
from autopart.passes.source import Source
from autopart.passes.trace import trace
from autopart.planner.make_plan import make_plan
from autopart.planner.request import Request

Tensor = torch.Tensor
TOLERANCE = 1e-5


class Base(nn.Module):
    """Two products and what stands between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def between(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor, target: Tensor) -> Any:
        return F.mse_loss(self.second(self.between(self.first(x))), target)


class Between(Base):
    """The same with any function between."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def between(self, h: Tensor) -> Tensor:
        return self.function(h)


def batch() -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(1)
    return {"x": torch.randn(4, 6, generator=numbers), "target": torch.randn(4, 4, generator=numbers)}


def assert_exact(model: nn.Module) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    source, mesh = Source(model, batch(), torch.float32), Mesh.of("2:cpu")
    found = simulate_plan(source, make_plan(source, mesh, Request(4, micro_batch=4, pp=1, tp=2)))
    loss, gradients = one_process(model, batch())
    assert float(found.loss) == pytest.approx(float(loss), rel=TOLERANCE)
    assert worst_error(found.gradients, gradients)[0] < TOLERANCE


def without(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """h + function(h), the function under torch.no_grad."""

    def run(h: Tensor) -> Tensor:
        with torch.no_grad():
            made = function(h)
        return h + made

    return run


def nested(h: Tensor) -> Tensor:
    with torch.no_grad():
        a = h * 2
        with torch.enable_grad():
            b = h * 3
        c = a + b
    return h + b + c


def switched(h: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        scale = h.abs().amax(-1, keepdim=True)
    return h / (scale + 1)


def inferred(h: Tensor) -> Tensor:
    with torch.inference_mode():
        scale = h.abs().amax(-1, keepdim=True)
    return h / (scale.clone() + 1)


def twice(h: Tensor) -> Tensor:
    with torch.no_grad():
        a = h * 2
    with torch.no_grad():
        b, same = a * 2, h.float()
    return h * same + a + b


def filled(h: Tensor) -> Tensor:
    place = torch.zeros_like(h)
    with torch.no_grad():
        place.copy_(h)
    return h * place


@torch.no_grad()
def decorated(h: Tensor) -> Tensor:
    return h.tanh()


@pytest.mark.parametrize(
    "function",
    [
        without(lambda h: h * 2),
        without(lambda h: h.double().float()),
        without(lambda h: h.view(-1, 2, 4).reshape(-1, 8)),
        without(lambda h: h.detach()),
        without(lambda h: h),
        without(lambda h: h.to(h.dtype)),
        without(lambda h: h.contiguous()),
        without(lambda h: h.type_as(h)),
        without(lambda h: h.float().contiguous()),
        without(lambda h: F.dropout(h, 0.0)),
        without(nested),
        nested,
        switched,
        inferred,
        twice,
        filled,
        lambda h: h * decorated(h),
        lambda h: h * h.detach(),
        lambda h: (h * 2).detach_() * h,
        lambda h: h * checkpoint(without(torch.tanh), h, use_reentrant=False),
    ],
)
def test_regions_without_gradients_have_none(function: Callable[[Tensor], Tensor]) -> None:
    assert_exact(Between(function))


class WithoutWeights(Base):
    """Weights read under torch.no_grad: as they are they keep their gradient, made anew they do not."""

    def between(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            same, new = self.second.bias.float(), self.second.bias * 2
        return h * (same.sum() + new.sum())


def test_weights_read_without_gradients() -> None:
    assert_exact(WithoutWeights())


class LastState(Base):
    """The last state of an LSTM, whose shape torch before 2.13 traces wrongly."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.LSTM(8, 8)

    def between(self, h: Tensor) -> Tensor:
        _, (states, cells) = self.line(h[None])
        return F.relu(states[-1] + cells[-1])


def test_states_of_an_lstm_have_their_shapes() -> None:
    assert_exact(LastState())


class Square(torch.autograd.Function):
    """With the right derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x * x * factor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return 2 * ctx.factor * x * gradients[0], None


class Swish(torch.autograd.Function):
    """With the right derivative, and a context of its own."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x.sigmoid()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return gradients[0] * (s + x * s * (1 - s))


class Straight(torch.autograd.Function):
    """Rounds, and lets gradients through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Reversed(Straight):
    """Turns gradients round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


class Clipped(Reversed):
    """Clips gradients."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].clamp(-0.1, 0.1)


@pytest.mark.parametrize("function", [lambda h: Square.apply(h, 3.0), lambda h: Swish.apply(h), Swish.apply])
def test_right_derivatives_are_accepted(function: Callable[[Tensor], Tensor]) -> None:
    assert_exact(Between(function))


@pytest.mark.parametrize("kind", [Straight, Reversed, Clipped])
@pytest.mark.parametrize("kept", [False, True])
def test_other_derivatives_are_refused(kind: type[torch.autograd.Function], kept: bool) -> None:
    apply = kind.apply
    model = Between(apply if kept else lambda h: kind.apply(h))
    with pytest.raises(PartitionError, match=rf"{kind.__name__} \(test_exporting\.py:\d+\)") as caught:
        trace(model, batch())
    assert "its backward is not the derivative of its forward" in caught.value.why


class Headed(torch.autograd.Function):
    """Scales every `width` elements of the last dim, with the right derivative; `least` elements of it are needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, width: int, least: int = 0) -> Tensor:
        assert x.shape[-1] >= least
        ctx.save_for_backward(x, scale)
        return (x.view(*x.shape[:-1], -1, width) * scale).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, scale = ctx.saved_tensors
        parts, turned = x.view(*x.shape[:-1], -1, len(scale)), gradients[0].view(*x.shape[:-1], -1, len(scale))
        return (turned * scale).view(x.shape), (turned * parts).flatten(0, -2).sum(0), None, None


class Doubled(Straight):
    """Lets gradients through as they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2


LARGE = (64, 4096, 14336)


@pytest.mark.parametrize(
    ("function", "shapes", "rest", "error"),
    [
        (Square, [LARGE], (2.5,), ""),
        (Headed, [LARGE, (128,)], (128,), ""),
        (Headed, [(1, 512, 4096), (128,)], (128, 1000), ""),
        (Headed, [LARGE, (128,)], (128, 1000), "AssertionError: .* at sizes smaller than its own [0-9,]+ elements"),
        (Doubled, [LARGE], (), "is not the derivative"),
        (Doubled, [(50257, 5, 4099)], (), "is not the derivative"),
        (Straight, [(8,) * 9], (), "too many elements"),
    ],
)
def test_functions_are_tried_at_small_sizes(
    function: Any, shapes: list[tuple[int, ...]], rest: tuple[Any, ...], error: str
) -> None:
    given = [torch.empty(shape, device="meta", requires_grad=True) for shape in shapes]
    call = CustomFunction(function, (*given, *rest), "here:1")
    with nullcontext() if not error else pytest.raises(PartitionError, match=error):
        call.check()


def test_a_function_that_is_wrong_at_small_sizes_is_not_tried_at_large_ones() -> None:
    tried: list[int] = []

    class Watched(Doubled):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            tried.append(x.numel())
            return x * 2

    with pytest.raises(PartitionError, match="is not the derivative"):
        CustomFunction(Watched, (torch.empty(2**12, 2**11, device="meta", requires_grad=True),), "here:1").check()
    assert 0 < max(tried) < 2**18


@pytest.mark.parametrize(("factors", "checks"), [((3.0, 3.0), 1), ((3.0, 2.0), 2)])
def test_equal_calls_of_a_function_are_checked_once(factors: tuple[float, float], checks: int) -> None:
    first, second = factors
    with mock.patch.object(CustomFunction, "check", autospec=True) as check:
        trace(Between(lambda h: Square.apply(h, first) + Square.apply(h, second)), batch())
    assert check.call_count == checks


def test_functions_are_let_alone_again() -> None:
    before = {**vars(torch.autograd.Function), **vars(torch.autograd.Function.__mro__[1])}
    inference = torch.inference_mode.__enter__, torch.inference_mode.__exit__
    trace(Between(Swish.apply), batch())
    assert before == {**vars(torch.autograd.Function), **vars(torch.autograd.Function.__mro__[1])}
    assert inference == (torch.inference_mode.__enter__, torch.inference_mode.__exit__)


class Item(Base):
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        factor = x.sum().item()  # here
        return F.mse_loss(self.second(self.first(x)) * factor, target)


class Branch(Base):
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        if x.sum() > 0:  # here
            x = -x
        return super().forward(x, target)


class Nonzero(Base):
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        count = x.nonzero().sum()  # here
        return super().forward(x, target) * count


class Masked(Base):
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        h = self.first(x)
        return h[h > 0].sum()  # here


class Data(Base):
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        h = self.first(x)
        return F.mse_loss(F.linear(h, self.second.weight.data), target)  # here


class Clamped(Base):
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            self.first.weight.clamp_(-0.1, 0.1)  # here
        return super().forward(x, target)


class Overwritten(Base):
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        h = self.first(x)
        with torch.no_grad():
            h[:, 0].fill_(0.0)  # here
        return F.mse_loss(self.second(h), target)


class Failing(Base):
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        raise ValueError("not today")  # here


class Changed(Base):
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x.mul_(2)
        return super().forward(x, target)


class Lossless(Base):
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.second(self.first(x))


class Nothing(Base):
    def forward(self, x: Tensor, target: Tensor) -> None:
        self.first(x)


class Counted(Base):
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return (x > 0).sum()


def line_of(kind: type[nn.Module]) -> str:
    """``test_exporting.py:12``, where the class says so."""
    lines, first = inspect.getsourcelines(kind)
    return f"test_exporting.py:{first + next(i for i, line in enumerate(lines) if '# here' in line)}"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Item, "a number depends on data"),
        (Branch, "depends on the values of tensors"),
        (Nonzero, "the shape of a tensor depends on data"),
        (Masked, "the shape of a tensor depends on data"),
        (Data, "reaches a tensor that the model does not own"),
        (Clamped, "changes a tensor that has a gradient under torch.no_grad"),
        (Overwritten, "changes a tensor that has a gradient under torch.no_grad"),
        (Failing, "ValueError: not today"),
    ],
)
def test_a_refusal_names_the_line(kind: type[Base], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PartitionError) as caught:
        autopart.plan(kind(), "2:cpu", batch(), tp=2)
    assert message in str(caught.value) and line_of(kind) in str(caught.value), caught.value
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Between(lambda h: h * 2 if random.random() < 0.5 else h), "draws from Python's or numpy's random"),
        (Between(lambda h: h * float(np.random.rand())), "draws from Python's or numpy's random"),
        (Changed(), "changes its input x"),
        (Lossless(), r"no scalar loss\n.*\(2, 4\)"),
        (Nothing(), "no scalar loss"),
        (Counted(), "no scalar loss"),
    ],
)
def test_what_no_plan_could_train_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        autopart.plan(model, "2:cpu", batch(), tp=2)


def untraceable(module: nn.Module, query: Tensor, *others: Any, **settings: Any) -> tuple[Tensor, None]:
    """An attention that looks at its numbers."""
    if query.sum() > 0:
        query = -query
    return query, None


@pytest.mark.slow
def test_another_attention_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "untraceable", untraceable)
    model, given = models.build("llama")
    model.config._attn_implementation = "untraceable"
    with pytest.raises(PartitionError, match="cannot trace the model") as caught:
        autopart.plan(model, "2:cpu", given, tp=2)
    assert 'set_attn_implementation("sdpa")' in caught.value.try_ and "test_exporting.py" in caught.value.why
    assert model.config._attn_implementation == "untraceable"
    model.set_attn_implementation("sdpa")
    assert autopart.plan(model, "2:cpu", given, tp=2, micro_batch=8).tp == 2


@dataclass
class Output(ModelOutput):
    """As transformers' models return."""

    scale: Tensor | None = None
    loss: Tensor | None = None
    states: tuple[Tensor, ...] | None = None


class Returning(Base):
    """A model that returns its loss in one of many ways."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.pack = pack

    def forward(self, x: Tensor, target: Tensor) -> Any:
        h = self.first(x)
        return self.pack(super().forward(x, target), h)


@pytest.mark.parametrize(
    "pack",
    [
        lambda loss, h: (loss, h),
        lambda loss, h: [loss, (h, h)],
        lambda loss, h: {"scale": h.mean(), "loss": loss, "states": (h, h * 2)},
        lambda loss, h: Output(scale=h.mean(), loss=loss, states=(h, h * 2)),
    ],
)
def test_a_loss_is_found_among_other_outputs(pack: Callable[[Tensor, Tensor], Any]) -> None:
    assert_exact(Returning(pack))


@pytest.mark.slow
def test_hidden_states_and_attentions_are_left_out() -> None:
    model, given = models.build("llama")
    model.config.output_hidden_states = True
    found = autopart.check(model, "2:cpu", given, tp=2, micro_batch=8)
    assert found.gradient_error < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_caches_for_generation_are_left_out(name: str) -> None:
    """As transformers makes its models: with a cache in what they give. The user's own model keeps its own."""
    plain, cached = models.MODELS[name](1), models.MODELS[name](1)
    cached.config.use_cache = True  # type: ignore[union-attr]
    batch, mesh = models.batch_for(name, torch.float32), Mesh.parse("2:cpu")
    hashes = {Source(model, batch, torch.float32).full(models.SAMPLES, mesh).hash for model in (plain, cached)}
    assert len(hashes) == 1
    assert cached.config.use_cache  # type: ignore[union-attr]
    assert autopart.check(cached, mesh, batch, tp=2).gradient_error < 1e-5


class Variational(nn.Module):
    """A head that is cast to what it is already, as routers of experts do; a loss of torch.distributions, which look at
    the values that they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 8)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        self.head = self.head.to(x.dtype)
        mean, spread = self.head(x).chunk(2, -1)
        return -torch.distributions.Normal(mean, F.softplus(spread) + 0.1).log_prob(target).mean()


def test_casts_that_change_nothing_and_distributions() -> None:
    assert_exact(Variational())
