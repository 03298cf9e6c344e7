"""Constraints by hand: what is read, what it allows, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopart.cost.liveness import MODES
from autopart.errors import PartitionError
from autopart.planner import constraint_text as constraint_text
from autopart.planner.constraint_text import FORMS, forbidden, parse
from autopart.planner.constraints import Constraint, Positions, check_names, position
from autopart.planner.cut_constraints import Cuts, balanced
from autopart.sharding.notation import C, P, Placement, R, S, Strategy

BLOCKS = tuple(f"model.layers.{i}" for i in range(6))
LABELS = ("", "model.embed_tokens", *BLOCKS, "model.norm", "lm_head", "")
ROW = Positions(
    LABELS,
    types=("", "Embedding", *["DecoderLayer"] * 4, *["WideLayer"] * 2, "RMSNorm", "Linear", ""),
    parameter_bytes=(0, 40, 10, 10, 10, 10, 10, 10, 1, 40, 0),
    seconds=(0, 1, 2, 2, 2, 2, 2, 2, 0, 9, 1),
    bytes=(0, 9, 4, 4, 4, 4, 4, 4, 1, 1, 1),
)
UP, HEAD = "model.layers.0.mlp.up_proj", "lm_head"
KEYS = (f"{UP}.weight", f"{UP}/linear", f"{HEAD}.weight", f"{HEAD}/linear")


def strategy(name: str, *outputs: Placement) -> Strategy:
    return Strategy(name, (), outputs)


COLUMN, PACKED = strategy("n", S(0)), strategy("k", S(1, [3, 3]))
WHOLE, COPIED, PARTIAL = strategy("R", R), strategy("C", C), strategy("k", P)


@pytest.mark.parametrize(
    ("text", "name", "allowed", "refused"),
    [
        ("tp=8", "tp", [8], [1, 4]),
        ("tp = 8", "tp", [8], [1, 4]),
        ("pp!=1", "pp", [2, 4], [1]),
        ("not pp=1", "pp", [2, 4], [1]),
        ("tp<=4", "tp", [1, 4], [8]),
        ("tp<4", "tp", [2], [4]),
        ("dp>=2", "dp", [2, 8], [1]),
        ("dp>2", "dp", [8], [2]),
        ("micro_batch=16", "micro_batch", [16], [8]),
        ("zero=3", "zero", [3], [0, 1]),
        ("zero<=1", "zero", [0, 1], [2, 3]),
        ("recompute=full", "recompute", ["full"], ["none", "mixed"]),
        ("schedule=1f1b", "schedule", ["1f1b"], ["gpipe"]),
        ("schedule!=1f1b", "schedule", ["gpipe"], ["1f1b"]),
        ("cuts=manual:layers.2,layers.4", "pp", [3], [1, 2, 4]),
        ("cuts=manual:9:0,3,5,9", "pp", [3], [1, 2, 4]),
        ("stage 2 starts at layers.3", "pp", [3, 4], [1, 2]),
        ("cut before layers.3", "pp", [2], [1]),
        ("no cut before layers.3", "pp", [1, 2], []),
    ],
)
def test_settings(text: str, name: str, allowed: list[int | str], refused: list[int | str]) -> None:
    constraint = parse(text)
    assert [v for v in [*allowed, *refused] if constraint.allows_setting(name, v)] == allowed
    assert constraint.allows_setting("other", 1)


def cuts_allowed(constraint: Constraint, stages: int) -> list[tuple[int, ...]]:
    """Every cut of the row into so many stages that a constraint allows."""
    count = len(ROW.labels)
    return [
        (0, *starts)
        for starts in itertools.combinations(range(1, count), stages - 1)
        if all(
            constraint.allows_stage(stage, start, stop, stages, ROW)
            for stage, (start, stop) in enumerate(itertools.pairwise((0, *starts, count)))
        )
    ]


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("stage 1 starts at layers.3", lambda starts: starts[1] == 5),
        ("stage 1 starts at model.layers.3", lambda starts: starts[1] == 5),
        ("stage 1 starts at 5", lambda starts: starts[1] == 5),
        ("stage 2 starts at lm_head", lambda starts: starts[2] == 9),
        ("not stage 2 starts at lm_head", lambda starts: starts[2] != 9),
        ("cut before layers.3", lambda starts: 5 in starts),
        ("no cut before layers.3", lambda starts: 5 not in starts),
        ("cuts=manual:layers.2,layers.4", lambda starts: starts == (0, 4, 6)),
        ("cuts=manual:4, 6", lambda starts: starts == (0, 4, 6)),
        ("cuts=manual:9:0,3,5,9", lambda starts: starts == (0, 4, 6)),
        ("cuts=manual:9: 0, 1, 8, 9", lambda starts: starts == (0, 2, 9)),
    ],
)
def test_cuts(text: str, condition: object) -> None:
    everything = cuts_allowed(parse("tp=1"), 3)
    assert cuts_allowed(parse(text), 3) == [starts for starts in everything if condition(starts)]  # type: ignore[operator]
    assert cuts_allowed(parse(text), 3)


@pytest.mark.parametrize(
    ("text", "stages", "labels"),
    [
        ("cuts=uniform", 2, ["layers.3"]),
        ("cuts=uniform", 3, ["layers.2", "layers.4"]),
        ("cuts=uniform", 4, ["layers.2", "layers.4", "layers.5"]),
        ("cuts=type:DecoderLayer", 2, ["layers.2"]),
        ("cuts=type:decoderlayer", 4, ["layers.1", "layers.2", "layers.3"]),
        ("cuts=type:.*Layer", 2, ["layers.3"]),
        ("cuts=parameters", 2, ["layers.3"]),
        ("cuts=parameters", 3, ["layers.1", "norm"]),
        ("cuts=time", 2, ["layers.5"]),
        ("cuts=memory", 2, ["layers.2"]),
    ],
)
def test_balanced_cuts(text: str, stages: int, labels: list[str]) -> None:
    constraint = parse(text)
    assert isinstance(constraint, Cuts)
    starts = constraint.starts(stages, ROW)
    assert [LABELS[s].removeprefix("model.") for s in starts[1:]] == labels
    assert cuts_allowed(constraint, stages) == [starts]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.data())
def test_balanced_is_the_best_of_all(weights: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(weights)))

    def price(starts: Sequence[int]) -> tuple[int, int, list[int]]:
        sums = [sum(weights[a:b]) for a, b in itertools.pairwise([*starts, len(weights)])]
        return max(sums), sum(s * s for s in sums), [-s for s in reversed(starts)]

    cuts = [(0, *rest) for rest in itertools.combinations(range(1, len(weights)), parts - 1)]
    assert balanced(tuple(weights), parts) == min(cuts, key=price)


@pytest.mark.parametrize(
    ("text", "key", "allowed", "refused"),
    [
        ("split layers.*.up_proj.weight dim 0 over tp", f"{UP}.weight", [COLUMN], [WHOLE, strategy("k", S(1))]),
        ("split layers.*.up_proj.weight over tp", f"{UP}.weight", [COLUMN, strategy("k", S(1))], [WHOLE, COPIED]),
        ("split model.layers.0.mlp.up_proj.weight dim 1 over tp", f"{UP}.weight", [PACKED], [COLUMN]),
        ("do not split lm_head.weight over tp", f"{HEAD}.weight", [WHOLE, COPIED], [COLUMN]),
        ("do not split lm_head.weight dim 0 over tp", f"{HEAD}.weight", [WHOLE, strategy("k", S(1))], [COLUMN]),
        ("keep lm_head.weight whole over tp", f"{HEAD}.weight", [WHOLE, COPIED], [COLUMN]),
        ("do not keep lm_head* whole over tp", f"{HEAD}/linear", [COLUMN, PARTIAL], [WHOLE]),
        ("strategy layers.*.up_proj/linear n over tp", f"{UP}/linear", [COLUMN], [WHOLE, PARTIAL]),
        ("layers.*.up_proj/linear: n/tp", f"{UP}/linear", [COLUMN], [WHOLE, PARTIAL]),
        ("no strategy lm_head/linear n over tp", f"{HEAD}/linear", [WHOLE, PARTIAL], [COLUMN]),
    ],
)  # fmt: skip
def test_layouts(text: str, key: str, allowed: list[Strategy], refused: list[Strategy]) -> None:
    constraint = parse(text)
    assert [s for s in [*allowed, *refused] if constraint.allows_strategy("tp", key, s)] == allowed
    for other_axis, other_key in (("dp", key), ("tp", "model.norm.weight")):
        assert all(constraint.allows_strategy(other_axis, other_key, s) for s in [*allowed, *refused])
    check_names([constraint], LABELS, KEYS)


@pytest.mark.parametrize(
    ("text", "label", "modes"),
    [
        ("recompute layers.3 full", BLOCKS[3], ["full"]),
        ("recompute layers.* none", BLOCKS[3], ["none"]),
        ("do not recompute layers.* full", BLOCKS[3], ["none", "selective", "mincut"]),
        ("recompute layers.2 full", BLOCKS[3], ["none", "selective", "mincut", "full"]),
        ("recompute=selective", BLOCKS[3], ["selective"]),
        ("recompute=selective", "lm_head", ["none", "selective", "mincut", "full"]),
        ("recompute!=full", BLOCKS[3], ["none", "selective", "mincut", "full"]),
        ("recompute=mixed", BLOCKS[3], ["none", "selective", "mincut", "full"]),
    ],
)
def test_recompute(text: str, label: str, modes: list[str]) -> None:
    assert [m for m in MODES if parse(text).allows_recompute(label, m)] == modes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read the constraint"),
        ("stage two starts at layers.1", "stage 2 starts at layers.10"),
        ("cut after layers.1", "cut before layers.10"),
        ("do not splitt lm_head.weight over tp", "try: split layers"),
        ("pt=2", r"no setting pt.*\n.*\n.*pp"),
        ("micro_batches=2", "micro_batch"),
        ("tp=0", "positive"),
        ("tp=two", "positive"),
        ("tp=-1", "positive"),
        ("zero=4", "one of 0, 1, 2, 3"),
        ("zero=full", "one of 0, 1, 2, 3"),
        ("schedule=2f2b", "1f1b"),
        ("recompute<=full", "only compares by = and !="),
        ("stage 0 starts at layers.1", "always starts at the first segment"),
        ("cuts=equal", "uniform"),
        ("cuts=parameter", "try: parameters"),
        ("cuts=manual", "first segment of every later stage"),
        ("cuts=manual:", "first segment of every later stage"),
        ("cuts=manual:9:0,four,9", "the form is manual:LAYERS:BOUNDARIES"),
        ("cuts=manual:layers.8:0,4,9", "not numbers of layers"),
        ("cuts=manual:9:", "not numbers of layers"),
        ("cuts=manual:9:0,4,4,9", "no stage is empty"),
        ("cuts=manual:9:0,4", "rise from 0 to the number of layers, which is 9"),
        ("cuts=manual:9:4,9", r"try: manual:9:0,4,9"),
        ("cuts=type:", "pattern"),
        ("cuts=uniform:3", "takes nothing"),
        ("cuts=type:(", "no regular expression"),
        ("no cuts=uniform", "cannot be forbidden"),
        ("split a.weight over pp", "no axis pp"),
        ("keep a.weight over tp", "keep lm_head.weight whole over tp"),
        ("recompute layers.3 some", "one of none, selective, mincut, full"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cut before layers.9", "no segment 'layers.9'"),
        ("cut before layer.3", r"try: .*model\.layers\.3"),
        ("cut before 11", "positions are 0 to 10"),
        ("cut before 3.mlp", "no segment"),
        ("cut before 0", "first segment"),
        ("stage 1 starts at 0", "first segment"),
        ("cuts=manual:layers.4,layers.2", "layers.2 is not behind"),
        ("cuts=manual:layers.4,layers.4", "layers.4 is not behind"),
        ("cuts=manual:8:0,4,8", r"has 9 layers, not 8\n.*, 1 model\.layers\.0 to 6 model\.layers\.5, 7 model"),
        ("cuts=manual:8:0,4,8", r"try: manual:9:0,4,9"),
        ("recompute layer.* full", "no segment is called"),
        ("split model.layers.3.mlp.up_proj.weight over tp", r"the first of them\n.*layers\.0\.mlp\.up_proj\.weight"),
        ("keep head.weight whole over tp", "lm_head.weight"),
    ],
)  # fmt: skip
def test_what_the_model_does_not_have_is_refused(text: str, message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        check_names([parse("tp=2"), parse(text)], LABELS, KEYS)


def test_an_ambiguous_label_is_refused() -> None:
    with pytest.raises(PartitionError, match=r"several segments\n.*encoder\.block\.1 at 1, decoder\.block\.1 at 3"):
        position("block.1", ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"))


def test_a_label_goes_before_a_position() -> None:
    assert position("1", ("embed", "0", "1", "2")) == 2
    assert position("3", ("embed", "0", "1", "2")) == 3


@pytest.mark.parametrize(
    ("text", "stages", "message"),
    [
        ("cuts=time", 2, "seconds are not known"),
        ("cuts=uniform", 12, "11 places to cut"),
    ],
)
def test_cuts_that_cannot_be_made_are_refused(text: str, stages: int, message: str) -> None:
    constraint = parse(text)
    assert isinstance(constraint, Cuts)
    with pytest.raises(PartitionError, match=message):
        constraint.starts(stages, Positions(LABELS))


def test_a_type_that_no_run_has_is_refused() -> None:
    constraint = parse("cuts=type:EncoderLayer")
    assert isinstance(constraint, Cuts)
    with pytest.raises(PartitionError, match="try: DecoderLayer"):
        constraint.starts(2, ROW)


@pytest.mark.parametrize("text", [form.example for form in FORMS if not form.example.startswith("cuts")])
def test_forbidden_twice_is_itself(text: str) -> None:
    constraint = parse(text)
    assert forbidden(constraint) == parse(f"not {text}") != constraint
    assert forbidden(forbidden(constraint)) == constraint


def test_all_other_cuts_are_no_constraint() -> None:
    with pytest.raises(PartitionError, match="cannot be forbidden"):
        forbidden(parse("cuts=uniform"))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.example)
def test_every_form_is_in_the_table(form: constraint_text.Form) -> None:
    assert form.example in (constraint_text.__doc__ or "")
    assert parse(form.example).text == form.example
