"""Pipeline schedules against hand-written lists, tampered lists and closed forms."""

import csv
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopart.errors import PartitionError
from autopart.plan.schedules import SCHEDULES, compute_order, in_flight
from autopart.plan.schedules.ops import Instruction, Op
from autopart.plan.schedules.program import instructions, receives_ahead
from autopart.plan.schedules.simulate import simulate
from autopart.plan.schedules.verify import verify

Lists = list[list[Instruction]]

DATA = Path(__file__).parents[2] / "benchmarks" / "data"
PROFILED = list(csv.DictReader((DATA / "zero_bubble_2401.10241_profiled_FBW_bubbles.csv").open()))

TWO_STAGES_FOUR_BATCHES = (
    "F0 S0 F1 S1 G0 B0 F2 S2 G1 B1 F3 S3 G2 B2 G3 B3 reduce step",
    "R0 F0 B0 D0 R1 F1 B1 D1 R2 F2 B2 D2 R3 F3 B3 D3 reduce step",
)
LETTERS = {
    "F": Op.FORWARD,
    "B": Op.BACKWARD,
    "S": Op.SEND,
    "R": Op.RECV,
    "D": Op.SEND_GRAD,
    "G": Op.RECV_GRAD,
}


def spelled(stage: int, text: str) -> list[Instruction]:
    """The list of a stage of two, from a letter and a micro-batch per instruction."""
    out = []
    for word in text.split():
        if word in ("reduce", "step"):
            out.append(Instruction(Op(word), stage))
        else:
            peer = -1 if word[0] in "FB" else 1 - stage
            out.append(Instruction(LETTERS[word[0]], stage, int(word[1:]), peer))
    return out


def two_stages() -> Lists:
    return [spelled(stage, text) for stage, text in enumerate(TWO_STAGES_FOUR_BATCHES)]


def chain(stages: int) -> list[tuple[int, int]]:
    return [(stage, stage + 1) for stage in range(stages - 1)]


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[str, int, int, list[tuple[int, int]]]:
    schedule = draw(st.sampled_from(sorted(SCHEDULES)))
    stages, micro_batches = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    pairs = [(i, j) for i in range(stages) for j in range(i + 1, stages)]
    edges = draw(st.lists(st.sampled_from(pairs))) if pairs else []
    if draw(st.booleans()):
        edges += chain(stages)
    return schedule, stages, micro_batches, edges


def test_one_f_one_b_of_two_stages_is_the_hand_written_list() -> None:
    assert instructions("1f1b", 2, 4, [(0, 1)]) == two_stages()
    verify(two_stages())


def test_one_f_one_b_warms_up_by_distance_from_the_last_stage() -> None:
    for stage, forwards in enumerate((4, 3, 2, 1)):
        ops = [op for op, _ in compute_order("1f1b", stage, 4, 8)]
        assert ops.index(Op.BACKWARD) == forwards
        assert ops[forwards:] == [Op.BACKWARD, Op.FORWARD] * (8 - forwards) + [Op.BACKWARD] * forwards


def test_a_skip_edge_orders_its_messages_by_stage() -> None:
    lists = instructions("gpipe", 3, 1, [(0, 2), (1, 2), (0, 1), (0, 2)])
    assert [str(entry) for entry in lists[2]] == [
        "stage 2 RECV micro-batch 0 from stage 0",
        "stage 2 RECV micro-batch 0 from stage 1",
        "stage 2 FORWARD micro-batch 0",
        "stage 2 BACKWARD micro-batch 0",
        "stage 2 SEND_GRAD micro-batch 0 to stage 1",
        "stage 2 SEND_GRAD micro-batch 0 to stage 0",
        "stage 2 REDUCE",
        "stage 2 STEP",
    ]


@settings(max_examples=100, deadline=None)
@given(pipelines())
def test_every_schedule_verifies_with_any_edges(
    pipeline: tuple[str, int, int, list[tuple[int, int]]],
) -> None:
    verify(instructions(*pipeline))


