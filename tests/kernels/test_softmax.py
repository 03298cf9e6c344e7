"""Softmaxes of scores against their references in float64."""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import functional as F

from autopart.kernels import softmax as module
from autopart.kernels.kernel import Bytes
from autopart.kernels.softmax import KERNELS, masked_reference, masked_softmax, topk_reference, topk_softmax
from tests.support.interpreted import interpreted as interpreted_child

INF, NAN = float("inf"), float("nan")
ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


class Case(NamedTuple):
    """One comparison with the float64 reference, of scores of a shape in a layout of memory; `k` of the top-k softmax,
    0 for the masked one."""

    name: str
    constants: dict[str, Any]
    k: int = 0
    padded: bool = False
    shape: tuple[int, ...] = (2, 2, 9, 37)
    dtype: torch.dtype = torch.float32
    layout: str = "plain"
    spread: float = 2.0
    wrong: Mapping[str, Any] = MappingProxyType({})


MASKED = [
    Case("all", {}),
    Case("causal", {"causal": True}),
    Case("causal, square", {"causal": True}, shape=(1, 3, 16, 16)),
    Case("more queries than keys", {"causal": True}, shape=(1, 2, 37, 5)),
    Case("window", {"causal": True, "window": 4}),
    Case("two-sided window", {"window": 4}),
    Case("two-sided window, more queries", {"window": 2}, shape=(1, 2, 17, 5)),
    Case("cap", {"causal": True, "cap": 1.5}),
    Case("cap, large scores", {"cap": 3.0}, spread=100.0),
    Case("padding", {}, padded=True),
    Case("everything", {"causal": True, "window": 6, "cap": 2.0}, padded=True),
    Case("one element", {"causal": True}, shape=(1, 1, 1, 1)),
    Case("wide", {"causal": True}, shape=(1, 1, 3, 5000)),
    Case("large scores", {}, spread=1e4),
    Case("zeros", {"causal": True}, spread=0.0),
    *(Case(layout, {"causal": True}, layout=layout) for layout in ("swapped", "sliced", "strided", "expanded")),
    Case("half", {"causal": True, "cap": 2.0}, padded=True, dtype=torch.float16),
    Case("bfloat16", {"causal": True}, dtype=torch.bfloat16),
]
TOPK = [
    *(Case(f"top {k}", {}, k) for k in (1, 3, 37, 100)),
    Case("top 3 of one", {}, 3, shape=(4, 1)),
    Case("top 5 of a vector", {}, 5, shape=(29,)),
    Case("top 7, wide", {}, 7, shape=(2, 5000)),
    Case("top 2 of few values", {}, 2, layout="few"),
    Case("top 4 of few values, half", {}, 4, layout="few", dtype=torch.float16),
    Case("top 4 of zeros", {}, 4, spread=0.0),
    Case("top 3, large scores", {}, 3, spread=1e30),
    Case("top 3, subnormal scores", {}, 3, spread=1e-42),
    *(Case(f"top 4, {layout}", {}, 4, layout=layout) for layout in ("swapped", "sliced", "strided", "expanded")),
    Case("top 4, half", {}, 4, dtype=torch.float16),
    Case("top 4, bfloat16", {}, 4, dtype=torch.bfloat16),
]
CASES = MASKED + TOPK
WRONG = [
    Case("wrong scale", {}, wrong={"scale": 0.31}),
    Case("wrong window", {"window": 4}, wrong={"window": 5}),
    Case("wrong cap", {"cap": 2.0}, wrong={"cap": 2.1}),
    Case("not causal", {"causal": True}, wrong={"causal": False}),
    Case("wrong k", {}, 3, wrong={"k": 4}),
]


def drawn(case: Case, device: str) -> torch.Tensor:
    """Scores of a shape in a layout; of "few", whole numbers from -2 to 2."""
    *leading, queries, keys = case.shape if len(case.shape) > 1 else (1, *case.shape)
    if case.layout == "swapped":
        x = torch.randn(*leading, keys, queries).transpose(-1, -2)
    elif case.layout == "sliced":
        x = torch.randn(*leading, queries, keys + 3)[..., :keys]
    elif case.layout == "strided":
        x = torch.randn(*leading, queries, 2 * keys)[..., ::2]
    elif case.layout == "expanded":
        x = torch.randn(*leading, 1, keys).expand(*leading, queries, keys)
    else:
        x = torch.randn(*leading, queries, keys)
    x = x.round().clamp(-2, 2) if case.layout == "few" else x * case.spread
    return (x if len(case.shape) > 1 else x[0]).to(device, case.dtype)


