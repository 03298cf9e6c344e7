"""Residual + dropout against separate operators, bit for bit, and against the masks of `autopart.runtime.random`."""

import json
import os
from typing import NamedTuple

import pytest
import torch

from autopart.kernels import dropout, residual_dropout
from autopart.runtime import random
from autopart.runtime.simulated import World, simulated_groups
from autopart.sharding.notation import parse
from tests.support.interpreted import interpreted as interpreted_child

P = 0.3
EXTREME = (float("inf"), -float("inf"), float("nan"), 6e4, -6e4, 1e-7, -0.0, 0.0)


class Case(NamedTuple):
    """x of ``shape``; ``kind`` is plain, bias or depth."""

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    residual_dtype: torch.dtype | None = None
    layout: str = "plain"
    p: float = P
    kernel_p: float | None = None

    @property
    def id(self) -> str:
        return "-".join(str(field).removeprefix("torch.") for field in self)


KINDS = ("plain", "bias", "depth")
SHAPES = ((1, 1), (3, 5, 7), (20, 300), (2, 9, 130))
EXACT = (torch.float32, torch.float16)
"""Dtypes that Triton's interpreter rounds as a GPU does."""
CASES = [Case(kind, shape, dtype) for kind in KINDS for shape in SHAPES for dtype in (*EXACT, torch.bfloat16)]
CASES += [Case(kind, (3, 5, 7), torch.float16, torch.float32) for kind in KINDS]
CASES += [Case(kind, (4, 6, 10), torch.float32, None, "swapped") for kind in KINDS]
CASES += [Case(kind, (3, 70), torch.float32, p=p) for kind in KINDS for p in (0.0, 1 - 1e-7)]
WRONG = [Case(kind, (20, 300), torch.float32, kernel_p=P + 0.01) for kind in KINDS]
INTERPRETED = CASES if "AUTOPART_EXAMPLES" in os.environ else [c for c in CASES if c.shape[0] != 2]


def constants(p: float) -> tuple[int, float]:
    """Threshold and scale."""
    return int(p * 2**32) - 2**31, 1 / (1 - p)


def words(*shape: int) -> torch.Tensor:
    """Random int32 words."""
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)


def results(case: Case, device: str, p: float, reference: bool) -> list[torch.Tensor]:
    """y and the gradients of x, residual and bias; by the kernels, or by separate operators."""
    torch.manual_seed(0)
    x, residual, dy = (torch.randn(case.shape) for _ in range(3))
    x.view(-1)[: len(EXTREME)] = torch.tensor(EXTREME)[: x.numel()]
    x, residual = x.to(device, case.dtype), residual.to(device, case.residual_dtype or case.dtype)
    if case.layout == "swapped":
        x, residual, dy = (t.transpose(0, 1) for t in (x, residual, dy))
    x.requires_grad_()
    residual.requires_grad_()
    d = 1 if case.kind == "depth" else x.shape[-1]
    rows, columns = words(*(x.shape[:1] if case.kind == "depth" else x.shape[:-1])).to(device), words(d).to(device)
    arguments, leaves = [x, residual, rows, columns, *constants(p)], [x, residual]
    if case.kind == "depth":
        function = residual_dropout.depth_reference if reference else residual_dropout.stochastic_depth
    else:
        function = residual_dropout.reference if reference else residual_dropout.residual_dropout
        bias = torch.randn(d).to(device, case.dtype).requires_grad_() if case.kind == "bias" else None
        arguments.insert(1, bias)
        leaves += [bias] * (bias is not None)
    y = function(*arguments)
    assert reference or "autopart_residual_dropout" in y.grad_fn.name()
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y))]


def errors(case: Case, device: str) -> dict[str, float]:
    """Largest relative difference between kernels and separate operators, 0 where all bits agree. That of the gradient
    of the bias is over the sum of the sizes of its terms."""
    got = results(case, device, case.p if case.kernel_p is None else case.kernel_p, False)
    want = results(case, device, case.p, True)
    found = {}
    for name, a, b in zip(("y", "dx", "dresidual", "dbias"), got, want, strict=False):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = a.double().nan_to_num(7.0, 1e9, -1e9), b.double().nan_to_num(7.0, 1e9, -1e9)
        size = want[1].double().abs().flatten(0, -2).sum(0) if name == "dbias" else b.abs()
        found[name] = ((a - b).abs() / size.clamp(min=1e-30)).max().item() if not torch.equal(a, b) else 0.0
    return found


def check(case: Case, found: dict[str, float], exact: bool) -> None:
    """y and dx are separate operators' bit for bit; the gradient of the bias is one rounding of a float32 sum."""
    roundings = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-6}
    assert found["dresidual"] == 0 and found.get("dbias", 0) <= roundings[case.dtype], found
    if exact:
        assert found["y"] == 0 and found["dx"] == 0, found
    else:
        assert found["dx"] <= 2**-6, found  # the interpreter truncates scale and product, where a GPU rounds


