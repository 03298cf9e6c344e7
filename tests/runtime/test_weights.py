"""Weights of a model on meta from a folder or by its own initialisation; trained weights into folders and models."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Mlp, batch_for, build
from ranks import run_apart
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from weights_worker import on_meta, same, train_all

import autopart
from autopart.compile.given_weights import given_weights
from autopart.compile.programs import programs
from autopart.errors import PartitionError
from autopart.frontend.initial_values import InitialValues
from autopart.hardware.mesh import Mesh
from autopart.passes.source import Source
from autopart.planner.make_plan import make_plan, request_of
from autopart.runtime.compiled import Compiled
from autopart.runtime.groups import Groups
from autopart.runtime.parameters import Origin, share_of
from autopart.runtime.share_reader import read_share
from autopart.runtime.simulated import run_simulated
from autopart.runtime.weight_files import size_of
from autopart.runtime.weight_folder import WeightFolder
from autopart.sharding.notation import Placement

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("weights")
    assert run_apart(train_all, folder) == 0
    return folder, json.loads((folder / "found.json").read_text())


@pytest.mark.processes
def test_four_processes_from_a_folder_and_back(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    """GPT-2 whose tied weights lie on two stages, from transformers' files into transformers' files."""
    folder, (found, _) = ranks
    assert found.pop("files")[-2:] == ["model-00004-of-00004.safetensors", "model.safetensors.index.json"]
    assert found == {"in": True, "out": True, "synced": True, "generated": 6}
    left = [int((folder / f"on_meta_{rank}").read_text()) for rank in range(4)]
    assert left[0] == left[3] == 0 and left[1] == left[2] > 0
    assert 0 < float((folder / "loss").read_text()) < 10


@pytest.mark.processes
def test_four_processes_by_initialisation(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    """Llama under ZeRO 3 with float32 slices has the values that one process gives by name."""
    assert ranks[1][1] == {"init": True, "float32": True, "bfloat16": True, "dtype": "bfloat16"}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_share_is_read_as_it_is_cut(data: st.DataObject) -> None:
    """Placements of two axes over any dims, in parts, in flat slices over dp: of every rank."""
    dp, tp = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    dims = data.draw(st.integers(1, 3))
    parts = data.draw(st.lists(st.integers(1, 3), max_size=3))
    shape = [data.draw(st.integers(1, 3)) * dp * tp for _ in range(dims)]
    dim = data.draw(st.integers(0, dims - 1))
    if parts:
        shape[dim] = sum(parts) * tp
    sliced = data.draw(st.booleans())
    other = "C" if sliced or parts else data.draw(st.sampled_from(["R", "S0"]))
    placed = {"dp": Placement.parse(other), "tp": Placement("S", dim, tuple(p * tp for p in parts))}
    origin, whole = Origin("w", tuple(shape), placed, sliced), torch.randn(shape)
    for rank in range(dp * tp):
        axes = {"dp": SimpleNamespace(size=dp, rank=rank // tp), "tp": SimpleNamespace(size=tp, rank=rank % tp)}
        groups: Any = SimpleNamespace(**axes, along=axes.__getitem__, shard=axes["dp"])
        assert torch.equal(read_share(whole, origin, groups), share_of(whole, origin, groups))


class Tied(nn.Module):
    """Tied weights in the first and the last layer, an unused layer, a buffer that training changes, one on no file."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.last.weight = self.first.weight
        self.unused = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(8)
        self.angles = Angles(8, 10.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.second(self.first(x).relu())) * self.angles.cos
        loss: Tensor = self.last(x.relu()).square().mean()
        return loss


class Angles(nn.Module):
    """A table that is in no state dict, of arguments that the module keeps."""

    def __init__(self, size: int, base: float) -> None:
        super().__init__()
        self.size, self.base = size, base
        self.register_buffer("cos", (torch.arange(size) / base).cos(), persistent=False)


def simulate(weights: str | Path, run: Any, **asked: Any) -> list[Any]:
    """Call `run` with the program of every simulated rank of `Tied` on meta with these weights."""
    with torch.device("meta"):
        model = Tied()
    traced = given_weights(model, weights, 0).model
    request = request_of(traced, {"x": X}, nodes=5, micro_batch=4, **asked)
    size = asked.get("pp", 1) * asked.get("dp", 1) * asked.get("tp", 1)
    source = Source(traced, {"x": X}, torch.float32)
    plan = make_plan(source, Mesh.of(f"{size}:cpu"), request, to_run=True)
    layered = source.full(plan.micro_batch, plan.mesh)
    stages = programs(layered, plan)

    def one(groups: Groups) -> Any:
        found = given_weights(model, weights, 0)
        find = found.loading(layered.traced.buffers, 0)
        buffers = layered.traced.buffers
        stage = stages[groups.pp.rank]
        compiled = Compiled(model, plan, groups, stage, layered.traced.aliases, buffers, {"x": X}, find=find)
        compiled.unused_tensors = found.unused({"first.weight"})
        return run(compiled)

    return run_simulated(plan.pp, plan.dp, plan.tp, one, plan.shard_size)


