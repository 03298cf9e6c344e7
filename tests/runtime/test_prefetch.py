"""Weights in slices that are gathered ahead: the same losses and gradients, the same gathers in the same order on all
ranks, no more bytes than planned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from torch import nn

import autopart
from autopart.compile.check import one_process, worst_error
from autopart.compile.simulate import simulate_plan
from autopart.hardware.mesh import Mesh
from autopart.passes.source import Source
from autopart.planner.explain.certificate import findings
from autopart.planner.make_plan import make_plan, request_of
from autopart.runtime.groups import Groups
from autopart.runtime.prefetch import Prefetch, Wanted
from autopart.runtime.simulated import run_simulated

SHARED = ["strategy *.weight C over dp"]
"""Weights whose gradients are partial sums over dp: ZeRO has slices of all."""


@dataclasses.dataclass
class Seen:
    """What one rank gathered: the key of the weights, and whether they were on their way."""

    gathers: list[tuple[tuple[int, ...], bool]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """Of every rank, what its weights' gathers were."""
    ranks: dict[int, Seen] = {}
    found: list[Seen] = []
    gather: Callable[[Prefetch, Wanted], list[torch.Tensor]] = Prefetch.gather

    def told(self: Prefetch, wanted: Wanted) -> list[torch.Tensor]:
        if id(self) not in ranks:
            ranks[id(self)] = Seen([])
            found.append(ranks[id(self)])
        sizes = tuple(shape.numel() for shape in wanted.shapes)
        ranks[id(self)].gathers.append((sizes, wanted.key in self.ahead))
        return gather(self, wanted)

    monkeypatch.setattr(Prefetch, "gather", told)
    return found


def planned(source: Source, mesh: str, **settings: Any) -> autopart.Plan:
    """A plan at ZeRO 3 for the test's batch."""
    asked = request_of(source.model, source.batch, constraints=SHARED, zero=3, **settings)
    return make_plan(source, Mesh.parse(mesh), asked, to_run=True)


CASES = [
    ("llama", "2:cpu", {"dp": 2, "micro_batch": 4, "prefetch": 64}),
    ("llama", "4:cpu", {"dp": 2, "pp": 2, "micro_batch": 2, "prefetch": 64}),
    ("gpt2", "4:cpu", {"dp": 2, "pp": 2, "micro_batch": 2, "prefetch": 64, "recompute": "full"}),
    ("gpt2", "4:cpu", {"dp": 2, "tp": 2, "micro_batch": 4, "prefetch": 64, "recompute": "mincut"}),
    ("llama", "2:cpu", {"dp": 2, "micro_batch": 4, "prefetch": 64, "recompute": "selective"}),
    ("llama", "2:h100-80gb", {"dp": 2, "micro_batch": 4}),
]


@pytest.mark.parametrize(("name", "mesh", "settings"), CASES, ids=str)
def test_it_trains_like_one_process(seen: list[Seen], name: str, mesh: str, settings: dict[str, Any]) -> None:
    source = models.source(name)
    plan = planned(source, mesh, **settings)
    assert plan.prefetch_bytes > 0
    assert not findings(plan, source.full(plan.micro_batch, plan.mesh))
    found = simulate_plan(source, plan)
    loss, gradients = one_process(source.model, source.batch)
    assert float(found.loss) == pytest.approx(float(loss), rel=1e-5)
    assert worst_error(found.gradients, gradients)[0] < 1e-5
    for rank in seen:
        passes = 2 * plan.micro_batches
        per_pass = len(rank.gathers) / passes
        ahead = sum(on_its_way for _, on_its_way in rank.gathers)
        assert ahead >= (passes - 2) * (per_pass - 3), "all but what a pass begins with is on its way"
    by_stage: dict[int, list[Seen]] = {}
    for rank in seen:
        by_stage.setdefault(len(rank.gathers), []).append(rank)
    assert all(rank.gathers == same[0].gathers for same in by_stage.values() for rank in same)


def test_nothing_is_gathered_ahead_that_exceeds_the_bound(seen: list[Seen]) -> None:
    source = models.source("llama")
    plan = dataclasses.replace(planned(source, "2:cpu", dp=2, micro_batch=4, prefetch=64), prefetch_bytes=2**10)
    largest = max(sum(sizes) * 4 for rank in seen for sizes, _ in rank.gathers) if seen else 0
    assert largest == 0, "planning gathers nothing"
    simulate_plan(source, plan)
    for rank in seen:
        assert {sum(sizes) * 4 <= 2**10 for sizes, ahead in rank.gathers if ahead} <= {True}
        assert not all(ahead for _, ahead in rank.gathers)


def test_a_pass_in_another_order_is_learned_anew() -> None:
    """Weights that are not asked for in the known order are gathered when they are asked for, and the new order is the
    known one afterwards."""
    weights = [torch.arange(4.0) + i for i in range(3)]

    def one(groups: Groups) -> list[list[bool]]:
        slices = [nn.Parameter(w.chunk(2)[groups.dp.rank].clone()) for w in weights]
        prefetch, hits = Prefetch(groups.dp, 2**10), []
        for order in ((0, 1, 2), (0, 1, 2), (0, 2, 1), (0, 2, 1)):
            hits.append([])
            with prefetch.during("forward"):
                for i in order:
                    wanted = Wanted([slices[i]], [weights[i].shape], [torch.float32], of_module=True)
                    hits[-1].append(wanted.key in prefetch.ahead)
                    (whole,) = prefetch.gather(wanted)
                    assert torch.equal(whole, weights[i])
            assert not prefetch.ahead
        return hits

    for hits in run_simulated(1, 2, 1, one):
        assert hits == [[False] * 3, [False, True, True], [False, False, False], [False, True, True]]


def test_the_plan_counts_what_is_gathered_ahead() -> None:
    """By hand: at the peak of a backward, the block's weights and those of the block before are whole."""
    source = models.source("llama")
    none, ahead = (planned(source, "2:cpu", dp=2, micro_batch=2, prefetch=mib) for mib in (0, 64))
    block = sum(p.numel() * 4 for n, p in source.model.named_parameters() if ".layers.0." in n)
    more = ahead.memory_bytes[0] - none.memory_bytes[0]
    assert 0 < more <= max(block, source.model.model.embed_tokens.weight.nbytes)
    assert ahead.step_seconds == pytest.approx(none.step_seconds), "nothing is hidden on CPUs"
    hidden, late = (planned(source, "2:h100-80gb", dp=2, micro_batch=4, prefetch=mib) for mib in (64, 0))
    assert hidden.step_seconds < late.step_seconds
