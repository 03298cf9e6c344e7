"""Group norm against its float64 formula. One child process (this file run as a script) takes interpreted cases."""

import json
import os
from itertools import compress
from typing import Any, NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from autopart.kernels import group_norm, group_norm_kernels
from autopart.sharding.notation import parse
from tests.support.interpreted import interpreted as interpreted_child

EPS = 1e-5
ROUNDING = {torch.float32: 5e-7, torch.float16: 2**-11, torch.bfloat16: 2**-8}
INTERPRETED_ROUNDING = ROUNDING | {torch.bfloat16: 2**-7}  # the interpreter truncates where a GPU rounds
KERNELS = {kernel.name: kernel for kernel in group_norm.KERNELS}
F32, F16, BF16 = ROUNDING


class Case(NamedTuple):
    """One comparison with the float64 formula: x of ``shape`` and ``layout``, drawn at ``scale`` around ``shift``."""

    shape: tuple[int, ...]
    groups: int
    dtype: torch.dtype = F32
    silu: bool = False
    weight: bool = True
    bias: bool = True
    layout: str = "plain"
    scale: float = 1.0
    shift: float = 0.0
    vector_dtype: torch.dtype | None = None
    kernel_eps: float = EPS

    def tolerance(self, rounding: dict[torch.dtype, float]) -> float:
        """Two roundings, which grow with the distance of x from zero."""
        return 2.1 * rounding[self.dtype] * (1 + self.shift)

    @property
    def name(self) -> str:
        return "-".join(str(field).removeprefix("torch.") for field in self)

    @property
    def kernel(self) -> Any:
        return KERNELS["group_norm_silu" if self.silu else "group_norm"]

    @property
    def constants(self) -> tuple[int, float]:
        return self.groups, self.kernel_eps


SMALL = [((2, 6, 5, 7), 3), ((1, 1, 1), 1), ((3, 8), 2), ((2, 4, 9), 4), ((2, 12, 2, 3, 5), 1)]
LARGE = [((1, 6, 120, 91), 2), ((1, 1, 130, 129), 1), ((1, 2100, 13), 1)]
CASES = [Case(shape, groups, dtype, silu) for shape, groups in SMALL for dtype in ROUNDING for silu in (False, True)]
CASES += [Case(shape, groups, silu=silu) for shape, groups in LARGE for silu in (False, True)]
CASES += [Case(*SMALL[0], F32, silu, weight, False) for silu in (False, True) for weight in (False, True)]
CASES += [Case(*SMALL[0], F32, silu, False, True) for silu in (False, True)]
CASES += [Case(*LARGE[1], F32, True, False, False)]
CASES += [Case(*SMALL[0], layout=layout) for layout in ("channels last", "strided", "expanded")]
CASES += [Case(*SMALL[0], scale=scale) for scale in (1e4, 1e-6, 0.0)]
CASES += [Case(shape, groups, shift=1e3) for shape, groups in (SMALL[0], LARGE[1])]
CASES += [Case(*SMALL[0], dtype, True, vector_dtype=F32) for dtype in (F16, BF16)]
WRONG = [Case(shape, groups, scale=3e-3, kernel_eps=2 * EPS) for shape, groups in (SMALL[0], LARGE[1])]
FEW = [case for case in CASES if case.dtype != F16 and (case.shape != LARGE[0][0] or case.silu)]
INTERPRETED = CASES if "AUTOPART_EXAMPLES" in os.environ else FEW
DEVICE = [Case((2, 320, 64, 64), 32, BF16, True), Case((8, 1280, 16, 16), 32, BF16), Case((1, 128, 512, 512), 32, BF16)]


