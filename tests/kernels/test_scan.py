"""The scan of Mamba-2 against its definition in float64, one position after the other, and against transformers."""

import json
import os
from typing import NamedTuple

import pytest
import torch

from autopart.kernels import scan
from tests.support.interpreted import interpreted as interpreted_child

ROUNDING = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-6}
"""Of a result over its largest element, of tensors in the inputs' dtype; the interpreter truncates bfloat16."""
NAMES = ("y", "dx", "dscales", "dlog", "dkeys", "dqueries", "dskip")


class Case(NamedTuple):
    """Sizes as in `scan.scan`; log decays are drawn from 0 to -rate. ``half``: scales and skip in the inputs' dtype."""

    batch: int
    length: int
    heads: int
    p: int
    groups: int
    n: int
    dtype: torch.dtype
    scales: bool = True
    skip: bool = True
    rate: float = 1.0
    layout: str = "plain"
    changed: float = 0.0
    half: bool = False

    @property
    def id(self) -> str:
        return "-".join(str(field).removeprefix("torch.") for field in self)


CASES = [Case(1, 20, 2, 5, 1, 7, dtype) for dtype in ROUNDING] + [
    Case(2, 70, 2, 16, 2, 16, dtype) for dtype in ROUNDING
]
CASES += [Case(1, 1, 1, 1, 1, 1, torch.float32), Case(1, 130, 3, 20, 1, 33, torch.float32)]
CASES += [Case(1, 20, 2, 5, 1, 7, torch.float32, *flags) for flags in ((False, False), (True, False), (False, True))]
CASES += [Case(1, 70, 2, 5, 1, 7, torch.float32, rate=rate) for rate in (0.0, 100.0)]
CASES += [Case(2, 20, 2, 5, 1, 7, torch.float32, layout="swapped"), Case(1, 20, 2, 5, 1, 7, torch.bfloat16, half=True)]
CASES += [Case(1, 20, 2, 5, 1, 140, torch.float32)]
WRONG = [Case(1, 70, 2, 5, 1, 7, torch.float32, changed=0.01)]
LARGE = [Case(2, 300, 8, 64, 2, 128, dtype) for dtype in ROUNDING] + [Case(1, 257, 4, 64, 4, 64, torch.bfloat16)]
INTERPRETED = CASES if "AUTOPART_EXAMPLES" in os.environ else [c for c in CASES if c.dtype != torch.float16]


def recurrence(x, scales, log, keys, queries, skip):
    """The definition: S = exp(a) S + t x b^T and y = S c + skip x, for one position after the other."""
    batch, length, heads, p = x.shape
    b, c = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (keys, queries))
    u = x if scales is None else x * scales[..., None]
    state, out = x.new_zeros(batch, heads, p, b.shape[-1]), []
    for i in range(length):
        state = state * log[:, i].exp()[..., None, None] + u[:, i, :, :, None] * b[:, i, :, None, :]
        out.append((state * c[:, i, :, None, :]).sum(-1))
    y = torch.stack(out, 1)
    return y if skip is None else y + skip[:, None] * x


def draw(case: Case, device: str) -> list[torch.Tensor | None]:
    """The six tensors of a scan."""
    torch.manual_seed(0)
    both = (case.batch, case.length)
    x, keys, queries = (torch.randn(*both, *s) for s in ((case.heads, case.p), *[(case.groups, case.n)] * 2))
    scales, log, skip = (
        torch.rand(*both, case.heads),
        -case.rate * torch.rand(*both, case.heads),
        torch.randn(case.heads),
    )
    if case.layout == "swapped":
        x, keys, queries, scales, log = (
            t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, keys, queries, scales, log)
        )
    x, keys, queries = (t.to(case.dtype) for t in (x, keys, queries))
    scales, skip = (t.to(case.dtype) if case.half else t for t in (scales, skip))
    given = (x, scales if case.scales else None, log, keys, queries, skip if case.skip else None)
    return [None if t is None else t.to(device).requires_grad_() for t in given]


def with_gradients(y: torch.Tensor, leaves: list[torch.Tensor | None], dy: torch.Tensor) -> list[torch.Tensor | None]:
    """y and the gradients of the leaves that are there."""
    there = [t for t in leaves if t is not None]
    gradients = iter(torch.autograd.grad(y, there, dy.to(y)))
    return [y.detach(), *(None if t is None else next(gradients) for t in leaves)]


