"""The bytes that hosts send each other in a step, from what the stages of a plan move.

Collectives run in rings, as gloo and NCCL run large ones. Of p ranks in a ring each sends to the next, of n bytes,

    all-reduce                   2 (p - 1) / p n
    all-gather, reduce-scatter   (p - 1) / p n
    all-to-all                   n / p to each other rank, without a ring

and what is sent over an edge of the ring between two hosts counts. Over gloo the runtime makes an all-to-all and a sum
on every rank of a reduce-scatter (`runtime.process_group`).
"""

from collections.abc import Iterator, Sequence
from itertools import permutations

from autopart.plan.fields import PlanFields
from autopart.plan.stages import StageTraffic

RING_TIMES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
"""Collective -> times that (p - 1) / p of its bytes pass over each edge of the ring."""

ON_GLOO = {"reduce_scatter": "all_to_all"}
"""Collective -> what runs in its place over gloo."""


def bytes_between_hosts(plan: PlanFields) -> float:
    """Bytes of a step that cross from one host of the plan's mesh to another, both ways: of gradients, parameters,
    activations. Not counted: what no plan counts, such as the loss, and the protocols' headers."""
    return sum(_crossing(plan, index, row) for index, stage in enumerate(plan.stages) for row in stage.traffic)


def _crossing(plan: PlanFields, index: int, row: StageTraffic) -> float:
    if row.stages and index != row.stages[0]:
        return 0.0  # the first of the stages counts it
    name, nbytes = row.collective, float(row.bytes)
    if name == "send":
        return nbytes * sum(_edges(plan, ranks) > 0 for ranks in _groups(plan, index, row))
    found = 0.0
    for ranks in _groups(plan, index, row):
        p = len(ranks)
        here = ON_GLOO.get(name, name) if plan.mesh.device.type == "cpu" else name
        if here == "all_to_all":
            pairs = sum(_host(plan, a) != _host(plan, b) for a, b in permutations(ranks, 2))
            found += pairs * nbytes / p
        else:
            found += _edges(plan, ranks) * RING_TIMES[here] * (p - 1) / p * nbytes
    return found


def _groups(plan: PlanFields, index: int, row: StageTraffic) -> Iterator[list[int]]:
    """The ranks of every group of a stage along the axis of a row."""

    def rank(stage: int, dp: int, tp: int) -> int:
        return (stage * plan.dp + dp) * plan.tp + tp

    if row.axis == "pp":
        yield from ([rank(s, d, t) for s in row.stages] for d in range(plan.dp) for t in range(plan.tp))
    elif row.axis in ("dp", "shard", "replicas"):
        size = plan.shard_size or plan.dp
        parts = {
            "dp": [range(plan.dp)],
            "shard": [range(first, first + size) for first in range(0, plan.dp, size)],
            "replicas": [range(place, plan.dp, size) for place in range(size)],
        }
        yield from ([rank(index, d, t) for d in part] for part in parts[row.axis] for t in range(plan.tp))
    else:
        yield from ([rank(index, d, t) for t in range(plan.tp)] for d in range(plan.dp))


def _edges(plan: PlanFields, ranks: Sequence[int]) -> int:
    """Edges of a ring of ranks that lead to another host."""
    following = [*ranks[1:], ranks[0]]
    return sum(_host(plan, a) != _host(plan, b) for a, b in zip(ranks, following, strict=True))


def _host(plan: PlanFields, rank: int) -> int:
    return rank // plan.mesh.devices_per_host
