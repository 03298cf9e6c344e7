"""Where a plan's stragglers sit: how much slower every stage of every chain of pipelines is.

A *chain* is the ranks that proceed together from micro-batch to micro-batch: the pipelines of `tied` neighbouring
data-parallel ranks, one behind the other in every stage. A *cell* is a stage of a chain, tied x tp ranks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from autopart.cost.collectives import COLLECTIVES
from autopart.cost.training_state import shard_groups
from autopart.plan.fields import PlanFields
from autopart.plan.schedules.ops import Op
from autopart.plan.stages import PlanStage
from autopart.plan.stragglers import Stragglers

Array = NDArray[np.float64]

OVER_DP = re.compile(r"(forward|backward): [^:.]*\bover dp\b")
"""What a plan's note says of a collective among data-parallel ranks."""


def tied_ranks(plan: PlanFields) -> int:
    """The data-parallel ranks that wait for each other throughout a micro-batch. From ZeRO 2 on those that ZeRO divides
    among: they reduce-scatter gradients, and at ZeRO 3 gather weights, block by block. Otherwise one."""
    return (plan.shard_size or plan.dp) if plan.zero >= 2 else 1


def ties_of(plan: PlanFields) -> set[tuple[int, Op]]:
    """(stage, FORWARD or BACKWARD) in which an operator has a collective over dp."""
    return {
        (index, Op(direction))
        for index, stage in enumerate(plan.stages)
        for segment in stage.segments
        for line in segment.lines
        for direction in OVER_DP.findall(line.note)
    }


def compute_share(stage: PlanStage) -> float:
    """Seconds of computing / seconds of a stage's forward and backward; the rest is collectives. A plan has both for
    an operator's forward and backward together, so that a forward, a backward and a recompute have the same share."""
    computing = whole = 0.0
    for segment in stage.segments:
        compute, comm = sum(line.seconds for line in segment.lines), sum(line.comm_seconds for line in segment.lines)
        if compute + comm > 0:
            seconds = len(segment.labels) * segment.seconds
            whole += seconds
            computing += seconds * compute / (compute + comm)
    return computing / whole if whole else 1.0


@dataclass(frozen=True)
class Cells:
    """The slowest rank's slowdown, how much longer it takes than the plan says, of one draw.

    counts      slowdown of computing -> [stages, chains]: ranks of the cell that have it
    collective  [stages, chains]: slowdown of the collectives of a micro-batch
    message     (stage, later stage) -> [chains]: slowdown of the messages between two cells
    """

    counts: dict[float, NDArray[np.int64]]
    collective: Array
    message: dict[tuple[int, int], Array]

    def compute(self) -> Array:
        """[stages, chains]: the slowdown of the slowest rank of a cell, without jitter."""
        found = np.ones(self.collective.shape)
        for slowdown, ranks in self.counts.items():
            found = np.where(ranks > 0, np.maximum(found, slowdown), found)
        return found

    def with_jitter(self, stage: int, jitter: float, generator: np.random.Generator) -> Array:
        """[chains]: the greatest slowdown x jitter among the ranks of a stage's cells, for one forward or backward.

        The jitter J of a rank is log-normal of mean 1: ln J = s z - s^2 / 2 with s^2 = ln(1 + jitter^2) and z standard
        normal. The greatest z of n ranks has the distribution function Phi(z)^n, so that it is Phi^-1(u^(1 / n)) of a
        uniform u.
        """
        s = math.sqrt(math.log1p(jitter**2))
        found = np.zeros(self.collective.shape[1])
        for slowdown, ranks in self.counts.items():
            n = ranks[stage]
            at = np.flatnonzero(n)
            z = torch.special.ndtri(torch.from_numpy(generator.random(len(at)) ** (1 / n[at]))).numpy()
            found[at] = np.maximum(found[at], slowdown * np.exp(s * z - s * s / 2))
        return found


