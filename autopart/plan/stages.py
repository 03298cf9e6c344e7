"""One pipeline stage of a plan: its segments of equal blocks, their operators, its seconds and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PlanLine:
    """One operator of a stage: `name` is its module's in the block; `seconds` of compute and `comm_seconds` are
    forward and backward, per micro-batch."""

    name: str
    operator: str
    note: str
    seconds: float
    comm_seconds: float
    source: str


@dataclass(frozen=True)
class PlanSegment:
    """Equal consecutive blocks of a stage, printed once."""

    labels: tuple[str, ...]
    seconds: float
    lines: tuple[PlanLine, ...]


@dataclass(frozen=True)
class PlanStage:
    """One pipeline stage on one rank.

    first_run         index of its first run in the model's row of runs
    splits            index of how it is split in the plan's `splits`
    recompute         what each of its runs does: keep its values for backward ("none"), keep the outputs of matrix
                      products alone ("selective") or its inputs alone ("full") and compute the others again
    forward_seconds   per micro-batch, communication included; backward_seconds likewise
    sync_seconds      a step's, to add up gradients and update parameters: what the backward does not hide
                      (`autopart.planner.interval_costs.exposed`), with the slowdown of computing meanwhile
    send_seconds      for what it sends and receives, per micro-batch
    memory            what takes how many bytes: parameters, gradients, optimizer, activations, messages on their way
                      from other stages, and transient, what is more than these at the moment when most is alive: less
                      than nothing where gradients come as activations go
    sends             (stage, bytes, seconds) for every stage it sends to: of a micro-batch, the seconds there and, of
                      gradients, back
    """

    first_run: int
    splits: int
    recompute: tuple[str, ...]
    forward_seconds: float
    backward_seconds: float
    sync_seconds: float
    send_seconds: float
    memory: Mapping[str, float]
    runs: tuple[PlanSegment, ...]
    sends: tuple[tuple[int, int, float], ...] = ()

    def turn_seconds(self, turns: int) -> float:
        """f: seconds of a turn, if so many share what is done once a step (`autopart.cost.training_state.turns`)."""
        return self.forward_seconds + self.backward_seconds + self.sync_seconds / turns + self.send_seconds

    @property
    def memory_bytes(self) -> int:
        """All of `memory`."""
        return round(sum(self.memory.values()))
