"""The table of op rules proves itself.

Every sample call runs whole, and split over simulated ranks in every way its row allows; outputs and input
gradients, put together again, must equal the whole in float64. Corrupted rows must fail the same proof.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  registers its operators
from hypothesis import given, settings
from hypothesis import strategies as st
from proof import Sample, called, f, i, prove, resolve, swapped, tensors_of, ways
from samples import ATTENTION, SAMPLES, b, call, ignoring, normed, some, u

import autopart.ir.ctc  # noqa: F401  registers its operator
from autopart.sharding import rules as rules
from autopart.sharding.notation import S
from autopart.sharding.rules import (
    ROLES,
    RULES,
    Product,
    flatten,
    flops,
    local_args,
    local_shape,
    op_name,
    product_of,
    sums_up,
)
from autopart.sharding.rules.base import Sizes

SHARDS = (2, 3, 4)


def identified(samples: Sequence[Sample]) -> list[str]:
    return [f"{s.name}-{k}" for k, s in enumerate(samples)]


def test_every_sample_has_a_row() -> None:
    assert {s.name for s in SAMPLES} <= set(RULES)


def test_every_row_is_an_operator() -> None:
    assert {name: op_name(resolve(name)) for name in RULES} == {name: name for name in RULES}


@pytest.mark.parametrize("sample", SAMPLES, ids=identified(SAMPLES))
def test_row(sample: Sample) -> None:
    for shards in SHARDS:
        for strategy in ways(sample, shards):
            prove(sample, strategy, shards)


def spelled(sample: Sample, shards: int) -> set[str]:
    """The splits, as "S0 C -> P", with what replaces the operator."""
    return {
        f"{' '.join(str(p) for p in s.inputs if p)} -> {' '.join(map(str, s.outputs))} {s.local}".strip()
        for s in ways(sample, shards)
        if s.shards_work
    }


SPLITS = [  # every split there is over 2 ranks: a row that allows too little proves itself as well
    (call("aten.mm", f(4, 6), f(6, 8)), "S0 C -> S0; S1 S0 -> P; C S1 -> S1"),
    (call("aten.linear", f(3, 4, 6), f(8, 6)), "S1 C -> S1; S2 S1 -> P; C S0 -> S2"),
    (call("aten.linear", f(4, 6), f(8, 6), f(8)), "S0 C C -> S0; C S0 S0 -> S1"),
    (call("aten.linear", f(4, 6), f(8, 6), hints=[S(1, (2, 6)), S(1, (4, 6))]),
     "S0 C -> S0; S1 S1 -> P; C S0 -> S1; C S0[2+6] -> S1[2+6]"),
    (call("aten.conv2d", f(2, 4, 5, 5), f(6, 4, 3, 3)), "S0 C -> S0; S1 S1 -> P; C S0 -> S1"),
    (call("aten.conv2d", f(2, 4, 5, 5), f(4, 1, 3, 3), None, [1, 1], [0, 0], [1, 1], 4), "S0 C -> S0; S1 S0 -> S1"),
    (call(ATTENTION, f(2, 4, 6, 8), f(2, 4, 6, 8), f(2, 4, 6, 8)),
     "S0 S0 S0 -> S0; S1 S1 S1 -> S1; S2 C C -> S2"),
    (call(ATTENTION, f(2, 4, 6, 8), f(2, 4, 6, 8), f(2, 4, 6, 8), None, 0.0, True),
     "S0 S0 S0 -> S0; S1 S1 S1 -> S1"),
    (call(ATTENTION, f(1, 4, 5, 8), f(1, 2, 5, 8), f(1, 2, 5, 8), enable_gqa=True),
     "S1 S1 S1 -> S1"),
    (call("aten.embedding", f(4, 6), i(4, 8)), "S0 C -> P vocab_embedding; S1 C -> S1; C S0 -> S0"),
    (call("aten.cross_entropy_loss", f(6, 8), i(8, 6)),
     "S0 S0 -> P cross_entropy_sum; S1 C -> R vocab_cross_entropy"),
    (call("aten.cross_entropy_loss", f(6, 8), i(8, 6), None, 2), "S0 S0 -> P"),
    (call("aten.layer_norm", f(4, 6), [6], f(6), f(6)), "S0 C C -> S0"),
    (call("aten.mean.dim", f(4, 6), [-1]), "S0 -> S0; S1 -> P mean"),
    (call("aten.amax", f(4, 6), [-1]), "S0 -> S0"),
    (call("aten.view", f(4, 24), [4, 3, 8]), "S0 -> S0"),
    (call("aten.view", f(4, 24), [4, 6, 4]), "S0 -> S0; S1 -> S1"),
    (call("aten.view", f(3, 6, 4), [3, 24]), "S1 -> S1"),
    (call("aten.expand", f(4, 1), [2, 4, 6]), "C -> S0; S0 -> S1; C -> S2"),
    (call("aten.split.Tensor", f(3, 12), 6, 1), "S1[6+6] -> S1 S1"),
    (call("aten.cat", [f(3, 4), f(3, 6)], 1), "S1 S1 -> S1[4+6]"),
    (call("aten.cat", [f(3, 4), f(3, 5)], 1), ""),
    (call("aten.index.Tensor", f(4, 5, 6), [None, i(5, 8)]), "S0 C -> S0; S2 C -> S2; C S0 -> S1"),
    (call("aten.gather", f(4, 6), 1, i(6, 4, 2)), "S0 S0 -> S0; C S1 -> S1"),
    (call("aten.pad", f(4, 6), [1, 1]), "S0 -> S0"),
    (call("aten.add.Tensor", f(4, 6), f(6)), "S0 C -> S0; S1 S0 -> S1"),
    (call("aten.add.Tensor", f(4, 6), 1.0), "S0 -> S0; S1 -> S1"),
    (call("aten.full", [4, 6], 1.0), "-> S0; -> S1"),
    (call("aten.einsum", "bmk,bkn->bmn", [f(2, 4, 6), f(2, 6, 8)]),
     "S0 S0 -> S0; S1 C -> S1; S2 S1 -> P; C S2 -> S2"),
    (call("aten.addmm", f(8), f(4, 6), f(6, 8)), "C S0 C -> S0; S0 C S1 -> S1"),
    (call("transformers.grouped_mm_fallback", f(8, 6), f(2, 6, 4), torch.tensor([4, 8])),
     "S1 S1 C -> P; C S2 C -> S1"),
    (call("aten.conv_transpose2d.input", f(2, 4, 5, 5), f(4, 6, 3, 3)), "S0 C -> S0; S1 S0 -> P; C S1 -> S1"),
    (call("aten.index.Tensor", f(4, 6, 8), [i(4, 10, 12), i(6, 12)]),
     "S2 C C -> S2; C S0 C -> S0; C S1 S0 -> S1"),
    (call("aten.index.Tensor", f(4, 6, 8), [i(4, 10), None, i(8, 10)]), "S1 C C -> S1; C S0 S0 -> S0"),
    (call("aten.index_put", f(4, 6, 8), [None, i(6, 10)], f(4, 10, 8), True), "S0 C S0 -> S0; S2 C S2 -> S2"),
    (call("aten.index_put", f(4, 6, 8), [b(4, 6)], f()), "S2 C C -> S2"),
    (call("aten.scatter_add", f(4, 6), 1, i(6, 4, 10), f(4, 10)), "S0 S0 S0 -> S0"),
    (call("aten.topk", f(4, 6), 2), "S0 -> S0 S0"),
    (call("aten.histc", f(4, 6), 8, 0, 1), "S0 -> P; S1 -> P"),
    (call("aten.stack", [f(4, 6), f(4, 6)], 1), "S0 S0 -> S0; S1 S1 -> S2"),
    (call("aten.repeat", f(1, 4), [6, 2]), "C -> S0; S1 -> S1[4+4]"),
    (call("aten.glu", f(4, 12)), "S0 -> S0; S1[6+6] -> S1"),
    (call("aten.pixel_shuffle", f(2, 16, 4, 5), 2), "S0 -> S0; S1 -> S1; S2 -> S2"),
    (call("aten.im2col", f(2, 4, 5, 5), [2, 2], [1, 1], [0, 0], [1, 1]), "S0 -> S0; S1 -> S1"),
    (call("aten.max_pool2d", f(2, 4, 6, 6), [2, 2]), "S0 -> S0; S1 -> S1"),
    (normed("batch_norm", f(2, 4, 6), f(4), f(4), f(4), u(4), True, 0.1, 1e-5, False), "S1 S0 S0 S0 S0 -> S1"),
    (normed("batch_norm", f(2, 4, 6), f(4), f(4), f(4), u(4), False, 0.1, 1e-5, False),
     "S0 C C C C -> S0; S1 S0 S0 S0 S0 -> S1; S2 C C C C -> S2"),
    (call("aten.group_norm", f(2, 4, 6), 4, f(4), f(4)), "S0 C C -> S0; S1 S0 S0 -> S1"),
    (call("aten.group_norm", f(2, 4, 6), 2, f(4), f(4)), "S0 C C -> S0"),
    (call("aten.native_group_norm", f(2, 4, 6), f(4), f(4), 2, 4, 6, 2, 1e-5),
     "S0 C C -> S0 S0 S0; S1 S0 S0 -> S1 S1 S1"),
    (call("aten.type_as", f(4, 6), f(4, 5)), "S0 S0 -> S0; S1 C -> S1"),
]  # fmt: skip


@pytest.mark.parametrize("sample, expected", SPLITS, ids=identified([s for s, _ in SPLITS]))
def test_splits(sample: Sample, expected: str) -> None:
    assert spelled(sample, 2) == set(filter(None, expected.split("; ")))


@pytest.mark.parametrize("name", ["aten.relu", "aten.softmax.int", "aten.amax", "aten.where.ScalarOther"])
def test_no_partial_sum_passes(name: str) -> None:
    sample = next(s for s in SAMPLES if s.name == name)
    assert all("P" not in {p.kind for p in s.inputs if p} for s in ways(sample, 2))


@st.composite
def views(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes of as many elements."""
    primes = draw(st.lists(st.sampled_from([1, 2, 3, 4]), max_size=5))

    def grouped() -> list[int]:
        cuts = sorted(draw(st.sets(st.integers(0, len(primes)), max_size=4)) | {0, len(primes)})
        return [math.prod(primes[a:z]) for a, z in pairwise(cuts)]

    return grouped(), grouped()


