"""Routers and the load-balancing loss against plain torch and transformers."""

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch

from autopart.kernels import expert_load, router, score_router
from autopart.sharding.notation import parse
from tests.support.interpreted import interpreted as interpreted_child

ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-6}
"""Of a result over its largest element; the interpreter truncates bfloat16 where a GPU rounds."""


class Case(NamedTuple):
    """Logits (t, experts), drawn at ``scale``, of which k are chosen."""

    t: int
    experts: int
    k: int
    dtype: torch.dtype
    renormalise: bool = True
    weight_dtype: torch.dtype | None = None
    scale: float = 1.0
    layout: str = "plain"
    wrong: bool = False

    @property
    def id(self) -> str:
        return "-".join(str(field).removeprefix("torch.") for field in self)


SIZES = ((1, 1, 1), (70, 8, 2), (5, 33, 7), (3, 600, 4))
CASES = [Case(t, e, k, dtype) for dtype in ROUNDING for t, e, k in SIZES if e < 600 or dtype == torch.float32]
CASES += [Case(70, 8, 2, dtype, False, dtype) for dtype in ROUNDING]
CASES += [Case(5, 6, 6, torch.float32, flag, scale=scale) for flag in (True, False) for scale in (30.0, 1e-3)]
CASES += [Case(9, 8, 2, torch.float32, layout=layout) for layout in ("swapped", "sliced")]
WRONG = [Case(70, 8, 2, torch.float32, wrong=True)]
LARGE = [Case(5000, 128, 8, dtype) for dtype in ROUNDING]
INTERPRETED = CASES if "AUTOPART_EXAMPLES" in os.environ else [c for c in CASES if c.t != 5 or c.dtype.itemsize == 4]


def draw(case: Case, device: str) -> torch.Tensor:
    """Logits whose chances differ in their dtype, so that one order of them is right."""
    step = torch.arange(1, case.experts + 1).float().neg()
    values = torch.stack([step[torch.randperm(case.experts)] for _ in range(case.t)]) * 0.05 * case.scale
    values = (values + 0.001 * case.scale * torch.rand(case.t, 1)).to(case.dtype)
    if case.layout == "swapped":
        return values.t().contiguous().t().to(device)
    if case.layout == "sliced":
        return torch.cat([values, values], 1).to(device)[:, : case.experts]
    return values.to(device)


def errors(case: Case, device: str) -> dict[str, float]:
    """Largest errors over the largest element of each result, of both kernels and their gradients; 1 for a number or a
    count that differs."""
    torch.manual_seed(0)
    x = draw(case, device).requires_grad_()
    mask = (torch.rand(case.t) > 0.3).float().to(device)
    weights, ids = router.route(x, case.k, case.renormalise, case.weight_dtype)
    tokens, chances = expert_load.expert_load(x, mask, case.k)
    plain_tokens, plain_chances = expert_load.expert_load(x, None, case.k)
    assert all("autopart" in y.grad_fn.name() for y in (weights, chances))
    assert weights.dtype == (case.weight_dtype or torch.float32) and ids.dtype == torch.int64
    dweights, dchances = torch.randn_like(weights), torch.randn_like(chances)
    got = [weights, *torch.autograd.grad(weights, x, dweights), chances, plain_chances]
    got += torch.autograd.grad(chances, x, dchances)

    exact = x.detach().double().requires_grad_()
    right = exact
    if case.wrong:
        right = (1.05 * exact).roll(1, 1)
        mask = 1 - mask
    want_weights = torch.softmax(right, -1)
    want_weights, want_ids = want_weights.topk(case.k, -1)
    if case.renormalise:
        want_weights = want_weights / want_weights.sum(-1, keepdim=True)
    p = torch.softmax(right, -1)
    hits = torch.zeros_like(p).scatter_(1, want_ids, 1.0)
    want_chances = (p * mask[:, None]).sum(0)
    want = [
        want_weights,
        *torch.autograd.grad(want_weights, exact, dweights.double(), retain_graph=True),
        want_chances,
        p.sum(0),
    ]
    want += torch.autograd.grad(want_chances, exact, dchances.double())
    names = ("weights", "dweights", "chances", "plain chances", "dchances")
    found = {}
    for name, a, b in zip(names, got, want, strict=True):
        size = max(b.abs().max().item(), 1e-3 if name.startswith("d") else 1e-30)
        found[name] = (a - b).abs().max().item() / size
    equal = torch.equal(ids, want_ids) and torch.equal(tokens.double(), (hits * mask[:, None]).sum(0))
    found["numbers"] = 0.0 if equal and torch.equal(plain_tokens.double(), hits.sum(0)) else 1.0
    return found


def spread_of_values(device: str) -> list[object]:
    """What infinities, nans and ties give: the numbers, and the weights with -1 for nan."""
    inf, nan = float("inf"), float("nan")
    rows = [[inf, 0, 1], [nan, 0, 1], [-inf, -inf, -inf], [-inf, 0, -inf], [3e38, -3e38, 0], [1, 1, 1]]
    weights, ids = router.route(torch.tensor(rows, device=device), 2, True, None)
    return [ids.tolist(), weights.nan_to_num(-1.0).tolist()]


