"""fx.Graph -> fx.Graph: every random operator draws from a stream of its own (`autopart.ir.random_ops`).

Attention with dropout becomes one operator on GPUs, where a kernel of autopart's draws from the stream. On CPUs it
becomes two products, a softmax and a dropout.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx

from autopart.errors import PartitionError
from autopart.ir.graph import Traced, calls, info, new_call, update_info
from autopart.ir.random_ops import Stream, dropout, dropout_attention, uniform, uniform_of

aten = torch.ops.aten
ATTENTION = "aten.scaled_dot_product_attention"
FUSED = "dropout_attention"
"""The operator that attention with dropout becomes, as `no_fuse` names it."""
New = Callable[..., fx.Node]


def randomness(traced: Traced, device: str, off: Collection[str] = ()) -> Traced:
    """Replace random operators in place, for a `device` "cpu" or of another type; operators in `off` are left out.

    Raises PartitionError for an operator that `REWRITES` does not have.
    """
    graph = traced.graph
    drawn: Counter[str] = Counter()
    for node in calls(graph):
        if not _is_random(node):
            continue
        fused = device != "cpu" and info(node).name == ATTENTION and _has_kernel(node) and FUSED not in off
        rewrite = _fused_attention if fused else REWRITES.get(info(node).name, _refused)
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


def _is_random(node: fx.Node) -> bool:
    """Whether a call draws random numbers."""
    name, args = info(node).name, node.args
    if name in DRAWS_IF:
        return all(len(args) > at and bool(args[at]) for at in DRAWS_IF[name])
    return name in REWRITES or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _all_arguments(node: fx.Node, required: int, *defaults: Any) -> list[Any]:
    """All arguments of a call: those given, then the defaults of the others. `required` arguments have no default."""
    return [*node.args, *defaults[len(node.args) - required :]]


def _dropout(new: New, node: fx.Node, stream: Stream) -> fx.Node:
    x, p, _ = node.args
    return new(aten.zeros_like.default, x) if p == 1.0 else new(dropout, x, p, stream)


def _native_dropout(new: New, node: fx.Node, stream: Stream) -> fx.Node:
    """Dropout in place of output 0. Raises PartitionError where output 1, the mask, is used."""
    for pick in list(node.users):
        if pick.args[1] == 1 and pick.users:
            raise _refusal(node, "its mask is used")
        if pick.args[1] == 0:
            pick.replace_all_uses_with(_dropout(new, node, stream))
    return node.args[0]  # type: ignore[return-value]


def _feature_dropout(new: New, node: fx.Node, stream: Stream) -> fx.Node:
    """Dropout with one draw for each sample and channel (dims 0 and 1)."""
    x, p, _ = node.args
    shape = info(x).shape  # type: ignore[arg-type]
    ones = new(aten.full.default, [*shape[:2], *[1] * (len(shape) - 2)], 1.0, kwargs={"dtype": info(node).dtype})
    return new(aten.mul.Tensor, x, new(dropout, ones, p, stream))


def _rand(new: New, node: fx.Node, stream: Stream) -> fx.Node:
    """Uniform numbers in float32, or in the node's dtype if that is wider."""
    dtype = torch.promote_types(info(node).dtype, torch.float32)
    if dtype.is_complex:
        raise _refusal(node, f"it draws {dtype}")
    like = node.args[0] if node.all_input_nodes else None
    while isinstance(like, fx.Node) and info(like).name == "aten.zeros_like":
        like = like.args[0]
    if isinstance(like, fx.Node) and info(like).name not in ("aten.new_zeros", "aten.zeros"):
        return new(uniform, like, stream, dtype)
    return new(uniform_of, list(info(node).shape), dtype, stream)


def _cast(new: New, node: fx.Node, drawn: fx.Node) -> fx.Node:
    """Drawn numbers in the node's dtype."""
    dtype = info(node).dtype
    return drawn if info(drawn).dtype == dtype else new(aten._to_copy.default, drawn, kwargs={"dtype": dtype})


def _standard(new: New, node: fx.Node, stream: Stream) -> fx.Node:
    """Uniform numbers u of [0, 1) in the node's dtype. A cast of a float32 may round to 1: the result is clamped to the
    largest number below 1."""
    below = 1 - torch.finfo(info(node).dtype).eps / 2
    drawn = _cast(new, node, _rand(new, node, stream))
    exact = info(node).dtype in (torch.float32, torch.float64)
    return drawn if exact else new(aten.clamp_max.default, drawn, below)


def _uniform(new: New, node: fx.Node, stream: Stream) -> fx.Node:
    """low + (high - low) u of a uniform u."""
    _, low, high = _all_arguments(node, 1, 0.0, 1.0)
    return _scaled(new, node, _rand(new, node, stream), high - low, low)


