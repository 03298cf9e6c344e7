"""Constraints by hand: what a user fixes or forbids in a plan, read from text into data a planner can ask.

    form                                            what it asks for
    ----------------------------------------------  ---------------------------------------------------------------
    tp=8, pp!=1, tp<=4                              a setting: pp, dp, tp, micro_batch, zero, recompute or schedule;
                                                    numbers also compare by <=, >=, < and >
    stage 2 starts at layers.10                     where one stage begins; stages count from 0
    cut before layers.10                            some stage begins there, whatever its number
    cuts=manual:layers.8,layers.16                  the first run of every stage but the first; says how many there are
    cuts=uniform                                    as equal numbers of numbered blocks as can be
    cuts=parameters                                 the largest stage has the fewest bytes of parameters
    cuts=time                                       the slowest stage takes the least predicted time
    cuts=memory                                     the largest stage takes the fewest predicted bytes
    cuts=type:DecoderLayer                          as equal numbers as can be of runs whose class has that pattern
    split layers.*.up_proj.weight dim 0 over tp     a tensor, or an operator's output, is split along that dim
    split layers.*.up_proj.weight over tp           the same along any dim
    keep lm_head.weight whole over tp               every rank of the axis has all of it
    strategy layers.*.up_proj/linear n over tp      an operator's strategy by its name: a split letter, or R, C, P
    layers.*.up_proj/linear: n/tp                   the same as plans print it
    recompute layers.3 full                         what runs do with what backward needs: none, selective or full

Any form but ``cuts=`` may follow "no", "not" or "do not", which asks for its opposite: "no cut before layers.10",
"do not split lm_head.weight over tp".

Runs go by their label, or the end of one where no other ends so (``layers.10`` for ``model.layers.10``); a plain number
is a run's position in the model's row, where no label is that number. Operators and tensors go by their key in the
plan's `splits`, as a pattern in which ``*`` stands for anything; the front may again be left out. Equal blocks share
the keys of the first of them.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import accumulate
from typing import Any

from autopart.errors import PartitionError, closest
from autopart.ir.labels import is_block
from autopart.plan.schedules import SCHEDULES
from autopart.sharding.notation import Strategy

NUMBERS = ("pp", "dp", "tp", "micro_batch")
"""Settings that are any positive number."""
VALUES: Mapping[str, tuple[int | str, ...]] = {
    "zero": (0, 1, 2, 3),
    "recompute": ("none", "selective", "full", "mixed"),
    "schedule": tuple(SCHEDULES),
}
"""Settings that are one of a few values."""
AXES = ("dp", "tp")
"""The axes inside a stage, along which tensors may be split."""
MODES = ("none", "selective", "full")
COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
NEGATION = re.compile(r"(do not|not|no)\s+")


@dataclass(frozen=True, eq=False)
class Positions:
    """The model's row of runs, a column for each thing that cuts may go by; a column that is not known is empty.
    Compared by identity, so that a planner may ask about one row many times.

    types            the class of each run's module, "" where it has none
    parameter_bytes  of the parameters it is the first to use
    seconds          predicted, forward and backward, of a micro-batch
    bytes            predicted, all of what it keeps on a device
    """

    labels: tuple[str, ...]
    types: tuple[str, ...] = ()
    parameter_bytes: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    bytes: tuple[float, ...] = ()


@dataclass(frozen=True)
class Constraint:
    """One thing asked for. What a constraint is not about it allows.

    text    as it was written
    holds   False for the opposite of what the text says behind its "no"
    """

    text: str
    holds: bool

    def allows_setting(self, name: str, value: int | str) -> bool:
        """Whether the plan's setting `name` may be `value`."""
        return True

    def allows_stage(self, stage: int, start: int, stop: int, stages: int, positions: Positions) -> bool:
        """Whether stage number `stage` of `stages` may be the runs `start` to `stop` - 1. A cut is allowed where each
        of its stages is."""
        return True

    def allows_strategy(self, axis: str, key: str, strategy: Strategy) -> bool:
        """Whether the operator or tensor `key` may be treated so along `axis`."""
        return True

    def allows_recompute(self, label: str, mode: str) -> bool:
        """Whether the run `label` may keep or recompute its values so."""
        return True

    def check(self, labels: Sequence[str], keys: Iterable[str]) -> None:
        """Raise PartitionError where it names what the model does not have."""


