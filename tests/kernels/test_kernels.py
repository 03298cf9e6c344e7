"""Kernels against their references.

The Triton interpreter is chosen when Triton is first imported, so one child process (this file run as a
script) takes every interpreted case and prints its errors; the tests here judge them.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from autopart.kernels import ahead, dropout, norm_operators, norm_rows, rms_norm
from autopart.runtime import random
from autopart.runtime.simulated import World, simulated_groups
from tests.support.interpreted import interpreted as interpreted_child

ROOT = Path(__file__).resolve().parents[2]
EPS = 1e-6
ROUNDING = {torch.float32: 5e-7, torch.float16: 2**-11, torch.bfloat16: 2**-8}
INTERPRETED_ROUNDING = ROUNDING | {torch.bfloat16: 2**-7}  # the interpreter truncates where a GPU rounds


class Case(NamedTuple):
    """One comparison with the float64 reference: x (..., d) of ``layout``, drawn at ``scale``."""

    d: int
    rows: int
    dtype: torch.dtype
    layout: str = "plain"
    scale: float = 1.0
    weight_dtype: torch.dtype | None = None
    kernel_eps: float = EPS

    def tolerance(self, rounding: dict[torch.dtype, float]) -> float:
        """Two roundings, of the normalised x and of the product, to the coarser dtype of the case."""
        return 2.1 * max(rounding[self.dtype], rounding[self.weight_dtype or self.dtype])

    @property
    def name(self) -> str:
        return "-".join(str(field).removeprefix("torch.") for field in self)


CASES = [Case(d, rows, dtype) for dtype in ROUNDING for d in (1, 7, 64, 100, 257) for rows in (1, 3, 17)]
LAYOUTS = ("swapped", "sliced", "strided", "expanded")
CASES += [Case(100, 17, dtype, layout) for dtype in ROUNDING for layout in LAYOUTS]
CASES += [Case(100, 3, dtype, scale=scale) for dtype in ROUNDING for scale in (1e4, 1e-6, 0.0)]
CASES += [Case(64, 3, torch.bfloat16, weight_dtype=torch.float32)]
CASES += [Case(64, 3, torch.float32, weight_dtype=torch.float16)]
FEW = [case for case in CASES if case.rows == (17 if case.dtype == torch.float32 else 3) or case.layout != "plain"]
INTERPRETED = CASES if "AUTOPART_EXAMPLES" in os.environ else [*FEW, Case(7, 1, torch.float32)]
"""Cases that are interpreted."""
WRONG = [Case(100, 3, dtype, scale=1e-3, kernel_eps=2 * EPS) for dtype in ROUNDING]
SHAPES = ((1,), (9,), (3, 5, 7), (300, 1), (2, 5000), (17, 64), (2, 3, 2048))
SHARES = (1e-11, 0.1, 0.5, 0.9, 1 - 1e-7)
DROPPED = {"-".join(map(str, shape)): shape for shape in SHAPES}
WIDE = [Case(d, 300, torch.bfloat16) for d in (4096, 5000, 16384, 65536)]


def draw(case: Case, device: str) -> torch.Tensor:
    """Draw x (3, rows, d), contiguous only in the plain layout; about ``scale`` in size."""
    shapes = {"plain": (3, case.rows, case.d), "swapped": (case.rows, 3, case.d)}
    shapes |= {"sliced": (3, case.rows, case.d + 5), "strided": (3, case.rows, 2 * case.d)}
    shapes |= {"expanded": (1, case.rows, case.d)}
    x = (torch.randn(shapes[case.layout]) * case.scale).to(device, case.dtype)
    if case.layout == "expanded":
        return x.expand(3, -1, -1)
    views = {"plain": x, "swapped": x.transpose(0, 1), "sliced": x[..., : case.d], "strided": x[..., ::2]}
    return views[case.layout]


def errors(case: Case, device: str) -> dict[str, float]:
    """Largest error of y, dx and dweight, each over the largest size of the terms that it sums."""
    torch.manual_seed(0)
    x = draw(case, device).requires_grad_()
    weight = (torch.rand(case.d) + 0.5).to(device, case.weight_dtype or case.dtype).requires_grad_()
    y = rms_norm.rms_norm(x, weight, case.kernel_eps, torch.float32)
    assert y.grad_fn is not None and "autopart_norm_rows" in y.grad_fn.name(), "the reference ran, not the kernels"
    assert y.dtype == torch.promote_types(x.dtype, weight.dtype) and y.shape == x.shape
    dy = torch.randn(3, case.rows, case.d + 1).to(y)[..., :-1]
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    assert (dx.dtype, dweight.dtype) == (x.dtype, weight.dtype)

    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    exact = rms_norm.reference(x64, weight64, EPS)
    exact_dx, exact_dweight = torch.autograd.grad(exact, (x64, weight64), dy.double())
    rstd = torch.rsqrt(x64.pow(2).mean(-1, keepdim=True) + EPS)
    terms = (exact, rstd * weight64 * dy, (x64 * rstd * dy).abs().flatten(0, -2).sum(0))
    pairs = ((y, exact), (dx, exact_dx), (dweight, exact_dweight))
    sizes = [term.abs().max().item() or 1.0 for term in terms]
    found = [(got - want).abs().max().item() / size for (got, want), size in zip(pairs, sizes, strict=True)]
    return dict(zip(("y", "dx", "dweight"), found, strict=True))


def masks(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> bool:
    """Whether kernel and plain torch agree on every bit, for every share dropped."""
    torch.manual_seed(0)
    d = shape[-1]
    x = torch.randn(shape).to(device, dtype).reshape(-1, d)
    rows, columns = (torch.randint(-(2**31), 2**31, (n,), dtype=torch.int32, device=device) for n in (len(x), d))
    assert dropout.applies(x)
    arguments = [(x, rows, columns, int(p * 2**32) - 2**31, 1 / (1 - p)) for p in SHARES]
    return all(torch.equal(dropout.masked(*a), random.by_blocks(*a)) for a in arguments)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    """Errors of every case by name, from one interpreting child."""
    return interpreted_child(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("case", INTERPRETED, ids=lambda case: case.name)
def test_interpreted_kernels_meet_the_float64_reference(case, interpreted):
    found = interpreted[case.name]
    assert max(found.values()) <= case.tolerance(INTERPRETED_ROUNDING), found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", DROPPED)
def test_interpreted_dropout_is_plain_torch_s_bit_for_bit(name, dtype, interpreted):
    assert interpreted[f"dropout {name} {dtype}"] is True


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.name)
def test_a_wrong_eps_is_caught(case, interpreted):
    found = interpreted[case.name]
    assert min(found.values()) > case.tolerance(INTERPRETED_ROUNDING), found


@pytest.mark.parametrize("compute_dtype", [None, torch.float32])
def test_reference_is_the_library_function_in_float32(compute_dtype):
    x, weight = torch.randn(2, 5, 33), torch.rand(33)
    expected = torch.nn.functional.rms_norm(x, (33,), weight, EPS)
    torch.testing.assert_close(rms_norm.reference(x, weight, EPS, compute_dtype), expected)


def test_reference_casts_back_before_the_weight():
    x, weight = torch.randn(4, 64).bfloat16(), torch.rand(64)
    h = x.float()
    normal = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).bfloat16()
    assert torch.equal(rms_norm.reference(x, weight, EPS, torch.float32), weight * normal)


FALLBACKS = {
    "float64": (torch.randn(2, 8).double(), torch.ones(8).double(), None),
    "float64 weight": (torch.randn(2, 8), torch.ones(8).double(), None),
    "float64 inside": (torch.randn(2, 8), torch.ones(8), torch.float64),
    "half inside": (torch.randn(2, 8), torch.ones(8), torch.float16),
    "too wide": (torch.randn(1, norm_rows.MAX_BLOCK + 1), torch.ones(norm_rows.MAX_BLOCK + 1), None),
    "no rows": (torch.randn(0, 8), torch.ones(8), None),
    "scalar weight": (torch.randn(2, 8), torch.ones(1), None),
}


def refuse(*args, **options):
    raise AssertionError("kernels used")


@pytest.fixture
def forced(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("AUTOPART_FORCE_TRITON", "1")
    monkeypatch.setattr(norm_operators, "launch", refuse)


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_the_kernels_cannot_take_goes_to_the_reference(name, forced):
    x, weight, compute_dtype = FALLBACKS[name]
    expected = rms_norm.reference(x, weight, EPS, compute_dtype)
    torch.testing.assert_close(rms_norm.rms_norm(x, weight, EPS, compute_dtype), expected)


def test_fake_tensors_go_to_the_reference(forced):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert rms_norm.rms_norm(torch.empty(2, 8), torch.empty(8), EPS).shape == (2, 8)


def test_the_environment_forces_the_kernels(forced):
    with pytest.raises(AssertionError, match="kernels used"):
        rms_norm.rms_norm(torch.randn(2, 8), torch.ones(8), EPS)


@pytest.mark.slow
def test_the_module_needs_no_triton():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from autopart.kernels.rms_norm import rms_norm\n"
        "print(rms_norm(torch.ones(2, 4), torch.ones(4), 0.0).sum().item())"
    )
    flags = {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "AUTOPART_FORCE_TRITON": "1"}
    command = [sys.executable, "-c", script]
    child = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True)
    assert child.stdout.strip() == "8.0", child.stderr


def test_bytes_moved_counts_rows_and_vectors():
    x, weight = torch.empty(2, 3, 10, dtype=torch.bfloat16, device="meta"), torch.empty(10, device="meta")
    forward, backward = rms_norm.KERNELS[0].bytes_moved(x, weight, EPS)
    assert forward == 2 * (60 + 60 + 10) + 4 * 6
    assert backward == 2 * (60 + 60 + 60 + 10 + 10) + 4 * 6


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("d", [64, 4096, 4100, 16384])
def test_kernels_compile_ahead_without_spills(capability, d):
    pytest.importorskip("triton")
    usage = rms_norm.KERNELS[0].ahead(capability, d)
    assert set(usage) == {"forward", "backward"}
    spills = 0 if d % 16 == 0 else 16  # bytes a thread: Triton 3.7 for sm_80, where lengths are not known to be aligned
    assert all(isinstance(kernel, ahead.Usage) and kernel.spills <= spills for kernel in usage.values()), usage
    assert all(0 < kernel.registers < 256 for kernel in usage.values())


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [1, 64, 1000, 4096])
def test_dropout_compiles_ahead_without_spills(capability, dtype, d):
    pytest.importorskip("triton")
    usage = dropout.compile_ahead(capability, d, dtype)
    assert usage.spills == 0 and 0 < usage.registers < 128, usage


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", DROPPED)
def test_device_dropout_is_plain_torch_s_bit_for_bit(name, dtype):
    assert masks(DROPPED[name], dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_device_draws_what_the_cpu_draws():
    x = torch.randn(3, 5, 70)
    cpu = simulated_groups(World(), 1, 1, 1, 0)
    device = replace(cpu, device=torch.device("cuda"))
    here, there = (random.dropout(x.to(g.device), 0.3, random.stream(g, "a"), x.shape, 0) for g in (cpu, device))
    assert torch.equal(here, there.cpu())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES + WIDE, ids=lambda case: case.name)
def test_device_kernels_meet_the_float64_reference(case):
    found = errors(case, "cuda")
    assert max(found.values()) <= case.tolerance(ROUNDING), found


if __name__ == "__main__":
    found: dict[str, object] = {case.name: errors(case, "cpu") for case in INTERPRETED + WRONG}
    for dtype in (torch.float32, torch.float16):
        found |= {f"dropout {name} {dtype}": masks(shape, dtype, "cpu") for name, shape in DROPPED.items()}
    print(json.dumps(found))
