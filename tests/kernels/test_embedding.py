"""Rows of an embedding table by its kernels, of the whole table and of one rank's part.

Every interpreted case is taken by one child process: this file, run as a script.
"""

import json
import os
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import functional as F

from autopart.kernels import embedding
from autopart.runtime.functions import vocab_embedding
from autopart.runtime.simulated import World, simulated_groups
from tests.support.interpreted import interpreted as interpreted_child

ROUNDING = {torch.float32: 5e-7, torch.float16: 2**-11, torch.bfloat16: 2**-8}
INTERPRETED_ROUNDING = ROUNDING | {torch.bfloat16: 2**-7}  # the interpreter truncates where a GPU rounds


class Case(NamedTuple):
    """One comparison with float64: `shape` of ids out of `range`, weight (v, d) from row `first`."""

    shape: tuple[int, ...]
    v: int
    d: int
    dtype: torch.dtype
    first: int | None = None
    range: int = 0
    padding_idx: int = -1
    ids: str = "random"
    layout: str = "plain"
    kernel_padding_idx: int | None = None

    @property
    def name(self) -> str:
        return "-".join(str(field).removeprefix("torch.") for field in self)


CASES = [Case((2, 3), 7, d, dtype) for dtype in ROUNDING for d in (1, 5, 64)]
CASES += [Case((), 3, 4, torch.float32), Case((1,), 1, 1, torch.float32), Case((2, 1, 3), 3, 4, torch.float32)]
CASES += [Case((11,), 4, 6, dtype, 3, 12, padding) for dtype in ROUNDING for padding in (-1, 5, 1)]
CASES += [Case((9,), 4, 6, torch.float32, first, 12) for first in (0, 4, 100)]
CASES += [Case((40,), 5, 70, dtype, ids=ids) for dtype in ROUNDING for ids in ("equal", "runs", "skewed")]
CASES += [Case((9,), 6, 6, torch.float32, ids="int32"), Case((3, 4), 6, 6, torch.float32, padding_idx=0)]
CASES += [Case((3, 4), 6, 6, torch.bfloat16, layout=layout) for layout in ("turned", "sliced")]
FEW = [case for case in CASES if case.dtype != torch.float16]
INTERPRETED = CASES if "AUTOPART_EXAMPLES" in os.environ else FEW
"""Cases that are interpreted."""
WRONG = [Case((40,), 5, 6, torch.float32, padding_idx=1, kernel_padding_idx=2)]


