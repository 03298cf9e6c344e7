"""The scalars that a model returns: which of them have a gradient that training the loss would leave out."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import OutputKind, TensorArgument

from autopart.frontend.no_gradient import reaches
from autopart.frontend.source_lines import source_line
from autopart.frontend.torch_private import tree_unflatten

SCALARS = "returned scalars"
"""The key in the meta of the output node under which `note_scalars` leaves what it found."""


@dataclass(frozen=True, eq=False)
class ReturnedScalar:
    """A scalar that the model returns.

    source  the user's line
    name    of its node in the exported graph
    beside  names of the scalars beside which it has a gradient of its own: if one of them is the loss, training leaves
            this one out. It is no part of that loss, and its gradient does not flow through that loss alone
    """

    source: str
    name: str
    beside: frozenset[str]


def note_scalars(exported: torch.export.ExportedProgram, trained: Collection[str]) -> None:
    """Leave what the model returns in the output node's meta, with a ReturnedScalar for each scalar and None for all
    else. `trained` has the paths of trained parameters."""
    graph = exported.graph_module.graph
    nodes = {node.name: node for node in graph.nodes}
    parameters = {n for n, path in exported.graph_signature.inputs_to_parameters.items() if path in trained}
    specs = [spec for spec in exported.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    values = [nodes.get(spec.arg.name) if isinstance(spec.arg, TensorArgument) else None for spec in specs]
    scalars = [node for node in values if node is not None and node.meta["val"].dim() == 0]
    records = [_record(node, scalars, parameters) if node in scalars else None for node in values]
    assert exported.call_spec.out_spec is not None
    graph.output_node().meta[SCALARS] = tree_unflatten(records, exported.call_spec.out_spec)


def _record(node: Any, scalars: Collection[fx.Node], parameters: Collection[str]) -> ReturnedScalar:
    beside = frozenset(
        other.name
        for other in scalars
        if other is not node and reaches(node, parameters, {other}) and not reaches(other, {node.name})
    )
    return ReturnedScalar(source_line(node.meta.get("stack_trace") or "") or node.name, node.name, beside)