def errors(case: Case, device: str) -> dict[str, float]:
    """Largest errors over the largest element of each result."""
    leaves = draw(case, device)
    moved = list(leaves)
    moved[2] = leaves[2] - case.changed
    y = scan.scan(*moved, 16)
    made = [y.grad_fn, *(function for function, _ in y.grad_fn.next_functions)]  # a sum, of wide states
    assert any(f is not None and "autopart_scan" in f.name() for f in made[:2]), "the reference ran, not the kernels"
    dy = torch.randn(y.shape)
    got = with_gradients(y, leaves, dy)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    want = with_gradients(recurrence(*exact), exact, dy)
    found = {}
    for name, a, b, leaf in zip(NAMES, got, want, (y, *leaves), strict=True):
        if a is not None:
            assert a.dtype == leaf.dtype and a.shape == leaf.shape
            found[name] = ((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item()
    return found


@pytest.fixture(scope="module")
def interpreted():
    return interpreted_child(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("case", INTERPRETED, ids=lambda case: case.id)
def test_interpreted_kernels_meet_the_definition(case, interpreted):
    assert max(interpreted[case.id].values()) <= ROUNDING[case.dtype] * max(case.rate, 1), interpreted[case.id]


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.id)
def test_a_wrong_decay_is_caught(case, interpreted):
    found = {name: error for name, error in interpreted[case.id].items() if name != "dskip"}
    assert min(found.values()) > 1e-3, found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["values", "registered"])
def test_interpreted_infinities_and_registered_operators(name, interpreted):
    assert interpreted[name] is True


@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
@pytest.mark.parametrize("length", [1, 16, 21])
def test_reference_meets_the_definition(length, chunk):
    case = Case(2, length, 4, 3, 2, 5, torch.float32)
    leaves = [t.detach().double().requires_grad_() for t in draw(case, "cpu")]
    dy = torch.randn(2, length, 4, 3)
    pairs = zip(
        with_gradients(scan.scan(*leaves, chunk), leaves, dy),
        with_gradients(recurrence(*leaves), leaves, dy),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("length", [16, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reference_is_that_of_transformers_bit_for_bit(dtype, length):
    pytest.importorskip("transformers")
    from transformers.models.mamba2 import modeling_mamba2

    x, t, a, keys, queries, skip = draw(Case(2, length, 4, 3, 2, 5, dtype), "cpu")
    decay = a[0, 0].detach()
    leaves = [x, t, keys, queries, skip]
    theirs = modeling_mamba2.mamba2_chunk_scan
    expected = getattr(theirs, "__wrapped__", theirs)(x, t, decay, keys, queries, chunk_size=8, D=skip)
    found = scan.scan(x, t, decay * t, keys, queries, skip, 8)
    assert torch.equal(found, expected)
    dy = torch.randn_like(found)
    assert all(map(torch.equal, *(with_gradients(y, leaves, dy) for y in (found, expected))))


def test_without_scales_it_is_linear_attention():
    x, _, log, keys, queries, _ = draw(Case(1, 12, 2, 3, 2, 5, torch.float32, rate=0.0), "cpu")
    scores = torch.einsum("blhn,bmhn->bhlm", queries, keys).tril()
    expected = torch.einsum("bhlm,bmhp->blhp", scores, x)
    torch.testing.assert_close(scan.scan(x, None, log, keys, queries, None, 4), expected)


FALLBACKS = {
    "float64": [t.detach().double() for t in draw(Case(1, 3, 2, 4, 1, 5, torch.float32), "cpu")],
    "wide heads": draw(Case(1, 3, 1, 65, 1, 5, torch.float32), "cpu"),
    "wide states": draw(Case(1, 3, 1, 4, 1, 257, torch.float32), "cpu"),
    "no batch": draw(Case(0, 3, 1, 4, 1, 5, torch.float32), "cpu"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_the_kernels_cannot_take_goes_to_the_reference(name, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("kernels used")

    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("AUTOPART_FORCE_TRITON", "1")
    monkeypatch.setattr(scan, "launch", refuse)
    given = FALLBACKS[name]
    assert scan.scan(*given, 2).shape == given[0].shape


def test_the_operator_takes_fake_tensors():
    pytest.importorskip("triton")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        given = [
            torch.empty(s, requires_grad=True) for s in ((2, 70, 4, 8), *[(2, 70, 4)] * 2, *[(2, 70, 2, 16)] * 2, (4,))
        ]
        y = torch.ops.autopart.scan(*given)
        y.sum().backward()
        assert y.shape == (2, 70, 4, 8) and all(t.grad.shape == t.shape for t in given)


def test_bytes_moved_and_kept():
    given = draw(Case(2, 3, 4, 5, 1, 7, torch.bfloat16), "meta")
    d, g, r = 2 * 3 * 4 * 5, 2 * 2 * 3 * 7, 2 * 3 * 4
    assert scan.bytes_moved(*given) == (2 * (d + g) + 4 * d + 8 * r, 2 * (2 * d + 2 * g) + 4 * d + 16 * r)
    assert scan.workspace(*given) == 8 * (2 * 4 * 1 * 16 * 16 + 2 * 3 * 4 * 7)
    assert scan.KERNEL.kept((*given, 64), ()) == tuple(given)
    states, sides, again = 4 * 2 * 4 * 16 * 16, 4 * 2 * 3 * 4 * 7, 2 * (d + g // 2) + 8 * r
    assert scan.streamed(*given) == (again + 2 * states, 7 * states + 6 * sides)


def test_wide_states_are_several_scans():
    one, two = (draw(Case(2, 3, 4, 5, 1, n, torch.bfloat16), "meta") for n in (128, 256))
    assert scan.pays(*two, 64) and not scan.pays(*draw(Case(2, 3, 4, 5, 1, 257, torch.bfloat16), "meta"), 64)
    assert scan.workspace(*two) == 2 * scan.workspace(*one)
    d, keys, states = 2 * 3 * 4 * 5, 2 * 3 * 128, 2 * 4 * 16 * 128
    (there, back), (there_twice, back_twice) = scan.streamed(*one), scan.streamed(*two)
    assert there_twice - there == 2 * keys + 4 * 2 * states + (2 * 2 + 4 * 4) * d
    assert back_twice - 2 * back == (5 * 2 + 4) * d


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_ahead_without_spills(capability):
    pytest.importorskip("triton")
    for shape in (*scan.KERNEL.shapes.values(), {"p": 16, "n": 16, "dtype": torch.float16}):
        usage = scan.compile_ahead(capability, **shape)
        assert set(usage) == {"states", "output", "inputs", "sides"}
        assert all(kernel.spills == 0 and kernel.shared <= 65536 for kernel in usage.values()), (shape, usage)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES + LARGE, ids=lambda case: case.id)
def test_device_kernels_meet_the_definition(case):
    found = errors(case, "cuda")
    rounding = 1e-5 if case.dtype == torch.float32 else 8 * ROUNDING[case.dtype]  # products take rounded operands
    assert max(found.values()) <= rounding * max(case.rate, 1), found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_infinities_stay_behind_their_chunk():
    assert spread_of_values("cuda")


def spread_of_values(device: str) -> bool:
    """Whether an infinity of one position, head and place changes no chunk before it and nothing else; the reference
    has nans at all positions of that head and place."""
    given = [t.detach() for t in draw(Case(1, 70, 2, 5, 1, 7, torch.float32), device)]
    before = scan.scan(*given, 64)
    given[0][0, 66, 1, 2] = float("inf")
    after = scan.scan(*given, 64)
    touched = torch.zeros_like(after, dtype=torch.bool)
    touched[0, 64:, 1, 2] = True  # chunks of float32 begin at 64 too
    return torch.equal(before[~touched], after[~touched]) and not bool(after[0, 66:, 1, 2].isfinite().any())


def registered() -> bool:
    """Whether torch's checks of the operator's schema and gradients pass."""
    given = draw(Case(1, 3, 2, 4, 1, 5, torch.float32), "cpu")
    checks = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(torch.ops.autopart.scan.default, tuple(given), test_utils=checks)
    return True


if __name__ == "__main__":
    found: dict[str, object] = {case.id: errors(case, "cpu") for case in INTERPRETED + WRONG}
    print(json.dumps(found | {"values": spread_of_values("cpu"), "registered": registered()}))
