"""Grouped matrix products against one product for each expert in float64, and against torch's own."""

import json
import os
from typing import NamedTuple

import pytest
import torch

from autopart.kernels import grouped_matmul
from autopart.sharding.notation import parse
from tests.support.interpreted import interpreted as interpreted_child

ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}
"""Of a result over its largest element; the interpreter truncates bfloat16 where a GPU rounds."""


class Case(NamedTuple):
    """Groups of ``sizes`` rows, then ``rest`` rows of no expert; weights (experts, n, k)."""

    sizes: tuple[int, ...]
    n: int
    k: int
    dtype: torch.dtype
    rest: int = 0
    layout: str = "plain"
    shifted: int = 0

    @property
    def id(self) -> str:
        return "-".join(str(field).removeprefix("torch.") for field in self)


SIZES = ((1,), (3, 0, 9, 1), (0, 0, 33), (20, 7))
CASES = [Case(sizes, 5, 7, dtype) for sizes in SIZES for dtype in ROUNDING]
CASES += [Case((3, 0, 20), 130, 70, dtype, 4) for dtype in ROUNDING]
CASES += [Case((3, 0, 20), 144, 64, dtype, 40) for dtype in ROUNDING]
CASES += [Case((3, 9), 12, 20, torch.float32, 1, layout) for layout in ("transposed", "strided")]
CASES += [Case((0, 0), 4, 8, torch.float32, 3), Case((2, 1, 0, 5, 2, 3, 0, 1, 1), 16, 16, torch.float32)]
WRONG = [Case((8, 9), 5, 7, torch.float32, shifted=1)]
LARGE = [Case((300, 0, 1, 129, 582), 768, 512, dtype, 9) for dtype in ROUNDING]
INTERPRETED = CASES if "AUTOPART_EXAMPLES" in os.environ else [c for c in CASES if c.n != 144 or c.dtype.itemsize == 2]


def offsets_of(sizes: tuple[int, ...], device: str = "cpu") -> torch.Tensor:
    """(experts + 1,)"""
    return torch.tensor([0, *sizes], device=device).cumsum(0)


def errors(case: Case, device: str) -> dict[str, float]:
    """Largest error of y, dx and dweight over the largest element of each; 0 where all are 0."""
    torch.manual_seed(0)
    s = sum(case.sizes) + case.rest
    x, weight = torch.randn(s, case.k), torch.randn(len(case.sizes), case.n, case.k)
    if case.layout == "strided":
        x, weight = (torch.randn(*t.shape[:-1], 2 * t.shape[-1])[..., ::2] for t in (x, weight))
    x, weight = x.to(device, case.dtype), weight.to(device, case.dtype)
    if case.layout == "transposed":
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    leaves, offsets = (x.requires_grad_(), weight.requires_grad_()), offsets_of(case.sizes, device)
    moved = offsets.clone()
    moved[1:-1] += case.shifted
    y = grouped_matmul.grouped_matmul(*leaves, moved)
    assert y.grad_fn is not None and "autopart_grouped_matmul" in y.grad_fn.name(), "the reference ran"
    dy = torch.randn(case.n, s).to(y).t()
    got = (y, *torch.autograd.grad(y, leaves, dy))
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    exact = grouped_matmul.reference(*exact_leaves, offsets)
    want = (exact, *torch.autograd.grad(exact, exact_leaves, dy.double()))
    assert all(a.dtype == case.dtype and a.shape == b.shape for a, b in zip(got, want, strict=True))
    found = [((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for a, b in zip(got, want, strict=True)]
    return dict(zip(("y", "dx", "dweight"), found, strict=True))


def spread_of_values(device: str) -> list[bool]:
    """Whether infinities and nans of one expert stay in its rows, and whether empty groups have gradients of zeros."""
    x, weight = torch.ones(6, 4, device=device), torch.ones(3, 5, 4, device=device, requires_grad=True)
    x[0, 0], x[1, 1] = float("inf"), float("nan")
    offsets = offsets_of((2, 0, 4), device)
    y, expected = grouped_matmul.grouped_matmul(x, weight, offsets), grouped_matmul.reference(x, weight, offsets)
    y[2:].sum().backward()
    assert weight.grad is not None
    return [torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0)), bool((weight.grad[1] == 0).all())]


@pytest.fixture(scope="module")
def interpreted():
    return interpreted_child(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("case", INTERPRETED, ids=lambda case: case.id)
def test_interpreted_kernels_meet_the_float64_reference(case, interpreted):
    assert max(interpreted[case.id].values()) <= ROUNDING[case.dtype], interpreted[case.id]


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.id)
def test_a_row_of_another_expert_is_caught(case, interpreted):
    assert min(interpreted[case.id].values()) > 0.01, interpreted[case.id]