def draw(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """x, weight and bias, which require gradients."""
    torch.manual_seed(0)
    x = (torch.randn(case.shape) * case.scale + case.shift).to(device, case.dtype)
    if case.layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    elif case.layout == "strided":
        x = torch.stack([x, x], -1)[..., 0]
    elif case.layout == "expanded":
        x = x[:1].expand(case.shape)
    weight, bias = torch.rand(2, case.shape[1]).to(device, case.vector_dtype or case.dtype)
    weight, bias = (weight + 0.5).requires_grad_(), bias.clone().requires_grad_()
    return x.requires_grad_(), weight if case.weight else None, bias if case.bias else None


def formula(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, groups: int, silu: bool
) -> torch.Tensor:
    of_channels = (1, -1, *[1] * (x.dim() - 2))
    h = x.unflatten(1, (groups, -1)).flatten(2)
    h = h - h.mean(-1, keepdim=True)
    z = (h / (h.pow(2).mean(-1, keepdim=True) + EPS).sqrt()).view_as(x)
    z = z if weight is None else z * weight.view(of_channels)
    z = z if bias is None else z + bias.view(of_channels)
    return z * z.sigmoid() if silu else z


def errors(case: Case, device: str) -> dict[str, float]:
    """Largest error of y and of every gradient, each over the largest size of the terms that it sums."""
    tensors = draw(case, device)
    y = case.kernel.function(*tensors, *case.constants)
    assert y.grad_fn is not None and "autopart_group_norm" in y.grad_fn.name(), "the reference ran, not the kernels"
    assert y.shape == case.shape and y.dtype == case.dtype
    dy = torch.randn(*case.shape[:-1], case.shape[-1] + 1).to(y)[..., :-1]
    grads = torch.autograd.grad(y, [t for t in tensors if t is not None], dy)

    exact64 = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    there = [t is not None for t in exact64]
    exact = formula(*exact64, case.groups, case.silu)
    expected = torch.autograd.grad(exact, list(compress(exact64, there)), dy.double())
    x64, weight64, _ = exact64
    grouped = x64.unflatten(1, (case.groups, -1)).flatten(2)
    r = (grouped.var(-1, unbiased=False) + EPS).rsqrt().max()
    h = formula(x64, None, None, case.groups, False)
    dims = [0, *range(2, x64.dim())]
    slope = dy.double().abs()
    sizes = [
        r * slope.max() * (1 if weight64 is None else weight64.max()),
        (slope * h).abs().sum(dims),
        slope.sum(dims),
    ]
    pairs = [(y, exact, exact), *zip(grads, expected, compress(sizes, there), strict=True)]
    names = ("y", *compress(("dx", "dweight", "dbias"), there))
    return {
        name: (got.double() - want).abs().max().item() / (size.abs().max().item() or 1.0)
        for name, (got, want, size) in zip(names, pairs, strict=True)
    }


def extremes(silu: bool, device: str) -> bool:
    """Whether infinities, NaNs and large numbers have the same ones behind them as in the reference."""
    values = (torch.inf, -torch.inf, torch.nan, 1e30, 1e-40, -0.0)
    x = torch.randn(len(values), 6, 5, 7)
    for sample, value in enumerate(values):
        x[sample, 3, 2, 1] = value
    weight, bias = (torch.rand(6, device=device).requires_grad_() for _ in range(2))
    kernel, tensors = (
        KERNELS["group_norm_silu" if silu else "group_norm"],
        (x.to(device).requires_grad_(), weight, bias),
    )
    found = []
    for function in (kernel.function, kernel.reference):
        y = function(*tensors, 3, EPS)
        found.append((y, *torch.autograd.grad(y, tensors, torch.ones_like(y))))
    return all(torch.allclose(a, b, 1e-4, 1e-5, equal_nan=True) for a, b in zip(*found, strict=True))


def saved(silu: bool, device: str) -> bool:
    """Whether the kernels keep what `Kernel.kept` says."""
    case = Case((2, 6, 5, 7), 3, BF16, silu)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tensors = draw(case, device)
        y = case.kernel.function(*tensors, *case.constants)
    meta = [t.detach().to("meta") for t in (*tensors, y)]
    said = case.kernel.kept((*meta[:3], *case.constants), (meta[3],))
    return sorted(t.nbytes for t in said) == sorted(t.nbytes for t in kept)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What the interpreting child found, by name."""
    return interpreted_child(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("case", INTERPRETED, ids=lambda case: case.name)
def test_interpreted_kernels_meet_the_float64_formula(case, interpreted):
    found = interpreted[case.name]
    assert max(found.values()) <= case.tolerance(INTERPRETED_ROUNDING), found


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.name)
def test_a_wrong_eps_is_caught(case, interpreted):
    found = interpreted[case.name]
    assert min(found["y"], found["dx"]) > case.tolerance(INTERPRETED_ROUNDING), found


@pytest.mark.slow
@pytest.mark.parametrize("check", ["extremes", "saved"])
@pytest.mark.parametrize("silu", [False, True])
def test_interpreted(silu, check, interpreted):
    assert interpreted[f"{check} {silu}"] is True


@pytest.mark.slow
def test_the_operator_is_registered_as_torch_wants(interpreted):
    assert interpreted["opcheck"] == ["SUCCESS"] * 2


@pytest.mark.parametrize("case", [Case((2, 6, 5, 7), 3, dtype, silu) for dtype in ROUNDING for silu in (False, True)])
def test_the_reference_is_the_library_s_bit_for_bit(case):
    x, weight, bias = draw(case, "cpu")
    expected = F.group_norm(x, 3, weight, bias, EPS)
    expected = F.silu(expected) if case.silu else expected
    assert torch.equal(case.kernel.reference(x, weight, bias, 3, EPS), expected)


@pytest.mark.parametrize("silu", [False, True])
def test_the_formula_is_the_library_s_in_float64(silu):
    x, weight, bias = (t.detach().double() for t in draw(Case(*SMALL[0]), "cpu"))
    expected = F.group_norm(x, 3, weight, bias, EPS)
    torch.testing.assert_close(formula(x, weight, bias, 3, silu), F.silu(expected) if silu else expected)


def refuse(*args, **options):
    raise AssertionError("kernels used")


@pytest.fixture
def forced(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("AUTOPART_FORCE_TRITON", "1")
    monkeypatch.setattr(group_norm, "launch", refuse)


X, WEIGHT = torch.randn(2, 4, 6), torch.rand(4)
WIDE = torch.randn(2, 2 * group_norm_kernels.MAX_WIDTH + 2, 1)
FALLBACKS: dict[str, tuple[Any, ...]] = {
    "float64": (X.double(), WEIGHT.double(), None, 2, EPS),
    "no samples": (X[:0], WEIGHT, WEIGHT, 2, EPS),
    "wide groups": (WIDE, None, None, 2, EPS),
}


@pytest.mark.parametrize("name", FALLBACKS)
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_what_the_kernels_cannot_take_goes_to_the_reference(kernel, name, forced):
    assert torch.equal(kernel.function(*FALLBACKS[name]), kernel.reference(*FALLBACKS[name]))


def test_what_torch_refuses_is_refused(forced):
    with pytest.raises(RuntimeError, match="divisible"):
        group_norm.group_norm(X, WEIGHT, None, 3, EPS)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_the_environment_forces_the_kernels(kernel, forced):
    with pytest.raises(AssertionError, match="kernels used"):
        kernel.function(X, WEIGHT, WEIGHT, 2, EPS)


@pytest.mark.parametrize(
    "case", [Case(*SMALL[0], BF16), Case(*LARGE[0], BF16, True), Case(*SMALL[0], F32, False, False)]
)
def test_operators_take_fake_tensors(case):
    pytest.importorskip("triton")
    with FakeTensorMode():
        tensors = draw(case, "cpu")
        y, _ = torch.ops.autopart.group_norm(*tensors, *case.constants, case.silu)
        given = [t for t in tensors if t is not None]
        grads = torch.autograd.grad(y, given, torch.ones_like(y))
    assert (y.shape, y.dtype) == (case.shape, case.dtype)
    assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in given]


def test_bytes_moved_counts_passes_over_x():
    v = torch.empty(64, dtype=BF16, device="meta")
    small, large = (torch.empty(2, 64, p, dtype=BF16, device="meta") for p in (64, 64000))
    bytes_moved = KERNELS["group_norm"].bytes_moved
    n = small.numel()
    assert bytes_moved(small, v, v, 32, EPS) == (2 * (2 * n + 128) + 512, 2 * (3 * n + 256) + 512)
    n = large.numel()
    assert bytes_moved(large, None, None, 32, EPS) == (6 * n + 512, 10 * n + 512)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_a_rule_has_every_operand_and_result(kernel):
    row = parse(kernel.rule)
    assert (len(row.inputs), len(row.outputs)) == (3, 1)


MODELS = [(name, model) for name, kernel in KERNELS.items() for model in kernel.shapes]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("name", "model"), MODELS)
def test_kernels_compile_ahead_without_spills(name, model, capability):
    pytest.importorskip("triton")
    kernel = KERNELS[name]
    usage = kernel.ahead(capability, **kernel.shapes[model])
    assert {"forward", "backward"} <= set(usage) <= {"moments", "forward", "backward sums", "backward"}
    assert all(found.spills == 0 and 0 < found.registers <= 128 for found in usage.values()), usage


OTHER = [(32, 1), (32, 20000), (512, 1), (4096, 49), (1280, 225)]
"""Channels and pixels: one channel a group, one pixel, and pixels that 16 does not divide."""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("channels", "pixels"), OTHER)
def test_other_images_compile_ahead_without_spills(channels, pixels, dtype):
    pytest.importorskip("triton")
    usage = KERNELS["group_norm_silu"].ahead(90, channels, pixels, dtype=dtype)
    assert all(found.spills == 0 for found in usage.values()), usage


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES + DEVICE, ids=lambda case: case.name)
def test_device_kernels_meet_the_float64_formula(case):
    found = errors(case, "cuda")
    assert max(found.values()) <= case.tolerance(ROUNDING), found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("check", [extremes, saved], ids=lambda check: check.__name__)
@pytest.mark.parametrize("silu", [False, True])
def test_device(silu, check):
    assert check(silu, "cuda")


def opcheck() -> list[str]:
    """What torch finds of the operator where kernels are interpreted."""
    arguments = (*draw(Case((2, 6, 5, 7), 3), "cpu"), 3, EPS, True)
    checks = ("test_schema", "test_autograd_registration")
    return list(torch.library.opcheck(torch.ops.autopart.group_norm, arguments, test_utils=checks).values())


if __name__ == "__main__":
    found: dict[str, object] = {case.name: errors(case, "cpu") for case in INTERPRETED + WRONG}
    for check in (extremes, saved):
        found |= {f"{check.__name__} {silu}": check(silu, "cpu") for silu in (False, True)}
    print(json.dumps(found | {"opcheck": opcheck()}))