@given(views())
@settings(max_examples=100, deadline=None)
def test_any_view(shapes: tuple[list[int], list[int]]) -> None:
    sample = call("aten.view", f(*shapes[0]), shapes[1])
    for strategy in ways(sample, 2):
        prove(sample, strategy, 2)


CORRUPTED = [  # the operator's wrong row, and a call that shows it
    ("a k -> a k", call("aten.softmax.int", f(12, 24), -1)),
    ("a k -> a k", call("aten.log_softmax.int", f(12, 24), 1)),
    ("... -> ...", call("aten.cumsum", f(12, 24), 0)),
    ("... d, -, d, d -> ... d", call("aten.layer_norm", f(12, 24), [24], f(24), f(24))),
    ("... d, d -> ... d", call("autopart.rms_norm", f(12, 24), f(24), 1e-6)),
    ("k m, k n -> m n", call("aten.mm", f(12, 12), f(12, 12))),
    ("m k, n k -> m n", call("aten.mm", f(12, 12), f(12, 12))),
    ("... k, k n -> ... n", call("aten.linear", f(12, 12), f(12, 12))),
    ("... k, n k, n -> ... n", call("aten.linear", f(12, 24), f(36, 24), f(36))),
    ("b h q d!, b h k d!, b h k e! -> b h q e!", call(ATTENTION, *(f(2, 3, 12, 5),) * 3)),
    ("b h q d, b h k! d, b h k! e! -> b h q e!", call(ATTENTION, *(f(2, 3, 5, 12),) * 3)),
    ("b h q d!, b h k! d!, b h k! e! -> b h q e!",
     call(ATTENTION, *(f(2, 3, 12, 5),) * 3, None, 0.0, True)),
    ("b (g h) q! d!, b h k! d!, b h k! d! -> b (g h) q! d!",
     call(ATTENTION, f(1, 24, 2, 5), *(f(1, 12, 3, 5),) * 2, enable_gqa=True)),
    ("d v, ... -> ... d", call("aten.embedding", f(12, 12), i(12, 12))),
    ("v d, ... -> ... d", call("aten.embedding", f(12, 12), i(12, 12))),
    ("b v, b -> ", call("aten.cross_entropy_loss", f(12, 12), ignoring(i(12, 12)))),
    ("... -> ", call("aten.mean", f(12, 24))),
    ("a b -> a", call("aten.amax", f(12, 24), [1])),
    ("a b -> a", call("aten.var.correction", f(12, 24), [1])),
    ("a b -> (b a)", call("aten.view", f(12, 12), [144])),
    ("(a b) -> b a", call("aten.view", f(24), [2, 12])),
    ("a b -> a b", call("aten.transpose.int", f(12, 12), 0, 1)),
    ("(a 3) -> a, a, a", call("aten.split.Tensor", f(36), 12)),
    ("a b, a c -> a d", call("aten.cat", [f(12, 12), f(12, 12)], 1)),
    ("a b, -, a c -> a c", call("aten.gather", f(12, 24), 0, i(12, 12, 24))),
    ("a b, i -> i b", call("aten.index.Tensor", f(12, 3), [i(12, 24)])),
    ("a b -> a b", call("aten.pad", f(12, 12), [1, -1])),
    ("b c a!, o c w!, o -> b o z!", call("aten.conv1d", f(12, 12, 5), f(12, 12, 3), f(12))),
    ("... k -> ...", call("aten.relu", f(12))),
]  # fmt: skip