@pytest.fixture(scope="module")
def interpreted():
    return interpreted_child(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("case", INTERPRETED, ids=lambda case: case.id)
def test_interpreted_kernels_are_separate_operators_bit_for_bit(case, interpreted):
    check(case, interpreted[case.id], case.dtype in EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.id)
def test_a_wrong_share_is_caught(case, interpreted):
    assert min(interpreted[case.id][name] for name in ("y", "dx")) > 1e-3, interpreted[case.id]


@pytest.mark.slow
def test_the_operator_is_registered_as_torch_asks(interpreted):
    assert interpreted["registered"] is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_reference_draws_what_the_runtime_draws(bias, dtype):
    groups = simulated_groups(World(), 1, 1, 1, 0)
    x, residual, b = torch.randn(3, 5, 70).to(dtype), torch.randn(3, 5, 70).to(dtype), torch.randn(70).to(dtype)
    source = random.stream(groups, "a")
    leaves = [t.requires_grad_() for t in (x, residual, b)]
    expected = residual + random.dropout(x + b if bias else x, P, source, x.shape, 0)
    rows, columns = random._hashes(source, x.shape, 0, {})
    found = residual_dropout.residual_dropout(x, b if bias else None, residual, rows, columns, *constants(P))
    assert torch.equal(found, expected)
    dy, used = torch.randn_like(found), leaves if bias else leaves[:2]
    pairs = zip(torch.autograd.grad(found, used, dy), torch.autograd.grad(expected, used, dy), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_depth_is_a_product_with_dropped_ones(dtype):
    x, residual = torch.randn(40, 3, 7).to(dtype), torch.randn(40, 3, 7).to(dtype)
    rows, columns = words(40), words(1)
    noise = dropout.by_blocks(torch.ones(40, 1), rows, columns, *constants(P))
    found = residual_dropout.stochastic_depth(x, residual, rows, columns, *constants(P))
    assert torch.equal(found, residual + (x * noise[..., None]).to(dtype)) and 0 < (noise == 0).sum() < 40


def test_gradient_of_the_reference():
    rows, columns = words(3, 4), words(6)
    x, b, residual = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((3, 4, 6), (6,), (3, 4, 6)))
    arguments = (x, b, residual, rows, columns, *constants(P))
    assert torch.autograd.gradcheck(residual_dropout.reference, arguments)


FALLBACKS = {
    "float64": (torch.randn(2, 8).double(), None, torch.randn(2, 8).double()),
    "another bias": (torch.randn(2, 8).half(), torch.randn(8), torch.randn(2, 8)),
    "no rows": (torch.randn(0, 8), None, torch.randn(0, 8)),
    "broadcast residual": (torch.randn(2, 8), None, torch.randn(1, 8)),
}


@pytest.fixture
def forced(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("kernels used")

    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("AUTOPART_FORCE_TRITON", "1")
    monkeypatch.setattr(residual_dropout, "launch", refuse)


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_the_kernels_cannot_take_goes_to_the_reference(name, forced):
    arguments = (*FALLBACKS[name], words(len(FALLBACKS[name][0])), words(8), *constants(P))
    found = residual_dropout.residual_dropout(*arguments)
    assert torch.equal(found, residual_dropout.reference(*arguments))


def test_fake_tensors_go_to_the_reference(forced):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, rows, columns = torch.empty(2, 8), words(2), words(8)
        assert residual_dropout.residual_dropout(x, None, x, rows, columns, *constants(P)).shape == (2, 8)


def test_the_operator_takes_fake_tensors():
    pytest.importorskip("triton")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, bias = torch.empty(2, 8, requires_grad=True), torch.empty(8, requires_grad=True)
        y = torch.ops.autopart.residual_dropout(x, bias, x, words(2), words(8), 0, 2.0, False)
        y.sum().backward()
        assert y.shape == x.grad.shape and bias.grad.shape == (8,)


def test_nothing_but_words_is_kept():
    x, bias = torch.empty(2, 3, 8, device="meta"), torch.empty(8, device="meta")
    rows, columns = (torch.empty(n, dtype=torch.int32, device="meta") for n in ((2, 3), (8,)))
    plain, depth = residual_dropout.KERNELS
    assert plain.kept((x, bias, x, rows, columns, 0, 1.0), (x,)) == (rows, columns)
    assert plain.bytes_moved(x, bias, x, rows, columns) == (4 * (3 * 48 + 8) + 4 * 14, 4 * (2 * 48 + 8) + 4 * 14)
    assert depth.bytes_moved(x, x, rows[0, :2], columns[:1]) == (4 * 3 * 48 + 4 * 3, 4 * 2 * 48 + 4 * 3)
    assert [len(parse(kernel.rule).inputs) for kernel in residual_dropout.KERNELS] == [5, 4]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_ahead_without_spills(capability):
    pytest.importorskip("triton")
    made = [
        kernel.ahead(capability, **shape) for kernel in residual_dropout.KERNELS for shape in kernel.shapes.values()
    ]
    made += [residual_dropout.compile_ahead(capability, d, torch.float32) for d in (7, 4096)]
    assert all(usage.spills == 0 and usage.registers <= 128 for kernel in made for usage in kernel.values()), made


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_device_kernels_are_separate_operators_bit_for_bit(case):
    check(case, errors(case, "cuda"), True)


def registered() -> bool:
    """Whether torch's checks of the operator's schema and gradients pass."""
    x, b = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    arguments = (x, b, torch.randn(3, 8), words(3), words(8), *constants(P), False)
    checks = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(torch.ops.autopart.residual_dropout.default, arguments, test_utils=checks)
    return True


if __name__ == "__main__":
    print(json.dumps({case.id: errors(case, "cpu") for case in INTERPRETED + WRONG} | {"registered": registered()}))
