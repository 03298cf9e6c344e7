"""What torchtitan's runs reserve on a device besides what a plan of theirs says, by formula; nothing is fitted.

What is published is the most that torch's caching allocator had reserved (torchtitan/metrics.py, `max_reserved_gib`).
It gives what a stream has freed to that stream alone (c10/cuda/CUDACachingAllocator.cpp), so that the most of every
stream adds up, whenever it was. Sources are pytorch 1963fc8 and torchtitan 9dec370, which ran in December 2024, if not
said otherwise.

again      every second product of a block is run again (`Published.again`)
logits     float32 tensors of the logits, against a plan's (`Published.logits`)
freed      what a block's forward frees before the loss (`Published.freed`): no float32 tensor of the logits, and no
           bfloat16 one, fits into the room that it leaves among what is kept
scattered  gradients' slices are of a stream of their own (pytorch/pytorch #129721): there at every moment, where a plan
           says that they are not there yet. Under a pipeline they are besides the whole ones
gathered   the root's parameters, embedding and head, are whole from forward to backward, and the last block's, which
           is not sliced after forward (torchtitan, parallelize_llama.py; `_lazy_init` of fully_shard); the blocks' in 8
           bits where they were gathered so (`Published.gathered`)
buffers    gathers of FSDP are of a stream of their own, two at a time (`AllGatherState`): the root's or a block's and
           the next block's. Every piece of a pipeline has such streams (pytorch/pytorch #165024)
messages   in place of a plan's: pipelining receives every micro-batch's input and gradient in a buffer of its own, all
           made before the first (torch/distributed/pipelining/stage.py); inputs of those in flight are what a plan
           keeps of blocks
outputs    it keeps every micro-batch's output until the step ends (`output_chunks`, of all stages until
           pytorch/pytorch #153383), of the last stage logits
kept       gradients of a stage's inputs, of all that went backward, until the next step (`clear_runtime_states`,
           stage.py; pytorch/pytorch #164329)
late       a tensor after the backward that is larger than all before it (`late`)
in flight  pieces of micro-batches whose activations are alive once gradients are (`alive`)
pieces     whole gradients of one piece at a time, where every piece has one round of micro-batches: a piece's are
           scattered after its last backward, before another's first (`number_of_rounds` of ScheduleInterleaved1F1B)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from autopart import Plan
from autopart.passes.source import Source
from autopart.plan.schedules import in_flight
from autopart.planner.explain.memory_report import MemoryReport, report_traced
from benchmarks.accuracy.published import Published

PLANNED_LOGITS = {False: 3.0, True: 2.5}
"""Float32 tensors of the logits that a plan counts: log-softmax, its gradient, the logits'; where logits are split:
exponentials, the logits' gradient, in float32 and, half as large, in bfloat16."""
STATES = 2
"""Float32 tensors as large as a rank's slices of parameters that AdamW makes in its first step."""


def reserved(plan: Plan, row: Published, source: Source) -> dict[str, float]:
    """Bytes of the fullest rank, by what takes them: a plan's kinds and this module's."""
    stages = [
        {**dict(plan.stages[n].memory), **besides(plan, row, n, one)}
        for n, one in enumerate(report_traced(plan, source))
    ]
    return max(stages, key=lambda held: sum(held.values()))


