"""Sorting, gathering and summing rows by expert against plain torch."""

import json
from typing import NamedTuple

import pytest
import torch

from autopart.kernels import expert_rows, expert_sort
from autopart.sharding.notation import parse
from tests.support.interpreted import interpreted as interpreted_child

ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-6}
"""Of a result over its largest element; the interpreter truncates bfloat16 where a GPU rounds."""


class Case(NamedTuple):
    """t tokens of d elements, of which each goes to k of ``experts``; weights of another dtype, or of the rows'."""

    t: int
    k: int
    d: int
    experts: int
    dtype: torch.dtype
    weight_dtype: torch.dtype | None = None
    layout: str = "plain"
    wrong: bool = False

    @property
    def id(self) -> str:
        return "-".join(str(field).removeprefix("torch.") for field in self)


CASES = [Case(t, k, d, 5, dtype) for dtype in ROUNDING for t, k, d in ((1, 1, 1), (7, 2, 33), (3, 5, 1030))]
CASES += [Case(6, 3, 10, 4, dtype, torch.float32) for dtype in (torch.float16, torch.bfloat16)]
CASES += [Case(6, 3, 10, 4, torch.float32, None, layout) for layout in ("swapped", "strided", "expanded")]
WRONG = [Case(7, 2, 33, 5, torch.float32, wrong=True)]
LARGE = [Case(3000, 8, 2048, 128, torch.bfloat16, torch.float32), Case(1001, 2, 4096, 8, torch.float16)]
SORTS = {"one": (1, 1), "few": (30, 3), "blocks": (1100, 8), "many experts": (300, 200), "one expert": (600, 1)}


def pairs(s: int, experts: int, device: str = "cpu") -> torch.Tensor:
    """Numbers (s,) of experts, and some that are none's."""
    return torch.randint(-1, experts + 1, (s,)).to(device)


def sorts(name: str, device: str) -> bool:
    """Whether the kernels sort as torch's stable sort does."""
    torch.manual_seed(0)
    s, experts = SORTS[name]
    ids = pairs(s, experts, device)
    found, expected = expert_sort.sort_by_expert(ids, experts), expert_sort.reference(ids, experts)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def laid_out(shape: tuple[int, int], case: Case, device: str) -> torch.Tensor:
    """Random numbers in the case's layout."""
    rows, d = shape
    if case.layout == "swapped":
        return torch.randn(d, rows).to(device, case.dtype).t()
    if case.layout == "strided":
        return torch.randn(rows, 2 * d).to(device, case.dtype)[:, ::2]
    return torch.randn(rows, d).to(device, case.dtype)


def errors(case: Case, device: str) -> dict[str, float]:
    """Largest errors over the largest element of each result, of both kernels and their gradients."""
    torch.manual_seed(0)
    ids = torch.randint(0, case.experts, (case.t * case.k,))
    order, place, _ = (t.to(device) for t in expert_sort.reference(ids, case.experts))
    x = laid_out((case.t, case.d), case, device).requires_grad_()
    rows = laid_out((len(ids), case.d), case, device).requires_grad_()
    weights = torch.rand(case.t, case.k).to(device, case.weight_dtype or case.dtype).requires_grad_()
    gathered, summed = expert_rows.permute(x, order, place), expert_rows.unpermute(rows, weights, order, place)
    assert all("autopart" in y.grad_fn.name() for y in (gathered, summed))
    drows, dy = torch.randn_like(gathered), torch.randn_like(summed)
    if case.layout == "expanded":
        drows, dy = (t[:1].expand(len(t), -1) for t in (drows, dy))
    got = [gathered, *torch.autograd.grad(gathered, x, drows)]
    got += [summed, *torch.autograd.grad(summed, (rows, weights), dy)]

    exact = [t.detach().double().requires_grad_() for t in (x, rows, weights)]
    if case.wrong:
        order = order.roll(1)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    gathered = expert_rows.permute_reference(exact[0], order, place)
    summed = expert_rows.unpermute_reference(exact[1], exact[2], order, place)
    want = [gathered, *torch.autograd.grad(gathered, exact[0], drows.double())]
    want += [summed, *torch.autograd.grad(summed, exact[1:], dy.double())]
    found = [((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for a, b in zip(got, want, strict=True)]
    assert [y.dtype for y in got] == [case.dtype] * 4 + [weights.dtype]
    return dict(zip(("rows", "dx", "y", "drows", "dweights"), found, strict=True))


def spread_of_values(device: str) -> bool:
    """Whether infinities and nans give what plain torch gives."""
    rows = torch.ones(4, 3, device=device)
    rows[0, 0], rows[1, 1], rows[2, 2] = float("inf"), float("nan"), -float("inf")
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.0]], device=device)
    order, place, _ = expert_sort.reference(torch.tensor([1, 0, 0, 1], device=device), 2)
    found = [f(rows, weights, order, place) for f in (expert_rows.unpermute, expert_rows.unpermute_reference)]
    return torch.equal(*(t.nan_to_num(7.0) for t in found))


@pytest.fixture(scope="module")
def interpreted():
    return interpreted_child(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_interpreted_kernels_meet_the_float64_reference(case, interpreted):
    assert max(interpreted[case.id].values()) <= ROUNDING[case.dtype], interpreted[case.id]


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.id)
def test_another_order_is_caught(case, interpreted):
    assert min(interpreted[case.id].values()) > 0.01, interpreted[case.id]


@pytest.mark.slow
@pytest.mark.parametrize("name", SORTS)
def test_interpreted_sorts_are_torch_s_stable_sort(name, interpreted):
    assert interpreted[f"sort {name}"] is True


