"""AdamW and Lion in one pass against plain torch and against torch.optim.AdamW."""

import json
import os
from typing import NamedTuple

import pytest
import torch

from autopart.kernels import lion, optimizer
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
    found_inf: float | None = None
    groups: bool = False
    first: int = 1
    betas: tuple[float, float] = (0.9, 0.999)
    changed: float = 1.0

    @property
    def id(self) -> str:
        return "-".join(str(field).removeprefix("torch.") for field in self)


NAMES = ("adamw", "lion")
CASES = [Case(name, n, dtype) for name in NAMES for n in (1, 1000, 2500) for dtype in ROUNDING]
CASES += [Case(name, 1000, torch.bfloat16, False, 0.25, 0.0, True) for name in NAMES]
CASES += [Case(name, 1000, torch.float32, True, 0.25, 1.0, True) for name in NAMES]
CASES += [Case("adamw", 33, torch.float32, first=first) for first in (20, 400, 600, 800, 100000)]
CASES += [Case("adamw", 33, torch.float32, betas=betas, first=t) for betas in ((0.0, 0.0), (0.4, 0.95)) for t in (1, 9)]
WRONG = [Case(name, 1000, torch.float32, changed=1.001) for name in NAMES]
INTERPRETED = CASES if "AUTOPART_EXAMPLES" in os.environ else [c for c in CASES if c.n != 2500 or c.dtype.itemsize == 4]


def apply(case: Case, function, state, gradient, step, others, changed=1.0) -> None:
    """One step of `function`, which is a kernel or a reference, with a learning rate that may be a wrong one."""
    beta1, beta2 = case.betas
    if case.name == "adamw":
        function(gradient, *state, step, *others, LR * changed, beta1, beta2, EPS, DECAY)
    else:
        master, mean, _, weight = state
        function(gradient, master, mean, weight, *others, LR * changed, beta1, beta2, DECAY)


