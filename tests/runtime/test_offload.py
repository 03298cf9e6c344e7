"""Optimizer states on the host: simulated ranks train like one process in plain PyTorch, and what plans say of it.

`test_exact.py` has offload on gloo's ranks, `test_checkpoint.py` checkpoints between plans with and without it.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from on_ranks import on_ranks
from torch import Tensor, nn

import autopart
from autopart.compile.check import worst_error
from autopart.cost.offload import FUSED_ON_HOST
from autopart.cost.training_state import Training
from autopart.errors import PartitionError
from autopart.hardware.mesh import Mesh
from autopart.runtime.compiled import Compiled
from autopart.runtime.offload import FUSED, HostCopies, fused_steps
from autopart.runtime.optimizers import OPTIMIZERS

WIDTH, SAMPLES, STEPS, CLIP = 7, 8, 4, 0.05
LIMIT = 1e-10


class Model(nn.Module):
    """Tied weights, and sizes that slices do not divide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH)
        self.layers[2].weight = self.layers[0].weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = x = x.to(self.up.weight.dtype)
        for layer in self.layers:
            y = y + layer(y).tanh()
        loss: Tensor = (self.down(self.up(y).relu()) - x.roll(1, 1)).square().mean()
        return loss


SETTINGS: dict[str, dict[str, Any]] = {
    "one rank": {},
    **{f"ZeRO {zero}": {"dp": 2, "zero": zero, "micro_batch": 4} for zero in range(4)},
    "tp": {"tp": 2, "constraints": ["split up.weight dim 0 over tp"]},
    "pp": {"pp": 2, "micro_batch": 2},
    "dp and tp, ZeRO 3": {"dp": 2, "tp": 2, "zero": 3, "constraints": ["split up.weight dim 0 over tp"]},
    "dp and pp, ZeRO 2": {"dp": 2, "pp": 2, "zero": 2, "micro_batch": 4},
}


def rows(step: int) -> Tensor:
    return torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups of other settings."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.dim() < 2]}]


def alone(kind: type[torch.optim.Optimizer], **how: Any) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, last gradients before they were clipped, and weights, of plain PyTorch."""
    model = Model()
    optimizer = kind(groups_of(model), **how)  # type: ignore[arg-type]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(rows(step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, gradients, model.state_dict()


def train(compiled: Compiled, kind: Any, how: dict[str, Any]) -> Any:
    """What `alone` gives, on one rank."""
    optimizer = compiled.optimizer(kind(groups_of(compiled.model), **how))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    losses = []
    for step in range(STEPS):
        losses.append(float(compiled.step({"x": rows(step)}, clip_grad_norm=CLIP)))
        scheduler.step()
    devices = {p.device.type for group in optimizer.param_groups for p in group["params"]}
    assert devices <= {"cpu"} and all(group.get("fused") is None for group in optimizer.param_groups)
    return losses, compiled.full_gradients(), compiled.full_state_dict()


def on(settings: dict[str, Any], run: Any, **more: Any) -> Any:
    """Rank 0's result of a program with offload."""
    size = settings.get("dp", 1) * settings.get("tp", 1) * settings.get("pp", 1)
    models: list[nn.Module] = [Model() for _ in range(size)]
    return on_ranks(models, rows(0), run, same=True, nodes=5, **{"offload": "optimizer", **settings, **more})[0]


@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_train_like_one_process(name: str) -> None:
    """With two groups, a schedule of the learning rate and clipping that binds."""
    how = {"lr": 1e-2}
    losses, gradients, state = alone(torch.optim.AdamW, **how)
    found = on(SETTINGS[name], lambda compiled: train(compiled, torch.optim.AdamW, how))
    assert found[0] == pytest.approx(losses, rel=LIMIT, abs=0)
    assert worst_error(found[1], gradients)[0] <= LIMIT
    assert worst_error(found[2], state)[0] <= LIMIT


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adagrad", "rmsprop", "adam"])
def test_every_optimizer(optimizer: str) -> None:
    kind, settings = OPTIMIZERS[optimizer]
    how = {"lr": 1e-2, **settings}
    losses, _, state = alone(kind, **how)
    found = on(SETTINGS["ZeRO 1"], lambda compiled: train(compiled, kind, how))
    assert found[0] == pytest.approx(losses, rel=LIMIT, abs=0)
    assert worst_error(found[2], state)[0] <= LIMIT
    assert (optimizer in FUSED_ON_HOST) == (kind in FUSED)


