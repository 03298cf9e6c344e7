"""fx.Graph -> fx.Graph: every random operator draws from a stream of its own (`autopart.draws`).

Attention with dropout is written out, since no fused kernel draws such masks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from autopart.draws import Stream, dropout, uniform, uniform_of
from autopart.errors import PartitionError
from autopart.graph import Traced, calls, info, new_call

aten = torch.ops.aten
New = Callable[..., fx.Node]


def draw(traced: Traced) -> Traced:
    """Replace random operators, in place. PartitionError for those that have no counterpart."""
    graph = traced.graph
    drawn: Counter[str] = Counter()
    for node in calls(graph):
        rewrite = REWRITES.get(info(node).name)
        if rewrite is None or not _random(node):
            continue
        module = info(node).module or "model"
        drawn[module] += 1
        stream = Stream(module if drawn[module] == 1 else f"{module}#{drawn[module]}")
        with graph.inserting_before(node):

            def new(target: Any, *args: Any, like: fx.Node = node, kwargs: dict[str, Any] | None = None) -> fx.Node:
                return new_call(graph, target, args, like, kwargs)

            node.replace_all_uses_with(rewrite(new, node, stream))
        graph.erase_node(node)
    graph.eliminate_dead_code()
    return traced


def _random(node: fx.Node) -> bool:
    if info(node).name == "aten.scaled_dot_product_attention":
        return len(node.args) > 4 and bool(node.args[4])
    return True


def _filled(node: fx.Node, required: int, *defaults: Any) -> list[Any]:
    """The arguments: those required, and the others, taken from `defaults` where they are left out."""
    return [*node.args, *defaults[len(node.args) - required :]]


def _dropout(new: New, node: fx.Node, stream: Stream) -> fx.Node:
    x, p, training = node.args
    if p == 0.0 or training is False:
        return x  # type: ignore[return-value]
    return new(aten.zeros_like.default, x) if p == 1.0 else new(dropout, x, p, stream)


def _native_dropout(new: New, node: fx.Node, stream: Stream) -> fx.Node:
    for pick in list(node.users):
        if pick.args[1] == 1 and pick.users:
            raise _refusal(node, "its mask is used")
        if pick.args[1] == 0:
            pick.replace_all_uses_with(_dropout(new, node, stream))
    return node.args[0]  # type: ignore[return-value]


def _feature_dropout(new: New, node: fx.Node, stream: Stream) -> fx.Node:
    """One draw for each channel: dims 0 and 1."""
    x, p, _ = node.args
    shape = info(x).shape  # type: ignore[arg-type]
    ones = new(aten.full.default, [*shape[:2], *[1] * (len(shape) - 2)], 1.0, kwargs={"dtype": info(node).dtype})
    return new(aten.mul.Tensor, x, new(dropout, ones, p, stream))


def _rand(new: New, node: fx.Node, stream: Stream) -> fx.Node:
    return new(uniform_of, list(info(node).shape), info(node).dtype, stream)


def _rand_like(new: New, node: fx.Node, stream: Stream) -> fx.Node:
    return new(uniform, node.args[0], stream)


def _uniform(new: New, node: fx.Node, stream: Stream) -> fx.Node:
    x, low, high = _filled(node, 1, 0.0, 1.0)
    return new(aten.add.Tensor, new(aten.mul.Tensor, new(uniform, x, stream), high - low), low)


def _normal(drawn: Callable[[New, fx.Node, Stream], fx.Node]) -> Callable[[New, fx.Node, Stream], fx.Node]:
    """sqrt(2) erfinv(2 u - 1) is normal where u is uniform."""

    def rewrite(new: New, node: fx.Node, stream: Stream) -> fx.Node:
        centred = new(aten.sub.Tensor, new(aten.mul.Tensor, drawn(new, node, stream), 2.0), 1.0)
        return new(aten.mul.Tensor, new(aten.erfinv.default, centred), math.sqrt(2.0))

    return rewrite


def _exponential(new: New, node: fx.Node, stream: Stream) -> fx.Node:
    rate = node.args[1] if len(node.args) > 1 else 1.0
    return new(aten.div.Tensor, new(aten.neg.default, new(aten.log.default, _rand_like(new, node, stream))), rate)


def _bernoulli(new: New, node: fx.Node, stream: Stream) -> fx.Node:
    """With one probability for all (an argument), or one for each element (the input)."""
    chance = node.args[1] if len(node.args) > 1 else node.args[0]
    drawn = new(uniform, node.args[0], stream)
    less = aten.lt.Tensor if isinstance(chance, fx.Node) else aten.lt.Scalar
    return new(aten._to_copy.default, new(less, drawn, chance), kwargs={"dtype": info(node).dtype})


def _attention(new: New, node: fx.Node, stream: Stream) -> fx.Node:
    query, key, value, mask, p, causal = _filled(node, 3, None, 0.0, False)
    heads, served = info(query).shape[1], info(key).shape[1]
    if node.kwargs.get("enable_gqa") and heads != served:
        key, value = (_repeated(new, x, heads // served) for x in (key, value))
    scale = node.kwargs.get("scale") or 1 / math.sqrt(info(query).shape[-1])
    scores = new(aten.mul.Tensor, new(aten.matmul.default, query, new(aten.transpose.int, key, -2, -1)), scale)
    if causal:
        size = list(info(scores).shape[-2:])
        mask = new(aten.tril.default, new(aten.ones.default, size, kwargs={"dtype": torch.bool}))
    if isinstance(mask, fx.Node) and info(mask).dtype == torch.bool:
        scores = new(aten.where.ScalarOther, mask, scores, float("-inf"))
    elif isinstance(mask, fx.Node):
        scores = new(aten.add.Tensor, scores, mask)
    chances = new(aten._safe_softmax.default, scores, -1)
    return new(aten.matmul.default, new(dropout, chances, p, stream), value)


def _repeated(new: New, x: fx.Node, times: int) -> fx.Node:
    """Every head (dim 1) `times` times."""
    batch, heads, *rest = info(x).shape
    spread = new(aten.expand.default, new(aten.unsqueeze.default, x, 2), [batch, heads, times, *rest])
    return new(aten.reshape.default, spread, [batch, heads * times, *rest])


def _refused(new: New, node: fx.Node, stream: Stream) -> fx.Node:
    raise _refusal(node, f"{info(node).name} has no form that is the same under every plan")


def _refusal(node: fx.Node, why: str) -> PartitionError:
    return PartitionError(
        f"the forward pass draws random numbers ({info(node).source or info(node).name})",
        why,
        "dropout, rand, randn, bernoulli and exponential can be drawn; or draw outside and put it into the batch",
    )


REWRITES: dict[str, Callable[[New, fx.Node, Stream], fx.Node]] = {
    "aten.dropout": _dropout,
    "aten.native_dropout": _native_dropout,
    "aten.feature_dropout": _feature_dropout,
    "aten.scaled_dot_product_attention": _attention,
    "aten.rand": _rand,
    "aten.rand_like": _rand_like,
    "aten.uniform": _uniform,
    "aten.randn": _normal(_rand),
    "aten.randn_like": _normal(_rand_like),
    "aten.exponential": _exponential,
    "aten.bernoulli": _bernoulli,
    "aten.bernoulli.p": _bernoulli,
    "aten.alpha_dropout": _refused,
    "aten.feature_alpha_dropout": _refused,
    "aten.rrelu_with_noise_functional": _refused,
    "aten.randint": _refused,
    "aten.randint.low": _refused,
    "aten.randint_like": _refused,
    "aten.randperm": _refused,
    "aten.multinomial": _refused,
    "aten.poisson": _refused,
    "aten.normal.Tensor_Tensor": _refused,
    "aten.normal_functional": _refused,
    "aten.cauchy": _refused,
    "aten.geometric": _refused,
    "aten.log_normal": _refused,
}