@pytest.mark.slow
@pytest.mark.parametrize("name", ["values", "registered"])
def test_interpreted_infinities_and_registered_operators(name, interpreted):
    assert interpreted[name] is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_references_are_the_operators_of_transformers_bit_for_bit(dtype):
    x, weights = torch.randn(9, 6).to(dtype), torch.rand(9, 2)
    ids = torch.randint(0, 4, (18,))
    order, place, offsets = expert_sort.sort_by_expert(ids, 4)
    perm = torch.sort(ids, stable=True)[1]
    assert torch.equal(order, perm)
    assert torch.equal(offsets[1:], torch.histc(ids.float(), 4, 0, 3).cumsum(0).long())
    rows = expert_rows.permute(x, order, place)
    assert torch.equal(rows, x[perm // 2])
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(len(perm))
    weighted = (rows * weights.reshape(-1)[perm].unsqueeze(-1))[inverse]
    expected = weighted.view(9, 2, 6).sum(dim=1).to(dtype)
    assert torch.equal(expert_rows.unpermute(rows, weights, order, place), expected)


def test_gradients_of_the_references():
    order, place, _ = expert_sort.reference(torch.tensor([2, 0, 1, 0, 2, 2]), 3)
    x, rows, weights = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((3, 2), (6, 2), (3, 2)))
    assert torch.autograd.gradcheck(expert_rows.permute_reference, (x, order, place))
    assert torch.autograd.gradcheck(expert_rows.unpermute_reference, (rows, weights, order, place))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_float64_and_empty_tensors_go_to_the_reference(dtype, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("kernels used")

    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("AUTOPART_FORCE_TRITON", "1")
    t = 0 if dtype == torch.float32 else 3
    order, place, _ = expert_sort.reference(torch.zeros(2 * t, dtype=torch.int64), 2)
    monkeypatch.setattr(expert_rows, "launch", refuse)
    rows = expert_rows.permute(torch.ones(t, 4, dtype=dtype), order, place)
    y = expert_rows.unpermute(rows, torch.ones(t, 2, dtype=dtype), order, place)
    assert y.shape == (t, 4) and bool((y == 2).all())


def test_operators_take_fake_tensors():
    pytest.importorskip("triton")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        order, place, offsets = torch.ops.autopart.sort_by_expert(torch.empty(6, dtype=torch.int64), 4)
        x, weights = torch.empty(3, 5, requires_grad=True), torch.empty(3, 2, requires_grad=True)
        y = torch.ops.autopart.unpermute(torch.ops.autopart.permute(x, order, place), weights, order, place)
        y.sum().backward()
        assert offsets.shape == (5,) and y.shape == x.grad.shape == (3, 5) and weights.grad.shape == (3, 2)


def test_bytes_moved_kept_and_rules():
    x, rows, weights = (torch.empty(s, device="meta") for s in ((3, 5), (6, 5), (3, 2)))
    order = place = torch.empty(6, dtype=torch.int64, device="meta")
    permute, unpermute = expert_rows.KERNELS
    assert permute.bytes_moved(x, order, place) == (4 * 45 + 48, 4 * 45 + 48)
    assert unpermute.bytes_moved(rows, weights, order, place) == (4 * 45 + 12 * 6, 4 * 75 + 16 * 6)
    assert expert_sort.KERNEL.bytes_moved(order, 4) == (32 * 6, 0)
    assert len(permute.kept((x, order, place), (rows,))) == 1 and len(unpermute.kept((rows, weights, order), ())) == 3
    assert expert_sort.KERNEL.kept((order,), ()) == ()
    assert [len(parse(kernel.rule).inputs) for kernel in (permute, unpermute, expert_sort.KERNEL)] == [3, 4, 1]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_ahead_without_spills(capability):
    pytest.importorskip("triton")
    for kernel in (*expert_rows.KERNELS, expert_sort.KERNEL):
        for shape in kernel.shapes.values():
            usage = kernel.ahead(capability, **shape)
            assert all(one.spills == 0 and one.registers <= 168 for one in usage.values()), (kernel.name, shape, usage)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES + LARGE, ids=lambda case: case.id)
def test_device_kernels_meet_the_float64_reference(case):
    found = errors(case, "cuda")
    assert max(found.values()) <= ROUNDING[case.dtype], found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", SORTS)
def test_device_sorts_are_torch_s_stable_sort(name):
    assert sorts(name, "cuda") and spread_of_values("cuda")


def registered() -> bool:
    """Whether torch's checks of the operators' schemas and gradients pass."""
    ids = torch.tensor([1, 0, 0, 1])
    order, place, _ = expert_sort.reference(ids, 2)
    x, rows, weights = (torch.rand(s, requires_grad=True) for s in ((2, 3), (4, 3), (2, 2)))
    checks = ("test_schema", "test_autograd_registration")
    operators = torch.ops.autopart
    torch.library.opcheck(operators.sort_by_expert.default, (ids, 2), test_utils=("test_schema",))
    torch.library.opcheck(operators.permute.default, (x, order, place), test_utils=checks)
    torch.library.opcheck(operators.unpermute.default, (rows, weights, order, place), test_utils=checks)
    return True


if __name__ == "__main__":
    found: dict[str, object] = {case.id: errors(case, "cpu") for case in CASES + WRONG}
    found |= {f"sort {name}": sorts(name, "cpu") for name in SORTS}
    print(json.dumps(found | {"values": spread_of_values("cpu"), "registered": registered()}))
