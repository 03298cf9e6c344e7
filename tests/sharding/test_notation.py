"""The notation: which rows parse, how letters bind to sizes, and what splitting one means."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopart.sharding.binding import bind, letter_groups, split_letter
from autopart.sharding.notation import C, P, Placement, R, RowError, S, Shape, Strategy, parse, splits

GOOD = {  # row: inputs, outputs
    "m k, k n -> m n": (2, 1),
    "... k,n k->... n": (2, 1),
    "..., - , d! -> ... d!": (3, 1),
    " -> a b": (0, 1),
    "a ->": (1, 1),
    "..., ..., -> ...": (3, 1),
    "(h d) (3 n) -> h d, (a+b), n": (1, 3),
    "b (g! r) 1 -> b": (1, 1),
    "long_name x2 -> x2": (1, 1),
}
BAD = {  # row: the reason
    "a b": "exactly one '->'",
    "a -> b -> c": "exactly one '->'",
    "a * b -> a": r"cannot read '\* b'",
    "a ! -> a": "cannot read '!'",
    "(a b -> a": r"'\(' without '\)'",
    "a b) -> a": r"found '\)'",
    "((a) b) -> a": r"found '\('",
    "() -> a": "neither a product nor a sum of parts",
    "(a+) -> a": "neither a product nor a sum of parts",
    "(a b+c) -> a": "neither a product nor a sum of parts",
    "(a+b c) -> a": "neither a product nor a sum of parts",
    "a - -> a": "found '-'",
    "(... a) -> a": r"found '\.\.\.'",
    "... a ... -> a": "twice in one operand",
}
MISFIT: dict[str, tuple[list[Shape | None], list[Shape], str]] = {  # row: shapes of inputs and outputs, the reason
    "a a -> a": ([(2, 3)], [(3,)], "a is 3, and 2"),
    "m k, k n -> m n": ([(2, 3), (4, 5)], [(2, 5)], "k is 4, and 3"),
    "a -> a": ([(2, 3)], [(2,)], r"1 dims do not fit shape \(2, 3\)"),
    "a b c ... -> a": ([(2, 3)], [(2,)], "too few dims"),
    "(a 3) -> a": ([(7,)], [(2,)], "a 3 is 6, and 7"),
    "1 -> a": ([(2,)], [(4,)], "1 is 1, and 2"),
    "(a+b) -> a, b": ([(7,)], [(2,), (4,)], "a b is 6, and 7"),
    "(a+b) -> a": ([(3,)], [(5,)], "a b is 5, and 3"),
    "(a b) -> a": ([(7,)], [(2,)], "a b is 6, and 7"),
    "(a b) -> (a b)": ([(6,)], [(6,)], "the size of a and b is unknown"),
}


@pytest.mark.parametrize("row", GOOD)
def test_good_row(row: str) -> None:
    parsed = parse(row)
    assert (len(parsed.inputs), len(parsed.outputs)) == GOOD[row]


@pytest.mark.parametrize("row", BAD)
def test_bad_row(row: str) -> None:
    with pytest.raises(RowError, match=BAD[row]) as caught:
        parse(row)
    assert repr(row) in str(caught.value)


@pytest.mark.parametrize("row", MISFIT)
def test_row_that_does_not_fit(row: str) -> None:
    inputs, outputs, reason = MISFIT[row]
    with pytest.raises(RowError, match=reason) as caught:
        bind(parse(row), inputs, outputs)
    assert repr(row) in str(caught.value)


def test_parts_of_an_operand() -> None:
    operand, none = parse("a! (h 3 d) (q+k) ..., - -> a").inputs
    assert operand is not None and none is None
    assert [d.joined for d in operand] == ["*", "*", "+", "*"]
    assert [f.name for d in operand for f in d.factors] == ["a", "h", "3", "d", "q", "k", "..."]
    assert [f.fixed for d in operand for f in d.factors] == [True, False, True, False, False, False, False]


sizes = st.integers(1, 6)
placements = st.one_of(
    st.sampled_from([R, C, P]),
    st.builds(S, st.integers(0, 9), st.lists(st.integers(1, 99), max_size=4)),
)


@given(placements)
def test_placement_round_trip(placement: Placement) -> None:
    assert Placement.parse(str(placement)) == placement


@pytest.mark.parametrize("text", ["", "X", "S", "S-1", "R0", "S1[]", "S1[2+2", "S1 ", "S1[2++2]", "S1[+]"])
def test_no_placement(text: str) -> None:
    with pytest.raises(ValueError, match="not a placement"):
        Placement.parse(text)


@pytest.mark.parametrize(
    "placement, shards, fits",
    [
        (S(0), 3, True),
        (S(0), 4, False),
        (S(1, (4, 8)), 4, True),
        (S(1, (4, 8)), 8, False),
        (R, 7, True),
        (P, 7, True),
    ],
)
def test_splits_evenly(placement: Placement, shards: int, fits: bool) -> None:
    assert splits(placement, (6, 12), shards) is fits


@given(st.lists(sizes, min_size=2, max_size=4), st.data())
def test_product_binds(factors: list[int], data: st.DataObject) -> None:
    """A product gives the size of the one letter that stands nowhere alone."""
    names = [f"d{k}" for k in range(len(factors))]
    hidden = data.draw(st.integers(0, len(factors) - 1))
    alone = [n for k, n in enumerate(names) if k != hidden]
    known = tuple(f for k, f in enumerate(factors) if k != hidden)
    bound = bind(parse(f"({' '.join(names)}) -> {' '.join(alone)}"), [(math.prod(factors),)], [known])
    assert bound.sizes == dict(zip(names, factors, strict=True))


@given(st.lists(sizes, min_size=2, max_size=4), st.integers(1, 4))
def test_parts_bind(parts: list[int], shards: int) -> None:
    """`(a+b)` is as long as its parts together; they split together, each on its own."""
    names = [f"p{k}" for k in range(len(parts))]
    row = parse(f"({'+'.join(names)}) -> {', '.join(names)}")
    bound = bind(row, [(sum(parts),)], [(n,) for n in parts])
    assert bound.sizes == dict(zip(names, parts, strict=True))
    assert letter_groups(bound) == [frozenset(names)]
    strategy = split_letter(bound, frozenset(names), shards)
    if any(n % shards for n in parts):
        assert strategy is None
    else:
        assert strategy is not None
        assert strategy.inputs == (S(0, parts),) and strategy.outputs == (S(0),) * len(parts)


@given(sizes, sizes, sizes)
def test_sizes_pass_along_a_chain(a: int, b: int, c: int) -> None:
    """Each product has one unknown once the one before it is solved, in whatever order they stand."""
    bound = bind(parse("(b c) (a b) -> a (c b)"), [(b * c, a * b)], [(a, c * b)])
    assert bound.sizes == {"a": a, "b": b, "c": c}


SPLIT: list[tuple[str, list[Shape | None], list[Shape], str, str | None]] = [  # ..., letter, what comes
    ("m k, k n -> m n", [(4, 6), (6, 8)], [(4, 8)], "m", "S0 C -> S0"),
    ("m k, k n -> m n", [(4, 6), (6, 8)], [(4, 8)], "k", "S1 S0 -> P"),
    ("m k, k n -> m n", [(4, 5), (5, 8)], [(4, 8)], "k", None),
    (" -> a b", [], [(4, 6)], "b", "-> S1"),
    ("a -> b a", [(4,)], [(6, 4)], "b", "C -> S0"),
    ("a, - -> a", [(4,), None], [(4,)], "a", "S0 - -> S0"),
    ("(h d) -> h d", [(8,)], [(4, 2)], "h", "S0 -> S0"),
    ("(h d) -> h d", [(8,)], [(4, 2)], "d", None),
    ("(3 n) -> n", [(12,)], [(4,)], "n", "S0[4+4+4] -> S0"),
    ("(3 2 n m) -> n m", [(24,)], [(2, 2)], "n", "S0[4+4+4+4+4+4] -> S0"),
    ("(h 3) -> h 3", [(12,)], [(4, 3)], "h", "S0 -> S0"),
    ("d!, d -> d", [(4,), (4,)], [(4,)], "d", None),
    ("a a -> a", [(4, 4)], [(4,)], "a", None),
    ("..., ... -> ...", [(4, 6), (6,)], [(4, 6)], ".1", "S1 S0 -> S1"),
    ("..., ... -> ...", [(4, 6), (6,)], [(4, 6)], ".2", "S0 C -> S0"),
    ("..., ... -> ...", [(4, 1), (6,)], [(4, 6)], ".1", "C S0 -> S1"),
]


def shown(strategy: Strategy) -> str:
    inputs = (str(p) if p else "-" for p in strategy.inputs)
    return f"{' '.join(inputs)} -> {' '.join(map(str, strategy.outputs))}".strip()


@pytest.mark.parametrize("row, inputs, outputs, letter, expected", SPLIT)
def test_split_letter(
    row: str, inputs: list[Shape | None], outputs: list[Shape], letter: str, expected: str | None
) -> None:
    strategy = split_letter(bind(parse(row), inputs, outputs), frozenset([letter]), 2)
    assert (strategy and shown(strategy)) == expected