@dataclass(frozen=True)
class Setting(Constraint):
    """A degree or another setting of the whole plan."""

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
    """A stage by its number, and the run it begins with."""

    stage: int
    label: str

    def allows_setting(self, name: str, value: int | str) -> bool:
        return name != "pp" or not self.holds or int(value) > self.stage

    def allows_stage(self, stage: int, start: int, stop: int, stages: int, positions: Positions) -> bool:
        edge = {self.stage: start, self.stage - 1: stop}.get(stage)
        return edge is None or (edge == position(self.label, positions.labels)) == self.holds

    def check(self, labels: Sequence[str], keys: Iterable[str]) -> None:
        _inner(self, self.label, labels)


@dataclass(frozen=True)
class CutBefore(Constraint):
    """A run that some stage begins with."""

    label: str

    def allows_setting(self, name: str, value: int | str) -> bool:
        return name != "pp" or not self.holds or int(value) > 1

    def allows_stage(self, stage: int, start: int, stop: int, stages: int, positions: Positions) -> bool:
        at = position(self.label, positions.labels)
        return not start < at < stop if self.holds else at not in (start, stop)

    def check(self, labels: Sequence[str], keys: Iterable[str]) -> None:
        _inner(self, self.label, labels)


@dataclass(frozen=True)
class Cuts(Constraint):
    """All cuts at once: a method, and what stands behind its colon."""

    method: str
    argument: str

    def allows_setting(self, name: str, value: int | str) -> bool:
        return name != "pp" or self.method != "manual" or value == self.argument.count(",") + 2

    def allows_stage(self, stage: int, start: int, stop: int, stages: int, positions: Positions) -> bool:
        bounds = (*self.starts(stages, positions), len(positions.labels))
        return (start, stop) == bounds[stage : stage + 2]

    def starts(self, stages: int, positions: Positions) -> tuple[int, ...]:
        """The first run of every stage. Raises PartitionError where the model cannot be cut so."""
        return _starts(self, stages, positions)

    def check(self, labels: Sequence[str], keys: Iterable[str]) -> None:
        if self.method == "manual":
            self.given(labels)

    def given(self, labels: Sequence[str]) -> tuple[int, ...]:
        """The starts that "manual" names."""
        names = [name.strip() for name in self.argument.split(",")]
        starts = (0, *(_inner(self, name, labels) for name in names))
        for before, after, name in zip(starts, starts[1:], names, strict=False):
            if after <= before:
                raise PartitionError(f"{self.text}: {name} is not behind the run before it", "stages follow the model")
        return starts

    def of_type(self, positions: Positions) -> list[float]:
        """1 for every run whose class has the pattern of "type"."""
        found = [float(bool(re.search(self.argument, name, re.IGNORECASE))) for name in _known(positions, "types")]
        if not any(found):
            classes = sorted({name for name in positions.types if name})
            raise PartitionError(
                f"{self.text} finds no run",
                f"the model's runs are of {', '.join(classes)}",
                _near(self.argument, classes),
            )
        return found


METHODS: Mapping[str, Callable[[Cuts, Positions], Sequence[float]]] = {
    "uniform": lambda cuts, positions: [float(is_block(label)) for label in positions.labels],
    "parameters": lambda cuts, positions: _known(positions, "parameter_bytes"),
    "time": lambda cuts, positions: _known(positions, "seconds"),
    "memory": lambda cuts, positions: _known(positions, "bytes"),
    "type": Cuts.of_type,
}
"""What a method that balances puts on the scales, for every run."""


@lru_cache(maxsize=256)
def _starts(cuts: Cuts, stages: int, positions: Positions) -> tuple[int, ...]:
    if cuts.method == "manual":
        return cuts.given(positions.labels)
    if stages > len(positions.labels):
        raise PartitionError(
            f"{cuts.text} cannot make {stages} stages", f"the model has {len(positions.labels)} places to cut"
        )
    return balanced(tuple(METHODS[cuts.method](cuts, positions)), stages)


@dataclass(frozen=True)
class Layout(Constraint):
    """How operators and tensors are treated along an axis; `condition` is one of CONDITIONS."""

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
    """What runs do with the values that backward needs."""

    glob: str
    mode: str

    def allows_recompute(self, label: str, mode: str) -> bool:
        return not matches(self.glob, label) or (mode == self.mode) == self.holds

    def check(self, labels: Sequence[str], keys: Iterable[str]) -> None:
        _some(self, self.glob, list(filter(None, labels)), "run", "")


