"""Checkpoints: any plan reads what any other wrote, and nothing half-written is taken for good."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from checkpoint_worker import CHAINS, STEPS, Odd, train_chains
from on_ranks import on_ranks
from ranks import run_apart
from torch import Tensor, nn

import autopart
from autopart.errors import PartitionError
from autopart.runtime.checkpoint import dcp, files
from autopart.runtime.checkpoint.contents import Entries, StageSummary, written_here
from autopart.runtime.checkpoint.rectangles import rectangles
from autopart.runtime.compiled import Compiled
from autopart.runtime.groups import Groups
from autopart.runtime.parameters import fill, weight, weight_slice
from autopart.runtime.process_group import Group

pytestmark = pytest.mark.usefixtures("traced_once")

LIMIT = {"gpt2": 1e-12, "odd": 1e-5, "mixed": 5e-2, "norm": 1e-5}
"""Relative error of losses against an uninterrupted run."""


# ---- several processes -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the worker left what it trained."""
    folder = tmp_path_factory.mktemp("checkpoints")
    assert run_apart(train_chains, folder) == 0
    return folder


@pytest.mark.processes
@pytest.mark.parametrize("name", CHAINS)
def test_any_plan_goes_on_from_any_other(trained: Path, name: str) -> None:
    legs = [json.loads((trained / name / f"{leg}.json").read_text()) for leg in range(len(CHAINS[name]))]
    for before, after in itertools.pairwise(legs):
        assert after[0] == pytest.approx(before[-1], rel=LIMIT[name], abs=0)
    found = [loss for leg in legs for loss in leg[:STEPS]] + legs[-1][STEPS:]
    assert found == pytest.approx(json.loads((trained / name / "alone.json").read_text()), rel=LIMIT[name], abs=0)


def whole(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint as torch.distributed.checkpoint reads them by itself, each in one piece."""
    tensors = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in dcp.tensors(folder).items()}
    torch.distributed.checkpoint.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", CHAINS)
def test_what_a_plan_loads_is_what_another_saved(trained: Path, name: str) -> None:
    """To the bit; of float32 to bfloat16, the nearest."""
    for leg in range(1, len(CHAINS[name])):
        saved, again = (whole(files.folder_of(f, STEPS * leg)) for f in (trained / name, trained / name / "again"))
        assert saved.keys() == again.keys()
        assert {key.split("/")[1] for key in saved if key.startswith("optimizer/")} == {"exp_avg", "exp_avg_sq"}
        for key, value in again.items():
            kind = saved[key].dtype
            if name == "mixed" and key != "model/seen":
                kind = torch.float32 if CHAINS[name][leg][1].get("master") else torch.bfloat16
            assert value.dtype == kind, (leg, key)
            assert torch.equal(value, saved[key].to(value.dtype)), (leg, key)


@pytest.mark.processes
def test_a_full_disk_on_one_rank(trained: Path) -> None:
    for rank in range(2):
        found = json.loads((trained / "full" / f"{rank}.json").read_text())
        assert found["error"].startswith(f"the checkpoint cannot be written to {trained / 'full'}"), found
        assert "rank 1: " in found["error"] and "rank 0" not in found["error"]
        assert found["left"] == [] and found["step"] == 2 and found["after"] == ["step-00000002"], found


# ---- rectangles ------------------------------------------------------------------------------------------


def groups_at(dp: int, tp: int, rank: int) -> Groups:
    """The groups of a rank that communicates with nobody."""
    one = Group("one", 1, 0)
    along = Group("pp", 1, 0), Group("dp", dp, rank // tp), Group("tp", tp, rank % tp)
    return Groups(*along, torch.device("cpu"), one, one, one, shard=along[1], replicas=Group("replicas", 1, 0))


def drawn_placement(draw: random.Random, dp: int, tp: int) -> tuple[list[int], dict[str, str], bool]:
    """A shape, its placement over both axes, and whether it lies in slices over dp."""
    shape = [draw.randint(1, 5) for _ in range(draw.randint(0, 4))]
    placed, kinds = {"dp": draw.choice("RC"), "tp": draw.choice("RC")}, ["tp"] + ["dp"] * draw.randint(0, 1)
    for axis in kinds:
        if shape and draw.random() < 0.7:
            dim = draw.randrange(len(shape))
            if any(text[1:2] == str(dim) for text in placed.values()):
                continue
            parts = [draw.randint(1, 3) * {"dp": dp, "tp": tp}[axis] for _ in range(draw.randint(1, 3))]
            shape[dim] = sum(parts)
            placed[axis] = f"S{dim}" + (f"[{'+'.join(map(str, parts))}]" if len(parts) > 1 else "")
    return shape, placed, placed["dp"] in "RC" and draw.random() < 0.6


@pytest.mark.parametrize("seed", range(8))
def test_rectangles_of_all_ranks_are_the_tensor(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(25):
        dp, tp = draw.choice([1, 2, 3, 5]), draw.choice([1, 2, 3])
        shape, placed, sliced = drawn_placement(draw, dp, tp)
        whole = torch.randn(shape)
        written = torch.zeros(shape)
        for rank in range(dp * tp):
            groups = groups_at(dp, tp, rank)
            share = (weight_slice if sliced else weight)(groups, "w", shape, **placed)
            fill([share], groups, {"w": whole})
            again = torch.zeros_like(share)
            for (offsets, values), (_, into) in zip(
                rectangles(share, share.origin, groups), rectangles(again, share.origin, groups), strict=True
            ):
                at = tuple(slice(o, o + s) for o, s in zip(offsets, values.shape, strict=True))
                assert torch.equal(values, whole[at])
                into.copy_(whole[at])
            assert torch.equal(again, share), (shape, placed, sliced)
            entries: Entries = {"model/w": (share, share.origin)}
            for shards in written_here(entries, groups, [StageSummary(0, frozenset(entries))]).values():
                for offsets, values in shards.at.items():
                    written[tuple(slice(o, o + s) for o, s in zip(offsets, values.shape, strict=True))] += 1
        assert (written == 1).all(), (shape, placed, sliced, dp, tp)


# ---- one process -----------------------------------------------------------------------------------------


def compiled_odd(model: nn.Module | None = None) -> Compiled:
    """A program of one process with an optimizer, before its first step."""
    torch.manual_seed(0)
    compiled = autopart.compile(model or Odd(), "1:cpu", {"x": torch.randn(8, 8)}, nodes=5, seed=1)
    compiled.optimizer(torch.optim.AdamW, lr=1e-2)
    return compiled


def step(compiled: Compiled, times: int = 1) -> float:
    """Steps on data that depends on the step's number; the last loss."""
    for _ in range(times):
        random = torch.Generator().manual_seed(compiled.groups.rng.step)
        loss = float(compiled.step({"x": torch.randn(8, 8, generator=random)}))
    return loss


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())


