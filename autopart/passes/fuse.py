"""fx.Graph -> fx.Graph: a subgraph that computes the same as a fused kernel becomes a call of the kernel."""

from __future__ import annotations

import torch
from torch import fx

from autopart.ir.graph import Traced, call_args, calls, info, new_call
from autopart.kernels.rms_norm import rms_norm


def fuse(traced: Traced) -> Traced:
    """Replace every RMSNorm that is written out by a call of its kernel, in place."""
    graph = traced.graph
    for node in calls(graph):
        found = _match_rms_norm(node)
        if found is not None:
            with graph.inserting_before(node):
                node.replace_all_uses_with(new_call(graph, rms_norm, found, node))
    graph.eliminate_dead_code()
    return traced


def _cast(node: object) -> object:
    """The operand of a dtype cast; of another node the node itself."""
    args = call_args(node, "aten._to_copy")
    return args[0] if args else node


def _product(node: object) -> list[tuple[fx.Node, fx.Node]]:
    args = call_args(node, "aten.mul.Tensor")
    if not args or not all(isinstance(a, fx.Node) for a in args):
        return []
    left, right = args
    return [(left, right), (right, left)]


def _match_rms_norm(node: fx.Node) -> tuple[fx.Node, fx.Node, float, torch.dtype | None] | None:
    """(x, weight, eps, dtype of h) where a node is weight * cast(h * rsqrt(mean(h^2) + eps)) with h = cast(x)."""
    for weight, normed in _product(node):
        if info(weight).kind != "parameter" or len(info(weight).shape) != 1:
            continue
        for h, scale in _product(_cast(normed)):
            shifted = call_args((call_args(scale, "aten.rsqrt") or (None,))[0], "aten.add.Tensor")
            mean = call_args(shifted[0], "aten.mean.dim") if shifted else None
            power = call_args(mean[0], "aten.pow.Tensor_Scalar") if mean else None
            if not (shifted and mean and power) or power[0] is not h or power[1] != 2 or list(mean[1]) != [-1]:
                continue
            x = _cast(h)
            assert isinstance(x, fx.Node)
            if info(x).dtype != info(normed).dtype:
                continue
            return x, weight, float(shifted[1]), info(h).dtype if x is not h else None
    return None