@pytest.mark.parametrize("row, sample", CORRUPTED, ids=[f"{s.name}: {r}" for r, s in CORRUPTED])
def test_wrong_row_fails(row: str, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    for strategy in ways(sample, 2):
        prove(sample, strategy, 2)
    monkeypatch.setitem(RULES, sample.name, rules.Rule(row))
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        for strategy in ways(sample, 2):
            prove(sample, strategy, 2)


@pytest.mark.parametrize("sample", [call("aten.relu", f(12)), call("aten.mul.Tensor", f(12), f(12))])
def test_wrong_linearity_fails(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, sample.name, replace(RULES[sample.name], linear=-1))
    (partial,) = (s for s in ways(sample, 2) if s.name == "P")
    with pytest.raises(AssertionError, match="not close"):
        prove(sample, partial, 2)


PRODUCTS: dict[str, tuple[Sample, tuple[float, ...] | None]] = {
    "mm": (call("aten.mm", f(4, 6), f(6, 8)), (1, 4, 8, 6)),
    "bmm": (call("aten.bmm", f(3, 4, 6), f(3, 6, 8)), (3, 4, 8, 6)),
    "matmul": (call("aten.matmul", f(2, 3, 4, 6), f(2, 3, 6, 8)), (6, 4, 8, 6)),
    "matmul that broadcasts": (call("aten.matmul", f(2, 3, 6), f(6, 8)), (1, 6, 8, 6)),
    "linear": (call("aten.linear", f(2, 3, 6), f(8, 6)), (1, 6, 8, 6)),
    "linear with bias": (call("aten.linear", f(2, 3, 6), f(8, 6), f(8)), (1, 6, 8, 6)),
    "addmm": (call("aten.addmm", f(8), f(4, 6), f(6, 8)), (1, 4, 8, 6)),
    "baddbmm": (call("aten.baddbmm", f(3, 4, 8), f(3, 4, 6), f(3, 6, 8)), (3, 4, 8, 6)),
    "einsum": (call("aten.einsum", "bqhd,bkhd->bhqk", [f(2, 4, 3, 6), f(2, 5, 3, 6)]), (6, 4, 5, 6)),
    "einsum of three": (call("aten.einsum", "ij,jk,kl->il", [f(2, 3), f(3, 4), f(4, 5)]), (1, 2, 5, 12)),
    "vector": (call("aten.mv", f(4, 6), f(6)), (1, 4, 1, 6)),
    "numbers": (call("aten.dot", f(6), f(6)), None),
    "nothing summed": (call("aten.einsum", "ij,ij->ij", [f(2, 3), f(2, 3)]), None),
    "no product": (call("aten.add.Tensor", f(2), f(2)), None),
    "experts": (call("autopart.grouped_linear", f(24, 6), f(4, 8, 6), i(4, 24), False), (4, 6, 8, 6)),
    "a mixture": (
        call("autopart.experts", f(24, 6), f(4, 16, 6), f(4, 6, 8), f(24, 2), i(4, 24, 2), "silu", False),
        (4, 12, 18, 8),
    ),
    "a mixture with biases": (
        call(
            "autopart.clamped_experts",
            f(24, 6),
            f(4, 6, 16),
            f(4, 8, 6),
            f(4, 16),
            f(4, 6),
            f(24, 2),
            i(4, 24, 2),
            1.7,
            0.5,
        ),
        (4, 12, 18, 8),
    ),
    "grouped": (
        call("transformers.grouped_mm_fallback", f(24, 6), f(3, 6, 8), torch.tensor([5, 5, 24])),
        (3, 8, 8, 6),
    ),
    "attention": (
        call(ATTENTION, f(2, 3, 4, 8), f(2, 3, 5, 8), f(2, 3, 5, 6), some(b(3, 4, 5))),
        (6, 4, 5, 8, 6, False),
    ),
    "causal attention": (call(ATTENTION, *[f(2, 3, 4, 8)] * 3, None, 0.0, True), (6, 4, 4, 8, 8, True)),
    "grouped queries": (
        call(ATTENTION, f(2, 4, 4, 8), *[f(2, 2, 4, 8)] * 2, None, 0.0, False, enable_gqa=True),
        (8, 4, 4, 8, 8, False),
    ),
    "convolution": (call("aten.conv2d", f(2, 4, 5, 5), f(6, 4, 3, 3)), (1, 18, 6, 36)),
    "convolution of every channel": (
        call("aten.conv2d", f(2, 4, 5, 5), f(4, 1, 3, 3), None, [1, 1], [0, 0], [1, 1], 4),
        (4, 18, 1, 9),
    ),
    "transposed convolution": (call("aten.conv_transpose2d.input", f(2, 4, 5, 5), f(4, 6, 3, 3)), (1, 50, 54, 4)),
}
"""A call, and the sizes of the product that it is."""


@pytest.mark.parametrize(
    ("equation", "shapes", "sums"),
    [
        ("bq,bk->bqk", [(2, 3), (2, 4)], False),
        ("blq,bhlk->bhlqk", [(2, 5, 3), (2, 4, 5, 6)], False),
        ("ij->ji", [(2, 3)], False),
        ("ij,ij->i", [(2, 3), (2, 3)], True),
        ("ij,jk", [(2, 3), (3, 4)], True),
    ],
)
def test_an_einsum_sums_up_what_its_output_lacks(equation: str, shapes: list[tuple[int, ...]], sums: bool) -> None:
    sample = call("aten.einsum", equation, [f(*shape) for shape in shapes])
    given = swapped(sample.args, (t.shape for t in tensors_of(sample)))
    assert sums_up(sample.name, given, [tuple(o.shape) for o in called(sample.op, sample.args, sample.kwargs)]) is sums


def product(sample: Sample, counted: Sequence[int | None] | None = None) -> Product | None:
    shapes = swapped(sample.args, (t.shape for t in tensors_of(sample)))
    outputs = [tuple(o.shape) for o in called(sample.op, sample.args, sample.kwargs)]
    return product_of(sample.name, shapes, outputs, counted or [None] * len(flatten(shapes)))


@pytest.mark.parametrize("name", PRODUCTS)
def test_sizes_of_products(name: str) -> None:
    sample, expected = PRODUCTS[name]
    found = product(sample)
    assert (found and found.sizes) == (expected and Sizes(*expected))


CONTRACTIONS = [s for s in SAMPLES if product(s) is not None]


@pytest.mark.parametrize("sample", CONTRACTIONS, ids=identified(CONTRACTIONS))
def test_a_share_of_a_product_is_the_product_of_shares(sample: Sample) -> None:
    """As large as its FLOPs say, and cut by a split as the shapes of a rank's operands say."""
    whole = product(sample)
    assert whole is not None
    shapes = swapped(sample.args, (t.shape for t in tensors_of(sample)))
    outputs = [tuple(o.shape) for o in called(sample.op, sample.args, sample.kwargs)]
    if sample.name not in (ATTENTION, "autopart.attention", "autopart.dropout_attention"):
        assert 2 * math.prod(whole.sizes[:4]) == pytest.approx(flops(sample.name, shapes, outputs))
    for strategy in ways(sample, 2):
        if strategy.local or not strategy.shards_work:
            continue
        placed = zip(flatten(shapes), strategy.inputs, strict=True)
        local = [torch.Size(local_shape(a, p, 2)) for a, p in placed if p is not None]
        given = [local_shape(o, p, 2) for o, p in zip(outputs, strategy.outputs, strict=True)]
        args = local_args(sample.name, swapped(sample.args, iter(local)), given)
        share = product_of(sample.name, args, given, [None] * len(flatten(shapes)))
        role = whole.role(strategy)
        assert role is not None
        cut = whole.sizes._replace(**{ROLES[role]: whole.sizes[role] / 2})
        assert (share is None and max(cut.m, cut.n) <= 1) or (share is not None and share.sizes == cut)


def test_sizes_that_count_samples() -> None:
    linear, scores = PRODUCTS["linear"][0], PRODUCTS["bmm"][0]
    found = [product(linear, [0, None]), product(linear, [None, None]), product(scores, [0, 0])]
    assert [p and p.grows for p in found] == [(False, True, False, False), (False,) * 4, (True, False, False, False)]