@settings(max_examples=100, deadline=None)
@given(pipelines(), st.data())
def test_a_simulated_step_respects_every_wait(
    pipeline: tuple[str, int, int, list[tuple[int, int]]], data: st.DataObject
) -> None:
    schedule, stages, micro_batches, edges = pipeline
    durations = st.lists(st.integers(0, 9), min_size=stages, max_size=stages)
    forward, backward, sync, step = (data.draw(durations) for _ in range(4))
    latency = {edge: data.draw(st.integers(0, 9)) for edge in edges}
    lists = instructions(schedule, stages, micro_batches, edges)
    timeline = simulate(lists, forward, backward, latency, sync, step)

    spans = {entry: (start, end) for _, entry, start, end in timeline.events}
    assert set(spans) == {entry for program in lists for entry in program}
    assert timeline.seconds == max(end for _, end in spans.values())
    for producer, consumer in edges:
        for batch in range(micro_batches):
            for op, sender, receiver in (
                (Op.FORWARD, producer, consumer),
                (Op.BACKWARD, consumer, producer),
            ):
                sent = spans[Instruction(op, sender, batch)][1]
                started = spans[Instruction(op, receiver, batch)][0]
                assert started >= sent + latency[producer, consumer]
    for stage, program in enumerate(lists):
        blocking = [spans[entry] for entry in program if entry.op not in (Op.SEND, Op.SEND_GRAD)]
        assert all(after[0] == before[1] for before, after in pairwise(blocking))
        work = micro_batches * (forward[stage] + backward[stage]) + sync[stage] + step[stage]
        assert timeline.busy_seconds[stage] == work
        assert timeline.peak_in_flight[stage] == in_flight(schedule, stage, stages, micro_batches)
    assert 0 <= timeline.bubble <= 1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 1), (2, 1), (4, 2), (4, 8), (6, 9)])
def test_equal_stages_without_communication_take_the_closed_form(
    schedule: str, stages: int, micro_batches: int
) -> None:
    edges = chain(stages)
    timeline = simulate(
        instructions(schedule, stages, micro_batches, edges),
        [2] * stages,
        [3] * stages,
        dict.fromkeys(edges, 0),
    )
    slots = micro_batches + stages - 1
    assert timeline.seconds == slots * (2 + 3)
    assert timeline.bubble == pytest.approx((stages - 1) / slots)


@pytest.mark.parametrize("row", PROFILED, ids=lambda row: f"{row['model']}-{row['microbatches_m']}")
def test_the_published_bubble_rates(row: dict[str, str]) -> None:
    """The profiled times of Qi et al., arXiv 2401.10241, table 9, give the 1F1B bubble rates of their table 5."""
    stages, micro_batches = int(row["stages_p"]), int(row["microbatches_m"])
    forward, inputs, weights, message = (float(row[f"T_{name}_ms"]) for name in ("F", "B", "W", "comm"))
    edges = chain(stages)
    lists = instructions("1f1b", stages, micro_batches, edges)
    timeline = simulate(lists, [forward] * stages, [inputs + weights] * stages, dict.fromkeys(edges, message))
    assert timeline.bubble == pytest.approx(float(row["bubble_1F1B"]), abs=1e-3)


def test_latencies_and_unequal_stages_add_up() -> None:
    lists = instructions("1f1b", 2, 1, [(0, 1)])
    timeline = simulate(lists, [1, 2], [4, 3], {(0, 1): 0.5}, sync_seconds=[1, 0], step_seconds=[0, 2])
    assert timeline.seconds == 1 + 0.5 + 2 + 3 + 0.5 + 4 + 1
    assert list(timeline.busy_seconds) == [6, 7]
    assert timeline.bubble == pytest.approx(1 - 6.5 / 12)


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 3), (4, 2), (4, 8), (6, 6)])
def test_activations_held_at_once(stages: int, micro_batches: int) -> None:
    for stage in range(stages):
        assert in_flight("gpipe", stage, stages, micro_batches) == micro_batches
        assert in_flight("1f1b", stage, stages, micro_batches) == min(micro_batches, stages - stage)


def drop(stage: int, word: str) -> Callable[[Lists], None]:
    return lambda lists: lists[stage].remove(spelled(stage, word)[0])


def swap(stage: int, one: str, other: str) -> Callable[[Lists], None]:
    def tamper(lists: Lists) -> None:
        program = lists[stage]
        i, j = (program.index(spelled(stage, word)[0]) for word in (one, other))
        program[i], program[j] = program[j], program[i]

    return tamper


