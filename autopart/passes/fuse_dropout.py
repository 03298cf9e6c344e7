"""residual + dropout(x + bias) becomes one operator on GPUs, where `fuse` has left the addition.

An addition that a norm follows in the same block stays with the norm, whose kernel moves fewer bytes in backward.
"""

from torch import fx

from autopart.ir.graph import calls, info, new_call, update_info
from autopart.ir.random_ops import dropout, residual_dropout
from autopart.passes.traffic import traffic

RESIDUAL = "residual_dropout"
"""The operator, as `no_fuse` names it."""


def fuse_dropout(graph: fx.Graph) -> None:
    """Replace additions of what a dropout leaves, in place; what is replaced is left without readers."""
    for add in calls(graph):
        if (parts := _parts(add)) is None:
            continue
        dropped, residual = parts
        x, p, stream = dropped.args
        bias, inside = None, [dropped, add]
        if isinstance(x, fx.Node) and (biased := _bias(x, dropped)) is not None:
            inside.append(x)
            x, bias = biased
        with graph.inserting_before(add):
            call = new_call(graph, residual_dropout, (x, bias, residual, p, stream), add)
        update_info(call, fused=traffic(call), unfused=sum(map(traffic, inside)))
        add.replace_all_uses_with(call)


def _parts(add: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The dropout and the residual of an addition of both, of one shape and one block; else None."""
    first, second = summands(add) or (add, add)
    for dropped, residual in ((first, second), (second, first)):
        alike = info(dropped).shape == info(residual).shape
        if dropped.target is dropout and is_inside(dropped, add) and alike:
            return dropped, residual
    return None


def _bias(x: fx.Node, dropped: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The summands of a sum with a vector along the last dim, which the dropout alone reads; else None."""
    h, bias = summands(x) or (x, x)
    shape = info(h).shape
    vector = len(shape) > 1 and info(bias).shape == shape[-1:] and info(bias).dtype == info(h).dtype
    return (h, bias) if vector and is_inside(x, dropped) else None


def summands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The tensors that a node adds, without a factor; else None."""
    if info(node).name == "aten.add.Tensor" and not node.kwargs and len(node.args) == 2:
        first, second = node.args
        if isinstance(first, fx.Node) and isinstance(second, fx.Node) and first is not second:
            return first, second
    return None


def is_inside(node: fx.Node, reader: fx.Node) -> bool:
    """Whether a node of the reader's block is read by nothing else."""
    return list(node.users) == [reader] and info(node).layer == info(reader).layer
