"""Pods of hosts: text, JSON, groups and their prices against what leaves each pod, and the plans for them."""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace

import models
import pytest

import autopart
from autopart import Mesh, PartitionError
from autopart.cost.collectives import COLLECTIVES, p2p_seconds
from autopart.hardware.pods import SPINE_SECONDS
from autopart.hardware.rows import Link

NBYTES = 1e9
NEAR, FAR = Link("near", 1e11, 0.0, "test"), Link("far", 1e9, 0.0, "test")


@pytest.mark.parametrize(
    ("text", "pods", "oversubscription"),
    [("128x8:h100-80gb/32:4", 4, 4.0), ("6x8:h100-80gb@ib-hdr/4:2.5", 2, 2.5), ("2x8:h100-80gb/32:4", 1, 4.0)],
)
def test_pods_are_in_text_and_json(text: str, pods: int, oversubscription: float) -> None:
    mesh = Mesh.parse(text)
    assert (mesh.pods, mesh.oversubscription, str(mesh)) == (pods, oversubscription, text)
    assert Mesh.from_json(mesh.to_json()) == mesh
    old = {k: v for k, v in mesh.to_json().items() if k not in ("hosts_per_pod", "oversubscription")}
    assert Mesh.from_json(old) == replace(mesh, hosts_per_pod=None, oversubscription=1.0)


@pytest.mark.parametrize("text", ["4x8:h100-80gb/0:4", "4x8:h100-80gb/2:0.5", "4x8:h100-80gb/2", "4x8:h100-80gb/2:x"])
def test_what_is_no_pod_is_refused(text: str) -> None:
    with pytest.raises(PartitionError, match=r"pods of|not a mesh"):
        Mesh.parse(text)


@pytest.mark.parametrize("text", ["8x4:h100-80gb", "8x4:a10g", "3x2:cpu"])
def test_one_pod_changes_nothing(text: str) -> None:
    mesh = Mesh.parse(text)
    one = replace(mesh, hosts_per_pod=8, oversubscription=16.0)
    for stride, size in tiles(mesh):
        assert one.group(stride, size) == mesh.group(stride, size)
        assert one.between(stride, size, 4) == mesh.between(stride, size, 4)


def tiles(mesh: Mesh) -> Iterator[tuple[int, int]]:
    """(stride, ranks) of the groups that tile a mesh."""
    divisors = [d for d in range(1, mesh.size + 1) if mesh.size % d == 0]
    yield from ((stride, size) for stride in divisors for size in divisors if mesh.size % (stride * size) == 0)


