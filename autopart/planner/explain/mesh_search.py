"""Which mesh to train on: the fastest of given devices, the cheapest of several kinds, the smallest for a target."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

from torch import nn

from autopart.errors import PartitionError
from autopart.frontend.batch import Batch
from autopart.frontend.with_loss import Loss, with_loss
from autopart.hardware.mesh import Mesh
from autopart.hardware.mixed import parts_of
from autopart.passes.source import Source
from autopart.plan.data import Plan
from autopart.plan.estimate import Estimate
from autopart.planner.make_plan import make_plan, request_of
from autopart.planner.progress import OnProgress, silent
from autopart.planner.request import Request, Settings

PER_HOST = (8,)
"""Devices of a host where the user gives no number: a DGX or HGX board has 8."""

MAX_ODD_FACTOR = 7
"""The largest odd factor of the numbers of hosts to try for a target. Others seldom divide a batch or a model."""


@dataclass(frozen=True)
class MeshChoice:
    """One mesh with its plan.

    plan     the fastest plan; None: no plan fits
    problem  why there is no plan; "" where there is one
    price    of one device for an hour; None without prices
    meets    whether a step takes at most the target's seconds; True without a target
    front    whether the choice is on the Pareto front of step time and cost
    """

    mesh: Mesh
    plan: Plan | None
    problem: str = ""
    price: float | None = None
    meets: bool = False
    front: bool = False

    @property
    def step_seconds(self) -> float:
        """Predicted seconds of a step; infinite without a plan."""
        return self.plan.step_seconds if self.plan else float("inf")

    @property
    def tokens_per_second(self) -> float:
        """Predicted tokens a second; samples a second where the sequence is not known; 0 without a plan."""
        made = Estimate.of(self.plan) if self.plan else None
        return made.tokens_per_second or made.samples_per_second if made else 0.0

    @property
    def cost(self) -> float | None:
        """Cost of a step: price x devices x step_seconds / 3600; None without prices."""
        return None if self.price is None else self.price * self.mesh.size * self.step_seconds / 3600

    @property
    def cost_per_million_tokens(self) -> float | None:
        """1e6 x cost / (tokens_per_second x step_seconds); None without prices, infinite without a plan."""
        if self.cost is None:
            return None
        return self.cost / (self.tokens_per_second * self.step_seconds) * 1e6 if self.plan else float("inf")

    def to_json(self) -> dict[str, Any]:
        """The choice as plain data, with the degrees and the numbers of its plan."""
        plan = self.plan
        return {
            "mesh": str(self.mesh),
            "devices": self.mesh.size,
            "meets": self.meets,
            "front": self.front,
            "problem": self.problem,
            "price": self.price,
            "cost": self.cost if plan else None,
            "cost_per_million_tokens": self.cost_per_million_tokens if plan else None,
            "step_seconds": plan.step_seconds if plan else None,
            "tokens_per_second": self.tokens_per_second if plan else None,
            "gap": plan.gap if plan else None,
            "degrees": {"pp": plan.pp, "dp": plan.dp, "tp": plan.tp} if plan else None,
        }


def search_mesh(
    model: nn.Module,
    batch: Batch,
    *,
    loss: Loss | None = None,
    devices: str | Sequence[str],
    target_seconds: float | None = None,
    prices: Mapping[str, float] | None = None,
    per_host: Sequence[int] = PER_HOST,
    on_progress: OnProgress = silent,
    **settings: Unpack[Settings],
) -> list[MeshChoice]:
    """Plan on every mesh that some devices can form. Returns a choice for each mesh, the best first.

    loss            as in `autopart.plan`
    devices         "64:h100-80gb" for a number of devices, or "8x8:h100-80gb" for one mesh; one such text or several,
                    each with @LINK for another link than the device's usual one
    target_seconds  most seconds of a step. The numbers in `devices` are then upper limits, and the fewest devices that
                    meet the target are searched for among the counts of `device_counts`
    prices          device -> price of one device for an hour, in any currency
    per_host        numbers of devices of a host, each of which is tried
    on_progress     called with a line of text for every mesh that is planned
    settings        those of `autopart.plan`

    Meshes that meet the target come before others. Among these the least cost of a step comes first, with prices; then
    the fewest devices, with a target; then the fastest step. The model is traced once for each kind of device.

    Raises PartitionError where no mesh has a plan, for devices that fill no hosts, and for a device without a price.
    """
    asked = [devices] if isinstance(devices, str) else list(devices)
    model = with_loss(model, loss)
    request = request_of(model, batch, **settings)
    source = Source.of(model, batch, request)
    if not all(isinstance(size, int) and size > 0 for size in per_host):
        raise PartitionError(f"per_host={list(per_host)!r} are no numbers of devices", try_="per_host=[8]")
    groups = [group for text in asked for group in _groups(text, per_host, target_seconds is not None)]
    if not groups:
        raise PartitionError("no devices to train on", try_='devices="64:h100-80gb"')
    if prices is not None:
        _check_prices(prices, [mesh for group in groups for mesh in group])
    known: dict[Mesh, MeshChoice] = {}

    def choose(mesh: Mesh) -> MeshChoice:
        if mesh not in known:
            price = _mean_price(mesh, prices) if prices is not None else None
            known[mesh] = _choice(source, mesh, request, price, target_seconds)
            on_progress(f"{mesh}: {known[mesh].problem or f'{known[mesh].step_seconds:.4g} s'}")
        return known[mesh]

    for group in groups:
        if target_seconds is None:
            choose(group[-1])
        else:
            fewest_devices(group, choose)
    found = list(known.values())
    if all(choice.plan is None for choice in found):
        raise PartitionError("no mesh of these devices has a plan", "; ".join(f"{c.mesh}: {c.problem}" for c in found))
    return ranked(found, by_count=target_seconds is not None)


def _groups(text: str, per_host: Sequence[int], smaller: bool) -> list[list[Mesh]]:
    """The meshes of some devices, a list for each size of a host that they fill. Raises PartitionError without any."""
    whole = Mesh.parse(text)
    groups = [meshes_of(text, size, smaller) for size in per_host]
    if any(groups):
        return [group for group in groups if group]
    raise PartitionError(
        f"{whole.size} devices fill no hosts of {' or '.join(map(str, per_host))}",
        try_=f"another number per host, or a mesh such as 1x{whole.size}:{whole.device.name}",
    )


def meshes_of(text: str, per_host: int, smaller: bool = False) -> list[Mesh]:
    """The mesh that some devices form with `per_host` devices a host; no mesh where the devices do not fill hosts.

    At most `per_host` devices form one host. With `smaller`: the meshes of all `device_counts` counts, in rising order.
    """
    whole = Mesh.parse(text)
    if re.match(r"\s*\d+x", text) or len(parts_of(whole)) > 1:
        return [whole]
    counts = device_counts(whole.size, per_host) if smaller else [whole.size]
    return [
        replace(whole, hosts=max(1, count // per_host), devices_per_host=min(count, per_host))
        for count in counts
        if count <= per_host or count % per_host == 0
    ]


def device_counts(most: int, per_host: int) -> list[int]:
    """Numbers of devices to try, up to `most`, in rising order.

    Powers of two within a host; whole hosts, as many as 1, 3, 5 or 7 times a power of two; and `most` itself.
    """
    within = [2**k for k in range(per_host.bit_length()) if 2**k < per_host]
    whole = [n * per_host for n in range(1, most // per_host + 1) if n // (n & -n) <= MAX_ODD_FACTOR]
    return sorted({count for count in [*within, *whole, most] if count <= most})


def fewest_devices(meshes: Sequence[Mesh], choose: Callable[[Mesh], MeshChoice]) -> MeshChoice | None:
    """The smallest mesh that meets the target, of meshes in rising order; None where none does.

    Twice as many devices are faster. A few more devices may be slower, since they may not divide the batch. Therefore
    the search bisects among doublings, then tries every mesh between the last doubling that misses the target and the
    first that meets it.
    """
    doubling = _doublings(meshes)
    low, high = -1, len(doubling) - 1
    if not choose(doubling[high]).meets:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if choose(doubling[middle]).meets else (middle, high)
    least = doubling[low].size if low >= 0 else 0
    between = [mesh for mesh in meshes if least < mesh.size <= doubling[high].size]
    return next((c for c in map(choose, between) if c.meets), None)


def _doublings(meshes: Sequence[Mesh]) -> list[Mesh]:
    """The first mesh, each that has at least twice the devices of the one before, and the last."""
    taken = [meshes[0]]
    for mesh in meshes[1:]:
        if mesh.size >= 2 * taken[-1].size:
            taken.append(mesh)
    return taken if taken[-1] is meshes[-1] else [*taken, meshes[-1]]


def ranked(choices: Sequence[MeshChoice], by_count: bool = False) -> list[MeshChoice]:
    """The choices in the order of `search_mesh`, with `front` set."""
    marked = [replace(c, front=_on_front(c, choices)) for c in choices]

    def order(choice: MeshChoice) -> tuple[bool, float, int, float]:
        if not choice.meets:
            return True, 0.0, 0, choice.step_seconds
        return False, choice.cost or 0.0, choice.mesh.size if by_count else 0, choice.step_seconds

    return sorted(marked, key=order)


def _on_front(choice: MeshChoice, among: Sequence[MeshChoice]) -> bool:
    """Whether a choice has a plan and no other is at least as fast and as cheap, and better in one of the two.

    Without prices the cost is the number of devices.
    """

    def both(c: MeshChoice) -> tuple[float, float]:
        return c.step_seconds, c.mesh.size if c.cost is None else c.cost

    mine = both(choice)
    return choice.plan is not None and not any(
        other.plan is not None and both(other) != mine and both(other)[0] <= mine[0] and both(other)[1] <= mine[1]
        for other in among
    )


def _choice(source: Source, mesh: Mesh, request: Request, price: float | None, target: float | None) -> MeshChoice:
    """The best plan on a mesh, or why there is none."""
    try:
        plan = make_plan(source, mesh, request, advise=False)
    except PartitionError as error:
        return MeshChoice(mesh, None, " ".join(str(error).split()), price)
    return MeshChoice(mesh, plan, "", price, target is None or plan.step_seconds <= target)


def _mean_price(mesh: Mesh, prices: Mapping[str, float]) -> float:
    """The price of one device for an hour, on average over the mesh."""
    return sum(part.size * prices[part.device.name] for part in parts_of(mesh)) / mesh.size


def _check_prices(prices: Mapping[str, float], meshes: Sequence[Mesh]) -> None:
    names = dict.fromkeys(part.device.name for mesh in meshes for part in parts_of(mesh))
    without = [name for name in names if name not in prices]
    if without:
        raise PartitionError(f"no price for {', '.join(without)}", "every kind of device needs one, or none")
    bad = [name for name, price in prices.items() if not 0 < price < float("inf")]
    if bad:
        raise PartitionError(f"the price of {', '.join(bad)} is not a positive number")
