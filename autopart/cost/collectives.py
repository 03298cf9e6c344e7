"""Seconds of collectives, by the hosts, pods and links of their ranks.

A rank in a ring of p ranks sends, of n bytes,

    all-gather, reduce-scatter   (p - 1) / p n bytes in p - 1 steps
    all-reduce                   2 (p - 1) / p n bytes in 2 (p - 1) steps

The bandwidth of a ring is that of its slowest part: the links of a device inside a host, the network cards of a host
between hosts, or the part of the bandwidth between pods that the cards of a pod have. A ring crosses the boundary of
every host, and of every pod, once: ranks are in the order of hosts and these in the order of pods. Several rings
together use all network cards of the host's ranks. This is the hierarchy of Thakur, Rabenseifner and Gropp
(Optimization of Collective Communication Operations in MPICH, IJHPCA 19(1), 2005), of alpha + beta n on every level,
with the levels of a fat tree that is oversubscribed (Leiserson, Fat-trees, IEEE Trans. Computers C-34(10), 1985).

Between hosts NCCL has trees too, of a logarithmic number of steps: for an all-reduce a double binary tree; for an
all-gather or a reduce-scatter of one rank a host, parallel aggregated trees (PAT, from NCCL 2.23 on: Jeaugey, arXiv
2506.20252).

NCCL sends by the fastest of three protocols: with flags in every 8 bytes (LL), with flags in every 128 bytes (LL128),
and without flags (Simple). Their latencies and their shares of the bandwidth are those of NCCL's own model
(NVIDIA/nccl, src/graph/tuning.cc at 01afd20).

All sizes are in bytes and may be numpy arrays. All results are in seconds. A group of one rank takes 0 s.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopart.hardware.mesh import Group
from autopart.hardware.pods import SPINE_SECONDS
from autopart.hardware.rows import SPINE, Link

BASE_SECONDS = (3.6e-6, 10e-6, 8.4e-6)
"""Seconds before the first step, by protocol: LL, LL128, Simple (nccl `baseLat`)."""

BANDWIDTH_SHARES = (1 / 4, 0.92, 1.0)
"""Bytes/s that a protocol reaches / bandwidth, by protocol."""

RING_STEPS: Mapping[str, tuple[float, float, float]] = {
    "nvlink": (0.47e-6, 1.9e-6, 3.4e-6),
    "pci": (1.0e-6, 2.5e-6, 5.7e-6),
    "network": (2.7e-6, 4.0e-6, 9.6e-6),
    SPINE: (2.7e-6 + SPINE_SECONDS, 4.0e-6 + SPINE_SECONDS, 9.6e-6 + SPINE_SECONDS),
}
"""Kind of link -> seconds of a step of a ring, by protocol (nccl `hwLat`)."""

TREE_STEPS: Mapping[str, tuple[float, float, float]] = {
    "nvlink": (0.52e-6, 1.2e-6, 28e-6),
    "pci": (1.0e-6, 1.9e-6, 28e-6),
    "network": (5.0e-6, 8.5e-6, 50e-6),
    SPINE: (5.0e-6 + SPINE_SECONDS, 8.5e-6 + SPINE_SECONDS, 50e-6 + SPINE_SECONDS),
}
"""Kind of link -> seconds of a step of a tree, by protocol (nccl `hwLat`)."""

NO_PROTOCOLS = ("host", "gloo")
"""Kinds of links over which every message has the link's latency and bandwidth."""

COPY_BANDWIDTH = 5e9
"""Bytes/s at which a rank copies a tensor into and out of the buffers of gloo. The all-reduce works in place; in an
all-gather, a reduce-scatter and an all-to-all the parts are put together or taken apart. Assumption, from ratios of the
CPU seconds of `runtime.calibrate.communication_cases` on a host of 2 cores: of 4 MiB an all-gather takes 0.7 to 0.9 of
an all-reduce on 2 and on 4 ranks, a reduce-scatter 0.8 to 1.0."""

