"""Groups of ranks that communicate, on three levels of links: in a host, between hosts of a pod, between pods."""

import math
from dataclasses import dataclass

from autopart.hardware.rows import Link


@dataclass(frozen=True)
class Group:
    """A group of ranks that communicates while all other groups of the same axis do.

    ranks     number of ranks of the group
    per_host  number of them on one host
    intra     the link between devices of one host
    inter     the link between hosts
    nics      network cards for each rank, a fraction where ranks share cards
    per_pod   number of ranks in one pod of hosts; 0: all
    spine     the link between pods (`autopart.hardware.pods.spine_of`); None where the group lies in one pod
    """

    ranks: int
    per_host: int
    intra: Link
    inter: Link
    nics: float = 1.0
    per_pod: int = 0
    spine: Link | None = None

    @property
    def hosts(self) -> int:
        """Hosts the group spans."""
        return -(-self.ranks // self.per_host)

    @property
    def pods(self) -> int:
        """Pods the group spans."""
        return -(-self.ranks // (self.per_pod or self.ranks))


def ranks_within(size: int, stride: int, unit: int) -> int:
    """The ranks of an equal part of each group of `size` ranks spaced `stride` apart, which tile the mesh: the most for
    which every part lies within `unit` neighbouring ranks, a host or a pod."""
    return math.gcd(size, unit // stride) if unit % stride == 0 else 1