VALUES = [
    [[0, 1], [0, 1], [0, 1], [1, 0], [0, 1], [0, 1]],
    [[-1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0], [1.0, 0.0], [1.0, 0.0], [0.5, 0.5]],
]


@pytest.fixture(scope="module")
def interpreted():
    return interpreted_child(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("case", INTERPRETED, ids=lambda case: case.id)
def test_interpreted_kernels_meet_the_float64_reference(case, interpreted):
    assert max(interpreted[case.id].values()) <= ROUNDING[case.dtype], interpreted[case.id]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_reference_is_the_router_of_transformers_bit_for_bit(name, dtype):
    pytest.importorskip("transformers")
    if name == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralConfig as Config
        from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter as Router
    else:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig as Config
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter as Router
    config = Config(hidden_size=16, num_local_experts=8, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True)
    theirs = Router(config).to(dtype)
    torch.nn.init.normal_(theirs.weight)
    logits, weights, ids = theirs(torch.randn(3, 5, 16).to(dtype))
    found = router.route(logits, 2, True, None if name == "mixtral" else dtype)
    assert torch.equal(found[0], weights) and torch.equal(found[1], ids)


def load_balancing_loss(logits: Sequence[torch.Tensor], k: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The load-balancing loss of the logits (t, experts) of several layers, and of one mask (t,) for all: a scalar."""
    flat = None if mask is None else mask.reshape(-1).float()
    experts = logits[0].shape[-1]
    tokens, chances = torch.zeros(2, experts, dtype=torch.float32, device=logits[0].device)
    rows: Any = 0.0
    for layer in logits:
        counted, summed = expert_load.expert_load(layer, flat, k)
        tokens, chances = tokens + counted, chances + summed
        rows = rows + (layer.shape[0] if flat is None else flat.sum())
    return torch.sum(tokens / rows * (chances / rows).unsqueeze(0)) * experts


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_is_that_of_transformers_bit_for_bit(dtype, masked):
    pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = tuple(torch.randn(10, 8).to(dtype).requires_grad_() for _ in range(3))
    mask = (torch.rand(2, 5) > 0.3).long() if masked else None
    expected = load_balancing_loss_func(logits, 8, 2, mask)
    found = load_balancing_loss(logits, 2, mask)
    assert torch.equal(found, expected)
    assert all(map(torch.equal, torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits)))


FALLBACKS = {"float64": torch.randn(3, 4).double(), "no rows": torch.randn(0, 4), "many experts": torch.randn(1, 1025)}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_the_kernels_cannot_take_goes_to_the_reference(name, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("kernels used")

    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("AUTOPART_FORCE_TRITON", "1")
    monkeypatch.setattr(score_router, "launch", refuse)
    monkeypatch.setattr(expert_load, "launch", refuse)
    x = FALLBACKS[name]
    assert router.route(x, 2, True)[0].shape == (len(x), 2)
    assert expert_load.expert_load(x, None, 2)[0].sum() == 2 * len(x)


def test_operators_take_fake_tensors():
    pytest.importorskip("triton")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 3, 8, requires_grad=True)
        given = (1, 1, True, 1, True, 0.0, False, 1.0, True, torch.bfloat16)
        weights, ids = torch.ops.autopart.route_scores(x, None, 2, *given)
        tokens, chances = torch.ops.autopart.expert_load(x.view(6, 8), None, 2)
        (weights.sum() + chances.sum()).backward()
        assert weights.shape == ids.shape == (2, 3, 2) and tokens.shape == (8,) and x.grad.shape == x.shape


def test_bytes_moved_kept_and_rules():
    x, ids = torch.empty(6, 8, device="meta", dtype=torch.bfloat16), torch.empty(6, 2, device="meta")
    mask = torch.empty(6, device="meta")
    assert router.bytes_moved(x, 2, True) == (96 + 12 * 12, 192 + 12 * 12)
    assert expert_load.bytes_moved(x, mask, 2) == (96 + 24 + 64, 192 + 24 + 32)
    assert router.KERNEL.kept((x, 2, True), (ids, ids)) == (x, ids) and expert_load.KERNEL.kept((x, None, 2), ()) == (
        x,
    )
    assert len(parse(router.KERNEL.rule).outputs) == len(parse(expert_load.KERNEL.rule).outputs) == 2


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_ahead_without_spills(capability):
    pytest.importorskip("triton")
    for kernel in (router.KERNEL, expert_load.KERNEL):
        for shape in kernel.shapes.values():
            usage = kernel.ahead(capability, **shape)
            assert all(one.spills == 0 and one.registers <= 128 for one in usage.values()), (kernel.name, shape, usage)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES + LARGE, ids=lambda case: case.id)
def test_device_kernels_meet_the_float64_reference(case):
    found = errors(case, "cuda")
    assert max(found.values()) <= ROUNDING[case.dtype], found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_infinities_nans_and_ties():
    assert spread_of_values("cuda") == VALUES


def registered() -> bool:
    """Whether torch's checks of the operators' schemas and gradients pass."""
    x = torch.rand(4, 5, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(torch.ops.autopart.expert_load.default, (x, None, 2), test_utils=checks)
    return True


if __name__ == "__main__":
    found: dict[str, object] = {case.id: errors(case, "cpu") for case in INTERPRETED + WRONG}
    print(json.dumps(found | {"values": spread_of_values("cpu"), "registered": registered()}))