def draw(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the case's shape and weight (v, d)."""
    torch.manual_seed(0)
    ids = torch.randint(0, case.range or case.v, case.shape)
    if case.ids == "equal":
        ids.fill_(2)
    if case.ids == "runs":
        ids = torch.arange(len(ids)) // 9
    if case.ids == "skewed":
        ids = torch.where(torch.rand(case.shape) < 0.8, 3, ids)
    weight = torch.randn(case.v, 2 * case.d)
    views = {"plain": weight[:, : case.d].clone(), "sliced": weight[:, : case.d]}
    views["turned"] = views["plain"].t().contiguous().t()
    return ids.to(torch.int32 if case.ids == "int32" else torch.int64).to(device), views[case.layout].to(
        device, case.dtype
    )


def errors(case: Case, device: str) -> dict[str, float]:
    """Error of the rows, and of the gradient of weight over the largest size of the sums of the sizes of its terms."""
    ids, weight = draw(case, device)
    weight.requires_grad_()
    padding = case.padding_idx if case.kernel_padding_idx is None else case.kernel_padding_idx
    y = embedding.embedding(ids, weight, padding, case.first)
    assert "autopart_embedding" in y.grad_fn.name(), "the reference ran, not the kernels"
    assert y.shape == (*case.shape, case.d) and y.dtype == weight.dtype
    dy = torch.randn(*case.shape, case.d + 1).to(y)[..., :-1]
    (dweight,) = torch.autograd.grad(y, weight, dy)
    exact = weight.detach().double().requires_grad_()
    rows = embedding.reference(ids, exact, case.padding_idx, case.first)
    (gradient,) = torch.autograd.grad(rows, exact, dy.double(), retain_graph=True)
    (sizes,) = torch.autograd.grad(rows, exact, dy.double().abs())
    return {
        "rows": (y - rows).abs().max().item(),
        "gradient": (dweight - gradient).abs().max().item() / (sizes.max().item() or 1.0),
    }


def operators(weight: torch.Tensor) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The operators that are registered, each with arguments."""
    ids = torch.tensor([1, 7, 4], device=weight.device)
    forward = torch.ops.autopart.embedding.default, (ids, weight.requires_grad_(), -1, 2, False)
    dy = torch.ones(3, weight.shape[1], dtype=weight.dtype, device=weight.device)
    return {
        "forward": forward,
        "backward": (torch.ops.autopart.embedding_backward.default, (dy, ids, len(weight), -1, 2)),
    }


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What the interpreting child found, by name of the case."""
    return interpreted_child(__file__)


def meets(found: dict[str, float], dtype: torch.dtype, rounding: dict[torch.dtype, float]) -> bool:
    """Whether rows are exact, and gradients rounded once from float32."""
    return found["rows"] == 0 and found["gradient"] <= 1e-6 + rounding[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("case", INTERPRETED, ids=lambda case: case.name)
def test_interpreted_kernels_meet_the_float64_reference(case, interpreted):
    assert meets(interpreted[case.name], case.dtype, INTERPRETED_ROUNDING), interpreted[case.name]


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.name)
def test_a_wrong_padding_row_is_caught(case, interpreted):
    assert interpreted[case.name]["gradient"] > 0.1


@pytest.mark.slow
def test_an_id_that_has_no_row_is_nan_in_a_whole_table_and_zero_in_a_part(interpreted):
    assert interpreted["outside"] == [[False, True, True], [1.0, 0.0, 0.0]]


@pytest.mark.slow
def test_infs_and_nans_stay_in_their_rows(interpreted):
    assert interpreted["infinite"] is True


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_operators_are_registered_rightly(name, interpreted):
    assert interpreted[f"operator {name}"] == "SUCCESS"


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_operators_take_fake_tensors(name):
    pytest.importorskip("triton")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        weight = torch.empty(9, 5, dtype=torch.bfloat16)
        operator, arguments = operators(weight)[name]
        found = operator(*arguments)
        assert (tuple(found.shape), found.dtype) == ((3, 5) if name == "forward" else (9, 5), torch.bfloat16)
        if name == "forward":
            assert torch.autograd.grad(found.sum(), weight)[0].shape == (9, 5)


@pytest.mark.parametrize("padding_idx", [-1, 3])
def test_reference_is_the_library_function(padding_idx):
    ids, weight = draw(Case((4, 5), 9, 6, torch.bfloat16), "cpu")
    leaves = [weight.clone().requires_grad_() for _ in range(2)]
    rows = [
        embedding.embedding(ids, leaves[0], padding_idx),
        F.embedding(ids, leaves[1], padding_idx if padding_idx >= 0 else None),
    ]
    assert torch.equal(*rows)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y, x in zip(rows, leaves, strict=True)))


@pytest.mark.parametrize("padding_idx", [-1, 3, 12])
def test_reference_of_a_part_is_what_a_stage_computes_today(padding_idx):
    ids, weight = draw(Case((4, 5), 9, 6, torch.bfloat16), "cpu")
    group = simulated_groups(World(), 1, 1, 1, 0).tp
    leaves = [weight.clone().requires_grad_() for _ in range(2)]
    rows = embedding.embedding(ids, leaves[0], padding_idx, 0), vocab_embedding(ids, leaves[1], group, padding_idx)
    assert torch.equal(*rows)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y, x in zip(rows, leaves, strict=True)))


def test_the_parts_sum_to_the_whole():
    ids, weight = draw(Case((4, 5), 9, 6, torch.float32), "cpu")
    parts = [embedding.embedding(ids, weight[first : first + 3], 4, first) for first in (0, 3, 6)]
    assert torch.equal(sum(parts), F.embedding(ids, weight, 4))


FALLBACKS = {
    "float64": (torch.tensor([1, 2]), torch.randn(3, 4).double(), None),
    "no ids": (torch.empty(0, dtype=torch.int64), torch.randn(3, 4), None),
    "no ids of a part": (torch.empty(0, dtype=torch.int64), torch.randn(3, 4), 2),
    "no columns": (torch.tensor([1, 2]), torch.randn(3, 0), None),
}


def refuse(*args, **options):
    raise AssertionError("kernels used")


