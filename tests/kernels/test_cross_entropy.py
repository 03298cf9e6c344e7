"""Cross-entropy by its kernels and in plain PyTorch, of a whole vocabulary and of one that is split over ranks.

Every interpreted case is taken by one child process: this file, run as a script.
"""

import json
import os
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import functional as F

from autopart.kernels import cross_entropy, cross_entropy_rows
from autopart.kernels.cross_entropy import vocab_cross_entropy
from autopart.runtime.functions import mean_cross_entropy
from autopart.sharding.notation import parse
from tests.support.interpreted import interpreted as interpreted_child
from tests.support.replayed import replayed

GRADIENT_ROUNDING = {torch.float32: 5e-7, torch.float16: 2**-11, torch.bfloat16: 2**-8}
INTERPRETED_ROUNDING = GRADIENT_ROUNDING | {torch.bfloat16: 2**-7}  # the interpreter truncates where a GPU rounds
VALID = 7.0
TERMS: dict[str, dict[str, float]] = {
    "plain": {},
    "smooth": {"label_smoothing": 0.1},
    "z": {"z_loss": 1e-2},
    "cap": {"softcap": 3.0},
    "scale": {"scale": 0.0625},
    "divisor": {"divisor": 3.0},
    "all": {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 2.0, "scale": 1.5, "divisor": 0.7},
}


class Case(NamedTuple):
    """One comparison with float64: logits (n, v) of ``layout``, drawn at ``scale``, with the constants ``terms``."""

    v: int
    n: int
    dtype: torch.dtype
    terms: str = "plain"
    layout: str = "plain"
    scale: float = 3.0
    targets: torch.dtype = torch.int64
    kernel_terms: str = ""

    @property
    def name(self) -> str:
        return "-".join(str(field).removeprefix("torch.") for field in self)


CASES = [Case(v, n, dtype) for dtype in GRADIENT_ROUNDING for v in (1, 7, 64, 257) for n in (1, 5)]
CASES += [Case(100, 3, dtype, terms) for dtype in GRADIENT_ROUNDING for terms in TERMS]
CASES += [
    Case(100, 3, dtype, "all", layout) for dtype in GRADIENT_ROUNDING for layout in ("sliced", "strided", "turned")
]
CASES += [Case(100, 3, torch.float32, "smooth", scale=scale) for scale in (1e4, 1e-6, 0.0)]
CASES += [Case(100, 3, torch.float32, targets=torch.int32)]
FEW = [case for case in CASES if case.dtype == torch.bfloat16 or case.terms == "all" or case.scale != 3]
INTERPRETED = CASES if "AUTOPART_EXAMPLES" in os.environ else FEW
"""Cases that are interpreted."""
WRONG = [
    Case(100, 3, torch.float32, "smooth", kernel_terms="plain"),
    Case(100, 3, torch.float32, "plain", kernel_terms="z"),
    Case(100, 3, torch.float32, "plain", kernel_terms="cap"),
    Case(100, 3, torch.float32, "plain", kernel_terms="divisor"),
]
SPLIT = [
    (ranks, dtype, terms) for ranks in (1, 3) for dtype in (torch.float32, torch.bfloat16) for terms in ("plain", "all")
]
EXTREMES = {
    "some -inf": [1.0, -torch.inf, 2.0, -torch.inf],
    "all -inf": [-torch.inf] * 4,
    "target -inf": [-torch.inf, 1.0, 2.0, 3.0],
    "inf": [1.0, torch.inf, 2.0, 3.0],
    "nan": [1.0, torch.nan, 2.0, 3.0],
    "large": [1e38, -5e37, 2e37, 0.0],
    "subnormal": [1e-45, -1e-45, 0.0, 2e-40],
    "far apart": [0.0, 200.0, -1e30, 88.0],
}


