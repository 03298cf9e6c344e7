"""Attention against its reference in float64, and the reference against what models write."""

import json
import os
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import functional as F

from autopart.kernels import attention as module
from autopart.kernels import attention_facts, dropout
from autopart.kernels.attention import KERNEL, attention, reference
from autopart.kernels.kernel import Bytes
from autopart.runtime import random
from autopart.runtime.shards import shard
from autopart.runtime.simulated import World, simulated_groups
from autopart.sharding.binding import bind, split_letter
from autopart.sharding.notation import C, S, parse
from tests.support.interpreted import interpreted as interpreted_child

INF = float("inf")
ROUNDING = {torch.float32: 3e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}
NAMES = ("mask", "padding", "bias", "relative", "sinks", "rows", "columns")
LEARNED = ("bias", "relative", "sinks")
Tensors = dict[str, torch.Tensor | None]


class Case(NamedTuple):
    """One comparison with the float64 reference. `given` names operands besides query, key and value."""

    name: str
    given: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1, 2, 1, 19, 37, 24, 20)
    """Samples, heads of queries and of keys, queries, keys, elements of a key and of a value."""
    dtype: torch.dtype = torch.float32
    layout: str = "plain"
    spread: float = 1.0
    constants: tuple[tuple[str, Any], ...] = (("causal", True),)
    wrong: tuple[tuple[str, Any], ...] = ()