TREE_BANDWIDTH = 0.9
"""Bandwidth of a tree / bandwidth of a ring (nccl)."""


PAT_BASE, PAT_RANK, PAT_STEPS_A_HOP, PAT_BANDWIDTH = 8e-6, 2.8e-6, 3.5, 0.75
"""Of parallel aggregated trees: seconds before the first step; seconds for each rank, which is linear still; steps that
are on their way at once; bandwidth / bandwidth of a ring (nccl 2.23, `ncclTopoTuneModel`)."""

LONE_STEPS: Mapping[str, tuple[float, float, float]] = {
    "network": (5.0e-6, 8.5e-6, 14e-6),
    SPINE: (5.0e-6 + SPINE_SECONDS, 8.5e-6 + SPINE_SECONDS, 14e-6 + SPINE_SECONDS),
}
"""Kind of link -> seconds of a step of a ring between hosts that have one rank of it each, by protocol: nothing hides a
latency there (nccl 2.23)."""


def ring_bandwidth(group: Group) -> float:
    """Bytes/s that every rank of a ring sends: the lesser of

    inside a host  bandwidth x share x lanes
    between hosts  bandwidth x share x network cards of the host's ranks
    between pods   bandwidth / oversubscription x share x network cards of the pod's ranks
    """
    found = _bandwidth_in_host(group) if group.per_host > 1 else math.inf
    if group.hosts > 1:
        found = min(found, group.inter.bandwidth * group.inter.share * group.nics * group.per_host)
    return min(found, _bandwidth_of_pod(group))


def _bandwidth_of_pod(group: Group) -> float:
    """Bytes/s that the ranks of a pod together send to other pods; infinite where the group lies in one pod."""
    link = group.spine
    return link.bandwidth * link.share * group.nics * group.per_pod if link else math.inf


def _bandwidth_in_host(group: Group) -> float:
    """Bytes/s that every rank of a ring sends inside a host: bandwidth x share x lanes.

    lanes = log(ranks of a host) / log(`Link.wired`), at most 1; with a switch, 1
    """
    link = group.intra
    lanes = min(1.0, math.log(group.per_host) / math.log(link.wired)) if link.wired else 1.0
    return link.bandwidth * link.share * lanes


def _latencies(link: Link, tree: bool, lone: bool = False) -> tuple[float, ...]:
    """Seconds of a step over a link, by protocol. `lone`: of a ring with one rank a host."""
    if lone and link.kind in LONE_STEPS:
        return LONE_STEPS[link.kind]
    return (link.latency_seconds,) * 3 if link.kind in NO_PROTOCOLS else (TREE_STEPS if tree else RING_STEPS)[link.kind]


def _runs_on_nccl(group: Group) -> bool:
    """Whether NCCL runs the group's collectives, by its protocols."""
    return (group.inter if group.hosts > 1 else group.intra).kind not in NO_PROTOCOLS


def runs_on_gloo(group: Group) -> bool:
    """Whether gloo runs the group's collectives."""
    return group.intra.kind == "gloo"


def _copy_seconds(nbytes: Any, group: Group) -> Any:
    """Seconds of the copies of a collective of `nbytes` that is not in place."""
    return nbytes / COPY_BANDWIDTH if runs_on_gloo(group) and group.ranks > 1 else 0.0 * nbytes


def _fastest_protocol(
    wire: Any, steps: tuple[float, float, float], group: Group, bandwidth: float, tree: bool = False
) -> Any:
    """Seconds to send `wire` bytes a rank, in so many steps inside hosts, between hosts of a pod, and between pods:

    min over protocols of base + sum over levels of steps x seconds of a step + wire / (bandwidth x share)
    """
    best, lone = np.inf, group.per_host == 1 and not tree
    near, far, across = steps
    own, other = _latencies(group.intra, tree), _latencies(group.inter, tree, lone)
    spine = _latencies(group.spine, tree, lone) if group.spine else (0.0,) * 3
    for base, share, a, b, c in zip(BASE_SECONDS, BANDWIDTH_SHARES, own, other, spine, strict=True):
        if not _runs_on_nccl(group):
            base, share = 0.0, 1.0
        best = np.minimum(best, base + near * a + far * b + across * c + wire / (bandwidth * share))
    return best


