"""Rewriting an exported program gives what torch's own way to make it functional gives."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import fx
from torch._export.utils import _is_cia_op, _is_preservable_cia_op

from autopart import exporting
from autopart.functional import KEPT, functional
from autopart.graph import info
from autopart.passes.simplify import simplify
from autopart.passes.trace import trace
from benchmarks import zoo_models

Program = torch.export.ExportedProgram
REWRITTEN = """clm:gemma3_text clm:falcon_h1 clm:gpt_neo clm:hrm_text clm:qwen2_moe clm:roformer mlm:modernbert
    mlm:perceiver clm:bart img:convnext img:vit""".split()
LEFT_TO_TORCH = ["clm:bloom", "img:resnet"]


run_decompositions = Program.run_decompositions


def by_torch(exported: Program, table: Any = None) -> Program:
    return run_decompositions(exported, table or {})


def described(exported: Any, architecture: str) -> tuple[list[Any], list[Any]]:
    """Placeholders, whose order means nothing, and operators of a simplified trace."""
    model, batch = zoo_models.build(*architecture.split(":"))
    with mock.patch.object(exporting, "functional", exported):
        graph = simplify(trace(model, batch)).graph
    placeholders = graph.find_nodes(op="placeholder")
    names = {node: info(node).name for node in placeholders}
    operators = [node for node in graph.nodes if node.op != "placeholder"]
    names |= {node: f"%{number}" for number, node in enumerate(operators)}
    shown = [
        (str(node.target), *fx.node.map_arg((node.args, node.kwargs), names.__getitem__), node.meta.get("val"))
        for node in operators
    ]
    return sorted((info(n).name, info(n).kind, info(n).shapes) for n in placeholders), [
        (target, str(args), str(kwargs), getattr(value, "shape", None), getattr(value, "dtype", None))
        for target, args, kwargs, value in shown
    ]


@pytest.mark.parametrize("architecture", REWRITTEN)
def test_a_rewritten_program_is_the_one_that_torch_makes(architecture: str) -> None:
    with mock.patch.object(Program, "run_decompositions", side_effect=AssertionError("left to torch")):
        rewritten = described(functional, architecture)
    assert rewritten == described(by_torch, architecture)


@pytest.mark.parametrize("architecture", LEFT_TO_TORCH)
def test_a_program_that_changes_tensors_in_place_is_left_to_torch(architecture: str) -> None:
    with mock.patch.object(Program, "run_decompositions", autospec=True, side_effect=by_torch) as made:
        described(functional, architecture)
    made.assert_called_once()


@pytest.mark.parametrize("name", sorted(KEPT))
def test_operators_that_are_kept_are_those_that_torch_keeps(name: str) -> None:
    packet = getattr(torch.ops.aten, name)
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    overloads = [
        op for op in overloads if op._overloadname.lower() != "dimname"
    ]  # of named tensors: no program has one
    in_program = [op for op in overloads if torch._C._dispatch_has_kernel(op.name()) and not op._schema.is_mutable]
    assert in_program
    assert all(not _is_cia_op(op) or _is_preservable_cia_op(op) for op in in_program)