def _normal(new: New, node: fx.Node, stream: Stream) -> fx.Node:
    """Normal numbers: mean + deviation sqrt(2) erfinv(2 u - 1) of a uniform u."""
    mean, deviation = 0.0, 1.0
    if info(node).name == "aten.normal_functional":
        _, mean, deviation = _all_arguments(node, 1, 0.0, 1.0)
    drawn = _rand(new, node, stream)
    centred = new(aten.sub.Tensor, new(aten.mul.Tensor, drawn, 2.0), 1.0)
    return _scaled(new, node, new(aten.erfinv.default, centred), math.sqrt(2.0) * deviation, mean)


def _scaled(new: New, node: fx.Node, drawn: fx.Node, factor: float, offset: float) -> fx.Node:
    """factor x drawn + offset, in the node's dtype."""
    drawn = new(aten.mul.Tensor, drawn, factor) if factor != 1.0 else drawn
    return _cast(new, node, new(aten.add.Tensor, drawn, offset) if offset else drawn)


def _exponential(new: New, node: fx.Node, stream: Stream) -> fx.Node:
    """Exponential numbers: -log(u) / rate of a uniform u."""
    rate = node.args[1] if len(node.args) > 1 else 1.0
    drawn = new(aten.neg.default, new(aten.log.default, _rand(new, node, stream)))
    return _cast(new, node, new(aten.div.Tensor, drawn, rate))


def _bernoulli(new: New, node: fx.Node, stream: Stream) -> fx.Node:
    """u < p of a uniform u, where p is the input, which has a probability for each element; of an argument p
    u >= 1 - p, which stays where a dropout by 1 - p keeps an element."""
    chance = node.args[1] if len(node.args) > 1 else node.args[0]
    drawn = _rand(new, node, stream)
    if isinstance(chance, (int, float)):
        return _cast(new, node, new(aten.ge.Scalar, drawn, 1.0 - chance))
    return _cast(new, node, new(aten.lt.Tensor, drawn, chance))


def _attention(new: New, node: fx.Node, stream: Stream) -> fx.Node:
    """dropout(softmax(scale q k^T + mask)) v, of q (batch, heads, queries, d) and k, v (batch, heads, keys, d)."""
    query, key, value, mask, p, causal = _all_arguments(node, 3, None, 0.0, False)
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


def _has_kernel(attention: fx.Node) -> bool:
    """Whether a kernel draws what an attention drops. The kernel's causal mask ends at the last key, torch's begins at
    the first: they are the same for as many queries as keys."""
    query, key, *_, causal = _all_arguments(attention, 3, None, 0.0, False)[:6]
    shapes = info(query).shape, info(key).shape
    return len(shapes[0]) == 4 and (not causal or shapes[0][2] == shapes[1][2])


def _fused_attention(new: New, node: fx.Node, stream: Stream) -> fx.Node:
    """Attention with dropout as one operator."""
    query, key, value, mask, p, causal = _all_arguments(node, 3, None, 0.0, False)
    scale = node.kwargs.get("scale") or 1 / math.sqrt(info(query).shape[-1])
    given = (query, key, value, mask, *[None] * 4)
    attention = new(dropout_attention, *given, scale, causal, 0, 0.0, False, p, stream)
    update_info(attention, kernel=ATTENTION)
    return attention


def _repeated(new: New, x: fx.Node, times: int) -> fx.Node:
    """x with every head (dim 1) repeated `times` times."""
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
    ATTENTION: _attention,
    "aten.rand": _standard,
    "aten.rand_like": _standard,
    "aten.uniform": _uniform,
    "aten.randn": _normal,
    "aten.randn_like": _normal,
    "aten.normal_functional": _normal,
    "aten.exponential": _exponential,
    "aten.bernoulli": _bernoulli,
    "aten.bernoulli.p": _bernoulli,
}
"""Random operator -> function that draws from the same distribution by a stream. Other random operators are refused."""
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
DRAWS_IF: dict[str, tuple[int, ...]] = {
    ATTENTION: (4,),
    "aten.dropout": (1, 2),
    "aten.feature_dropout": (1, 2),
    "aten.alpha_dropout": (1, 2),
    "aten.feature_alpha_dropout": (1, 2),
    "aten.rrelu": (3,),
    **{f"aten.{name}.input": (5, 6) for name in RECURRENT},
    **{f"aten.{name}.data": (6, 7) for name in RECURRENT},
}
"""Operator -> positions of arguments that must all be true for it to draw. Positions count from 0."""
