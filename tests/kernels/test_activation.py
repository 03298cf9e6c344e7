"""Activations, with and without a bias, against their references; one interpreting child takes the Triton cases."""

import json
import math
import os
from typing import NamedTuple

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.bloom.modeling_bloom import BloomGelu

from autopart.kernels import activation as module
from autopart.kernels.activation import ACTIVATIONS, KERNELS, Activation, activation, bias_activation
from autopart.sharding.notation import parse
from tests.support import kernel_checks
from tests.support.interpreted import interpreted as interpreted_child
from tests.support.kernel_checks import INTERPRETED_ROUNDING, ROUNDING, both, laid_out, saved_bytes, worst

NONE, LIKE_X = "no bias", "bias"


class Case(NamedTuple):
    """One comparison with the float64 reference: x (2, rows, d) of ``layout``; a bias, or its dtype."""

    name: str
    rows: int
    d: int
    dtype: torch.dtype
    bias: str | torch.dtype = LIKE_X
    layout: str = "plain"

    @property
    def label(self) -> str:
        return "-".join(str(field).removeprefix("torch.") for field in self)

    def tolerance(self, rounding: dict[torch.dtype, float]) -> float:
        """Some operations in float32, and a rounding to the coarser dtype of the case."""
        return 1e-6 + 1.1 * max(rounding[d] for d in (self.dtype, self.bias) if isinstance(d, torch.dtype))


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CASES = [Case(name, 2, 5, F32, bias) for name in ACTIVATIONS for bias in (NONE, LIKE_X)]
CASES += [Case("gelu_new", 5, 700, dtype, bias) for dtype in (F16, BF16) for bias in (NONE, LIKE_X)]
CASES += [Case("gelu", 1, 1, F32, bias) for bias in (NONE, LIKE_X)] + [
    Case("relu2", 100, 1, F32),
    Case("gelu", 99, 64, F32),
]
CASES += [Case("silu", 3, 70, F32, layout=layout) for layout in ("sliced", "strided", "expanded")]
CASES += [Case("quick_gelu", 3, 8, BF16, F32), Case("quick_gelu", 3, 8, F32, F16)]
ALL = [Case(name, 7, 70, dtype, bias) for name in ACTIVATIONS for dtype in ROUNDING for bias in (NONE, LIKE_X)]
INTERPRETED = CASES + ALL if "AUTOPART_EXAMPLES" in os.environ else CASES
EXTREMES = {
    F32: [math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-40, -1e-40, 1e30, -1e30, 3e38, 88.0, -88.0, 20.0, -20.0, 1e4],
    F16: [math.inf, -math.inf, math.nan, 0.0, -0.0, 6e-8, -6e-8, 65504.0, -65504.0, 300.0, -300.0, 9.0, -9.0],
}
WRITTEN_OUT = {"gelu": "gelu_python"}  # PyTorch's own on a CPU is NaN at infinity, unlike on a GPU
WRONG = "wrong constant"


def errors(case: Case, device: str) -> dict[str, float]:
    """Largest errors of y, dx and dbias, each over the largest size of the terms that it sums."""
    torch.manual_seed(0)
    x = laid_out((2, case.rows, case.d), case.dtype, device, case.layout).requires_grad_()
    operands = [x]
    if case.bias != NONE:
        bias_dtype = case.bias if isinstance(case.bias, torch.dtype) else case.dtype
        operands.append(torch.randn(case.d).to(device, bias_dtype).requires_grad_())
    kernel, reference = both(KERNELS[len(operands) - 1])
    y = kernel(*operands, case.name)
    assert y.grad_fn is not None and "autopart_activation" in y.grad_fn.name(), "the reference ran, not the kernels"
    assert y.dtype == reference(*operands, case.name).dtype
    dy = torch.randn(2, case.rows, case.d + 1).to(y)[..., 1:]
    gradients = torch.autograd.grad(y, operands, dy)
    assert [g.dtype for g in gradients] == [t.dtype for t in operands]

    exact = [t.detach().double().requires_grad_() for t in operands]
    exact_y = reference(*exact, case.name)
    exact_gradients = torch.autograd.grad(exact_y, exact, dy.double())
    found = {"y": worst(y, exact_y), "dx": worst(gradients[0], exact_gradients[0])}
    if len(operands) == 2:
        found["dbias"] = worst(gradients[1], exact_gradients[1], exact_gradients[0].abs().sum((0, 1)))
    return found


