"""Constraints by hand as data: what each allows of settings, stages, strategies and checkpointing.

`constraint_text` reads them from text; `cut_constraints` has the constraints on all cuts at once.
"""

import difflib
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from autopart.cost.liveness import MODES
from autopart.errors import PartitionError
from autopart.ir.labels import is_block
from autopart.sharding.notation import Strategy

COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True, eq=False)
class Positions:
    """The quantities of the model's positions that constraints on cuts read; a field that is not known is empty.
    Instances are compared by identity, so that results for one can be cached.

    labels           of the segments; "" where one has none
    types            class name of each segment's module, "" where it has none
    parameter_bytes  bytes of the parameters that a segment is the first to read
    seconds          predicted seconds of a micro-batch, forward and backward
    bytes            predicted bytes of state and of what is saved for backward
    """

    labels: tuple[str, ...]
    types: tuple[str, ...] = ()
    parameter_bytes: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    bytes: tuple[float, ...] = ()


@dataclass(frozen=True)
class Constraint:
    """A condition that a plan must satisfy. Each method allows everything, unless the class overrides it.

    text   as it was written
    holds  False for "no ...", "not ...": the opposite of the rest of the text
    """

    text: str
    holds: bool

    def allows_setting(self, name: str, value: int | str) -> bool:
        """Whether the plan's setting `name` may be `value`."""
        return True

    def allows_stage(self, stage: int, start: int, stop: int, stages: int, positions: Positions) -> bool:
        """Whether stage number `stage` of `stages` may be the positions `start` to `stop` - 1. A cut is allowed where
        each of its stages is."""
        return True

    def allows_strategy(self, axis: str, key: str, strategy: Strategy) -> bool:
        """Whether the operator or tensor `key` may have a strategy along `axis`."""
        return True

    def allows_recompute(self, label: str, mode: str) -> bool:
        """Whether the segment `label` may have a mode of checkpointing."""
        return True

    def check(self, labels: Sequence[str], keys: Iterable[str]) -> None:
        """Raise PartitionError where the constraint names a segment, operator or tensor that the model does not
        have."""


@dataclass(frozen=True)
class Setting(Constraint):
    """A degree or another setting of the whole plan, compared with a value."""

    name: str
    comparison: str
    value: int | str

    def allows_setting(self, name: str, value: int | str) -> bool:
        return name != self.name or COMPARISONS[self.comparison](value, self.value) == self.holds

    def allows_recompute(self, label: str, mode: str) -> bool:
        same = self.name == "recompute" and self.comparison == "=" and self.holds and self.value in MODES
        return not same or not is_block(label) or mode == self.value


@dataclass(frozen=True)
class StageStart(Constraint):
    """The stage of a number begins with a segment."""

    stage: int
    label: str

    def allows_setting(self, name: str, value: int | str) -> bool:
        return name != "pp" or not self.holds or int(value) > self.stage

    def allows_stage(self, stage: int, start: int, stop: int, stages: int, positions: Positions) -> bool:
        edge = {self.stage: start, self.stage - 1: stop}.get(stage)
        return edge is None or (edge == position(self.label, positions.labels)) == self.holds

    def check(self, labels: Sequence[str], keys: Iterable[str]) -> None:
        cut_position(self, self.label, labels)


@dataclass(frozen=True)
class CutBefore(Constraint):
    """Some stage begins with a segment."""

    label: str

    def allows_setting(self, name: str, value: int | str) -> bool:
        return name != "pp" or not self.holds or int(value) > 1

    def allows_stage(self, stage: int, start: int, stop: int, stages: int, positions: Positions) -> bool:
        at = position(self.label, positions.labels)
        return not start < at < stop if self.holds else at not in (start, stop)

    def check(self, labels: Sequence[str], keys: Iterable[str]) -> None:
        cut_position(self, self.label, labels)


@dataclass(frozen=True)
class Layout(Constraint):
    """The strategies along an axis of the operators and tensors whose keys match a pattern meet one of CONDITIONS."""

    glob: str
    axis: str
    condition: str
    wanted: str

    def allows_strategy(self, axis: str, key: str, strategy: Strategy) -> bool:
        if axis != self.axis or not matches(self.glob, key):
            return True
        return CONDITIONS[self.condition](strategy, self.wanted) == self.holds

    def check(self, labels: Sequence[str], keys: Iterable[str]) -> None:
        _some(self, self.glob, list(keys), "operator or tensor", "equal blocks share the keys of the first of them")


CONDITIONS: Mapping[str, Callable[[Strategy, str], bool]] = {
    "split": lambda s, dim: any(o.kind == "S" and dim in ("", str(o.dim)) for o in s.outputs),
    "keep": lambda s, _: all(o.kind in "RC" for o in s.outputs),
    "strategy": lambda s, name: name in (s.name, s.split),
}


@dataclass(frozen=True)
class Recompute(Constraint):
    """The segments whose labels match a pattern have a mode of checkpointing."""

    glob: str
    mode: str

    def allows_recompute(self, label: str, mode: str) -> bool:
        return not matches(self.glob, label) or (mode == self.mode) == self.holds

    def check(self, labels: Sequence[str], keys: Iterable[str]) -> None:
        _some(self, self.glob, list(filter(None, labels)), "segment", "")


def check_names(constraints: Iterable[Constraint], labels: Sequence[str], keys: Iterable[str]) -> None:
    """Raise PartitionError for the first constraint that names a segment, an operator or a tensor that is not in
    `labels` and `keys`."""
    keys = list(keys)
    for constraint in constraints:
        constraint.check(labels, keys)


def position(label: str, labels: Sequence[str]) -> int:
    """The position of the segment that `label` names. Raises PartitionError where it names none or several."""
    return _position(label, tuple(labels))


@lru_cache(maxsize=1024)
def _position(label: str, labels: tuple[str, ...]) -> int:
    exact = [i for i, name in enumerate(labels) if name == label]
    if not exact and label.isdigit() and int(label) < len(labels):
        return int(label)
    found = exact or [i for i, name in enumerate(labels) if name.endswith(f".{label}")]
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(f"{labels[i]} at {i}" for i in found)
        raise PartitionError(f"{label!r} names several segments", several, "more of the label, or the position")
    known = [name for name in dict.fromkeys(labels) if name]
    raise PartitionError(
        f"there is no segment {label!r}", f"positions are 0 to {len(labels) - 1}", closest_names(label, known)
    )


def matches(glob: str, name: str) -> bool:
    """Whether a pattern matches `name`, or its end behind some dot."""
    return fnmatchcase(name, glob) or fnmatchcase(name, f"*.{glob}")


def cut_position(constraint: Constraint, label: str, labels: Sequence[str]) -> int:
    """The position of a segment before which there may be a cut. Raises PartitionError for the first segment."""
    at = position(label, labels)
    if at == 0:
        raise PartitionError(f"{constraint.text}: {label} is the model's first segment", "no cut is before it")
    return at


def _some(constraint: Constraint, glob: str, names: Sequence[str], what: str, why: str) -> None:
    if not any(matches(glob, name) for name in names):
        raise PartitionError(f"{constraint.text}: no {what} is called {glob}", why, closest_names(glob, names))


def closest_names(wanted: str, known: Sequence[str]) -> str:
    """The names of `known` closest to the one that was written, at most three, as text."""
    return ", ".join(difflib.get_close_matches(wanted, known, 3, 0.4) or known[:3])
