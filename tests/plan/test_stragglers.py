"""Steps with stragglers: against a simulation of every rank, closed forms, and plans without stragglers."""

from __future__ import annotations

import functools
import itertools
import random
from collections import defaultdict, deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from typer.testing import CliRunner

import autopart
from autopart import PartitionError, Plan, SlowedStep, Stragglers
from autopart.cli.main import app
from autopart.cost.collectives import all_reduce_seconds
from autopart.plan.schedules.ops import RECEIVE_OF, SEND_OF, Op, channel
from autopart.plan.schedules.program import instructions
from autopart.plan.schedules.verify import in_causal_order

pytestmark = pytest.mark.usefixtures("traced_once")

PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    "one device": ("1:cpu", {"micro_batch": 4}),
    "tp": ("2:cpu", {"tp": 2, "micro_batch": 4}),
    "dp": ("2x1:cpu", {"dp": 2, "micro_batch": 8, "zero": 0}),
    "three axes": ("2x4:cpu", {"pp": 2, "dp": 2, "tp": 2, "micro_batch": 2}),
    "tp over hosts": ("8x1:cpu", {"pp": 2, "dp": 2, "tp": 2, "micro_batch": 4}),
    "gpipe": ("4x2:cpu", {"pp": 4, "dp": 2, "micro_batch": 2, "schedule": "gpipe"}),
    "ZeRO 3": ("4x2:cpu", {"pp": 2, "dp": 4, "zero": 3, "micro_batch": 4}),
    "ZeRO 2 within two": ("4x2:cpu", {"pp": 2, "dp": 4, "zero": 2, "shard_size": 2, "micro_batch": 4}),
}


@functools.cache
def planned(name: str) -> Plan:
    mesh, given = PLANS[name]
    model, batch = models.build("gpt2", layers=4)
    return autopart.plan(model, mesh, batch, recompute="none", **given)


def slowed(plan: Plan, **slow: Any) -> SlowedStep:
    made = autopart.timeline(plan, slow=Stragglers(**slow)).slowed
    assert made is not None
    return made