def but(**constants: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(constants.items())


DROP = ("rows", "columns")
CASES = [
    Case("causal"),
    Case("all", constants=()),
    Case("more queries than keys", sizes=(1, 1, 1, 37, 19, 16, 16)),
    Case("one element", sizes=(1, 1, 1, 1, 1, 1, 1)),
    Case("one key", sizes=(2, 1, 1, 3, 1, 5, 3), constants=()),
    Case("groups", sizes=(1, 6, 2, 5, 9, 8, 8)),
    Case("several tiles", sizes=(1, 1, 1, 150, 140, 16, 16)),
    Case("several tiles, window", sizes=(1, 1, 1, 150, 140, 16, 16), constants=but(causal=True, window=30)),
    Case("several tiles, two-sided window", DROP, sizes=(1, 1, 1, 150, 140, 16, 16), constants=but(window=30)),
    Case("wide", sizes=(1, 1, 1, 5, 20, 200, 130)),
    Case("window", constants=but(causal=True, window=5)),
    Case("window of one", constants=but(causal=True, window=1)),
    Case("two-sided window", constants=but(window=4)),
    Case("cap", constants=but(causal=True, cap=2.0)),
    Case("cap, large scores", spread=30.0, constants=but(cap=5.0)),
    Case("dropout", DROP),
    Case("dropout, groups", DROP, sizes=(2, 4, 2, 5, 9, 8, 8), constants=()),
    Case("boolean mask", ("mask bool",), constants=()),
    Case("boolean mask of keys", ("mask bool keys",)),
    Case("mask", ("mask",)),
    Case("mask of samples", ("mask samples",), sizes=(2, 2, 1, 5, 9, 8, 8)),
    Case("least number", ("mask least",), constants=()),
    Case("minus infinity", ("mask -inf",), constants=()),
    Case("padding", ("padding",), sizes=(2, 2, 1, 19, 37, 24, 20), constants=()),
    Case("relative", ("relative",)),
    Case("relative, several tiles", ("relative", *DROP), sizes=(2, 2, 1, 75, 70, 8, 8), constants=but(window=20)),
    Case("relative, more queries than keys", ("relative",), sizes=(1, 2, 2, 37, 5, 8, 8), constants=()),
    Case("sinks", ("sinks", *DROP), sizes=(2, 4, 2, 19, 37, 24, 20), constants=but(causal=True, window=5)),
    Case("large sinks", ("sinks large", "padding"), sizes=(2, 4, 2, 5, 9, 8, 8)),
    Case("even", ("padding left",), sizes=(3, 2, 1, 37, 37, 24, 20), constants=but(causal=True, even=True)),
    Case("even, window", ("padding left",), (3, 2, 1, 70, 75, 8, 8), constants=but(causal=True, even=True, window=9)),
    Case("even, cap, dropout", ("padding left", *DROP), (3, 4, 2, 19, 19, 8, 8), constants=but(even=True, cap=2.0)),
    Case("even, biases", ("padding left", "relative", "bias"), (3, 2, 1, 19, 37, 8, 8), constants=but(even=True)),
    Case("even, half", ("padding left", "relative"), (3, 2, 1, 19, 37, 8, 8), torch.bfloat16, constants=but(even=True)),
    Case("bias", ("bias", *DROP), sizes=(2, 2, 1, 5, 37, 24, 20), constants=()),
    Case("bias of all heads", ("bias heads", "mask"), sizes=(2, 4, 2, 5, 9, 24, 20)),
    Case("bias of samples", ("bias samples", "padding"), sizes=(2, 4, 2, 5, 9, 24, 20), constants=but(window=3)),
    Case("bias of everything", ("bias all", *DROP), sizes=(2, 4, 2, 5, 9, 24, 20), constants=but(cap=2.0)),
    Case("permuted bias", ("bias permuted",), constants=()),
    Case(
        "everything",
        ("mask", "padding", "bias", "relative", "sinks", *DROP),
        constants=but(causal=True, window=7, cap=2.0),
    ),
    Case("large scores", spread=60.0),
    Case("zeros", spread=0.0),
    Case("swapped", layout="swapped", sizes=(2, 2, 1, 5, 9, 8, 8)),
    Case("sliced", DROP, layout="sliced", sizes=(2, 2, 2, 5, 9, 8, 8)),
    Case("strided", layout="strided", sizes=(2, 2, 1, 5, 9, 8, 8)),
    Case("expanded", layout="expanded", sizes=(2, 2, 1, 5, 9, 8, 8)),
    Case("half", ("bias", *DROP), dtype=torch.float16),
    Case("bfloat16", ("bias", *DROP), dtype=torch.bfloat16),
    Case("bfloat16, groups", ("padding",), dtype=torch.bfloat16, sizes=(2, 4, 2, 5, 9, 8, 8)),
    Case("bfloat16, mask of float32", ("mask float32",), dtype=torch.bfloat16),
]
MORE = {"several tiles, window", "mask of samples", "swapped", "strided", "bfloat16, groups"}
FEW = CASES if "AUTOPART_EXAMPLES" in os.environ else [case for case in CASES if case.name not in MORE]
"""Cases that are interpreted."""
WRONG = [
    Case("wrong scale", wrong=but(scale=0.31)),
    Case("wrong window", constants=but(causal=True, window=5), wrong=but(window=6)),
    Case("wrong cap", constants=but(cap=2.0), wrong=but(cap=2.1)),
    Case("wrong threshold", DROP, wrong=but(threshold=2**28)),
    Case("wrong dropout_scale", DROP, wrong=but(dropout_scale=1.2)),
    Case("not causal", wrong=but(causal=False)),
    Case("not even", ("padding left",), (3, 2, 1, 9, 9, 8, 8), constants=but(even=True), wrong=but(even=False)),
]
DEVICE = [
    Case(f"device {d} {name} {dtype}", given, (2, 4, 2, 300, 333, d, d), dtype, constants=constants)
    for d in (64, 128, 256)
    for dtype in ROUNDING
    for name, given, constants in (
        ("causal", (), but(causal=True)),
        ("dropout", DROP, but(causal=True)),
        ("bias", ("bias", "padding", *DROP), ()),
        ("window", ("mask bool",), but(causal=True, window=77, cap=3.0)),
    )
]


def laid(shape: tuple[int, ...], layout: str) -> torch.Tensor:
    """A normal tensor of a shape in a layout of memory."""
    batch, heads, n, d = shape
    if layout == "swapped":
        return torch.randn(batch, n, heads, d).transpose(1, 2)
    if layout == "sliced":
        return torch.randn(batch, n, 3, heads, d)[:, :, 1].transpose(1, 2)
    if layout == "strided":
        return torch.randn(batch, heads, n, 2 * d)[..., ::2]
    return torch.randn(1, heads, n, d).expand(shape) if layout == "expanded" else torch.randn(shape)


def extra(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An operand besides query, key and value, of scores of a shape."""
    batch, heads, queries, keys = shape
    share = torch.rand(queries, keys)
    low = {"mask least": torch.finfo(torch.float32).min, "mask -inf": -INF}.get(name, 0.0)
    made = {
        "mask": share.to(dtype),
        "mask float32": share,
        "mask least": torch.where((share < 0.5) & (torch.arange(queries)[:, None] > 2), low, 0.0),
        "mask -inf": torch.where((share < 0.5) | (torch.arange(queries)[:, None] == 3), low, 0.0),
        "mask samples": torch.randn(batch, 1, queries, 1).to(dtype),
        "mask bool": (share < 0.5) & (torch.arange(queries)[:, None] != 2),
        "mask bool keys": (torch.rand(batch, 1, 1, keys) < 0.5).contiguous(),
        "padding": torch.arange(keys) < torch.tensor([keys - 2, 0])[:batch, None],
        "padding left": torch.arange(keys) >= torch.tensor([0, 7, keys])[:batch, None],
        "relative": torch.randn(heads, queries + keys - 1).to(dtype),
        "sinks": torch.randn(heads).to(dtype),
        "sinks large": 30 * torch.randn(heads).to(dtype),
        "bias": torch.randn(1, heads, queries, keys).to(dtype),
        "bias heads": torch.randn(1, 1, queries, keys).to(dtype),
        "bias samples": torch.randn(batch, 1, queries, keys).to(dtype),
        "bias all": torch.randn(batch, heads, queries, keys).to(dtype),
        "bias permuted": torch.randn(queries, keys, heads).permute(2, 0, 1)[None].to(dtype),
        "rows": torch.randint(-(2**31), 2**31, (batch, heads, queries), dtype=torch.int32),
        "columns": torch.randint(-(2**31), 2**31, (keys,), dtype=torch.int32),
    }
    return made[name]


def drawn(case: Case, device: str) -> tuple[list[torch.Tensor], Tensors, dict[str, Any]]:
    """query, key and value; the other operands; the constants."""
    torch.manual_seed(0)
    batch, heads, served, queries, keys, d, e = case.sizes
    shapes = ((batch, heads, queries, d), (batch, served, keys, d), (batch, served, keys, e))
    main = [(laid(s, case.layout) * case.spread).to(device, case.dtype).requires_grad_() for s in shapes]
    others: Tensors = dict.fromkeys(NAMES)
    for name in case.given:
        others[name.split()[0]] = extra(name, (batch, heads, queries, keys), case.dtype).to(device)
    for x in learned(others):
        x.requires_grad_()
    constants = {"scale": 0.3, "threshold": int(0.3 * 2**32) - 2**31, "dropout_scale": 1 / 0.7}
    return main, others, constants | dict(case.constants)


def learned(others: Tensors) -> list[torch.Tensor]:
    """The operands with a gradient besides query, key and value."""
    return [x for name in LEARNED if (x := others[name]) is not None]


def doubled(x: torch.Tensor | None) -> torch.Tensor | None:
    return x.detach().double().requires_grad_(x.requires_grad) if x is not None and x.is_floating_point() else x


def errors(case: Case, device: str) -> dict[str, float]:
    """Largest error of the output and of every gradient, over the largest size of each and of the terms it sums."""
    main, others, constants = drawn(case, device)
    out = attention(*main, **others, **constants | dict(case.wrong))
    assert out.grad_fn is not None and "autopart_attention" in out.grad_fn.name(), "the reference ran, not the kernels"
    assert out.dtype == case.dtype and out.transpose(1, 2).is_contiguous()
    leaves = [*main, *learned(others)]
    dout = torch.randn(*out.shape[:-1], out.shape[-1] + 1).to(out)[..., :-1]
    gradients = torch.autograd.grad(out, leaves, dout)
    assert all(g.dtype == x.dtype and g.shape == x.shape for g, x in zip(gradients, leaves, strict=True))

    exact_main, exact_others = [doubled(x) for x in main], {name: doubled(x) for name, x in others.items()}
    exact = reference(*exact_main, **exact_others, **constants)
    exact_leaves = [*exact_main, *learned(exact_others)]
    exact_gradients = torch.autograd.grad(exact, exact_leaves, dout.double())
    pairs = zip((out, *gradients), (exact, *exact_gradients), strict=True)
    sizes = [max(x.abs().max().item(), case.spread**2 or 1.0) for x in (exact, *exact_gradients)]
    found = [(a - b).abs().max().item() / size for (a, b), size in zip(pairs, sizes, strict=True)]
    return dict(zip(("out", "dq", "dk", "dv", "dlearned", "second", "third"), found, strict=False))


def tolerance(case: Case) -> float:
    """A rounding of chances, of ds and of the result, and in float32 of scores that are as large as they are spread."""
    return ROUNDING[case.dtype] * max(1.0, case.spread)


def extremes(device: str) -> dict[str, bool]:
    """Whether infinities and NaN in one query reach what they reach in the reference; other queries stay finite."""
    found = {}
    for name, value in (("nan", float("nan")), ("inf", INF), ("-inf", -INF)):
        main, others, constants = drawn(Case(name, constants=()), device)
        with torch.no_grad():
            main[0][0, 1, 4, 3] = value
        out = attention(*main, **others, **constants)
        wanted = reference(*main, **others, **constants)
        same = torch.equal(out.isnan(), wanted.isnan()) and torch.equal(out.isfinite(), wanted.isfinite())
        found[f"extreme {name}"] = same and bool(out.isnan().any()) and bool(out.isfinite().any())
    return found


def masks(device: str) -> bool:
    """Whether each element of the softmax is dropped where `dropout.masked` drops it: with value the identity, the
    output is the softmax after dropout."""
    main, others, constants = drawn(Case("", DROP, (2, 2, 2, 21, 32, 8, 32), constants=()), device)
    identity = torch.eye(32, device=device).expand(2, 2, 32, 32)
    out = attention(*main[:2], identity, **others, **constants)
    rows, columns = others["rows"], others["columns"]
    assert rows is not None and columns is not None
    kept = dropout.masked(torch.ones(84, 32, device=device), rows.flatten(), columns, constants["threshold"], 1.0)
    return torch.equal(out != 0, kept.view(2, 2, 21, 32) != 0)


def twice(device: str) -> bool:
    """Whether two runs agree on every bit."""
    main, others, constants = drawn(next(c for c in CASES if c.name == "everything"), device)
    results = []
    for _ in range(2):
        out = attention(*main, **others, **constants)
        results.append([out, *torch.autograd.grad(out, [*main, *learned(others)], torch.ones_like(out))])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def operators() -> bool:
    """`torch.library.opcheck` of forward and backward, but for fake tensors, which Triton's interpreter reads."""
    tests = ("test_schema", "test_autograd_registration")
    main, others, constants = drawn(Case("", (*LEARNED, *DROP), (1, 2, 1, 3, 5, 4, 4)), "cpu")
    given = [0.3, False, 0, 0.0, False, constants["threshold"], constants["dropout_scale"]]
    torch.library.opcheck(torch.ops.autopart.attention, (*main, *others.values(), *given), test_utils=tests)
    with torch.no_grad():
        out, lse = torch.ops.autopart.attention(*main, *others.values(), *given)
        arguments = (torch.ones_like(out), out, lse, *main, *others.values(), *given, [True] * 3)
        plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        torch.library.opcheck(torch.ops.autopart.attention_backward, plain, test_utils=tests)
    return True


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What every case found, by name, from one interpreting child."""
    return interpreted_child(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_interpreted_kernels_meet_the_float64_reference(case, interpreted):
    found = interpreted[case.name]
    assert max(found.values()) <= tolerance(case), found


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.name)
def test_a_wrong_constant_is_caught(case, interpreted):
    found = interpreted[case.name]
    assert max(found.values()) > 100 * tolerance(case), found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nan", "inf", "-inf"])
def test_infinities_and_nan_stay_in_their_query(name, interpreted):
    assert interpreted[f"extreme {name}"] is True


@pytest.mark.slow
@pytest.mark.parametrize("name", ["masks", "twice", "operators"])
def test_masks_are_those_of_dropout_runs_are_equal_and_operators_are_whole(name, interpreted):
    assert interpreted[name] is True


# ---- the reference ---------------------------------------------------------------------------------------


def eager(query, key, value, mask=None, scale=1.0, upcast=None, bias=None):
    """Attention of transformers' GPT-2, BERT and T5, and with `upcast` and repeated heads of Llama."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        batch, heads, keys, _ = key.shape
        key, value = (
            x[:, :, None].expand(batch, heads, groups, keys, x.shape[-1]).reshape(batch, heads * groups, keys, -1)
            for x in (key, value)
        )
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores + mask
    return torch.matmul(F.softmax(scores, dim=-1, dtype=upcast).to(query.dtype), value)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("upcast", [None, torch.float32], ids=str)
@pytest.mark.parametrize("given", [(), ("mask",), ("bias",), ("mask", "bias")], ids=str)
def test_reference_is_transformers_attention_bit_for_bit(dtype, upcast, given):
    main, others, _ = drawn(Case("", given, (2, 4, 2, 19, 37, 24, 20), dtype), "cpu")
    leaves = [*main, *learned(others)]
    out = reference(*main, **others, scale=0.3, compute_dtype=upcast)
    expected = eager(*main, others["mask"], 0.3, upcast, others["bias"])
    gradients = [torch.autograd.grad(y, leaves, torch.ones_like(y)) for y in (out, expected)]
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in CASES
        if not {*DROP, *LEARNED, "sinks large", "padding left"} & {*c.given} and c.dtype == torch.float32
    ],
    ids=lambda c: c.name,
)
def test_reference_is_torch_s_attention_with_a_mask(case):
    main, others, constants = drawn(case, "cpu")
    if constants.get("cap"):
        pytest.skip("torch has no cap")
    queries, keys = case.sizes[3], case.sizes[4]
    near = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)
    window = constants.get("window") or 10**6
    seen = (near <= 0 if constants.get("causal") else near < window) & (near > -window)
    added = torch.zeros(case.sizes[0], case.sizes[1], queries, keys)
    for name in ("mask", "bias"):
        x = others[name]
        added = added if x is None else added.masked_fill(~x, -INF) if x.dtype == torch.bool else added + x
    if others["padding"] is not None:
        added = added.masked_fill(~others["padding"][:, None, None], -INF)
    added = added.masked_fill(~seen, -INF)
    expected = F.scaled_dot_product_attention(*main, added, scale=0.3, enable_gqa=True)
    out = reference(*main, **others, **constants)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5 * max(1.0, case.spread))