@pytest.mark.parametrize("name", ["one rank", "ZeRO 1", "ZeRO 2", "ZeRO 3", "tp", "pp"])
def test_master_copies_lie_on_the_host(name: str) -> None:
    """The model computes in float32 and is updated in float64: as the same plan without offload, to the bit."""
    how = {"lr": 1e-2}

    def run(compiled: Compiled) -> Any:
        weights = {weight.dtype for _, weight in compiled.stage.named_parameters()}  # type: ignore[attr-defined]
        return weights, compiled.plan.offload, train(compiled, torch.optim.AdamW, how)

    mixed = {"precision": "float32", "master": "float64"}
    here, there = (on(SETTINGS[name], run, offload=where, **mixed) for where in ("none", "optimizer"))
    assert there[:2] == ({torch.float32}, "optimizer") and here[1] == "none"
    assert {value.dtype for value in there[2][2].values()} == {torch.float64}
    assert there[2][0] == pytest.approx(here[2][0], rel=1e-6)
    for found, wanted in zip(there[2][1:], here[2][1:], strict=True):
        assert worst_error(found, wanted)[0] <= 1e-6


def test_frozen_weights_and_states_of_the_given_optimizer() -> None:
    """The states that an optimizer has already go to the host; a parameter that is in no group stays."""
    plain = Model()
    given = torch.optim.AdamW(plain.layers.parameters(), lr=1e-2)
    plain(rows(0)).backward()
    given.step()
    before = copy.deepcopy((plain.state_dict(), given.state_dict()))
    given.zero_grad()
    plain(rows(1)).backward()
    given.step()

    def run(compiled: Compiled) -> dict[str, Tensor]:
        optimizer = torch.optim.AdamW(compiled.model.layers.parameters(), lr=1e-2)  # type: ignore[union-attr,arg-type]
        optimizer.load_state_dict(before[1])
        compiled.load_state_dict(before[0])
        compiled.optimizer(optimizer)
        compiled.step({"x": rows(1)})
        return compiled.full_state_dict()

    found = on(SETTINGS["ZeRO 3"], run)
    assert worst_error(found, plain.state_dict())[0] <= LIMIT
    assert torch.equal(found["up.weight"], before[0]["up.weight"])


def test_a_chosen_implementation_stays() -> None:
    parameter = nn.Parameter(torch.ones(3))
    for how, wanted in (({}, True), ({"foreach": True}, None), ({"fused": False}, False)):
        optimizer = torch.optim.AdamW([parameter], **how)
        with fused_steps(optimizer):
            assert optimizer.param_groups[0]["fused"] is wanted
        assert optimizer.param_groups[0]["fused"] is how.get("fused")


@pytest.mark.gpu
def test_copies_are_pinned_and_exact_on_a_gpu() -> None:
    share = nn.Parameter(torch.randn(5, 3, device="cuda", dtype=torch.bfloat16))
    share.grad_dtype = torch.float32  # type: ignore[attr-defined]
    share.origin = None  # type: ignore[attr-defined]
    host = HostCopies([share], torch.float32)
    copy_, gradient = host.copy_of[share], torch.randn(5, 3, device="cuda")
    share.grad = gradient
    host.take_gradients()
    assert copy_.is_pinned() and copy_.grad.is_pinned() and torch.equal(copy_.grad, gradient.cpu())
    copy_.data.fill_(1.25)
    host.write_back()
    assert torch.equal(share.detach().cpu(), torch.full((5, 3), 1.25, dtype=torch.bfloat16))


# ---- plans -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zero", "held", "host"), [(0, (2, 4), 16), (1, (2, 4), 2), (2, (2, 0.5), 2), (3, (0.25, 0.5), 2)]
)
def test_bytes_of_a_parameter(zero: int, held: tuple[float, float], host: float) -> None:
    """Of one bfloat16 parameter over 8 ranks, with float32 copies: ZeRO-Offload's 16 bytes on the host."""
    group = Mesh.parse("8:h100-80gb").group(1, 8)
    training = Training("adamw", zero, group, 4, 2.0, True, offload=True)
    assert training.state_bytes(2.0, True, True) == pytest.approx((*held, 0.0))
    assert training.host_bytes(2.0, True, True) == pytest.approx(host)
    assert training.optimizer_workspace(2.0, True, True) == training.host_bytes(2.0, False, True) == 0.0
    shared = Training("adamw", zero, group, 4, 2.0, offload=True, apart=False)
    assert shared.state_bytes(2.0, True, True) == pytest.approx((*held, host))
    assert shared.host_bytes(2.0, True, True) == 0.0


