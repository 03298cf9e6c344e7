"""Experts with biases and clamped gates against a gathered copy of every pair's weights in float64."""

import json
from typing import NamedTuple

import pytest
import torch

from autopart.kernels import clamped_experts, clamped_gate
from autopart.kernels.table import kernel_of
from tests.support.interpreted import interpreted as interpreted_child
from tests.support.kernel_checks import saved_bytes

ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-5}
"""Of a result over its largest element, after two products; the interpreter truncates bfloat16 where a GPU rounds."""
NAMES = ("y", "dx", "dup", "ddown", "dup_bias", "ddown_bias", "dweights")
GATE = 1.702, 0.7
"""Factor and limit; about a fifth of the gates is clamped."""


class Case(NamedTuple):
    """t tokens of d elements, of which each goes to k of ``experts`` experts of width f."""

    t: int
    d: int
    f: int
    experts: int
    k: int
    dtype: torch.dtype
    weight_dtype: torch.dtype | None = None

    @property
    def id(self) -> str:
        return "-".join(str(field).removeprefix("torch.") for field in self)


PLAIN = [
    Case(7, 6, 5, 4, 2, torch.float64),
    Case(9, 8, 16, 5, 3, torch.float32),
    Case(9, 8, 16, 5, 3, torch.bfloat16, torch.float32),
    Case(1, 8, 8, 9, 1, torch.float16),
]
INTERPRETED = [
    Case(5, 8, 16, 3, 2, torch.float32),
    Case(5, 8, 5, 3, 2, torch.float32),
    Case(4, 16, 8, 5, 3, torch.bfloat16, torch.float32),
    Case(2, 4, 530, 3, 1, torch.float32),
]
LARGE = [Case(1500, 2048, 768, 64, 8, torch.bfloat16, torch.float32), Case(1000, 512, 1408, 8, 2, torch.float16)]


def arguments(case: Case, device: str = "cpu") -> list[torch.Tensor]:
    """x, up, down, biases, weights and numbers of experts; the experts of a token differ."""
    torch.manual_seed(0)
    t, d, f, experts, k, dtype, weight_dtype = case
    given = [torch.randn(t, d), torch.randn(experts, d, 2 * f) / d**0.5, torch.randn(experts, f, d) / f**0.5]
    given += [torch.randn(experts, 2 * f) / 2, torch.randn(experts, d) / 2, torch.rand(t, k)]
    dtypes = [dtype] * 5 + [weight_dtype or dtype]
    leaves = [each.to(device, wanted).requires_grad_() for each, wanted in zip(given, dtypes, strict=True)]
    return [*leaves, torch.rand(t, experts).topk(k).indices.to(device)]


def results(function, given: list[torch.Tensor], *constants) -> list[torch.Tensor]:
    """The output, and the gradients of its product with fixed numbers."""
    y = function(*given, *GATE, *constants)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y)
    return [y.detach(), *torch.autograd.grad(y, given[:6], dy)]


def errors(case: Case, device: str = "cpu") -> dict[str, float]:
    """The largest error of each result, over its largest element."""
    given = arguments(case, device)
    wide = [t.detach().double().requires_grad_() for t in given[:6]]
    exact = results(clamped_experts.reference, [*wide, given[6]])
    found = results(clamped_experts.clamped_experts, given)
    assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(found[1:], given, strict=False))
    pairs = zip(NAMES, found, exact, strict=True)
    return {name: float((a.double() - b).abs().max() / b.abs().max()) for name, a, b in pairs}


@pytest.fixture(scope="module")
def interpreted():
    return interpreted_child(__file__)


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.id)
def test_experts_meet_the_float64_reference(case):
    found = errors(case)
    assert max(found.values()) <= ROUNDING[case.dtype], found


def test_biases_may_be_of_a_finer_dtype():
    given = arguments(PLAIN[2])
    given[3:5] = [t.detach().float().requires_grad_() for t in given[3:5]]
    found = results(clamped_experts.clamped_experts, given)
    wide = [t.detach().double().requires_grad_() for t in given[:6]]
    exact = results(clamped_experts.reference, [*wide, given[6]])
    assert [t.dtype for t in found[1:]] == [t.dtype for t in given[:6]]
    worst = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True)]
    assert max(worst) <= ROUNDING[torch.bfloat16], worst


def test_an_expert_may_be_given_twice():
    *given, ids = arguments(PLAIN[0])
    ids = torch.cat([ids[:, :1], ids[:, :1]], 1)
    found = results(clamped_experts.clamped_experts, [*given, ids])
    torch.testing.assert_close(found, results(clamped_experts.reference, [*given, ids]))


@pytest.mark.slow
@pytest.mark.parametrize("case", INTERPRETED, ids=lambda case: case.id)
def test_interpreted_kernels_meet_the_float64_reference(case, interpreted):
    found = interpreted[case.id]
    assert max(found.values()) <= ROUNDING[case.dtype], found


@pytest.mark.slow
def test_interpreted_gates_are_clamped_where_torch_clamps_them(interpreted):
    """At the limits, beyond them, at infinities and nan."""
    assert interpreted["gates"] == edges()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", INTERPRETED + LARGE, ids=lambda case: case.id)
