"""Rewriting an exported program gives what torch's own way to make it functional gives."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
import torch
from torch import fx, nn
from torch._export.utils import _is_cia_op, _is_preservable_cia_op

from autopart.frontend import export as exporting
from autopart.frontend.functionalize import KEPT, functional
from autopart.ir.graph import info
from autopart.passes.simplify import simplify
from autopart.passes.trace import trace
from benchmarks.coverage import zoo_models

Program = torch.export.ExportedProgram
REWRITTEN = "clm:gpt2 clm:falcon clm:roformer img:convnext img:mobilevitv2 img:resnet img:swin img:vit".split()
FURTHER = []
if "AUTOPART_EXAMPLES" in os.environ:  # with operators that the others have too
    FURTHER = """clm:bloom clm:deepseek_v2 clm:falcon_h1 clm:gemma3_text clm:gpt_neo
        clm:hrm_text clm:qwen2_moe clm:zamba2 mlm:modernbert mlm:perceiver""".split()


class Changes(nn.Module):
    """A convolution, normalised with statistics of the batch, of training and of neither, and what `then` does."""

    def __init__(self, then: Any) -> None:
        super().__init__()
        self.conv, self.then, self.drop = nn.Conv2d(3, 4, 3, padding="same", bias=False), then, nn.Dropout(0.1)
        self.norm, self.fixed, self.plain = nn.BatchNorm2d(4), nn.BatchNorm2d(4).eval(), nn.BatchNorm2d(4, affine=False)
        self.plain.running_mean = self.plain.running_var = None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.norm(self.norm(self.conv(x)))
        return self.drop(self.then(self.fixed(self.plain(y)), self.norm)).square().mean(), self.norm.running_mean


def pooled(y: Any, norm: Any) -> Any:
    return nn.functional.adaptive_avg_pool2d(nn.functional.max_pool2d(nn.functional.hardswish(y, inplace=True), 2), 1)


def changed_half(y: Any, norm: Any) -> Any:
    left, right = y[:, :2], y.flatten(2)[:, 2:]
    left.relu_()
    return right.sum() + left.clamp_(max=1.0)


def changed_through_view(y: Any, norm: Any) -> Any:
    y[:, 0].add_(1.0)
    return y


def changed_parts(y: Any, norm: Any) -> Any:
    shifted = y.new_zeros(y.shape)
    shifted[:, 1:] = y[:, :-1].clone()
    shifted[..., 0] = 0.5
    return shifted.masked_fill_(shifted > 1.0, 0.0)


def changed_parts_of_parts(y: Any, norm: Any) -> Any:
    """As in the chunks of a gated delta rule."""
    rows = y.square()
    for row in range(1, 4):
        before = rows[:, :, row, :row].clone()
        above = rows[:, :, :row, :row].clone()
        rows[:, :, row, :row] = before + (before.unsqueeze(-1) * above).sum(-2)
    return rows


def scattered(y: Any, norm: Any) -> Any:
    chosen = y.flatten(1).topk(2).indices
    kept = torch.zeros_like(y.flatten(1)).scatter_(1, chosen, 1.0)
    kept = kept.scatter_add_(1, chosen, chosen.to(y.dtype)) * torch.eye(2).repeat(1, kept.shape[1] // 2)
    return kept * y.flatten(1)


def changed_row_twice(y: Any, norm: Any) -> Any:
    rows = y.square()
    row = rows[0]
    row[1:] = 1.0
    row[:1] = 2.0
    return rows


def changed_row_and_part(y: Any, norm: Any) -> Any:
    rows = y.square()
    row = rows[0]
    row.add_(1.0)
    row[:1].mul_(2.0)
    return rows


def changed_twice_through_view(y: Any, norm: Any) -> Any:
    part = y[:, 0]
    part.add_(1.0)
    part.mul_(2.0)
    return y


def changed_under_view(y: Any, norm: Any) -> Any:
    flat = y.flatten(1)
    y.mul_(2.0)
    return flat


def counted(y: Any, norm: Any) -> Any:
    norm.num_batches_tracked += 1
    return y * norm.running_var.detach().clone().view(1, -1, 1, 1).add_(norm.num_batches_tracked.float())


def narrowed(y: Any, norm: Any) -> Any:
    left, right = y.narrow(3, -4, 2).chunk(2)
    return torch.cat((left, right)).unflatten(1, (2, -1)).lerp_(y.mean(), 0.5).copy_(norm.running_mean.sum())


def without_gradients(y: Any, norm: Any) -> Any:
    with torch.no_grad():
        scale = y.type_as(norm.weight).mean().expand_as(y)
    return y * scale


def of_two_dtypes(y: Any, norm: Any) -> Any:
    rows = nn.functional.rms_norm(y.flatten(1).bfloat16(), (y[0].numel(),))
    rows *= norm.running_var[:1]
    return rows.T + norm.running_mean[0]


CHANGES = [pooled, counted, narrowed, without_gradients, lambda y, norm: (y + y).relu_().flatten(1).add_(1.0)]
CHANGES += [of_two_dtypes, changed_through_view, changed_parts, changed_parts_of_parts, changed_row_twice, scattered]
CHANGES_LEFT_TO_TORCH = [
    changed_half,
    changed_twice_through_view,
    changed_under_view,
    changed_row_and_part,
]


run_decompositions = Program.run_decompositions


def by_torch(exported: Program, table: Any = None) -> Program:
    return run_decompositions(exported, table or {})


def described(exported: Any, architecture: Any) -> tuple[list[Any], list[Any], tuple[str, ...]]:
    """Placeholders, whose order means nothing, operators and the buffers that are outputs, of a simplified trace."""
    if isinstance(architecture, str):
        model, batch = zoo_models.build(*architecture.split(":"))
    else:
        model, batch = Changes(architecture), {"x": torch.randn(2, 3, 8, 8)}
    with mock.patch.object(exporting, "functional", exported):
        traced = simplify(trace(model, batch))
    graph = traced.graph
    placeholders = graph.find_nodes(op="placeholder")
    names = {node: info(node).name for node in placeholders}
    operators = [node for node in graph.nodes if node.op != "placeholder"]
    rows: dict[Any, fx.Node] = {}
    for node in list(operators):  # torch selects a row anew for every part of it
        if node.target is torch.ops.aten.select.int and rows.setdefault(node.args, node) is not node:
            node.replace_all_uses_with(rows[node.args])
            operators.remove(node)
    names |= {node: f"%{number}" for number, node in enumerate(operators)}
    shown = [
        (str(node.target), *fx.node.map_arg((node.args, node.kwargs), names.__getitem__), node.meta.get("val"))
        for node in operators
    ]
    described = [
        (target, str(args), str(kwargs), getattr(value, "shape", None), getattr(value, "dtype", None))
        for target, args, kwargs, value in shown
    ]
    return sorted((info(n).name, info(n).kind, info(n).shapes) for n in placeholders), described, traced.updated


@pytest.mark.parametrize(
    "architecture", [*REWRITTEN, *(FURTHER if "AUTOPART_EXAMPLES" in os.environ else ()), *CHANGES]
)
def test_a_rewritten_program_is_the_one_that_torch_makes(architecture: Any) -> None:
    with mock.patch.object(Program, "run_decompositions", side_effect=AssertionError("left to torch")):
        rewritten = described(functional, architecture)
    assert rewritten == described(by_torch, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", CHANGES_LEFT_TO_TORCH)
def test_a_program_whose_views_see_changes_is_left_to_torch(architecture: Any) -> None:
    with mock.patch.object(Program, "run_decompositions", autospec=True, side_effect=by_torch) as made:
        described(functional, architecture)
    made.assert_called_once()


def test_dropout_in_place_is_dropout() -> None:
    def dropped(inplace: bool) -> Any:
        return lambda y, norm: nn.functional.dropout(y.square(), 0.3, inplace=inplace) + norm.running_var[0]

    with mock.patch.object(Program, "run_decompositions", side_effect=AssertionError("left to torch")):
        assert described(functional, dropped(True)) == described(functional, dropped(False))


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
