"""autopart.Trainer: transformers.Trainer's logs, weights, predictions and checkpoints, on a mesh."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import trainer_worker
import transformers as hf
from ranks import run_apart
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trainer_worker import SETTINGS, arguments

import autopart
from autopart.compile.trainer.arguments import LAUNCH_VARIABLES, REFUSED, check_arguments
from autopart.compile.trainer.batches import nested
from autopart.errors import PartitionError

LIMIT = 1e-5
"""Relative error in float32."""
RUNS = [
    pytest.param(case, name, id=f"{case}-{name}", marks=pytest.mark.xdist_group(f"trainer of {case}"))
    for case, settings in SETTINGS.items()
    for name in ("whole", "resumed")[: len(settings)]
]

Run = tuple[dict[str, Any], dict[str, Any]]


def told(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Logs without what is measured by the clock."""
    return [{k: v for k, v in row.items() if not k.endswith(("runtime", "_per_second"))} for row in history]


def alike(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= LIMIT * wanted.abs().max()


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """What a run told, and its tensors. The runs of a case are made when the first of them is asked for."""

    @cache
    def folder_of(case: str, who: str) -> Path:
        folder = tmp_path_factory.mktemp(f"{case}-{who}")
        status = run_apart(getattr(trainer_worker, who), case, folder)
        assert status == 0, folder.with_suffix(".txt").read_text()[-4000:]
        return folder

    def read(case: str, who: str, name: str, rank: int = 0) -> Run:
        path = folder_of(case, who) / name
        return json.loads((path / f"{rank}.json").read_text()), torch.load(path / f"{rank}.pt")

    return read


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(("case", "name"), RUNS)
def test_a_run_is_that_of_one_process(read: Callable[..., Run], case: str, name: str) -> None:
    """Losses, norms, learning rates, evaluations, the best model, predictions: on the first rank and on the last."""
    wanted, tensors = read(case, "alone", name)
    assert (case, wanted["best"]) in (("t5", "checkpoint-2"), ("gpt2", "checkpoint-6"))
    for rank in (0, 3):
        found, on_rank = read(case, "on_mesh", name, rank)
        assert found["best"] == wanted["best"]
        logs = told(found["logs"]), told(wanted["logs"])
        assert len(logs[0]) == len(logs[1])
        for row, expected in zip(*logs, strict=True):
            assert row == pytest.approx(expected, rel=LIMIT, abs=LIMIT)
        assert told([found["predicted"]])[0] == pytest.approx(told([wanted["predicted"]])[0], rel=LIMIT, abs=LIMIT)
        assert on_rank["weights"].keys() == tensors["weights"].keys()
        for key, value in tensors["weights"].items():
            alike(on_rank["weights"][key], value)
        for mine, other in zip(on_rank["outputs"], tensors["outputs"], strict=True):
            alike(mine, other)


# ---- one process -----------------------------------------------------------------------------------------


class Line(nn.Module):
    """A model without a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.line(x), self.line(x).abs()


class Dropped(Line):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(F.dropout(x, 0.5, self.training))


class Counted(Line):
    """A loss that is divided by the number of targets, and is no cross-entropy."""

    def forward(
        self, x: Tensor, labels: Tensor, num_items_in_batch: float | None = None, **_: Any
    ) -> dict[str, Tensor]:
        error = (self.line(x) - labels).square()
        return {"loss": error.mean() if num_items_in_batch is None else error.sum() / num_items_in_batch}


def error_of(outputs: Any, batch: Any) -> Tensor:
    return F.mse_loss(outputs[0], batch["labels"]) + outputs[1].mean()


class OwnLoss(hf.Trainer):
    """What `loss=error_of` stands for."""

    loss_is_scaled_for_ga = False

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(inputs["x"])
        loss = error_of(outputs, inputs)
        return (loss, (loss, *outputs)) if return_outputs else loss


def points(count: int) -> list[dict[str, Tensor]]:
    drawn = torch.Generator().manual_seed(count)
    return [{"x": torch.randn(4, generator=drawn), "labels": torch.randn(3, generator=drawn)} for _ in range(count)]


def line(kind: type[nn.Module] = Line) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def small(folder: Path, **changed: Any) -> dict[str, Any]:
    """Arguments of a trainer of `Line`."""
    plain = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "label_names": ["labels"]}
    args = arguments(folder, **{**plain, "remove_unused_columns": False, **changed})
    return {"args": args, "train_dataset": points(10), "eval_dataset": points(6)}


def test_a_loss_of_the_outputs(tmp_path: Path) -> None:
    """Without clipping, evaluated before it is trained and after."""
    trainers = (
        OwnLoss(line(), **small(tmp_path / "a", max_grad_norm=0.0)),
        autopart.Trainer(line(), **small(tmp_path / "b", max_grad_norm=0.0), mesh="1:cpu", loss=error_of),
    )
    first = [told([trainer.evaluate()])[0]["eval_loss"] for trainer in trainers]
    assert first[1] == pytest.approx(first[0], rel=LIMIT)
    for trainer in trainers:
        trainer.train()
    wanted, found = (told(trainer.state.log_history) for trainer in trainers)
    wanted, found = (
        [{k: v for k, v in r.items() if k != "eval_model_preparation_time"} for r in h] for h in (wanted, found)
    )
    assert len(found) == len(wanted)
    for row, expected in zip(found, wanted, strict=True):
        assert row == pytest.approx(expected, rel=LIMIT, abs=LIMIT)
    predicted = [trainer.predict(points(3)).predictions for trainer in trainers]
    assert [len(each) for each in predicted] == [2, 2]
    for mine, other in zip(predicted[1], predicted[0], strict=True):
        alike(torch.tensor(mine), torch.tensor(other))


def test_weights_alone_are_saved_and_not_resumed_from(tmp_path: Path) -> None:
    args = small(tmp_path, save_strategy="steps", save_steps=2, save_only_model=True)
    autopart.Trainer(line(), **args, mesh="1:cpu", loss=error_of).train()
    saved = tmp_path / "checkpoint-2"
    assert {path.name for path in saved.iterdir()} == {"model.safetensors", "trainer_state.json", "training_args.bin"}
    with pytest.raises(PartitionError, match="no state of an optimizer"):
        autopart.Trainer(line(), **args, mesh="1:cpu", loss=error_of).train(resume_from_checkpoint=str(saved))


def test_a_checkpoint_that_a_crash_left_is_passed_over(tmp_path: Path) -> None:
    args = small(tmp_path, save_strategy="steps", save_steps=1)
    trainer = autopart.Trainer(line(), **args, mesh="1:cpu", loss=error_of)
    trainer.train()
    last = trainer.state.global_step
    (tmp_path / f"checkpoint-{last}" / "trainer_state.json").unlink()
    again = autopart.Trainer(line(), **args, mesh="1:cpu", loss=error_of)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == last > 1 and len(again.state.log_history) == len(trainer.state.log_history)
    alike(again.model.line.weight, trainer.model.line.weight)


def test_float16_skips_updates_and_saves_its_masters(tmp_path: Path) -> None:
    given = small(tmp_path, max_grad_norm=0.0, num_train_epochs=5)
    given["train_dataset"] = [{name: value.half() for name, value in point.items()} for point in points(10)]
    precision = {"precision": "float16", "master": "float32"}
    trainer = autopart.Trainer(line().half(), **given, mesh="1:cpu", loss=lambda *o: 10 * error_of(*o), **precision)
    trainer.train()
    assert trainer.compiled is not None and 0 < trainer.compiled.skipped < trainer.state.global_step
    assert trainer.lr_scheduler.last_epoch == trainer.state.global_step - trainer.compiled.skipped
    trainer.save_model()
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, trainer.compiled.full_state_dict()[name]) for name, value in saved.items())
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert torch.equal(trainer.model.line.weight, saved["line.weight"].half())


def test_a_model_on_meta(tmp_path: Path) -> None:
    """With dropout, and weights from a folder, of which the best are loaded in the end. It stays on meta."""
    save_file(line().state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = line(Dropped)
    (tmp_path / "out" / "checkpoint-1" / "step-00000099").mkdir(parents=True)
    best = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    given = small(tmp_path / "out", **best, load_best_model_at_end=True, metric_for_best_model="loss")
    trainer = autopart.Trainer(model, **given, mesh="1:cpu", loss=error_of, weights=tmp_path)
    trainer.train()
    trainer.save_model()
    losses = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    highest = tmp_path / "out" / f"checkpoint-{max(losses, key=losses.__getitem__)}"
    assert trainer.state.best_model_checkpoint == str(highest)
    saved, kept = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", highest))
    assert saved.keys() == kept.keys() and all(torch.equal(value, kept[name]) for name, value in saved.items())
    assert [path.name for path in (tmp_path / "out" / "checkpoint-1").glob("step-*")] == ["step-00000002"]
    assert all(parameter.is_meta for parameter in trainer.model.parameters())


def test_workers_of_all_ranks_draw_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = autopart.Trainer(line(), **small(tmp_path), mesh="1:cpu", loss=error_of)
    monkeypatch.setattr(trainer.args.distributed_state, "process_index", 3)
    assert trainer.get_train_dataloader().worker_init_fn.keywords["rank"] == 0


def test_a_number_of_targets_that_divides_no_cross_entropy(tmp_path: Path) -> None:
    trainer = autopart.Trainer(line(Counted), **small(tmp_path), mesh="1:cpu")
    with pytest.raises(PartitionError, match="no cross-entropy"):
        trainer.train()


# ---- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_without_a_meaning(tmp_path: Path, name: str) -> None:
    args = arguments(tmp_path)
    check_arguments(args)
    setattr(args, name, True)
    with pytest.raises(PartitionError, match=rf"TrainingArguments\({name}=True\)"):
        check_arguments(args)


def test_batches_that_accelerate_splits(tmp_path: Path) -> None:
    with pytest.raises(PartitionError, match="split_batches"):
        autopart.Trainer(line(), args=arguments(tmp_path, accelerator_config={"split_batches": True}), mesh="1:cpu")


@pytest.mark.parametrize("name", LAUNCH_VARIABLES)
def test_a_configuration_of_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    args = arguments(tmp_path)
    monkeypatch.setenv(name, "no")
    check_arguments(args)
    monkeypatch.setenv(name, "bf16")
    with pytest.raises(PartitionError, match=f"accelerate is configured with {name}=bf16"):
        check_arguments(args)


@pytest.mark.parametrize(("restarts", "keeps"), [("3", "True"), ("0", "True"), ("3", "False")])
def test_restarts_need_a_store_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: str, keeps: str) -> None:
    args = arguments(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", keeps)
    refused = pytest.raises(PartitionError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    with refused if (restarts, keeps) == ("3", "True") else nullcontext():
        check_arguments(args)


class OwnStep(autopart.Trainer):
    def training_step(self, *_: Any) -> Tensor:
        return torch.zeros(())


def test_trainers_without_a_meaning(tmp_path: Path) -> None:
    given = small(tmp_path)
    with pytest.raises(PartitionError, match="a training_step of its own"):
        OwnStep(line(), **given, mesh="1:cpu")
    with pytest.raises(PartitionError, match="compute_loss_func"):
        autopart.Trainer(line(), **given, mesh="1:cpu", compute_loss_func=lambda *_: None)
    with pytest.raises(PartitionError, match="the mesh has 2 devices"):
        autopart.Trainer(line(), **given, mesh="2:cpu")
    with pytest.raises(PartitionError, match="is no Plan"):
        autopart.Trainer(line(), **given, mesh="1:cpu", plan="plan.json")
    with pytest.raises(PartitionError, match="hang_timeout=0 is not positive"):
        autopart.Trainer(line(), **given, mesh="1:cpu", loss=error_of, hang_timeout=0).train()
    trainer = autopart.Trainer(line(), **given, mesh="1:cpu", loss=error_of)
    with pytest.raises(PartitionError, match="hyperparameter_search"):
        trainer.hyperparameter_search()
    adapted = line()
    adapted.peft_config = {}
    with pytest.raises(PartitionError, match="PEFT"):
        autopart.Trainer(adapted, **given, mesh="1:cpu")
    model = line()
    optimizer = torch.optim.AdamW(model.parameters())
    both = optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(PartitionError, match="a learning-rate scheduler was made"):
        autopart.Trainer(model, **given, mesh="1:cpu", loss=error_of, optimizers=both).train()


def test_outputs_are_nested_as_the_model_returns_them() -> None:
    a, b, c = torch.zeros(3, 1)
    assert nested({"logits": a, "hidden_states.0": b, "hidden_states.1": c}) == (a, (b, c))