def _ring(wire: Any, rounds: int, group: Group) -> Any:
    """Seconds to send `wire` bytes a rank, `rounds` times around a ring. gloo wakes a thread first, which takes about
    as long as a step."""
    if group.ranks == 1:
        return 0.0 * wire
    far, across = group.hosts - group.pods, group.pods - 1
    near = rounds * (group.ranks - group.hosts) + runs_on_gloo(group)
    return _fastest_protocol(wire, (near, rounds * far, rounds * across), group, ring_bandwidth(group))


def _measured(name: str, nbytes: Any, group: Group) -> Any | None:
    """Seconds of a collective by the link's measured tables; None for a group that spans hosts or was not measured."""
    wire = group.intra.measured if group.hosts == 1 else None
    rows = wire.collectives.get(name, {}).get(str(group.ranks)) if wire else None
    return None if rows is None else measured_seconds(nbytes, rows)


def all_gather_seconds(nbytes: Any, group: Group) -> Any:
    """Seconds to give every rank the whole of `nbytes`, of which each rank holds 1 / p; or, in a reduce-scatter, each
    rank 1 / p of the sum of p tensors of `nbytes`: those of a ring, or fewer of parallel aggregated trees, which NCCL
    has for groups of one rank a host:

        base + log2(hosts) x step / 3.5 + hosts x 2.8 us + wire / (0.75 x bandwidth)

    Between pods of h hosts these trees send more than a ring: parts of 1 / hosts, 2^k of them over a distance of
    hosts / 2^(k + 1). Of the n bytes those over whole pods are less than n; at each of the log2(h) distances within a
    pod, the hosts at its end send n / 2 to the next pod. Together that is n (1 + log2(h) / 2).
    """
    wire = (group.ranks - 1) / group.ranks * nbytes
    ring = _ring(wire, 1, group) + _copy_seconds(nbytes, group)
    if group.hosts == 1 or group.per_host > 1 or group.inter.kind != "network":
        return ring
    steps = math.ceil(math.log2(group.hosts)) * LONE_STEPS["network"][-1] / PAT_STEPS_A_HOP + group.ranks * PAT_RANK
    bandwidth = ring_bandwidth(group)
    if group.spine:
        steps += math.ceil(math.log2(group.pods)) * SPINE_SECONDS
        bandwidth = min(bandwidth, _bandwidth_of_pod(group) / (1 + math.log2(group.per_pod) / 2))
    return np.minimum(ring, PAT_BASE + steps + wire / (PAT_BANDWIDTH * bandwidth))


