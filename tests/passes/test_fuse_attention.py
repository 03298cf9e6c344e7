"""The pass `fuse_attention`: which attentions are one operator, with which arguments, and which are left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import fx, nn
from torch.nn import functional as F

from autopart.ir.graph import Traced, calls, info
from autopart.kernels.attention import attention
from autopart.passes.fuse import fuse
from autopart.passes.randomness import randomness
from autopart.passes.simplify import simplify
from autopart.passes.trace import trace

Tensor = torch.Tensor
TOKENS, LEAST = 12, torch.finfo(torch.float32).min
KEYS = torch.arange(TOKENS) < torch.tensor([[TOKENS], [5]])
"""The keys that two samples have."""


class Attention(nn.Module):
    """A loss of a formula of query, key and value (samples, 4, 12, 8) and of which keys samples have."""

    def __init__(self, formula: Callable[..., Tensor]) -> None:
        super().__init__()
        self.formula, self.first = formula, nn.Linear(8, 3 * 32)
        self.table, self.sinks, self.bias = (
            nn.Embedding(5, 4),
            nn.Parameter(torch.randn(4)),
            nn.Parameter(torch.randn(TOKENS, TOKENS)),
        )

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        q, k, v = (h.unflatten(-1, (4, 8)).transpose(1, 2) for h in self.first(x).chunk(3, -1))
        return self.formula(self, q, k, v, keys).square().mean()


def traced(formula: Callable[..., Tensor], dtype: torch.dtype | None = None) -> Traced:
    batch = {"x": torch.randn(2, TOKENS, 8, dtype=dtype), "keys": KEYS}
    model = Attention(formula) if dtype is None else Attention(formula).to(dtype)
    return fuse(randomness(simplify(trace(model, batch, dtype)), "cuda"), "cuda")


def found(formula: Callable[..., Tensor], dtype: torch.dtype | None = None) -> list[dict[str, Any]]:
    """The arguments of every fused attention that are not the defaults; of tensors their shapes."""
    return [arguments(node) for node in calls(traced(formula, dtype).graph) if info(node).name == "autopart.attention"]


NAMES = ("mask", "padding", "bias", "relative", "sinks", "scale", "causal", "window", "cap", "even")


def arguments(node: fx.Node) -> dict[str, Any]:
    named = dict(zip(NAMES, node.args[3:], strict=True))
    shapes = {name: info(a).shape if isinstance(a, fx.Node) else a for name, a in named.items()}
    return {name: a for name, a in shapes.items() if name != "scale" and a not in (None, False, 0, 0.0)}


def written(q: Tensor, k: Tensor, v: Tensor, change: Callable[[Tensor], Tensor], dropped: float = 0.0) -> Tensor:
    """Attention by two products, with a change of the scores."""
    chances = change(q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1)
    return F.dropout(chances, dropped) @ v


def away() -> Tensor:
    return torch.arange(TOKENS)[None] - torch.arange(TOKENS)[:, None]


def near(width: int) -> Tensor:
    return (away() <= 0) & (away() > -width)


def buckets(away: Tensor) -> Tensor:
    return torch.minimum(away.abs(), torch.full_like(away, 4))


def pairs(keys: Tensor) -> Tensor:
    """A condition of samples, queries and keys."""
    return keys[:, None, :, None] == keys[:, None, None]


def slopes() -> Tensor:
    return (0.5 ** torch.arange(1, 5))[:, None, None]


def hidden(seen: Tensor) -> Tensor:
    """What is added to scores, so that keys which are not seen are hidden."""
    return torch.where(seen, 0.0, LEAST)


FOUND: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "window": (
        lambda m, q, k, v, keys: F.scaled_dot_product_attention(q, k, v, near(3)),
        {"causal": True, "window": 3},
    ),
    "window on both sides": (
        lambda m, q, k, v, keys: F.scaled_dot_product_attention(q, k, v, (away() < 4) & (away() > -4)),
        {"window": 4},
    ),
    "window of one": (
        lambda m, q, k, v, keys: F.scaled_dot_product_attention(q, k, v, near(1)),
        {"causal": True, "window": 1},
    ),
    "two windows": (
        lambda m, q, k, v, keys: F.scaled_dot_product_attention(q, k, v, near(5) & near(3)),
        {"causal": True, "window": 3},
    ),
    "causal and padding": (
        lambda m, q, k, v, keys: F.scaled_dot_product_attention(q, k, v, (away() <= 0) & keys[:, None, None]),
        {"causal": True, "padding": (2, 12)},
    ),
    "written, padded": (
        lambda m, q, k, v, keys: written(q, k, v, lambda s: s + hidden(keys[:, None, None])),
        {"padding": (2, 12), "even": True},
    ),
    "capped": (
        lambda m, q, k, v, keys: written(q, k, v, lambda s: torch.tanh(s / 7.0) * 7.0),
        {"cap": 7.0},
    ),
    "sinks": (
        lambda m, q, k, v, keys: (
            torch.cat([q @ k.mT * 0.3, m.sinks.view(1, 4, 1, 1).expand(2, 4, TOKENS, 1)], -1).softmax(-1)[..., :-1] @ v
        ),
        {"sinks": (4,)},
    ),
    "ALiBi by distance": (
        lambda m, q, k, v, keys: written(q, k, v, lambda s: s + away() * slopes() + hidden(away() <= 0)),
        {"causal": True, "relative": (4, 23)},
    ),
    "ALiBi by keys": (
        lambda m, q, k, v, keys: written(q, k, v, lambda s: s + (torch.arange(TOKENS) * 0.5)[None, None, None]),
        {"mask": (1, 1, 1, 12)},
    ),
    "buckets": (
        lambda m, q, k, v, keys: F.scaled_dot_product_attention(
            q, k, v, m.table(buckets(away())).permute(2, 0, 1)[None]
        ),
        {"relative": (4, 23)},
    ),
    "buckets of padded samples": (
        lambda m, q, k, v, keys: F.scaled_dot_product_attention(
            q, k, v,
            torch.where(keys[:, None, None], m.table(buckets(away())).permute(2, 0, 1), LEAST),
        ),
        {"relative": (4, 23), "padding": (2, 12), "even": True},
    ),
    "a bias of pairs": (
        lambda m, q, k, v, keys: written(q, k, v, lambda s: s + m.bias),
        {"bias": (1, 1, 12, 12)},
    ),
    "a mask of pairs": (
        lambda m, q, k, v, keys: written(q, k, v, lambda s: s + hidden(pairs(keys))),
        {"mask": (2, 1, 12, 12), "even": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_attention_is_one_operator(name: str) -> None:
    formula, wanted = FOUND[name]
    assert found(formula) == [wanted]


@pytest.mark.parametrize("name", FOUND)
def test_the_operator_computes_what_was_traced(name: str) -> None:
    torch.manual_seed(0)
    model = Attention(FOUND[name][0])
    batch = {"x": torch.randn(2, TOKENS, 8), "keys": KEYS}
    graph = fuse(simplify(trace(model, batch)), "cuda").graph
    parameters = dict(model.named_parameters())
    assert any(info(node).name == "autopart.attention" for node in calls(graph))
    given = [
        {"input": batch, "parameter": parameters}.get(info(n).kind, {}).get(info(n).name)
        for n in graph.find_nodes(op="placeholder")
    ]
    used = [p for p in given if isinstance(p, nn.Parameter)]
    (loss,) = _run(graph, given)
    wanted = model(**batch)
    torch.testing.assert_close(loss, wanted)
    ours, theirs = (torch.autograd.grad(x, used) for x in (loss, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def _run(graph: fx.Graph, given: list[Any]) -> tuple[Tensor, ...]:
    values = dict(zip(graph.find_nodes(op="placeholder"), given, strict=True))
    for node in calls(graph):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return tuple(values[n] for n in graph.output_node().all_input_nodes)


TORCH_S: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "written": (lambda m, q, k, v, keys: written(q, k, v, lambda s: s), False),
    "written, causal": (
        lambda m, q, k, v, keys: written(q, k, v, lambda s: s.masked_fill(away() > 0, -torch.inf)),
        True,
    ),
    "a mask of zeros": (
        lambda m, q, k, v, keys: F.scaled_dot_product_attention(q, k, v, torch.zeros(2, 1, TOKENS, TOKENS)),
        False,
    ),
}


@pytest.mark.parametrize("name", TORCH_S)
def test_torch_s_attention_takes_what_has_no_mask(name: str) -> None:
    formula, causal = TORCH_S[name]
    nodes = [n for n in calls(traced(formula).graph) if "attention" in info(n).name or "softmax" in info(n).name]
    assert [info(n).name for n in nodes] == ["aten.scaled_dot_product_attention"]
    assert nodes[0].args[3:] == (None, 0.0, causal)


LEFT: dict[str, Callable[..., Tensor]] = {
    "another window ahead than behind": lambda m, q, k, v, keys: F.scaled_dot_product_attention(
        q, k, v, (away() < 2) & (away() > -4)
    ),
    "a mask of keys, which torch takes": lambda m, q, k, v, keys: F.scaled_dot_product_attention(
        q, k, v, keys[:, None, None]
    ),
    "a mask of pairs, which torch takes": lambda m, q, k, v, keys: F.scaled_dot_product_attention(q, k, v, pairs(keys)),
    "scores that are read": lambda m, q, k, v, keys: written(q, k, v, lambda s: s + s.mean()),
    "scores less their mean": lambda m, q, k, v, keys: written(q, k, v, lambda s: s - s.mean(-1, keepdim=True)),
    "a cap of another divisor": lambda m, q, k, v, keys: written(q, k, v, lambda s: torch.tanh(s / 7.0) * 6.0),
    "a factor behind the mask": lambda m, q, k, v, keys: written(
        q, k, v, lambda s: (s + hidden(away() <= 0)) * 0.5
    ),
    "nothing to see is not a number": lambda m, q, k, v, keys: written(
        q, k, v, lambda s: s.masked_fill(~keys[:, None, None], -torch.inf)
    ),
    "a mask in place of scores": lambda m, q, k, v, keys: written(
        q, k, v, lambda s: s.masked_fill(~keys[:, None, None], LEAST)
    ),
    "a soft mask": lambda m, q, k, v, keys: written(q, k, v, lambda s: s + torch.where(keys[:, None, None], 0.0, -9e3)),
    "a learned bias beside a mask": lambda m, q, k, v, keys: written(
        q, k, v, lambda s: s + m.bias + hidden(keys[:, None, None])
    ),
    "a product of a softmax from the right": lambda m, q, k, v, keys: (
        v.mT @ (q @ k.transpose(-1, -2)).softmax(-1)
    ),
    "a softmax over queries": lambda m, q, k, v, keys: (q @ k.transpose(-1, -2)).softmax(-2) @ v,
    "chances that are read": lambda m, q, k, v, keys: (
        (p := (q @ k.transpose(-1, -2)).softmax(-1)) @ v + p.sum(-1, keepdim=True)
    ),
    "a sink that is kept": lambda m, q, k, v, keys: (
        torch.cat([q @ k.mT, m.sinks.view(1, 4, 1, 1).expand(2, 4, TOKENS, 1)], -1).softmax(-1)[..., 1:] @ v
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_differs_is_left(name: str) -> None:
    assert found(LEFT[name]) == []


def test_a_bias_that_depends_on_more_than_places_is_one_of_pairs() -> None:
    def formula(m: Attention, q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
        products = torch.arange(TOKENS)[None] * torch.arange(TOKENS)[:, None]
        return written(q, k, v, lambda s: s + m.table(buckets(products)).permute(2, 0, 1)[None])

    assert found(formula) == [{"bias": (1, 4, 12, 12)}]


def test_half_precision_of_least_numbers_is_left_where_they_overflow() -> None:
    def formula(m: Attention, q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
        least = torch.finfo(q.dtype).min
        return written(q, k, v, lambda s: s + torch.where(keys[:, None, None], torch.zeros((), dtype=s.dtype), least))

    assert found(formula, torch.bfloat16) == [{"padding": (2, 12), "even": True}]
    assert found(formula, torch.float16) == []


def test_dropout_keeps_its_stream() -> None:
    graph = traced(lambda m, q, k, v, keys: written(q, k, v, lambda s: s + hidden(away() <= 0), 0.25)).graph
    (node,) = [n for n in calls(graph) if info(n).name == "autopart.dropout_attention"]
    assert node.args[9:] == (True, 0, 0.0, False, 0.25, "model") and not any(
        info(n).name in ("aten.softmax.int", "autopart.dropout") for n in calls(graph)
    )


def test_keys_and_values_are_not_repeated() -> None:
    """In bfloat16 torch's attention takes them as they are; the kernel in every dtype."""
    kind = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5,
    }  # fmt: skip
    ids = torch.ones(2, TOKENS, dtype=torch.int64)
    models = transformers.LlamaForCausalLM, transformers.MistralForCausalLM
    for model, config, dtypes in zip(
        models,
        (transformers.LlamaConfig, transformers.MistralConfig),
        ((torch.bfloat16,), (torch.bfloat16, torch.float32)),
        strict=True,
    ):
        for dtype in dtypes:
            one = model(config(**kind)).to(dtype)
            graph = fuse(simplify(trace(one, {"input_ids": ids, "labels": ids}, dtype)), "cuda").graph
            (node,) = [n for n in calls(graph) if info(n).name.endswith("attention")]
            assert [info(n).shape[1] for n in node.args[:3]] == [4, 2, 2]  # type: ignore[arg-type]


def test_it_may_be_left_out() -> None:
    batch = {"x": torch.randn(2, TOKENS, 8), "keys": torch.ones(2, TOKENS, dtype=torch.bool)}
    graph = fuse(simplify(trace(Attention(FOUND["window"][0]), batch)), "cuda", ("attention",)).graph
    assert attention not in [n.target for n in calls(graph)]
