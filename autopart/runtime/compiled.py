"""What `autopart.compile` returns: one rank's stage, ready to train."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from autopart.errors import PartitionError
from autopart.frontend.inputs import check_modes
from autopart.plan.data import Plan
from autopart.plan.schedules.ops import Instruction
from autopart.runtime.agreement import check_rows, compares, rank_zero_values
from autopart.runtime.executor import Executor, Message
from autopart.runtime.groups import Groups
from autopart.runtime.guards import BatchForm, TrainingMode
from autopart.runtime.parameters import load, origins
from autopart.runtime.process_group import Group
from autopart.runtime.whole import assemble, micro_batches, shares_of

Tensor = torch.Tensor
NOT_ELEMENTWISE = tuple(
    kind for name in ("LBFGS", "Muon", "Adafactor") if (kind := getattr(torch.optim, name, None)) is not None
)
"""Optimizers whose update of one element depends on other elements. Some are missing in older torch versions."""


@dataclass(frozen=True)
class Program:
    """What one stage runs.

    source        the emitted module's text
    index         the stage's number
    instructions  the stage's instructions, in order
    messages      the tensors that cross the cuts between stages
    tied          name of a parameter that lives on several stages -> these stages
    axes          mesh axes that split the samples of a batch
    """

    source: str
    stage: int
    instructions: Sequence[Instruction]
    messages: Sequence[Message]
    tied: Mapping[str, tuple[int, ...]]
    sample_axes: tuple[str, ...]


class Compiled:
    """A model on a mesh, as one rank sees it.

    check_batches  whether steps compare the rows that ranks were given: the first 10 steps, then every 100th
    """

    check_batches = False

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        groups: Groups,
        program: Program,
        aliases: Mapping[str, str],
        constants: Mapping[str, Tensor | None],
        traced: Mapping[str, Any] | None = None,
        same_trace: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        constants   values of the model's buffers and of constants that the trace made
        traced      the batch that was traced, whose form every batch must have; None: any that has the plan's inputs
        same_trace  whether the model as it is now would be traced to the same program
        """
        self.plan, self.groups, self.source = plan, groups, program.source
        self.model, self.aliases, self.sample_axes = model, aliases, program.sample_axes
        self.form = None if traced is None else BatchForm(traced)
        self.mode = TrainingMode(model, same_trace)
        module = run_source(program.source, f"stage_{program.stage}.py")
        self.stage: nn.Module = module.Stage(groups)
        self.origins = origins(self.stage)
        tied, master = _tie(program.tied, groups), getattr(torch, plan.master) if plan.master else None
        self.executor = Executor(
            self.stage, program.stage, groups, program.instructions, program.messages, tied, plan.zero, master,
            overlap=plan.mesh.device.overlapped_share > 0,
        )  # fmt: skip
        self.load(tensors_of(model, constants))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill this rank's weights, the optimizer's copies of them and its buffers from the model's own, which are
        whole."""
        load(self._shares(), self.groups, tensors)

    def load_rank_zero(self, tensors: Mapping[str, Tensor]) -> None:
        """Load rank 0's values of the tensors of which a rank has other values. All ranks call it, each with the whole
        tensors of its own model, which stay as they are."""
        for name, value in rank_zero_values(tensors, self.groups.host):
            load([share for share in self._shares() if share.origin.name == name], self.groups, {name: value})

    def _shares(self) -> list[Any]:
        return [*self.stage.parameters(), *self.stage.buffers(), *self.executor.shared.copies]

    @property
    def data_ranks(self) -> int:
        """Number of shares that the samples of a batch are split into."""
        ranks = 1
        for axis in self.sample_axes:
            ranks *= self.groups.along(axis).size
        return ranks

    @property
    def data_rank(self) -> int:
        """The share of this rank, from 0 to `data_ranks` - 1."""
        rank = 0
        for axis in self.sample_axes:
            rank = rank * self.groups.along(axis).size + self.groups.along(axis).rank
        return rank

    def step(self, batch: Mapping[str, Any], local: bool = False) -> Tensor:
        """Train on one batch: forward, backward, gradient sums, optimizer step (if an optimizer is set).

        batch  the whole batch on every rank or, with `local`, this rank's share: share `data_rank` of `data_ranks` of
               every micro-batch

        Returns the loss of the whole batch, the same on every rank. Raises PartitionError where the batch has another
        size than the plan's, other keys, dtypes or constants than the batch at compile, where the model's training mode
        has changed since, under torch.autocast, and (see `check_batches`) where ranks got other rows.
        """
        check_modes("a step")
        if self.form is not None:
            self.form.check(batch)
        self.mode.check()
        shares = micro_batches(self.plan, batch, self.data_ranks, self.data_rank, local, self.groups.device)
        if self.check_batches and compares(self.groups.rng.step):
            check_rows(batch, local, self.data_rank, self.groups.host)
        with torch.enable_grad():
            return self.executor.run(shares)

    def optimizer(self, cls: type[torch.optim.Optimizer], **settings: Any) -> torch.optim.Optimizer:
        """Step this torch optimizer at the end of every step. Under ZeRO it trains this rank's slices of weights.

        A stage without parameters gets an empty parameter, since torch's optimizers refuse none. Raises PartitionError
        for an optimizer whose update of a slice is not the slice of the whole weight's update.
        """
        trained = self.executor.shared.trained
        if any(p.origin.sliced for p in trained) and issubclass(cls, NOT_ELEMENTWISE):
            raise PartitionError(
                f"{cls.__name__} cannot train slices of parameters",
                f"under ZeRO {self.plan.zero} a rank has a part of each, and this optimizer needs all of it",
                "zero=0, or an optimizer that treats every element alone, such as AdamW",
            )
        self.executor.optimizer = cls(trained or [nn.Parameter(torch.empty(0))], **settings)
        return self.executor.optimizer

    def clip_grad_norm(self, max_norm: float | None) -> None:
        """From now on, scale the gradients of every step before the optimizer by min(1, max_norm / `grad_norm`). None
        ends it. torch.nn.utils.clip_grad_norm_ would take the norm of what one rank has."""
        if max_norm is not None and not max_norm > 0:
            raise PartitionError(f"max_norm={max_norm!r} is not positive", try_="max_norm=1.0, or None for no clipping")
        self.executor.max_norm, self.executor.grad_norm = max_norm, None

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the last step's gradients before they were clipped, of the whole model, the same on every rank;
        None without `clip_grad_norm`."""
        return self.executor.grad_norm

    def full_gradients(self) -> dict[str, Tensor]:
        """The last step's gradients by the model's names, whole, on the CPU of rank 0; {} on other ranks. Their dtype
        is the master dtype, where the plan has one.
        """
        return self._collect(self.executor.shared.gradients())

    def full_state_dict(self) -> dict[str, Tensor]:
        """The model's state dict as trained, whole, on the CPU of rank 0; {} on other ranks. Trained weights are the
        optimizer's copies in the master dtype, where the plan has one.
        """
        whole = self._collect({**self.executor.shared.weights(), **dict(self.stage.named_buffers())})
        if self.rank:
            return {}
        return {
            name: whole.get(self.aliases.get(name, name), value).detach().cpu().clone()
            for name, value in self.model.state_dict().items()
        }

    @property
    def rank(self) -> int:
        """This process's global rank."""
        return self.groups.rank

    def _collect(self, mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every rank's shares, put together on rank 0."""
        return assemble(self.groups.host.gather(shares_of(mine, self.origins, self.groups)))


def tensors_of(model: nn.Module, constants: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """A model's own weights, buffers and constants of the trace, by name; without those that have no value."""
    known = {name: value for name, value in constants.items() if value is not None}
    return {**known, **dict(model.named_parameters())}


def _tie(tied: Mapping[str, tuple[int, ...]], groups: Groups) -> dict[str, Group]:
    """Parameter of this rank -> the group of the ranks that hold the same parameter on other stages."""
    made = {stages: groups.tied(stages) for stages in sorted(set(tied.values()))}
    return {name: group for name, stages in tied.items() if (group := made[stages]) is not None}


def run_source(source: str, filename: str) -> ModuleType:
    """Import emitted source, so that tracebacks show its lines."""
    module = ModuleType(filename.removesuffix(".py"))
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), module.__dict__)
    return module
