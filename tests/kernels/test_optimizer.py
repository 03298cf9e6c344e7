"""AdamW and Lion in one pass against plain torch and against torch.optim.AdamW."""

import json
import os
from typing import NamedTuple

import pytest
import torch

from autopart.kernels import lion, optimizer
from autopart.kernels.many_tensors import Shard
from autopart.sharding.notation import parse
from tests.support.interpreted import interpreted as interpreted_child

LR, EPS, DECAY = 1e-2, 1e-8, 0.1
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-7}
"""Of the weight: the interpreter truncates bfloat16 where a GPU rounds."""
EXTREME = (float("inf"), -float("inf"), float("nan"), 3e38, -3e38, 1e30, 1e-30, 1e-42, -0.0, 0.0)


class Case(NamedTuple):
    """Steps of one optimizer over a shard of n elements, of which the first has the number ``first``."""

    name: str
    n: int
    dtype: torch.dtype
    weight: bool = True
    factor: float | None = None
    first: int = 1
    betas: tuple[float, float] = (0.9, 0.999)
    changed: float = 1.0

    @property
    def id(self) -> str:
        return "-".join(str(field).removeprefix("torch.") for field in self)


NAMES = ("adamw", "lion")
CASES = [Case(name, n, dtype) for name in NAMES for n in (1, 1000, 2500) for dtype in ROUNDING]
CASES += [Case(name, 1000, torch.bfloat16, False, 0.25) for name in NAMES]
CASES += [Case(name, 20_000, torch.float32, True, 0.25) for name in NAMES]
CASES += [Case("adamw", 33, torch.float32, first=first) for first in (20, 400, 600, 800, 100000)]
CASES += [Case("adamw", 33, torch.float32, betas=betas, first=t) for betas in ((0.0, 0.0), (0.4, 0.95)) for t in (1, 9)]
WRONG = [Case(name, 1000, torch.float32, changed=1.001) for name in NAMES]
INTERPRETED = CASES if "AUTOPART_EXAMPLES" in os.environ else [c for c in CASES if c.n != 2500 or c.dtype.itemsize == 4]


def module_of(name: str):
    return optimizer if name == "adamw" else lion


def apply(case: Case, function, state, gradient, t, factor, changed=1.0) -> None:
    """One step of `function`, which is a kernel or a reference, with a learning rate that may be a wrong one."""
    beta1, beta2 = case.betas
    if case.name == "adamw":
        function(gradient, *state, factor, t, LR * changed, beta1, beta2, EPS, DECAY)
    else:
        master, mean, _, weight = state
        function(gradient, master, mean, weight, factor, LR * changed, beta1, beta2, DECAY)


def errors(case: Case, device: str) -> dict[str, float]:
    """Largest error of every tensor after three steps, over its tolerance, which is some roundings of its terms."""
    torch.manual_seed(0)
    module = module_of(case.name)
    factor = None if case.factor is None else torch.tensor([case.factor], device=device)
    master, mean, square = (torch.randn(case.n, device=device) for _ in range(3))
    weight = master.to(case.dtype) if case.weight else None
    state = [master, mean.mul_(0.1), square.square_(), weight]
    exact = [None if t is None else t.double() for t in state]
    for t in range(case.first, case.first + 3):
        gradient = torch.randn(case.n).to(device, case.dtype)
        apply(case, module.KERNEL.function, state, gradient, t, factor, case.changed)
        apply(case, module.reference, exact, gradient.double(), t, factor)
    rounding = {"master": 2**-20, "mean": 2**-21, "square": 2**-21, "weight": 2**-20 + 1.01 * ROUNDING[case.dtype]}
    found = {}
    for (name, tolerance), got, want in zip(rounding.items(), state, exact, strict=True):
        if got is not None:
            size = max(want.abs().max().item(), LR)
            found[name] = (got.double() - want).abs().max().item() / size / tolerance
    return found


def extremes(name: str, device: str) -> bool:
    """Whether gradients of extreme values give what the reference gives in float32, infinities and nans alike."""
    module, case = module_of(name), Case(name, len(EXTREME), torch.float32)
    gradient = torch.tensor(EXTREME, device=device)
    state = [torch.ones_like(gradient), *(torch.zeros_like(gradient) for _ in range(2)), None]
    expected = [None if t is None else t.clone() for t in state]
    apply(case, module.KERNEL.function, state, gradient, 1, None)
    apply(case, module.reference, expected, gradient, 1, None)
    pairs = [(a, b) for a, b in zip(state, expected, strict=True) if a is not None]
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-38, equal_nan=True) for a, b in pairs)


MANY = [(n, dtype, half) for n in (1, 16, 17, 4096, 16385) for dtype in ROUNDING for half in (None, torch.bfloat16)]
"""Elements, dtype of the gradient and of the weight of tensors that are stepped together."""


def together(name: str, device: str) -> float:
    """Largest error of tensors of many sizes, dtypes and alignments, each with rates of its own, that are stepped
    together."""
    torch.manual_seed(0)
    module, factor = module_of(name), torch.tensor(0.5, dtype=torch.float64, device=device)
    shards, rates, worst = [], [], 0.0
    for at, (n, dtype, half) in enumerate(MANY):
        lead = at % 2  # every second tensor begins at an odd address
        gradient, *states = (torch.rand(n + lead, device=device)[lead:] for _ in range(4 if name == "adamw" else 3))
        weight = None if half is None else torch.zeros(n + lead, dtype=half, device=device)[lead:]
        shards.append(Shard(gradient.to(dtype), tuple(states), weight))
        rates.append(module.Rates(*([at + 1.0] if name == "adamw" else []), LR * (at + 1), DECAY * (at % 3)))
    before = [tuple(t.double() for t in shard.states) for shard in shards]
    betas = (0.9, 0.99, EPS) if name == "adamw" else (0.9, 0.99)
    (optimizer.adamw_together if name == "adamw" else lion.lion_together)(shards, rates, factor, *betas)
    for shard, exact, rate in zip(shards, before, rates, strict=True):
        *t, lr, decay = rate
        module.reference(shard.gradient.double(), *exact, None, factor, *t, lr, *betas, decay)
        off = [((a - b).abs() / b.abs().clamp(min=1)).max().item() for a, b in zip(shard.states, exact, strict=True)]
        worst = max(worst, *off)
        if shard.weight is not None:
            off = (shard.weight.double() - exact[0]).abs() / exact[0].abs().clamp(min=1)
            worst = max(worst, off.max().item() - 2**-7)
    return worst


