"""Norms of rows against their float64 formulas and against the models that write them out.

One child process (this file run as a script) takes every interpreted case; the tests here judge what it prints.
"""

import json
import os
from collections.abc import Callable
from importlib import import_module
from itertools import compress
from typing import Any, NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from autopart.kernels import layer_norm, norm_operators, norm_rows, rms_norm
from autopart.kernels.kernel import Kernel
from autopart.kernels.norm_rows import Form
from autopart.sharding.notation import parse
from tests.support.interpreted import interpreted as interpreted_child

EPS = 1e-6
ROUNDING = {torch.float32: 5e-7, torch.float16: 2**-11, torch.bfloat16: 2**-8}
INTERPRETED_ROUNDING = ROUNDING | {torch.bfloat16: 2**-7}  # the interpreter truncates where a GPU rounds
KERNELS = {kernel.name: kernel for kernel in (*rms_norm.KERNELS, *layer_norm.KERNELS)}


class Norm(NamedTuple):
    """One way to call a kernel.

    kernel     its name
    form       what it computes
    vectors    whether weight and bias are given, of those that it takes
    constants  behind eps
    """

    kernel: str
    form: Form
    vectors: tuple[bool, ...] = (True,)
    constants: tuple[Any, ...] = ()

    @property
    def adds(self) -> bool:
        return self.kernel.startswith("add_")


CENTRED, ROUND_FIRST = Form(centred=True), Form(round_first=True)
NORMS = {
    "llama": Norm("rms_norm", ROUND_FIRST, constants=(torch.float32,)),
    "add llama": Norm("add_rms_norm", ROUND_FIRST, constants=(torch.float32,)),
    "t5": Norm("rms_norm", ROUND_FIRST, constants=(torch.float32, True)),
    "gemma": Norm("rms_norm_float32", Form(unit_offset=True), constants=(True,)),
    "add gemma": Norm("add_rms_norm_float32", Form(unit_offset=True), constants=(True,)),
    "olmo 2": Norm("rms_norm_float32", Form()),
    "add olmo 2": Norm("add_rms_norm_float32", Form()),
    "gemma 3n": Norm("rms_norm_float32", Form(), constants=(False, True)),
    "llama 4": Norm("rms_norm_float32", Form(), (False,)),
    "layer": Norm("layer_norm", CENTRED, (True, True)),
    "layer without bias": Norm("layer_norm", CENTRED, (True, False)),
    "layer without weight": Norm("layer_norm", CENTRED, (False, True)),
    "layer without either": Norm("layer_norm", CENTRED, (False, False)),
    "add layer": Norm("add_layer_norm", CENTRED, (True, True)),
    "add layer without either": Norm("add_layer_norm", CENTRED, (False, False)),
    "cohere": Norm("layer_norm_float32", CENTRED),
}


class Case(NamedTuple):
    """One comparison with the float64 formula: x (3, rows, d) of ``layout``, drawn at ``scale`` around ``shift``."""

    norm: str
    d: int
    rows: int
    dtype: torch.dtype
    layout: str = "plain"
    scale: float = 1.0
    shift: float = 0.0
    vector_dtype: torch.dtype | None = None
    residual_dtype: torch.dtype | None = None
    kernel_eps: float = EPS

    def tolerance(self, rounding: dict[torch.dtype, float]) -> float:
        """Two roundings to the coarsest dtype of the case, which grow with the distance of x from zero."""
        dtypes = (self.dtype, self.vector_dtype or self.dtype, self.residual_dtype or self.dtype)
        return 2.1 * max(rounding[dtype] for dtype in dtypes) * (1 + self.shift)

    @property
    def name(self) -> str:
        return "-".join(str(field).removeprefix("torch.") for field in self)


F32, F16, BF16 = ROUNDING
CASES = [Case(norm, d, rows, dtype) for norm in NORMS for dtype in ROUNDING for d, rows in ((1, 1), (7, 3), (100, 6))]
MAIN = ("add llama", "gemma", "layer", "add layer")
CASES += [Case(norm, 100, 5, F32, layout) for norm in MAIN for layout in ("swapped", "sliced", "strided", "expanded")]
CASES += [Case(norm, 1500, 2, dtype) for norm in MAIN for dtype in (F32, BF16)]
CASES += [Case(norm, 64, 3, dtype, scale=scale) for norm in MAIN for dtype in (F32, F16) for scale in (1e4, 1e-6, 0.0)]
CASES += [Case(norm, 64, 3, F32, shift=1e3) for norm in ("layer", "add layer", "cohere")]
CASES += [Case(norm, 64, 3, BF16, vector_dtype=F32) for norm in MAIN]
CASES += [Case(norm, 64, 3, BF16, vector_dtype=F32, residual_dtype=F32) for norm in ("add llama", "add layer")]
CASES += [Case(norm, 64, 3, F32, residual_dtype=F16) for norm in ("add llama", "add gemma")]
FEW = [case for case in CASES if (case.rows, case.dtype) not in ((1, F16), (3, F16), (1, BF16), (6, F16))]
INTERPRETED = CASES if "AUTOPART_EXAMPLES" in os.environ else FEW
WRONG = [Case(norm, 100, 3, F32, scale=1e-3, kernel_eps=2 * EPS) for norm in NORMS]
WIDE = [Case(norm, d, 300, BF16) for norm in MAIN for d in (128, 4096, 5000, 16384)]


