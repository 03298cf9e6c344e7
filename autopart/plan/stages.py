"""One pipeline stage of a plan: its segments of equal blocks, their operators, its seconds and bytes."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PlanLine:
    """One operator of a stage.

    name          its module's name within the block
    operator      its name as plans print it
    note          how it is split, or the collectives that run
    seconds       of compute, forward and backward, for one micro-batch
    comm_seconds  of communication, likewise
    source        "file:line" of the user's code; empty where it is not known
    bytes         of what it makes, on one rank, for one micro-batch
    placement     of what it makes along every axis, as "dp=S0, tp=R"; empty where that is no value of the model
    inputs        the operators whose values it reads: i >= 0 is line i of the segment, i < 0 is source -1 - i
    """

    name: str
    operator: str
    note: str
    seconds: float
    comm_seconds: float
    source: str
    bytes: float = 0.0
    placement: str = ""
    inputs: tuple[int, ...] = ()


@dataclass(frozen=True)
class PlanSegment:
    """Equal consecutive blocks of a stage, which are printed once.

    labels   the blocks' names; empty for operators between blocks
    seconds  of one block, forward and backward, for one micro-batch
    lines    the operators of one block, in order
    sources  for each label, (stage, label, line) of every operator outside the block whose value its lines read; labels
             are numbered from 0 over all segments of a stage
    """

    labels: tuple[str, ...]
    seconds: float
    lines: tuple[PlanLine, ...]
    sources: tuple[tuple[tuple[int, int, int], ...], ...] = ()


@dataclass(frozen=True)
class StageTraffic:
    """What the ranks of a stage move along one axis by one collective, in a step.

    axis        "dp", "tp" or "pp"; "shard" and "replicas": the parts of dp that ZeRO divides among, and the ranks with
                the same place in each part
    collective  a name of `autopart.cost.collectives.COLLECTIVES`, or "send": a message along pp
    bytes       of the tensors, as `autopart.cost.collectives` counts them
    stages      along pp: the stages that take part; of a message the sender, then the receiver
    """

    axis: str
    collective: str
    bytes: int
    stages: tuple[int, ...] = ()


@dataclass(frozen=True)
class PlanStage:
    """One pipeline stage on one of its ranks.

    first_position    the first position of the stage in the model
    splits            index of the stage's shardings in the plan's `splits`
    recompute         for each of its positions, what is saved for backward: everything ("none"), the outputs of matrix
                      products ("selective"), a minimum cut behind these ("mincut") or the inputs of the block ("full");
                      the rest is computed again
    forward_seconds   for one micro-batch, communication included
    backward_seconds  for one micro-batch, communication and recompute included
    sync_seconds      once a step: gradient sync and parameter update that the backward does not hide
                      (`autopart.planner.interval_seconds.exposed`), and the slowdown of the backward meanwhile
    send_seconds      for one micro-batch: what the stage sends and receives
    memory            kind -> bytes at the stage's memory peak: parameters, gradients, optimizer, activations, messages
                      (receive buffers) and transient, which is alive at the peak alone (`autopart.cost.liveness`)
    segments          its segments, equal neighbours in one
    backward_memory   where that peak is at the end of a step: kind -> bytes at the fullest moment of a backward; {}
                      otherwise
    host_bytes        bytes of a rank on its host: optimizer states and a copy of the parameters (`cost.offload`)
    traffic           what its ranks move in a step
    sends             for every stage that this one sends to: (stage, bytes of a micro-batch, seconds of the activations
                      there and of their gradients back)
    """

    first_position: int
    splits: int
    recompute: tuple[str, ...]
    forward_seconds: float
    backward_seconds: float
    sync_seconds: float
    send_seconds: float
    memory: Mapping[str, float]
    segments: tuple[PlanSegment, ...]
    sends: tuple[tuple[int, int, float], ...] = ()
    backward_memory: Mapping[str, float] = field(default_factory=dict)
    host_bytes: int = 0
    traffic: tuple[StageTraffic, ...] = ()

    def turn_seconds(self, amortization: int) -> float:
        """f = forward + backward + sync / amortization + send, in seconds (`cost.training_state.amortization`)."""
        return self.forward_seconds + self.backward_seconds + self.sync_seconds / amortization + self.send_seconds

    @property
    def memory_bytes(self) -> int:
        """Bytes at the stage's memory peak."""
        return round(sum(self.memory.values()))