def every_rank(plan: Plan, slow: Stragglers) -> float:
    """Seconds of a step, of which each rank has a clock, with messages between ranks and waits within groups."""
    size, each = plan.dp * plan.tp, plan.mesh.devices_per_host
    edges = {(i, to): seconds / 2 for i, s in enumerate(plan.stages) for to, _, seconds in s.sends}
    clock, arrivals = [0.0] * plan.mesh.size, defaultdict[Any, deque[float]](deque)
    lines = [[(len(g.labels), line) for g in s.segments for line in g.lines] for s in plan.stages]
    shares = [
        sum(n * line.seconds for n, line in rows) / sum(n * (line.seconds + line.comm_seconds) for n, line in rows)
        for rows in lines
    ]
    together = plan.shard_size or plan.dp if plan.zero >= 2 else 1

    def worst(speeds: Any, *keys: Any) -> float:
        return max(1 / speeds.get(key, 1.0) for key in keys)

    def wait(ranks: list[int]) -> None:
        for rank in ranks:
            clock[rank] = max(clock[other] for other in ranks)

    def compute(stage: int, forward: bool) -> None:
        """Three blocks, at whose ends ranks wait for each other."""
        told, share = plan.stages[stage], shares[stage]
        seconds = (told.forward_seconds if forward else told.backward_seconds) / 3
        ranks = range(stage * size, (stage + 1) * size)
        groups = [list(g) for _, g in itertools.groupby(ranks, lambda rank: rank // (plan.tp * together))]
        for group in groups:  # the last message has come
            wait(group)
        for _ in range(3):
            for rank in ranks:
                tp = [rank // plan.tp * plan.tp + t for t in range(plan.tp)]
                far = tp[0] // each != tp[-1] // each
                links = worst(slow.hosts, *(r // each for r in tp)) if far else 1.0
                clock[rank] += seconds * share * worst(slow.ranks, rank) + seconds * (1 - share) * links
            for group in groups:
                wait(group)
        if forward and stage == plan.pp - 1:
            wait(list(ranks))  # the mean of the loss

    for entry in in_causal_order(instructions(plan.schedule, plan.pp, plan.micro_batches, edges)):
        stage, edge = entry.stage, (min(entry.stage, entry.peer), max(entry.stage, entry.peer))
        if entry.op in (Op.FORWARD, Op.BACKWARD):
            compute(stage, entry.op is Op.FORWARD)
        for place in range(size) if entry.op in RECEIVE_OF or entry.op in SEND_OF else ():
            rank, other = stage * size + place, entry.peer * size + place
            queue = arrivals[channel(entry), place]
            if entry.op in RECEIVE_OF:
                hosts = (rank // each, other // each)
                far = worst(slow.hosts, *hosts) if hosts[0] != hosts[1] else 1.0
                queue.append(clock[rank] + edges[edge] * worst(slow.stages, edge) * far)
            else:
                clock[rank] = max(clock[rank], queue.popleft())
    return max(max(clock[i * size : (i + 1) * size]) + s.sync_seconds for i, s in enumerate(plan.stages))


@pytest.mark.parametrize("name", PLANS)
def test_nothing_slow_is_the_timeline(name: str) -> None:
    plain, made = autopart.timeline(planned(name)), autopart.timeline(planned(name), slow=Stragglers())
    assert replace(made, slowed=None) == plain and made.slowed is not None
    assert made.slowed.drawn == (plain.seconds,) and made.slowed.change == 0
    assert "slowed" not in plain.to_json() and made.to_json()["slowed"]["seconds"] == plain.seconds


@pytest.mark.parametrize("name", PLANS)
def test_against_every_rank(name: str) -> None:
    plan, generator = planned(name), random.Random(name)
    pairs = [(i, to) for i, stage in enumerate(plan.stages) for to, _, _ in stage.sends]
    for number in range(6):
        ranks = generator.sample(range(plan.mesh.size), min(number, plan.mesh.size))
        pair = generator.sample(pairs, min(len(pairs), number % 2))
        slow = Stragglers(
            ranks={rank: generator.choice([0.3, 0.5, 0.8]) for rank in ranks},
            stages={edge: generator.uniform(0.1, 1.0) for edge in pair},
            hosts={generator.randrange(plan.mesh.hosts): 0.4} if number > 2 and plan.pp > 1 and plan.dp == 1 else {},
        )
        made = autopart.timeline(plan, slow=slow).slowed
        assert made is not None and made.seconds == pytest.approx(every_rank(plan, slow), rel=1e-9), slow


@pytest.mark.parametrize("name", ["three axes", "tp over hosts", "gpipe"])
def test_slow_hosts_against_every_rank(name: str) -> None:
    """Without traffic over dp, whose seconds slow hosts add to: they have a test of their own."""
    plan = planned(name)
    plan = replace(plan, stages=tuple(replace(stage, traffic=()) for stage in plan.stages))
    for host in range(plan.mesh.hosts):
        slow = Stragglers(hosts={host: 0.2}, ranks={1: 0.7})
        made = autopart.timeline(plan, slow=slow).slowed
        assert made is not None and made.seconds == pytest.approx(every_rank(plan, slow), rel=1e-9)


def test_a_slow_host_slows_gradient_sync() -> None:
    plan = planned("dp")
    (row,) = (row for row in plan.stages[0].traffic if row.axis == "dp")
    moved = float(all_reduce_seconds(float(row.bytes), plan.mesh.group(1, 2)))
    step = autopart.timeline(plan).seconds
    assert slowed(plan, hosts={1: 0.25}).seconds == pytest.approx(step + 3 * moved)
    assert slowed(planned("tp"), hosts={0: 0.25}).change == 0, "one host has no links to others"


@pytest.mark.parametrize("speed", [0.25, 0.8, 1.0])
def test_a_slow_device_scales_the_compute(speed: float) -> None:
    plan = planned("one device")
    computing = plan.micro_batches * (plan.stages[0].forward_seconds + plan.stages[0].backward_seconds)
    for slow in ({"ranks": {0: speed}}, {"devices": 1.0, "speed": speed}):
        assert slowed(plan, **slow).seconds == pytest.approx(plan.step_seconds + computing * (1 / speed - 1))


@pytest.mark.parametrize(("share", "slow_draws"), [(0.25, 1.0), (0.0625, 0.5), (0.0, 0.0)])
def test_a_share_of_devices_is_drawn(share: float, slow_draws: float) -> None:
    """Of eight devices two are slow; or one, in half of the draws; or none."""
    made = slowed(planned("three axes"), devices=share, draws=100)
    assert np.mean(np.array(made.drawn) > made.nominal * (1 + 1e-9)) == pytest.approx(slow_draws, abs=0.15)
    assert made == slowed(planned("three axes"), devices=share, draws=100)
    other = slowed(planned("three axes"), devices=share, draws=100, seed=1)
    assert (other.drawn != made.drawn) == (slow_draws > 0)


@pytest.mark.parametrize("name", ["tp", "dp"])
def test_jitter_against_drawn_ranks(name: str) -> None:
    """The mean over draws, where ranks wait for each other after every forward and backward, or at the loss."""
    plan, generator, jitter = planned(name), np.random.default_rng(0), 0.3
    (stage,), m = plan.stages, plan.micro_batches
    comm = sum(len(g.labels) * line.comm_seconds for g in stage.segments for line in g.lines)
    s = np.sqrt(np.log1p(jitter**2))
    factors = np.exp(generator.normal(-s * s / 2, s, (4000, 2 * m, 2))) * [1.0, 1 / 0.9]
    whole = stage.forward_seconds + stage.backward_seconds
    share = (whole - comm) / whole
    seconds = np.array([stage.forward_seconds, stage.backward_seconds] * m)
    turns = seconds * (1 - share) + seconds * share * factors.max(axis=2)
    expected = turns.sum(axis=1).mean() + stage.sync_seconds
    made = slowed(plan, ranks={1: 0.9}, jitter=jitter, draws=400)
    assert made.seconds == pytest.approx(expected, rel=0.02)
    assert made.seconds > made.nominal * 1.03


@pytest.mark.parametrize(("name", "ranks"), [("three axes", 100_000), ("ZeRO 2 within two", 100_000)])
def test_100_000_ranks(name: str, ranks: int) -> None:
    """A slow device costs as much among many replicas as among two."""
    plan = planned(name)
    dp = ranks // (plan.pp * plan.tp)
    mesh = replace(plan.mesh, hosts=ranks // 4, devices_per_host=4)
    many = replace(plan, mesh=mesh, dp=dp, micro_batch=dp, global_batch=dp * plan.micro_batches)
    one = slowed(plan, ranks={plan.mesh.size - 1: 0.5})
    made = slowed(many, ranks={mesh.size - 1: 0.5})
    assert made.seconds == pytest.approx(one.seconds, rel=1e-9) and made.chains == dp // max(1, plan.shard_size)
    share = slowed(many, devices=0.01, speed=0.5, draws=1)
    assert share.seconds >= made.nominal * 1.03
    assert slowed(many, devices=0.01, speed=0.5, draws=1, jitter=0.01).seconds > share.seconds


def test_plans_are_compared() -> None:
    plans = {name: planned(name) for name in ("three axes", "tp over hosts", "gpipe")}
    found = autopart.compare_stragglers(plans, Stragglers(devices=0.5, speed=0.5))
    assert set(found) == set(plans) and [s.seconds for s in found.values()] == sorted(s.seconds for s in found.values())
    assert all(found[name] == slowed(plan, devices=0.5, speed=0.5) for name, plan in plans.items())
    with pytest.raises(PartitionError, match="no plans"):
        autopart.compare_stragglers({}, Stragglers())


@pytest.mark.parametrize(
    ("slow", "says"),
    [
        ({"devices": 1.5}, "devices=1.5"),
        ({"speed": 0.0}, "speed=0.0"),
        ({"ranks": {0: 1.2}}, "1.2"),
        ({"jitter": -0.1}, "jitter=-0.1"),
        ({"draws": 0}, "draws=0"),
        ({"ranks": {8: 0.5}}, "rank 8 is slow, and 2x4:cpu has none"),
        ({"hosts": {2: 0.5}}, "host 2 is slow"),
        ({"stages": {(1, 0): 0.5}}, r"stages \(1, 0\)"),
    ],
)
def test_what_cannot_be_slow_is_refused(slow: dict[str, Any], says: str) -> None:
    with pytest.raises(PartitionError, match=says):
        slowed(planned("three axes"), **slow)


def test_the_shell_says_what_stragglers_cost(tmp_path: Path) -> None:
    file, plan = str(tmp_path / "plan.json"), planned("three axes")
    plan.save(file)
    given = ["--slow-devices", "25%", "--slow-speed", "0.5", "--slow", "rank 3=0.4", "--slow", "stages 0-1=0.9"]
    shown = CliRunner().invoke(app, ["show", file, "--timeline", *given])
    same = slowed(plan, devices=0.25, speed=0.5, ranks={3: 0.4}, stages={(0, 1): 0.9})
    assert shown.stdout.splitlines()[1] == str(same)
    assert "25 % of devices at 0.5 of their speed, rank 3 at 0.4 of its speed" in str(same) and "(+" in str(same)
    for wrong in (["--slow", "disk 3=0.4"], ["--jitter", "much"], ["--slow", "host 0=0"]):
        assert CliRunner().invoke(app, ["show", file, *wrong]).exit_code
