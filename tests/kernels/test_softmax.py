"""The softmax of the largest scores against its reference in float64."""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

from autopart.kernels import softmax as module
from autopart.kernels.kernel import Bytes
from autopart.kernels.softmax import KERNEL, reference, topk_softmax
from tests.support.interpreted import interpreted as interpreted_child

INF, NAN = float("inf"), float("nan")
ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


class Case(NamedTuple):
    """One comparison with the float64 reference, of scores of a shape in a layout of memory."""

    name: str
    k: int
    shape: tuple[int, ...] = (2, 2, 9, 37)
    dtype: torch.dtype = torch.float32
    layout: str = "plain"
    spread: float = 2.0
    wrong: Mapping[str, Any] = MappingProxyType({})


CASES = [
    *(Case(f"top {k}", k) for k in (1, 3, 37, 100)),
    Case("top 3 of one", 3, shape=(4, 1)),
    Case("top 5 of a vector", 5, shape=(29,)),
    Case("top 7, wide", 7, shape=(2, 5000)),
    Case("top 2 of few values", 2, layout="few"),
    Case("top 4 of few values, half", 4, layout="few", dtype=torch.float16),
    Case("top 4 of zeros", 4, spread=0.0),
    Case("top 3, large scores", 3, spread=1e30),
    Case("top 3, subnormal scores", 3, spread=1e-42),
    *(Case(f"top 4, {layout}", 4, layout=layout) for layout in ("swapped", "sliced", "strided", "expanded")),
    Case("top 4, half", 4, dtype=torch.float16),
    Case("top 4, bfloat16", 4, dtype=torch.bfloat16),
]
WRONG = [
    Case("wrong k", 3, wrong={"k": 4}),
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


def errors(case: Case, device: str) -> dict[str, float]:
    """Largest error of the output and of the gradient over the largest size of its terms."""
    torch.manual_seed(0)
    x = drawn(case, device).requires_grad_()
    y = topk_softmax(x, **{"k": case.k, **case.wrong})
    assert y.grad_fn is not None and "autopart" in y.grad_fn.name(), "the reference ran, not the kernels"
    assert y.dtype == x.dtype and y.shape == x.shape
    dy = torch.randn(*y.shape[:-1], y.shape[-1] + 1).to(y)[..., :-1]
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.dtype == x.dtype and dx.shape == x.shape

    x64 = x.detach().double().requires_grad_()
    exact = reference(x64, case.k)
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
        "top 2": (topk_softmax(given, 2), reference(given, 2)),
        "top 4": (topk_softmax(given, 4), reference(given, 4)),
    }
    return {f"extreme {name}": torch.allclose(*pair, rtol=1e-6, atol=0, equal_nan=True) for name, pair in pairs.items()}


def operators() -> bool:
    """`torch.library.opcheck`, but for fake tensors, which Triton's interpreter reads."""
    tests = ("test_schema", "test_autograd_registration")
    x = torch.randn(1, 2, 3, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.autopart.topk_softmax, (x, 2), test_utils=tests)
    y = x.detach().softmax(-1)
    torch.library.opcheck(torch.ops.autopart.topk_softmax_backward, (y, y), test_utils=tests)
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
@pytest.mark.parametrize("name", ["extreme top 2", "extreme top 4", "operators"])
def test_infinities_and_nan_are_those_of_the_reference_and_operators_are_whole(name, interpreted):
    assert interpreted[name] is True


# ---- the references --------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 7, 9])
def test_reference_keeps_the_k_largest(k):
    x = torch.stack([torch.randperm(7) for _ in range(20)]).float()
    y = reference(x, k)
    assert torch.equal(y > 0, x >= 7 - k)
    torch.testing.assert_close(y.sum(-1), torch.ones(20))
    kept = x.masked_fill(x < 7 - k, -INF)
    assert torch.equal(y, kept.softmax(-1))


def test_gradients_of_the_reference_are_derivatives():
    x = torch.randn(2, 1, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reference(x, 3), x)


# ---- what the compiler knows, and what the kernels do not take -------------------------------------------


def test_bytes_moved_and_kept():
    x = torch.empty(2, 3, 4, 5, dtype=torch.bfloat16, device="meta")
    assert module.bytes_moved(x, 3) == Bytes(4 * 120, 6 * 120)
    y = torch.empty_like(x)
    assert module.kept((x, 3), (y,)) == (y,)


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
def test_what_the_kernels_cannot_take_goes_to_the_reference(name, forced):
    x = FALLBACKS[name]
    assert torch.equal(topk_softmax(x, 2), reference(x, 2))


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    pytest.importorskip("triton")
    with FakeTensorMode():
        x = torch.empty(1, 2, 3, 4)
        results = (topk_softmax(x, 2), torch.ops.autopart.topk_softmax(x, 2))
        gradient = torch.ops.autopart.topk_softmax_backward(x, x)
    assert {r.shape for r in (*results, gradient)} == {x.shape}


def test_the_environment_forces_the_kernels(forced):
    with pytest.raises(AssertionError, match="kernels used"):
        topk_softmax(torch.randn(1, 1, 2, 3), 2)


# ---- compiled and on a device ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", [*KERNEL.shapes, "longest"])
def test_kernels_compile_ahead_without_spills(capability, name):
    pytest.importorskip("triton")
    shapes = KERNEL.shapes | {"longest": {"keys": module.MAX_KEYS}}
    usage = KERNEL.ahead(capability, **shapes[name])
    assert set(usage) == {"topk", "backward"}
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