def cells_of(plan: PlanFields, slow: Stragglers, draw: int) -> Cells:
    """The cells of a plan in one draw."""
    tied = tied_ranks(plan)
    shape = plan.pp, plan.dp // tied
    slowdown = {rank: 1 / speed for rank, speed in slow.ranks.items()}
    for rank in _drawn_ranks(plan, slow, draw):
        slowdown[rank] = max(1 / slow.speed, slowdown.get(rank, 1.0))
    counts: dict[float, NDArray[np.int64]] = {}
    for rank, times in slowdown.items():
        counts.setdefault(times, np.zeros(shape, np.int64))[_cell(plan, tied, rank)] += 1
    counts[1.0] = counts.get(1.0, 0) + tied * plan.tp - sum(counts.values(), np.zeros(shape, np.int64))
    return Cells(dict(sorted(counts.items())), *_slow_links(plan, slow, tied))


def _drawn_ranks(plan: PlanFields, slow: Stragglers, draw: int) -> list[int]:
    generator = np.random.default_rng([slow.seed, draw])
    count = int(slow.devices * plan.mesh.size + generator.random())
    return [int(rank) for rank in generator.choice(plan.mesh.size, min(count, plan.mesh.size), replace=False)]


def _cell(plan: PlanFields, tied: int, rank: int) -> tuple[int, int]:
    """(stage, chain) of a rank."""
    stage, place = divmod(rank, plan.dp * plan.tp)
    return stage, place // plan.tp // tied


def _slow_links(plan: PlanFields, slow: Stragglers, tied: int) -> tuple[Array, dict[tuple[int, int], Array]]:
    """`Cells.collective` and `Cells.message`: a cell or a message is as slow as the slowest host of its ranks, where it
    crosses hosts."""
    chains, each = plan.dp // tied, plan.mesh.devices_per_host
    collective = np.ones((plan.pp, chains))
    edges = [(i, to) for i, stage in enumerate(plan.stages) for to, _, _ in stage.sends]
    message = {edge: np.full(chains, 1 / slow.stages.get(edge, 1.0)) for edge in edges}
    crosses = plan.mesh.group(1, plan.tp).hosts > 1
    for host, speed in slow.hosts.items():
        for rank in range(host * each, (host + 1) * each):
            stage, chain = _cell(plan, tied, rank)
            if crosses:
                collective[stage, chain] = max(collective[stage, chain], 1 / speed)
            for edge in edges:
                for other in _peers(plan, rank, stage, edge):
                    if other // each != host:
                        own = 1 / slow.stages.get(edge, 1.0)
                        message[edge][chain] = max(message[edge][chain], own / speed)
    return collective, message


def _peers(plan: PlanFields, rank: int, stage: int, edge: tuple[int, int]) -> Iterator[int]:
    """The rank at the other end of an edge between stages."""
    if stage in edge:
        yield rank + (sum(edge) - 2 * stage) * plan.dp * plan.tp


def slow_sync_seconds(plan: PlanFields, slow: Stragglers, index: int) -> float:
    """Seconds that slow hosts add to a stage's gradient sync: (1 / speed - 1) x the seconds of what it moves between
    hosts over dp in a step. The backward hides none of these: an upper bound where it has room left."""
    per_stage = plan.dp * plan.tp
    first, last = index * per_stage, (index + 1) * per_stage - 1
    each = plan.mesh.devices_per_host
    mine = [speed for host, speed in slow.hosts.items() if first // each <= host <= last // each]
    if not mine:
        return 0.0
    whole = plan.mesh.group(plan.tp, plan.dp)
    shard, replicas = shard_groups(plan.mesh, plan.tp, plan.dp, plan.shard_size)
    groups = {"dp": whole, "shard": shard or whole, "replicas": replicas or whole}
    moved = 0.0
    for row in plan.stages[index].traffic:
        group = groups.get(row.axis)
        if group and group.hosts > 1:
            moved += float(COLLECTIVES[row.collective](float(row.bytes), group))
    return (1 / min(mine) - 1) * moved
