"""The points of the outer search: all degrees and micro-batches that the request allows, at ZeRO level 0."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from autopart.errors import PartitionError, few
from autopart.hardware.mesh import Mesh, divisors
from autopart.ir.layered_graph import LayeredGraph
from autopart.planner.request import Request

MIXED = -1
"""`SearchPoint.kind` where stages have devices of different kinds."""


@dataclass(frozen=True, order=True)
class SearchPoint:
    """Degrees, samples of a micro-batch over all ranks, ZeRO level, whether the optimizer's states are on the host, and
    the data-parallel ranks that ZeRO divides among where these are not all.

    kind  index in `hardware.mixed.views_of` the mesh: the devices and links that price the point's stages
    """

    pp: int
    dp: int
    tp: int
    micro_batch: int
    zero: int = 0
    offload: bool = False
    shard_size: int = 0
    kind: int = 0

    @property
    def shards(self) -> int:
        """Data-parallel ranks that ZeRO divides among; 1 where it divides nothing."""
        return (self.shard_size or self.dp) if self.zero else 1

    @property
    def degrees(self) -> tuple[int, int, int]:
        """(pp, dp, tp)."""
        return self.pp, self.dp, self.tp

    def step_factor(self, global_batch: int) -> float:
        """The least ratio of a step to the sum of its stages' seconds f for one micro-batch: with m micro-batches
        sum(f) + (m - 1) max(f) >= (1 + (m - 1) / pp) sum(f), since max(f) is at least the mean."""
        return 1 + (global_batch // self.micro_batch - 1) / self.pp

    def __str__(self) -> str:
        among = f" over {self.shard_size}" * bool(self.shard_size)
        where = ", optimizer on the host" * self.offload
        return f"pp={self.pp} dp={self.dp} tp={self.tp} micro-batch {self.micro_batch} zero {self.zero}{among}{where}"


def search_points(layered: LayeredGraph, mesh: Mesh, request: Request) -> Iterator[SearchPoint]:
    """Every combination of degrees and micro-batch that divides, at ZeRO level 0. Raises PartitionError if there is
    none."""
    rejected, any_found = [f"asked for: {c.text}" for c in request.constraints], False
    for pp, dp, tp in _degrees(layered, mesh, request, rejected):
        sizes = _micro_batches(layered, request, dp)
        if not sizes:
            rejected.append(f"{request.global_batch} samples do not divide over dp={dp} ranks")
        for size in filter(partial(request.allows, "micro_batch"), sizes):
            if size % dp or request.global_batch % size:
                rejected.append(f"{size} samples do not divide over dp={dp} ranks")
                continue
            any_found = True
            yield SearchPoint(pp, dp, tp, size)
    if not any_found:
        why = few(list(dict.fromkeys(rejected)), joint="; ")
        raise PartitionError("no degrees fit the batch and the mesh", why, _suggestions(layered, mesh, request))


def _degrees(
    layered: LayeredGraph, mesh: Mesh, request: Request, rejected: list[str]
) -> Iterator[tuple[int, int, int]]:
    """The triples (pp, dp, tp) whose product is the mesh's size. `tp` stays inside a host, unless the request wants it
    otherwise or there are fewer samples than hosts."""
    inside_allowed = any(request.allows("tp", tp) for tp in divisors(mesh.devices_per_host))
    tp_in_host = inside_allowed and request.global_batch >= mesh.hosts and not request.tp
    for pp in filter(partial(request.allows, "pp"), [request.pp] if request.pp else divisors(mesh.size)):
        if pp > len(layered.labels):
            rejected.append(f"pp={pp} stages but the model has {len(layered.labels)} segments")
            continue
        for tp in filter(partial(request.allows, "tp"), [request.tp] if request.tp else divisors(mesh.size // pp)):
            dp = mesh.size // pp // tp
            if request.dp not in (None, dp) or pp * dp * tp != mesh.size or not request.allows("dp", dp):
                continue
            if request.shard_size and dp % request.shard_size:
                rejected.append(f"shard_size={request.shard_size} does not divide dp={dp} ranks")
                continue
            if tp <= mesh.devices_per_host or not tp_in_host:
                yield pp, dp, tp


def _micro_batches(layered: LayeredGraph, request: Request, dp: int) -> list[int]:
    """The micro-batches to try: the one that is asked for; the whole batch for a loss that is no mean over samples;
    else of the multiples of dp that divide the batch dp x 1, 2, 4, ... and the batch / 1, 2, 4, ... Where constraints
    forbid all of these, every one."""
    possible = [size for size in divisors(request.global_batch) if size % dp == 0]
    if request.micro_batch:
        sizes = [request.micro_batch]
    elif not layered.traced.mean_of_samples:
        sizes = [request.global_batch]
    else:
        doublings = {1 << k for k in range(request.global_batch.bit_length())}
        sizes = [size for size in possible if {size // dp, request.global_batch // size} & doublings]
    return sizes if any(request.allows("micro_batch", size) for size in sizes) else possible


def _suggestions(layered: LayeredGraph, mesh: Mesh, request: Request) -> str:
    """For every setting that is asked for, the values at which there would be points, all else as it is."""
    settings = []
    for name in ("dp", "tp", "pp", "micro_batch"):
        if getattr(request, name) is not None and name not in dict(mesh.axes):
            left: dict[str, Any] = {name: None}
            with suppress(PartitionError):
                found = {getattr(point, name) for point in search_points(layered, mesh, replace(request, **left))}
                settings.append(f"{name}={' or '.join(map(str, sorted(found)))}")
    return "; ".join(settings) or "other degrees, or another batch"
