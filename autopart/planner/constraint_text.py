"""The language of constraints by hand: text -> `Constraint`.

    form                                            what it asks for
    ----------------------------------------------  ---------------------------------------------------------------
    tp=8, pp!=1, tp<=4                              a setting: pp, dp, tp, micro_batch, zero, shard_size (1 where ZeRO
                                                    divides nothing), recompute, schedule or offload; numbers also
                                                    compare by <=, >=, < and >
    stage 2 starts at layers.10                     where one stage begins; stages count from 0
    cut before layers.10                            some stage begins there, whatever its number
    cuts=manual:layers.8,layers.16                  the first segment of every stage but the first; fixes pp
    cuts=manual:26:0,13,26                          the number of layers (segments with a label), then for every stage
                                                    the number of its first layer, then that of layers; fixes pp
    cuts=uniform                                    as equal numbers of numbered blocks as can be
    cuts=parameters                                 the largest stage has the fewest bytes of parameters; tied weights
                                                    count once, where they are read first
    cuts=time                                       the slowest stage takes the least predicted time
    cuts=memory                                     the largest stage takes the fewest predicted bytes
    cuts=type:DecoderLayer                          as equal numbers as can be of segments whose class has that pattern
    split layers.*.up_proj.weight dim 0 over tp     a tensor, or an operator's output, is split along that dim
    split layers.*.up_proj.weight over tp           the same along any dim
    keep lm_head.weight whole over tp               every rank of the axis has all of it
    strategy layers.*.up_proj/linear n over tp      an operator's strategy by its name: a split letter, or R, C, P
    layers.*.up_proj/linear: n/tp                   the same as `--why` prints it
    recompute layers.3 full                         what segments do with what backward needs: of `liveness.MODES`

Any form but ``cuts=`` may follow "no", "not" or "do not", which asks for its opposite: "no cut before layers.10",
"do not split lm_head.weight over tp".

Segments and positions are named by the segment's label, or by the end of one where no other label ends so
(``layers.10`` for ``model.layers.10``); a plain number that is no label is a position. Operators and tensors are named
by their key in the plan's `splits`, as a pattern in which ``*`` stands for any text; the front may again be left out.
Equal blocks share the keys of the first of them.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from autopart.cost.liveness import MODES
from autopart.cost.offload import OFFLOADS
from autopart.errors import PartitionError, closest
from autopart.plan.schedules import SCHEDULES
from autopart.planner.constraints import (
    Constraint,
    CutBefore,
    Layout,
    Recompute,
    Setting,
    StageStart,
    closest_names,
)
from autopart.planner.cut_constraints import METHODS, Cuts

NUMBERS = ("pp", "dp", "tp", "micro_batch", "shard_size")
"""Settings that are any positive number."""
VALUES: Mapping[str, tuple[int | str, ...]] = {
    "zero": (0, 1, 2, 3),
    "recompute": (*MODES, "mixed"),
    "schedule": tuple(SCHEDULES),
    "offload": OFFLOADS,
}
"""Settings that are one of a few values."""
AXES = ("dp", "tp")
"""The axes inside a stage, along which tensors may be split."""
NEGATION = re.compile(r"(do not|not|no)\s+")


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
    """The opposite constraint. Raises PartitionError where there is none."""
    if isinstance(constraint, Cuts):
        raise _no_opposite(constraint.text)
    text = f"not {constraint.text}" if constraint.holds else NEGATION.sub("", constraint.text, count=1)
    return replace(constraint, text=text, holds=not constraint.holds)


def _meant(value: str, known: Iterable[str]) -> tuple[str, str]:
    """For an error: what is known, and what of it is closest to a value."""
    every = f"one of {', '.join(known)}"
    near = " or ".join(closest(value, known))
    return (every, near) if near else ("", every)


def _like(text: str) -> str:
    """An example of the form whose first word, or else all of it, is closest to a text."""
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
        raise PartitionError(
            f"{text}: there is no setting {name}", f"there are {', '.join(names)}", closest_names(name, names)
        )
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
        raise PartitionError(f"{text}: stage 0 always starts at the first segment", try_="stage 1")
    return StageStart(text, holds, int(match["stage"]), match["label"])


def _cuts(text: str, holds: bool, match: re.Match[str]) -> Constraint:
    method, colon, argument = match["method"].partition(":")
    known = ["manual", *METHODS]
    if method not in known:
        raise PartitionError(
            f"{text}: there is no method {method}", f"there are {', '.join(known)}", closest_names(method, known)
        )
    if bool(argument) != (method in ("manual", "type")) or bool(colon) != bool(argument):
        wanted = {"manual": "the first segment of every later stage", "type": "a pattern of class names"}.get(method)
        raise PartitionError(f"{text}: {method} takes {wanted or 'nothing'} behind a colon")
    if method == "type":
        try:
            re.compile(argument)
        except re.error as error:
            raise PartitionError(f"{text}: {argument!r} is no regular expression", str(error)) from error
    if method == "manual" and ":" in argument:
        _check_boundaries(text, argument)
    if not holds:
        raise _no_opposite(text)
    return Cuts(text, holds, method, argument)


def _check_boundaries(text: str, argument: str) -> None:
    """Raise PartitionError where LAYERS:BOUNDARIES of "manual" are not rising numbers from 0 to LAYERS."""
    layers, _, boundaries = (part.replace(" ", "") for part in argument.partition(":"))
    if not layers.isdecimal() or not all(each.isdecimal() for each in boundaries.split(",")):
        raise PartitionError(
            f"{text}: {argument} are not numbers of layers", "the form is manual:LAYERS:BOUNDARIES", "manual:26:0,13,26"
        )
    numbers = [int(each) for each in boundaries.split(",")]
    rising = all(before < after for before, after in pairwise(numbers))
    if not rising or len(numbers) < 2 or (numbers[0], numbers[-1]) != (0, int(layers)):
        raise PartitionError(
            f"{text}: {boundaries} are not the boundaries of stages",
            f"they rise from 0 to the number of layers, which is {layers}, so that no stage is empty",
            f"manual:{layers}:0,{int(layers) // 2},{layers}",
        )


def _layout(text: str, holds: bool, match: re.Match[str]) -> Constraint:
    if match["axis"] not in AXES:
        raise PartitionError(f"{text}: there is no axis {match['axis']} inside a stage", try_=" or ".join(AXES))
    given = match.groupdict()
    condition, wanted = given.get("condition", "strategy"), given.get("wanted") or ""
    return Layout(text, holds, match["glob"], match["axis"], condition, wanted)


def _recompute(text: str, holds: bool, match: re.Match[str]) -> Constraint:
    if match["mode"] not in MODES:
        raise PartitionError(f"{text}: there is no mode {match['mode']}", *_meant(match["mode"], MODES))
    return Recompute(text, holds, match["glob"], match["mode"])


@dataclass(frozen=True)
class Form:
    """One form of a constraint: an example, a pattern, and a function from (text, holds, match) to the constraint."""

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
        r"(?P<condition>split) (?P<glob>\S+)( dim (?P<wanted>\d+))? over (?P<axis>\w+)",
        _layout,
    ),
    Form("keep lm_head.weight whole over tp", r"(?P<condition>keep) (?P<glob>\S+) whole over (?P<axis>\w+)", _layout),
    Form(
        "strategy layers.*.up_proj/linear n over tp",
        r"strategy (?P<glob>\S+) (?P<wanted>\S+) over (?P<axis>\w+)",
        _layout,
    ),
    Form("layers.*.up_proj/linear: n/tp", r"(?P<glob>\S+): (?P<wanted>\S+)/(?P<axis>\w+)", _layout),
    Form("recompute layers.3 full", r"recompute (?P<glob>\S+) (?P<mode>\w+)", _recompute),
    Form("tp=8", r"(?P<name>\w+) ?(?P<comparison><=|>=|!=|=|<|>) ?(?P<value>\S+)", _setting),
)