def draw(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, v) and targets (n,), of which the second counts for nothing where there are several."""
    torch.manual_seed(0)
    shape = {"sliced": (case.n, case.v + 5), "strided": (case.n, 2 * case.v), "turned": (case.v, case.n)}
    x = (torch.randn(shape.get(case.layout, (case.n, case.v))) * case.scale).to(device, case.dtype)
    views = {"plain": x, "sliced": x[:, : case.v], "strided": x[:, ::2], "turned": x.t()}
    targets = torch.randint(0, case.v, (case.n,))
    targets[1:2] = -100
    return views[case.layout], targets.to(device, case.targets)


def errors(case: Case, device: str) -> dict[str, float]:
    """Errors of the loss and of the gradient of the logits, over the largest size of the terms that each sums."""
    logits, targets = draw(case, device)
    logits.requires_grad_()
    terms = TERMS[case.kernel_terms or case.terms]
    loss = cross_entropy.cross_entropy(logits, targets, VALID, compute_dtype=torch.float32, **terms)
    assert loss.dtype == torch.float32 and loss.shape == (), loss
    assert "autopart_cross_entropy" in loss.grad_fn.next_functions[0][0].name(), "the reference ran, not the kernels"
    (dlogits,) = torch.autograd.grad(loss * 3, logits)
    assert dlogits.dtype == logits.dtype
    return compared(case.terms, logits, targets, loss, dlogits)


def compared(
    terms: str, logits: torch.Tensor, targets: torch.Tensor, loss: torch.Tensor, dlogits: torch.Tensor
) -> dict[str, float]:
    """Errors of a loss and of three times its gradient."""
    exact = logits.detach().double().requires_grad_()
    wanted = cross_entropy.reference(exact, targets.long(), VALID, **TERMS[terms])
    (gradient,) = torch.autograd.grad(wanted * 3, exact)
    size = max(wanted.abs().item(), exact.abs().max().item() * len(logits) / VALID, 1e-3)
    largest = gradient.abs().max().item() or 1.0
    return {
        "loss": (loss - wanted).abs().item() / size,
        "gradient": (dlogits - gradient).abs().max().item() / largest,
    }


def split_errors(ranks: int, dtype: torch.dtype, terms: str, device: str) -> dict[str, float]:
    """Errors of the vocabulary split over ranks; every rank must have the same loss."""
    logits, targets = draw(Case(60, 5, dtype), device)
    parts = [part.detach().requires_grad_() for part in logits.chunk(ranks, dim=1)]

    def run(rank: int, reduce_max: Any, reduce_sum: Any) -> torch.Tensor:
        place = {"first": rank * 60 // ranks, "classes": 60, "reduce_max": reduce_max, "reduce_sum": reduce_sum}
        high = torch.promote_types(dtype, torch.float32)
        return vocab_cross_entropy(parts[rank], targets, VALID, compute_dtype=high, **TERMS[terms], **place)

    found = replayed(run, ranks, 2)
    assert len({loss.item() for loss in found}) == 1
    gradients = [torch.autograd.grad(loss * 3, part)[0] for loss, part in zip(found, parts, strict=True)]
    return compared(terms, logits, targets, found[0], torch.cat(gradients, 1))


def extreme(name: str, smoothing: float, device: str) -> dict[str, Any]:
    """Loss and gradient of a row of extreme logits, as text, by the kernels and by the reference in float32."""
    found = {}
    for key, function in {"kernel": cross_entropy.cross_entropy, "reference": cross_entropy.reference}.items():
        logits = torch.tensor([EXTREMES[name]], device=device, requires_grad=True)
        loss = function(logits, torch.tensor([0], device=device), 1.0, -100, smoothing)
        (gradient,) = torch.autograd.grad(loss, logits)
        found[key] = [*loss.view(1).tolist(), *gradient[0].tolist()]
    return found


def ignored_and_outside(device: str) -> dict[str, Any]:
    """Rows that do not count, whatever their logits, and a target that is no column."""
    logits = torch.full((2, 4), torch.nan, device=device, requires_grad=True)
    loss = cross_entropy.cross_entropy(logits, torch.tensor([3, 3], device=device), 1.0, 3, 0.1, z_loss=0.1)
    (gradient,) = torch.autograd.grad(loss, logits)
    outside = [
        cross_entropy.cross_entropy(torch.zeros(1, 4, device=device), torch.tensor([t], device=device), 1.0).item()
        for t in (4, -1)
    ]
    return {"loss": loss.item(), "gradient": gradient.abs().max().item(), "outside": outside}


def operators(logits: torch.Tensor) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The operators that are registered, each with arguments."""
    n = len(logits)
    targets = torch.tensor([1, -100, 4], device=logits.device)
    terms = cross_entropy_rows.terms_of(logits, -100, 0.1, 0.1, 2.0, 1.0, 1.0)
    lse, one = torch.zeros(n, device=logits.device), torch.ones((), device=logits.device)
    ops = torch.ops.autopart
    return {
        "forward": (ops.cross_entropy.default, (logits.requires_grad_(), targets, terms)),
        "statistics": (ops.cross_entropy_statistics.default, (logits.detach(), targets, terms)),
        "backward": (ops.cross_entropy_backward.default, (logits.detach(), targets, lse, one, terms)),
        "in place": (ops.cross_entropy_backward_.default, (logits.detach().clone(), targets, lse, terms)),
    }


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What the interpreting child found, by name of the case."""
    return interpreted_child(__file__)


def meets(found: dict[str, float], dtype: torch.dtype, rounding: dict[torch.dtype, float]) -> bool:
    """Whether errors are those of float32, and of one rounding of the gradient."""
    return found["loss"] <= 1e-6 and found["gradient"] <= 2e-6 + 1.01 * rounding.get(dtype, 0)


@pytest.mark.slow
@pytest.mark.parametrize("case", INTERPRETED, ids=lambda case: case.name)
def test_interpreted_kernels_meet_the_float64_reference(case, interpreted):
    assert meets(interpreted[case.name], case.dtype, INTERPRETED_ROUNDING), interpreted[case.name]


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.name)
def test_a_wrong_constant_is_caught(case, interpreted):
    found = interpreted[case.name]
    assert min(found.values()) > 1e-4, found


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "dtype", "terms"), SPLIT)
def test_interpreted_kernels_over_ranks(ranks, dtype, terms, interpreted):
    found = interpreted[f"split {ranks} {dtype} {terms}"]
    assert meets(found, dtype, INTERPRETED_ROUNDING), found


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_logits_give_the_infs_and_nans_of_the_reference(name, smoothing, interpreted):
    found = interpreted[f"extreme {name} {smoothing}"]
    assert found["kernel"] == pytest.approx(found["reference"], rel=1e-5, abs=1e-6, nan_ok=True), found


@pytest.mark.slow
def test_ignored_rows_are_not_read_and_a_wrong_target_gives_nan(interpreted):
    found = interpreted["ignored"]
    assert found["loss"] == found["gradient"] == 0
    assert all(loss != loss for loss in found["outside"]), found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward", "statistics", "backward", "in place"])
def test_operators_are_registered_rightly(name, interpreted):
    assert interpreted[f"operator {name}"] == "SUCCESS"


@pytest.mark.parametrize("name", ["forward", "statistics", "backward", "in place"])
def test_operators_take_fake_tensors(name):
    pytest.importorskip("triton")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        logits = torch.empty(3, 10, dtype=torch.bfloat16)
        operator, arguments = operators(logits)[name]
        found = operator(*arguments)
        if name == "forward":
            assert [(t.shape, t.dtype) for t in found] == [((), torch.float32), ((3,), torch.float32)]
            (found,) = torch.autograd.grad(found[0], logits)
    wanted = {"statistics": ((4, 3), torch.float32), "in place": None}.get(name, ((3, 10), torch.bfloat16))
    assert (None if found is None else (tuple(found.shape), found.dtype)) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_reference_is_the_sum_that_a_stage_computes_today(dtype, smoothing):
    logits, targets = draw(Case(50, 6, dtype), "cpu")
    loss = cross_entropy.cross_entropy(logits, targets, VALID, -100, smoothing)
    assert torch.equal(loss, mean_cross_entropy(logits, targets, VALID, -100, smoothing))


WRITTEN = {
    "Llama": ({}, lambda logits: logits),
    "Gemma2": ({"softcap": 30.0}, lambda logits: torch.tanh(logits / 30.0) * 30.0),
    "Cohere": ({"scale": 0.0625}, lambda logits: logits * 0.0625),
    "Granite": ({"divisor": 3.0}, lambda logits: logits / 3.0),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_reference_is_the_model_s_code_bit_for_bit(name):
    constants, written = WRITTEN[name]
    logits, targets = draw(Case(50, 6, torch.bfloat16), "cpu")
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    wanted = F.cross_entropy(written(leaves[0]).float(), targets, ignore_index=-100, reduction="sum") / VALID
    loss = cross_entropy.cross_entropy(leaves[1], targets, VALID, compute_dtype=torch.float32, **constants)
    assert torch.equal(loss, wanted)
    assert torch.equal(*(torch.autograd.grad(y, x)[0] for y, x in zip((wanted, loss), leaves, strict=True)))


@pytest.mark.parametrize(("ranks", "dtype", "terms"), [*SPLIT, *((3, torch.float64, name) for name in TERMS)])
def test_the_vocabulary_over_ranks_in_plain_torch(ranks, dtype, terms):
    found = split_errors(ranks, dtype, terms, "cpu")
    assert meets(found, dtype, GRADIENT_ROUNDING), found
    assert dtype != torch.float64 or max(found.values()) < 1e-14


@pytest.mark.parametrize("terms", TERMS)
def test_gradients_of_plain_torch_are_those_of_finite_differences(terms):
    logits, targets = draw(Case(9, 4, torch.float32), "cpu")
    x = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: vocab_cross_entropy(x, targets, VALID, **TERMS[terms]), x)


def test_the_result_has_the_dtype_of_the_logits_unless_another_is_given():
    logits, targets = draw(Case(9, 4, torch.bfloat16), "cpu")
    for function in (cross_entropy.cross_entropy, vocab_cross_entropy):
        assert function(logits, targets, VALID).dtype == torch.bfloat16
        assert function(logits, targets, VALID, compute_dtype=torch.float32).dtype == torch.float32


FALLBACKS: dict[str, tuple[torch.Tensor, torch.Tensor, torch.dtype | None]] = {
    "float64": (torch.randn(3, 8).double(), torch.tensor([1, 2, 3]), None),
    "float64 inside": (torch.randn(3, 8), torch.tensor([1, 2, 3]), torch.float64),
    "images": (torch.randn(3, 8, 2), torch.ones(3, 2, dtype=torch.int64), None),
    "probabilities": (torch.randn(3, 8), torch.rand(3, 8), None),
    "no rows": (torch.randn(0, 8), torch.ones(0, dtype=torch.int64), None),
}


def refuse(*args, **options):
    raise AssertionError("kernels used")


@pytest.fixture
def forced(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("AUTOPART_FORCE_TRITON", "1")
    monkeypatch.setattr(cross_entropy_rows, "launch", refuse)


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_the_kernels_cannot_take_goes_to_the_reference(name, forced):
    logits, targets, compute_dtype = FALLBACKS[name]
    wanted = cross_entropy.reference(logits, targets, VALID, compute_dtype=compute_dtype)
    assert torch.equal(cross_entropy.cross_entropy(logits, targets, VALID, compute_dtype=compute_dtype), wanted)


def test_the_environment_forces_the_kernels(forced):
    for function in (cross_entropy.cross_entropy, vocab_cross_entropy):
        with pytest.raises(AssertionError, match="kernels used"):
            function(torch.randn(2, 8), torch.tensor([1, 2]), VALID)


def test_no_rows_of_a_split_vocabulary_have_no_loss():
    logits = torch.randn(0, 8, requires_grad=True)
    loss = vocab_cross_entropy(logits, torch.ones(0, dtype=torch.int64), VALID)
    assert loss == 0 and torch.autograd.grad(loss, logits)[0].shape == (0, 8)


def test_bytes_moved_counts_logits_targets_and_statistics():
    logits, targets = torch.empty(3, 10, dtype=torch.bfloat16, device="meta"), torch.empty(3, dtype=torch.int64)
    forward, backward = cross_entropy.bytes_moved(logits, targets, VALID)
    assert (forward, backward) == (2 * 30 + 8 * 3 + 16 * 3, 4 * 30 + 8 * 3 + 4 * 3)
    assert [tuple(t.shape) for t in cross_entropy.kept((logits, targets, VALID), ())] == [(3, 10), (3,), (3,)]


def test_only_the_function_over_ranks_splits_the_vocabulary():
    whole, over_ranks = (parse(kernel.rule).inputs[0][1].factors[0] for kernel in cross_entropy.KERNELS)
    assert whole.fixed and not over_ranks.fixed


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("model", cross_entropy.SHAPES)
def test_kernels_compile_ahead_without_spills(model, capability):
    pytest.importorskip("triton")
    usage = cross_entropy.compile_ahead(capability, **cross_entropy.SHAPES[model])
    assert set(usage) == {"statistics", "gradient"}
    assert all(kernel.spills == 0 and 0 < kernel.registers < 128 for kernel in usage.values()), usage


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("v", [1, 1000, 50257, 128256])
def test_every_term_compiles_ahead_without_spills(v, capability):
    pytest.importorskip("triton")
    usage = cross_entropy.compile_ahead(capability, v, torch.float32, softcap=True, smoothing=True)
    spills = 0 if v % 16 == 0 else 16  # bytes a thread, where lengths are not known to be aligned
    assert all(kernel.spills <= spills for kernel in usage.values()), usage


WIDE = [Case(v, 70, torch.bfloat16, terms) for v in (32000, 50257, 128256) for terms in ("plain", "all")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES + WIDE, ids=lambda case: case.name)
def test_device_kernels_meet_the_float64_reference(case):
    found = errors(case, "cuda")
    assert meets(found, case.dtype, GRADIENT_ROUNDING), found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("ranks", "dtype", "terms"), SPLIT)
def test_device_kernels_over_ranks(ranks, dtype, terms):
    found = split_errors(ranks, dtype, terms, "cuda")
    assert meets(found, dtype, GRADIENT_ROUNDING), found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_logits_on_a_device(name, smoothing):
    found = extreme(name, smoothing, "cuda")
    assert found["kernel"] == pytest.approx(found["reference"], rel=1e-5, abs=1e-6, nan_ok=True), found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["forward", "statistics", "backward", "in place"])
def test_operators_on_a_device(name):
    torch.library.opcheck(*operators(torch.randn(3, 10, device="cuda"))[name])


if __name__ == "__main__":
    cross_entropy_rows.BLOCK = 64  # rows of several blocks
    found: dict[str, Any] = {case.name: errors(case, "cpu") for case in INTERPRETED + WRONG}
    found |= {
        f"split {ranks} {dtype} {terms}": split_errors(ranks, dtype, terms, "cpu") for ranks, dtype, terms in SPLIT
    }
    found |= {f"extreme {name} {s}": extreme(name, s, "cpu") for name in EXTREMES for s in (0.0, 0.1)}
    found["ignored"] = ignored_and_outside("cpu")
    for name, (operator, arguments) in operators(torch.randn(3, 10)).items():
        checks = torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_autograd_registration"))
        found[f"operator {name}"] = " ".join(sorted(set(checks.values())))
    print(json.dumps(found))
