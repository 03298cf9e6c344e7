"""Rotary position embedding against its references; one interpreting child takes the Triton cases."""

import importlib
import json
import math
import os
from typing import Any, NamedTuple

import pytest
import torch

from autopart.kernels import rotary as module
from autopart.kernels.rotary import KERNELS, rotary, rotary_deinterleaved, rotary_interleaved
from autopart.sharding.notation import parse
from tests.support import kernel_checks
from tests.support.interpreted import interpreted as interpreted_child
from tests.support.kernel_checks import INTERPRETED_ROUNDING, ROUNDING, both, same_infinities, saved_bytes, worst

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
HALVES, ADJACENT, APART = range(3)


class Case(NamedTuple):
    """One comparison with the float64 reference: x (2, heads, tokens, d), of which r are turned.

    kind        index of the kernel
    half        whether the tables have r / 2 columns
    layout      of x: "behind" (heads behind tokens in memory), "plain", "joint" (a part of a product), "strided"
    tables      leading dims of the tables: "batch", "one", "flat", "each" (every head's own), "behind" (strided)
    """

    kind: int
    heads: int
    tokens: int
    d: int
    r: int
    half: bool = False
    layout: str = "behind"
    tables: str = "one"
    dtype: torch.dtype = F32
    table_dtype: torch.dtype = F32
    cast: torch.dtype | None = None
    wrong: float = 0.0

    @property
    def label(self) -> str:
        return "-".join(str(field).removeprefix("torch.") for field in self)

    @property
    def constants(self) -> tuple[Any, ...]:
        dtypes = (F32, self.cast) if self.cast else ()
        return () if self.kind == APART else (self.half, *dtypes)

    def tolerance(self, rounding: dict[torch.dtype, float]) -> float:
        """Two products and a sum in float32, and a rounding to the dtype of the case."""
        return 1e-6 + 1.1 * rounding[self.dtype]

    def sample(self, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x and the tables."""
        b, h, s, d = 2, self.heads, self.tokens, self.d
        sizes = {"behind": (b, s, h, d), "joint": (b, s, h, 3 * d), "strided": (b, s, h, 2 * d), "plain": (b, h, s, d)}
        x = torch.randn(sizes[self.layout]).to(device, self.dtype)
        x = {"joint": x[..., d : 2 * d], "strided": x[..., ::2]}.get(self.layout, x)
        width = self.r // 2 if self.half else self.r
        lead = {"batch": (b, 1, s), "one": (1, 1, s), "flat": (s,), "each": (b, h, s), "behind": (s, b, 1)}[self.tables]
        cos, sin = (torch.randn(*lead, width).to(device, self.table_dtype) for _ in range(2))
        if self.tables == "behind":
            cos, sin = cos.movedim(0, 2), sin.movedim(0, 2)
        return x if self.layout == "plain" else x.transpose(1, 2), cos, sin


KINDS = [(kind, half) for kind in (HALVES, ADJACENT) for half in (False, True)] + [(APART, True)]
CASES = [Case(kind, *size, half) for kind, half in KINDS for size in ((5, 3, 8, 8), (2, 9, 12, 12))]
CASES += [Case(kind, 5, 3, 10, 6, half) for kind, half in KINDS if kind != APART]
CASES += [Case(HALVES, 2, 300, 70, 64), Case(ADJACENT, 1, 1, 2, 2), Case(HALVES, 40, 2, 130, 128)]
CASES += [Case(HALVES, 5, 3, 8, 8, layout=layout) for layout in ("plain", "joint", "strided")]
CASES += [Case(APART, 5, 3, 8, 8, True, layout, "batch") for layout in ("plain", "joint")]
CASES += [Case(ADJACENT, 5, 3, 10, 6, tables=tables) for tables in ("batch", "flat", "each", "behind")]
CASES += [Case(HALVES, 5, 3, 8, 8, dtype=dtype, table_dtype=dtype) for dtype in (F16, BF16)]
CASES += [Case(ADJACENT, 5, 3, 8, 8, dtype=BF16, table_dtype=dtype, cast=BF16) for dtype in (F32, BF16)]
CASES += [Case(HALVES, 5, 3, 10, 6, dtype=BF16, table_dtype=F32)]
ALL = [
    Case(kind, heads, 6, 12, r, half, layout, tables, dtype, dtype)
    for kind, half in KINDS
    for r in ((12,) if kind == APART else (8, 12))
    for heads, layout in ((3, "behind"), (7, "plain"), (7, "joint"))
    for tables in ("batch", "flat")
    for dtype in ROUNDING
]
INTERPRETED = CASES + ALL if "AUTOPART_EXAMPLES" in os.environ else CASES
WRONG = [Case(kind, 5, 3, 8, 8, half, wrong=1e-4) for kind, half in KINDS]
EXTREMES = [math.inf, -math.inf, math.nan, 0.0, 1e-40, 1e30, -1e30, 1.0]


def errors(case: Case, device: str) -> dict[str, float]:
    """Largest errors of y and dx, each over its largest size. ``case.wrong`` is added to the sines of the kernel."""
    torch.manual_seed(0)
    x, cos, sin = case.sample(device)
    x.requires_grad_()
    kernel, reference = both(KERNELS[case.kind])
    y = kernel(x, cos, sin + case.wrong if case.wrong else sin, *case.constants)
    assert y.grad_fn is not None and "autopart_rotary" in y.grad_fn.name(), "the reference ran, not the kernel"
    plain = reference(x, cos, sin, *case.constants)
    assert (y.dtype, y.shape, y.stride()) == (plain.dtype, plain.shape, plain.stride())
    dy = torch.randn(*y.shape[:-1], case.d + 1).to(y)[..., 1:]
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.dtype == x.dtype and dx.stride() == torch.empty_like(x).stride()

    exact = x.detach().double().requires_grad_()
    exact_y = reference(exact, cos.double(), sin.double(), *case.constants[:1])
    (exact_dx,) = torch.autograd.grad(exact_y, exact, dy.double())
    return {"y": worst(y, exact_y), "dx": worst(dx, exact_dx)}


def extremes(kind: int, half: bool, device: str) -> bool:
    """Whether y and dx have the infinities and NaNs of the reference, over all pairs of extreme values."""
    n = len(EXTREMES)
    a, b = (t.reshape(-1, 1) for t in torch.meshgrid(*[torch.tensor(EXTREMES, device=device)] * 2, indexing="ij"))
    x = torch.stack((a, b), -1).reshape(n * n, 2).requires_grad_()
    cos, sin = (torch.tensor(values, device=device).tile(n * n, 1) for values in ([0.6, 0.8], [0.0, 0.5]))
    tables = (cos[:, :1], sin[:, :1]) if half else (cos, sin)
    found = []
    for function in both(KERNELS[kind]):
        y = function(x, *tables, *(() if kind == APART else (half,)))
        found.append((y, *torch.autograd.grad(y, x, x.detach().flip(0))))
    return all(same_infinities(got, want, 1e-5) for got, want in zip(*found, strict=True))


def operators() -> bool:
    """Whether the operator is registered as it should be, and is the gradient of its gradient."""
    x, cos, sin = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8), torch.randn(3, 8)
    dy = torch.randn(3, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(rotary(x, cos, sin), x, dy, create_graph=True)
    (again,) = torch.autograd.grad(dx, dy, x)
    arguments = (x, cos, sin, "halves", "halves", False, False, F32, [0, 1])
    return torch.equal(again, rotary(x, cos, sin)) and kernel_checks.registered(
        torch.ops.autopart.rotary.default, *arguments
    )


@pytest.fixture(scope="module")
def interpreted():
    """What the interpreting child found, by name."""
    return interpreted_child(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("case", INTERPRETED, ids=lambda case: case.label)
def test_interpreted_kernel_meets_the_float64_reference(case, interpreted):
    found = interpreted[case.label]
    assert max(found.values()) <= case.tolerance(INTERPRETED_ROUNDING), found


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "half"), KINDS)
def test_interpreted_kernel_has_the_infinities_of_the_reference(kind, half, interpreted):
    assert interpreted[f"extremes {kind} {half}"] is True


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.label)
def test_a_wrong_sine_is_caught(case, interpreted):
    assert min(interpreted[case.label].values()) > case.tolerance(INTERPRETED_ROUNDING)


@pytest.mark.slow
def test_the_operator_is_registered_and_can_be_differentiated_twice(interpreted):
    assert interpreted["operators"] is True


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 2, 1, 3]], ids=str)
def test_fake_tensors_take_the_operator(order, monkeypatch):
    monkeypatch.setattr(module, "launch", lambda *args, **options: None)
    x, cos, sin = Case(HALVES, 5, 3, 10, 6).sample("cpu")
    arguments = (x, cos, sin, "halves", "adjacent", False, True, BF16, order)
    assert kernel_checks.fake_agrees(torch.ops.autopart.rotary.default, *arguments)


class Model(NamedTuple):
    """The function of a model in transformers, and the call of a reference that is the same."""

    module: str
    kind: int
    half: bool = False
    casts: tuple[bool, bool] = (False, False)  # whether x is cast to float32 before, and back behind
    share: float = 1.0  # of d that is turned
    name: str = "apply_rotary_pos_emb"
    rounds_once: bool = True  # whether autograd rounds dx once, as the reference does


MODELS = [
    Model("llama", HALVES),
    Model("gpt_neox", HALVES, share=0.25),
    Model("phi3", HALVES, share=0.75),
    Model("gpt_oss", HALVES, half=True),
    Model("olmo2", HALVES, casts=(False, True)),
    Model("hunyuan_vl", HALVES, casts=(True, True)),
    Model("modernbert", HALVES, casts=(True, True), rounds_once=False),
    Model("cohere", ADJACENT, casts=(True, True)),
    Model("ernie4_5", ADJACENT, half=True, casts=(True, True), rounds_once=False),
    Model("glm", ADJACENT, half=True, share=0.5),
    Model("helium", ADJACENT, half=True),
    Model("deepseek_v3", APART, half=True, name="apply_rotary_pos_emb_interleave"),
]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.module)
def test_reference_is_the_models_bit_for_bit(model, dtype):
    written = getattr(
        importlib.import_module(f"transformers.models.{model.module}.modeling_{model.module}"), model.name
    )
    q, k = (torch.randn(2, 5, heads, 16).to(dtype).transpose(1, 2).requires_grad_() for heads in (4, 2))
    r = int(16 * model.share)
    full = [torch.randn(2, 5, r).to(dtype) for _ in range(2)]
    given = [table[..., : r // 2] if model.half else table for table in full]
    before, behind = model.casts
    constants = () if model.kind == APART else (model.half, F32 if before else None, dtype if behind else None)
    reference = KERNELS[model.kind].reference

    def ours(q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
        return [reference(x, *(table[:, None] for table in given), *constants) for x in (q, k)]

    def theirs(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return written(q, k, *(given if model.module == "gpt_oss" else full))

    for found, expected, x in zip(ours(q, k), theirs(q, k), (q, k), strict=True):
        assert torch.equal(found, expected) and found.stride() == expected.stride()
        dx, expected_dx = (torch.autograd.grad(y, x, torch.ones_like(y))[0] for y in (found, expected))
        rounding = 0.0 if model.rounds_once else 3 * ROUNDING[dtype]
        torch.testing.assert_close(dx, expected_dx, rtol=rounding, atol=rounding)
    if not (model.kind == ADJACENT and model.half):  # these models widen the tables once for q and k
        assert saved_bytes(ours, q, k) <= saved_bytes(theirs, q, k)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_reference_is_gpt_j_s_bit_for_bit(dtype):
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

    x, sin, cos = (torch.randn(size).to(dtype) for size in ((2, 5, 4, 16), (2, 5, 8), (2, 5, 8)))
    found = KERNELS[ADJACENT].reference(x, cos[:, :, None], sin[:, :, None], True)
    assert torch.equal(found, apply_rotary_pos_emb(x, sin, cos))


def tensors(*sizes: tuple[int, ...], dtype: torch.dtype = F32) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(size, dtype=dtype) for size in sizes)


FALLBACKS = {
    "float64": (*tensors((2, 8), (2, 8), (2, 8), dtype=torch.float64),),
    "float64 tables": (*tensors((2, 8)), *tensors((2, 8), (2, 8), dtype=torch.float64)),
    "float64 inside": (*tensors((2, 8), (2, 8), (2, 8)), False, torch.float64),
    "another dtype behind": (*tensors((2, 8), (2, 8), (2, 8)), False, None, F16),
    "no rows": (*tensors((0, 8), (1, 8), (1, 8)),),
    "five dims": (*tensors((1, 1, 1, 2, 8), (2, 8), (2, 8)),),
    "more tables than rows": (*tensors((1, 8), (2, 8), (2, 8)),),
    "tables of more dims": (*tensors((2, 8), (3, 2, 8), (3, 2, 8)),),
    "tables of two shapes": (*tensors((2, 8), (2, 8), (1, 8)),),
    "too wide": (*tensors((1, 4098), (1, 4098), (1, 4098)),),
}


def refuse(*args, **options):
    raise AssertionError("kernel used")


@pytest.fixture
def forced(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("AUTOPART_FORCE_TRITON", "1")
    monkeypatch.setattr(module, "launch", refuse)


@pytest.mark.parametrize("kind", [HALVES, ADJACENT])
@pytest.mark.parametrize("name", FALLBACKS)
def test_what_the_kernel_cannot_take_goes_to_the_reference(name, kind, forced):
    function, reference = both(KERNELS[kind])
    torch.testing.assert_close(function(*FALLBACKS[name]), reference(*FALLBACKS[name]))  # a CPU adds in another order


def test_tables_with_a_gradient_go_to_the_reference(forced):
    x, cos, sin = tensors((2, 8), (2, 8), (2, 8))
    rotary(x, cos.requires_grad_(), sin).sum().backward()
    assert cos.grad is not None and torch.equal(cos.grad, x)


def test_the_environment_forces_the_kernel(forced):
    x, cos, sin = tensors((2, 8), (2, 4), (2, 4))
    for function in (rotary, rotary_interleaved, rotary_deinterleaved):
        with pytest.raises(AssertionError, match="kernel used"):
            function(x, cos, sin)


def test_records_say_bytes_kept_tensors_and_rules():
    x, table = torch.empty(2, 3, 5, 8, dtype=BF16, device="meta"), torch.empty(5, 4, device="meta")
    assert [kernel.name for kernel in KERNELS] == ["rotary", "rotary_interleaved", "rotary_deinterleaved"]
    for kernel in KERNELS:
        assert kernel.bytes_moved(x, table, table) == (2 * 2 * 240 + 2 * 4 * 20,) * 2
        assert kernel.kept((x, table, table), (x,)) == (table, table)
        assert len(parse(kernel.rule).inputs) == 3


AHEAD = [(kernel, model) for kernel in KERNELS for model in kernel.shapes]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("kernel", "model"), AHEAD, ids=[f"{kernel.name} {model}" for kernel, model in AHEAD])
def test_kernel_compiles_ahead_without_spills(kernel, model, capability):
    pytest.importorskip("triton")
    for usage in kernel.ahead(capability, **kernel.shapes[model]).values():
        assert usage.spills == 0 and 0 < usage.registers < 128, usage


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("d", "heads", "r"), [(2, 1, 2), (80, 40, 20), (2048, 4, 1024)])
def test_kernel_of_other_sizes_compiles_ahead_without_spills(d, heads, r, dtype):
    pytest.importorskip("triton")
    usage = module.compile_ahead(90, d, heads, dtype, r)
    assert all(kernel.spills == 0 for kernel in usage.values()), usage


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", [*CASES, *ALL, Case(HALVES, 32, 2048, 128, 128)], ids=lambda case: case.label)
def test_device_kernel_meets_the_float64_reference(case):
    found = errors(case, "cuda")
    assert max(found.values()) <= case.tolerance(ROUNDING), found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("kind", "half"), KINDS)
def test_device_kernel_has_the_infinities_of_the_reference(kind, half):
    assert extremes(kind, half, "cuda")


if __name__ == "__main__":
    results: dict[str, object] = {case.label: errors(case, "cpu") for case in INTERPRETED + WRONG}
    results |= {f"extremes {kind} {half}": extremes(kind, half, "cpu") for kind, half in KINDS}
    print(json.dumps(results | {"operators": operators()}))
