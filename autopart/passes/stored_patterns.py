"""patterns.json: the graphs of the kernels' forms as one release of torch traces them.

Tracing them takes a second, as long as the rest of planning a model of equal blocks. With another release of torch they
are traced. `python scripts/patterns.py` renews the file.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx

from autopart.ir.graph import KEY, Info
from autopart.sharding.rules import op_name

FILE = Path(__file__).with_name("patterns.json")
RELEASE = torch.__version__.partition("+")[0]

Data = Mapping[str, Any]
"""A graph: `nodes`, [target, arguments, keywords] or [] for an input, and `outputs`, their places among them."""


def stored(kernel: str, form: int) -> fx.Graph | None:
    """The graph of this form of a kernel, whose nodes have no shapes; None with another release of torch than the
    file's."""
    return from_data(_content()["graphs"][kernel][form]) if _content()["torch"] == RELEASE else None


@cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILE.read_text())
    return content


def to_data(graph: fx.Graph) -> Data:
    """A graph as JSON has it."""
    nodes = [node for node in graph.nodes if node.op != "output"]
    place = {node: i for i, node in enumerate(nodes)}

    def data(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return {"node": place[value]}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, (list, tuple)):
            return [data(each) for each in value]
        return value

    lines = [
        []
        if node.op == "placeholder"
        else [_name(node.target), data(node.args), {k: data(v) for k, v in node.kwargs.items()}]
        for node in nodes
    ]
    return {"nodes": lines, "outputs": [place[node] for node in graph.output_node().args]}


def from_data(data: Data) -> fx.Graph:
    """The graph, with a record of the operator on every node."""
    graph = fx.Graph()
    nodes: list[fx.Node] = []

    def value(given: Any) -> Any:
        if isinstance(given, list):
            return tuple(value(each) for each in given)
        if isinstance(given, dict):
            return nodes[given["node"]] if "node" in given else getattr(torch, given["dtype"])
        return given

    for i, line in enumerate(data["nodes"]):
        if line:
            target, args, kwargs = line
            node = graph.call_function(_target(target), value(args), {k: value(v) for k, v in kwargs.items()})
        else:
            node = graph.placeholder(f"input_{i}")
        name = op_name(node.target) if line else node.name
        node.meta[KEY] = Info("op" if line else "input", name, (), (), grad=True)
        nodes.append(node)
    output = graph.output(())
    output.args = tuple(nodes[place] for place in data["outputs"])
    return graph


def _name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"torch:ops.{target}"
    return f"{target.__module__}:{target.__qualname__}"


@cache
def _target(name: str) -> Callable[..., Any]:
    return pkgutil.resolve_name(name)
