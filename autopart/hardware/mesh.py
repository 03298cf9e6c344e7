"""The machines a plan is made for: the mesh of hosts that devices form.

Ranks fill hosts one after the other: rank r sits on host ``r // devices_per_host``. The devices and links are rows of
the tables in `autopart.hardware`, to which a user's file adds more.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from autopart.errors import PartitionError
from autopart.hardware import find_device, find_link
from autopart.hardware import load_hardware as load_hardware
from autopart.hardware.axes import AXES as AXES
from autopart.hardware.device_mesh import hosts_of
from autopart.hardware.equal_hosts import MAX_DEVICES as MAX_DEVICES
from autopart.hardware.equal_hosts import EqualHosts
from autopart.hardware.group import Group as Group
from autopart.hardware.pods import pods_text, split_pods
from autopart.hardware.row_json import device_of, link_of
from autopart.hardware.rows import Device
from autopart.hardware.slowest import slower, slowest

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_GRAMMAR = re.compile(r"(?:(\d+)x)?(\d+):([\w.-]+)(?:@([\w.-]+))?")


AnyMesh: TypeAlias = "str | Mesh | DeviceMesh"
"""What `Mesh.of` takes."""


@dataclass(frozen=True)
class Mesh(EqualHosts):
    """Hosts of equal devices, as a plan is made for them, with their text and JSON. Fields and errors are those of
    `EqualHosts`; hosts of several kinds are a `MixedMesh`."""

    @staticmethod
    def usual(hosts: int, devices_per_host: int, device: Device) -> Mesh:
        """The mesh of such devices with the links that the device's row names.

        Raises PartitionError for a link that is not in the table.
        """
        return Mesh(hosts, devices_per_host, device, find_link(device.link), find_link(device.inter))

    def __str__(self) -> str:
        """The text `parse` reads; `axes`, a custom `intra` and `nics_per_host` are not part of it (see `to_json`)."""
        hosts = f"{self.hosts}x" if self.hosts > 1 else ""
        link = f"@{self.inter.name}" if self.inter.name != self.device.inter else ""
        pods = pods_text(self.hosts_per_pod, self.oversubscription)
        return f"{hosts}{self.devices_per_host}:{self.device.name}{link}{pods}"

    @staticmethod
    def parse(text: str) -> Mesh:
        """Read ``"[HOSTSx]DEVICES:DEVICE[@LINK][/HOSTS_PER_POD:OVERSUBSCRIPTION]"``, LINK being the one between hosts;
        or several such without pods, joined by "+".

        ``"4x8:h100-80gb"`` is 4 hosts of 8, ``"4:cpu"`` one host of 4, ``"2x8:a100-80gb@ib-hdr"`` names
        the link, ``"128x8:h100-80gb/32:4"`` has 4 pods of 32 hosts, ``"2x8:a100-80gb+2x8:h100-80gb"`` has hosts of two
        kinds (`hardware.mixed`). Raises PartitionError on other text, zero sizes, names not in the tables and kinds
        that do not form one mesh.
        """
        if "+" in text:
            return joined([Mesh.parse(part) for part in text.split("+")])
        one_pod, hosts_per_pod, oversubscription = split_pods(text.strip().lower())
        match = _GRAMMAR.fullmatch(one_pod)
        if match is None:
            raise PartitionError(
                f"not a mesh: {text!r}",
                why='the form is "[HOSTSx]DEVICES:DEVICE[@LINK][/HOSTS_PER_POD:OVERSUBSCRIPTION]", several with +',
                try_='"4x8:h100-80gb", "4:cpu", "128x8:h100-80gb/32:4" or "2x8:a100-80gb+2x8:h100-80gb"',
            )
        hosts, devices, name, link = match.groups()
        mesh = Mesh.usual(int(hosts or 1), int(devices), find_device(name))
        mesh = replace(mesh, hosts_per_pod=hosts_per_pod, oversubscription=oversubscription)
        return replace(mesh, inter=find_link(link)) if link else mesh

    @staticmethod
    def of(obj: AnyMesh) -> Mesh:
        """The mesh `obj` describes: text for `parse`, a Mesh (returned as it is) or a torch DeviceMesh.

        A DeviceMesh fixes `axes` by its dim names, which must be among AXES; its ranks must be 0, 1, ...
        in order. A cpu one gets the cpu row, a cuda one the row of the current device, with a warning if
        that is only the nearest. LOCAL_WORLD_SIZE tells the devices per host; unset, there is one host.

        Raises PartitionError on anything else.
        """
        if isinstance(obj, Mesh):
            return obj
        if isinstance(obj, str):
            return Mesh.parse(obj)
        from torch.distributed.device_mesh import DeviceMesh

        if isinstance(obj, DeviceMesh):
            hosts, devices_per_host, device, axes = hosts_of(obj)
            return replace(Mesh.usual(hosts, devices_per_host, device), axes=axes)
        raise PartitionError(
            f"not a mesh: {obj!r}",
            try_='text such as "4x8:h100-80gb", an autopart Mesh or a torch DeviceMesh',
        )

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and text; device and links go by full row, known or custom."""
        return asdict(self) | {"axes": [list(axis) for axis in self.axes]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Mesh:
        """The inverse of `to_json`. Raises PartitionError if a field is missing or unknown."""
        try:
            if "parts" in data:
                parts = [Mesh.from_json(part) for part in data["parts"]]
                return joined(parts, [(name, degree) for name, degree in data["axes"]])
            return Mesh(
                **{
                    **data,
                    "device": device_of(data["device"]),
                    "intra": link_of(data["intra"]),
                    "inter": link_of(data["inter"]),
                    "axes": tuple((name, degree) for name, degree in data["axes"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise PartitionError("not a mesh in JSON", why=f"{type(error).__name__}: {error}") from error


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


def divisors(number: int) -> list[int]:
    """All divisors of a number, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def usable_bytes(mesh: Mesh) -> float:
    """Bytes of a device that a plan may use: 92 % of its memory. The context, the allocator's slack and libraries take
    the rest."""
    return mesh.device.memory_bytes * 0.92