@pytest.fixture(scope="module")
def program() -> Compiled:
    """One program for the tests that do not mind where it stands."""
    return compiled_odd()


@pytest.fixture
def saved(program: Compiled, tmp_path: Path) -> Iterator[tuple[Compiled, Path, dict[int, dict[str, Tensor]]]]:
    """A program with checkpoints of two steps in a folder, and the weights of both."""
    states = {}
    for _ in range(2):
        step(program)
        program.save(tmp_path)
        states[program.groups.rng.step] = program.full_state_dict()
    return program, tmp_path, states


Saved = tuple[Compiled, Path, dict[int, dict[str, Tensor]]]


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    compiled = compiled_odd()
    scheduler = torch.optim.lr_scheduler.StepLR(compiled.executor.optimizer, 1)
    step(compiled, 2)
    scheduler.step()
    extra = {"position": (3, [4]), "mean": torch.tensor([1.0, 2.0]), "best": float("inf"), 5: None}
    assert compiled.save(tmp_path, scheduler=scheduler, extra=extra) == tmp_path / "step-00000002"
    wanted = [step(compiled) for _ in range(3)]
    other = compiled_odd()
    other.groups.rng.seed = 99
    assert other.executor.optimizer.param_groups[0]["lr"] == 1e-2
    mine = torch.optim.lr_scheduler.StepLR(other.executor.optimizer, 1)
    found = other.load(tmp_path, scheduler=mine)
    assert torch.equal(found.pop("mean"), extra.pop("mean")) and found == extra
    assert other.executor.optimizer.param_groups[0]["lr"] == 1e-3 and mine.last_epoch == 1
    assert isinstance(other.executor.optimizer.param_groups[0]["betas"], tuple)
    assert [step(other) for _ in range(3)] == wanted
    assert autopart.Plan.load(tmp_path / "step-00000002" / "plan.json") == compiled.plan