def run(case: Case, functions: tuple[Any, Any], x: torch.Tensor, wrong: Mapping[str, Any]) -> torch.Tensor:
    """The case's function of x: the first one masks, the second one keeps the largest."""
    if case.k:
        return functions[1](x, **{"k": case.k, **wrong})
    keys = case.shape[-1]
    padding = torch.arange(keys, device=x.device) < torch.tensor([keys - 2, 0], device=x.device)[: len(x), None]
    return functions[0](x, padding if case.padded else None, **{"scale": 0.5, **case.constants, **wrong})


def errors(case: Case, device: str) -> dict[str, float]:
    """Largest error of the output and of the gradient over the largest size of its terms."""
    torch.manual_seed(0)
    x = drawn(case, device).requires_grad_()
    y = run(case, (masked_softmax, topk_softmax), x, case.wrong)
    assert y.grad_fn is not None and "autopart" in y.grad_fn.name(), "the reference ran, not the kernels"
    assert y.dtype == x.dtype and y.shape == x.shape
    dy = torch.randn(*y.shape[:-1], y.shape[-1] + 1).to(y)[..., :-1]
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.dtype == x.dtype and dx.shape == x.shape

    x64 = x.detach().double().requires_grad_()
    exact = run(case, (masked_reference, topk_reference), x64, {})
    (exact_dx,) = torch.autograd.grad(exact, x64, dy.double())
    size = dy.abs().max().item()
    return {"y": (y - exact).abs().max().item(), "dx": (dx - exact_dx).abs().max().item() / size}


def tolerance(case: Case) -> float:
    return ROUNDING[case.dtype] * max(1.0, case.spread if case.spread < 1e20 else 1.0)


def extremes(device: str) -> dict[str, bool]:
    """Whether infinities and NaN make those of the reference."""
    rows = torch.zeros(1, 1, 8, 5)
    rows[0, 0, 1, 2], rows[0, 0, 2, 2], rows[0, 0, 3, 2] = NAN, INF, -INF
    rows[0, 0, 4], rows[0, 0, 5, 1:], rows[0, 0, 6, :3] = -INF, -INF, NAN
    rows[0, 0, 7] = torch.tensor([-0.0, 0.0, -1.0, 0.0, -NAN])
    given = rows.to(device)
    pairs = {
        "masked": (masked_softmax(given), masked_reference(given)),
        "causal": (masked_softmax(given, causal=True), masked_reference(given, causal=True)),
        "top 2": (topk_softmax(given, 2), topk_reference(given, 2)),
        "top 4": (topk_softmax(given, 4), topk_reference(given, 4)),
    }
    return {f"extreme {name}": torch.allclose(*pair, rtol=1e-6, atol=0, equal_nan=True) for name, pair in pairs.items()}


