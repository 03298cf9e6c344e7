"""What one rank has of a model: its stage, and its shares of weights, buffers and the training state."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autopart.errors import PartitionError
from autopart.kernels.table import STEP
from autopart.plan.data import Plan
from autopart.runtime.agreement import check_names, from_rank_zero, rank_zero_values
from autopart.runtime.emitted import Program, StageProgram, load_stage
from autopart.runtime.executor import Executor
from autopart.runtime.groups import Groups, RankMesh, tied_groups
from autopart.runtime.guards import BatchForm, ModelWeights, TrainingMode, refuse_parameters
from autopart.runtime.loss_scale import LossScale
from autopart.runtime.parameters import fill, origins, tensors_of
from autopart.runtime.share_reader import Sliceable, fill_from
from autopart.runtime.torch_compile import TorchCompile
from autopart.runtime.variants import MakeVariant, Variants
from autopart.runtime.whole import assemble, shares_of


class RankState:
    """One rank's stage with its shares of the weights, and what it knows of the whole model."""

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
        variant: MakeVariant | None = None,
        find: Callable[[str], Sliceable] | None = None,
        compile: TorchCompile = False,
    ) -> None:
        """
        constants   values of the model's buffers and of constants that the trace made
        traced      the batch that was traced, whose form every batch must have; None: any that has the plan's inputs
        same_trace  whether the model as it is now would be traced to the same program
        variant     makes the program for a batch like this one of so many samples, for training or evaluation; None:
                    only batches of the plan's sizes can be trained
        find        a weight's or a buffer's name -> where its whole value lies; None: the model's own and `constants`
        compile     whether torch.compile compiles the blocks, or its arguments
        """
        self.plan, self.groups, self.source = plan, groups, program.source
        self.model, self.aliases, self.sample_axes = model, aliases, program.sample_axes
        self.form = None if traced is None else BatchForm(traced)
        self.mode = TrainingMode(model, same_trace)
        self.weights = ModelWeights(model, aliases)
        self.stage: nn.Module = load_stage(program, f"stage_{program.stage}.py", groups, compile)
        self.origins = origins(self.stage)
        tied, master = tied_groups(program.tied, groups), getattr(torch, plan.master) if plan.master else None
        first = StageProgram(self.stage, program.instructions, program.messages)
        self.executor = Executor(
            first, program.stage, groups, tied, plan.zero, master,
            overlap=plan.mesh.device.overlapped_share > 0,
            loss_scale=LossScale() if plan.precision == "float16" else None, one_pass=STEP not in plan.no_fuse,
            offload=plan.offload == "optimizer",
            prefetch=plan.prefetch_bytes,
        )  # fmt: skip
        self.stage.parameters = refuse_parameters
        self.variants = Variants(plan, first, groups, variant, dict(model.named_buffers()), compile)
        self.emitted = {*plan.signature.parameters, *constants}
        """Names of the tensors that some stage computes with."""
        self.group_names: list[list[str]] = []
        """The names of the parameters in every group of the optimizer, those that other ranks train included."""
        self.unused_tensors: dict[str, Tensor] = {}
        """Loaded tensors of the state dict that no stage computes with."""
        if find is None:
            self.fill(tensors_of(model, constants))
        else:
            fill_from(self.shares(), groups, find)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load weights and buffers by the model's names, whole, such as `full_state_dict` returns: those that rank 0
        has, tensor by tensor. All ranks call it; what others than rank 0 give is not read.

        Raises PartitionError, on every rank, for names that are missing or not the model's, and for other shapes.
        """
        shapes = {name: tuple(value.shape) for name, value in self.model.state_dict().items()}
        shares = self.shares()
        for alias, value in from_rank_zero(state, self.groups.host, partial(check_names, shapes)):
            name = self.aliases.get(alias, alias)
            fill([share for share in shares if share.origin.name == name], self.groups, {name: value})
            if name not in self.emitted:
                self.unused_tensors[name] = value
        self.weights.seen()

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill this rank's weights, the optimizer's copies of them and its buffers from the model's own, which are
        whole."""
        fill(self.shares(), self.groups, tensors)

    def load_rank_zero(self, tensors: Mapping[str, Tensor]) -> None:
        """Load rank 0's values of the tensors of which a rank has other values. All ranks call it, each with the whole
        tensors of its own model, which stay as they are."""
        for name, value in rank_zero_values(tensors, self.groups.host):
            fill([share for share in self.shares() if share.origin.name == name], self.groups, {name: value})
        self.weights.seen()  # a broadcast counts as a change of what rank 0 sends

    def shares(self) -> list[Any]:
        """This rank's shares of weights and buffers, and the optimizer's copies."""
        buffers: dict[str, Any] = dict(self.stage.named_buffers())
        for path, buffer in buffers.items():
            buffer.origin = self.origins[path]  # which the new tensor of a step that changes the buffer has not
        return [*dict(self.stage.named_parameters()).values(), *buffers.values(), *self.executor.shared.copies]

    @property
    def data_ranks(self) -> int:
        """Number of shares that the samples of a batch are split into."""
        return self.groups.size_over(self.sample_axes)

    @property
    def data_rank(self) -> int:
        """The share of this rank, from 0 to `data_ranks` - 1."""
        rank = 0
        for axis in self.sample_axes:
            rank = rank * self.groups.along(axis).size + self.groups.along(axis).rank
        return rank

    def full_gradients(self) -> dict[str, Tensor]:
        """The last step's gradients by the model's names, whole, on the CPU of rank 0; {} on other ranks. Their dtype
        is the master dtype, where the plan has one. Raises PartitionError between `backward` and `update`.
        """
        if self.executor.accumulating:
            raise PartitionError(
                "the gradients are not complete",
                "ranks add up theirs in compiled.update(), after the last compiled.backward(batch)",
                "compiled.update() first; without an optimizer it changes no weight",
            )
        return self._collect(self.executor.shared.gradients())

    def full_state_dict(self) -> dict[str, Tensor]:
        """The model's state dict as trained, whole, on the CPU of rank 0; {} on other ranks. Trained weights are the
        optimizer's copies in the master dtype, where the plan has one.
        """
        whole = self._collect({**self.executor.shared.weights(), **dict(self.stage.named_buffers())})
        if self.rank:
            return {}
        return {
            alias: whole.get(name, self.unused_tensors.get(name, value)).detach().cpu().clone()
            for alias, value in self.model.state_dict().items()
            for name in [self.aliases.get(alias, alias)]
        }

    @property
    def rank(self) -> int:
        """This process's global rank."""
        return self.groups.rank

    @property
    def mesh(self) -> RankMesh:
        """Pipeline-, data- and model-parallel sizes, and this rank's place in each: `compiled.mesh.model.size`."""
        return self.groups.mesh()

    def _collect(self, mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every rank's shares, put together on rank 0."""
        return assemble(self.groups.host.gather(shares_of(mine, self.origins, self.groups)))
