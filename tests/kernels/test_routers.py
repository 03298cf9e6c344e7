"""Routers of the k greatest logits, and of sigmoid scores in groups, against plain torch and transformers."""

import json
import os
from typing import NamedTuple

import pytest
import torch

from autopart.kernels import score_router, topk_router
from autopart.kernels.score_router import STYLES, route_scores
from autopart.kernels.topk_router import route_topk
from autopart.sharding.notation import parse
from tests.support.interpreted import interpreted as interpreted_child

ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}
"""Of a result over its largest element; the interpreter truncates bfloat16 where a GPU rounds."""
EPS, SCALE = 0.01, 2.5


class Case(NamedTuple):
    """Logits (t, experts), of which k are chosen; groups None: by the k greatest logits.

    constants  of `route_scores`, behind its groups
    weights    dtype of the weights, None: the logits'
    """

    t: int
    experts: int
    k: int
    dtype: torch.dtype = torch.float32
    groups: int | None = None
    limit: int = 1
    constants: tuple[bool, float, float] = (True, EPS, SCALE)
    weights: torch.dtype | None = None
    layout: str = "plain"
    style: str = "deepseek_v3"
    wrong: bool = False

    @property
    def id(self) -> str:
        return "-".join(str(field).removeprefix("torch.") for field in self)


SIZES = ((1, 1, 1), (70, 8, 2), (5, 33, 7), (3, 600, 4))
GROUPS = ((70, 8, 3, 4, 2), (5, 33, 7, 3, 2), (3, 40, 4, 5, 1), (3, 40, 8, 5, 5), (2, 600, 8, 1, 1), (9, 24, 6, 12, 3))
HALVES = (torch.float16, torch.bfloat16)
CASES = [Case(t, experts, k, dtype) for dtype in ROUNDING for t, experts, k in SIZES if t != 3 or dtype.itemsize == 4]
CASES += [Case(5, 8, 2, weights=dtype) for dtype in HALVES] + [Case(5, 8, 2, torch.bfloat16, weights=torch.float32)]
CASES += [Case(*sizes[:3], groups=sizes[3], limit=sizes[4]) for sizes in GROUPS]
CASES += [Case(70, 8, 2, dtype, 4, 2) for dtype in HALVES]
CASES += [
    Case(5, 12, 4, torch.float32, 3, 2, constants)
    for constants in ((True, 0.0, 1.0), (False, 0.0, SCALE), (False, 0.0, 1.0), (True, 1e-20, 1.0))
]
CASES += [Case(9, 8, 2, groups=groups, layout=layout) for groups in (None, 2) for layout in ("swapped", "sliced")]
CASES += [
    Case(9, 24, 4, dtype, 6, 2, constants, style=style)
    for dtype in ROUNDING
    for style, constants in (
        ("deepseek_v2", (False, 0.0, SCALE)),
        ("mistral4", (True, EPS, SCALE)),
        ("mistral4", (True, 0.0, 1.0)),
        ("ernie4_5", (True, 1e-12, 1.0)),
        ("ernie4_5", (True, 0.9, 1.0)),
    )
]
CASES += [Case(70, 160, 6, torch.float32, 8, 3, (False, 0.0, SCALE), style="deepseek_v2")]
WRONG = [Case(70, 8, 2, wrong=True), Case(70, 8, 2, groups=4, limit=2, wrong=True)]
LARGE = [Case(5000, 128, 4, dtype) for dtype in ROUNDING] + [Case(5000, 256, 8, groups=8, limit=4)]
INTERPRETED = CASES if "AUTOPART_EXAMPLES" in os.environ else [c for c in CASES if c.t != 5 or c.dtype.itemsize == 4]


def draw(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and a bias (experts,): sums of scores and bias differ in every dtype, so that one order is right."""
    step = 4 / case.experts * (torch.arange(case.experts) + 0.3 * torch.arange(case.experts).mul(3).sin())
    values = torch.stack([step[torch.randperm(case.experts)] for _ in range(case.t)]).to(case.dtype) - 2
    if case.layout == "swapped":
        values = values.t().contiguous().t()
    if case.layout == "sliced":
        values = torch.cat([values, values], 1)[:, : case.experts]
    bias = torch.linspace(-0.1, 0.1, case.experts).sin() * 0.0123
    return values.to(device), bias.to(device)


def call(case: Case, logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if case.groups is None:
        return route_topk(logits, case.k, None, case.weights)
    given = bias if STYLES[case.style].fill else None
    return route_scores(logits, given, case.k, case.groups, case.limit, *case.constants, case.style)


def right(case: Case, logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the routers give, written for every row and group by itself."""
    if case.groups is None:
        ids = logits.argsort(-1, descending=True)[:, : case.k]
        return torch.softmax(logits.gather(1, ids), -1), ids
    style = STYLES[case.style]
    scores = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True) if style.soft else 1 / (1 + torch.exp(-logits))
    choice, size = scores.detach() + (bias if style.fill else 0), case.experts // case.groups
    for row in choice:
        sums = [part.sort(descending=True)[0][: style.lead].sum().item() for part in row.split(size)]
        for group in sorted(range(case.groups), key=lambda g: -sums[g])[case.limit :]:
            row[group * size : (group + 1) * size] = -torch.inf
    ids = choice.argsort(-1, descending=True)[:, : case.k]
    weights = scores.gather(1, ids)
    renormalise, eps, scale = case.constants
    total = weights.sum(1, keepdim=True)
    total = total.clamp(min=eps) if style.clamped else total + eps
    return scale * (weights / total if renormalise else weights), ids


