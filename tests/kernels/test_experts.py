"""A mixture's experts against a gathered copy of every pair's weights in float64."""

import json
from typing import NamedTuple

import pytest
import torch

from autopart.kernels import experts, grouped_matmul
from autopart.kernels.table import kernel_of
from tests.support.interpreted import interpreted as interpreted_child
from tests.support.kernel_checks import saved_bytes

ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-5}
"""Of a result over its largest element, after two products; the interpreter truncates bfloat16 where a GPU rounds."""
NAMES = ("y", "dx", "dup", "ddown", "dweights")


class Case(NamedTuple):
    """t tokens of d elements, of which each goes to k of ``experts`` experts of width f."""

    t: int
    d: int
    f: int
    experts: int
    k: int
    dtype: torch.dtype
    weight_dtype: torch.dtype | None = None
    name: str = "silu"
    transposed: bool = False

    @property
    def id(self) -> str:
        return "-".join(str(field).removeprefix("torch.") for field in self)


PLAIN = [
    Case(7, 6, 5, 4, 2, torch.float64),
    Case(7, 6, 5, 4, 2, torch.float64, None, "gelu", True),
    Case(9, 8, 16, 5, 3, torch.float32, None, "gelu_new"),
    Case(9, 8, 16, 5, 3, torch.bfloat16, torch.float32),
    Case(1, 8, 8, 9, 1, torch.float16, None, "silu", True),
]
INTERPRETED = [
    Case(5, 8, 16, 3, 2, torch.float32),
    Case(5, 8, 5, 3, 2, torch.float32, None, "gelu", True),
    Case(4, 16, 8, 5, 3, torch.bfloat16, torch.float32),
]
LARGE = [Case(1500, 2048, 768, 64, 8, torch.bfloat16, torch.float32), Case(1000, 512, 1408, 8, 2, torch.float16)]


def arguments(case: Case, device: str = "cpu") -> list[torch.Tensor]:
    """x, up, down, weights and numbers of experts; the experts of a token differ."""
    torch.manual_seed(0)
    up, down = (case.experts, 2 * case.f, case.d), (case.experts, case.d, case.f)
    if case.transposed:
        up, down = (up[0], up[2], up[1]), (down[0], down[2], down[1])
    given = [torch.randn(case.t, case.d), torch.randn(up) / case.d**0.5, torch.randn(down) / case.f**0.5]
    dtypes = [case.dtype] * 3 + [case.weight_dtype or case.dtype]
    given.append(torch.rand(case.t, case.k))
    ids = torch.rand(case.t, case.experts).topk(case.k).indices
    leaves = [t.to(device, dtype).requires_grad_() for t, dtype in zip(given, dtypes, strict=True)]
    return [*leaves, ids.to(device)]


def results(function, given: list[torch.Tensor], *constants) -> list[torch.Tensor]:
    """The output, and the gradients of its product with fixed numbers."""
    y = function(*given, *constants)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y)
    return [y.detach(), *torch.autograd.grad(y, given[:4], dy)]


def errors(case: Case, device: str = "cpu") -> dict[str, float]:
    """The largest error of each result, over its largest element."""
    given, constants = arguments(case, device), (case.name, case.transposed)
    wide = [t.detach().double().requires_grad_() for t in given[:4]]
    exact = results(experts.reference, [*wide, given[4]], *constants)
    found = results(experts.experts, given, *constants)
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


@pytest.mark.slow
@pytest.mark.parametrize("case", INTERPRETED, ids=lambda case: case.id)
def test_interpreted_kernels_meet_the_float64_reference(case, interpreted):
    found = interpreted[case.id]
    assert max(found.values()) <= ROUNDING[case.dtype], found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", INTERPRETED + LARGE, ids=lambda case: case.id)
def test_device_kernels_meet_the_float64_reference(case):
    found = errors(case, "cuda")
    assert max(found.values()) <= ROUNDING[case.dtype], found


@pytest.mark.parametrize("of", [1, 2])
def test_experts_of_some_ranks_sum_to_the_whole(of):
    """Also where a rank has no expert that a token goes to."""
    x, up, down, weights, ids = arguments(PLAIN[0])
    whole = results(experts.experts, [x, up, down, weights, ids])
    parts = []
    for first in range(0, len(up), of):
        own = [t[first : first + of].detach().requires_grad_() for t in (up, down)]
        parts.append(results(experts.experts, [x, *own, weights, ids], "silu", False, first))
    for i, joined in enumerate((sum, sum, torch.cat, torch.cat, sum)):
        torch.testing.assert_close(joined([part[i] for part in parts]), whole[i])


def test_what_is_said_of_bytes_is_so():
    given = arguments(Case(6, 8, 16, 4, 2, torch.float32))
    meta = [t.detach().to("meta") for t in given]
    assert saved_bytes(experts.experts, *given) == sum(t.nbytes for t in experts.kept(tuple(meta), ()))
    s, d, f = 12, 8, 16
    products = 4 * (s * (d + 2 * f) + s * (f + d) + 3 * 4 * d * f)
    moved, apart = experts.bytes_moved(*meta), experts.streamed(*meta)
    assert moved.forward - apart.forward == products
    assert apart.forward == 32 * s + 4 * (6 * d + s * d) + 8 * s + 4 * 3 * s * f + 4 * (s * d + 6 * d) + 12 * s
    assert experts.workspace(*meta) == 4 * max(s * d + 3 * s * f, 3 * s * f, 2 * s * f + 2 * s * d)
    assert experts.experts(*meta).shape == (6, 8) and kernel_of("autopart.experts") is experts.KERNEL


def test_no_row_is_read_of_another_expert(monkeypatch):
    """A wrong order of rows is caught."""
    right = grouped_matmul.gradients
    monkeypatch.setattr(grouped_matmul, "gradients", lambda dy, *rest: right(dy.roll(1, 0), *rest))
    found = errors(PLAIN[0])
    assert found["y"] < 1e-13 and all(found[name] > 1e-3 for name in NAMES[1:])


if __name__ == "__main__":
    print(json.dumps({case.id: errors(case) for case in INTERPRETED}))