def test_later_steps_do_not_leak_into_a_checkpoint_that_is_being_written(tmp_path: Path) -> None:
    compiled = compiled_odd()
    step(compiled, 2)
    wanted, written = compiled.full_state_dict(), threading.Event()
    compiled._checkpoints.pool.submit(written.wait)  # what is saved is written after this
    extra = {"position": torch.zeros(2)}
    compiled.save(tmp_path, extra=extra, wait=False)
    extra["position"] += 1
    losses = [step(compiled) for _ in range(2)]
    assert not list(tmp_path.iterdir()) and not same(wanted, compiled.full_state_dict())
    written.set()
    compiled.wait_saved()
    assert torch.equal(compiled.load(tmp_path)["position"], torch.zeros(2))
    assert same(wanted, compiled.full_state_dict())
    assert [step(compiled) for _ in range(2)] == losses


def test_the_next_save_raises_the_error_of_one_in_the_background(program: Compiled, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    program.save(tmp_path / "file" / "under", wait=False)
    with pytest.raises(PartitionError, match=r"cannot be written to .*/file/under\n.*rank 0: NotADirectoryError"):
        program.save(tmp_path)
    program.save(tmp_path)
    program.wait_saved()


def damage(file: Path, how: str) -> None:
    if how == "missing":
        file.unlink()
        return
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content if how == "bit" else content[: len(content) // 2])


@pytest.mark.parametrize("how", ["bit", "truncated", "missing"])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.pt", "plan.json", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_passed_over(saved: Saved, name: str, how: str) -> None:
    compiled, folder, states = saved
    first, last = sorted(states)
    damage(files.folder_of(folder, last) / name, how)
    named = "" if name == "manifest.json" else name  # in a manifest a bit may name any file
    with pytest.raises(PartitionError, match=f"step-0*{last} is damaged\n.*{named}"):
        compiled.load(files.folder_of(folder, last))
    assert same(compiled.full_state_dict(), states[last])
    with pytest.warns(UserWarning, match=f"step-0*{last} is damaged: .*{named}"):
        compiled.load(folder)
    assert compiled.groups.rng.step == first and same(compiled.full_state_dict(), states[first])
    damage(files.folder_of(folder, first) / name, how)
    with warnings.catch_warnings(), pytest.raises(PartitionError, match=r"no checkpoint in .*\n.*all 2 are damaged"):
        warnings.simplefilter("ignore")
        compiled.load(folder)


def test_older_checkpoints_go(program: Compiled, tmp_path: Path) -> None:
    (tmp_path / ".step-00000099.tmp").mkdir()
    (tmp_path / "notes").mkdir()
    last = program.groups.rng.step
    for _ in range(4):
        step(program)
        program.save(tmp_path, keep=3)
    names = [f"step-{last + i:08d}" for i in (2, 3, 4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", *names]
    program.load(tmp_path / names[0])
    program.save(tmp_path, keep=1)  # keeps those of later steps
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", *names]
    with pytest.raises(PartitionError, match="keep=0"):
        program.save(tmp_path, keep=0)


def crash(compiled: Compiled, folder: Path, at: int) -> bool:
    """Save in a fork that ends without a word before its change number `at` of the files; whether it came to its
    end."""
    child = os.fork()
    if child == 0:
        left = at

        def hook(event: str, arguments: Any) -> None:
            nonlocal left
            changes = event in ("os.rename", "os.mkdir", "os.rmdir")
            if (changes or (event == "open" and "w" in str(arguments[1]))) and str(folder) in str(arguments):
                left -= 1
                if left == 0:
                    os._exit(1)

        sys.addaudithook(hook)
        try:
            compiled.save(folder, keep=1)
        except BaseException:
            os._exit(2)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 1)
    return status == 0


@pytest.mark.slow
def test_a_crash_at_any_moment_leaves_a_good_checkpoint(program: Compiled, tmp_path: Path) -> None:
    folder, beside = tmp_path / "crashed", tmp_path / "beside"
    step(program)
    program.save(folder)
    old, before = program.groups.rng.step, program.full_state_dict()
    step(program)
    program.save(beside)
    new, after = program.groups.rng.step, program.full_state_dict()
    steps = []
    for least in (old, new):  # a new checkpoint, then one in place of the same step's
        at = 1
        while True:
            ended = crash(program, folder, at)
            program.load(folder)
            steps.append(program.groups.rng.step)
            assert steps[-1] >= least and same(program.full_state_dict(), after if steps[-1] == new else before)
            if steps[-1] == old:
                program.load(beside)
            if ended:
                break
            at += 1
        assert at > 8
    assert steps == sorted(steps) and {old, new} == set(steps)
    assert [path.name for path in folder.iterdir()] == [f"step-{new:08d}"]


def refused(work: Callable[[], Any]) -> str:
    with pytest.raises(PartitionError) as caught:
        work()
    return str(caught.value)


class Other(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(7, 2))


def test_what_does_not_fit_is_refused(saved: Saved, tmp_path: Path) -> None:
    compiled, folder, states = saved
    other = compiled_odd(Other())
    step(other)
    before = other.full_state_dict()
    text = refused(lambda: other.load(folder))
    assert "gain has shape [7, 3] in the checkpoint and has shape [7, 2] in the model" in text
    assert same(other.full_state_dict(), before)
    compiled.optimizer(torch.optim.SGD, lr=1e-2)
    assert "has states of AdamW, and the optimizer is SGD" in refused(lambda: compiled.load(folder))
    scheduler = torch.optim.lr_scheduler.StepLR(compiled.executor.optimizer, 1)
    assert "no scheduler" in refused(lambda: compiled.load(folder, scheduler=scheduler))
    assert "no checkpoint in" in refused(lambda: compiled.load(folder / "nowhere"))
    for extra, named in ((lambda: 0, "extra"), ({"x": Path()}, "extra"), (Path(), "extra")):
        assert f"cannot hold this {named}" in refused(lambda extra=extra: compiled.save(folder, extra=extra))
    compiled.executor.optimizer = None
    with pytest.warns(UserWarning, match="states were not loaded; call compiled.optimizer first"):
        compiled.load(folder)
    assert same(compiled.full_state_dict(), states[max(states)])
    compiled.save(tmp_path / "without")
    compiled.optimizer(torch.optim.AdamW, lr=1e-2)
    compiled.load(tmp_path / "without")
    compiled.load(folder)


def test_states_of_other_shapes_are_refused(tmp_path: Path) -> None:
    compiled = compiled_odd()
    compiled.optimizer(torch.optim.Adafactor)
    step(compiled)
    assert "the state row_var of Adafactor cannot be saved" in refused(lambda: compiled.save(tmp_path))


def test_param_groups_are_matched_by_names(saved: Saved) -> None:
    compiled, folder, _ = saved
    named = dict(compiled.model.named_parameters())
    gain = named.pop("gain")
    groups = [{"params": [gain], "weight_decay": 0.5}, {"params": list(named.values())}]
    compiled.optimizer(torch.optim.AdamW(groups, lr=1e-2))
    step(compiled)
    compiled.save(folder)
    optimizer = compiled.optimizer(torch.optim.AdamW(groups[::-1], lr=1e-3))
    compiled.load(folder)
    assert [(group["weight_decay"], group["lr"]) for group in optimizer.param_groups] == [(0.01, 1e-2), (0.5, 1e-2)]
    assert len(optimizer.state) == 1 + len(named)
    compiled.optimizer(torch.optim.AdamW, lr=1e-2)
    assert "other param groups than the checkpoint" in refused(lambda: compiled.load(folder))


def test_gradients_that_wait_are_not_saved(saved: Saved) -> None:
    compiled, folder, states = saved
    compiled.backward({"x": torch.ones(8, 8)})
    assert "gradients wait for an update" in refused(lambda: compiled.save(folder))
    compiled.load(folder)
    assert "there are no gradients" in refused(compiled.update)
    assert same(compiled.full_state_dict(), states[max(states)])


class _Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


def test_metadata_runs_no_code(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, folder, states = saved
    monkeypatch.chdir(folder)
    last = files.folder_of(folder, max(states))
    for name, content in ((dcp.METADATA, pickle.dumps(_Evil())), (files.STATE, pickle.dumps(_Evil()))):
        (last / name).write_bytes(content)
        manifest = {**files.read_manifest(last), name: files.digest(last / name)}
        (last / files.MANIFEST).write_text(json.dumps(manifest))
        assert f"the checkpoint {last} cannot be read" in refused(lambda: compiled.load(last))
        assert not Path("evil").exists()


def test_simulated_ranks_are_refused(tmp_path: Path) -> None:
    found = on_ranks(
        [Odd()] * 2, torch.randn(8, 8), lambda compiled: refused(lambda: compiled.save(tmp_path)), dp=2, nodes=5
    )
    assert all("simulated ranks have no checkpoints" in text for text in found)