def errors(case: Case, device: str) -> dict[str, float]:
    """Largest errors over the largest element of weights and gradients; 1 for numbers that differ."""
    torch.manual_seed(0)
    logits, bias = draw(case, device)
    logits.requires_grad_()
    weights, ids = call(case, logits, bias)
    assert "autopart" in weights.grad_fn.name() and weights.dtype == (case.weights or case.dtype)
    dweights = torch.randn_like(weights)
    got = weights, *torch.autograd.grad(weights, logits, dweights)
    exact = logits.detach().double().requires_grad_()
    given = (1.05 * exact).roll(1, 1) if case.wrong else exact
    want_weights, want_ids = right(case, given, bias.double())
    want = want_weights, *torch.autograd.grad(want_weights, exact, dweights.double())
    found = {}
    for name, a, b in zip(("weights", "dlogits"), got, want, strict=True):
        size = max(b.abs().max().item(), 1e-3 if name == "dlogits" else 1e-30)
        found[name] = (a - b).abs().max().item() / size
    return found | {"numbers": 0.0 if torch.equal(ids, want_ids) else 1.0}


def spread_of_values(device: str) -> list[object]:
    """What infinities, nans and ties give: numbers, and weights with -1 for nan; of both routers."""
    inf, nan = float("inf"), float("nan")
    rows = [[inf, 0, 1, 0], [nan, 0, 1, 0], [-inf, -inf, -inf, -inf], [-inf, 0, -inf, -inf], [1, 1, 1, 1],
            [0, -300, -200, -400]]  # fmt: skip
    logits, bias = torch.tensor(rows, device=device), torch.tensor([0.0, -inf, 0.0, 0.0], device=device)
    results = [
        route_topk(logits, 2),
        route_scores(logits, bias, 2, None, None, True, 0.5, 1.0),
        route_scores(logits, torch.zeros_like(bias), 3, 2, 1, False, 0.0, 1.0),
    ]
    return [[ids.tolist(), (weights.nan_to_num(-1.0) * 1e4).round().tolist()] for weights, ids in results]


NAN = -10_000
VALUES = [
    [
        [[0, 2], [0, 2], [0, 1], [1, 0], [0, 1], [0, 2]],
        [[NAN, NAN], [NAN, NAN], [NAN, NAN], [10_000, 0], [5000, 5000], [10_000, 0]],
    ],
    [
        [[0, 2], [0, 2], [0, 2], [0, 2], [0, 2], [0, 2]],
        [[4482, 3277], [NAN, NAN], [0, 0], [0, 0], [3726, 3726], [5000, 0]],
    ],
    [
        [[0, 1, 2], [0, 1, 2], [0, 1, 2], [1, 0, 2], [0, 1, 2], [0, 1, 2]],
        [[10_000, 5000, 7311], [NAN, 5000, 7311], [0, 0, 0], [5000, 0, 0], [7311, 7311, 7311], [5000, 0, 0]],
    ],
]


@pytest.fixture(scope="module")
def interpreted():
    return interpreted_child(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("case", INTERPRETED, ids=lambda case: case.id)
def test_interpreted_kernels_meet_the_float64_reference(case, interpreted):
    rounding = max(ROUNDING[case.dtype], ROUNDING[case.weights or case.dtype])
    assert max(interpreted[case.id].values()) <= rounding, interpreted[case.id]


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.id)
def test_another_expert_is_caught(case, interpreted):
    assert min(interpreted[case.id].values()) > 1e-3, interpreted[case.id]


@pytest.mark.slow
def test_interpreted_infinities_nans_and_ties(interpreted):
    assert interpreted["values"] == VALUES


@pytest.mark.slow
def test_the_operators_are_registered_as_torch_asks(interpreted):
    assert interpreted["registered"] is True


