"""What torchtitan's runs reserve besides what their plans say."""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest

from autopart.plan.data import Plan
from autopart.plan.schedules import compute_order
from autopart.plan.schedules.ops import Op
from autopart.planner.explain.memory_report import MemoryReport, report_traced
from benchmarks.accuracy.published import Bench, Published, read
from benchmarks.accuracy.published_runs import as_held, held, plan_of
from benchmarks.accuracy.reserved import alive, besides, elements, late

pytestmark = pytest.mark.slow

ROWS = {row.name: row for row in read("torchtitan_llama3.csv")}
BENCH = Bench(as_run=True)
BLOCK, ROOT = 218_112_000, 2 * 128256 * 4096 + 4096
"""Parameters of Llama-3-8B: of a block; of embedding, norm and head."""


@cache
def planned(name: str, pieces: int = 0) -> tuple[Published, Plan, tuple[MemoryReport, ...]]:
    """A row as it is held, perhaps with another number of pieces, its plan, and whose the bytes of its stages are."""
    row = as_held(replace(ROWS[name], pieces=pieces or ROWS[name].pieces))
    plan = plan_of(BENCH, row, "float32")
    return row, plan, report_traced(plan, BENCH.source(row))


def more(name: str, stage: int = 0, pieces: int = 0) -> tuple[dict[str, float], dict[str, float]]:
    """What a stage of a row holds by its plan, and besides."""
    row, plan, stages = planned(name, pieces)
    return dict(plan.stages[stage].memory), besides(plan, row, stage, stages[stage])


@pytest.mark.parametrize("micro_batches", [1, 4, 8, 20])
@pytest.mark.parametrize("stage", [0, 1, 5, 7])
def test_what_is_alive_once_there_are_gradients(stage: int, micro_batches: int) -> None:
    order = [op for op, _ in compute_order("1f1b", stage, 8, micro_batches)]
    first = order.index(Op.BACKWARD) + 1
    counts = [order[:n].count(Op.FORWARD) - order[:n].count(Op.BACKWARD) for n in range(first, len(order))]
    assert alive(stage, 8, micro_batches, 1) == max(counts, default=0)


@pytest.mark.parametrize(("stage", "count"), [(0, 15), (4, 15), (6, 11), (7, 9)])
def test_interleaved_pieces_that_are_alive(stage: int, count: int) -> None:
    """Of 8 micro-batches in 2 pieces on 8 ranks: 8 + 2 (7 - s) forwards before the first pair, 16 at most."""
    assert alive(stage, 8, 8, 2) == count


def test_stages_of_torchtitan() -> None:
    """126 blocks in 8 stages: 15, 16 six times, 15."""
    row = ROWS["torchtitan_2024_12:13"]
    assert [b - a for a, b in pairwise((0, *row.cuts, 126))] == [15, 16, 16, 16, 16, 16, 16, 15]
    assert (row.micro_batch / row.forced["dp"], row.pieces, ROWS["torchtitan_2024_12:14"].pieces) == (4, 1, 2)


def test_without_a_pipeline() -> None:
    """Llama-3-8B on 8 ranks, two samples of 8192 each: slices of a stream of their own, a root that stays whole."""
    plan, found = more("torchtitan_2024_12:1")
    tokens = 2 * 8192
    assert found == pytest.approx(
        {
            "again": -2 * (1024 + 4096 + 14336) * tokens * 32,
            "logits": 4 * 0.5 * 128256 * tokens,
            "late": 0,
            "freed": 2 * (3 * 14336 + 2 * 4096) * tokens,
            "scattered": plan["optimizer"] / 2,  # as each of the states of Adam
            "gathered": 2 * (ROOT + BLOCK),
            "buffers": 2 * (ROOT + BLOCK) * 9 / 8,
        }
    )


@pytest.mark.parametrize("ranks", [32, 64])
def test_a_compiled_loss_leaves_no_room_for_the_root_gradients(ranks: int) -> None:
    """What is scattered last is as large as the bfloat16 logits of 16384 tokens and the norm's 4096 elements more; half
    as large as float32 ones. The blocks' parameters are gathered in 8 bits."""
    _, found = more(f"torchtitan_h200:{ranks // 32 + 30}")
    states = 2 * 4 * (ROOT + 32 * BLOCK) / ranks
    assert 4 * ROOT == 2 * 128256 * 2 * 8192 + 4 * 4096
    assert found["late"] == pytest.approx(4 * ROOT - states, rel=1e-3)
    assert found["gathered"] == pytest.approx(2 * ROOT + BLOCK, rel=1e-3)
    assert found["buffers"] == pytest.approx((2 * ROOT + BLOCK) * (1 + 1 / ranks), rel=1e-3)


@pytest.mark.parametrize(("last", "states"), [(8, 0), (12, 0), (12, 3), (12, 4)])
def test_a_late_tensor_in_an_allocator_of_segments(last: int, states: int) -> None:
    """Three steps of 10 kept tensors of 3, one of 8, and after them the last; after the first step, states of 1."""
    memory, step = Segments(), [3] * 10 + [8]
    for number in range(3):
        for block in [memory.take(size) for size in step]:
            memory.give(block)
        memory.give(memory.take(last))
        if number == 0:
            for _ in range(states):
                memory.take(1)
    assert memory.reserved == sum(step) + states + late(last, 8, states)


