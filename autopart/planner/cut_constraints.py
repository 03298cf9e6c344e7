"""Constraints on all cuts at once (``cuts=METHOD``): the starts of stages that a method gives.

A method that balances gives every position a weight w. Of all ways to cut n positions into p consecutive, non-empty
parts it takes the one with the least largest sum of w; of those the least sum of squares of sums; of those the latest
starts, compared from the last.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Any

from autopart.errors import PartitionError
from autopart.ir.labels import is_block
from autopart.planner.constraints import Constraint, Positions, closest_names, cut_position


@dataclass(frozen=True)
class Cuts(Constraint):
    """All cuts at once: a method, and the text behind its colon."""

    method: str
    argument: str

    def allows_setting(self, name: str, value: int | str) -> bool:
        return name != "pp" or self.method != "manual" or value == self.stages

    def allows_stage(self, stage: int, start: int, stop: int, stages: int, positions: Positions) -> bool:
        bounds = (*self.starts(stages, positions), len(positions.labels))
        return (start, stop) == bounds[stage : stage + 2]

    def starts(self, stages: int, positions: Positions) -> tuple[int, ...]:
        """The first position of every stage. Raises PartitionError where the method cannot cut the model."""
        return _starts(self, stages, positions)

    def check(self, labels: Sequence[str], keys: Iterable[str]) -> None:
        if self.method == "manual":
            self.given(labels)

    @property
    def numbered(self) -> tuple[int, list[int]] | None:
        """Of "manual:LAYERS:BOUNDARIES": the number of layers, and the boundaries. None of "manual" with names."""
        layers, _, boundaries = self.argument.partition(":")
        return (int(layers), [int(each) for each in boundaries.split(",")]) if boundaries else None

    @property
    def stages(self) -> int:
        """The number of stages that "manual" makes."""
        return len(self.numbered[1]) - 1 if self.numbered else self.argument.count(",") + 2

    def given(self, labels: Sequence[str]) -> tuple[int, ...]:
        """The starts that "manual" names or numbers."""
        if self.numbered:
            return self._numbered_starts(labels)
        names = [name.strip() for name in self.argument.split(",")]
        starts = (0, *(cut_position(self, name, labels) for name in names))
        for before, after, name in zip(starts, starts[1:], names, strict=False):
            if after <= before:
                raise PartitionError(
                    f"{self.text}: {name} is not behind the segment before it", "stages follow the model"
                )
        return starts

    def _numbered_starts(self, labels: Sequence[str]) -> tuple[int, ...]:
        """The starts that layers have by number: layers are the segments with a label, in the model's order."""
        assert self.numbered
        layers, boundaries = self.numbered
        named = [at for at, label in enumerate(labels) if label]
        if layers != len(named):
            raise PartitionError(
                f"{self.text}: the model has {len(named)} layers, not {layers}",
                f"its layers are {_counted([labels[at] for at in named])}",
                f"manual:{len(named)}:0,{len(named) // 2},{len(named)}",
            )
        return (0, *(named[boundary] for boundary in boundaries[1:-1]))

    def of_type(self, positions: Positions) -> list[float]:
        """[positions]: 1 where the pattern of "type" matches the segment's class name, else 0."""
        found = [float(bool(re.search(self.argument, name, re.IGNORECASE))) for name in _known(positions, "types")]
        if not any(found):
            classes = sorted({name for name in positions.types if name})
            raise PartitionError(
                f"{self.text} finds no segment",
                f"the model's segments are of {', '.join(classes)}",
                closest_names(self.argument, classes),
            )
        return found


METHODS: Mapping[str, Callable[[Cuts, Positions], Sequence[float]]] = {
    "uniform": lambda cuts, positions: [float(is_block(label)) for label in positions.labels],
    "parameters": lambda cuts, positions: _known(positions, "parameter_bytes"),
    "time": lambda cuts, positions: _known(positions, "seconds"),
    "memory": lambda cuts, positions: _known(positions, "bytes"),
    "type": Cuts.of_type,
}
"""Method -> the weight of every position. The methods "time" and "memory" need predictions."""


@lru_cache(maxsize=256)
def _starts(cuts: Cuts, stages: int, positions: Positions) -> tuple[int, ...]:
    if cuts.method == "manual":
        return cuts.given(positions.labels)
    if stages > len(positions.labels):
        raise PartitionError(
            f"{cuts.text} cannot make {stages} stages", f"the model has {len(positions.labels)} places to cut"
        )
    return balanced(tuple(METHODS[cuts.method](cuts, positions)), stages)


def balanced(weights: tuple[float, ...], parts: int) -> tuple[int, ...]:
    """The starts of the parts: least largest sum of weights, then least sum of squares, then latest starts."""
    sums = [0.0, *accumulate(weights)]
    limit, _ = _row(sums, parts, max)
    _, starts = _row(sums, parts, lambda before, part: before + part**2 if part <= limit else float("inf"))
    return starts


def _row(sums: Sequence[float], parts: int, join: Callable[[float, float], float]) -> tuple[float, tuple[int, ...]]:
    """The least of `join` folded over the weights of `parts` consecutive parts, and where they start. `best[stop]` is
    the least for the parts so far that end before `stop`."""
    count = len(sums) - 1
    best: dict[int, float] = {0: 0.0}
    chosen: list[dict[int, int]] = []
    for part in range(1, parts + 1):
        stops = range(part, count - (parts - part) + 1) if part < parts else [count]
        costs = {
            stop: {start: join(best[start], sums[stop] - sums[start]) for start in best if start < stop}
            for stop in stops
        }
        chosen.append({stop: min(cost, key=lambda start: (cost[start], -start)) for stop, cost in costs.items()})
        best = {stop: min(cost.values()) for stop, cost in costs.items()}
    starts, stop = [], count
    for choice in reversed(chosen):
        stop = choice[stop]
        starts.append(stop)
    return best[count], tuple(reversed(starts))


def _counted(layers: Sequence[str]) -> str:
    """Layers with their numbers, of blocks that follow each other the first and the last."""
    told: list[str] = []
    for blocks, group in groupby(enumerate(layers), lambda layer: is_block(layer[1])):
        numbered = [f"{number} {label}" for number, label in group]
        told += [" to ".join(dict.fromkeys((numbered[0], numbered[-1])))] if blocks else numbered
    return ", ".join(told)


def _known(positions: Positions, column: str) -> Sequence[Any]:
    values: Sequence[Any] = getattr(positions, column)
    if len(values) != len(positions.labels):
        raise PartitionError(f"cuts by {column} are not possible here", f"the segments' {column} are not known")
    return values