MODULES = {
    "gpt_oss": ("GptOssTopKRouter", {}),
    "granitemoe": ("GraniteMoeTopKRouter", {}),
    "deepseek_v3": ("DeepseekV3TopkRouter", {"n_group": 4, "topk_group": 2, "norm_topk_prob": True}),
    "dots1": ("Dots1TopkRouter", {"n_group": 2, "topk_group": 1, "norm_topk_prob": False}),
    "glm4_moe": ("Glm4MoeTopkRouter", {"n_group": 1, "topk_group": 1, "norm_topk_prob": True}),
}
"""Model of transformers -> its router, and settings of groups."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_reference_is_the_router_of_transformers_bit_for_bit(name, dtype):
    transformers = pytest.importorskip("transformers")
    module = getattr(transformers.models, name)
    kind, settings = MODULES[name]
    config = transformers.AutoConfig.for_model(
        name, hidden_size=16, num_experts_per_tok=3, num_local_experts=8, n_routed_experts=8,
        routed_scaling_factor=SCALE, **settings,
    )  # fmt: skip
    theirs = getattr(getattr(module, f"modeling_{name}"), kind)(config).to(dtype)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    logits, weights, ids = theirs(torch.randn(7, 16).to(dtype))
    if settings:
        groups = settings["n_group"], settings["topk_group"]
        bias = theirs.e_score_correction_bias
        found = route_scores(logits, bias, 3, *groups, settings["norm_topk_prob"], 1e-20, SCALE)
        found = found[0].gather(1, found[1].argsort(1)), found[1].sort(1)[0]  # theirs are in any order
        weights, ids = weights.gather(1, ids.argsort(1)), ids.sort(1)[0]
    else:
        found = route_topk(logits, 3, None, None if name == "gpt_oss" else dtype)
    assert torch.equal(found[0], weights) and torch.equal(found[1], ids)


FALLBACKS = {
    "float64": torch.randn(3, 6).double(),
    "no rows": torch.randn(0, 6),
    "many experts": torch.randn(1, 1026),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_the_kernels_cannot_take_goes_to_the_reference(name, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("kernels used")

    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("AUTOPART_FORCE_TRITON", "1")
    monkeypatch.setattr(topk_router, "launch", refuse)
    monkeypatch.setattr(score_router, "launch", refuse)
    x = FALLBACKS[name]
    bias = torch.zeros(x.shape[1])
    assert route_topk(x, 2)[0].shape == (len(x), 2)
    assert route_scores(x, bias, 2, 3, 1, True, EPS, SCALE)[0].shape == (len(x), 2)
    wide = torch.randn(1, 66 * 10)  # 66 groups of 10 take 128 x 16 places
    assert route_scores(wide, torch.zeros(660), 2, 66, 1, True, EPS, SCALE)[0].shape == (1, 2)


def test_operators_take_fake_tensors():
    pytest.importorskip("triton")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, bias = torch.empty(2, 3, 8, requires_grad=True), torch.empty(8)
        weights, ids = torch.ops.autopart.route_topk(x, 2, torch.bfloat16)
        others, numbers = torch.ops.autopart.route_scores(
            x, bias, 4, 2, 1, False, 2, True, EPS, False, SCALE, False, torch.float32
        )
        (weights.sum() + others.sum()).backward()
        assert weights.shape == ids.shape == (2, 3, 2) and weights.dtype == torch.bfloat16
        assert others.shape == numbers.shape == (2, 3, 4) and x.grad.shape == x.shape


def test_bytes_moved_kept_and_rules():
    x, ids = torch.empty(6, 8, device="meta", dtype=torch.bfloat16), torch.empty(6, 2, device="meta")
    bias = torch.empty(8, device="meta")
    assert topk_router.bytes_moved(x, 2) == (96 + 10 * 12, 96 + 12 * 12)
    assert topk_router.bytes_moved(x, 2, torch.float32) == (96 + 12 * 12, 96 + 16 * 12)
    assert score_router.bytes_moved(x, bias, 2) == (96 + 32 + 10 * 12, 192 + 10 * 12)
    assert topk_router.KERNEL.kept((x, 2), (ids, ids)) == (ids, ids)
    assert score_router.KERNEL.kept((x, bias, 2), (ids, ids)) == (x, ids)
    assert score_router.bytes_moved(x, None, 2) == (96 + 10 * 12, 192 + 10 * 12)
    assert len(parse(topk_router.KERNEL.rule).inputs) == 1
    assert len(parse(score_router.rule((x.shape, bias.shape), ())).inputs) == 2


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_ahead_without_spills(capability):
    pytest.importorskip("triton")
    for kernel in (topk_router.KERNEL, score_router.KERNEL):
        for shape in kernel.shapes.values():
            usage = kernel.ahead(capability, **shape)
            assert all(one.spills == 0 and one.registers <= 128 for one in usage.values()), (kernel.name, shape, usage)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES + LARGE, ids=lambda case: case.id)
def test_device_kernels_meet_the_float64_reference(case):
    found = errors(case, "cuda")
    assert max(found.values()) <= max(ROUNDING[case.dtype], ROUNDING[case.weights or case.dtype]), found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_infinities_nans_and_ties():
    assert spread_of_values("cuda") == VALUES


def registered() -> bool:
    """Whether torch's checks of the operators' schemas and gradients pass."""
    x, bias = torch.rand(4, 6, requires_grad=True), torch.rand(6)
    checks = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(torch.ops.autopart.route_topk.default, (x, 2, torch.float32), test_utils=checks)
    given = (2, 3, 2, False, 2, True, EPS, False, SCALE, False, torch.float32)
    for learned in (bias, None):
        torch.library.opcheck(torch.ops.autopart.route_scores.default, (x, learned, *given), test_utils=checks)
    return True


if __name__ == "__main__":
    found: dict[str, object] = {case.id: errors(case, "cpu") for case in INTERPRETED + WRONG}
    print(json.dumps(found | {"values": spread_of_values("cpu"), "registered": registered()}))