def groups(mesh: Mesh, stride: int, size: int) -> list[list[int]]:
    """The ranks of each."""
    firsts = [r for r in range(mesh.size) if r // stride % size == 0]
    return [[first + k * stride for k in range(size)] for first in firsts]


def drawn(seed: int) -> Mesh:
    """A mesh whose last pod may have fewer hosts; with one network card or several for each device or for more."""
    draw = random.Random(seed)
    device = replace(Mesh.parse("1:h100-80gb").device, measured=None)
    per_pod, each = draw.randint(1, 4), draw.choice([1, 2, 4])
    hosts = per_pod * draw.randint(2, 4) - draw.randint(0, per_pod - 1)
    return Mesh(hosts, each, device, NEAR, FAR, (), draw.choice([1, 2, 4]), per_pod, draw.choice([1.0, 4.0, 50.0]))


def longest(mesh: Mesh, sent: dict[int, float]) -> float:
    """Seconds for which the pod that sends most bytes to others does so: a full pod, or the last one."""
    each = mesh.hosts_per_pod or mesh.hosts
    hosts = {pod: min(each, mesh.hosts - pod * each) for pod in sent}
    capacity = mesh.nics * FAR.bandwidth / mesh.oversubscription
    return max((nbytes / (hosts[pod] * capacity) for pod, nbytes in sent.items()), default=0.0)


@pytest.mark.parametrize("seed", range(12))
def test_no_collective_is_faster_than_what_leaves_a_pod(seed: int) -> None:
    """All groups of an axis at once, in rings and in all-to-alls, and the messages of a pipeline. Where the groups fill
    pods evenly and these have the least bandwidth, the seconds are just those."""
    mesh = drawn(seed)
    for stride, size in tiles(mesh):
        group, ranks = mesh.group(stride, size), groups(mesh, stride, size)
        pods = [[rank // mesh.pod_size for rank in members] for members in ranks]
        assert (group.pods > 1) == any(len(set(members)) > 1 for members in pods), (stride, size)
        held = [count for members in pods for count in Counter(members).values()]
        assert all(count % (group.per_pod or size) == 0 for count in held)
        if group.pods == 1 or size == 1:
            continue
        ring, pairs, messages = (defaultdict[int, float](float) for _ in range(3))
        for members in pods:
            for at, pod in enumerate(members):
                ring[pod] += (pod != members[(at + 1) % size]) * (size - 1) / size * NBYTES
                pairs[pod] += sum(pod != other for other in members) / size * NBYTES
            for pod, after in itertools.pairwise(members):
                messages[pod] += (pod != after) * NBYTES
        found = {name: float(COLLECTIVES[name](NBYTES, group)) for name in ("all_gather", "all_to_all")}
        found["send"] = float(p2p_seconds(NBYTES, mesh.between(stride, size, 4)))
        least = {"all_gather": longest(mesh, ring), "all_to_all": longest(mesh, pairs)}
        if size == 2:  # the next stage's ranks send when these have received
            least["send"] = longest(mesh, messages)
        for name, seconds in least.items():
            assert found[name] >= seconds * (1 - 1e-9), (name, stride, size)
        even = mesh.hosts % (mesh.hosts_per_pod or 1) == 0 and all(count == group.per_pod for count in held)
        if even and mesh.oversubscription == 50.0:
            assert found["all_gather"] == pytest.approx(least["all_gather"])
            assert found["all_to_all"] == pytest.approx(least["all_to_all"])


@pytest.mark.parametrize("name", list(COLLECTIVES))
def test_a_spine_costs_bandwidth_and_latency(name: str) -> None:
    """32 ranks on four pods of eight: by NCCL's protocols, of a few bytes and of many."""
    flat, full, scarce = (Mesh.parse(f"4x8:h100-80gb{pods}").group(1, 32) for pods in ("", "/1:1", "/1:100"))
    seconds = COLLECTIVES[name]
    steps = float(seconds(8.0, full) - seconds(8.0, flat)) / SPINE_SECONDS
    assert 3 - 1e-6 <= steps <= 24 + 1e-6 and float(seconds(8.0, scarce)) < float(seconds(8.0, full)) * 1.1
    assert float(seconds(1e10, full)) == pytest.approx(float(seconds(1e10, flat)), rel=1e-3)
    assert 30 < float(seconds(1e10, scarce) / seconds(1e10, full)) < 101


@pytest.mark.parametrize(
    ("pods", "degrees", "shard_size"),
    [("", (2, 4, 1), 0), ("/2:30", (2, 4, 1), 2), ("/2:1000", (4, 2, 1), 0)],
)
def test_the_planner_keeps_gradients_within_pods(pods: str, degrees: tuple[int, int, int], shard_size: int) -> None:
    """Eight hosts: dp over four of them; with pods of two ZeRO divides within a pod; where bandwidth between pods is
    scarcer still, pp alone crosses pods."""
    model, batch = models.build("gpt2", layers=4)
    plan = autopart.plan(model, f"8x1:cpu{pods}", batch)
    assert ((plan.pp, plan.dp, plan.tp), plan.shard_size) == (degrees, shard_size)
    assert autopart.Plan.from_json(plan.to_json()) == plan and f"8x1:cpu{pods}:" in str(plan)
    autopart.certify(plan, model, batch)
