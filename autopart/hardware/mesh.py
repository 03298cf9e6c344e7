"""The machines a plan is made for: the mesh of hosts that devices form.

Ranks fill hosts one after the other: rank r sits on host ``r // devices_per_host``. The devices and links are rows of
the tables in `autopart.hardware`, to which a user's file adds more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from autopart.errors import PartitionError
from autopart.hardware import find_device, find_link
from autopart.hardware import load_hardware as load_hardware
from autopart.hardware.group import Group as Group
from autopart.hardware.group import ranks_within
from autopart.hardware.measured import read_measured, read_wire
from autopart.hardware.pace import busy_device, pace
from autopart.hardware.pods import check_pods, pods_text, shared_spine, spine_of, split_pods
from autopart.hardware.rows import Device, Host, Link, Silicon

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("pp", "dp", "tp")
"""The axes whose degrees a user may fix: pipeline, data and tensor parallelism."""

MAX_DEVICES = 2**31 - 1
"""Devices of the largest mesh."""

_GRAMMAR = re.compile(r"(?:(\d+)x)?(\d+):([\w.-]+)(?:@([\w.-]+))?")


AnyMesh: TypeAlias = "str | Mesh | DeviceMesh"
"""What `Mesh.of` takes."""


@dataclass(frozen=True)
class Mesh:
    """`hosts` hosts of `devices_per_host` equal devices each.

    intra             the link between devices of one host
    inter             the link between hosts
    axes              degrees the user has fixed, outermost first, e.g. ``(("pp", 2), ("dp", 2), ("tp", 2))``; empty
                      leaves all to the planner. Their product divides `size`, and equals it if all are given
    nics_per_host     network cards of a host; None: as many for each device as the device's row says (see `nics`)
    hosts_per_pod     neighbouring hosts that form a pod, the last of which may have fewer; None: all
    oversubscription  bytes/s of all network cards of a pod / bytes/s between the pod and others, at least 1

    Raises PartitionError if a number is below 1 or `axes` does not fit.
    """

    hosts: int
    devices_per_host: int
    device: Device
    intra: Link
    inter: Link
    axes: tuple[tuple[str, int], ...] = ()
    nics_per_host: int | None = None
    hosts_per_pod: int | None = None
    oversubscription: float = 1.0

    def __post_init__(self) -> None:
        if min(self.hosts, self.devices_per_host) < 1:
            raise PartitionError(
                f"a mesh of {self.hosts} x {self.devices_per_host} devices is empty",
                try_="at least 1 host of 1 device",
            )
        if self.size > MAX_DEVICES:
            raise PartitionError(f"a mesh of {self.size:,} devices", f"ranks are numbered up to {MAX_DEVICES:,}")
        if self.nics_per_host is not None and self.nics_per_host < 1:
            raise PartitionError(f"hosts with {self.nics_per_host} network cards", try_="at least 1")
        check_pods(self.hosts_per_pod, self.oversubscription)
        _check_axes(self.axes, self.size)

    @staticmethod
    def usual(hosts: int, devices_per_host: int, device: Device) -> Mesh:
        """The mesh of such devices with the links that the device's row names.

        Raises PartitionError for a link that is not in the table.
        """
        return Mesh(hosts, devices_per_host, device, find_link(device.link), find_link(device.inter))

    @property
    def size(self) -> int:
        """The number of devices, which is that of ranks."""
        return self.hosts * self.devices_per_host

    @property
    def pods(self) -> int:
        """The number of pods of hosts."""
        return -(-self.hosts // (self.hosts_per_pod or self.hosts))

    @property
    def pod_size(self) -> int:
        """The number of devices of a pod."""
        return (self.hosts_per_pod or self.hosts) * self.devices_per_host

    @property
    def nics(self) -> int:
        """The network cards of one host: `nics_per_host`; where that is None, devices_per_host times the cards for each
        device in the device's row, rounded up."""
        if self.nics_per_host is not None:
            return self.nics_per_host
        return math.ceil(self.devices_per_host * self.device.nics_per_host / self.device.devices_per_host)

    def shared(self, link: Link, senders: int | None = None) -> Link:
        """`link` with the bandwidth that each sender has while `senders` devices of every host send at once.

        senders  None: all devices of the host

        The row of the link between hosts is that of one network card. A host has `nics` cards, so that each sender has
        min(1, nics / senders) of the row's bandwidth, at the row's latency. The link inside a host is a device's own
        and is returned unchanged. Where `intra` and `inter` are the same row and there are several hosts, `link` is
        taken for `inter`.

        Raises PartitionError where a host has fewer than `senders` devices.
        """
        senders = self.devices_per_host if senders is None else senders
        if not 1 <= senders <= self.devices_per_host:
            raise PartitionError(f"{senders} devices of a host cannot send at once", f"{self} has other hosts")
        if self.hosts == 1 or link != self.inter or senders <= self.nics:
            return link
        return replace(link, bandwidth=link.bandwidth * self.nics / senders)

    def link(self, stride: int, size: int) -> Link:
        """The slowest link within the groups of `size` ranks spaced `stride` apart that tile the mesh.

        The groups interleave in blocks of ``stride * size`` ranks, so that a host boundary inside a block
        parts at least one of them; the link is then `inter`, or that between pods (`spine_of`) where a pod's boundary
        does. Raises PartitionError if the mesh has no such
        group.
        """
        if min(stride, size) < 1 or (size - 1) * stride >= self.size:
            raise PartitionError(f"{self} has no group of {size} ranks spaced {stride} apart")
        if size == 1 or self.hosts == 1 or self.devices_per_host % (stride * size) == 0:
            return self.intra
        within = self.pods == 1 or self.pod_size % (stride * size) == 0
        return self.inter if within else spine_of(self.inter, self.oversubscription)

    def group(self, stride: int, size: int) -> Group:
        """The groups of `size` ranks spaced `stride` apart that tile the mesh (see `link`).

        Where they cross hosts and do not fill them evenly, `per_host` is the most that every group could be made of in
        equal parts, so that none is faster than said; so is `per_pod`. All ranks communicate at once: of the network
        cards of a host each has its share, and no more than one.
        """
        link = self.link(stride, size)
        per_host = size if link is self.intra else ranks_within(size, stride, self.devices_per_host)
        group = Group(size, per_host, self.intra, self.inter, min(1.0, self.nics / self.devices_per_host))
        if link is self.intra or link is self.inter:
            return group
        return replace(group, per_pod=ranks_within(size, stride, self.pod_size), spine=link)

    def between(self, stride: int, stages: int, micro_batches: int) -> Link:
        """The link on which ranks `stride` apart in a pipeline send to the next while as many of a host do as can, and
        as `busy_device` has them. Where a message crosses pods, all that may leave the pod at once share the bandwidth
        between pods."""
        link, senders = self.link(stride, stages), min(stride, self.devices_per_host)
        if link is self.intra or link is self.inter:
            link = self.shared(link, senders)
        else:
            cards = self.pod_size / self.devices_per_host * self.nics
            link = shared_spine(link, self.shared(self.inter, senders), cards, min(stride, self.pod_size))
        factor = pace(self.device, stages, micro_batches)
        return link if factor == 1 or not link.measured else replace(link, measured=link.measured.faster(1 / factor))

    def busy_device(self, stages: int, micro_batches: int) -> Device:
        """The device as ranks have it in a pipeline of so many stages and micro-batches: see `hardware.pace`."""
        return busy_device(self.device, stages, micro_batches)

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
            from autopart.hardware.mixed import joined

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
            from autopart.hardware.device_mesh import mesh_of

            return mesh_of(obj)
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
                from autopart.hardware.mixed import from_parts

                return from_parts(**data)
            return Mesh(
                **{
                    **data,
                    "device": _device(data["device"]),
                    "intra": _link(data["intra"]),
                    "inter": _link(data["inter"]),
                    "axes": tuple((name, degree) for name, degree in data["axes"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise PartitionError("not a mesh in JSON", why=f"{type(error).__name__}: {error}") from error


def _device(data: Mapping[str, Any]) -> Device:
    silicon = data.get("silicon")
    if silicon is not None:
        silicon = Silicon(**{**silicon, "attention": tuple(silicon["attention"])})
    host = Host(**data["host"]) if data.get("host") else None
    return Device(**{**data, "silicon": silicon, "host": host, "measured": _tables(data, read_measured)})


def _link(data: Mapping[str, Any]) -> Link:
    return Link(**{**data, "measured": _tables(data, read_wire)})


def _tables(data: Mapping[str, Any], read: Callable[[Any], Any]) -> Any:
    given = data.get("measured")
    if given is not None and (given := read(given)) is None:
        raise TypeError("`measured` is not what autopart calibrate writes")
    return given


def _check_axes(axes: Iterable[tuple[str, int]], size: int) -> None:
    names, degrees = [name for name, _ in axes], [degree for _, degree in axes]
    if len(set(names)) < len(names) or not set(names) <= set(AXES):
        raise PartitionError(f"bad mesh axes {names}", why=f"each must be one of {', '.join(AXES)}, once")
    product = math.prod(degrees)
    complete = len(names) == len(AXES)
    if min(degrees, default=1) < 1 or size % product or (complete and product != size):
        given = ", ".join(f"{name}={degree}" for name, degree in axes)
        raise PartitionError(
            f"the degrees {given} do not fit {size} devices",
            why=f"their product {product} must {'equal' if complete else 'divide'} {size}",
        )


def divisors(number: int) -> list[int]:
    """All divisors of a number, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def usable_bytes(mesh: Mesh) -> float:
    """Bytes of a device that a plan may use: 92 % of its memory. The context, the allocator's slack and libraries take
    the rest."""
    return mesh.device.memory_bytes * 0.92