def all_reduce_seconds(nbytes: Any, group: Group) -> Any:
    """Seconds to give every rank the sum of p tensors of `nbytes`: those of a ring, or fewer of a tree between hosts.

    The tree is a double binary tree, of 2 ceil(log2(hosts)) steps between hosts (Sanders, Speck and Traff, Parallel
    Computing 35(12), 2009). Over several pods it is such a tree of pods whose nodes are trees of hosts: as every host,
    every pod sends and receives 2 n bytes.
    """
    ring = _ring(2 * (group.ranks - 1) / group.ranks * nbytes, 2, group)
    if group.hosts == 1 or not _runs_on_nccl(group):
        return ring
    across = 2 * math.ceil(math.log2(group.pods))
    far = 2 * math.ceil(math.log2(-(-group.hosts // group.pods)))
    steps = 2 * (group.per_host - 1), far, across
    tree = _fastest_protocol(2.0 * nbytes, steps, group, ring_bandwidth(group) * TREE_BANDWIDTH, tree=True)
    return np.minimum(ring, tree)


def all_to_all_seconds(nbytes: Any, group: Group) -> Any:
    """Seconds to exchange the p parts of the `nbytes` that each rank holds, in p - 1 steps."""
    p, local = group.ranks, group.per_host
    if p == 1:
        return 0.0 * nbytes
    rates = []
    if local > 1:
        most = group.intra.bandwidth * group.intra.exchange
        rates.append((local - 1) / p / min(_bandwidth_in_host(group), most))
    if group.hosts > 1:
        most = group.inter.bandwidth * group.inter.exchange * group.nics
        rates.append((p - local) / p / most)
    within = group.per_pod or p
    if group.spine:
        rates.append((p - within) / p / (group.spine.bandwidth * group.spine.exchange * group.nics))
    steps = local - 1 + runs_on_gloo(group), within - local, p - within
    return _fastest_protocol(max(rates) * nbytes, steps, group, 1.0) + _copy_seconds(nbytes, group)


def broadcast_seconds(nbytes: Any, group: Group) -> Any:
    """Seconds to copy `nbytes` from one rank to all others, in pieces along a ring."""
    return _ring(1.0 * nbytes, 1, group)


def p2p_seconds(nbytes: Any, link: Link) -> Any:
    """Seconds to send `nbytes` from one rank to another. Without a switch, two devices have the links of a pair."""
    if link.measured:
        return measured_seconds(nbytes, link.measured.p2p)
    pair = Group(2, 2, link, link)
    return _fastest_protocol(1.0 * nbytes, (1, 0, 0), pair, _bandwidth_in_host(pair))


def message_seconds(nbytes: Any, group: Group, name: str, message: float) -> Any:
    """Seconds that `nbytes` add to messages of several tensors, of `message` bytes each; those of their own message
    where they are more. The latency of a message is shared by its bytes. Of a measured link: bytes x seconds a byte."""
    wire = group.intra.measured if group.hosts == 1 else None
    rows = wire.collectives.get(f"merged_{name}", {}).get(str(group.ranks)) if wire else None
    if rows is not None:
        return nbytes * (rows[-1][1] / rows[-1][0])
    whole = np.maximum(nbytes, message)
    return nbytes / whole * FORMULAS[name](whole, group)


FORMULAS: Mapping[str, Callable[[Any, Group], Any]] = {
    "all_reduce": all_reduce_seconds,
    "all_gather": all_gather_seconds,
    "reduce_scatter": all_gather_seconds,
    "all_to_all": all_to_all_seconds,
    "broadcast": broadcast_seconds,
}
"""Collective -> its seconds, of (bytes, group), by the latency and the bandwidth of the links."""


def collective_seconds(name: str, nbytes: Any, group: Group) -> Any:
    """Seconds of a collective: by the measured tables where they have such a group, else by FORMULAS."""
    found = _measured(name, nbytes, group)
    return FORMULAS[name](nbytes, group) if found is None else found


COLLECTIVES: Mapping[str, Callable[[Any, Group], Any]] = {name: partial(collective_seconds, name) for name in FORMULAS}
"""Collective -> its seconds, of (bytes, group): `collective_seconds`."""


def measured_seconds(nbytes: Any, points: Sequence[Sequence[float]] | NDArray[np.float64]) -> Any:
    """Seconds at `nbytes`, interpolated between measured rows (bytes, seconds, ...) that are sorted by bytes.

    between rows          linear in the logarithms of bytes and seconds
    below the first row   seconds of the first row
    beyond the last row   seconds of the last row x nbytes / bytes of the last row
    rows of 0 seconds     0
    """
    sizes, seconds = np.asarray(points, dtype=float)[:, :2].T
    if not seconds.all():
        return 0.0 * nbytes
    inside = np.interp(np.log(np.maximum(nbytes, 1.0)), np.log(sizes), np.log(seconds))
    return np.exp(inside) * np.maximum(1.0, nbytes / sizes[-1])