def parse(text: str) -> Constraint:
    """Read one constraint. Raises PartitionError with what is wrong and what is known."""
    plain = " ".join(text.split())
    opposite = NEGATION.match(plain)
    body = plain[opposite.end() :] if opposite else plain
    for form in FORMS:
        if match := re.fullmatch(form.pattern, body):
            return form.make(plain, opposite is None, match)
    raise PartitionError(f"cannot read the constraint {text!r}", "it has none of the known forms", _like(body))


def forbidden(constraint: Constraint) -> Constraint:
    """The opposite. Raises PartitionError where there is none."""
    if isinstance(constraint, Cuts):
        raise _no_opposite(constraint.text)
    text = f"not {constraint.text}" if constraint.holds else NEGATION.sub("", constraint.text, count=1)
    return replace(constraint, text=text, holds=not constraint.holds)


def check(constraints: Iterable[Constraint], labels: Sequence[str], keys: Iterable[str]) -> None:
    """Raise PartitionError for the first constraint that names a run, an operator or a tensor that `labels` and `keys`
    do not have."""
    keys = list(keys)
    for constraint in constraints:
        constraint.check(labels, keys)


def position(label: str, labels: Sequence[str]) -> int:
    """The position of the run that `label` names. Raises PartitionError where it names none or several."""
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
        raise PartitionError(f"{label!r} names several runs", several, "more of the label, or the position")
    known = [name for name in dict.fromkeys(labels) if name]
    raise PartitionError(f"there is no run {label!r}", f"positions are 0 to {len(labels) - 1}", _near(label, known))


def matches(glob: str, name: str) -> bool:
    """Whether a pattern means `name`: all of it, or its end from a dot on."""
    return fnmatchcase(name, glob) or fnmatchcase(name, f"*.{glob}")


def balanced(weights: tuple[float, ...], parts: int) -> tuple[int, ...]:
    """The starts of consecutive, non-empty parts whose heaviest is as light as can be; of those the most even, by the
    sum of squares; of those the one with the latest starts, compared from the last."""
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


def _inner(constraint: Constraint, label: str, labels: Sequence[str]) -> int:
    """The position of a run that something comes before."""
    at = position(label, labels)
    if at == 0:
        raise PartitionError(f"{constraint.text}: {label} is the model's first run", "no cut is before it")
    return at


def _some(constraint: Constraint, glob: str, names: Sequence[str], what: str, why: str) -> None:
    if not any(matches(glob, name) for name in names):
        raise PartitionError(f"{constraint.text}: no {what} is called {glob}", why, _near(glob, names))


def _known(positions: Positions, column: str) -> Sequence[Any]:
    values: Sequence[Any] = getattr(positions, column)
    if len(values) != len(positions.labels):
        raise PartitionError(f"cuts by {column} are not possible here", f"the runs' {column} are not known")
    return values


def _near(wanted: str, known: Sequence[str]) -> str:
    """Those of `known` that are most like what was written."""
    return ", ".join(difflib.get_close_matches(wanted, known, 3, 0.4) or known[:3])


def _meant(value: str, known: Iterable[str]) -> tuple[str, str]:
    """What there is, and what of it may have been meant."""
    every = f"one of {', '.join(known)}"
    near = " or ".join(closest(value, known))
    return (every, near) if near else ("", every)


def _like(text: str) -> str:
    """The form whose first word, or else all of it, is most like what was written."""
    words = {form.example.split()[0]: form.example for form in FORMS}
    near = difflib.get_close_matches(text.partition(" ")[0], words, 1)
    return words[near[0]] if near else difflib.get_close_matches(text, words.values(), 1, 0.0)[0]


def _no_opposite(text: str) -> PartitionError:
    return PartitionError(
        f"{text} cannot be forbidden", "of all other cuts none is meant", 'single cuts, as "no cut before layers.8"'
    )