def operators() -> bool:
    """`torch.library.opcheck`, but for fake tensors, which Triton's interpreter reads."""
    tests = ("test_schema", "test_autograd_registration")
    x = torch.randn(1, 2, 3, 5, requires_grad=True)
    torch.library.opcheck(
        torch.ops.autopart.masked_softmax, (x, torch.ones(1, 5) > 0, 0.5, True, 3, 2.0), test_utils=tests
    )
    torch.library.opcheck(torch.ops.autopart.topk_softmax, (x, 2), test_utils=tests)
    y = x.detach().softmax(-1)
    torch.library.opcheck(torch.ops.autopart.softmax_backward, (y, y, y, 0.5, 2.0), test_utils=tests)
    return True


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What every case found, by name, from one interpreting child."""
    return interpreted_child(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_interpreted_kernels_meet_the_float64_reference(case, interpreted):
    found = interpreted[case.name]
    assert max(found.values()) <= tolerance(case), found


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.name)
def test_a_wrong_constant_is_caught(case, interpreted):
    found = interpreted[case.name]
    assert min(found.values()) > 100 * tolerance(case), found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["extreme masked", "extreme causal", "extreme top 2", "extreme top 4", "operators"])
def test_infinities_and_nan_are_those_of_the_reference_and_operators_are_whole(name, interpreted):
    assert interpreted[name] is True


# ---- the references --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("compute_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_masked_reference_is_what_models_write_bit_for_bit(dtype, compute_dtype, cap):
    x, seen = torch.randn(2, 3, 7, 7).to(dtype), torch.ones(7, 7, dtype=torch.bool).tril()
    scores = x * 0.125
    scores = torch.tanh(scores / cap) * cap if cap else scores
    expected = F.softmax(scores.masked_fill(~seen, -INF), dim=-1, dtype=compute_dtype).to(dtype)
    assert torch.equal(masked_reference(x, None, 0.125, True, 0, cap, compute_dtype), expected)


@pytest.mark.parametrize("k", [1, 3, 7, 9])
def test_topk_reference_keeps_the_k_largest(k):
    x = torch.stack([torch.randperm(7) for _ in range(20)]).float()
    y = topk_reference(x, k)
    assert torch.equal(y > 0, x >= 7 - k)
    torch.testing.assert_close(y.sum(-1), torch.ones(20))
    kept = x.masked_fill(x < 7 - k, -INF)
    assert torch.equal(y, kept.softmax(-1))


def test_a_query_that_sees_no_key_has_zeros():
    x = torch.randn(2, 1, 3, 4, requires_grad=True)
    y = masked_reference(x, torch.tensor([[True] * 4, [False] * 4]))
    assert not y[1].any() and torch.equal(y[0], x[0].softmax(-1))
    assert torch.autograd.grad(y.square().sum(), x)[0].isfinite().all()


def test_gradients_of_the_references_are_derivatives():
    x = torch.randn(2, 1, 3, 5, dtype=torch.float64, requires_grad=True)
    padding = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    assert torch.autograd.gradcheck(lambda x: masked_reference(x, padding, 0.5, True, 3, 2.0), x)
    assert torch.autograd.gradcheck(lambda x: topk_reference(x, 3), x)


# ---- what the compiler knows, and what the kernels do not take -------------------------------------------


def test_bytes_moved_and_kept():
    x = torch.empty(2, 3, 4, 5, dtype=torch.bfloat16, device="meta")
    padding = torch.empty(2, 5, dtype=torch.bool, device="meta")
    assert module.masked_bytes(x, padding, 1.0, True, 0, 0.0) == Bytes(4 * 120 + 10, 6 * 120)
    assert module.masked_bytes(x, None, 1.0, True, 0, 2.0) == Bytes(4 * 120, 8 * 120)
    assert module.topk_bytes(x, 3) == Bytes(4 * 120, 6 * 120)
    y = torch.empty_like(x)
    assert module.masked_kept((x, None, 1.0, True, 0, 0.0), (y,)) == (y,)
    assert module.masked_kept((x, None, 1.0, True, 0, 2.0), (y,)) == (y, x)
    assert module.topk_kept((x, 3), (y,)) == (y,)


def refuse(*args, **options):
    raise AssertionError("kernels used")


@pytest.fixture
def forced(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("AUTOPART_FORCE_TRITON", "1")
    monkeypatch.setattr(module, "launch", refuse)


FALLBACKS = {
    "float64": torch.randn(1, 1, 2, 3, dtype=torch.float64),
    "no rows": torch.randn(1, 0, 2, 3),
    "too wide": torch.randn(1, 1, 1, module.MAX_KEYS + 1),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_the_kernels_cannot_take_goes_to_the_references(name, forced):
    x = FALLBACKS[name]
    assert torch.equal(masked_softmax(x, None, 0.5, True), masked_reference(x, None, 0.5, True))
    assert torch.equal(topk_softmax(x, 2), topk_reference(x, 2))


def test_scores_of_other_than_four_dims_go_to_the_reference(forced):
    x = torch.randn(3, 4, 5)
    assert torch.equal(masked_softmax(x, None, 0.5, True), masked_reference(x, None, 0.5, True))


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    pytest.importorskip("triton")
    with FakeTensorMode():
        x = torch.empty(1, 2, 3, 4)
        y = torch.ops.autopart.masked_softmax(x, None, 0.5, True, 0, 2.0)
        results = (masked_softmax(x), topk_softmax(x, 2), y, torch.ops.autopart.topk_softmax(x, 2))
        gradient = torch.ops.autopart.softmax_backward(y, y, x, 0.5, 2.0)
    assert {r.shape for r in (*results, gradient)} == {x.shape}


@pytest.mark.parametrize("function", [masked_softmax, lambda x: topk_softmax(x, 2)])
def test_the_environment_forces_the_kernels(function, forced):
    with pytest.raises(AssertionError, match="kernels used"):
        function(torch.randn(1, 1, 2, 3))


# ---- compiled and on a device ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", [*module.SHAPES, "longest"])
def test_kernels_compile_ahead_without_spills(capability, name):
    pytest.importorskip("triton")
    shapes = module.SHAPES | {"longest": {"keys": module.MAX_KEYS, "cap": True}}
    usage = KERNELS[0].ahead(capability, **shapes[name])
    assert set(usage) == {"masked", "topk", "backward"}
    assert all(kernel.spills == 0 and kernel.registers > 0 for kernel in usage.values()), usage


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_device_kernels_meet_the_float64_reference(case):
    found = errors(case, "cuda")
    assert max(found.values()) <= 2 * tolerance(case), found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_kernels_have_the_infinities_and_nan_of_the_references():
    assert all(extremes("cuda").values())


if __name__ == "__main__":
    results: dict[str, Any] = {case.name: errors(case, "cpu") for case in CASES + WRONG}
    print(json.dumps(results | extremes("cpu") | {"operators": operators()}))