def rewrite(stage: int, text: str) -> Callable[[Lists], None]:
    return lambda lists: lists.__setitem__(stage, spelled(stage, text))


def both(*tampers: Callable[[Lists], None]) -> Callable[[Lists], None]:
    def tamper_all(lists: Lists) -> None:
        for tamper in tampers:
            tamper(lists)

    return tamper_all


RECEIVES_SWAPPED = "R1 R0 F0 B0 D0 F1 B1 D1 R2 F2 B2 D2 R3 F3 B3 D3 reduce step"
THREE_FORWARDS_FIRST = "R0 F0 R1 F1 R2 F2 B0 D0 B1 D1 B2 D2 R3 F3 B3 D3 reduce step"
REDUCE_EARLY = "R0 F0 B0 D0 R1 F1 B1 D1 R2 F2 B2 D2 R3 F3 reduce B3 D3 step"
TAMPERED = {
    "dropped send": (drop(0, "S1"), "stage 0 SEND micro-batch 1 to stage 1 is missing"),
    "dropped receive": (drop(0, "G2"), "stage 0 RECV_GRAD micro-batch 2 from stage 1 is missing"),
    "dropped message": (
        both(drop(0, "S1"), drop(1, "R1")),
        "stage 0 SEND micro-batch 1 to stage 1 is missing",
    ),
    "swapped receives": (
        rewrite(1, RECEIVES_SWAPPED),
        "stage 1 RECV micro-batch 1 from stage 0 is out of order",
    ),
    "late receive": (swap(1, "R1", "R2"), "stage 1 RECV micro-batch 1 from stage 0 has no FORWARD after it"),
    "receive after use": (
        swap(1, "R1", "F1"),
        "stage 1 RECV micro-batch 1 from stage 0 has no FORWARD after it",
    ),
    "send before result": (
        swap(0, "F1", "S1"),
        "stage 0 SEND micro-batch 1 to stage 1 has no FORWARD before it",
    ),
    "cycle of waits": (
        rewrite(1, THREE_FORWARDS_FIRST),
        "stage 0 RECV_GRAD micro-batch 0 from stage 1 waits",
    ),
    "missing forward": (drop(1, "F2"), "stage 1 FORWARD micro-batch 2 is missing"),
    "missing backward": (drop(1, "B2"), "stage 1 FORWARD micro-batch 2 has no BACKWARD after it"),
    "backward first": (swap(1, "F2", "B2"), "stage 1 BACKWARD micro-batch 2 has no FORWARD before it"),
    "double backward": (
        lambda lists: lists[1].insert(3, lists[1][2]),
        "stage 1 BACKWARD micro-batch 0 appears twice",
    ),
    "double STEP": (lambda lists: lists[0].append(lists[0][-1]), "stage 0 STEP appears twice"),
    "disguised STEP": (
        lambda lists: lists[0].insert(0, Instruction(Op.STEP, 0, micro_batch=1)),
        "stage 0 STEP micro-batch 1 has a peer or a micro-batch",
    ),
    "missing STEP": (drop(0, "step"), "stage 0 STEP is not last"),
    "missing REDUCE": (drop(0, "reduce"), "stage 0 REDUCE is missing after stage 0 BACKWARD micro-batch 3"),
    "early REDUCE": (
        rewrite(1, REDUCE_EARLY),
        "stage 1 REDUCE is missing after stage 1 BACKWARD micro-batch 3",
    ),
    "another stage's": (lambda lists: lists.reverse(), "is in the list of stage 0"),
    "nothing": (lambda lists: lists.clear(), "no stage has a FORWARD"),
}


@pytest.mark.parametrize(("tamper", "named"), TAMPERED.values(), ids=TAMPERED)
def test_a_tampered_list_is_rejected_by_name(tamper: Callable[[Lists], None], named: str) -> None:
    lists = two_stages()
    tamper(lists)
    with pytest.raises(PartitionError) as error:
        verify(lists)
    assert named in error.value.what


def test_a_cycle_of_waits_names_every_stage_in_it() -> None:
    lists = two_stages()
    rewrite(1, THREE_FORWARDS_FIRST)(lists)
    with pytest.raises(PartitionError) as error:
        verify(lists)
    assert "stage 0 RECV_GRAD micro-batch 0 from stage 1; stage 1 RECV micro-batch 2 from stage 0" in error.value.why


