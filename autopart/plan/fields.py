"""The fields of a plan: what was decided, and what it costs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autopart.hardware.mesh import Mesh, usable_bytes
from autopart.hardware.mixed import of_stage, views_of
from autopart.plan.search_summary import SearchSummary
from autopart.plan.signature import Signature
from autopart.plan.stages import PlanStage
from autopart.sharding.notation import Strategy


@dataclass(frozen=True)
class KernelUse:
    """The calls of one fused kernel, over all ranks, in the forward pass of a micro-batch or in the optimizer's step.

    name     the kernel's name
    calls    how often it is called; of the optimizer's step: by the ranks that hold the model once
    bytes    that the calls read and write
    unfused  bytes that the operators in their place would read and write
    step     whether the optimizer's step calls it
    """

    name: str
    calls: int
    bytes: float
    unfused: float
    step: bool = False


@dataclass(frozen=True)
class PlanFields:
    """A decided parallelisation of one model on one mesh.

    model             name of the model's class
    pp, dp, tp        pipeline-, data- and tensor-parallel degree
    micro_batch       samples of one micro-batch, over all data-parallel ranks
    global_batch      samples of a step
    schedule          name in `autopart.plan.schedules.SCHEDULES`
    zero              ZeRO level
    shard_size        neighbouring data-parallel ranks that ZeRO divides among, and between whose groups slices are the
                      same; 0: all data-parallel ranks
    recompute         "none", "selective", "mincut" or "full" where all blocks do so, else "mixed" (see
                      `PlanStage.recompute`)
    precision         dtype of parameters and activations
    optimizer         name in `autopart.cost.training_state.OPTIMIZER_STATES`
    offload           one of `autopart.cost.offload.OFFLOADS`
    master            dtype of gradients, optimizer states and the optimizer's copy of the parameters; None: `precision`
    splits            the shardings of stages: axis -> node -> strategy, for one segment of each set of equal ones
    step_seconds      predicted: sum(f) + (m - 1) max(f), f being the seconds of each stage for one of m micro-batches
    bound_seconds     lower bound: no plan of the search space takes less
    gap               1 - bound_seconds / step_seconds
    status            "optimal" where the gap is zero, else "feasible"
    planning_seconds  seconds that planning took
    forward_flops     FLOPs of the matrix products of a step's forward pass over the whole batch, without recompute;
                      causal attention counts in full
    signature         the traced model that the plan is for
    """

    model: str
    mesh: Mesh
    pp: int
    dp: int
    tp: int
    micro_batch: int
    global_batch: int
    schedule: str
    zero: int
    recompute: str
    precision: str
    optimizer: str
    master: str | None
    splits: tuple[Mapping[str, Mapping[str, Strategy]], ...] = field(repr=False)
    stages: tuple[PlanStage, ...] = field(repr=False)
    step_seconds: float
    gap: float
    bound_seconds: float
    status: str
    planning_seconds: float
    forward_flops: float
    signature: Signature = field(repr=False)
    offload: str = "none"
    replicated: tuple[str, ...] = ()
    """Operators without a rule. Every rank runs them on whole tensors."""
    kernels: tuple[KernelUse, ...] = ()
    """The fused kernels that stages and the optimizer's step call."""
    notes: tuple[str, ...] = ()
    """What a user should know of this plan: products that every rank computes in full, a loss that is not the mean over
    the batch."""
    request: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The settings of the request that are not the default, and the texts of its constraints. The shell adds the name
    of the model ("model") and its batch ("batch", "sequence", "dropout")."""
    prefetch_bytes: int = 0
    """The most bytes of whole weights that a rank gathers ahead at ZeRO 3: those of the next position, while one
    computes. 0: none are gathered ahead."""
    shard_size: int = 0
    search: SearchSummary | None = field(default=None, repr=False)
    """What the search compared; None for a plan that was edited and priced again."""

    @property
    def no_fuse(self) -> tuple[str, ...]:
        """Names of kernels that the plan was to leave out."""
        return tuple(self.request.get("no_fuse", ()))

    @property
    def micro_batches(self) -> int:
        """Micro-batches in a step."""
        return self.global_batch // self.micro_batch

    @property
    def memory_bytes(self) -> tuple[int, ...]:
        """Predicted peak bytes of a rank of each stage."""
        return tuple(s.memory_bytes for s in self.stages)

    @property
    def usable_bytes(self) -> tuple[float, ...]:
        """`hardware.mesh.usable_bytes` of a rank of each stage."""
        return tuple(usable_bytes(self.mesh_of(stage)) for stage in range(self.pp))

    @property
    def fits(self) -> bool:
        """Whether the peak of every stage is within the `usable_bytes` of its device, and what lies on the host within
        `Device.usable_host_bytes`."""
        most = [self.mesh_of(stage).device.usable_host_bytes for stage in range(self.pp)]
        on_host = all(stage.host_bytes <= limit for stage, limit in zip(self.stages, most, strict=True))
        pairs = zip(self.memory_bytes, self.usable_bytes, strict=True)
        return on_host and all(nbytes <= limit * (1 + 1e-9) for nbytes, limit in pairs)

    def mesh_of(self, stage: int) -> Mesh:
        """The mesh as the ranks of a stage have it (`hardware.mixed.of_stage`): with the stage's devices and links."""
        return of_stage(self.mesh, stage, self.pp)

    def device_text(self, stage: int) -> str:
        """``" on a100-80gb"``, the devices of a stage, where those of the mesh differ; else ""."""
        return f" on {self.mesh_of(stage).device.name}" if len(views_of(self.mesh)) > 1 else ""

    @property
    def degrees(self) -> str:
        """``mesh(pp=2, dp=1, tp=2)``."""
        return f"mesh(pp={self.pp}, dp={self.dp}, tp={self.tp})"

    @property
    def starts(self) -> tuple[int, ...]:
        """The first position of every stage."""
        return tuple(s.first_position for s in self.stages)