def _setting(text: str, holds: bool, match: re.Match[str]) -> Constraint:
    name, comparison, value = match["name"], match["comparison"], match["value"]
    names = [*NUMBERS, *VALUES, "cuts"]
    if name not in names[:-1]:
        raise PartitionError(f"{text}: there is no setting {name}", f"there are {', '.join(names)}", _near(name, names))
    if name in NUMBERS:
        if not value.isdigit() or int(value) == 0:
            raise PartitionError(f"{text}: {name} cannot be {value}", "it is a positive number", f"{name}=2")
        return Setting(text, holds, name, comparison, int(value))
    known = {str(each): each for each in VALUES[name]}
    if value not in known:
        raise PartitionError(f"{text}: {name} cannot be {value}", *_meant(value, known))
    if isinstance(known[value], str) and comparison not in ("=", "!="):
        raise PartitionError(f"{text}: {name} is no number", "it only compares by = and !=", f"{name}={value}")
    return Setting(text, holds, name, comparison, known[value])


def _stage_start(text: str, holds: bool, match: re.Match[str]) -> Constraint:
    if int(match["stage"]) == 0:
        raise PartitionError(f"{text}: stage 0 always starts at the first run", try_="stage 1")
    return StageStart(text, holds, int(match["stage"]), match["label"])


def _cuts(text: str, holds: bool, match: re.Match[str]) -> Constraint:
    method, colon, argument = match["method"].partition(":")
    known = ["manual", *METHODS]
    if method not in known:
        raise PartitionError(
            f"{text}: there is no method {method}", f"there are {', '.join(known)}", _near(method, known)
        )
    if bool(argument) != (method in ("manual", "type")) or bool(colon) != bool(argument):
        wanted = {"manual": "the first run of every later stage", "type": "a pattern of class names"}.get(method)
        raise PartitionError(f"{text}: {method} takes {wanted or 'nothing'} behind a colon")
    if method == "type":
        try:
            re.compile(argument)
        except re.error as error:
            raise PartitionError(f"{text}: {argument!r} is no regular expression", str(error)) from error
    if not holds:
        raise _no_opposite(text)
    return Cuts(text, holds, method, argument)


def _layout(text: str, holds: bool, match: re.Match[str], condition: str) -> Constraint:
    if match["axis"] not in AXES:
        raise PartitionError(f"{text}: there is no axis {match['axis']} inside a stage", try_=" or ".join(AXES))
    return Layout(text, holds, match["glob"], match["axis"], condition, match.groupdict().get("wanted") or "")


def _recompute(text: str, holds: bool, match: re.Match[str]) -> Constraint:
    if match["mode"] not in MODES:
        raise PartitionError(f"{text}: there is no mode {match['mode']}", *_meant(match["mode"], MODES))
    return Recompute(text, holds, match["glob"], match["mode"])


@dataclass(frozen=True)
class Form:
    """One form of a constraint: an example of it, its pattern, and what makes the constraint of a match."""

    example: str
    pattern: str
    make: Callable[[str, bool, re.Match[str]], Constraint]


FORMS = (
    Form("cuts=manual:layers.8,layers.16", r"cuts ?= ?(?P<method>.+)", _cuts),
    Form("stage 2 starts at layers.10", r"stage (?P<stage>\d+) starts at (?P<label>\S+)", _stage_start),
    Form(
        "cut before layers.10",
        r"cut before (?P<label>\S+)",
        lambda text, holds, match: CutBefore(text, holds, match["label"]),
    ),
    Form(
        "split layers.*.up_proj.weight dim 0 over tp",
        r"split (?P<glob>\S+)( dim (?P<wanted>\d+))? over (?P<axis>\w+)",
        lambda text, holds, match: _layout(text, holds, match, "split"),
    ),
    Form(
        "keep lm_head.weight whole over tp",
        r"keep (?P<glob>\S+) whole over (?P<axis>\w+)",
        lambda text, holds, match: _layout(text, holds, match, "keep"),
    ),
    Form(
        "strategy layers.*.up_proj/linear n over tp",
        r"strategy (?P<glob>\S+) (?P<wanted>\S+) over (?P<axis>\w+)",
        lambda text, holds, match: _layout(text, holds, match, "strategy"),
    ),
    Form(
        "layers.*.up_proj/linear: n/tp",
        r"(?P<glob>\S+): (?P<wanted>\S+)/(?P<axis>\w+)",
        lambda text, holds, match: _layout(text, holds, match, "strategy"),
    ),
    Form("recompute layers.3 full", r"recompute (?P<glob>\S+) (?P<mode>\w+)", _recompute),
    Form("tp=8", r"(?P<name>\w+) ?(?P<comparison><=|>=|!=|=|<|>) ?(?P<value>\S+)", _setting),
)