@pytest.fixture
def forced(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("AUTOPART_FORCE_TRITON", "1")
    monkeypatch.setattr(embedding, "launch", refuse)


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_the_kernels_cannot_take_goes_to_the_reference(name, forced):
    ids, weight, first = FALLBACKS[name]
    assert torch.equal(embedding.embedding(ids, weight, -1, first), embedding.reference(ids, weight, -1, first))


def test_the_environment_forces_the_kernels(forced):
    with pytest.raises(AssertionError, match="kernels used"):
        embedding.embedding(torch.tensor([1, 2]), torch.randn(3, 4))


def test_bytes_moved_counts_rows_and_ids():
    ids = torch.empty(2, 3, dtype=torch.int64, device="meta")
    weight = torch.empty(10, 4, dtype=torch.bfloat16, device="meta")
    assert embedding.bytes_moved(ids, weight) == (2 * 2 * 24 + 8 * 6, 2 * (24 + 40) + 8 * 6)
    assert embedding.KERNEL.kept((ids, weight, -1), ()) == (ids,)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("d", [1, 100, *sorted({shape["d"] for shape in embedding.KERNEL.shapes.values()})])
def test_kernels_compile_ahead_without_spills(d, capability):
    pytest.importorskip("triton")
    for dtype in (torch.bfloat16, torch.float32):
        usage = embedding.compile_ahead(capability, d, dtype)
        assert set(usage) == {"forward", "pieces", "totals"}
        assert all(kernel.spills == 0 and 0 < kernel.registers < 128 for kernel in usage.values()), usage


LARGE = [Case((8192,), 32000, 4096, torch.bfloat16), Case((8192,), 16000, 4096, torch.bfloat16, 16000, 32000)]
LARGE += [Case((100_000,), 32, 128, torch.float32, ids=ids) for ids in ("equal", "skewed")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES + LARGE, ids=lambda case: case.name)
def test_device_kernels_meet_the_float64_reference(case):
    found = errors(case, "cuda")
    assert meets(found, case.dtype, ROUNDING), found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gradient_is_the_same_in_every_run():
    ids, weight = draw(LARGE[-1], "cuda")
    weight.requires_grad_()
    dy = torch.randn(*ids.shape, weight.shape[1], device="cuda")
    found = [torch.autograd.grad(embedding.embedding(ids, weight), weight, dy)[0] for _ in range(3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_operators_on_a_device(name):
    torch.library.opcheck(*operators(torch.randn(9, 5, device="cuda"))[name])


def outside() -> list[list[Any]]:
    """Rows of ids of which only the first has one: which are NaN of a whole table, and their sizes of a part."""
    ids = torch.tensor([2, 3, -1])
    whole = embedding.embedding(ids, torch.ones(3, 4))
    part = embedding.embedding(ids, torch.ones(3, 4), -1, 0)
    return [whole.isnan().all(-1).tolist(), part.mean(-1).tolist()]


def infinite() -> bool:
    """Whether infs and nans of weight and of dy stay in their rows."""
    weight = torch.tensor([[torch.inf, 1.0], [torch.nan, 2.0], [1e-45, 3.0]], requires_grad=True)
    ids = torch.tensor([2, 0, 5, 2])
    y = embedding.embedding(ids, weight, -1, 0)
    dy = torch.tensor([[1.0, torch.inf], [torch.nan, 1.0], [torch.nan, torch.nan], [1e-45, 2.0]])
    (dweight,) = torch.autograd.grad(y, weight, dy)
    rows = torch.stack([weight.detach()[2], weight.detach()[0], torch.zeros(2), weight.detach()[2]])
    gradient = torch.tensor([[torch.nan, 1.0], [0.0, 0.0], [1.0, torch.inf]])
    return torch.equal(y, rows) and torch.allclose(dweight, gradient, equal_nan=True)


if __name__ == "__main__":
    embedding.PIECE, embedding.SUMMED, embedding.ELEMENTS, embedding.SUMMED_COLUMNS = 4, 2, 32, 32
    found: dict[str, Any] = {case.name: errors(case, "cpu") for case in INTERPRETED + WRONG}
    found |= {"outside": outside(), "infinite": infinite()}
    for name, (operator, arguments) in operators(torch.randn(9, 5)).items():
        checks = torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_autograd_registration"))
        found[f"operator {name}"] = " ".join(sorted(set(checks.values())))
    print(json.dumps(found))