class Segments:
    """Large blocks of one stream by the rules of c10/cuda/CUDACachingAllocator.cpp: the smallest free one that is large
    enough, split, and joined again within its segment. Blocks are (segment, start) -> size."""

    def __init__(self) -> None:
        self.free, self.taken, self.reserved = dict[tuple[int, int], int](), dict[tuple[int, int], int](), 0

    def take(self, size: int) -> tuple[int, int]:
        at = min((at for at in self.free if self.free[at] >= size), key=lambda at: (self.free[at], at), default=None)
        if at is None:
            at = (self.reserved, 0)
            self.free[at] = size
            self.reserved += size
        segment, start = at
        left = self.free.pop(at) - size
        if left:
            self.free[segment, start + size] = left
        self.taken[at] = size
        return at

    def give(self, at: tuple[int, int]) -> None:
        self.free[at] = self.taken.pop(at)
        for segment, start in sorted(self.free, reverse=True):
            following = segment, start + self.free[segment, start]
            self.free[segment, start] += self.free.pop(following, 0)


def test_compiled_blocks_keep_and_free_less() -> None:
    _, eager = more("torchtitan_2024_12:4")
    _, compiled = more("torchtitan_2024_12:5")
    tokens = 2 * 8192
    assert eager["again"] - compiled["again"] == 2 * 4096 * tokens * 32
    assert eager["freed"] - compiled["freed"] == 2 * 14336 * tokens


@pytest.mark.parametrize(("name", "freed"), [(11, 2 * 8 * 8192 + 28672), (12, 8 * 8192 + 2 * 28672)])
def test_collectives_along_the_sequence_copy(name: int, freed: int) -> None:
    row = ROWS[f"torchtitan_2024_12:{name}"]
    assert row.freed == freed + 2 * 8192 and row.logits == 4.5


def test_pieces_have_their_gradients_one_after_another() -> None:
    """The second stage of Llama-3-405B: 16 blocks, whole or in two pieces of 8."""
    plan, pieces = more("torchtitan_2024_12:14", 1)
    _, whole = more("torchtitan_2024_12:14", 1, 1)
    each, block = 2 * 4 * 8192 / 8 * 16384, 2 * 16384 * (16384 + 1024 + 3 * 53248 / 2) / 8
    assert (whole["pieces"], pieces["pieces"]) == (0, -plan["gradients"] / 2)
    assert (whole["in flight"], pieces["in flight"]) == (0, 16 * each * (15 / 2 - 7))
    assert (whole["outputs"], pieces["outputs"]) == (8 * each, 16 * each)
    assert (whole["messages"], pieces["messages"]) == ((1 + 8) * each, (1 + 16) * each)
    assert whole["scattered"] == pytest.approx(4 * 16 * block / 8, rel=1e-3)
    assert (whole["buffers"], pieces["buffers"]) == pytest.approx((2 * 2 * block, 4 * 2 * block), rel=1e-3)


def test_the_last_stage_keeps_all_logits() -> None:
    """And puts them together at the end of a step, which float32 logits of one micro-batch leave no room for."""
    _, found = more("torchtitan_2024_12:15", 7)
    tensor, block = 32768 * 128256 / 8, 2 * 16384 * (16384 + 1024 + 3 * 53248 / 2) / 8
    states = 2 * 4 * (15 * block + 128256 / 8 * 16384) / 8
    assert found["outputs"] == 2 * 8 * tensor and found["logits"] == 4 * 2.0 * tensor
    assert found["late"] == pytest.approx(2 * 8 * tensor - states, rel=1e-3)


@pytest.mark.parametrize(
    ("pieces", "stage", "count"), [(1, 0, 0), (1, 1, 1), (1, 4, 4), (1, 7, 7), (2, 0, 1), (2, 6, 5), (2, 7, 7)]
)
def test_gradients_of_inputs_stay(pieces: int, stage: int, count: int) -> None:
    """Of micro-batches that went backward before the last moment of most activations; a first stage has no inputs."""
    _, found = more(f"torchtitan_2024_12:{12 + pieces}", stage)
    assert found["kept"] == count * 2 * 4 * 8192 / 8 * 16384


def test_elements_of_a_sliced_model() -> None:
    _, plan, stages = planned("torchtitan_h200:31")
    blocks, root = elements(plan, stages[0])
    assert blocks == pytest.approx([BLOCK] * 32, rel=1e-3) and root == pytest.approx(ROOT, rel=1e-3)


@pytest.mark.parametrize("name", ["2024_12:1", "2024_12:5", "2024_12:14", "2024_12:15", "h200:31"])
def test_what_was_published(name: str) -> None:
    """Nothing is fitted on these: of eager blocks, of compiled ones, of two pipelines, of a compiled loss."""
    found = held(BENCH, as_held(ROWS[f"torchtitan_{name}"]))
    assert found.row.memory is not None
    assert sum(found.memory.values()) / 2**30 == pytest.approx(found.row.memory, rel=0.05)


def test_a_run_that_no_formula_was_made_from() -> None:
    """Llama-3-8B compiled on 8 H100, one sample a rank: 47.65 GiB (pytorch/torchtitan #808, January 2025)."""
    row = replace(ROWS["torchtitan_2024_12:2"], micro_batch=8, global_batch=8)
    assert sum(held(BENCH, as_held(row)).memory.values()) / 2**30 == pytest.approx(47.65, rel=0.01)
