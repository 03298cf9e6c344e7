"""`transformers.Trainer` over the program of `autopart.compile`. The loop, callbacks, logs and arguments stay."""

import math
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from autopart.compile.api import check_plan, compile
from autopart.compile.trainer.arguments import as_one_process, check_arguments, check_trainer
from autopart.compile.trainer.batches import divisible, evaluated, nested, preserved_rng_states
from autopart.compile.trainer.optimizer import UpdatingOptimizer
from autopart.errors import PartitionError
from autopart.frontend.batch import DTYPES, outline
from autopart.frontend.with_loss import with_loss, with_outputs
from autopart.hardware.mesh import AnyMesh, Mesh
from autopart.ir.graph import calls, info
from autopart.ir.layered_graph import LayeredGraph
from autopart.passes.source import Source
from autopart.passes.trace import trace
from autopart.planner.request import SETTINGS
from autopart.runtime.agreement import from_first
from autopart.runtime.checkpoint import files
from autopart.runtime.compiled import Compiled
from autopart.runtime.groups import start_processes

COMPILE_SETTINGS = {*SETTINGS, "loss", "plan", "weights", "on_progress", "check_batches", "hang_timeout", "compile"} - {
    "global_batch"
}
"""Keywords of `Trainer` that go to `autopart.compile`."""


