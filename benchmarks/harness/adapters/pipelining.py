"""torch.distributed.pipelining with each of its schedules, over stages made by hand with the same number of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

from autopart.compile.bench.setting import NotExpressibleError, Setting, Step, micro_batches_text
from autopart.frontend.batch import samples_of
from benchmarks.harness.adapters.stages import STAGES
from benchmarks.harness.models import name_of


@dataclass(frozen=True)
class Kind:
    """A schedule: its class, the stages of a rank, and whether these lie on the ranks as a V (0 1 1 0)."""

    schedule: Any
    stages: int = 1
    v: bool = False

    def rank_of(self, stage: int, ranks: int) -> int:
        """The rank of a stage."""
        turn, place = divmod(stage, ranks)
        return ranks - 1 - place if self.v and turn % 2 else place


KINDS: Mapping[str, Kind] = {
    "GPipe": Kind(ScheduleGPipe),
    "1F1B": Kind(Schedule1F1B),
    "LoopedBFS": Kind(ScheduleLoopedBFS, 2),
    "Interleaved1F1B": Kind(ScheduleInterleaved1F1B, 2),
    "InterleavedZeroBubble": Kind(ScheduleInterleavedZeroBubble, 2),
    "ZBVZeroBubble": Kind(ScheduleZBVZeroBubble, 2, v=True),
    "DualPipeV": Kind(ScheduleDualPipeV, 2, v=True),
}


def build(setting: Setting, name: str) -> tuple[Step, str]:
    """The schedule of that name. Raises NotExpressibleError for fewer blocks than stages."""
    kind, rank, ranks, parts = KINDS[name], setting.rank, setting.size, setting.micro_batches
    model: Any = setting.copy_of_model()
    make_stage, shared_weight = STAGES[name_of(model)]
    layers, count = model.config.num_hidden_layers, ranks * kind.stages
    if layers < count:
        raise NotExpressibleError(f"{layers} layers are fewer than {count} stages")
    if samples_of(setting.batch) % parts:
        raise NotExpressibleError(f"the batch does not divide by {micro_batches_text(parts)}")
    mine = [stage for stage in range(count) if kind.rank_of(stage, ranks) == rank]
    modules = [make_stage(model, range(s * layers // count, (s + 1) * layers // count)) for s in mine]
    stages = [PipelineStage(module, s, count, setting.device) for module, s in zip(modules, mine, strict=True)]
    given = stages if kind.stages > 1 else stages[0]

    def part_of_loss(logits: Tensor, labels: Tensor) -> Tensor:
        # Scaled here: the schedule would scale the gradient of a weight once for every stage that has it.
        return next_token_loss(logits, labels) / parts

    schedule = kind.schedule(given, parts, loss_fn=part_of_loss, scale_grads=False)
    optimizer = setting.optimizer_of(nn.ModuleList(modules).parameters())
    first, last = kind.rank_of(0, ranks), kind.rank_of(count - 1, ranks)
    ends = dist.new_group([first, last]) if first != last else None
    shared = shared_weight(model) if rank in (first, last) else None
    batch = setting.whole_batch()
    tokens = (batch["input_ids"],) if rank == first else ()
    labels = batch["labels"] if rank == last else None

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        schedule.step(*tokens, target=labels, losses=losses, return_outputs=False)
        if shared is not None and ends is not None:
            dist.all_reduce(shared.grad, group=ends)
        optimizer.step()
        loss = torch.stack(losses).sum().detach() if losses else torch.zeros((), device=setting.device)
        dist.broadcast(loss, last)
        return loss

    return step, f"pp={ranks}, {count} stages, {micro_batches_text(parts)}"


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy of every position's logits and the token after it."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
