"""What `autopart.compile` returns: one rank's stage, ready to train."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from autopart.errors import PartitionError
from autopart.frontend.inputs import check_modes
from autopart.runtime.agreement import check_rows, check_sizes, compares
from autopart.runtime.callbacks import Callback
from autopart.runtime.emitted import StageProgram
from autopart.runtime.executor import Update
from autopart.runtime.loader import Loader
from autopart.runtime.optimizers import check, names_by_group, over_shares, take_groups_of
from autopart.runtime.outputs import whole_outputs
from autopart.runtime.pretrained import load_pretrained, save_pretrained, sync_to
from autopart.runtime.rank_state import RankState
from autopart.runtime.variants import Mode
from autopart.runtime.whole import micro_batches

if TYPE_CHECKING:
    from autopart.runtime.checkpoint.checkpoints import Checkpoints

Folder = str | os.PathLike[str]


class Compiled(RankState):
    """A model on a mesh, as one rank sees it.

    check_batches  whether steps compare the rows that ranks were given: the first 10 steps, then every 100th
    returned       names of what the model returns and `evaluate` can: none where `autopart.compile` was given a `loss`
    """

    check_batches = False
    returned: tuple[str, ...] = ()

    def step(
        self,
        batch: Mapping[str, Any],
        local: bool = False,
        *,
        clip_grad_norm: float | None = None,
        only_finite: bool = False,
    ) -> Tensor:
        """Train on one batch: forward, backward, gradient sums, optimizer step (if an optimizer is set).

        batch           the whole batch on every rank or, with `local`, this rank's share: share `data_rank` of
                        `data_ranks` of every micro-batch
        clip_grad_norm  the norm to which the gradients of the whole model are clipped, before the optimizer
        only_finite     whether the weights stay as they are where gradients are not finite; always in float16

        The first batch of a form, its number of samples and their sizes, takes a trace. Returns the loss of the whole
        batch, the same on every rank. Raises PartitionError where samples do not divide by `data_ranks`, where the
        batch has other keys, dtypes or constants than the batch at compile, where the model's training mode or weights
        have changed since, under torch.autocast, and (see `check_batches`) where ranks got other rows.
        """
        return self._run(batch, local, self._update(clip_grad_norm, only_finite))

    def backward(
        self, batch: Mapping[str, Any], local: bool = False, *, weight: float = 1.0, targets: float | None = None
    ) -> Tensor:
        """Forward and backward of one batch, whose gradients are added to those that wait for `update`.

        weight   of this batch's loss in the gradients: 1 / n for the mean of n batches
        targets  what a cross-entropy is divided by, in place of the number of targets in this batch that it does not
                 ignore: their number in all n batches, for the mean over these. `weight` is then 1

        Arguments, result and errors as `step`; the loss is without its weight.
        """
        return self._run(batch, local, None, weight, targets)

    def update(self, *, clip_grad_norm: float | None = None, only_finite: bool = False) -> None:
        """Complete the gradients of every `backward` since the last update, and step the optimizer. Arguments as
        `step`. Raises PartitionError where there was no `backward`."""
        if not self.executor.accumulating:
            raise PartitionError("there are no gradients", "no backward since the last update", "backward(batch) first")
        self.executor.update(self._update(clip_grad_norm, only_finite))

    def _run(
        self,
        batch: Mapping[str, Any],
        local: bool,
        update: Update | None,
        weight: float = 1.0,
        targets: float | None = None,
    ) -> Tensor:
        check_modes("a step")
        self.executor.activity.begin("preparing the batch")
        self.mode.check()
        program, shares = self._prepared(batch, local, None)
        with torch.enable_grad(), self.variants.buffers(program):
            return self.executor.run(shares, update, weight, targets)

    def _prepared(self, batch: Mapping[str, Any], local: bool, mode: Mode) -> tuple[StageProgram, Sequence[Any]]:
        """The program for a batch, which runs from now on, and this rank's share of every micro-batch. Raises
        PartitionError for batches and weights that it must not run with."""
        if self.form is not None:
            self.form.check(batch)
        self.weights.check()
        if self.check_batches and local:
            check_sizes(batch, self.groups.host)
        if self.check_batches and compares(self.groups.rng.step):
            check_rows(batch, local, self.data_rank, self.groups.host)
        plan, program = self.variants.find(batch, self.data_ranks if local else 1, mode)
        shares = micro_batches(plan, batch, self.data_ranks, self.data_rank, local, self.groups.device)
        self.executor.use(program)
        return program, shares

    @overload
    def evaluate(self, batch: Mapping[str, Any], local: bool = False, *, targets: float | None = None) -> Tensor: ...

    @overload
    def evaluate(
        self, batch: Mapping[str, Any], local: bool = False, *, outputs: Sequence[str], targets: float | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]: ...

    def evaluate(
        self,
        batch: Mapping[str, Any],
        local: bool = False,
        *,
        outputs: Sequence[str] | None = None,
        targets: float | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch in evaluation mode, without gradients: dropout is off, batch norm takes its running
        statistics. The weights are the trained ones; with a master dtype, as the model computes with them.

        outputs  names of what the model returns: "logits", or "1" for the second of a tuple. With a `loss` the single
                 tensor that the model returns is "output"
        targets  as in `backward`

        With outputs it returns the loss, and the outputs by name: whole, on the CPU of rank 0, {} on other ranks. With
        `local` the samples of ranks follow each other within a micro-batch. Arguments and errors as `step`. The first
        batch of a form takes a trace in evaluation mode.
        """
        check_modes("an evaluation")
        self.executor.activity.begin("preparing the batch of an evaluation")
        program, shares = self._prepared(batch, local, tuple(outputs or ()))
        with torch.no_grad(), self.variants.buffers(program):
            loss = self.executor.evaluate(shares, targets)
        return loss if outputs is None else (loss, whole_outputs(self.groups))

    def loader(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = None,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        **settings: Any,
    ) -> Loader:
        """Whole batches of a dataset for `step`, the same on every rank, in an order that only `seed` decides.

        batch_size  samples of a batch over all ranks; default: the plan's global batch
        drop_last   whether the samples that fill no batch are left out
        settings    of torch's DataLoader: collate_fn, num_workers, ...

        Its `state_dict` is where it stands in the data: `save(folder, extra=loader.state_dict())`. Raises
        PartitionError for a dataset without a length, and where a batch does not divide by `data_ranks`.
        """
        size = batch_size or self.plan.global_batch
        return Loader(dataset, size, self.data_ranks, shuffle, seed, drop_last, **settings)

    def _update(self, max_norm: float | None, only_finite: bool) -> Update:
        if max_norm is not None and not max_norm > 0:
            raise PartitionError(f"clip_grad_norm={max_norm!r} is not positive", try_="clip_grad_norm=1.0, or None")
        return Update(max_norm, only_finite, self.weights.frozen())

    def optimizer(
        self, given: torch.optim.Optimizer | type[torch.optim.Optimizer], **settings: Any
    ) -> torch.optim.Optimizer:
        """Step a torch optimizer at the end of every step, over this rank's shares of the weights.

        given     an optimizer over parameters of the model, whose groups, settings and states count; or a class, for
                  all parameters
        settings  of the class

        Returns the optimizer that is stepped, for schedulers. Its groups are those of `given`; its `add_param_group`
        adds one over parameters of the model, on all ranks. Weights that are in no group stay as they are. Raises
        PartitionError for an optimizer whose update of a part of a weight is not that part of the whole weight's
        update, where ranks have parts; such an optimizer is found by trying it.
        """
        trained, names = list(self.executor.shared.stepped_as.values()), self.weights.names
        if isinstance(given, type):
            optimizer = probe = given(trained or [nn.Parameter(torch.empty(0))], **settings)
            self.group_names = [sorted(set(names.values()))]
        else:
            probe, optimizer = given, over_shares(given, names, trained, self.groups)
            self.group_names = names_by_group(given, names)
        check(probe, trained, self.groups)
        take_groups_of(optimizer, names, trained, self.group_names)
        optimizer.register_step_pre_hook(self._stepped_here)
        self.executor.optimizer = optimizer
        return optimizer

    def _stepped_here(self, *_: Any) -> None:
        if not self.executor.stepping:
            raise PartitionError(
                "optimizer.step() was called outside of a step",
                "compiled.step(batch) steps the optimizer itself, so that weights would be updated twice",
                "compiled.step(batch) alone; compiled.backward(batch) and compiled.update() to accumulate",
            )

    @property
    def callbacks(self) -> list[Callback]:
        """What is told of all that this rank does: append to it (see `autopart.Callback`)."""
        return self.executor.callbacks

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the last update's gradients before they were clipped, of the whole model, the same on every rank;
        None where neither `clip_grad_norm` nor `only_finite` was given."""
        return self.executor.grad_norm

    @property
    def skipped(self) -> int:
        """Updates that left the weights as they are, since gradients were not finite."""
        return self.executor.skipped

    def save_pretrained(
        self, folder: Folder, max_shard_size: int | str = "5GB", dtype: str | torch.dtype | None = None
    ) -> None:
        """Write the trained model as `from_pretrained` of transformers reads it: safetensors in files of at most
        `max_shard_size`, the config and the generation config. All ranks call it; rank 0 writes, and holds the tensors
        of one file at most.

        dtype  of the parameters in the files; default: the plan's precision

        The names are those that transformers writes; for a plain module they are the state dict's. Raises
        PartitionError for a size or a dtype that is none.
        """
        save_pretrained(self, Path(folder), max_shard_size, dtype)

    def load_pretrained(self, folder: Folder) -> None:
        """Load the weights of a folder that `save_pretrained` or transformers wrote, in files that every rank sees; the
        optimizer's states stay. All ranks call it, and each reads its own shares.

        Raises PartitionError for a folder that lacks parameters, or has tensors of other names or shapes.
        """
        load_pretrained(self, Path(folder))

    def sync_to(self, model: nn.Module, ranks: Collection[int] | None = None) -> None:
        """Copy the trained weights and buffers into a model, one tensor at a time: into each rank's, or that of `ranks`
        alone. All ranks call it. Tensors of the model on meta are replaced.

        Trained weights are the optimizer's copies in the master dtype, where the plan has one. Raises PartitionError
        for a model of other names or shapes.
        """
        sync_to(self, model, ranks)

    def save(
        self, folder: Folder, *, scheduler: Any = None, extra: Any = None, keep: int | None = None, wait: bool = True
    ) -> Path:
        """Save what was trained as the checkpoint folder/step-00000120, 120 being the number of steps. All ranks call
        it, and write into one folder that all see.

        scheduler  a learning-rate scheduler, whose state is saved too
        extra      what `load` returns, such as the position in the data: numbers, texts, tensors, and lists, tuples
                   and dicts of them; rank 0's counts
        keep       how many of the latest checkpoints stay, this one included; None: all
        wait       whether to return once it is written; otherwise a copy is written while training goes on, and the
                   next save, load or `wait_saved` waits for it and raises its error

        Any plan on any number of ranks reads it: weights in the master dtype, buffers, states and settings of the
        optimizer, seed and step of random numbers. Returns the checkpoint's folder, which is there once it is complete.
        Raises PartitionError, on every rank, where a rank cannot write, and for states that cannot be saved.
        """
        with self.executor.activity.during(f"saving step {self.groups.rng.step}"):
            return self._checkpoints.save(Path(folder), scheduler, extra, keep, wait)

    def wait_saved(self) -> None:
        """Wait for the checkpoint that `save(..., wait=False)` writes, and raise its error. All ranks call it."""
        with self.executor.activity.during("waiting for a checkpoint to be saved"):
            self._checkpoints.wait_saved()

    def load(self, folder: Folder, *, scheduler: Any = None) -> Any:
        """Load a checkpoint that any plan wrote, and return its `extra`. All ranks call it, after `optimizer`.

        folder  a checkpoint, or the folder that `save` was given, of which the latest good one is taken, with a warning
                for each that is damaged

        Raises PartitionError, on every rank and before anything is changed, where there is no good checkpoint, where
        names or shapes are not the model's, and for states of another optimizer or scheduler.
        """
        with self.executor.activity.during(f"loading {folder}"):
            return self._checkpoints.load(Path(folder), scheduler)

    @cached_property
    def _checkpoints(self) -> Checkpoints:
        from autopart.runtime.checkpoint.checkpoints import Checkpoints  # torch.distributed.checkpoint takes a second

        return Checkpoints(self)