LARGE = {"precision": "bfloat16", "master": "float32", "micro_batch": 1}


def gpu(memory: float, **host: float) -> Mesh:
    """One H100 of less memory; its share of a host may be given."""
    mesh = Mesh.parse("1:h100-80gb")
    assert mesh.device.host is not None
    changed = replace(mesh.device.host, **host)  # type: ignore[arg-type]
    return replace(mesh, device=replace(mesh.device, memory_bytes=int(memory), devices_per_host=1, host=changed))


@pytest.fixture(scope="module")
def llama() -> Any:
    """A Llama that is all parameters: 16 bytes of states for each would be most of its memory."""
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    return model, {"input_ids": torch.zeros(1, 16, dtype=torch.long), "labels": torch.zeros(1, 16, dtype=torch.long)}


def test_the_planner_takes_the_host_where_memory_binds(llama: Any) -> None:
    """A parameter takes 6 bytes on the device with offload, 18 without."""
    model, batch = llama
    count = sum(p.numel() for p in model.parameters())
    plan = autopart.plan(model, gpu(15 * count), batch, **LARGE)
    assert plan.offload == "optimizer" and plan.fits and plan.search is not None and plan.search.limit == "memory"
    (stage,) = plan.stages
    assert (stage.memory["optimizer"], stage.host_bytes) == (0.0, 16 * count)
    assert "ZeRO 0, optimizer on the host" in str(plan).replace("\n  ", " ") and "; on the host " in str(plan)
    autopart.certify(plan, model, batch)
    again = autopart.Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert autopart.price_plan(again, model, batch).step_seconds == pytest.approx(plan.step_seconds)
    edited = replace(plan, stages=(replace(stage, host_bytes=stage.host_bytes // 2),))
    with pytest.raises(PartitionError, match="on the host are"):
        autopart.certify(edited, model, batch)
    roomy = autopart.plan(model, gpu(40 * count), batch, **LARGE)
    assert roomy.offload == "none" and roomy.step_seconds < plan.step_seconds


@pytest.mark.slow
def test_what_the_host_lacks_is_named(llama: Any) -> None:
    model, batch = llama
    count = sum(p.numel() for p in model.parameters())
    with pytest.raises(PartitionError, match=r'what fits: offload="optimizer"'):
        autopart.plan(model, gpu(15 * count), batch, offload="none", **LARGE)
    with pytest.raises(PartitionError, match="on the host"):
        autopart.plan(model, gpu(15 * count, memory_bytes=8 * count), batch, offload="optimizer", **LARGE)
    estimate = autopart.estimate(model, gpu(15 * count, memory_bytes=8 * count), batch, offload="optimizer", **LARGE)
    assert not estimate.plan.fits


def test_the_price_of_a_step_on_the_host(llama: Any) -> None:
    """Of p bfloat16 parameters: 4 p bytes down, 2 p up; AdamW moves 28 p on the host, the cast 6 p."""
    model, batch = llama
    count = sum(p.numel() for p in model.parameters())
    slow = {"link": 1e9, "bandwidth": 1e9, "copied": 1.0, "updated": 1.0}
    plan, fast = (
        autopart.plan(model, gpu(1e11, **rates), batch, offload="optimizer", **LARGE)
        for rates in (slow, {**slow, "link": 1e15, "bandwidth": 1e15})
    )
    assert plan.step_seconds - fast.step_seconds == pytest.approx((6 + 34) * count / 1e9, rel=1e-3)


def test_offload_can_be_forced_and_forbidden(llama: Any) -> None:
    model, batch = llama
    why = autopart.explain(model, gpu(1e11), batch, **LARGE)
    assert why.plan.offload == "none"
    assert "slower" in str(why.why_not("offload=optimizer")) or "+" in str(why.why_not("offload=optimizer"))
    forced = autopart.plan(model, gpu(1e11), batch, constraints=["offload=optimizer"], **LARGE)
    assert forced.offload == "optimizer"
    with pytest.raises(PartitionError, match="offload"):
        autopart.plan(model, gpu(1e11), batch, offload="parameters", **LARGE)


def test_an_unknown_host_is_refused(llama: Any) -> None:
    model, batch = llama
    mesh = gpu(1e11)
    mesh = replace(mesh, device=replace(mesh.device, host=None))
    with pytest.raises(PartitionError, match="host of h100-80gb is not known"):
        autopart.plan(model, mesh, batch, offload="optimizer", **LARGE)
    assert autopart.plan(model, mesh, batch, **LARGE).offload == "none"
