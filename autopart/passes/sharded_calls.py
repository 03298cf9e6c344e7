"""The functions of `autopart.runtime` that a stage calls in place of operators that are wrong on a shard."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import fx

from autopart.cost.compute import NARROW_EXPERTS, OWN_EXPERTS, SPLIT_HEAD
from autopart.ir.graph import info
from autopart.ir.random_ops import Stream
from autopart.passes.stage_graph import Named, StageGraph, Valid
from autopart.sharding.notation import Strategy
from autopart.sharding.resharding import runtime_function


@dataclass(frozen=True)
class Call:
    """A call of an operator on one rank.

    node     the operator in the traced graph;  args: its arguments in the stage's graph
    chosen   (axis, strategy) for every axis
    stage    the stage's graph
    streams  name of a stream of random numbers -> its placeholder in the stage's graph
    """

    node: fx.Node
    args: tuple[Any, ...]
    chosen: Sequence[tuple[str, Strategy]]
    stage: StageGraph
    streams: Mapping[str, fx.Node]

    def axis_of(self, local: str) -> str:
        """The axis along which the strategy's function is `local`; "" if there is none."""
        return next((axis for axis, strategy in self.chosen if strategy.local == local), "")


Replacement = tuple[str, tuple[Any, ...], dict[str, Any]]
"""The name of a function of `autopart.runtime`, its arguments, and its keyword arguments."""


def sharded_call(call: Call) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None:
    """The function to call in place of the operator, with its arguments; None to call the operator itself."""
    find = TABLE.get(info(call.node).name)
    found = find(call) if find is not None else None
    return None if found is None else (runtime_function(found[0]), *found[1:])


def _loss(call: Call) -> Replacement | None:
    """A mean over valid targets: the sum divided by the number of valid targets in the whole batch.

    Means with a weight by class, and means over probabilities, stay as they are.
    """
    node, args = call.node, call.args
    probabilities = info(node.args[1]).dtype.is_floating_point  # type: ignore[arg-type]
    if probabilities or tuple(node.args[2:4]) not in ((), (None,), (None, 1)):
        return None
    ignored = args[4] if len(args) > 4 else -100
    smoothing = args[5] if len(args) > 5 else 0.0
    axes = tuple(axis for axis, strategy in call.chosen if strategy.local == "cross_entropy_sum")
    call.stage.valid.append(Valid(node.name, args[1], ignored, axes))
    given = (args[0], args[1], Named(f'self.valid["{node.name}"]'), ignored)
    if axis := call.axis_of("vocab_cross_entropy"):
        return "vocab_cross_entropy", (*given, axis), {}
    return "mean_cross_entropy", (*given, smoothing) if smoothing else given, {}


def _head(call: Call) -> Replacement:
    """As `_loss`, with the last linear map."""
    hidden, weight, targets, bias, ignored, *constants = call.args
    axes = tuple(axis for axis, strategy in call.chosen if strategy.local == "cross_entropy_sum")
    call.stage.valid.append(Valid(call.node.name, targets, ignored, axes))
    given = (hidden, weight, targets, bias, Named(f'self.valid["{call.node.name}"]'), ignored, *constants)
    if axis := call.axis_of(SPLIT_HEAD):
        return SPLIT_HEAD, (*given[:5], axis, *given[5:]), {}
    return "mean_linear_loss", given, {}


def _embedding(call: Call) -> Replacement | None:
    axis = call.axis_of("vocab_embedding")
    weight, ids, *rest = call.args
    return ("vocab_embedding", (ids, weight, axis, *rest[:1]), {}) if axis else None


def _experts(call: Call) -> Replacement:
    axis = call.axis_of("grouped_linear")
    return "grouped_linear", (*call.args, axis) if axis else call.args, {}


def _mixture(call: Call) -> Replacement | None:
    axis = call.axis_of(OWN_EXPERTS)
    return (OWN_EXPERTS, (*call.args, axis), {}) if axis else None


def _clamped(call: Call) -> Replacement | None:
    own, narrow = call.axis_of(OWN_EXPERTS), call.axis_of(NARROW_EXPERTS)
    return ("shared_experts", (*call.args, own or None, narrow or None), {}) if own or narrow else None


def _where(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Where the rank's elements are in the whole tensor: the stream, or the name of an output, the size, the dim of
    samples, and by axis the dim that is split."""
    record = info(call.node)
    split = {axis: p for axis, strategy in call.chosen if (p := strategy.outputs[0]).kind == "S"}
    stream = call.streams[next(a for a in call.args if isinstance(a, Stream))]
    axes = {axis: (p.dim, list(p.parts)) if p.parts else p.dim for axis, p in split.items()}
    return (stream, list(record.shape), record.batch), axes


def _attention(call: Call) -> Replacement:
    """The scores are split as the output, of which the last dim has values in place of keys."""
    (stream, whole, batch), axes = _where(call)
    keys = info(call.node.args[1]).shape[2]  # type: ignore[arg-type]
    query, key, value, *masks = call.args[:8]
    p = call.args[13]
    while masks and masks[-1] is None:
        masks.pop()
    constants = dict(zip(("scale", "causal", "window", "cap", "even"), call.args[8:13], strict=True))
    named = {name: x for name, x in constants.items() if name == "scale" or x}
    return "dropout_attention", (query, key, value, p, stream, [*whole[:3], keys], batch, *masks), named | axes


def _placed(name: str, count: int, call: Call) -> Replacement:
    """The function `name` of the first arguments, which is told where the rank's elements are."""
    where, axes = _where(call)
    return name, (*call.args[:count], *where), axes


def _uniform(call: Call) -> Replacement:
    where, axes = _where(call)
    return "uniform", (*where, info(call.node).dtype), axes


TABLE: dict[str, Callable[[Call], Replacement | None]] = {
    "aten.cross_entropy_loss": _loss,
    "autopart.linear_loss": _head,
    "aten.embedding": _embedding,
    "autopart.grouped_linear": _experts,
    "autopart.experts": _mixture,
    "autopart.clamped_experts": _clamped,
    "autopart.dropout": partial(_placed, "dropout", 2),
    "autopart.dropout_attention": _attention,
    "autopart.residual_dropout": partial(_placed, "residual_dropout", 4),
    "autopart.stochastic_depth": partial(_placed, "stochastic_depth", 3),
    "autopart.returned": partial(_placed, "returned", 1),
    "autopart.uniform": _uniform,
    "autopart.uniform_of": _uniform,
}
