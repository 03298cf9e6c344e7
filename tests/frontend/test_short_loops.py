"""Long loops, of which a plan's trace has some iterations: the plan is that of the full trace, and a loop whose body
looks at the number of the iteration, or has effects on more than tensors and lists, is traced in full."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import autopart
from autopart import Mesh
from autopart.ir.graph import calls, info
from autopart.passes.source import Source
from autopart.plan.data import Plan
from autopart.planner.make_plan import make_plan, request_of

WIDTH, TOKENS, MESH = 4, 20, "1x4:h100-80gb"

Body = Callable[["Scan", Tensor], Tensor]


class Scan(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.rate, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.mix = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(self, x + x @ self.mix)


class Model(nn.Module):
    def __init__(self, body: Body, blocks: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Scan(body) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def appends(scan: Scan, x: Tensor) -> Tensor:
    rate, value, state, states = scan.rate(x).sigmoid(), scan.value(x), torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = rate[:, t] * state + value[:, t]
        states.append((state @ scan.mix).tanh())
    return torch.stack(states, 1)


def writes(scan: Scan, x: Tensor) -> Tensor:
    value, high, state, out = scan.value(x), torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0]), torch.zeros_like(x)
    for t in range(x.shape[1]):
        now = value[:, t].float()
        out[:, t] = state * (high - torch.maximum(high, now)).exp() + now
        higher = torch.maximum(high + 1.0, now)
        state, high = (high - higher).exp() * state + now, higher
    return out


def twice(scan: Scan, x: Tensor) -> Tensor:
    return appends(scan, x) + writes(scan, x)


def joins(scan: Scan, x: Tensor) -> Tensor:
    parts, state = [], torch.zeros_like(x[:, :1])
    for t in range(1, x.shape[1] + 1):
        state = state + x[:, t - 1 : t] * x[:, t - 1 : t]
        parts.append(state)
        parts.append(state.exp())
    return torch.cat(parts, 1)[:, ::2]


def looks(scan: Scan, x: Tensor) -> Tensor:
    state, states = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = state + x[:, t] if t % 16 else x[:, t]
        states.append(state)
    return torch.stack(states, 1)


def grows(scan: Scan, x: Tensor) -> Tensor:
    states = []
    for t in range(x.shape[1]):
        states.append(x[:, : t + 1].mean(1))
    return torch.stack(states, 1)


def counts(scan: Scan, x: Tensor) -> Tensor:
    states, place = [], 0
    for _ in range(x.shape[1]):
        states.append(x[:, place].exp())
        place = place + 1
    return torch.stack(states, 1)


def comprehends(scan: Scan, x: Tensor) -> Tensor:
    return torch.stack([x[:, t].exp() for t in range(x.shape[1])], 1)


def names(scan: Scan, x: Tensor) -> Tensor:
    states = {}
    for t in range(x.shape[1]):
        states[t] = x[:, t].exp()
    return torch.stack([*states.values()], 1)


def fills(scan: Scan, x: Tensor) -> Tensor:
    states: list[Tensor] = [x[:, 0]] * x.shape[1]
    for t in range(x.shape[1]):
        states[t] = x[:, t].exp()
    return torch.stack(states, 1)


def extends(scan: Scan, x: Tensor) -> Tensor:
    states: list[Tensor] = []
    for t in range(x.shape[1]):
        states.extend([x[:, t].exp()])
    return torch.stack(states, 1)


def draws(scan: Scan, x: Tensor) -> Tensor:
    states = []
    for t in range(x.shape[1]):
        states.append(nn.functional.dropout(x[:, t], 0.5))
    return torch.stack(states, 1)


@cache
def source(body: Body, blocks: int, short: bool = True) -> Source:
    """A model, traced once; one whose loops are `short`, and another."""
    return Source(Model(body, blocks), {"x": torch.randn(4, TOKENS, WIDTH)}, torch.float32)


def planned(body: Body, short: bool, **asked: int) -> Plan:
    made = source(body, 2, short)
    request = request_of(made.model, made.batch, global_batch=8, precision="float32", **asked)
    every_iteration = mock.patch("autopart.frontend.export.short_loops", lambda *_: nullcontext())
    with nullcontext() if short else every_iteration:
        return make_plan(made, Mesh.parse(MESH), request)


def longest(made: Source) -> int:
    """How many iterations a node stands for at most."""
    return max(info(node).times for node in calls(made.sampled(4, Mesh.parse(MESH)).traced.graph))


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("body", [appends, twice, joins], ids=lambda body: body.__name__)
def test_a_short_trace_is_of_the_same_model_as_the_full_one(body: Body, blocks: int) -> None:
    made, mesh = source(body, blocks), Mesh.parse(MESH)
    short, full = made.sampled(4, mesh), made.full(4, mesh)
    assert longest(made) > TOKENS / 2
    assert len(calls(short.traced.graph)) < 0.6 * len(calls(full.traced.graph))
    assert short.hash == full.hash
    assert list(short.keys.values()) == list(full.keys.values())
    assert short.operators == full.operators


@pytest.mark.slow
@pytest.mark.parametrize("asked", [{}, {"tp": 2, "pp": 2}], ids=str)
@pytest.mark.parametrize("body", [appends, writes, joins], ids=lambda body: body.__name__)
def test_a_plan_from_a_short_trace_is_that_of_the_full_trace(body: Body, asked: dict[str, int]) -> None:
    short, full = planned(body, True, **asked), planned(body, False, **asked)
    assert short.degrees == full.degrees
    assert short.signature == full.signature
    assert short.forward_flops == full.forward_flops
    assert short.step_seconds == pytest.approx(full.step_seconds, rel=1e-9)
    assert short.bound_seconds == pytest.approx(full.bound_seconds, rel=1e-6)
    for one, other in zip(short.stages, full.stages, strict=True):
        assert one.memory == pytest.approx(other.memory)
        assert one.forward_seconds == pytest.approx(other.forward_seconds, rel=1e-9)
        assert one.backward_seconds == pytest.approx(other.backward_seconds, rel=1e-9)


@pytest.mark.parametrize(
    "body", [looks, grows, counts, comprehends, names, fills, extends, draws], ids=lambda body: body.__name__
)
def test_other_loops_are_traced_in_full(body: Body) -> None:
    assert longest(source(body, 1)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("body", [appends, writes], ids=lambda body: body.__name__)
def test_a_plan_from_a_short_trace_is_exact(body: Body) -> None:
    made = source(body, 2)
    report = autopart.check(made.model, "4:cpu", made.batch, pp=2, tp=2)
    assert longest(made) > 1
    assert max(report.loss_error, report.gradient_error) < 1e-5