@pytest.mark.slow
def test_interpreted_infinities_stay_in_their_group(interpreted):
    assert interpreted["values"] == [True, True]


@pytest.mark.slow
def test_the_operator_is_registered_as_torch_asks(interpreted):
    assert interpreted["registered"] is True


def test_reference_is_torch_s_grouped_product():
    x, weight = torch.randn(12, 8, requires_grad=True), torch.randn(3, 16, 8, requires_grad=True)
    offsets, dy = offsets_of((5, 0, 7)), torch.randn(12, 16)
    found = grouped_matmul.grouped_matmul(x, weight, offsets)
    expected = torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=offsets[1:].int())
    torch.testing.assert_close(found, expected)
    pairs = zip(*(torch.autograd.grad(y, (x, weight), dy) for y in (found, expected)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)


def test_reference_is_the_loop_of_transformers_bit_for_bit():
    pytest.importorskip("transformers")
    from transformers.integrations import moe

    x, weight = torch.randn(12, 7), torch.randn(3, 5, 7)
    offsets = offsets_of((5, 0, 7))
    expected = moe._grouped_mm_fallback(x, weight.transpose(1, 2), offsets[1:])
    assert torch.equal(grouped_matmul.reference(x, weight, offsets), expected)


def test_gradient_of_the_reference():
    x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((6, 3), (3, 2, 3)))
    assert torch.autograd.gradcheck(grouped_matmul.reference, (x, weight, offsets_of((2, 0, 3))))


FALLBACKS = {
    "float64": (torch.randn(3, 4).double(), torch.randn(2, 5, 4).double()),
    "no rows": (torch.randn(0, 4), torch.randn(2, 5, 4)),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_the_kernels_cannot_take_goes_to_the_reference(name, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("kernels used")

    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("AUTOPART_FORCE_TRITON", "1")
    monkeypatch.setattr(grouped_matmul, "launch", refuse)
    x, weight = FALLBACKS[name]
    assert grouped_matmul.grouped_matmul(x, weight, offsets_of((0, len(x)))).shape == (len(x), 5)


def test_the_operator_takes_fake_tensors():
    pytest.importorskip("triton")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, weight = torch.empty(6, 4, requires_grad=True), torch.empty(3, 5, 4, requires_grad=True)
        y = torch.ops.autopart.grouped_matmul(x, weight, torch.empty(4, dtype=torch.int64))
        y.sum().backward()
        assert y.shape == (6, 5) and x.grad.shape == (6, 4) and weight.grad.shape == (3, 5, 4)


def test_bytes_moved_and_rule():
    x, weight = torch.empty(6, 4, device="meta"), torch.empty(3, 5, 4, device="meta")
    kernel = grouped_matmul.KERNEL
    assert kernel.bytes_moved(x, weight, x) == (4 * (24 + 30 + 60), 4 * (48 + 30 + 120))
    assert kernel.kept((x, weight, x), (x,)) == (x, weight, x) and len(parse(kernel.rule).inputs) == 3


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_ahead_without_spills(capability):
    pytest.importorskip("triton")
    shapes = [*grouped_matmul.KERNEL.shapes.values(), {"s": 100, "n": 100, "k": 70, "experts": 4}]
    if "AUTOPART_EXAMPLES" in os.environ:
        shapes += [{"dtype": torch.float32}, {"dtype": torch.float16, "s": 64}]
    for shape in shapes:
        usage = grouped_matmul.compile_ahead(capability, **shape)
        assert all(kernel.spills == 0 and kernel.shared <= 160 * 1024 for kernel in usage.values()), (shape, usage)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES + LARGE, ids=lambda case: case.id)
def test_device_kernels_meet_the_float64_reference(case):
    found = errors(case, "cuda")
    assert max(found.values()) <= ROUNDING[case.dtype], found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_infinities_stay_in_their_group():
    assert spread_of_values("cuda") == [True, True]


def registered() -> bool:
    """Whether torch's checks of the operator's schema and gradients pass."""
    x, weight = torch.randn(4, 3, requires_grad=True), torch.randn(2, 5, 3, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration")
    operator = torch.ops.autopart.grouped_matmul.default
    torch.library.opcheck(operator, (x, weight, offsets_of((1, 3))), test_utils=checks)
    return True


if __name__ == "__main__":
    found: dict[str, object] = {case.id: errors(case, "cpu") for case in INTERPRETED + WRONG}
    print(json.dumps(found | {"values": spread_of_values("cpu"), "registered": registered()}))
