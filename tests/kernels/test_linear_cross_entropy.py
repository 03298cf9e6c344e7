"""The last linear map with its cross-entropy, in chunks, against the whole logits in float64.

Every interpreted case is taken by one child process: this file, run as a script.
"""

import json
import os
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from autopart.kernels import cross_entropy_rows, linear_cross_entropy
from autopart.sharding.notation import parse
from tests.support.allocations import Allocations
from tests.support.interpreted import interpreted as interpreted_child
from tests.support.replayed import replayed

ROUNDING = {torch.float64: 1e-15, torch.float32: 3e-7, torch.float16: 2**-11, torch.bfloat16: 2**-8}
INTERPRETED_ROUNDING = ROUNDING | {torch.bfloat16: 2**-7}  # the interpreter truncates where a GPU rounds
VALID = 7.0
TERMS: dict[str, dict[str, float]] = {
    "plain": {},
    "all": {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 2.0, "scale": 1.5, "divisor": 0.7},
}


class Case(NamedTuple):
    """One comparison with float64: hidden (n, d), weight (v, d), in chunks of `rows`, over `ranks`."""

    n: int
    v: int
    d: int
    dtype: torch.dtype
    terms: str = "plain"
    bias: bool = False
    ranks: int = 1
    rows: int = 2
    layout: str = "plain"
    kernel_terms: str = ""

    @property
    def name(self) -> str:
        return "-".join(str(field).removeprefix("torch.") for field in self)


CASES = [
    Case(5, 100, 16, dtype, terms, bias, ranks)
    for dtype in ROUNDING
    for terms, bias in (("plain", False), ("all", True))
    for ranks in (1, 2)
]
CASES += [Case(n, v, 3, dtype) for dtype in ROUNDING for n, v in ((1, 1), (4, 2), (3, 70))]
CASES += [Case(5, 70, 8, torch.float32, "all", rows=rows) for rows in (1, 4, 64)]
CASES += [Case(5, 70, 8, torch.bfloat16, "all", True, layout="turned")]
FEW = [case for case in CASES if case.dtype in (torch.float32, torch.bfloat16) and case.n > 3]
INTERPRETED = [c for c in CASES if c.dtype != torch.float64] if "AUTOPART_EXAMPLES" in os.environ else FEW
"""Cases that are interpreted."""
WRONG = [Case(5, 70, 8, torch.float32, "plain", kernel_terms="all")]


