"""Calls in emitted code compute what the operator does, with every argument: those of the table's samples."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from proof import Sample, Tensors, called, differentiable, gradients, leaves, swapped, tensors_of
from samples import SAMPLES
from torch import fx

from autopart.ir.graph import KEY, Info
from autopart.passes.codegen.scope import Expression, Scope
from autopart.passes.codegen.spelling import Printer
from autopart.passes.simplify import _positional

RANDOM = {"rand", "randn", "randperm", "bernoulli", "uniform", "exponential", "normal_functional", "multinomial"}
DROPPED = ("aten._to_copy", {})
"""A cast to the same dtype, which no graph has."""
CALLS = [
    s
    for s in SAMPLES
    if s.name.startswith("aten.") and s.name.split(".")[1] not in RANDOM and (s.name, s.kwargs) != DROPPED
]


def node_of(sample: Sample) -> tuple[fx.Node, dict[fx.Node, str]]:
    """The call as a node, as `simplify` leaves it, and its operands' names."""
    graph = fx.Graph()
    names: dict[fx.Node, str] = {}
    for k, tensor in enumerate(tensors_of(sample)):
        node = graph.placeholder(f"x{k}")
        node.meta[KEY] = Info("input", f"x{k}", (tuple(tensor.shape),), (tensor.dtype,))
        names[node] = f"x{k}"
    node = graph.call_function(sample.op, swapped(sample.args, iter(names)), dict(sample.kwargs))
    outputs = called(sample.op, sample.args, sample.kwargs)
    shapes, dtypes = tuple(tuple(o.shape) for o in outputs), tuple(o.dtype for o in outputs)
    node.meta[KEY] = Info("op", sample.name, shapes, dtypes)
    _positional(node)
    return node, names


def results(sample: Sample, run: Callable[[Tensors], Any]) -> Tensors:
    """What a call gives, and the gradients of its operands."""
    inputs = leaves(tensors_of(sample), sample.constants)
    found = run(inputs)
    outputs = list(found) if isinstance(found, (list, tuple)) else [found]
    if not differentiable(outputs) or not differentiable(inputs):
        return outputs
    return [*outputs, *gradients(outputs, inputs, [torch.ones_like(o) for o in outputs])]


@pytest.mark.parametrize("name", sorted({s.name for s in CALLS}))
def test_an_emitted_call_is_the_operator(name: str) -> None:
    for sample in (s for s in CALLS if s.name == name):
        node, names = node_of(sample)
        scope = Scope({operand: Expression(name) for operand, name in names.items()})
        text = Printer(set()).expression(scope, node).code
        known = {"torch": torch, "F": F, "self": SimpleNamespace(device="cpu")}

        def emitted(inputs: Tensors, text: str = text, names: Any = names, known: Any = known) -> Any:
            return eval(text, {**known, **dict(zip(names.values(), inputs, strict=True))})

        wanted = results(sample, lambda x, s=sample: s.op(*swapped(s.args, iter(x)), **s.kwargs))  # type: ignore[misc]
        for right, value in zip(wanted, results(sample, emitted), strict=True):
            torch.testing.assert_close(value, right, rtol=1e-12, atol=1e-12, equal_nan=True, msg=text)