@pytest.fixture(scope="module")
def interpreted():
    return interpreted_child(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("case", INTERPRETED, ids=lambda case: case.id)
def test_interpreted_steps_meet_the_float64_reference(case, interpreted):
    assert max(interpreted[case.id].values()) <= 1, interpreted[case.id]


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.id)
def test_a_wrong_learning_rate_is_caught(case, interpreted):
    assert interpreted[case.id]["master"] > 1, interpreted[case.id]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_interpreted_extreme_gradients_give_what_plain_torch_gives(name, interpreted):
    assert interpreted[f"extremes {name}"] is True


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_interpreted_tensors_are_stepped_together(name, interpreted):
    assert interpreted[f"together {name}"] < 2e-6


@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_reference_is_torch_s_adamw_bit_for_bit(dtype, decay):
    weight = torch.randn(50, 7).to(dtype)
    parameter = torch.nn.Parameter(weight.clone())
    torchs = torch.optim.AdamW([parameter], LR, (0.9, 0.95), EPS, decay, foreach=False)
    state = [weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)]
    for t in range(1, 4):
        parameter.grad = torch.randn(50, 7).to(dtype)
        given = parameter.grad.clone()
        torchs.step()
        optimizer.adamw(given, *state, None, None, t, LR, 0.9, 0.95, EPS, decay)
        assert torch.equal(given, parameter.grad)
    assert torch.equal(state[0], parameter)


@pytest.mark.parametrize("name", NAMES)
def test_factor_and_weight(name):
    module, case = module_of(name), Case(name, 5, torch.float32)
    gradient, start = torch.randn(5), torch.randn(5)
    results = []
    for g, factor in ((gradient * 0.5, None), (gradient, torch.tensor(0.5, dtype=torch.float64))):
        state = [start.clone(), torch.zeros(5), torch.zeros(5), torch.zeros(5, dtype=torch.bfloat16)]
        apply(case, module.KERNEL.function, state, g, 1, factor)
        assert torch.equal(state[3], state[0].bfloat16())
        results.append(state)
    assert all(map(torch.equal, *results))


def test_parameters_that_require_gradients_are_updated():
    parameter = torch.nn.Parameter(torch.ones(3))
    lion.lion(torch.ones(3), parameter, torch.zeros(3), None, None, LR, 0.9, 0.99, 0.0)
    assert torch.equal(parameter, torch.full((3,), 1 - LR)) and parameter.grad_fn is None


FALLBACKS = {
    "float64": (torch.ones(4).double(), torch.ones(4).double()),
    "bfloat16 master": (torch.ones(4).bfloat16(), torch.ones(4).bfloat16()),
    "no elements": (torch.ones(0), torch.ones(0)),
    "strided master": (torch.ones(4), torch.ones(8)[::2]),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_the_kernels_cannot_take_goes_to_the_reference(name, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("kernels used")

    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("AUTOPART_FORCE_TRITON", "1")
    monkeypatch.setattr(optimizer, "launch_over", refuse)
    gradient, master = FALLBACKS[name]
    moments = [torch.zeros_like(master) for _ in range(2)]
    optimizer.adamw(gradient, master, *moments, None, None, 1, LR, 0.9, 0.999, EPS, DECAY)


def test_bytes_moved_counts_every_tensor_once():
    n, half = torch.empty(10, device="meta"), torch.empty(10, device="meta", dtype=torch.bfloat16)
    assert optimizer.bytes_moved(half, n, n, n, half) == (10 * (2 + 24 + 2), 0)
    assert optimizer.bytes_moved(n, n, n, n, None) == (10 * (4 + 24), 0)
    assert lion.bytes_moved(half, n, n, half) == (10 * (2 + 16 + 2), 0)


def test_rules_parse():
    assert len(parse(optimizer.KERNEL.rule).inputs) == 6 and len(parse(lion.KERNEL.rule).inputs) == 5


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_ahead_without_spills(capability):
    pytest.importorskip("triton")
    for module in (optimizer, lion):
        for arguments in ({}, {"dtype": torch.float32, "tensors": 1}, {"aligned": False}):
            usage = module.KERNEL.ahead(capability, **arguments)["step"]
            assert usage.spills == 0 and 0 < usage.registers <= 160, usage


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_device_steps_meet_the_float64_reference(case):
    found = errors(case, "cuda")
    assert max(found.values()) <= 1, found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_device_extreme_gradients_give_what_plain_torch_gives(name):
    assert extremes(name, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_device_tensors_are_stepped_together(name):
    assert together(name, "cuda") < 2e-6


if __name__ == "__main__":
    found: dict[str, object] = {case.id: errors(case, "cpu") for case in INTERPRETED + WRONG}
    found |= {f"extremes {name}": extremes(name, "cpu") for name in NAMES}
    found |= {f"together {name}": together(name, "cpu") for name in NAMES}
    print(json.dumps(found))