def test_gradients_of_the_reference_are_derivatives():
    main, others, constants = drawn(Case("", (*LEARNED, *DROP), (1, 2, 1, 3, 4, 2, 2)), "cpu")
    leaves = [doubled(x) for x in (*main, *learned(others))]

    def function(query, key, value, *given):
        return reference(query, key, value, **others | dict(zip(LEARNED, given, strict=True)), **constants)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float64, *ROUNDING], ids=str)
def test_plain_dropout_saves_no_mask(dtype):
    x = torch.randn(3, 5, 7).to(dtype).requires_grad_()
    rows, columns = (torch.randint(-(2**31), 2**31, size, dtype=torch.int32) for size in ((3, 5), (7,)))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropout.dropped(x, rows, columns, 0, 2.0)
    assert [t.dtype for t in saved] == [torch.int32] * 2


# ---- what the compiler knows -----------------------------------------------------------------------------


def test_bytes_moved_and_kept():
    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query, key, value = meta(2, 4, 10, 8), meta(2, 2, 12, 8), meta(2, 2, 12, 6)
    wide = 2 * (2 * 4 * 10 * (8 + 6) + 2 * 2 * 12 * (8 + 6))
    lse = 4 * 2 * 4 * 10
    assert module.bytes_moved(query, key, value) == Bytes(wide + lse, 2 * wide + lse)
    bias = meta(1, 4, 10, 12).requires_grad_()
    read = 2 * 4 * 10 * 12
    whole = module.bytes_moved(query, key, value, None, None, bias)
    assert whole == Bytes(wide + lse + read, 2 * wide + lse + 2 * read)
    out = meta(2, 4, 10, 6)
    kept = module.kept((query, key, value, None, None, bias, 1.0, True), (out,))
    assert [t.shape for t in kept] == [query.shape, key.shape, value.shape, bias.shape, out.shape, (2, 4, 10)]


