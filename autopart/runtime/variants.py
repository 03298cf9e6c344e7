"""Programs over the weights of one stage: of training and of evaluation, one for every form of a batch."""

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from autopart.errors import PartitionError
from autopart.plan.data import Plan
from autopart.runtime.emitted import Program, StageProgram, load_stage
from autopart.runtime.groups import Groups
from autopart.runtime.parameters import fill, origins, shared_with
from autopart.runtime.torch_compile import TorchCompile

Mode = tuple[str, ...] | None
"""What a program returns beside the loss, in evaluation mode; None for a program that trains."""
Form = tuple[Mode, int, tuple[tuple[str, tuple[int, ...]], ...]]
"""The mode of a program, its samples, and the sizes of a sample of every input."""


@dataclass(frozen=True)
class Variant:
    """The program of a stage for other batches, or for evaluation.

    plan       with the sizes of the batch
    constants  values of the buffers and of constants that its trace made
    """

    plan: Plan
    program: Program
    constants: Mapping[str, Tensor | None]


MakeVariant = Callable[[Mapping[str, Any], int, Mode], Variant]


class Variants:
    """The programs that were made so far. All train the weights of the first, whose buffers are the model's."""

    def __init__(
        self,
        plan: Plan,
        first: StageProgram,
        groups: Groups,
        make: MakeVariant | None,
        buffers: Container[str],
        compile: TorchCompile = False,
    ) -> None:
        """
        make     makes the program for a batch like this one of so many samples, in a mode; None: only the first can be
                 run
        buffers  names of the model's own
        compile  whether torch.compile compiles the blocks, or its arguments
        """
        self.first, self.groups, self.make, self.compile = first, groups, make, compile
        self.paths = {id(first.stage): _buffers(first.stage, buffers)}
        self.of_model = buffers
        inputs = {name: shape[1:] for name, shape in plan.signature.inputs.items()}
        self.names = tuple(sorted(inputs))
        self.made: dict[Form, tuple[Plan, StageProgram]] = {
            (None, plan.global_batch, tuple((name, inputs[name]) for name in self.names)): (plan, first)
        }
        self.plan = plan

    def find(self, batch: Mapping[str, Any], ranks: int, mode: Mode) -> tuple[Plan, StageProgram]:
        """The plan and the program for a batch, made now where it is the first of its form. Where none can be made it
        is the first, whose inputs `whole.micro_batches` compares with the batch.

        ranks  how many batches like this one are trained together

        Raises PartitionError where no program of evaluation can be made.
        """
        if self.make is None and mode is not None:
            raise PartitionError(
                "there is no program for an evaluation",
                "these stages were emitted without the model, which would be traced in evaluation mode",
                "autopart.compile with the model",
            )
        if self.make is None or not all(isinstance(batch.get(name), Tensor) for name in self.names):
            return self.plan, self.first
        tensors = {name: batch[name] for name in self.names}
        rows = ranks * next(iter(tensors.values())).shape[0] if tensors else self.plan.global_batch
        form = mode, rows, tuple((name, tuple(tensor.shape[1:])) for name, tensor in tensors.items())
        if form not in self.made:
            self.made[form] = self._load(self.make(batch, rows, mode))
        return self.made[form]

    def _load(self, variant: Variant) -> tuple[Plan, StageProgram]:
        with shared_with(self.first.stage):
            program = variant.program
            stage = load_stage(program, f"stage_{program.stage}_{len(self.made)}.py", self.groups, self.compile)
        known = {share.origin.name for _, share in self.first.stage.named_parameters()}
        if strange := [s.origin.name for _, s in stage.named_parameters() if s.origin.name not in known]:
            raise PartitionError(f"{strange[0]} is in another stage of this program", "weights stay where they are")
        fill(stage.buffers(), self.groups, {n: v for n, v in variant.constants.items() if v is not None})
        self.paths[id(stage)] = _buffers(stage, self.of_model)
        return variant.plan, StageProgram(stage, program.instructions, program.messages)

    @contextmanager
    def buffers(self, program: StageProgram) -> Iterator[None]:
        """Meanwhile a program's buffers are those of the first program, which has their values afterwards."""
        self._carry(self.first.stage, program.stage)
        yield
        self._carry(program.stage, self.first.stage)

    def _carry(self, source: nn.Module, to: nn.Module) -> None:
        """Give the model's buffers of one stage to another."""
        if source is to:
            return
        paths = self.paths[id(source)]
        for name, path in self.paths[id(to)].items():
            if name in paths:
                module, _, attribute = path.rpartition(".")
                to.get_submodule(module)._buffers[attribute] = source.get_buffer(paths[name])


def _buffers(stage: nn.Module, of_model: Container[str]) -> dict[str, str]:
    """Name of a buffer of the model -> its path in a new stage."""
    return {origin.name: path for path, origin in origins(stage).items() if origin.name in of_model}