def test_device_kernels_meet_the_float64_reference(case):
    found = errors(case, "cuda")
    assert max(found.values()) <= ROUNDING[case.dtype], found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_gates_are_clamped_where_torch_clamps_them():
    assert edges("cuda") == edges()


def edges(device: str = "cpu") -> list[list[float]]:
    """Values and gradients in thousandths at the limits and beyond; -9e9 for nan."""
    inf, nan = float("inf"), float("nan")
    marks = torch.tensor([0.5, 0.625, 0.375, -0.5, -0.625, inf, -inf, nan, 0.0], device=device)
    x = torch.cartesian_prod(marks, marks).view(1, -1).repeat(2, 1)
    bias, number = torch.zeros(2, x.shape[1], device=device), torch.tensor([1, 5], device=device)
    y = clamped_gate.clamped_gate(x, bias, number, 2.0, 0.5)
    dx = clamped_gate.gradients(torch.ones_like(y), x, bias, number, 2.0, 0.5)
    return [(1000 * t).nan_to_num(-9e9, 8e9, -8e9).round().flatten().tolist() for t in (y, dx)]


@pytest.mark.parametrize("of", [1, 2])
def test_experts_of_some_ranks_sum_to_the_whole(of):
    """Also where a rank has no expert that a token goes to."""
    x, *shares, weights, ids = arguments(PLAIN[0])
    whole = results(clamped_experts.clamped_experts, [x, *shares, weights, ids])
    parts = []
    for first in range(0, len(shares[0]), of):
        own = [t[first : first + of].detach().requires_grad_() for t in shares]
        parts.append(results(clamped_experts.clamped_experts, [x, *own, weights, ids], first))
    for i, joined in enumerate((sum, sum, *[torch.cat] * 4, sum)):
        torch.testing.assert_close(joined([part[i] for part in parts]), whole[i])


def test_parts_of_every_expert_sum_to_the_whole():
    x, up, down, up_bias, down_bias, weights, ids = arguments(Case(7, 6, 4, 4, 2, torch.float64))
    whole = results(clamped_experts.clamped_experts, [x, up, down, up_bias, down_bias, weights, ids])
    parts = []
    for rank in range(2):
        own = [up[:, :, 4 * rank : 4 * rank + 4], down[:, 2 * rank : 2 * rank + 2], up_bias[:, 4 * rank : 4 * rank + 4]]
        own = [t.detach().requires_grad_() for t in own]
        given = [x, *own, down_bias, weights, ids]
        parts.append(results(clamped_experts.clamped_experts, given, 0, rank == 0))
    for i, dim in enumerate((None, None, 2, 1, 1, None, None)):
        pieces = [part[i] for part in parts]
        torch.testing.assert_close(sum(pieces) if dim is None else torch.cat(pieces, dim), whole[i])


def test_reference_is_that_of_transformers_bit_for_bit():
    transformers = pytest.importorskip("transformers")
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    case = Case(7, 6, 5, 4, 2, torch.float32)
    x, up, down, up_bias, down_bias, weights, ids = (t.detach() for t in arguments(case))
    config = transformers.GptOssConfig(
        hidden_size=6, intermediate_size=5, num_local_experts=4, experts_implementation="batched_mm"
    )
    theirs = GptOssExperts(config)
    names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    theirs.load_state_dict(dict(zip(names, (up, down, up_bias, down_bias), strict=True)))
    found = clamped_experts.reference(x, up, down, up_bias, down_bias, weights, ids, theirs.alpha, theirs.limit)
    assert torch.equal(found, theirs(x, ids, weights))


def test_what_is_said_of_bytes_is_so():
    given = arguments(Case(6, 8, 16, 4, 2, torch.float32))
    meta = [t.detach().to("meta") for t in given]
    kept = clamped_experts.kept(tuple(meta), ())
    assert saved_bytes(lambda *args: clamped_experts.clamped_experts(*args, *GATE), *given) == sum(
        t.nbytes for t in kept
    )
    s, d, f = 12, 8, 16
    products = 4 * (s * (d + 2 * f) + s * (f + d) + 3 * 4 * d * f)
    moved, apart = clamped_experts.bytes_moved(*meta, *GATE), clamped_experts.streamed(*meta, *GATE)
    assert moved.forward - apart.forward == products and moved.backward > moved.forward
    assert clamped_experts.clamped_experts(*meta, *GATE).shape == (6, 8)
    assert kernel_of("autopart.clamped_experts") is clamped_experts.KERNEL


def test_a_bias_of_another_expert_is_caught(monkeypatch):
    right = clamped_gate.clamped_gate
    monkeypatch.setattr(clamped_gate, "clamped_gate", lambda x, bias, *rest: right(x, bias.roll(1, 0), *rest))
    assert errors(PLAIN[0])["y"] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_ahead_without_spills(capability):
    pytest.importorskip("triton")
    usage = clamped_experts.KERNEL.ahead(capability, **clamped_experts.KERNEL.shapes["gpt-oss-120b"])
    assert all(one.spills == 0 and one.registers <= 128 for one in usage.values()), usage


if __name__ == "__main__":
    print(json.dumps({case.id: errors(case) for case in INTERPRETED} | {"gates": edges()}))
