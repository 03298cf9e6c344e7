"""Parts of a forward pass that have no gradient: detached where torch's decomposition would forget it, or refused."""

import re
from collections.abc import Collection
from typing import Any

import torch
import torch.utils.checkpoint
from torch import fx

from autopart.errors import PartitionError
from autopart.frontend.source_lines import source_line
from autopart.frontend.torch_private import FakeTensor


def refuse_hidden_tensors(exported: torch.export.ExportedProgram) -> None:
    """Raise PartitionError for a tensor that is neither parameter, buffer nor input: it has no value in the fake
    model."""
    for node in exported.graph.nodes:
        name = exported.graph_signature.inputs_to_lifted_tensor_constants.get(node.name)
        if isinstance(exported.constants.get(name or ""), FakeTensor):
            stack = next((u.meta["stack_trace"] for u in node.users if u.meta.get("stack_trace")), "")
            raise PartitionError(
                f"the forward pass reaches a tensor that the model does not own ({source_line(stack) or node.name})",
                "as with weight.data, which autograd and a trace do not follow",
                "with torch.no_grad(): weight.clamp_(...) after the optimizer's step, outside the forward pass",
            )


def detach_no_grad_values(exported: torch.export.ExportedProgram) -> None:
    """Detach the values that `torch.no_grad` regions make, since decomposition inlines the regions without a trace."""
    parameters = exported.graph_signature.inputs_to_parameters
    for module in exported.graph_module.modules():
        graph = getattr(module, "graph", None)
        for node in list(graph.nodes) if isinstance(graph, fx.Graph) else ():
            if str(node.target) == "aten.detach_.default":
                node.target = torch.ops.aten.detach.default
            if str(node.target) == "wrap_with_set_grad_enabled" and node.args[0] is False:
                region = getattr(module, node.args[1].target).graph
                _refuse_changes(region, [reaches(given, parameters) for given in node.args[2:]])
                (results,) = region.output_node().args
                for pick in list(node.users):
                    if _itself(results[pick.args[1]]).op != "placeholder":
                        _detach(pick)


def _refuse_changes(region: fx.Graph, gradients: list[bool]) -> None:
    """Raise PartitionError where a `torch.no_grad` region changes a tensor in place that has a gradient outside:
    autograd would use the new values for the old."""
    outside = dict(zip(region.find_nodes(op="placeholder"), gradients, strict=True))
    for node in region.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not node.args:
            continue
        first = schema.arguments[0].alias_info
        if first is not None:
            outside[node] = outside.get(node.args[0], False)
            if first.is_write and outside[node]:
                raise PartitionError(
                    "the forward pass changes a tensor that has a gradient under torch.no_grad "
                    f"({source_line(node.meta.get('stack_trace') or '') or node.target})",
                    "autograd does not see the change, and differentiates as if there were none",
                    "a new tensor, or a change outside torch.no_grad",
                )


def gives_constant(operator: str) -> bool:
    """Whether an operator, such as ``aten.zeros_like.default``, has no gradient of whatever operand."""
    return re.match(r"aten\.(detach|new_\w+|\w+_like)(\.|$)", operator) is not None


def reaches(node: Any, names: Collection[str], without: Collection[fx.Node] = ()) -> bool:
    """Whether a value outside of all regions is made from one of the named nodes, such as parameters, by operators that
    have derivatives, on a path that has none of the nodes in `without`."""
    seen, todo = {node, *without}, [node]
    while todo:
        node = todo.pop()
        if node.name in names:
            return True
        value, target = node.meta.get("val"), str(node.target)
        fixed = isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex())
        if fixed or gives_constant(target):
            continue
        if target == "wrap_with_set_grad_enabled" and node.args[0] is False:
            continue
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        todo += new
    return False


def _itself(node: fx.Node) -> fx.Node:
    """The operand of casts that change nothing. In a trace, later uses of the operand are uses of the cast."""
    while str(node.target).startswith(("aten.to.", "aten.contiguous", "aten.type_as", "aten.dropout")):
        source = node.args[0]
        if str(node.target) == "aten.dropout.default" and node.args[1] and node.args[2]:
            break
        if not isinstance(source, fx.Node) or source.meta["val"].dtype != node.meta["val"].dtype:
            break
        node = source
    return node


def _detach(node: fx.Node) -> None:
    with node.graph.inserting_after(node):
        detached = node.graph.call_function(torch.ops.aten.detach.default, (node,))
    detached.meta = dict(node.meta)
    node.replace_all_uses_with(detached, lambda user: user is not detached and user.op != "output")