class Tensors(NamedTuple):
    """The operands of a case; None where it has none."""

    x: torch.Tensor
    residual: torch.Tensor | None
    vectors: list[torch.Tensor | None]

    @property
    def given(self) -> list[torch.Tensor]:
        return [t for t in (self.x, self.residual, *self.vectors) if t is not None]


def draw(case: Case, device: str) -> Tensors:
    """Operands that require gradients, x and residual contiguous only in the plain layout."""
    torch.manual_seed(0)
    norm = NORMS[case.norm]

    def rows(dtype: torch.dtype) -> torch.Tensor:
        shapes = {"plain": (3, case.rows, case.d), "swapped": (case.rows, 3, case.d)}
        shapes |= {"sliced": (3, case.rows, case.d + 5), "strided": (3, case.rows, 2 * case.d)}
        shapes |= {"expanded": (1, case.rows, case.d)}
        x = (torch.randn(shapes[case.layout]) * case.scale + case.shift).to(device, dtype)
        if case.layout == "expanded":
            return x.expand(3, -1, -1)
        views = {"plain": x, "swapped": x.transpose(0, 1), "sliced": x[..., : case.d], "strided": x[..., ::2]}
        return views[case.layout]

    x = rows(case.dtype).requires_grad_()
    residual = rows(case.residual_dtype or case.dtype).requires_grad_() if norm.adds else None
    drawn = [(torch.rand(case.d) + 0.5).to(device, case.vector_dtype or case.dtype) for _ in norm.vectors]
    return Tensors(
        x, residual, [v.requires_grad_() if given else None for v, given in zip(drawn, norm.vectors, strict=True)]
    )


def call(function: Callable[..., Any], norm: Norm, tensors: Tensors, eps: float = EPS) -> tuple[torch.Tensor, ...]:
    """The results, of which y is the last."""
    residual = [tensors.residual] if norm.adds else []
    found = function(tensors.x, *residual, *tensors.vectors, eps, *norm.constants)
    return found if isinstance(found, tuple) else (found,)