def test_an_unverified_list_cannot_hang_the_simulator() -> None:
    lists = two_stages()
    lists[0] = lists[0][:1]
    with pytest.raises(PartitionError, match="stage 1 RECV micro-batch 0 from stage 0 waits for ever"):
        simulate(lists, [1, 1], [1, 1], {(0, 1): 0})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: instructions("zigzag", 1, 1, []), "unknown schedule 'zigzag'"),
        (lambda: instructions("1f1b", 0, 1, []), "0 stages"),
        (lambda: instructions("1f1b", 1, 0, []), "0 micro-batches"),
        (lambda: instructions("1f1b", 2, 1, [(1, 0)]), "edge from stage 1 to stage 0"),
        (lambda: instructions("1f1b", 2, 1, [(0, 2)]), "edge from stage 0 to stage 2"),
        (lambda: in_flight("1f1b", 2, 2, 1), "stage 2 is not one of 2"),
        (lambda: simulate(two_stages(), [1], [1, 1], {}), "1 durations of FORWARD for 2 stages"),
        (
            lambda: simulate(two_stages(), [1, 1], [1, 1], {}),
            "stage 0 SEND micro-batch 0 to stage 1 has no latency",
        ),
    ],
)
def test_a_bad_request_says_so(call: Callable[[], object], message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        call()


def test_receives_are_asked_for_a_computation_ahead() -> None:
    asked = [
        {str(at): [str(r) for r in early] for at, early in receives_ahead(program).items()} for program in two_stages()
    ]
    expected = [
        {"F0": [], "F1": ["G0"], "B0": [], "F2": ["G1"], "B1": [], "F3": ["G2"], "B2": [], "B3": []},
        {"F0": [], "B0": ["R1"], "F1": [], "B1": ["R2"], "F2": [], "B2": ["R3"], "F3": [], "B3": []},
    ]
    for stage, rows in enumerate(expected):
        named = {str(spelled(stage, k)[0]): [str(r) for r in spelled(stage, " ".join(v))] for k, v in rows.items()}
        assert asked[stage] == named


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stages", [2, 3, 4, 6])
@pytest.mark.parametrize("skips", [False, True])
def test_receives_asked_ahead_block_no_channel(schedule: str, stages: int, skips: bool) -> None:
    """Even where a rank's sends and receives of one direction wait for each other in the order in which they were
    posted, as on one communicator of NCCL."""
    edges = [*pairwise(range(stages)), *([(0, stages - 1)] if skips else [])]
    for micro_batches in range(1, 2 * stages + 2):
        assert finishes(instructions(schedule, stages, micro_batches, edges))


def finishes(lists: Lists) -> bool:
    """Whether ranks come to their ends whose messages of one direction go one after the other, as posted."""
    early = [receives_ahead(program) for program in lists]
    towards = {Op.SEND: "a", Op.RECV: "a", Op.SEND_GRAD: "g", Op.RECV_GRAD: "g"}
    posted: list[dict[str, list[Instruction]]] = [{"a": [], "g": []} for _ in lists]
    known: list[set[Instruction]] = [set() for _ in lists]
    at, moved = [0] * len(lists), True

    def post(entry: Instruction) -> None:
        if entry not in known[entry.stage]:
            known[entry.stage].add(entry)
            posted[entry.stage][towards[entry.op]].append(entry)

    while moved:
        moved = False
        for stage, program in enumerate(lists):
            while at[stage] < len(program):
                entry = program[at[stage]]
                for receive in early[stage].get(entry, ()):
                    post(receive)
                if entry.op in towards:
                    post(entry)
                if entry.op in (Op.RECV, Op.RECV_GRAD) and entry in posted[stage][towards[entry.op]]:
                    break
                at[stage], moved = at[stage] + 1, True
        for here, channels in enumerate(posted):
            for name, queue in channels.items():
                while queue and (other := posted[queue[0].peer][name]) and is_pair(queue[0], other[0], here):
                    queue.pop(0)
                    other.pop(0)
                    moved = True
    return at == [len(program) for program in lists]


def is_pair(one: Instruction, other: Instruction, stage: int) -> bool:
    """Whether a message's two ends are these."""
    return other.peer == stage and one.micro_batch == other.micro_batch and one.op != other.op
