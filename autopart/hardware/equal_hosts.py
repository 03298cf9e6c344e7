"""Hosts of equal devices, their links, and the groups of ranks that communicate over them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from autopart.errors import PartitionError
from autopart.hardware.axes import check_axes
from autopart.hardware.group import Group, ranks_within
from autopart.hardware.pace import busy_device, pace
from autopart.hardware.pods import check_pods, shared_spine, spine_of
from autopart.hardware.rows import Device, Link

MAX_DEVICES = 2**31 - 1
"""Devices of the largest mesh."""


@dataclass(frozen=True)
class EqualHosts:
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
        check_axes(self.axes, self.size)

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
        does. Raises PartitionError if the mesh has no such group.
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