def draw(case: Case, device: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden (n, d), weight (v, d) and perhaps a bias (v,), and targets (n,), of which the second counts for nothing
    where there are several."""
    torch.manual_seed(0)
    sizes = [(case.n, case.d), (case.v, case.d), *([(case.v,)] if case.bias else ())]
    tensors = [torch.randn(size).to(device, case.dtype) for size in sizes]
    if case.layout == "turned":
        tensors = [t.t().contiguous().t() for t in tensors]
    targets = torch.randint(0, case.v, (case.n,))
    targets[1:2] = -100
    return tensors, targets.to(device)


def errors(case: Case, device: str) -> dict[str, float]:
    """Errors of the loss and of the gradients of hidden, weight and bias, over the largest size of the sums of the
    sizes of the terms that each sums."""
    tensors, targets = draw(case, device)
    hidden = [tensors[0].detach().requires_grad_() for _ in range(case.ranks)]
    parts = [[p.detach().requires_grad_() for p in t.chunk(case.ranks)] for t in tensors[1:]]
    high = torch.promote_types(case.dtype, torch.float32)
    count = case.v // case.ranks

    def run(rank: int, reduce_max: Any, reduce_sum: Any) -> torch.Tensor:
        place = {"first": rank * count, "classes": case.v, "reduce_max": reduce_max, "reduce_sum": reduce_sum}
        terms = TERMS[case.kernel_terms or case.terms] | {"compute_dtype": high}
        weight, bias = (part[rank] for part in ([*parts, [None] * case.ranks][:2]))
        return linear_cross_entropy.linear_cross_entropy(
            hidden[rank], weight, targets, bias, VALID, **terms, **(place if case.ranks > 1 else {})
        )

    found = replayed(run, case.ranks, 2 * -(-case.n // case.rows) if case.ranks > 1 else 0)
    assert len({loss.item() for loss in found}) == 1 and found[0].dtype == high
    for loss in found:
        (loss * 3).backward()
    gradients = [torch.stack([h.grad for h in hidden]).double().sum(0)]
    gradients += [torch.cat([p.grad for p in part]) for part in parts]
    return compared(case, tensors, targets, found[0], gradients)


def compared(
    case: Case, tensors: list[torch.Tensor], targets: torch.Tensor, loss: torch.Tensor, gradients: list[torch.Tensor]
) -> dict[str, float]:
    """Errors of a loss and of three times its gradients."""
    exact = [t.detach().double().requires_grad_() for t in tensors]
    logits = F.linear(*exact)
    constants = TERMS[case.terms]
    wanted = linear_cross_entropy.reference(
        exact[0], exact[1], targets, exact[2] if case.bias else None, VALID, **constants
    )
    dlogits, *exact_gradients = torch.autograd.grad(
        linear_cross_entropy.cross_entropy.reference(logits, targets, VALID, **constants) * 3, (logits, *exact)
    )
    h, w, d = exact[0].abs(), exact[1].abs(), dlogits.abs()
    terms = (d @ w, d.t() @ h, d.sum(0))
    found = {"loss": (loss - wanted).abs().item() / max(wanted.abs().item(), 1e-3)}
    for name, got, want, term in zip(("hidden", "weight", "bias"), gradients, exact_gradients, terms, strict=False):
        found[name] = ((got - want).abs().max() / term.abs().max().clamp(min=1e-30)).item()
    return found


def meets(case: Case, found: dict[str, float], rounding: dict[torch.dtype, float]) -> bool:
    """Whether errors are those of roundings to the dtype.

    Logits of about sqrt(d), at most 4 of it, are rounded to half of a unit. A gradient, which is exponential in them,
    is rounded three times besides, as dlogits, as a product and when it is scaled, and once more for every chunk.
    """
    unit = rounding[case.dtype]
    logits = 0.5 * unit * 4 * case.d**0.5 * (2.2 if case.terms == "all" else 1)
    chunks = -(-case.n // case.rows)
    return found["loss"] <= 2 * logits + 4 * unit and max(found.values()) <= 2 * logits + (3 + chunks**0.5) * unit


@pytest.fixture(autouse=True)
def chunks_of_few_rows(monkeypatch, request):
    """Chunks of as many rows as the case says."""
    case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
    if case:
        monkeypatch.setattr(linear_cross_entropy, "ROWS", case.rows)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What the interpreting child found, by name of the case."""
    return interpreted_child(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("case", INTERPRETED, ids=lambda case: case.name)
def test_interpreted_kernels_meet_the_float64_reference(case, interpreted):
    assert meets(case, interpreted[case.name], INTERPRETED_ROUNDING), interpreted[case.name]


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.name)
def test_a_wrong_constant_is_caught(case, interpreted):
    assert min(interpreted[case.name].values()) > 1e-3, interpreted[case.name]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_chunks_in_plain_torch_meet_the_float64_reference(case):
    found = errors(case, "cpu")
    assert meets(case, found, ROUNDING), found


@pytest.mark.parametrize("terms", TERMS)
def test_gradients_are_those_of_finite_differences(terms, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "ROWS", 2)
    tensors, targets = draw(Case(5, 9, 3, torch.float64, bias=True), "cpu")

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy.linear_cross_entropy(hidden, weight, targets, bias, VALID, **TERMS[terms])

    def again(*leaves: torch.Tensor) -> torch.Tensor:
        """The loss, whose forward is repeated for each of the several backwards of gradcheck."""
        return checkpoint(loss, *leaves, use_reentrant=False)

    assert torch.autograd.gradcheck(again, [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_wanted_are_computed(wanted):
    tensors, targets = draw(Case(5, 9, 3, torch.float32, bias=True), "cpu")
    for tensor, want in zip(tensors, wanted, strict=True):
        tensor.requires_grad_(want)
    loss = linear_cross_entropy.linear_cross_entropy(*tensors[:2], targets, tensors[2], VALID)
    kept = [t for t in loss.grad_fn.next_functions[0][0].saved_tensors if t is not None]
    assert [t.shape for t in kept] == [t.shape for t, want in zip(tensors, wanted, strict=True) if want]
    loss.backward()
    assert [t.grad is not None for t in tensors] == list(wanted)


def test_the_backward_runs_once():
    tensors, targets = draw(Case(5, 9, 3, torch.float32), "cpu")
    loss = linear_cross_entropy.linear_cross_entropy(*(t.requires_grad_() for t in tensors), targets, None, VALID)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("compute_dtype", [None, torch.float32])
def test_reference_is_the_model_s_code_bit_for_bit(compute_dtype):
    (hidden, weight), targets = draw(Case(6, 50, 8, torch.bfloat16), "cpu")
    logits = F.linear(hidden, weight)
    logits = logits if compute_dtype is None else logits.float()
    wanted = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / VALID
    loss = linear_cross_entropy.reference(hidden, weight, targets, None, VALID, compute_dtype=compute_dtype)
    assert torch.equal(loss, wanted)
    chunked = linear_cross_entropy.linear_cross_entropy(hidden, weight, targets, None, VALID, -100, 0.0, compute_dtype)
    assert chunked.dtype == wanted.dtype


def test_no_rows_have_no_loss():
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = linear_cross_entropy.linear_cross_entropy(hidden, weight, torch.ones(0, dtype=torch.int64), None, VALID)
    loss.backward()
    assert loss == 0 and hidden.grad.shape == (0, 4) and torch.equal(weight.grad, torch.zeros(9, 4))


def spent(function: Any, train: bool = True) -> Allocations:
    """Storages of a forward with or without a backward: n = 8192 rows, v = 256, d = 32, float32."""
    hidden, weight = (torch.randn(size, 32, requires_grad=train) for size in (8192, 256))
    targets = torch.randint(0, 256, (8192,))
    with Allocations() as counted:
        loss = function(hidden, weight, targets, None, 8192.0)
        if train:
            loss.backward()
    return counted


def test_whole_logits_never_exist():
    n, v, d = 8192, 256, 32
    chunk = linear_cross_entropy.chunk_rows(n, v, d) * v
    found = spent(linear_cross_entropy.linear_cross_entropy)
    assert found.largest == chunk <= n * v // 4
    # the gradients, logits of a chunk, as much again while their softmax is computed, and some vectors of rows
    assert found.peak <= 4 * (n * d + v * d + 2 * chunk + 16 * n), found.peak
    whole = spent(linear_cross_entropy.reference)
    assert whole.largest == n * v and whole.peak > 3 * 4 * n * v > 4 * found.peak
    assert spent(linear_cross_entropy.linear_cross_entropy, train=False).peak <= 4 * (2 * chunk + 16 * n)


@pytest.mark.parametrize(
    ("n", "v", "d"), [(8192, 128256, 4096), (100_000, 50257, 1600), (10, 100, 7), (65536, 512, 1024)]
)
def test_the_logits_of_a_chunk_are_bounded(n, v, d):
    rows = linear_cross_entropy.chunk_rows(n, v, d)
    assert rows * v <= max(2 * n * d + 2 * v, linear_cross_entropy.ROWS * v)
    assert rows >= n / -(-v // d)


@pytest.mark.slow
def test_torch_compile_takes_all_of_it(monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "ROWS", 2)
    tensors, targets = draw(Case(5, 9, 3, torch.float32, bias=True), "cpu")

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy.linear_cross_entropy(hidden, weight, targets, bias, VALID)

    found = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        found.append(torch.autograd.grad(function(*leaves), leaves))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def refuse(*args, **options):
    raise AssertionError("kernels used")


def test_the_environment_forces_the_kernels(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("AUTOPART_FORCE_TRITON", "1")
    monkeypatch.setattr(cross_entropy_rows, "launch", refuse)
    tensors, targets = draw(Case(5, 9, 3, torch.float32), "cpu")
    with pytest.raises(AssertionError, match="kernels used"):
        linear_cross_entropy.linear_cross_entropy(*tensors, targets, None, VALID)


def test_bytes_moved_counts_every_chunk():
    n, v, d = 8192, 1024, 512
    hidden, weight = (torch.empty(size, d, dtype=torch.bfloat16, device="meta") for size in (n, v))
    targets, bias = torch.empty(n, dtype=torch.int64, device="meta"), torch.empty(v, device="meta")
    k = n // linear_cross_entropy.chunk_rows(n, v, d)
    forward, backward = linear_cross_entropy.bytes_moved(hidden, weight, targets, None, VALID)
    assert k == 2
    assert forward == 2 * (3 * n * d + 4 * v * d + 3 * v * d + 6 * n * v) + 8 * n
    assert backward == 4 * (n * d + v * d)
    kept = linear_cross_entropy.kept((hidden, weight, targets, bias, VALID), ())
    assert [(tuple(t.shape), t.dtype) for t in kept] == [
        ((n, d), torch.bfloat16),
        ((v, d), torch.bfloat16),
        ((v,), torch.float32),
    ]


def test_hidden_is_whole_where_the_vocabulary_is_split():
    hidden, weight, targets, bias = parse(linear_cross_entropy.KERNEL.rule).inputs
    assert [len(operand) for operand in (hidden, weight, targets, bias)] == [2, 2, 1, 1]
    assert (
        hidden[1].factors[0].fixed and weight[1].factors[0].fixed and weight[0] == bias[0] and hidden[0] == targets[0]
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", linear_cross_entropy.KERNEL.shapes)
def test_kernels_compile_ahead_without_spills(model):
    pytest.importorskip("triton")
    usage = linear_cross_entropy.KERNEL.ahead(90, **linear_cross_entropy.KERNEL.shapes[model])
    assert set(usage) == {"statistics", "gradient"}
    assert all(kernel.spills == 0 for kernel in usage.values()), usage


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_device_kernels_meet_the_float64_reference(case):
    found = errors(case, "cuda")
    assert meets(case, found, ROUNDING), found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_vocabulary_as_large_as_a_model_s_on_a_device():
    case = Case(5000, 32000, 256, torch.bfloat16, rows=linear_cross_entropy.ROWS)
    found = errors(case, "cuda")
    assert meets(case, found, ROUNDING), found


if __name__ == "__main__":
    cross_entropy_rows.BLOCK = 64  # rows of several blocks
    found = {}
    for case in INTERPRETED + WRONG:
        linear_cross_entropy.ROWS = case.rows
        found[case.name] = errors(case, "cpu")
    print(json.dumps(found))
