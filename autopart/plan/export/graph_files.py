"""A plan's graph as a file: GraphML, or DOT with a cluster a stage and a block."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from autopart.plan.data import Plan
from autopart.plan.export.facts import Exported
from autopart.plan.units import bytes_text, seconds_text


def graphml(plan: Plan) -> Exported:
    """GraphML (graphml.graphdrawing.org): every attribute of `Plan.graph`."""
    import networkx

    return Exported("\n".join(networkx.generate_graphml(plan.graph())) + "\n", (), ())


def dot(plan: Plan) -> Exported:
    """DOT (graphviz.org/doc/info/lang.html): operators by stage and block, messages between stages dashed."""
    return Exported("\n".join(_dot(plan)) + "\n", (), ())


def _dot(plan: Plan) -> Iterator[str]:
    found = plan.graph()
    nodes = [(name.split("."), name, data) for name, data in found.nodes(data=True)]
    yield f"digraph {quoted(plan.model)} {{"
    yield f"  label={quoted(plan.head)};"
    yield "  node [shape=box];"
    for stage, rows in groupby(nodes, key=lambda row: row[0][0]):
        yield f"  subgraph {quoted(f'cluster {stage}')} {{"
        yield f"    label={quoted(f'stage {stage}')};"
        for block, operators in groupby(rows, key=lambda row: row[0][1]):
            listed = list(operators)
            yield f"    subgraph {quoted(f'cluster {stage}.{block}')} {{"
            yield f"      label={quoted(listed[0][2]['label'])};"
            yield from (f"      {quoted(name)} [label={quoted(_label(data))}];" for _, name, data in listed)
            yield "    }"
        yield "  }"
    for maker, reader, data in found.edges(data=True):
        style = ", style=dashed" if "message" in data else ""
        yield f"  {quoted(maker)} -> {quoted(reader)} [label={quoted(bytes_text(data['bytes']))}{style}];"
    yield "}"


def _label(data: dict[str, Any]) -> str:
    """What a node says: the operator, how it is split, its seconds."""
    seconds = data["seconds"] + data["comm_seconds"]
    lines = [f"{data['name']} {data['operator']}".strip(), data["note"], seconds_text(seconds) if seconds else ""]
    return "\n".join(line for line in lines if line)


def quoted(text: str) -> str:
    """A DOT string, with quotes, backslashes (which start an escape in a label) and line breaks escaped."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
