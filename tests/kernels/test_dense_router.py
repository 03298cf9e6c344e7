"""The router that gives every expert a score, against float64 and transformers' Llama 4."""

import json
from typing import NamedTuple

import pytest
import torch

from autopart.kernels import dense_router
from autopart.kernels.dense_router import KERNEL, route_dense
from tests.support.interpreted import interpreted as interpreted_child

ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Of one element; the interpreter truncates bfloat16 where a GPU rounds."""
INF = float("inf")


class Case(NamedTuple):
    """Logits (t, experts), of which k are chosen, drawn at ``scale``."""

    t: int
    experts: int
    k: int
    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    layout: str = "plain"

    @property
    def id(self) -> str:
        return "-".join(str(field).removeprefix("torch.") for field in self)


CASES = [Case(t, experts, k, dtype) for dtype in ROUNDING for t, experts, k in ((1, 1, 1), (70, 16, 1), (5, 33, 7))]
CASES += [Case(3, 600, 4), Case(9, 8, 8), Case(9, 8, 2, layout="swapped"), Case(9, 8, 2, layout="sliced")]
CASES += [Case(9, 16, 2, dtype, scale) for dtype in ROUNDING for scale in (30.0, 1e-6)]


def draw(case: Case, device: str) -> torch.Tensor:
    """No two of a row are alike."""
    places = torch.rand(case.t, case.experts).argsort(1) - case.experts // 2
    values = (places * case.scale / case.experts).to(case.dtype)
    if case.layout == "swapped":
        values = values.t().contiguous().t()
    if case.layout == "sliced":
        values = torch.cat([values, values], 1)[:, : case.experts]
    return values.to(device)


def errors(case: Case, device: str) -> dict[str, float]:
    """Largest errors, each over its own exact element."""
    torch.manual_seed(0)
    logits = draw(case, device).requires_grad_()
    scores = route_dense(logits, case.k)
    assert scores.grad_fn is not None and "autopart" in scores.grad_fn.name() and scores.dtype == case.dtype
    ds = torch.randn_like(scores)
    exact = logits.detach().double().requires_grad_()
    chosen = exact >= exact.sort(1, descending=True)[0][:, case.k - 1 : case.k]
    want = torch.where(chosen, 1 / (1 + torch.exp(-exact)), 0.0)
    pairs = (scores, want), (*torch.autograd.grad(scores, logits, ds), *torch.autograd.grad(want, exact, ds.double()))
    least = torch.finfo(case.dtype).tiny / ROUNDING[case.dtype]
    return {
        name: ((a - b).abs() / b.abs().clamp(min=least)).max().item()
        for name, (a, b) in zip(("scores", "dlogits"), pairs, strict=True)
    }


def values(device: str) -> list[list[float]]:
    """Scores of infinities, nans and ties, and their gradients, -1 for nan."""
    rows = [[INF, 0, 1, 0], [float("nan"), 0, 1, 0], [-INF] * 4, [1, 1, 1, 1], [-300, -200, -400, -500]]
    logits = torch.tensor(rows, device=device, requires_grad=True)
    scores = route_dense(logits, 2)
    (found,) = torch.autograd.grad(scores, logits, torch.full_like(scores, 2.0))
    return [*scores.nan_to_num(-1.0).tolist(), *found.nan_to_num(-1.0).tolist()]


def expected() -> list[list[float]]:
    one, slope = torch.tensor(1.0).sigmoid().item(), 2 * (torch.tensor(1.0).sigmoid() * torch.tensor(-1.0).sigmoid())
    scores = [[1, 0, one, 0], [-1, 0, one, 0], [0] * 4, [one, one, 0, 0], [0] * 4]
    return [*scores, *[[s * 0 + (slope.item() if s == one else s if s < 0 else 0) for s in row] for row in scores]]


@pytest.fixture(scope="module")
def interpreted():
    return interpreted_child(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_interpreted_kernels_are_one_rounding_from_float64(case, interpreted):
    assert max(interpreted[case.id].values()) <= 2 * ROUNDING[case.dtype], interpreted[case.id]


@pytest.mark.slow
def test_interpreted_infinities_nans_and_ties(interpreted):
    torch.testing.assert_close(torch.tensor(interpreted["values"]), torch.tensor(expected()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reference_is_the_router_of_transformers_bit_for_bit(dtype):
    llama4 = pytest.importorskip("transformers.models.llama4.modeling_llama4")
    config = llama4.Llama4TextConfig(hidden_size=16, num_local_experts=8, num_experts_per_tok=2)
    theirs = llama4.Llama4Router(config).to(dtype)
    scores, logits = theirs(torch.randn(7, 16).to(dtype))
    assert torch.equal(route_dense(logits, 2), scores)


def test_what_the_kernels_cannot_take_goes_to_the_reference(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("kernels used")

    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("AUTOPART_FORCE_TRITON", "1")
    monkeypatch.setattr(dense_router, "launch", refuse)
    for x in (torch.randn(3, 6).double(), torch.randn(0, 6), torch.randn(1, 1026)):
        assert route_dense(x, 2).shape == x.shape


def test_bytes_moved_and_kept():
    x = torch.empty(6, 8, device="meta", dtype=torch.bfloat16)
    assert dense_router.bytes_moved(x, 2) == (192, 384)
    assert KERNEL.kept((x, 2), (x,)) == (x, x)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_ahead_without_spills(capability):
    pytest.importorskip("triton")
    for shape in KERNEL.shapes.values():
        usage = KERNEL.ahead(capability, **shape)
        assert all(one.spills == 0 and one.registers <= 64 for one in usage.values()), (shape, usage)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_device_kernels_are_one_rounding_from_float64(case):
    assert max(errors(case, "cuda").values()) <= 2 * ROUNDING[case.dtype]


def registered() -> None:
    """torch's checks of the operator's schema and gradient."""
    checks = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(torch.ops.autopart.route_dense.default, (torch.rand(4, 6, requires_grad=True), 2),
                          test_utils=checks)  # fmt: skip


if __name__ == "__main__":
    registered()
    print(json.dumps({case.id: errors(case, "cpu") for case in CASES} | {"values": values("cpu")}))