class Trainer(transformers.Trainer):
    """`transformers.Trainer` on a mesh: the logs and weights of one process with the same arguments.

    given     positional arguments of transformers.Trainer
    mesh      as `autopart.compile` takes it, with one process a device
    settings  keywords of `autopart.compile`, such as tp, pp, zero, precision, plan, loss and weights; all other
              keywords are those of transformers.Trainer

    `per_device_train_batch_size` is the number of samples of a batch over the whole mesh, as on one process. Every rank
    reads the same rows. All ranks call each method. Raises PartitionError for settings of transformers.Trainer that a
    mesh cannot reproduce.
    """

    model: Any

    def __init__(self, *given: Any, mesh: AnyMesh, **settings: Any) -> None:
        self.mesh = Mesh.of(mesh)
        self.settings = {name: settings.pop(name) for name in COMPILE_SETTINGS & settings.keys()}
        check_plan(self.settings.get("plan"), self.mesh)
        self.compiled: Compiled | None = None
        """This rank's program; None until the first use of the model."""
        self._compiled_from: nn.Module | None = None
        self._divides: bool | None = None
        self._grad_norm = torch.zeros(())
        super().__init__(*given, **settings)
        check_trainer(self, Trainer)
        start_processes(self.mesh.size)
        if "loss" in self.settings:
            self.model_accepts_loss_kwargs = False

    # ---- accelerate sees one process, and leaves the model where it is --------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        check_arguments(self.args)
        as_one_process(self.args)
        super().create_accelerator_and_postprocess()

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Does nothing: each rank's shares are on its device."""

    def _wrap_model(self, model: Any, training: bool = True, dataloader: DataLoader | None = None) -> nn.Module:
        model._is_accelerate_prepared = True  # so that accelerate neither moves nor wraps it
        return model

    def _get_dataloader(self, *given: Any, **settings: Any) -> DataLoader:
        loader = super()._get_dataloader(*given, **settings)
        seed_worker = getattr(loader, "worker_init_fn", None)
        if isinstance(seed_worker, partial):
            seed_worker.keywords["rank"] = 0  # workers of all ranks draw the same numbers
        return loader

    # ---- the program ---------------------------------------------------------------------------------------

    def program(self, batch: Mapping[str, Any]) -> Compiled:
        """This rank's program of the model, which the first call compiles.

        The example batch of the compilation is the first of `train_dataset`; without a `train_dataset` it is `batch`.
        """
        if self.compiled is None or self._compiled_from is not self.model:
            with preserved_rng_states():
                example = dict(batch if self.train_dataset is None else self._first_batch())
                training = self.model.training
                self.model.train()
                self.compiled = compile(self.model, self.mesh, example, **self.settings)
                self.model.train(training)
            self._compiled_from = self.model
        return self.compiled

    def _first_batch(self) -> Mapping[str, Any]:
        """The first batch of training, from a loader whose position accelerate does not record."""
        loader = self.get_train_dataloader()
        batch: Mapping[str, Any] = next(iter(getattr(loader, "base_dataloader", loader)))
        return batch

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if not isinstance(self.optimizer, UpdatingOptimizer):
            over_model = super().create_optimizer(model)
            self.optimizer = UpdatingOptimizer(self.program({}).optimizer(over_model), self._update)
        return self.optimizer

    # ---- training ------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *given: Any, **settings: Any) -> TrainOutput:
        """Train as transformers.Trainer does, with its arguments and result.

        `resume_from_checkpoint=True` takes the last checkpoint that is complete. The model then has the trained weights
        on every rank, unless it is on meta.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = _last_complete(Path(str(self.args.output_dir))) or True
        output = super().train(resume_from_checkpoint, *given, **settings)
        if self.compiled is not None and not any(p.is_meta for p in self.model.parameters()):
            self.compiled.sync_to(self.model)
        return output

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one batch. Returns the batch's part of the loss of an update, a scalar."""
        model.train()
        batch = self._prepare_inputs(inputs)
        compiled, targets = self.program(batch), self._divisor(batch, num_items_in_batch)
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        weight = 1.0 if counted else 1 / self.current_gradient_accumulation_steps
        whole, times = divisible(batch, compiled.data_ranks)
        loss = compiled.backward(whole, weight=weight, targets=None if targets is None else targets * times)
        return loss.to(self.args.device, torch.float32) * weight

    def _divisor(self, batch: Mapping[str, Any], targets: Tensor | int | None) -> float | None:
        """The `num_items_in_batch` that transformers.Trainer would give the model; None where the loss does not depend
        on that number."""
        if targets is None or not self.model_accepts_loss_kwargs:
            return None
        if self._divides is None:
            self._divides = self._divides_by_targets(batch)
        return float(targets) if self._divides else None

    def _divides_by_targets(self, batch: Mapping[str, Any]) -> bool:
        """Whether the trace of the model differs where forward is given `num_items_in_batch`.

        Raises PartitionError where it differs and the model has no cross-entropy.
        """
        assert self.compiled is not None
        plan = self.compiled.plan

        def traced(**given: Any) -> LayeredGraph:
            example = outline({**batch, **given}, plan.micro_batch)
            return Source.of(self.model, example, plan).sampled(plan.micro_batch, plan.mesh)

        with_number = traced(num_items_in_batch=2).hash
        if with_number == plan.signature.hash or with_number == (without := traced()).hash:
            return False
        if all(info(node).name != "aten.cross_entropy_loss" for node in calls(without.traced.graph)):
            raise PartitionError(
                "the model divides its loss by num_items_in_batch, and its loss is no cross-entropy",
                "the emitted program can divide a cross-entropy alone by another number of targets",
                "a forward without **kwargs, whose loss is the mean of a batch",
            )
        return True

    def _update(self) -> bool:
        """Update the weights. Returns whether the update left them as they are, since gradients were not finite."""
        assert self.compiled is not None
        skipped = self.compiled.skipped
        limit = self.args.max_grad_norm if self.args.max_grad_norm > 0 else math.inf
        self.compiled.update(clip_grad_norm=limit)
        assert self.compiled.grad_norm is not None
        self._grad_norm.copy_(self.compiled.grad_norm)
        return self.compiled.skipped > skipped

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Does nothing: the update clips."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Tensor:
        """A scalar that the next update fills with the norm. transformers.Trainer reads it when it logs."""
        self._grad_norm = torch.zeros(())
        return self._grad_norm

    # ---- evaluation ----------------------------------------------------------------------------------------

    def evaluation_loop(self, *given: Any, **settings: Any) -> EvalLoopOutput:
        """Evaluate as transformers.Trainer does. Every rank returns the metrics of rank 0."""
        output = super().evaluation_loop(*given, **settings)
        if self.compiled is None:
            return output
        return output._replace(metrics=from_first(output.metrics, self.compiled.groups.host))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """(loss, outputs, labels) of a batch in evaluation mode; None for the last two with `prediction_loss_only`."""
        batch = self._prepare_inputs(inputs)
        compiled = self.program(batch)
        names = () if prediction_loss_only else self._outputs(batch, ignore_keys)
        targets = self._divisor(batch, self._get_num_items_in_batch([batch], self.args.device))
        loss, outputs = evaluated(compiled, batch, names, targets)
        loss = loss.to(self.args.device, torch.float32)
        if prediction_loss_only:
            return loss, None, None
        logits = nested({name: value.to(self.args.device) for name, value in outputs.items()})
        labels = tuple(batch.get(name) for name in self.label_names)
        if not labels or any(each is None for each in labels):
            return loss, _alone(logits), None
        return loss, _alone(logits), _alone(labels)

    def _outputs(self, batch: Mapping[str, Any], ignored: list[str] | None) -> tuple[str, ...]:
        """Names of the model's outputs in evaluation mode, without the loss and the outputs `ignored`."""
        if ignored is None:
            ignored = getattr(getattr(self.model, "config", None), "keys_to_ignore_at_inference", ["cache"])
        assert self.compiled is not None
        names = self.compiled.returned
        if not names and "loss" in self.settings:  # the program of training returns the loss alone
            plan, model = self.compiled.plan, with_outputs(with_loss(self.model, self.settings["loss"]))
            names = trace(model, outline(batch, plan.micro_batch), DTYPES[plan.precision]).returned
            self.compiled.returned = names
        return tuple(name for name in names if name.partition(".")[0] not in ignored)

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.compiled is None:
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        self.compiled.save_pretrained(folder, dtype=self.compiled.plan.master)
        if self.args.should_save:
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            torch.save(self.args, folder / "training_args.bin")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.compiled is not None
        written = self.compiled.save(output_dir, scheduler=self.lr_scheduler)
        if self.args.should_save:
            for left in files.checkpoints(Path(output_dir)):  # by another run, which may have got further
                if left != written:
                    shutil.rmtree(left)

    def _save_rng_state(self, output_dir: str) -> None:
        if self.args.should_save:
            super()._save_rng_state(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Checks the checkpoint; `_load_optimizer_and_scheduler` loads weights and optimizer together.

        Raises PartitionError for a checkpoint without the state that `Compiled.save` writes.
        """
        if not files.checkpoints(Path(resume_from_checkpoint)):
            raise PartitionError(
                f"{resume_from_checkpoint} has no state of an optimizer that autopart wrote",
                "it was written with save_only_model=True, or by another trainer",
                f"from_pretrained({str(resume_from_checkpoint)!r}) and train() for its weights alone",
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            assert self.compiled is not None
            self.compiled.load(checkpoint, scheduler=self.lr_scheduler)

    def _load_best_model(self) -> None:
        assert self.compiled is not None
        self.compiled.load_pretrained(str(self.state.best_model_checkpoint))

    def hyperparameter_search(self, *given: Any, **settings: Any) -> Any:
        raise PartitionError(
            "hyperparameter_search does not run on a mesh", "one process draws the trials", "a run for each trial"
        )


def _alone(values: tuple[Any, ...]) -> Any:
    """The value of a tuple of one; other tuples as they are."""
    return values[0] if len(values) == 1 else values


def _last_complete(folder: Path) -> str | None:
    """The last checkpoint of a folder that has a trainer_state.json, which is written last."""
    complete = [file.parent for file in folder.glob("checkpoint-[0-9]*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None