def shapes_of(case: Case) -> tuple[Any, ...]:
    main, others, constants = drawn(case, "cpu")
    given = [None if x is None else tuple(x.shape) for x in (*main, *others.values())][:8]
    return (*given, constants["scale"], constants.get("causal", False), constants.get("window", 0))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_heads_and_samples_are_split_and_queries_where_nothing_counts_them(case):
    args = shapes_of(case)
    samples, heads, _, queries, *_, e = case.sizes
    row = parse(attention_facts.rule(args, ()))
    bound = bind(row, args[:8], [(samples, heads, queries, e)])
    counted = any(name in dict(case.constants) for name in ("causal", "window")) or "relative" in case.given
    assert row.text.count("q!") == (row.text.count("q") if counted else 0)
    for letter, place in {"b": 0, "h": 1}.items():
        strategy = split_letter(bound, frozenset(letter), 2)
        assert (strategy is None) == (bound.sizes[letter] % 2 != 0)
        if strategy is not None:
            assert list(strategy.inputs[:3]) == [C if x[place] == 1 else S(place) for x in args[:3]]
            assert strategy.outputs == (S(place),)


@pytest.mark.parametrize("dims", [(0, 1), (1, 0), (0, 0), (1, 1)], ids=str)
def test_shards_of_samples_and_heads_are_parts_of_the_whole(dims):
    torch.manual_seed(0)
    query, key, value = (torch.randn(4, heads, n, 8) for heads, n in ((8, 5), (4, 7), (4, 7)))
    bias, whole = torch.randn(1, 8, 5, 7), (4, 8, 5, 7)
    constants = {"scale": 0.3, "causal": True}

    def hashes(rank: int, dp: int, tp: int) -> dict[str, Any]:
        source = random.stream(simulated_groups(World(), 1, dp, tp, rank), "a")
        axes = dict(zip(("dp", "tp"), dims, strict=True)) if dp * tp > 1 else {}
        drawn = random.dropout_hashes(0.3, source, whole, 0, **axes)
        return dict(zip(("rows", "columns", "threshold", "dropout_scale"), drawn, strict=True))

    def part(x: torch.Tensor, rank: int) -> torch.Tensor:
        for dim, at in zip(dims, divmod(rank, 2), strict=True):
            x = x if x.shape[dim] == 1 else shard(x, dim, (), 2, at)
        return x

    out = attention(query, key, value, bias=bias, **hashes(0, 1, 1), **constants)
    assert (out != reference(query, key, value, bias=bias, **constants)).any()
    for rank in range(4):
        local = [part(x, rank) for x in (query, key, value)]
        got = attention(*local, bias=part(bias, rank), **hashes(rank, 2, 2), **constants)
        torch.testing.assert_close(got, part(out, rank))