def formula(form: Form, s: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    h = s - s.mean(-1, keepdim=True) if form.centred else s
    h = h / (h.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    h = h if weight is None else h * (weight + form.unit_offset)
    return h if bias is None else h + bias


def errors(case: Case, device: str) -> dict[str, float]:
    """Largest error of every result and gradient, each over the largest size of the terms that it sums."""
    norm = NORMS[case.norm]
    tensors = draw(case, device)
    *total, y = call(KERNELS[norm.kernel].function, norm, tensors, case.kernel_eps)
    assert y.grad_fn is not None and "norm_rows" in y.grad_fn.name(), "the reference ran, not the kernels"
    s = (total or [tensors.x])[0]
    wide = [v.dtype for v in tensors.vectors if v is not None and norm.form.round_first]
    assert y.shape == s.shape == tensors.x.shape and y.dtype == torch.promote_types(s.dtype, (wide or [s.dtype])[0])
    upstream = [torch.randn(3, case.rows, case.d + 1).to(t)[..., :-1] for t in (*total, y)]
    grads = torch.autograd.grad((*total, y), tensors.given, upstream)
    assert [g.dtype for g in grads] == [t.dtype for t in tensors.given]

    s64 = s.detach().double().requires_grad_()
    vectors64 = [None if v is None else v.detach().double().requires_grad_() for v in (*tensors.vectors, None)][:2]
    exact = formula(norm.form, s64, *vectors64)
    given = [v for v in vectors64 if v is not None]
    ds, *dvectors = torch.autograd.grad(exact, [s64, *given], upstream[-1].double())
    ds = ds + upstream[0].double() if total else ds
    dy, weight = upstream[-1].double(), 1.0 if vectors64[0] is None else vectors64[0] + norm.form.unit_offset
    centred = s64 - s64.mean(-1, keepdim=True) if norm.form.centred else s64
    r = (centred.pow(2).mean(-1, keepdim=True) + EPS).rsqrt()
    sums = ((centred * r * dy).abs(), dy.abs())
    there = [v is not None for v in vectors64]
    terms = (r * weight * dy).abs() + (upstream[0].abs() if total else 0.0)
    sizes = [exact, terms, *(t.flatten(0, -2).sum(0) for t in compress(sums, there))]
    got = [y, grads[0], *grads[len(grads) - len(given) :]]
    pairs = list(zip(got, [exact, ds, *dvectors], sizes, strict=True))
    if tensors.residual is not None:
        added = tensors.x.double() + tensors.residual.double()
        pairs += [(s, added, added), (grads[1], ds, terms)]
    names = ("y", "dx", *compress(("dweight", "dbias"), there), "s", "dresidual")
    return {
        name: (got.double() - want).abs().max().item() / (size.abs().max().item() or 1.0)
        for name, (got, want, size) in zip(names, pairs, strict=False)
    }


def extremes(name: str, device: str) -> bool:
    """Whether infinities, NaNs and large numbers have the same ones behind them as in the reference."""
    norm = NORMS[name]
    x = torch.randn(7, 20)
    for row, value in enumerate((torch.inf, -torch.inf, torch.nan, 1e30, 1e-40, -0.0)):
        x[row, 3] = value
    x = x.to(device).requires_grad_()
    residual = torch.randn(7, 20, device=device).requires_grad_() if norm.adds else None
    drawn = [torch.rand(20, device=device).requires_grad_() if given else None for given in norm.vectors]
    tensors = Tensors(x, residual, drawn)
    found = []
    for function in (KERNELS[norm.kernel].function, KERNELS[norm.kernel].reference):
        results = call(function, norm, tensors)
        grads = torch.autograd.grad(results, tensors.given, [torch.ones_like(t) for t in results])
        found.append((*results, *grads))
    return all(torch.allclose(a, b, 1e-4, 1e-5, equal_nan=True) for a, b in zip(*found, strict=True))


def saved(name: str, device: str) -> bool:
    """Whether the kernels keep what `Kernel.kept` says."""
    norm = NORMS[name]
    kernel, tensors = KERNELS[norm.kernel], draw(Case(name, 24, 5, BF16, vector_dtype=F32), device)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        results = call(kernel.function, norm, tensors)
    operands = [t if t is None else t.detach().to("meta") for t in (tensors.x, *[tensors.residual][: norm.adds])]
    operands += [t if t is None else t.detach().to("meta") for t in tensors.vectors]
    said = kernel.kept((*operands, EPS, *norm.constants), tuple(t.detach().to("meta") for t in results))
    return sorted(t.nbytes for t in said) == sorted(t.nbytes for t in kept)


def partly_used(name: str, device: str) -> bool:
    """Whether gradients are those of all uses where some results are not used, or some operands are frozen."""
    norm, tensors = NORMS[name], draw(Case(name, 24, 5, F32), device)
    function = KERNELS[norm.kernel].function
    *total, y = call(function, norm, tensors)
    dy, dtotal = torch.randn_like(y), torch.randn_like(y)
    grads = torch.autograd.grad(y, tensors.given, dy)
    frozen = [None if v is None else v.detach() for v in tensors.vectors]
    alone = call(function, norm, Tensors(tensors.x, tensors.residual, frozen))[-1]
    equal = [torch.equal(torch.autograd.grad(alone, tensors.x, dy)[0], grads[0])]
    if total:
        both = torch.autograd.grad(call(function, norm, tensors), tensors.given, [dtotal, dy])
        equal += [torch.allclose(both[at], grads[at] + dtotal, 1e-5, 1e-6) for at in (0, 1)]
        only = torch.autograd.grad(call(function, norm, tensors)[0], tensors.given, dtotal, allow_unused=True)
        equal += [
            torch.equal(only[0], dtotal) and torch.equal(only[1], dtotal),
            not any(g is not None for g in only[2:]),
        ]
    return all(equal)


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
    assert interpreted[case.name]["y"] > case.tolerance(INTERPRETED_ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("check", ["extremes", "saved", "partly_used"])
@pytest.mark.parametrize("name", NORMS)
def test_interpreted(name, check, interpreted):
    assert interpreted[f"{check} {name}"] is True


@pytest.mark.slow
def test_the_operators_are_registered_as_torch_wants(interpreted):
    assert interpreted["opcheck"] == {"norm": ["SUCCESS"] * 2, "add_norm": ["SUCCESS"] * 2}


FORMULAS: dict[str, tuple[str, str]] = {
    "llama": ("transformers.models.llama.modeling_llama", "LlamaRMSNorm"),
    "t5": ("transformers.models.t5.modeling_t5", "T5LayerNorm"),
    "gemma": ("transformers.models.gemma.modeling_gemma", "GemmaRMSNorm"),
    "olmo 2": ("transformers.models.olmo2.modeling_olmo2", "Olmo2RMSNorm"),
    "gemma 3n": ("transformers.models.gemma3n.modeling_gemma3n", "Gemma3nRMSNorm"),
    "llama 4": ("transformers.models.llama4.modeling_llama4", "Llama4TextL2Norm"),
    "cohere": ("transformers.models.cohere.modeling_cohere", "CohereLayerNorm"),
    "layer": ("torch.nn", "LayerNorm"),
}


def model_norm(name: str, d: int) -> torch.nn.Module:
    """The module of a model, with weights drawn."""
    path, cls = FORMULAS[name]
    module = import_module(path)
    options = {"llama 4": {}, "layer": {"normalized_shape": d}, "gemma 3n": {"dim": d}, "gemma": {"dim": d}}
    found = getattr(module, cls)(**options.get(name, {"hidden_size": d}), eps=EPS)
    for parameter in found.parameters():
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_the_reference_is_the_model_s_norm_bit_for_bit(name, dtype):
    torch.manual_seed(0)
    module, norm = model_norm(name, 96).to(dtype), NORMS[name]
    vectors = list(module.parameters()) or [None]
    x, dy = torch.randn(3, 5, 96).to(dtype).requires_grad_(), torch.randn(3, 5, 96).to(dtype)
    given = [x, *module.parameters()]
    expected = module(x)
    (found,) = call(KERNELS[norm.kernel].reference, norm, Tensors(x, None, vectors))
    assert torch.equal(found, expected)
    grads = [torch.autograd.grad(y, given, dy) for y in (found, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", [name for name, norm in NORMS.items() if norm.adds])
def test_the_reference_with_a_residual_is_an_addition_before_the_norm(name):
    norm = NORMS[name]
    tensors = draw(Case(name, 24, 5, BF16), "cpu")
    total, y = call(KERNELS[norm.kernel].reference, norm, tensors)
    plain = KERNELS[norm.kernel.removeprefix("add_")].reference
    assert torch.equal(total, tensors.x + tensors.residual)
    assert torch.equal(y, plain(total, *tensors.vectors, EPS, *norm.constants))


def refuse(*args, **options):
    raise AssertionError("kernels used")


@pytest.fixture
def forced(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("AUTOPART_FORCE_TRITON", "1")
    monkeypatch.setattr(norm_operators, "launch", refuse)


X = torch.randn(2, 3, 8)
WEIGHT, BIAS = torch.rand(2, 8)
WIDER = torch.ones(1, norm_rows.MAX_BLOCK + 1)
FALLBACKS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "float64": ("layer", (X.double(), WEIGHT.double(), BIAS.double(), EPS)),
    "float64 residual": ("add layer", (X, X.double(), WEIGHT.double(), BIAS.double(), EPS)),
    "no rows": ("layer", (X[:0], WEIGHT, BIAS, EPS)),
    "no elements": ("layer", (X[..., :0], WEIGHT[:0], BIAS[:0], EPS)),
    "too wide": ("layer", (WIDER, WIDER[0], None, EPS)),
    "residual that broadcasts": ("add layer", (X, X[:1], WEIGHT, BIAS, EPS)),
    "row that broadcasts": ("add llama", (X, X[0, 0], WEIGHT, EPS)),
    "weights of heads": ("cohere", (X, torch.rand(3, 8), EPS)),
    "scalar weight": ("gemma", (X, WEIGHT[:1], EPS, True)),
    "double inside": ("add llama", (X, X, WEIGHT, EPS, torch.float64)),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_the_kernels_cannot_take_goes_to_the_reference(name, forced):
    norm, arguments = FALLBACKS[name]
    kernel = KERNELS[NORMS[norm].kernel]
    found, expected = kernel.function(*arguments), kernel.reference(*arguments)
    torch.testing.assert_close(found, expected)


def test_a_weight_that_torch_refuses_is_refused(forced):
    with pytest.raises(RuntimeError, match="dtype"):
        layer_norm.layer_norm(X, WEIGHT.half(), BIAS.half(), EPS)


@pytest.mark.parametrize("name", NORMS)
def test_the_environment_forces_the_kernels(name, forced):
    norm = NORMS[name]
    with pytest.raises(AssertionError, match="kernels used"):
        call(KERNELS[norm.kernel].function, norm, draw(Case(name, 8, 2, F32), "cpu"))


@pytest.mark.parametrize("name", NORMS)
def test_operators_take_fake_tensors(name):
    pytest.importorskip("triton")
    norm = NORMS[name]
    with FakeTensorMode():
        tensors = draw(Case(name, 24, 5, BF16, vector_dtype=F32), "cpu")
        vectors = (*tensors.vectors, None)[:2]
        results = torch.ops.autopart.norm_rows(tensors.x, tensors.residual, *vectors, EPS, *norm.form)
        results = results[1:2] if tensors.residual is None else results[:2]
        grads = torch.autograd.grad(results, tensors.given, [torch.ones_like(t) for t in results])
    wide = norm.form.round_first and norm.vectors[0]
    assert results[-1].shape == (3, 5, 24) and results[-1].dtype == (F32 if wide else BF16)
    assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in tensors.given]


def test_bytes_moved_counts_rows_vectors_and_statistics():
    x, v = torch.empty(2, 3, 10, dtype=BF16, device="meta"), torch.empty(10, dtype=BF16, device="meta")
    assert KERNELS["layer_norm"].bytes_moved(x, v, v, EPS) == (2 * (120 + 20) + 48, 2 * (180 + 30) + 48)
    assert KERNELS["layer_norm"].bytes_moved(x, None, None, EPS) == (2 * 120 + 48, 2 * 180 + 48)
    assert KERNELS["add_layer_norm"].bytes_moved(x, x, v, v, EPS) == (2 * (240 + 20) + 48, 2 * (240 + 30) + 48)
    assert KERNELS["add_rms_norm"].bytes_moved(x, x, v, EPS) == (2 * (240 + 10) + 24, 2 * (240 + 20) + 24)
    assert KERNELS["rms_norm_float32"].bytes_moved(x, None, EPS) == (2 * 120 + 24, 2 * 180 + 24)
    assert KERNELS["layer_norm_float32"].bytes_moved(x, v, EPS) == (2 * 130 + 48, 2 * 200 + 48)


@pytest.mark.parametrize("name", NORMS)
def test_a_rule_has_every_operand_and_result(name):
    norm = NORMS[name]
    row = parse(KERNELS[norm.kernel].rule)
    assert len(row.inputs) == 1 + norm.adds + len(norm.vectors) and len(row.outputs) == 1 + norm.adds


MODELS = [(kernel, model) for kernel in KERNELS.values() for model in kernel.shapes]


def id_of(value: Kernel | str) -> str:
    return value.name if isinstance(value, Kernel) else value


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("kernel", "model"), MODELS, ids=id_of)
def test_kernels_compile_ahead_without_spills(kernel, model, capability):
    pytest.importorskip("triton")
    usage = kernel.ahead(capability, **kernel.shapes[model])
    assert set(usage) == {"forward", "backward"}
    assert all(found.spills == 0 and 0 < found.registers <= 128 for found in usage.values()), usage


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("d", [1, 17, 128, 1024, 8192])
def test_rows_of_other_lengths_compile_ahead_without_spills(d, dtype):
    pytest.importorskip("triton")
    usage = KERNELS["add_layer_norm"].ahead(90, d, dtype)
    assert all(found.spills == 0 for found in usage.values()), usage


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES + WIDE, ids=lambda case: case.name)
def test_device_kernels_meet_the_float64_formula(case):
    found = errors(case, "cuda")
    assert max(found.values()) <= case.tolerance(ROUNDING), found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("check", [extremes, saved, partly_used], ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NORMS)
def test_device(name, check):
    assert check(name, "cuda")


def opcheck() -> dict[str, list[str]]:
    """What torch finds of the operators where kernels are interpreted."""
    x, weight, bias = torch.randn(3, 24), torch.rand(24), torch.rand(24)
    arguments = {"norm": (x, None), "add_norm": (x, x.clone())}
    checks = ("test_schema", "test_autograd_registration")
    return {
        name: list(
            torch.library.opcheck(
                torch.ops.autopart.norm_rows,
                (*[t if t is None else t.requires_grad_() for t in (*tensors, weight, bias)], EPS, True, False, False),
                test_utils=checks,
            ).values()
        )
        for name, tensors in arguments.items()
    }


if __name__ == "__main__":
    found: dict[str, object] = {case.name: errors(case, "cpu") for case in INTERPRETED + WRONG}
    for check in (extremes, saved, partly_used):
        found |= {f"{check.__name__} {name}": check(name, "cpu") for name in NORMS}
    print(json.dumps(found | {"opcheck": opcheck()}))
