"""Whether a loss is a mean over samples. The loss of a batch is then the mean of the losses of equal micro-batches.

Every value has one of these states:

    CONSTANT  the value does not depend on the samples
    int       the value of each sample depends on that sample alone; the number is the dim of samples
    MEAN      value(batch) = mean over equal micro-batches of value(micro-batch)
    SUM       value(batch) = sum over micro-batches of value(micro-batch)
    MIXED     anything else, such as a sort of all tokens, batch statistics, or the product of two means
"""

from collections.abc import Mapping, Sequence

from torch import fx

from autopart.ir.graph import calls, info, is_pick, loss_of, operands, shape_args, value_of
from autopart.sharding.notation import Strategy
from autopart.sharding.rules import strategies

CONSTANT, MEAN, SUM, MIXED = "one", "mean", "sum", "mixed"
State = str | int
Value = tuple[fx.Node, int]

ADDS = {"aten.add.Tensor", "aten.sub.Tensor", "aten.rsub.Scalar", "aten.cat", "aten.stack"}
"""Operators whose result is a MEAN where one operand is a MEAN and all others are MEAN or CONSTANT."""


def first_mixing(graph: fx.Graph) -> fx.Node | None:
    """The first operator that makes the loss something else than a mean over samples; None where it is such a mean."""
    states: dict[Value, State] = {
        (n, 0): CONSTANT if (batch := info(n).batch) is None else batch for n in graph.nodes if n.op == "placeholder"
    }
    for node in calls(graph):
        if not is_pick(node):
            for index, state in enumerate(_states(node, states)):
                states[node, index] = state
    loss = value_of(loss_of(graph))
    if states[loss] in (MEAN, CONSTANT):
        return None
    node = loss[0]
    while blamed := [v for n in node.all_input_nodes if states[v := value_of(n)] == MIXED]:
        node = blamed[0][0]
    return node


def _states(node: fx.Node, states: Mapping[Value, State]) -> Sequence[State]:
    """The state of every output of an operator, by the states of its operands."""
    record = info(node)
    sources = [None if n is None else value_of(n) for n in operands(node)]
    given = [None if s is None else states[s] for s in sources]
    kinds = {s for s in given if s is not None}
    count = len(record.shapes)
    if kinds <= {CONSTANT}:
        return [CONSTANT if record.batch is None else record.batch] * count
    if MIXED in kinds:
        return [MIXED] * count
    options = strategies(record.name, shape_args(node), record.shapes, 1)
    if any(isinstance(k, int) for k in kinds):
        for option in options:
            if not kinds & {MEAN, SUM} and _by_sample(option, sources, given):
                return [o.dim if o.kind == "S" else SUM if not option.local else MEAN for o in option.outputs]
        return [MIXED] * count
    return [_of_whole(record.name, kinds, given, options)] * count


def _by_sample(option: Strategy, sources: Sequence[Value | None], given: Sequence[State | None]) -> bool:
    """Whether a strategy splits every operand along its dim of samples, and constants only where they repeat."""
    for wanted, source, state in zip(option.inputs, sources, given, strict=True):
        if source is None or wanted is None:
            continue
        if isinstance(state, int):
            if wanted.kind != "S" or wanted.dim != state:
                return False
        elif wanted.kind == "S" and not _repeats(source, wanted.dim):
            return False
    return True


def _repeats(value: Value, dim: int) -> bool:
    """Whether a constant is equal in all pieces along `dim`: factories made it whose rules split that dim."""
    node = value[0]
    if node.op == "placeholder":
        return False
    record = info(node)
    for option in strategies(record.name, shape_args(node), record.shapes, 1):
        out = option.outputs[value[1]]
        if out.kind == "S" and out.dim == dim:
            pairs = zip(option.inputs, operands(node), strict=True)
            return all(
                _repeats(value_of(n), p.dim) for p, n in pairs if p is not None and n is not None and p.kind == "S"
            )
    return False


def _of_whole(name: str, kinds: set[State], given: Sequence[State | None], options: Sequence[Strategy]) -> State:
    """The state of a value that is computed from means, sums and constants alone."""
    total = kinds - {CONSTANT}
    if len(total) > 1:
        return MIXED
    (kind,) = total
    if name in ADDS and kind == MEAN:
        return MEAN
    if CONSTANT not in kinds:
        return kind if any(o.name == "P" for o in options) else MIXED
    if name == "aten.mul.Tensor" or (name == "aten.div.Tensor" and given[1] == CONSTANT):
        return kind
    return MIXED
