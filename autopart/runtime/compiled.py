"""What `autopart.compile` hands back: this rank's stage, ready to train."""

from __future__ import annotations

import linecache
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from autopart.errors import PartitionError
from autopart.plan import Plan
from autopart.runtime.executor import Executor, Message
from autopart.runtime.groups import Groups, load
from autopart.runtime.shards import shard, unshard
from autopart.schedules import Instruction

Tensor = torch.Tensor


@dataclass(frozen=True)
class Program:
    """A stage's source, instructions and messages; parameters on several stages; the axes that split samples."""

    source: str
    stage: int
    instructions: Sequence[Instruction]
    messages: Sequence[Message]
    tied: Mapping[str, tuple[int, ...]]
    sample_axes: tuple[str, ...]


class Compiled:
    """A model on a mesh, as one rank sees it."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        groups: Groups,
        program: Program,
        aliases: Mapping[str, str],
        constants: Mapping[str, Tensor | None],
    ) -> None:
        self.plan, self.groups, self.source = plan, groups, program.source
        self.model, self.aliases, self.sample_axes = model, aliases, program.sample_axes
        module = run_source(program.source, f"stage_{program.stage}.py")
        self.stage: nn.Module = module.Stage(groups)
        known = {name: value for name, value in constants.items() if value is not None}
        load(self.stage, groups, {**known, **dict(model.named_parameters())})
        self.executor = Executor(
            self.stage, program.stage, groups, program.instructions, program.messages, _tie(program.tied, groups)
        )

    @property
    def data_ranks(self) -> int:
        """Into how many shares a batch is split."""
        ranks = 1
        for axis in self.sample_axes:
            ranks *= self.groups.along(axis).size
        return ranks

    @property
    def data_rank(self) -> int:
        """Which of them this rank reads."""
        rank = 0
        for axis in self.sample_axes:
            rank = rank * self.groups.along(axis).size + self.groups.along(axis).rank
        return rank

    def step(self, batch: Mapping[str, Any], local: bool = False) -> Tensor:
        """Train on one batch: forward, backward, gradients summed, optimizer (if one is set). Returns the loss of the
        whole batch, the same on every rank.

        `batch` is the whole batch on every rank or, with `local`, this rank's share: rows `data_rank` of `data_ranks`
        of every micro-batch. Raises PartitionError where its size is not the plan's.
        """
        share = self.data_ranks if local else 1
        tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
        expected = self.plan.global_batch // share
        for name, shape in self.plan.signature.inputs.items():
            if name not in tensors:
                raise PartitionError(f"the batch lacks {name}", f"it has {', '.join(tensors) or 'nothing'}")
            wanted = (expected, *shape[1:])
            if tuple(tensors[name].shape) != wanted:
                raise PartitionError(
                    f"{name} has shape {list(tensors[name].shape)}, the plan is for {list(wanted)}",
                    f"{self.plan.micro_batches} micro-batches of {self.plan.micro_batch // share} samples",
                    "drop or pad the last batch, or plan for this size",
                )
        size = self.plan.micro_batch // share
        micro_batches = []
        for i in range(self.plan.micro_batches):
            rows = {k: tensors[k][i * size : (i + 1) * size] for k in self.plan.signature.inputs}
            if not local and self.data_ranks > 1:
                rows = {k: shard(v, 0, (), self.data_ranks, self.data_rank) for k, v in rows.items()}
            micro_batches.append({k: v.to(self.groups.device) for k, v in rows.items()})
        return self.executor.run(micro_batches)

    def optimizer(self, cls: type[torch.optim.Optimizer], **settings: Any) -> torch.optim.Optimizer:
        """Use a torch optimizer from now on, at the end of every step; under ZeRO its states are shared over `dp`.

        A stage without parameters gets an empty one, since torch's optimizers refuse none.
        """
        parameters = [p for p in self.stage.parameters() if p.requires_grad]
        parameters = parameters or [nn.Parameter(torch.empty(0))]
        if self.plan.zero and self.groups.dp.size > 1:
            self.executor.optimizer = ZeroRedundancyOptimizer(
                parameters, cls, process_group=self.groups.dp.handle, **settings
            )
        else:
            self.executor.optimizer = cls(parameters, **settings)
        return self.executor.optimizer

    def full_gradients(self) -> dict[str, Tensor]:
        """The last step's gradients, whole, on the CPU, by the model's own names: on rank 0; {} elsewhere."""
        shares = {p.model_name: (p.placed, p.grad.detach().cpu()) for p in self._shares() if p.grad is not None}
        return self._collect(shares)

    def full_state_dict(self) -> dict[str, Tensor]:
        """The model's state dict with the weights as trained, whole, on the CPU: on rank 0; {} elsewhere."""
        whole = self._collect({p.model_name: (p.placed, p.detach().cpu()) for p in self._shares()})
        if self.rank:
            return {}
        return {
            name: whole.get(self.aliases.get(name, name), value).detach().cpu().clone()
            for name, value in self.model.state_dict().items()
        }

    @property
    def rank(self) -> int:
        """This process's global rank."""
        return dist.get_rank() if dist.is_initialized() else 0

    def _shares(self) -> list[Any]:
        return list(self.stage.parameters())

    def _collect(self, shares: dict[str, tuple[Any, Tensor]]) -> dict[str, Tensor]:
        """Put all ranks' shares together on rank 0."""
        place = {"dp": self.groups.dp.rank, "tp": self.groups.tp.rank}
        mine = {
            name: (placed, place, tensor)
            for name, (placed, tensor) in shares.items()
            if all(p.kind == "S" or place[axis] == 0 for axis, p in placed.items())
        }
        if not dist.is_initialized():
            return {name: tensor for name, (_, _, tensor) in mine.items()}
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(mine, everyone if self.rank == 0 else None, 0, group=self.groups.host)
        if self.rank:
            return {}
        pieces: dict[str, dict[tuple[int, int], Tensor]] = {}
        placements: dict[str, Any] = {}
        for given in everyone:
            for name, (placed, at, tensor) in given.items():
                placements[name] = placed
                pieces.setdefault(name, {})[at["dp"], at["tp"]] = tensor
        return {name: self._whole(placements[name], pieces[name]) for name in pieces}

    def _whole(self, placed: Mapping[str, Any], pieces: Mapping[tuple[int, int], Tensor]) -> Tensor:
        rows = []
        for d in sorted({d for d, _ in pieces}):
            row = [pieces[d, t] for t in sorted({t for e, t in pieces if e == d})]
            split = placed["tp"] if len(row) > 1 else None
            rows.append(row[0] if split is None else unshard(row, split.dim, split.parts))
        return rows[0] if len(rows) == 1 else unshard(rows, placed["dp"].dim, placed["dp"].parts)


def _tie(tied: Mapping[str, tuple[int, ...]], groups: Groups) -> dict[str, dist.ProcessGroup | None]:
    """A group for every set of stages that share a weight; all ranks make all groups, in the same order."""
    mine: dict[str, dist.ProcessGroup | None] = {}
    per_stage = groups.dp.size * groups.tp.size
    for stages in sorted(set(tied.values())):
        for place in range(per_stage):
            handle = dist.new_group([stage * per_stage + place for stage in stages])
            if place == groups.dp.rank * groups.tp.size + groups.tp.rank and groups.pp.rank in stages:
                mine |= {name: handle for name, at in tied.items() if at == stages}
    return mine


def run_source(source: str, filename: str) -> ModuleType:
    """Import emitted source; tracebacks show its lines."""
    module = ModuleType(filename.removesuffix(".py"))
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), module.__dict__)
    return module
