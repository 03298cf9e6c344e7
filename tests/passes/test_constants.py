"""What masks look like, told without making them where the sequence is long, against the masks themselves."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autopart.ir.graph import calls, info
from autopart.passes import constant_values as constants
from autopart.passes.simplify import simplify
from autopart.passes.trace import trace

Tensor = torch.Tensor
Mask = Callable[[Tensor, Tensor], Tensor]
LONG = 65536


class Attentions(nn.Module):
    """Attention under each of some masks, made of the places of the queries (a column) and of the keys (a row)."""

    def __init__(self, masks: Iterable[Mask]) -> None:
        super().__init__()
        self.masks, self.weight = tuple(masks), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        places, h = torch.arange(x.shape[1]), self.weight(x)[:, None]
        masks = (mask(places[:, None], places[None]) for mask in self.masks)
        return sum((F.scaled_dot_product_attention(h, h, h, mask).sum() for mask in masks), torch.zeros(()))


def patterns(masks: Mapping[str, Mask], tokens: int) -> dict[str, str]:
    """What the simplified graph says of every mask."""
    graph = simplify(trace(Attentions(masks.values()), {"x": torch.zeros(2, tokens, 2)})).graph
    found = [n.args[3:] for n in calls(graph) if info(n).name == "aten.scaled_dot_product_attention"]
    names = ("causal" if args[2:] == (True,) else "all" if not args or args[0] is None else "" for args in found)
    return dict(zip(masks, names, strict=True))


def window(width: int) -> Mask:
    return lambda query, key: (key <= query) & (key > query - width)


def packed(length: int) -> Mask:
    return lambda query, key: (key <= query) & (key >= query // length * length)


CAUSAL: dict[str, Mask] = {
    "causal": lambda query, key: key <= query,
    "turned": lambda query, key: query >= key,
    "not the future": lambda query, key: ~(key > query),
    "strictly below the next": lambda query, key: key < query + 1,
    "of all samples": lambda query, key: (key <= query)[None, None].expand(2, 1, -1, -1),
    "a window of all": window(LONG),
    "one packed sequence": packed(LONG),
    "a prefix of one": lambda query, key: (key <= query) | (key < 1),
    "logical": lambda query, key: torch.logical_and(key <= query, torch.logical_not(key < 0)),
}
OTHER: dict[str, Mask] = {
    "a window of 4096": window(4096),
    "a window of all but one": window(LONG - 1),
    "two packed sequences": packed(LONG // 2),
    "a short one packed behind": packed(LONG - 1),
    "a prefix of two": lambda query, key: (key <= query) | (key < 2),
    "one key of the future": lambda query, key: key <= query + (query == 777).long(),
    "one key less": lambda query, key: key <= query - (query == 777).long(),
    "not its own": lambda query, key: key < query,
    "turned around": lambda query, key: key >= query,
    "all but the last key": lambda query, key: (key < LONG - 1) | (query < 0),
}


ALL: dict[str, Mask] = {
    "all": lambda query, key: (query >= 0) & (key >= 0),
    "a window of all on both sides": lambda query, key: (key > query - LONG) & (key < query + LONG),
    "either": lambda query, key: (key <= query) | (key > query),
}


@pytest.mark.slow
def test_long_masks_are_told_apart() -> None:
    wanted = {"causal": CAUSAL, "all": ALL, "": OTHER}
    for pattern, masks in wanted.items():
        assert patterns(masks, LONG) == dict.fromkeys(masks, pattern)


def some_mask(numbers: random.Random, tokens: int) -> Mask:
    """A mask that often is nearly causal or nearly all true."""
    compare = numbers.choice([operator.le, operator.lt, operator.ge, operator.gt, operator.eq])
    wide, place, by = (
        numbers.choice([0, 1, tokens - 1, tokens, -1]),
        numbers.randrange(tokens),
        numbers.choice([0, 0, 1]),
    )
    kinds: list[Mask] = [
        lambda query, key: key <= query,
        lambda query, key: compare(key, query + wide),
        lambda query, key: compare(query - wide, key),
        lambda query, key: key <= query + by * (query == place).long(),
        lambda query, key: (query - key).abs() < wide,
        lambda query, key: compare(key % 3, query % 3),
        lambda query, key: torch.ones(tokens, tokens, dtype=torch.bool).tril(by),
        lambda query, key: key >= wide - by,
    ]
    first, second = numbers.choice(kinds), numbers.choice(kinds)
    joined: list[Mask] = [
        first,
        lambda query, key: first(query, key) & second(query, key),
        lambda query, key: first(query, key) | second(query, key),
        lambda query, key: first(query, key) & ~second(query, key),
    ]
    return numbers.choice(joined)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 7, 9])
def test_masks_in_small_blocks(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "BLOCK_SIZE", 3)
    numbers, places = random.Random(tokens), torch.arange(tokens)
    masks = {str(i): some_mask(numbers, tokens) for i in range(50)}
    wanted = {}
    for name, mask in masks.items():
        values = mask(places[:, None], places[None]).expand(tokens, tokens)
        causal = torch.equal(values, values.new_ones(tokens, tokens).tril())
        wanted[name] = "all" if bool(values.all()) else "causal" if causal else ""
    assert tokens == 1 or set(wanted.values()) == {"all", "causal", ""}
    assert patterns(masks, tokens) == wanted


def test_places_are_those_of_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, in blocks of three, against every window there is; other masks depend on more than places."""
    tokens = 8
    monkeypatch.setattr(constants, "BLOCK_SIZE", 3)
    numbers, line = random.Random(0), torch.arange(tokens)
    masks: dict[str, Mask] = {f"window {n}": window(n) for n in range(1, tokens)}
    masks |= {f"behind {n}": lambda query, key, n=n: query - key < n for n in range(1, tokens)}
    masks |= {f"around {n}": lambda query, key, n=n: (query - key < n) & (key - query < n) for n in range(1, tokens)}
    masks |= {str(i): some_mask(numbers, tokens) for i in range(60)}
    graph = simplify(trace(Attentions(masks.values()), {"x": torch.zeros(2, tokens, 2)}))
    attentions = [n for n in calls(graph.graph) if info(n).name == "aten.scaled_dot_product_attention"]
    known, away = constants.ConstantValues(graph.buffers), line[:, None] - line[None]
    found = 0
    for mask, node in zip(masks.values(), attentions, strict=True):
        if len(node.args) < 4 or node.args[3] is None:
            continue
        values = mask(line[:, None], line[None]).expand(tokens, tokens)
        wanted = {
            constants.Places(causal, behind, ahead)
            for causal in (False, True)
            for behind in range(tokens)
            for ahead in (range(2, tokens) if not causal else (0,))
            for seen in [(away >= 0 if causal else -away < ahead) & ((away < behind) if behind else away > -tokens)]
            if torch.equal(values, seen)
        } | {
            constants.Places(False, behind, 0) for behind in range(1, tokens) if torch.equal(values, away < behind)
        }  # fmt: skip
        places = known.places(node.args[3])
        assert (places is None and not wanted) or places in wanted, (values.int(), places, wanted)
        found += places is not None
    assert found >= 2 * tokens
