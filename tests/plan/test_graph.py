"""A plan's graph: held against the stages that run, and read back from its files."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import networkx
import pytest
from typer.testing import CliRunner

import autopart
from autopart import PartitionError, Plan
from autopart.cli.main import app
from autopart.compile.programs import stage_graphs
from autopart.frontend.batch import DTYPES
from autopart.ir.graph import info
from autopart.passes.source import Source
from autopart.plan.export import export
from autopart.plan.units import printed_name

pytestmark = pytest.mark.usefixtures("traced_once")

LAYERS = 4
"""Of every model; Llama has as many stages, T5 as many in encoder and decoder."""
CASES = {
    "gpt2": {"pp": 2, "tp": 2, "micro_batch": 4},
    "llama": {"pp": 4},
    "t5": {"pp": 2, "dp": 2, "micro_batch": 4},
    "bert": {"pp": 2, "tp": 2, "micro_batch": 4},
    "mlp": {"pp": 2, "tp": 2, "micro_batch": 4},
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Plan, list[Any]]:
    """A plan, and the graphs of its stages as they run: from a trace of every block."""
    model, batch = models.build(request.param, layers=LAYERS)
    plan = autopart.plan(model, "4:cpu", batch, **CASES[request.param])
    layered = Source(model, batch, DTYPES[plan.precision]).full(plan.micro_batch, plan.mesh)
    return plan, stage_graphs(layered, plan)


def test_the_edges_are_those_of_the_stages_that_run(case: tuple[Plan, list[Any]]) -> None:
    plan, stages = case
    made = plan.graph()
    assert networkx.is_directed_acyclic_graph(made)
    named: dict[Any, str] = {}
    sent: dict[str, str] = {}
    edges = set()
    for stage in stages:
        for label, (name, nodes) in enumerate(stage.segments):
            for line, node in enumerate(nodes):
                named[node] = f"{stage.index}.{label}.{line}"
                assert made.nodes[named[node]]["label"] == name
                assert made.nodes[named[node]]["operator"] == printed_name(info(node).name)
        for node in stage.graph.nodes:
            reads = [n for n in node.all_input_nodes if info(n).kind in ("op", "received")]
            if node.op == "call_function":
                edges |= {(named[n] if n in named else sent[info(n).name], named[node]) for n in reads}
        output = stage.graph.output_node()
        results = output.args[0] if isinstance(output.args[0], tuple) else output.args
        sent |= {c.name: named[n] for c, n in zip(stage.sent, results, strict=False) if n in named}
    assert set(made.nodes) == set(named.values())
    assert set(made.edges) == edges


def test_messages_are_those_of_the_plan(case: tuple[Plan, list[Any]]) -> None:
    plan, _ = case
    made = plan.graph()
    crossing = {}
    for maker, reader, data in made.edges(data=True):
        assert ("message" in data) == (made.nodes[maker]["stage"] != made.nodes[reader]["stage"])
        if "message" in data:
            crossing[data["message"], maker] = data["bytes"]
    totals: dict[str, float] = {}
    for (message, _), size in crossing.items():
        totals[message] = totals.get(message, 0.0) + size
    assert totals == {f"stage {i} to stage {to}": size for i, s in enumerate(plan.stages) for to, size, _ in s.sends}


def test_seconds_are_those_of_the_plan(case: tuple[Plan, list[Any]]) -> None:
    plan, _ = case
    totals = dict.fromkeys(range(plan.pp), 0.0)
    for _, data in plan.graph().nodes(data=True):
        totals[data["stage"]] += data["seconds"] + data["comm_seconds"]
    for index, stage in enumerate(plan.stages):
        assert totals[index] == pytest.approx(stage.forward_seconds + stage.backward_seconds)


@pytest.mark.slow
def test_a_saved_plan_has_the_same_graph(case: tuple[Plan, list[Any]], tmp_path: Path) -> None:
    plan, _ = case
    plan.save(tmp_path / "plan.json")
    assert same(Plan.load(tmp_path / "plan.json").graph(), plan.graph())


def test_graphml_reads_back(case: tuple[Plan, list[Any]]) -> None:
    plan, _ = case
    back = networkx.read_graphml(io.BytesIO(export(plan, "graphml").text.encode()))
    assert same(back, plan.graph())


def test_dot_reads_back(case: tuple[Plan, list[Any]]) -> None:
    plan, _ = case
    made, (nodes, edges) = plan.graph(), read_dot(export(plan, "dot").text)
    assert set(nodes) == set(made.nodes)
    assert set(edges) == set(made.edges)
    for name, data in made.nodes(data=True):
        assert f"{data['name']} {data['operator']}".strip() == nodes[name]["label"].split("\n")[0]
    for maker, reader, data in made.edges(data=True):
        assert ("style" in edges[maker, reader]) == ("message" in data)


def test_names_are_quoted_in_dot() -> None:
    model, batch = models.build("mlp")
    plan = autopart.plan(model, "2:cpu", batch, pp=2)
    hostile = 'a "b" \\n -> c; }\nd'
    first = plan.stages[0]
    segment = replace(first.segments[0], lines=tuple(replace(line, name=hostile) for line in first.segments[0].lines))
    odd = replace(
        plan, model=hostile, stages=(replace(first, segments=(segment, *first.segments[1:])), *plan.stages[1:])
    )
    nodes, edges = read_dot(export(odd, "dot").text)
    assert nodes["0.0.0"]["label"].startswith(hostile)
    assert set(edges) == set(plan.graph().edges)
    assert same(networkx.read_graphml(io.BytesIO(export(odd, "graphml").text.encode())), odd.graph())


def test_a_plan_whose_lines_read_nothing_that_is_there() -> None:
    model, batch = models.build("mlp")
    plan = autopart.plan(model, "2:cpu", batch, pp=2)
    last = plan.stages[1]
    cut = replace(last, segments=tuple(replace(segment, sources=()) for segment in last.segments))
    with pytest.raises(PartitionError, match="no such operator"):
        replace(plan, stages=(plan.stages[0], cut)).graph()


def test_the_shell_writes_both(tmp_path: Path) -> None:
    model, batch = models.build("mlp")
    plan = autopart.plan(model, "2:cpu", batch, pp=2)
    plan.save(tmp_path / "plan.json")
    for to in ("graphml", "dot"):
        result = CliRunner().invoke(app, ["export", str(tmp_path / "plan.json"), "--to", to])
        assert result.exit_code == 0 and result.stdout == export(plan, to).text
        assert not result.stderr


def same(one: networkx.DiGraph, other: networkx.DiGraph) -> bool:
    """Whether two graphs have the same nodes and edges with the same attributes."""
    return (
        dict(one.nodes(data=True)) == dict(other.nodes(data=True))
        and {(a, b): d for a, b, d in one.edges(data=True)} == {(a, b): d for a, b, d in other.edges(data=True)}
    )  # fmt: skip


TOKEN = re.compile(r'\s*(?:("(?:[^"\\]|\\.)*")|(->|[{}\[\];=,])|([A-Za-z_]\w*))', re.DOTALL)
Attributes = dict[str, str]


def read_dot(text: str) -> tuple[dict[str, Attributes], dict[tuple[str, str], Attributes]]:
    """Nodes and edges of a DOT file, by the part of its grammar that is written: anything else is an error."""
    tokens, at = [], 0
    while at < len(text.rstrip()):
        found = TOKEN.match(text, at)
        assert found, f"no token of DOT: {text[at : at + 40]!r}"
        tokens.append(found[0].strip())
        at = found.end()
    nodes: dict[str, Attributes] = {}
    edges: dict[tuple[str, str], Attributes] = {}

    def take(wanted: str = "") -> str:
        token = tokens.pop(0)
        assert not wanted or token == wanted, f"{wanted} is wanted, not {token}"
        return token

    def word() -> str:
        token = take()
        assert re.match(r'["A-Za-z_]', token), token
        escapes = {"n": "\n", '"': '"', "\\": "\\"}
        return re.sub(r"\\(.)", lambda m: escapes[m[1]], token[1:-1]) if token[0] == '"' else token

    def attributes() -> Attributes:
        given: Attributes = {}
        take("[")
        while True:
            key = word()
            take("=")
            given[key] = word()
            if take() == "]":
                return given

    def statements() -> None:
        take("{")
        while tokens[0] != "}":
            if tokens[0] == "subgraph":
                take()
                word()
                statements()
                continue
            name = word()
            if tokens[0] == "=":
                take()
                word()
            elif tokens[0] == "->":
                take()
                reader = word()
                assert name in nodes and reader in nodes and (name, reader) not in edges
                edges[name, reader] = attributes()
            elif name == "node":
                attributes()
            else:
                assert name not in nodes
                nodes[name] = attributes()
            take(";")
        take("}")

    take("digraph")
    word()
    statements()
    assert not tokens
    return nodes, edges


def test_the_plan_as_json_has_its_edges() -> None:
    model, batch = models.build("llama", layers=4)
    data = json.loads(json.dumps(autopart.plan(model, "2:cpu", batch, pp=2).to_json()))
    lines = [line for stage in data["stages"] for run in stage["segments"] for line in run["lines"]]
    assert any(i < 0 for line in lines for i in line["inputs"]) and all(line["bytes"] >= 0 for line in lines)
