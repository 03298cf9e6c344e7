"""Gated linear units against their references; one interpreting child takes the Triton cases."""

import json
import math
import os
from typing import NamedTuple

import pytest
import torch
from transformers.activations import ACT2FN

from autopart.kernels import gated as module
from autopart.kernels.activation import ACTIVATIONS, Activation
from autopart.kernels.gated import KERNELS, gated_halves, geglu, reglu, swiglu
from autopart.sharding.notation import parse
from tests.support import kernel_checks
from tests.support.interpreted import interpreted as interpreted_child
from tests.support.kernel_checks import (
    INTERPRETED_ROUNDING,
    ROUNDING,
    both,
    laid_out,
    same_infinities,
    saved_bytes,
    worst,
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Case(NamedTuple):
    """One comparison with the float64 reference: gate and up (2, rows, d), each of a layout; or the halves of x
    (2, rows, 2 d), where ``up`` says which half is the gate."""

    name: str
    rows: int
    d: int
    dtype: torch.dtype
    gate: str = "plain"
    up: str = "plain"
    up_dtype: torch.dtype | None = None

    @property
    def label(self) -> str:
        return "-".join(str(field).removeprefix("torch.") for field in self)

    def tolerance(self, rounding: dict[torch.dtype, float]) -> float:
        """Some operations in float32, and a rounding to the coarser dtype of the case."""
        return 1e-6 + 1.1 * max(rounding[self.dtype], rounding[self.up_dtype or self.dtype])


HALVES = ("first", "second")
CASES = [Case("silu", rows, d, F32) for rows, d in ((1, 1), (3, 70), (99, 20), (5, 700))]
CASES += [Case(name, 2, 5, F32) for name in ACTIVATIONS]
CASES += [Case(name, 2, 70, dtype) for name in ("silu", "relu") for dtype in (F16, BF16)]
CASES += [Case("silu", 3, 7, F32, gate, "plain") for gate in ("sliced", "strided", "expanded")]
CASES += [Case("silu", 3, 7, F32, "plain", "sliced"), Case("gelu_new", 3, 8, BF16, up_dtype=F32)]
CASES += [Case("silu", 3, 7, F32, "halves of " + layout, half) for layout in ("plain", "sliced") for half in HALVES]
CASES += [Case("silu", 2, 600, BF16, "halves of plain"), Case("gelu", 1, 1, F32, "halves of strided")]
ALL = [
    Case(name, 7, 70, dtype, gate)
    for name in ACTIVATIONS
    for dtype in ROUNDING
    for gate in ("plain", "halves of plain")
]
INTERPRETED = CASES + ALL if "AUTOPART_EXAMPLES" in os.environ else CASES
EXTREMES = [math.inf, -math.inf, math.nan, 0.0, 1e-40, -1e-40, 1e30, -1e30, 88.0, -88.0, 20.0, -1.0]
ONE_OPERATOR = ("silu", "relu", "gelu_pytorch_tanh")
"""Activations that are one operator. Several operators may take an infinite gradient to NaN, as inf - inf."""
WRONG = "wrong constant"


def call(case: Case, operands: list[torch.Tensor], reference: bool) -> torch.Tensor:
    """The kernel or its reference, in the words of its own function where it has one."""
    if len(operands) == 1:
        return both(KERNELS[3])[int(reference)](*operands, case.name, case.up != "second")
    own = {"silu": KERNELS[0], "relu": KERNELS[2]}
    return (
        both(own[case.name])[int(reference)](*operands)
        if case.name in own
        else both(KERNELS[1])[int(reference)](*operands, case.name)
    )


def errors(case: Case, device: str) -> dict[str, float]:
    """Largest errors of y and of the gradients, each over its largest size."""
    torch.manual_seed(0)
    of_halves = case.gate.startswith("halves of ")
    sizes = (2, case.rows, case.d * (2 if of_halves else 1))
    operands = [laid_out(sizes, case.dtype, device, case.gate.removeprefix("halves of ")).requires_grad_()]
    if not of_halves:
        operands.append(laid_out(sizes, case.up_dtype or case.dtype, device, case.up).requires_grad_())
    y = call(case, operands, False)
    assert y.grad_fn is not None and "autopart_gated" in y.grad_fn.name(), "the reference ran, not the kernels"
    assert y.dtype == call(case, operands, True).dtype and y.shape == (2, case.rows, case.d)
    dy = torch.randn(2, case.rows, case.d + 1).to(y)[..., 1:]
    gradients = torch.autograd.grad(y, operands, dy)
    assert [g.dtype for g in gradients] == [t.dtype for t in operands]

    exact = [t.detach().double().requires_grad_() for t in operands]
    exact_y = call(case, exact, True)
    exact_gradients = torch.autograd.grad(exact_y, exact, dy.double())
    found = [worst(got, want) for got, want in zip((y, *gradients), (exact_y, *exact_gradients), strict=True)]
    return dict(zip(("y", "dgate", "dup"), found, strict=False))


def extremes(name: str, device: str) -> bool:
    """Whether y, dgate and dup have the infinities and NaNs of the reference, over all pairs of extreme values."""
    gate, up = torch.tensor(EXTREMES, device=device).tile(len(EXTREMES), 1), torch.tensor(EXTREMES, device=device)
    operands = [gate.contiguous().requires_grad_(), up[:, None].expand_as(gate).contiguous().requires_grad_()]
    found = []
    for function in (geglu, module.reference):
        y = function(*operands, name)
        found.append((y, *torch.autograd.grad(y, operands, torch.ones_like(y))))
    return all(same_infinities(got, want, 1e-5) for got, want in zip(*found, strict=True))


def operators() -> bool:
    """Whether the operators are registered as they should be."""
    x, up = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    ops = torch.ops.autopart
    given = [(ops.gated, (x, up, "silu")), (ops.gated_backward, (x.detach(), x.detach(), up.detach(), "silu"))]
    given += [(ops.gated_halves, (x, "gelu", False))]
    given += [(ops.gated_halves_backward, (x[:, :4].detach(), x.detach(), "gelu", True))]
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
@pytest.mark.parametrize("name", ONE_OPERATOR)
def test_interpreted_kernels_have_the_infinities_of_the_reference(name, interpreted):
    assert interpreted[f"extremes {name}"] is True


@pytest.mark.slow
def test_a_wrong_constant_is_caught(interpreted):
    assert min(interpreted[WRONG].values()) > Case(WRONG, 5, 64, F32).tolerance(INTERPRETED_ROUNDING)


@pytest.mark.slow
def test_operators_are_registered(interpreted):
    assert interpreted["operators"] is True


def test_fake_tensors_take_the_operators(monkeypatch):
    monkeypatch.setattr(module, "launch", lambda *args, **options: None)
    ops, x, up = torch.ops.autopart, torch.randn(2, 3, 8), torch.randn(2, 3, 8).bfloat16()
    assert kernel_checks.fake_agrees(ops.gated.default, x, up, "gelu")
    assert kernel_checks.fake_agrees(ops.gated_backward.default, x, x, up, "gelu")
    assert kernel_checks.fake_agrees(ops.gated_halves.default, up, "gelu", True)
    assert kernel_checks.fake_agrees(ops.gated_halves_backward.default, up[..., 4:], up, "gelu", False)


def llama(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


def gemma(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def phi3(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return up * torch.nn.functional.silu(gate)


def cohere_vision(x: torch.Tensor) -> torch.Tensor:
    up, gate = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


MODELS = {
    "Llama": (llama, lambda g, u: module.swiglu_reference(g, u)),
    "T5": (lambda g, u: ACT2FN["gelu_new"](g) * u, lambda g, u: module.reference(g, u, "gelu_new")),
    "Gemma": (gemma, lambda g, u: module.reference(g, u, "gelu_pytorch_tanh")),
    "ReGLU": (lambda g, u: torch.relu(g) * u, lambda g, u: module.reglu_reference(g, u)),
    "Phi-3": (phi3, lambda x: module.halves_reference(x)),
    "Cohere's vision": (cohere_vision, lambda x: module.halves_reference(x, "silu", False)),
}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_reference_is_the_models_bit_for_bit_and_saves_as_much(name, dtype):
    model, ours = MODELS[name]
    operands = [
        torch.randn(33, 18).to(dtype).requires_grad_() for _ in range(1 if name in ("Phi-3", "Cohere's vision") else 2)
    ]
    found, expected = ours(*operands), model(*operands)
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(y, operands, torch.ones_like(y)) for y in (found, expected)]
    assert all(torch.equal(got, want) for got, want in zip(*gradients, strict=True))
    assert saved_bytes(ours, *operands) == saved_bytes(model, *operands)


FALLBACKS = {
    "float64": (torch.randn(2, 8).double(), torch.randn(2, 8).double()),
    "float64 up": (torch.randn(2, 8), torch.randn(2, 8).double()),
    "no rows": (torch.randn(0, 8), torch.randn(0, 8)),
    "no dims": (torch.randn(()), torch.randn(())),
    "broadcast": (torch.randn(2, 8), torch.randn(8)),
    "dims out of order": (torch.randn(2, 3, 8).transpose(0, 1), torch.randn(3, 2, 8)),
    "columns": (torch.randn(2, 8), torch.randn(8, 2).t()),
}


def refuse(*args, **options):
    raise AssertionError("kernels used")


@pytest.fixture
def forced(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("AUTOPART_FORCE_TRITON", "1")
    monkeypatch.setattr(module, "launch", refuse)


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_the_kernels_cannot_take_goes_to_the_reference(name, forced):
    gate, up = FALLBACKS[name]
    assert torch.equal(swiglu(gate, up), module.swiglu_reference(gate, up))


FALLING_HALVES = {"float64": torch.randn(2, 8).double(), "empty": torch.randn(0, 8), "strided": torch.randn(8, 2).t()}


@pytest.mark.parametrize("x", FALLING_HALVES.values(), ids=FALLING_HALVES)
def test_halves_that_the_kernels_cannot_take_go_to_the_reference(x, forced):
    assert torch.equal(gated_halves(x, "gelu"), module.halves_reference(x, "gelu"))


def test_the_environment_forces_the_kernels(forced):
    x = torch.randn(2, 8)
    for call in (lambda: swiglu(x, x), lambda: geglu(x, x), lambda: reglu(x, x), lambda: gated_halves(x)):
        with pytest.raises(AssertionError, match="kernels used"):
            call()


def test_records_say_bytes_kept_tensors_and_rules():
    x = torch.empty(2, 3, 10, dtype=BF16, device="meta")
    *pairs, halves = KERNELS
    assert [kernel.name for kernel in KERNELS] == ["swiglu", "geglu", "reglu", "gated_halves"]
    assert all(kernel.bytes_moved(x, x) == (2 * 3 * 60, 2 * 5 * 60) for kernel in pairs)
    assert halves.bytes_moved(x, "silu", True) == (2 * 3 * 30, 2 * 5 * 30)
    assert all(kernel.kept((x, x), (x,)) == (x, x) for kernel in pairs) and halves.kept((x, "silu"), (x,)) == (x,)
    assert [len(parse(kernel.rule).inputs) for kernel in KERNELS] == [2, 2, 2, 1]


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
@pytest.mark.parametrize("d", [1, 100])
def test_kernels_of_other_sizes_compile_ahead_without_spills(d, dtype):
    pytest.importorskip("triton")
    usage = module.compile_ahead(90, d, dtype, "gelu")
    assert all(kernel.spills == 0 for kernel in usage.values()), usage


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", [*CASES, *ALL, Case("silu", 3000, 14336, BF16)], ids=lambda case: case.label)
def test_device_kernels_meet_the_float64_reference(case):
    found = errors(case, "cuda")
    assert max(found.values()) <= case.tolerance(ROUNDING), found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ONE_OPERATOR)
def test_device_kernels_have_the_infinities_of_the_reference(name):
    assert extremes(name, "cuda")


if __name__ == "__main__":
    results: dict[str, object] = {case.label: errors(case, "cpu") for case in INTERPRETED}
    results |= {f"extremes {name}": extremes(name, "cpu") for name in ONE_OPERATOR}
    right = ACTIVATIONS["gelu_new"]
    ACTIVATIONS[WRONG] = Activation(right.function, right.kind, right.a, right.b * 1.01)
    results |= {WRONG: errors(Case(WRONG, 5, 64, F32), "cpu"), "operators": operators()}
    print(json.dumps(results))
