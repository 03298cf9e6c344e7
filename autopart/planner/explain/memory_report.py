"""The peak bytes of a plan's stages as a tree: stages, blocks, and their parameters and operators."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from torch import nn

from autopart.frontend.batch import Batch
from autopart.frontend.with_loss import Loss, with_loss
from autopart.passes.source import Source
from autopart.plan.data import Plan
from autopart.plan.report.extras import MemoryBlock
from autopart.plan.units import bytes_text
from autopart.planner.cuts import spans_of
from autopart.planner.explain.price_plan import decided
from autopart.planner.memory_tree import KINDS, Allocation, StageMemory, stage_memory
from autopart.planner.write_plan import partitioned

MIN_SHARE = 0.01
"""Share of a stage's bytes below which an allocation is not printed."""


@dataclass(frozen=True)
class Block:
    """A block of a stage with its allocations. The label "" stands for what several blocks share."""

    label: str
    allocations: tuple[Allocation, ...]

    @property
    def bytes(self) -> float:
        """Bytes of all allocations, on one rank."""
        return sum(allocation.bytes for allocation in self.allocations)


@dataclass(frozen=True)
class MemoryReport:
    """The bytes of one rank of a stage at the moment of its peak, block by block.

    The allocations of each kind sum to that kind in `PlanStage.memory`: parameters, gradients, optimizer (states and
    master copies), activations (of all micro-batches in flight), messages (received from other stages) and transient
    (gradients in flight, recomputed activations, gathered parameters, workspace).
    """

    stage: int
    blocks: tuple[Block, ...]

    @property
    def memory(self) -> dict[str, float]:
        """Kind -> bytes, for every kind."""
        found = dict.fromkeys(KINDS, 0.0)
        for allocation in (each for block in self.blocks for each in block.allocations):
            found[allocation.kind] += allocation.bytes
        return found

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def memory_report(plan: Plan, model: nn.Module, batch: Batch, *, loss: Loss | None = None) -> tuple[MemoryReport, ...]:
    """The peak bytes of one rank of every stage of a plan, by owner. `batch` and `loss` are those that the plan was
    made with.

    Raises PartitionError as `autopart.price_plan` does.
    """
    return report_traced(plan, Source.of(with_loss(model, loss), batch, plan))


def report_traced(plan: Plan, source: Source) -> tuple[MemoryReport, ...]:
    """`memory_report` for a source, which may be traced already."""
    return tuple(_tree(stage, memory.allocations()) for stage, memory in enumerate(stage_memories(plan, source)))


def stage_memories(plan: Plan, source: Source) -> Iterator[StageMemory]:
    """The liveness events of every stage of a plan, in order of stages."""
    space, found = decided(plan, source)
    spans = spans_of(plan.starts, len(space.layered.labels))
    for index, (stage, span) in enumerate(zip(plan.stages, spans, strict=True)):
        choices, graph = partitioned(space, found, plan.splits[stage.splits], span)
        yield stage_memory(space, found, choices, graph, span, stage.recompute, index)


def _tree(stage: int, allocations: Iterable[Allocation]) -> MemoryReport:
    blocks: dict[str, list[Allocation]] = {}
    for allocation in allocations:
        if allocation.bytes:
            blocks.setdefault(allocation.block, []).append(allocation)
    return MemoryReport(stage, tuple(Block(label, tuple(mine)) for label, mine in blocks.items()))


def _lines(stage: MemoryReport) -> Iterator[str]:
    memory = stage.memory
    total = sum(memory.values())
    parts = ", ".join(f"{kind} {bytes_text(memory[kind])}" for kind in KINDS if memory[kind])
    yield f"stage {stage.stage}   {bytes_text(total)} ({parts})"
    for block in equal_blocks(stage):
        name = f"{block.label} x {block.times}" if block.times > 1 else block.label
        each = " each" if block.times > 1 else ""
        yield f"  {name or 'shared'}   {bytes_text(block.bytes)}{each}"
        least = MIN_SHARE * total / block.times
        for text, kind, size in block.rows:
            if abs(size) >= least:
                yield f"    {text:<64} {kind:<12} {bytes_text(size):>10}"
        rest = sum(size for _, _, size in block.rows if abs(size) < least)
        if rest:
            yield f"    {'the rest':<64} {'':<12} {bytes_text(rest):>10}"


def equal_blocks(stage: MemoryReport) -> Iterator[MemoryBlock]:
    """The blocks of a stage, equal neighbours as one."""
    for printed, group in groupby(stage.blocks, key=_allocation_lines):
        blocks = list(group)
        name = blocks[0].label if len(blocks) == 1 else f"{blocks[0].label} .. {blocks[-1].label}"
        rows = sorted(printed, key=lambda row: -row[1])
        yield MemoryBlock(name, len(blocks), tuple((text, kind, size) for (text, kind), size in rows))


def _allocation_lines(block: Block) -> tuple[tuple[tuple[str, str], float], ...]:
    """((name, kind), bytes) of each line of a block. Allocations of equal name and kind share a line.

    Names are without the block's own path.
    """
    found: dict[tuple[str, str], float] = {}
    for allocation in block.allocations:
        key = _within(allocation.name, block.label), allocation.kind
        found[key] = found.get(key, 0.0) + allocation.bytes
    return tuple(found.items())


def _within(name: str, label: str) -> str:
    return name.removeprefix(label).lstrip(".") if label else name