# ---- what the kernels do not take ------------------------------------------------------------------------


def refuse(*args, **options):
    raise AssertionError("kernels used")


@pytest.fixture
def forced(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("AUTOPART_FORCE_TRITON", "1")
    monkeypatch.setattr(module, "launch", refuse)


def plain(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


FALLBACKS: dict[str, tuple[Any, ...]] = {
    "float64": tuple(plain(1, 1, 3, 4, dtype=torch.float64) for _ in range(3)),
    "too wide": tuple(plain(1, 1, 2, module.MAX_WIDTH + 1) for _ in range(3)),
    "wide value": (plain(1, 1, 2, 4), plain(1, 1, 2, 4), plain(1, 1, 2, module.MAX_WIDTH + 1)),
    "no samples": tuple(plain(0, 1, 2, 4) for _ in range(3)),
    "no queries": (plain(1, 1, 0, 4), plain(1, 1, 2, 4), plain(1, 1, 2, 4)),
    "mask with a gradient": (*(plain(1, 1, 2, 4) for _ in range(3)), plain(2, 2).requires_grad_()),
    "bias of all queries": (*(plain(1, 1, 2, 4) for _ in range(3)), None, None, plain(1, 1, 1, 2)),
    "sinks of float64": (*(plain(1, 1, 2, 4) for _ in range(3)), *[None] * 4, plain(1, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_the_kernels_cannot_take_goes_to_the_reference(name, forced):
    assert torch.equal(attention(*FALLBACKS[name]), reference(*FALLBACKS[name]))


def test_fake_tensors_go_to_the_reference(forced):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert attention(*(torch.empty(1, 2, 3, 4) for _ in range(3))).shape == (1, 2, 3, 4)


@pytest.mark.parametrize("wanted", [False, True])
def test_operators_take_fake_tensors(wanted):
    from torch._subclasses.fake_tensor import FakeTensorMode

    pytest.importorskip("triton")
    with FakeTensorMode():
        query, key, value = (torch.empty(2, heads, n, d) for heads, n, d in ((4, 5, 8), (2, 7, 8), (2, 7, 6)))
        others = (torch.empty(1, 4, 5, 7), torch.empty(4, 11), torch.empty(4))
        tensors = (query, key, value, None, None, *others, None, None)
        constants = (0.3, True, 0, 0.0, False, 0, 1.0)
        out, lse = torch.ops.autopart.attention(*tensors, *constants)
        gradients = torch.ops.autopart.attention_backward(
            torch.empty(2, 4, 5, 6), out, lse, *tensors, *constants, [wanted] * 3
        )
    assert out.shape == (2, 4, 5, 6) and out.transpose(1, 2).is_contiguous() and lse.shape == (2, 4, 5)
    shapes = [query.shape, key.shape, value.shape, *(x.shape if wanted else (0,) for x in others)]
    assert [g.shape for g in gradients] == shapes


def test_the_environment_forces_the_kernels(forced):
    with pytest.raises(AssertionError, match="kernels used"):
        attention(*(plain(1, 1, 2, 4) for _ in range(3)))


# ---- compiled and on a device ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("model", KERNEL.shapes)
def test_kernels_compile_ahead_without_spills(capability, model):
    pytest.importorskip("triton")
    usage = KERNEL.ahead(capability, **KERNEL.shapes[model])
    learned = {name for name in ("bias", "relative") if name in KERNEL.shapes[model]}
    assert set(usage) == {"forward", "query", "key"} | learned
    assert all(kernel.spills == 0 and kernel.registers > 0 for kernel in usage.values()), usage
    assert all(kernel.shared <= (163 if capability == 80 else 227) * 1024 for kernel in usage.values()), usage


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES + DEVICE, ids=lambda case: case.name)
def test_device_kernels_meet_the_float64_reference(case):
    found = errors(case, "cuda")
    assert max(found.values()) <= 4 * tolerance(case), found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_kernels_drop_what_dropout_drops_and_are_deterministic():
    assert masks("cuda") and twice("cuda") and all(extremes("cuda").values())


if __name__ == "__main__":
    results: dict[str, Any] = {case.name: errors(case, "cpu") for case in FEW + WRONG}
    results |= extremes("cpu") | {"masks": masks("cpu"), "twice": twice("cpu"), "operators": operators()}
    print(json.dumps(results))
