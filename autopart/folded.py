"""The folded graph: runs of nodes that stay together, equal runs known as one class."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import fx

from autopart.graph import Traced, info, is_pick, value_of


@dataclass
class Run:
    """Consecutive nodes that stay together."""

    label: str
    nodes: list[fx.Node]
    kind: int = 0
    """The class: equal numbers, equal structure."""
    externals: tuple[fx.Node, ...] = ()
    """Values from other runs, in order of first use."""


@dataclass
class Folded:
    """The graph in runs.

    free      nodes that carry no gradient and need no run's values: recomputed wherever they are needed
    same      node or parameter -> the one that stands for its class
    count     how many nodes of the model each representative stands for
    keys      representative -> its name in plans: "model.layers.0.mlp.up_proj/linear", or the parameter's own
    sequence  the model as a row of positions, each the index of its run: a block that was traced once or twice may
              stand at many positions;  labels: of every position
    """

    traced: Traced
    runs: list[Run]
    free: list[fx.Node]
    same: dict[fx.Node, fx.Node]
    count: Counter[fx.Node]
    keys: dict[fx.Node, str]
    sequence: tuple[int, ...]
    labels: tuple[str, ...]
    solved: dict[Any, Any] = field(default_factory=dict)
    """Solutions of problems on this graph that come up again, by what they depend on."""

    def run_of(self) -> dict[fx.Node, int]:
        """Node -> index of its run."""
        return {n: i for i, run in enumerate(self.runs) for n in run.nodes}

    def representatives(self) -> list[fx.Node]:
        """The nodes to decide about, in graph order; picks of outputs are none of them."""
        return [n for n in self.traced.graph.nodes if n in self.same and self.same[n] is n and not is_pick(n)]

    @cached_property
    def keepers(self) -> dict[str, set[int]]:
        """Node -> the runs that keep its memory for their backward."""
        keepers: dict[str, set[int]] = {}
        for node, run in self.run_of().items():
            for root in info(node).keeps:
                keepers.setdefault(root, set()).add(run)
        return keepers

    def parameter_at(self, position: int, parameter: fx.Node) -> str:
        """The name of a parameter that the run at a position reads: a block's own are named after the block."""
        name, label = info(parameter).name, self.runs[self.sequence[position]].label
        own = bool(label) and name.startswith(label + ".")
        return self.labels[position] + name.removeprefix(label) if own else name


def parameters_of(node: fx.Node) -> list[fx.Node]:
    """The parameters an operator reads, in order."""
    return [n for n in node.all_input_nodes if info(n).kind == "parameter"]


def crossing(folded: Folded) -> list[list[tuple[fx.Node, int]]]:
    """For every place between run i-1 and run i: the values made before it that are needed after it."""
    run_of = folded.run_of()
    last: dict[tuple[fx.Node, int], int] = {}
    for node, index in run_of.items():
        for source in node.all_input_nodes:
            if source in run_of:
                value = value_of(source)
                last[value] = max(last.get(value, 0), index)
    return [
        [value for value, end in last.items() if run_of[value[0]] < place <= end]
        for place in range(len(folded.runs) + 1)
    ]


def used_parameters(run: Run) -> list[fx.Node]:
    """The parameters a run reads, each once."""
    return list(dict.fromkeys(p for n in run.nodes for p in parameters_of(n)))