@pytest.mark.parametrize(
    "asked",
    [
        {"pp": 2},
        {"tp": 2, "constraints": ["split first.weight dim 0 over tp"]},
        *({"dp": 2, "zero": zero} for zero in range(4)),
        {"dp": 2, "zero": 2, "master": "float64"},
        {"pp": 2, "dp": 2, "zero": 3, "master": "float64"},
    ],
    ids=str,
)
def test_every_plan_reads_trains_and_writes_the_same(asked: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied()
    save_file({n: t.clone() for n, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    torch.manual_seed(9)
    models = [Tied() for _ in range(4)]

    def run(compiled: Compiled) -> list[dict[str, Tensor]]:
        compiled.save_pretrained(tmp_path / "in")
        compiled.optimizer(torch.optim.SGD, lr=0.1)
        compiled.step({"x": X})
        compiled.save_pretrained(tmp_path / "out", max_shard_size=300, dtype=asked.get("master"))
        compiled.sync_to(models[compiled.rank])
        states = [compiled.full_state_dict()]
        compiled.step({"x": X})
        states.append(compiled.full_state_dict())
        compiled.load_pretrained(tmp_path / "out")
        return [*states, compiled.full_state_dict()]

    state, later, loaded = simulate(tmp_path, run, **asked)[0]
    assert same(to(loaded, asked), to(state, asked))
    assert not torch.equal(later["first.weight"], state["first.weight"])
    assert same(load_file(tmp_path / "in" / "model.safetensors"), dict(model.state_dict()))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {name: load_file(tmp_path / "out" / name) for name in set(index["weight_map"].values())}
    assert same({name: files[file][name] for name, file in index["weight_map"].items()}, to(state, asked))
    assert not torch.equal(state["first.weight"].float(), model.first.weight)
    assert not torch.equal(state["norm.running_mean"], model.norm.running_mean)
    for other in models[: asked.get("pp", 1) * asked.get("dp", 1) * asked.get("tp", 1)]:
        assert all(torch.equal(t, state[n].to(t.dtype)) for n, t in other.state_dict().items())


def to(state: dict[str, Tensor], asked: dict[str, Any]) -> dict[str, Tensor]:
    """A state with its parameters, of which the unused ones have no master copy, in the master dtype."""
    dtype = getattr(torch, asked.get("master", "float32"))
    buffers = dict(Tied().named_buffers())
    return {name: value if name in buffers else value.to(dtype) for name, value in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_files_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model, batch = build(name, layers=1)
    model.save_pretrained(tmp_path / "theirs")
    compiled = autopart.compile(model, "1:cpu", batch, micro_batch=len(batch["labels"]), nodes=5)
    compiled.save_pretrained(tmp_path / "own")
    assert same(*(load_file(tmp_path / who / "model.safetensors") for who in ("own", "theirs")))
    for file in (tmp_path / "theirs").glob("*.json"):
        assert (tmp_path / "own" / file.name).read_text() == file.read_text()
    again = autopart.compile(on_meta(model), "1:cpu", batch, plan=compiled.plan, weights=tmp_path / "own")
    assert torch.equal(again.step(batch), compiled.step(batch))
    assert same(again.full_state_dict(), dict(model.state_dict()))
    prefix = model.base_model_prefix + "."
    bare = {n.removeprefix(prefix): t for n, t in load_file(tmp_path / "own" / "model.safetensors").items()}
    save_file(bare, tmp_path / "model.safetensors")
    folder = WeightFolder(tmp_path, on_meta(model))
    assert all(torch.equal(folder.find(n)[...], p) for n, p in model.named_parameters())


def test_experts_lie_in_files_as_transformers_has_them(tmp_path: Path) -> None:
    """A Mixtral fuses a checkpoint's experts as it is loaded; a rank reads them from the checkpoint's own names."""
    import transformers as hf

    config = hf.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1,
        num_local_experts=3, vocab_size=32,
    )  # fmt: skip
    model = hf.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "theirs")
    ids = torch.arange(8).view(2, 4)
    compiled = autopart.compile(
        on_meta(model), "1:cpu", {"input_ids": ids, "labels": ids}, weights=tmp_path / "theirs", seed=0
    )
    assert same(compiled.full_state_dict(), dict(model.state_dict()))
    compiled.save_pretrained(tmp_path / "own")
    own, theirs = (load_file(tmp_path / who / "model.safetensors") for who in ("own", "theirs"))
    assert same(own, theirs) and any("experts.2.w1" in name for name in own)


def written(folder: Path, **tensors: Tensor | None) -> Path:
    """A folder with the weights of `Mlp`, and others in place of some; None: without it."""
    state = {name: t.clone() for name, t in Mlp().state_dict().items()}
    state |= {name.replace("__", "."): t for name, t in tensors.items()}
    save_file({name: t for name, t in state.items() if t is not None}, folder / "model.safetensors")
    return folder


def compile_mlp(weights: Any) -> Compiled:
    with torch.device("meta"):
        model = Mlp()
    return autopart.compile(model, "1:cpu", batch_for("mlp", torch.float32), weights=weights)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"head__bias": None}, "lacks head.bias"),
        ({"tail": torch.zeros(1)}, "has tail, which the model has not"),
        ({"head__bias": torch.zeros(9)}, "has head.bias of shape [9], the model of [8]"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tensors: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(PartitionError) as caught:
        compile_mlp(written(tmp_path, **tensors))
    assert told in str(caught.value) and caught.value.why and caught.value.try_


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PartitionError, match="cannot read the weights"):
        compile_mlp(tmp_path)
    file = written(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(PartitionError, match="cannot read the weights"):
        compile_mlp(tmp_path)


def test_a_model_on_meta_needs_weights() -> None:
    with pytest.raises(PartitionError) as caught:
        compile_mlp(None)
    assert 'weights="init"' in str(caught.value)


def test_tied_weights_of_two_values_are_refused(tmp_path: Path) -> None:
    state = {name: t.clone() for name, t in Tied().state_dict().items()}
    state["last.weight"] += 1
    save_file(state, tmp_path / "model.safetensors")
    folder = WeightFolder(tmp_path, Tied())
    with pytest.raises(PartitionError, match=r"other values for last\.weight than for first\.weight"):
        folder.find("first.weight")


def test_a_file_may_have_a_tied_weight_under_any_name(tmp_path: Path) -> None:
    state = {name: t.clone() for name, t in Tied().state_dict().items()}
    wanted = state.pop("first.weight")
    save_file(state, tmp_path / "model.safetensors")
    assert torch.equal(WeightFolder(tmp_path, Tied()).find("first.weight")[...], wanted)


class Bare(nn.Module):
    """A parameter and a buffer that nothing makes again."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("shift", torch.arange(8.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = (self.linear(x) * self.scale + self.shift).square().mean()
        return loss


def test_what_has_no_value_is_named() -> None:
    with torch.device("meta"):
        model = Bare()
    with pytest.raises(PartitionError, match="the buffer shift has no value"):
        autopart.compile(model, "1:cpu", {"x": X}, weights="init")
    model.shift = torch.arange(8.0)
    with pytest.raises(PartitionError, match="nothing initialises scale of Bare"):
        autopart.compile(model, "1:cpu", {"x": X}, weights="init")


@pytest.mark.parametrize("name", ["gpt2", "vit", "t5"])
def test_initial_values_are_spread_as_the_models_own(name: str) -> None:
    """GPT-2's model scales output projections of its blocks, torch.nn.init skips a ViT's tensors on meta."""
    torch.manual_seed(3)
    own = build(name)[0]
    initial, again, other = (InitialValues(on_meta(own), seed) for seed in (5, 5, 6))
    for parameter, value in own.named_parameters():
        found = initial.find(parameter)
        assert torch.equal(found, again.find(parameter))
        if value.numel() >= 256 and value.std() > 0:
            assert float(found.std()) == pytest.approx(float(value.detach().std()), rel=0.25), parameter
            assert not torch.equal(found, other.find(parameter))
        elif value.numel() > 1 and value.std() == 0:
            assert torch.equal(found, value), parameter


def test_the_models_own_random_numbers_stay() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    compile_mlp("init")
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_of_a_folder_replace_a_models_own(tmp_path: Path) -> None:
    model, batch = build("mlp")
    own = {name: t.clone() for name, t in model.state_dict().items()}
    folder = written(tmp_path, layers__2__weight=None, layers__2__bias=None)
    compiled = autopart.compile(model, "1:cpu", batch, weights=folder)
    assert same(compiled.full_state_dict(), load_file(folder / "model.safetensors"))
    assert same(dict(model.state_dict()), own)
    compiled.sync_to(model)
    assert same(dict(model.state_dict()), load_file(folder / "model.safetensors"))
    compiled.step(batch)


def test_loaded_weights_that_no_stage_has_are_kept() -> None:
    torch.manual_seed(0)
    model = Tied()
    compiled = autopart.compile(model, "1:cpu", {"x": X}, micro_batch=4)
    state = {name: t + 1 for name, t in model.state_dict().items()}
    compiled.load_state_dict(state)
    assert same(compiled.full_state_dict(), state)


@pytest.mark.parametrize(("given_size", "size"), [(7, 7), ("2KB", 2000), ("1.5 GiB", 3 * 2**29), ("5gb", 5 * 10**9)])
def test_sizes_of_files(given_size: Any, size: int) -> None:
    assert size_of(given_size) == size


@pytest.mark.parametrize("given_size", ["", "5XB", 0, "GB"])
def test_what_is_no_size_is_refused(given_size: Any) -> None:
    with pytest.raises(PartitionError, match="max_shard_size"):
        size_of(given_size)