def besides(plan: Plan, row: Published, stage: int, held: MemoryReport) -> dict[str, float]:
    """Bytes of a stage that are more than the plan's, by the names above; `held` says whose those are."""
    wide, narrow = (getattr(torch, dtype or plan.precision).itemsize for dtype in (plan.master, None))
    stages = len(plan.stages)
    blocks, root = elements(plan, held)
    tokens = row.micro_batch * row.sequence / plan.dp / plan.tp
    found = {"again": -narrow * row.again * tokens * len(blocks)}
    slices = wide * (root + sum(blocks)) / plan.dp
    if stage == stages - 1 and row.logits is not None:
        found["logits"] = 4 * (row.logits - PLANNED_LOGITS[plan.tp > 1]) * tokens * row.words
        merged = narrow * tokens * row.words * plan.micro_batches if stages > 1 else 0.0
        largest = row.widest * tokens * row.words
        found["late"] = late(max(merged, wide * root), largest, STATES * slices)
    if plan.zero == 3:
        found["freed"] = narrow * row.freed * tokens
        found["scattered"] = slices if plan.micro_batches == 1 else 0.0
        found["gathered"] = narrow * root + row.gathered * blocks[-1]
        return {**found, "buffers": (narrow * root + row.gathered * blocks[0]) * (1 + 1 / plan.dp)}
    m, v, each = plan.micro_batches, row.pieces, narrow * tokens * row.width
    found["scattered"] = slices
    found["buffers"] = narrow * (blocks[0] + max(root, blocks[0]) + (v - 1) * 2 * blocks[0])
    now, planned = alive(stage, stages, m, v), in_flight(plan.schedule, stage, stages, m)
    found["in flight"] = each * len(blocks) * (now / v - planned)
    received = v - (stage == 0)
    found["kept"] = each * (v * m - now) if received else 0.0
    found["messages"] = each * (max(0.0, m * received - now * received / v) + m * (v - (stage == stages - 1)))
    found["outputs"] = each * m * (v - (stage == stages - 1))
    found["outputs"] += narrow * tokens * row.words * m if stage == stages - 1 else 0.0
    found["pieces"] = -wide * (root + sum(blocks)) * (1 - 1 / v) if m <= stages else 0.0
    return found


def late(last: float, largest: float, states: float) -> float:
    """Bytes that a tensor after the backward adds, given the largest tensor before it and the optimizer's states.

    The allocator joins no two segments, each as large as what it was made for (c10/cuda/CUDACachingAllocator.cpp), so
    that the first step makes one for `last` if it is larger than all before it. It is free at every other time. The
    states are made after it, in room that the next step then misses and has there. This is without expandable segments:
    the command of the runs on H200 asks for none, those of December 2024 are not published.

    Such tensors are the root's gradients in float32, scattered all at once (`foreach_reduce` of _fsdp_collectives.py),
    and the outputs that a last stage puts together (`_merge_outputs` of torch/distributed/pipelining/schedules.py;
    pytorch/pytorch #159251).
    """
    return max(0.0, last - states) if last > largest else 0.0


def alive(stage: int, stages: int, micro_batches: int, pieces: int) -> int:
    """Pieces of micro-batches whose activations a rank of 1F1B holds at most once there are gradients.

    Before its first backward it does one forward more than min(v m, (v - 1) p + 2 (p - 1 - s)), in one piece
    min(m, p - 1 - s) (`_get_warmup_ops` of torch/distributed/pipelining/schedules.py; Megatron-LM's interleaved
    schedule). Where these are all, no forward follows the first backward, and one piece less is alive with gradients.
    """
    left = stages - 1 - stage
    most = (pieces - 1) * min(stages, micro_batches) + 2 * left if pieces > 1 else left
    return min(pieces * micro_batches - 1, most + 1)


def elements(plan: Plan, held: MemoryReport) -> tuple[list[float], float]:
    """Parameters of every block of a stage and of all that is outside of blocks, whole on a rank of dp."""
    blocks, root = list[float](), 0.0
    for label, count in _elements(plan, held):
        if label.rpartition(".")[2].isdigit():
            blocks.append(count)
        else:
            root += count
    return blocks, root


def _elements(plan: Plan, held: MemoryReport) -> Iterator[tuple[str, float]]:
    sliced = plan.zero == 3
    size = getattr(torch, (sliced and plan.master) or plan.precision).itemsize / (plan.dp if sliced else 1)
    for block in held.blocks:
        nbytes = sum(each.bytes for each in block.allocations if each.kind == "parameters")
        if nbytes:
            yield block.label, nbytes / size