def extremes(name: str, dtype: torch.dtype, device: str) -> bool:
    """Whether y and dx have the infinities and NaNs of the reference in float32."""
    x = torch.tensor(EXTREMES[dtype], dtype=dtype, device=device)
    found = []
    for function, t, spelt in ((activation, x, name), (module.reference, x.float(), WRITTEN_OUT.get(name, name))):
        y = function(t.requires_grad_(), spelt)
        found.append((y, *torch.autograd.grad(y.sum(), t)))
    pairs = zip(*found, strict=True)
    return all(kernel_checks.same_infinities(got, want, INTERPRETED_ROUNDING[dtype] * 3) for got, want in pairs)


def operators() -> bool:
    """Whether the operators are registered as they should be."""
    x, bias = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    ops = torch.ops.autopart
    given = [(ops.activation, (x, bias, "gelu")), (ops.activation, (x, None, "relu2"))]
    given += [(ops.activation_backward, (x.detach(), x.detach(), bias.detach(), "silu"))]
    return all(kernel_checks.registered(op.default, *args) for op, args in given)


@pytest.fixture(scope="module")
def interpreted():
    """What the interpreting child found, by name."""
    return interpreted_child(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("case", INTERPRETED, ids=lambda case: case.label)
def test_interpreted_kernels_meet_the_float64_reference(case, interpreted):
    found = interpreted[case.label]
    assert max(found.values()) <= case.tolerance(INTERPRETED_ROUNDING), found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", EXTREMES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_interpreted_kernels_have_the_infinities_of_the_reference(name, dtype, interpreted):
    assert interpreted[f"extremes {name} {dtype}"] is True


@pytest.mark.slow
def test_a_wrong_constant_is_caught(interpreted):
    assert min(interpreted[WRONG].values()) > Case(WRONG, 5, 64, F32).tolerance(INTERPRETED_ROUNDING)


@pytest.mark.slow
def test_operators_are_registered(interpreted):
    assert interpreted["operators"] is True


def test_fake_tensors_take_the_operators(monkeypatch):
    monkeypatch.setattr(module, "launch", lambda *args, **options: None)
    x, bias = torch.randn(2, 3, 8), torch.randn(8, dtype=torch.bfloat16)
    for given in (None, bias):
        assert kernel_checks.fake_agrees(torch.ops.autopart.activation.default, x, given, "gelu")
        assert kernel_checks.fake_agrees(torch.ops.autopart.activation_backward.default, x, x, given, "gelu")


MODELS = {name: ACT2FN[name] for name in ACTIVATIONS if name != "bloom_gelu"} | {"bloom_gelu": BloomGelu()}
ALIKE = {"gelu_accurate": "gelu_new", "gelu_python_tanh": "gelu_new", "swish": "silu"}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", [*MODELS, *ALIKE])
def test_reference_is_the_models_bit_for_bit_and_saves_as_much(name, dtype):
    model, ours = MODELS.get(name) or ACT2FN[name], ALIKE.get(name, name)
    x = torch.randn(33, 17).to(dtype).requires_grad_()
    y, expected = module.reference(x, ours), model(x)
    assert torch.equal(y, expected)
    (dx,), (expected_dx,) = (torch.autograd.grad(t, x, torch.ones_like(t)) for t in (y, expected))
    assert torch.equal(dx, expected_dx)
    assert saved_bytes(module.reference, x, ours) == saved_bytes(model, x)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_gradient_of_the_reference_is_its_derivative(name):
    x, bias = torch.randn(3, 4).double().requires_grad_(), torch.randn(4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, bias: module.bias_reference(x, bias, name), (x, bias))


FALLBACKS = {
    "float64": (torch.randn(2, 8).double(), None),
    "float64 bias": (torch.randn(2, 8), torch.randn(8).double()),
    "no rows": (torch.randn(0, 8), torch.randn(8)),
    "no dims": (torch.randn(()), None),
    "scalar bias": (torch.randn(2, 8), torch.randn(1)),
    "dims out of order": (torch.randn(2, 3, 8).transpose(0, 1), torch.randn(8)),
    "columns": (torch.randn(2, 8).t(), None),
}


def refuse(*args, **options):
    raise AssertionError("kernels used")


@pytest.mark.parametrize("name", [name for name, each in ACTIVATIONS.items() if each.operator])
def test_on_a_cpu_one_operator_stands_for_the_formula_and_keeps_its_input_alone(name):
    x = torch.linspace(-20, 20, 4001, dtype=torch.float64).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = activation(x, name)
    exact = module.reference(x, name)
    dy = torch.randn_like(y)
    gradients = [torch.autograd.grad(z, x, dy)[0] for z in (y, exact)]
    assert len(saved) == 1 and saved[0].data_ptr() == x.data_ptr()
    assert torch.allclose(y, exact, rtol=1e-10, atol=1e-10) and torch.allclose(*gradients, rtol=1e-10, atol=1e-10)


@pytest.fixture
def forced(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("AUTOPART_FORCE_TRITON", "1")
    monkeypatch.setattr(module, "launch", refuse)


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_the_kernels_cannot_take_goes_to_the_reference(name, forced):
    x, bias = FALLBACKS[name]
    if bias is None:
        assert torch.equal(activation(x, "gelu"), module.reference(x, "gelu"))
    else:
        assert torch.equal(bias_activation(x, bias, "gelu"), module.bias_reference(x, bias, "gelu"))


@pytest.mark.parametrize(
    "operands", [(torch.randn(2, 8),), (torch.randn(2, 8), torch.randn(8))], ids=["x", "x and bias"]
)
def test_the_environment_forces_the_kernels(operands, forced):
    with pytest.raises(AssertionError, match="kernels used"):
        KERNELS[len(operands) - 1].function(*operands, "gelu")


def test_records_say_bytes_kept_tensors_and_rules():
    x, bias = torch.empty(2, 3, 10, dtype=BF16, device="meta"), torch.empty(10, dtype=BF16, device="meta")
    plain, biased = KERNELS
    assert plain.bytes_moved(x, "gelu") == (2 * 2 * 60, 2 * 3 * 60)
    assert biased.bytes_moved(x, bias, "gelu") == (2 * (2 * 60 + 10), 2 * (3 * 60 + 2 * 10))
    assert plain.kept((x, "gelu"), (x,)) == (x,) and biased.kept((x, bias, "gelu"), (x,)) == (x, bias)
    assert [len(parse(kernel.rule).inputs) for kernel in KERNELS] == [1, 2]
    assert [kernel.name for kernel in KERNELS] == ["activation", "bias_activation"]


AHEAD = [(kernel, model) for kernel in KERNELS for model in kernel.shapes]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("kernel", "model"), AHEAD, ids=[f"{kernel.name} {model}" for kernel, model in AHEAD])
def test_kernels_compile_ahead_without_spills(kernel, model, capability):
    pytest.importorskip("triton")
    for usage in kernel.ahead(capability, **kernel.shapes[model]).values():
        assert usage.spills == 0 and 0 < usage.registers < 128, usage


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu", "relu2"])
@pytest.mark.parametrize("d", [1, 100])
def test_kernels_of_other_sizes_compile_ahead_without_spills(name, d, dtype):
    pytest.importorskip("triton")
    usage = module.compile_ahead(90, d, dtype, name)
    assert all(kernel.spills == 0 for kernel in usage.values()), usage


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", [*CASES, *ALL, Case("gelu_new", 3000, 6400, BF16)], ids=lambda case: case.label)
def test_device_kernels_meet_the_float64_reference(case):
    found = errors(case, "cuda")
    assert max(found.values()) <= case.tolerance(ROUNDING), found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", EXTREMES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_device_kernels_have_the_infinities_of_the_reference(name, dtype):
    assert extremes(name, dtype, "cuda")


if __name__ == "__main__":
    results: dict[str, object] = {case.label: errors(case, "cpu") for case in INTERPRETED}
    results |= {f"extremes {n} {dtype}": extremes(n, dtype, "cpu") for n in ACTIVATIONS for dtype in EXTREMES}
    right = ACTIVATIONS["gelu_new"]
    ACTIVATIONS[WRONG] = Activation(right.function, right.kind, right.a, right.b * 1.01)
    results |= {WRONG: errors(Case(WRONG, 5, 64, F32), "cpu"), "operators": operators()}
    print(json.dumps(results))
