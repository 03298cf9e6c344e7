"""What runs slower than a plan supposes: devices, links, and computing whose seconds vary.

The step of a plan with stragglers is simulated in `autopart.plan.slowed_step`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from autopart.errors import PartitionError
from autopart.plan.fields import PlanFields


@dataclass(frozen=True)
class Stragglers:
    """What is slower than a plan supposes. By default nothing is.

    devices  share of the mesh's devices that are slow, from 0 to 1. The ranks are drawn: devices x ranks of them, a
             fraction of one with that probability
    speed    speed of computing of a drawn device / that of the others, above 0 and at most 1
    ranks    rank -> speed of computing of that device / that of the others
    hosts    host -> bandwidth of its network cards / that of the others'
    stages   (stage, later stage) -> bandwidth of the links between them / that of the others
    jitter   standard deviation / mean of the seconds of computing of one forward or backward on one device, in any
             micro-batch. Seconds are log-normal, and independent of each other
    draws    number of times that ranks and seconds are drawn
    seed     of the draws. Draw i of plans for meshes of one size has the same slow ranks

    Raises PartitionError for a number out of these ranges.
    """

    devices: float = 0.0
    speed: float = 0.8
    ranks: Mapping[int, float] = field(default_factory=dict)
    hosts: Mapping[int, float] = field(default_factory=dict)
    stages: Mapping[tuple[int, int], float] = field(default_factory=dict)
    jitter: float = 0.0
    draws: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.devices <= 1:
            raise PartitionError(f"devices={self.devices} is no share of the devices", try_="devices=0.01 for 1 %")
        speeds = {"speed": self.speed}
        for name in ("ranks", "hosts", "stages"):
            speeds |= {f"{name}[{key}]": speed for key, speed in getattr(self, name).items()}
        for name, speed in speeds.items():
            if not 0 < speed <= 1:
                raise PartitionError(
                    f"{name}={speed} is no speed of a straggler",
                    "it is relative to what the plan supposes, above 0 and at most 1",
                    f"{name}=0.8",
                )
        if not (0 <= self.jitter < math.inf):
            raise PartitionError(f"jitter={self.jitter} is no relative standard deviation", try_="jitter=0.02")
        if self.draws < 1 or self.seed < 0:
            raise PartitionError(f"draws={self.draws}, seed={self.seed}", try_="at least 1 draw, a seed from 0 on")

    @property
    def drawn(self) -> bool:
        """Whether draws differ from each other."""
        return bool(self.jitter or (self.devices and self.speed < 1))

    def check(self, plan: PlanFields) -> None:
        """Raise PartitionError where a rank, a host or a pair of stages is none of the plan's."""
        for what, given, count in (("rank", self.ranks, plan.mesh.size), ("host", self.hosts, plan.mesh.hosts)):
            for number in given:
                if not 0 <= number < count:
                    raise PartitionError(
                        f"{what} {number} is slow, and {plan.mesh} has none", f"{what}s are numbered 0 to {count - 1}"
                    )
        edges = sorted((i, to) for i, stage in enumerate(plan.stages) for to, _, _ in stage.sends)
        for pair in self.stages:
            if pair not in edges:
                raise PartitionError(
                    f"stages {pair} have a slow link, and send each other nothing",
                    f"those that do: {', '.join(map(str, edges)) or 'none'}",
                )

    def __str__(self) -> str:
        """``"1 % of devices at 0.8 of their speed"``."""
        parts = [f"{100 * self.devices:g} % of devices at {self.speed:g} of their speed"] if self.devices else []
        parts += [f"rank {rank} at {speed:g} of its speed" for rank, speed in self.ranks.items()]
        parts += [
            f"the network cards of host {host} at {speed:g} of their bandwidth" for host, speed in self.hosts.items()
        ]
        parts += [f"the links of stages {a} and {b} at {speed:g} of theirs" for (a, b), speed in self.stages.items()]
        parts += [f"{100 * self.jitter:g} % of jitter"] if self.jitter else []
        return ", ".join(parts) or "nothing slow"
