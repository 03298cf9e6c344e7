"""The planner's problems and answers as plain data: what `formulate` writes and `solve` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from autopart.notation import Placement
from autopart.rules import Strategy


@dataclass(frozen=True)
class Edge:
    """One use of a value: output `output` of node `source` is operand `operand` of node `target`."""

    source: str
    output: int
    target: str
    operand: int


@dataclass
class SplitProblem:
    """Choose one strategy for every node along one mesh axis (section "Splits" of `passes.formulate`).

    seconds   node -> cost of each strategy, for all the nodes it stands for and all micro-batches
    state     node -> bytes of parameters, gradients and optimizer state under each strategy
    kept      node -> bytes autograd keeps under each strategy, per micro-batch, in all stages together
    changes   (source, output) -> {(have, want): seconds} for each change of placement that is possible
    tied      groups of nodes that take the same strategy
    """

    axis: str
    size: int
    strategies: dict[str, list[Strategy]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    state: dict[str, list[float]] = field(default_factory=dict)
    kept: dict[str, list[float]] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list)
    changes: dict[tuple[str, int], dict[tuple[Placement, Placement], float]] = field(default_factory=dict)
    tied: list[list[str]] = field(default_factory=list)
    budget: float | None = None
    """Bytes for state + kept x in-flight, over all stages; None for no limit."""
    in_flight: float = 1.0


@dataclass(frozen=True)
class SplitSolution:
    """node -> the chosen strategy, with the objective in seconds and the proven bound below it."""

    chosen: Mapping[str, Strategy]
    seconds: float
    bound: float
    status: str


@dataclass
class CutProblem:
    """Cut a row of units into stages (section "Cuts" of `passes.formulate`).

    seconds    of each unit, forward and backward, per micro-batch
    state      bytes of each unit; `shared` bytes are those of a parameter several units use: counted once a stage
    kept       bytes of each unit per micro-batch in flight
    cut_seconds  the cost of a cut before unit i
    """

    stages: int
    micro_batches: int
    seconds: Sequence[float]
    state: Sequence[float]
    kept: Sequence[float]
    transient: Sequence[float]
    shared: Sequence[tuple[Sequence[int], float]]
    cut_seconds: Sequence[float]
    in_flight: Sequence[int]
    limit: float


@dataclass(frozen=True)
class CutSolution:
    """The first unit of every stage, and the objective sum(f) + (m - 1) max(f) in seconds."""

    starts: tuple[int, ...]
    seconds: float
    bound: float