def errors(case: Case, device: str) -> dict[str, float]:
    """Largest error of every tensor after three steps, over its tolerance, which is some roundings of its terms."""
    torch.manual_seed(0)
    module = optimizer if case.name == "adamw" else lion
    one = [None if v is None else torch.tensor([v], device=device) for v in (case.factor, case.found_inf)]
    groups = [torch.tensor([0, case.n // 3], device=device), torch.tensor([1.0, 0.0], device=device)]
    others = [*one, *(groups if case.groups else (None, None))]
    master, mean, square = (torch.randn(case.n, device=device) for _ in range(3))
    weight = master.to(case.dtype) if case.weight else None
    state = [master, mean.mul_(0.1), square.square_(), weight]
    exact = [None if t is None else t.double() for t in state]
    for t in range(case.first, case.first + 3):
        gradient = torch.randn(case.n).to(device, case.dtype)
        apply(
            case, module.KERNEL.function, state, gradient, torch.tensor([float(t)], device=device), others, case.changed
        )
        apply(case, module.reference, exact, gradient.double(), torch.tensor(float(t)), others)
    rounding = {"master": 2**-20, "mean": 2**-21, "square": 2**-21, "weight": 2**-20 + 1.01 * ROUNDING[case.dtype]}
    found = {}
    for (name, tolerance), got, want in zip(rounding.items(), state, exact, strict=True):
        if got is not None:
            size = max(want.abs().max().item(), LR)
            found[name] = (got.double() - want).abs().max().item() / size / tolerance
    return found


def extremes(name: str, device: str) -> bool:
    """Whether gradients of extreme values give what the reference gives in float32, infinities and nans alike."""
    module = optimizer if name == "adamw" else lion
    case, others, step = Case(name, len(EXTREME), torch.float32), [None] * 4, torch.ones(1, device=device)
    gradient = torch.tensor(EXTREME, device=device)
    state = [torch.ones_like(gradient), *(torch.zeros_like(gradient) for _ in range(2)), None]
    expected = [None if t is None else t.clone() for t in state]
    apply(case, module.KERNEL.function, state, gradient, step, others)
    apply(case, module.reference, expected, gradient, step, others)
    pairs = [(a, b) for a, b in zip(state, expected, strict=True) if a is not None]
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-38, equal_nan=True) for a, b in pairs)


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
def test_interpreted_found_inf_leaves_every_bit(name, interpreted):
    assert interpreted[f"skipped {name}"] is True


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
        others = (None,) * 4
        optimizer.adamw(given, *state, None, torch.tensor(t), *others, LR, 0.9, 0.95, EPS, decay)
        assert torch.equal(given, parameter.grad)
    assert torch.equal(state[0], parameter)


def test_groups_decay_as_shards_of_their_own():
    gradient, master = torch.randn(10), torch.randn(10)
    whole = [master.clone(), torch.zeros(10), torch.zeros(10)]
    parts = [master.clone(), torch.zeros(10), torch.zeros(10)]
    starts, decays = torch.tensor([0, 4]), torch.tensor([0.5, 2.0])
    scalars = (LR, 0.9, 0.999, EPS)
    optimizer.adamw(gradient, *whole, None, torch.ones(1), None, None, starts, decays, *scalars, DECAY)
    for span, decay in ((slice(0, 4), 0.5), (slice(4, 10), 2.0)):
        part = [t[span] for t in parts]
        optimizer.adamw(gradient[span], *part, None, torch.ones(1), None, None, None, None, *scalars, DECAY * decay)
    assert torch.equal(whole[0], parts[0])


@pytest.mark.parametrize("name", NAMES)
def test_factor_and_flag(name):
    module, case = (optimizer if name == "adamw" else lion), Case(name, 5, torch.float32)
    gradient, start = torch.randn(5), torch.randn(5)
    factor = torch.tensor(0.5, dtype=torch.float64)
    results = []
    for g, others in ((gradient * 0.5, [None] * 4), (gradient, [factor, torch.zeros(1), None, None])):
        state = [start.clone(), torch.zeros(5), torch.zeros(5), torch.zeros(5, dtype=torch.bfloat16)]
        apply(case, module.KERNEL.function, state, g, torch.ones(1), others)
        assert torch.equal(state[3], state[0].bfloat16())
        results.append(state)
    assert all(map(torch.equal, *results))
    before = [t.clone() for t in results[0]]
    apply(case, module.KERNEL.function, results[0], gradient, torch.ones(1), [None, torch.ones(1), None, None])
    assert all(map(torch.equal, results[0], before))


def test_parameters_that_require_gradients_are_updated():
    parameter = torch.nn.Parameter(torch.ones(3))
    lion.lion(torch.ones(3), parameter, torch.zeros(3), None, None, None, None, None, LR, 0.9, 0.99, 0.0)
    assert torch.equal(parameter, torch.full((3,), 1 - LR)) and parameter.grad_fn is None


FALLBACKS = {
    "float64": (torch.ones(4).double(), torch.ones(4).double()),
    "bfloat16 master": (torch.ones(4).bfloat16(), torch.ones(4).bfloat16()),
    "no elements": (torch.ones(0), torch.ones(0)),
    "strided master": (torch.ones(4), torch.ones(8)[::2]),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_the_kernels_cannot_take_goes_to_the_reference(name, monkeypatch):
    def refuse():
        raise AssertionError("kernels used")

    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("AUTOPART_FORCE_TRITON", "1")
    monkeypatch.setattr(optimizer, "kernels", refuse)
    gradient, master = FALLBACKS[name]
    moments = [torch.zeros_like(master) for _ in range(2)]
    optimizer.adamw(gradient, master, *moments, None, torch.ones(1), *(None,) * 4, LR, 0.9, 0.999, EPS, DECAY)


def test_bytes_moved_counts_every_tensor_once():
    n, half = torch.empty(10, device="meta"), torch.empty(10, device="meta", dtype=torch.bfloat16)
    assert optimizer.bytes_moved(half, n, n, n, half, n[:1]) == (10 * (2 + 24 + 2), 0)
    assert optimizer.bytes_moved(n, n, n, n, None, n[:1]) == (10 * (4 + 24), 0)
    assert lion.bytes_moved(half, n, n, half) == (10 * (2 + 16 + 2), 0)


def test_operators_take_fake_tensors():
    pytest.importorskip("triton")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        state = [torch.empty(5) for _ in range(4)]
        torch.ops.autopart.adamw(*state, None, torch.empty(1), *(None,) * 4, LR, 0.9, 0.999, EPS, DECAY)
        torch.ops.autopart.lion(*state[:3], state[3], *(None,) * 4, LR, 0.9, 0.99, DECAY)


def test_rules_parse():
    assert len(parse(optimizer.KERNEL.rule).inputs) == 10 and len(parse(lion.KERNEL.rule).inputs) == 8


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_ahead_without_spills(capability):
    pytest.importorskip("triton")
    for module in (optimizer, lion):
        for arguments in ({}, {"dtype": torch.float32, "groups": 0}, {"n": 999}):
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


def left_alone(name: str) -> bool:
    """Whether a step with `found_inf` leaves every bit, nans in the gradient notwithstanding."""
    module, case = (optimizer if name == "adamw" else lion), Case(name, 5, torch.float32)
    state = [torch.randn(5) for _ in range(4)]
    before = [t.clone() for t in state]
    others = [None, torch.ones(1), None, None]
    apply(case, module.KERNEL.function, state, torch.full((5,), float("nan")), torch.ones(1), others)
    return all(map(torch.equal, state, before))


def registered() -> bool:
    """Whether torch's checks of operators pass: the schema, and what is mutated."""
    state, step = [torch.rand(5) for _ in range(4)], torch.ones(1)
    scalars = (LR, 0.9, 0.999, EPS, DECAY)
    checks = ("test_schema",)
    torch.library.opcheck(
        torch.ops.autopart.adamw.default, (*state, state[0].bfloat16(), step, *(None,) * 4, *scalars), test_utils=checks
    )
    scalars = (LR, 0.9, 0.99, DECAY)
    arguments = (*state[:3], None, *(None,) * 4, *scalars)
    torch.library.opcheck(torch.ops.autopart.lion.default, arguments, test_utils=checks)
    return True


@pytest.mark.slow
def test_operators_are_registered_as_torch_asks(interpreted):
    assert interpreted["registered"] is True


if __name__ == "__main__":
    found: dict[str, object] = {case.id: errors(case, "cpu") for case in INTERPRETED + WRONG}
    found |= {f"extremes {name}": extremes(name, "cpu") for name in NAMES}
    found |= {f"skipped {name}": left_alone(name) for name in NAMES}
    found["registered"] = registered()
    print(json.dumps(found))
