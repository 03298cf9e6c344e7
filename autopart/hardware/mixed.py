"""Meshes whose hosts are of several kinds, as 2 hosts of A100 beside 2 of H100.

A stage of a pipeline is a block of neighbouring ranks. Where all its ranks are of one kind, it has the devices and
links of that kind. Where it spans kinds, its ranks wait for each other at every collective: it has the slowest of the
devices, the least of their memory, and the slowest links.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from autopart.errors import PartitionError
from autopart.hardware.mesh import Mesh
from autopart.hardware.rows import Device, Host, Link, Slowest


@dataclass(frozen=True)
class MixedMesh(Mesh):
    """Hosts of several kinds with equally many devices each; ranks fill hosts in the order of `parts`.

    The other fields are what all ranks have together: the `slowest` device and the slowest links. The link between
    hosts of different kinds is the `slower` of the two; messages between stages take the slowest of the mesh, as
    `Mesh.link` says.

    parts  meshes of equal hosts; neighbours are of different kinds
    """

    parts: tuple[Mesh, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = {part.devices_per_host for part in self.parts}
        if sizes != {self.devices_per_host} or sum(part.hosts for part in self.parts) != self.hosts:
            raise PartitionError(
                f"{self} is not {self.hosts} hosts of {self.devices_per_host} devices",
                "the numbers of a mesh of several kinds are those of its parts",
            )

    @property
    def nics(self) -> int:
        """The fewest network cards of any host."""
        return min(part.nics for part in self.parts)

    @cached_property
    def views(self) -> tuple[Mesh, ...]:
        """The mesh as a stage has it that spans some neighbouring parts, for all ranges of parts."""
        found: dict[Mesh, None] = {}
        for first, last in self._ranges():
            found[self._seen_from(self.parts[first:last])] = None
        return tuple(found)

    @cached_property
    def _view_of(self) -> dict[tuple[int, int], int]:
        """Range of parts -> index in `views`."""
        return {r: self.views.index(self._seen_from(self.parts[slice(*r)])) for r in self._ranges()}

    def view(self, stage: int, stages: int) -> int:
        """The index in `views` of the parts that have ranks of the stage."""
        ranks = self.size // stages
        hosts = [rank // self.devices_per_host for rank in (stage * ranks, (stage + 1) * ranks - 1)]
        ends = list(itertools.accumulate(part.hosts for part in self.parts))
        first, last = (next(i for i, end in enumerate(ends) if host < end) for host in hosts)
        return self._view_of[first, last + 1]

    def _ranges(self) -> Iterable[tuple[int, int]]:
        return itertools.combinations(range(len(self.parts) + 1), 2)

    def _seen_from(self, parts: Sequence[Mesh]) -> Mesh:
        """A mesh of this one's size, with the devices and links of some parts. Where other parts overlap no messages
        with computing, neither do these: all ranks run one program."""
        there = {part.device for part in parts}
        device = slowest([part.device for part in self.parts if part.device in there])
        if not self.device.overlapped_share:
            device = replace(device, overlap=0.0)
        links = slower([part.intra for part in parts]), slower([part.inter for part in parts])
        cards = parts[0].nics_per_host if len(parts) == 1 else min(part.nics for part in parts)
        return Mesh(self.hosts, self.devices_per_host, device, *links, self.axes, cards)

    def __str__(self) -> str:
        """The text `Mesh.parse` reads: those of the parts, joined by "+"."""
        return "+".join(map(str, self.parts))

    def to_json(self) -> dict[str, Any]:
        """The parts and `axes` alone: all else follows from them."""
        return {"parts": [part.to_json() for part in self.parts], "axes": [list(axis) for axis in self.axes]}


def views_of(mesh: Mesh) -> tuple[Mesh, ...]:
    """The mesh as different stages may have it: each of the same size, all devices and links as those of a stage. A
    mesh of one kind has one view, itself."""
    return mesh.views if isinstance(mesh, MixedMesh) else (mesh,)


def view_of(mesh: Mesh, stage: int, stages: int) -> int:
    """The index in `views_of` of what the ranks of a stage have, in a pipeline of so many stages."""
    return mesh.view(stage, stages) if isinstance(mesh, MixedMesh) else 0


def of_stage(mesh: Mesh, stage: int, stages: int) -> Mesh:
    """The mesh as the ranks of a stage have it, in a pipeline of so many stages."""
    return views_of(mesh)[view_of(mesh, stage, stages)]


def parts_of(mesh: Mesh) -> tuple[Mesh, ...]:
    """The meshes of equal hosts that a mesh consists of; of one kind, itself alone."""
    return mesh.parts if isinstance(mesh, MixedMesh) else (mesh,)


def peak_flops(mesh: Mesh, dtype: str) -> float:
    """FLOP/s of all devices together for matrix products in a dtype."""
    return sum(part.size * part.device.flops[dtype] for part in parts_of(mesh))


def changed(mesh: Mesh, change: Callable[[Mesh], Mesh]) -> Mesh:
    """The mesh after a change of its devices or links; of several kinds, after the change of each part."""
    parts = parts_of(mesh)
    return joined(map(change, parts), mesh.axes) if len(parts) > 1 else change(mesh)


def joined(parts: Iterable[Mesh], axes: Iterable[tuple[str, int]] = ()) -> Mesh:
    """The mesh of the hosts of some meshes, in this order, with the degrees `axes`. Neighbours of one kind are one
    part; a mesh of one kind is a plain `Mesh`.

    Raises PartitionError where hosts have different numbers of devices, where CPUs stand beside GPUs, and for pods.
    """
    parts = tuple(parts)
    if any(part.hosts_per_pod for part in parts):
        flat = [replace(part, hosts_per_pod=None, oversubscription=1.0) for part in parts]
        raise PartitionError(
            "pods in a mesh of several kinds",
            "a pod has hosts of one kind, and all links are alike",
            "+".join(map(str, flat)),
        )
    merged: list[Mesh] = []
    for part in parts:
        if merged and replace(part, hosts=merged[-1].hosts) == merged[-1]:
            part = replace(part, hosts=part.hosts + merged.pop().hosts)
        merged.append(part)
    sizes = {part.devices_per_host: None for part in merged}
    if len(sizes) > 1:
        raise PartitionError(
            f"hosts of {' and of '.join(map(str, sizes))} devices in one mesh",
            "every host has as many devices, of whatever kind",
            "+".join(str(replace(part, devices_per_host=min(sizes))) for part in merged),
        )
    if len(merged) == 1:
        return replace(merged[0], axes=tuple(axes))
    return MixedMesh(
        hosts=sum(part.hosts for part in merged),
        devices_per_host=merged[0].devices_per_host,
        device=slowest([part.device for part in merged]),
        intra=slower([part.intra for part in merged]),
        inter=slower([part.inter for part in merged]),
        axes=tuple(axes),
        parts=tuple(merged),
    )


def from_parts(parts: Sequence[Mapping[str, Any]], axes: Iterable[tuple[str, int]] = ()) -> Mesh:
    """The inverse of `MixedMesh.to_json`. Raises PartitionError and TypeError as `Mesh.from_json` does."""
    return joined([Mesh.from_json(part) for part in parts], [(name, degree) for name, degree in axes])


def slower(links: Iterable[Link]) -> Link:
    """The link of the least bandwidth; of equal ones that of the most latency."""
    return min(links, key=lambda link: (link.bandwidth * link.share, -link.latency_seconds))


def slowest(devices: Sequence[Device]) -> Device:
    """What ranks on some devices have together; where all are equal, that device. Raises PartitionError for devices of
    different `Device.type`."""
    kinds = tuple({device: None for device in devices})
    if len(kinds) == 1:
        return kinds[0]
    types = {kind.type: kind.name for kind in kinds}
    if len(types) > 1:
        raise PartitionError(
            f"{' and '.join(types.values())} in one mesh", f"{' and '.join(types)} devices do not run one program"
        )
    share = min(kind.overlapped_share for kind in kinds)
    names = [kind.name for kind in kinds]
    return Slowest(
        name="+".join(dict.fromkeys(names)),
        flops={dtype: min(k.flops[dtype] for k in kinds) for dtype in kinds[0].flops if _all_compute(kinds, dtype)},
        memory_bytes=min(kind.memory_bytes for kind in kinds),
        bandwidth=min(kind.bandwidth for kind in kinds),
        launch_seconds=max(kind.launch_seconds for kind in kinds),
        link=kinds[0].link,
        source=f"the worst numbers of {' and '.join(names)}",
        overlap=1 / share if share else 0.0,
        host=_worst_host([kind.host_share for kind in kinds]),
        kinds=kinds,
    )


def _all_compute(kinds: Iterable[Device], dtype: str) -> bool:
    return all(dtype in kind.flops for kind in kinds)


def _worst_host(shares: Sequence[Host | None]) -> Host | None:
    """The least of each number that a device has of its host; None where a host is not known."""
    known = [share for share in shares if share is not None]
    if len(known) < len(shares):
        return None
    source = "; ".join(dict.fromkeys(share.source for share in known))
    numbers = ("memory_bytes", "bandwidth", "link", "copied", "updated")
    return Host(source=source, **{name: min(getattr(share, name) for share in known) for name in numbers})
