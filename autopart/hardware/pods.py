"""Pods of hosts: full bandwidth between the hosts of a pod, less between pods."""

import math
import re
from dataclasses import replace

from autopart.errors import PartitionError
from autopart.hardware.rows import SPINE, Link

SPINE_SECONDS = 1e-6
"""Seconds that a message between pods takes more than one between hosts of a pod. Assumption: two more switches of
0.25 us each and 100 m of fibre at 5 ns/m."""

_PODS = re.compile(r"(.*)/(\d+):(\d+(?:\.\d+)?)")


def check_pods(hosts_per_pod: int | None, oversubscription: float) -> None:
    """Raise PartitionError for a pod of no host, and for oversubscription below 1."""
    if (hosts_per_pod is not None and hosts_per_pod < 1) or not 1 <= oversubscription < math.inf:
        raise PartitionError(
            f"pods of {hosts_per_pod} hosts, oversubscribed {oversubscription:g} times",
            "a pod has at least 1 host, and no more bandwidth to other pods than its hosts' network cards have",
            "hosts_per_pod=32, oversubscription=4.0",
        )


def spine_of(inter: Link, oversubscription: float) -> Link:
    """The link between pods: what a network card of a host has there while all cards of its pod send to other pods,
    1 / oversubscription of the bandwidth of `inter`, at SPINE_SECONDS more."""
    return replace(
        inter,
        bandwidth=inter.bandwidth / oversubscription,
        latency_seconds=inter.latency_seconds + SPINE_SECONDS,
        kind=SPINE if inter.kind == "network" else inter.kind,
        measured=None,
    )


def shared_spine(spine: Link, own: Link, cards: float, senders: int) -> Link:
    """The link between pods while `senders` ranks of a pod of `cards` network cards send at once: each has its part of
    the bandwidth between pods, and no more than between hosts of a pod (`own`)."""
    return replace(spine, bandwidth=min(own.bandwidth, spine.bandwidth * cards / senders))


def pods_text(hosts_per_pod: int | None, oversubscription: float) -> str:
    """``"/32:4"`` for pods of 32 hosts, oversubscribed 4:1; "" for one pod."""
    return f"/{hosts_per_pod}:{oversubscription:g}" if hosts_per_pod else ""


def split_pods(text: str) -> tuple[str, int | None, float]:
    """The text of a mesh without its pods; hosts of a pod; oversubscription. The inverse of `pods_text`."""
    match = _PODS.fullmatch(text)
    return (match[1], int(match[2]), float(match[3])) if match else (text, None, 1.0)
