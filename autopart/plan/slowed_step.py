"""The step of a plan some of whose devices or links are slower than it supposes, for any number of ranks.

The rules, of a plan of pp stages, dp replicas of the pipeline and tp ranks:

- Ranks of tp wait for the slowest of them at every collective, so that they compute as fast as the slowest. They begin
  when the last of their messages has come.
- Replicas proceed on their own until the gradient sync. From ZeRO 2 on those that ZeRO divides among do not: they
  communicate in every micro-batch, and are as slow as the slowest. Such replicas form a chain (`slow_cells`).
- Where an operator has a collective over dp, as the mean of a loss, all chains end that stage's forward, or its
  backward, of every micro-batch together.
- The gradient sync of a stage begins once every chain has ended the stage's last backward.

A forward of stage s in chain c, which takes F seconds in the plan, the share k of them computing, takes

    F + F k (max over ranks of slowdown x jitter - 1) + F (1 - k) (slowdown of the link - 1)

and a backward likewise. A message takes its latency x the slowdown of its link. With E[s, c] the end of the last
backward that the schedule's simulation gives,

    step = max over s of  (max over c of E[s, c]) + sync[s]

The seconds of the gradient sync and the optimizer are the plan's (slow hosts add to them: `slow_sync_seconds`).

Chains with equal slowdowns are simulated once, and different ones side by side, as arrays: cost grows with stages,
micro-batches and different chains. With jitter every chain is different.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from autopart.plan.fields import PlanFields
from autopart.plan.schedules.ops import RECEIVE_OF, Instruction, Op
from autopart.plan.schedules.simulate_many import last_backward_ends
from autopart.plan.slow_cells import Array, Cells, cells_of, compute_share, slow_sync_seconds, ties_of
from autopart.plan.stragglers import Stragglers
from autopart.plan.units import seconds_text

Lists = Sequence[Sequence[Instruction]]
Edges = Mapping[tuple[int, int], float]


@dataclass(frozen=True)
class SlowedStep:
    """A simulated step with stragglers.

    stragglers   what is slow
    nominal      seconds of the simulated step without them
    drawn        seconds of the step in every draw; one where nothing is drawn
    chains       chains of pipelines that proceed on their own
    """

    stragglers: Stragglers
    nominal: float
    drawn: tuple[float, ...]
    chains: int

    @property
    def seconds(self) -> float:
        """Mean over the draws."""
        return sum(self.drawn) / len(self.drawn)

    @property
    def change(self) -> float:
        """seconds / nominal - 1."""
        return self.seconds / self.nominal - 1

    def to_json(self) -> dict[str, Any]:
        """The step as plain data; `stragglers` as text."""
        return {
            "stragglers": str(self.stragglers),
            "seconds": self.seconds,
            "change": self.change,
            "nominal": self.nominal,
            "drawn": list(self.drawn),
            "chains": self.chains,
        }

    def __str__(self) -> str:
        """``"step 8.04 s; with 1 % of devices at 0.8 of their speed 9.90 s (+23 %)"``."""
        text = f"step {seconds_text(self.nominal)}; with {self.stragglers} {seconds_text(self.seconds)}"
        text += f" ({100 * self.change:+.1f} %)"
        if len(self.drawn) > 1:
            text += f", {seconds_text(min(self.drawn))} to {seconds_text(max(self.drawn))} in {len(self.drawn)} draws"
        return text


def slowed_step(plan: PlanFields, slow: Stragglers, lists: Lists, edges: Edges, nominal: float) -> SlowedStep:
    """The step of a plan with stragglers.

    lists    the instructions of every stage
    edges    (stage, later stage) -> latency of a message in seconds
    nominal  seconds of the simulated step without stragglers

    Raises PartitionError for stragglers that are not on the plan's mesh.
    """
    slow.check(plan)
    sync = np.array([s.sync_seconds + slow_sync_seconds(plan, slow, i) for i, s in enumerate(plan.stages)])
    draws = [cells_of(plan, slow, draw) for draw in range(slow.draws if slow.drawn else 1)]
    ends = _jittered(plan, slow, draws, lists, edges) if slow.jitter else _by_classes(plan, draws, lists, edges)
    drawn = tuple(float(seconds) for seconds in (ends + sync[:, None]).max(axis=0))
    return SlowedStep(slow, nominal, drawn, draws[0].collective.shape[1])


def _by_classes(plan: PlanFields, draws: Sequence[Cells], lists: Lists, edges: Edges) -> Array:
    """[stages, draws]: when the last chain ends its last backward. Equal chains of a draw are one."""
    links = list(edges)
    every = [np.vstack([draw.compute(), draw.collective, *(draw.message[edge] for edge in links)]) for draw in draws]
    classes = [np.unique(columns, axis=1) for columns in every]
    compute, collective, message = np.split(np.hstack(classes), [plan.pp, 2 * plan.pp])
    slowdown = dict(zip(links, message, strict=True))
    seconds = _seconds(plan, edges, partial(_constant, compute), collective, slowdown)
    return last_backward_ends(lists, seconds, [columns.shape[1] for columns in classes], ties_of(plan))


def _jittered(plan: PlanFields, slow: Stragglers, draws: Sequence[Cells], lists: Lists, edges: Edges) -> Array:
    """`_by_classes` where every forward and backward of a chain takes different seconds."""
    ends = []
    for number, draw in enumerate(draws):
        compute = partial(_random, draw, slow.jitter, np.random.default_rng([slow.seed, number, 1]))
        seconds = _seconds(plan, edges, compute, draw.collective, draw.message)
        ends.append(last_backward_ends(lists, seconds, [draw.collective.shape[1]], ties_of(plan)))
    return np.hstack(ends)


def _constant(compute: Array, entry: Instruction) -> Array:
    return compute[entry.stage]


def _random(draw: Cells, jitter: float, generator: np.random.Generator, entry: Instruction) -> Array:
    return draw.with_jitter(entry.stage, jitter, generator)


def _seconds(
    plan: PlanFields,
    edges: Edges,
    compute: Callable[[Instruction], Array],
    collective: Array,
    message: Mapping[tuple[int, int], Array],
) -> Callable[[Instruction], Array]:
    """Instruction -> [columns] of seconds, by the slowdowns of computing, collectives and messages."""
    shares = [compute_share(stage) for stage in plan.stages]

    def seconds(entry: Instruction) -> Array:
        if entry.op in RECEIVE_OF:
            edge = min(entry.stage, entry.peer), max(entry.stage, entry.peer)
            return edges[edge] * message[edge]
        stage, share = plan.stages[entry.stage], shares[entry.stage]
        whole = stage.forward_seconds if entry.op is Op.FORWARD else stage.backward_seconds
        return whole + whole * share * (compute(entry) - 1) + whole * (1 - share) * (collective[entry.stage] - 1)

    return seconds
