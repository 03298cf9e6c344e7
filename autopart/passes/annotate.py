"""fx.Graph -> fx.Graph: FLOPs, the batch dim, and exactly what autograd keeps, on every node."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from autopart.cost.compute import is_loss
from autopart.frontend.torch_private import StorageWeakRef
from autopart.ir.graph import Traced, calls, info, operands, run_on_meta, shape_args, update_info, value_of
from autopart.ir.random_ops import uniform_of
from autopart.kernels.rms_norm import REFERENCE_GRADIENTS
from autopart.passes.mean_loss import first_mixing
from autopart.sharding.notation import Placement
from autopart.sharding.rules import flops, is_contraction, product_of, strategies

VIEWS = ("aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten.using_ints", "aten.expand")
"""Operators whose rule has no letter for a dim of one element. A single sample in dim 0 stays there, as more would."""


COMPLEX_PRODUCTS = 4
"""Real matrix products that a complex one is: (a + ib)(c + id) = ac - bd + i(ad + bc)."""

Batch = dict[tuple[fx.Node, int], int | None]
"""Value -> the dim of it that counts samples."""


def annotate(traced: Traced, device: str) -> Traced:
    """Fill in the records, in place. `device` ("cpu" or another) says whose kernels keep what."""
    batch = _counting(traced)
    for node in calls(traced.graph):
        record = info(node)
        update_info(node, batch=batch.get(value_of(node)))
        if record.name == "autopart.getitem":
            continue
        work = flops(record.name, shape_args(node), record.shapes)
        work *= COMPLEX_PRODUCTS if record.dtype.is_complex and is_contraction(record.name) else 1
        update_info(node, flops=work, product=is_contraction(record.name))
        if is_contraction(record.name):
            _matrix(node, batch)
    _logits(traced.graph)
    mixes = first_mixing(traced.graph) if traced.micro_batch > 1 else None
    traced.mixed_at = "" if mixes is None else info(mixes).source or info(mixes).name
    if traced.updated and not traced.mixed_at:
        traced.mixed_at = f"the buffer {traced.updated[0]}, which changes once a micro-batch"
    _saved(traced.graph, device)
    _gradients(traced.graph, device)
    return traced


def _logits(graph: fx.Graph) -> None:
    """Mark what is on its way into a cross-entropy, back to the product that makes it."""
    for node in reversed(list(calls(graph))):
        into = [
            user.op != "output"
            and operands(user)[0] is node
            and not info(user).product
            and (info(user).logits or is_loss(info(user)))
            for user in node.users
        ]
        update_info(node, logits=bool(into) and all(into))


def _counting(traced: Traced) -> Batch:
    """The dim of every value that counts samples. What is made of nothing, as masks and positions are, counts them
    where its users take it with what does."""
    nodes = [n for n in calls(traced.graph) if info(n).name != "autopart.getitem"]
    batch: Batch = {(n, 0): info(n).batch for n in traced.graph.nodes if n.op == "placeholder"}
    for node in nodes:
        dims = _batch_dims(node, batch)
        if node.target is uniform_of and info(node).shape[:1] == (traced.micro_batch,):
            dims = [0]
        batch |= {(node, i): d for i, d in enumerate(dims)}
    unknown = {n for n in nodes if batch[n, 0] is None and any(s % traced.micro_batch == 0 for s in info(n).shape)}
    if traced.micro_batch > 1 and unknown:
        for node in reversed(nodes):
            if any(n is not None and value_of(n)[0] in unknown for n in operands(node)):
                batch |= _asked(node, batch, unknown)
        for node in nodes:
            if batch[node, 0] is None:
                batch |= {(node, i): d for i, d in enumerate(_batch_dims(node, batch))}
    return batch


def _asked(node: fx.Node, batch: Batch, unknown: set[fx.Node]) -> Batch:
    """The dims of operands that are not known to count samples, by the letter that counts them elsewhere in a node."""
    places = [*(batch.get(value_of(n)) if n is not None else None for n in operands(node)), batch.get((node, 0))]
    for strategy in strategies(info(node).name, shape_args(node), info(node).shapes, 1):
        wanted = [*strategy.inputs, strategy.outputs[0]]
        if any(_is_dim(p, place) for p, place in zip(wanted, places, strict=True)):
            pairs = zip(operands(node), strategy.inputs, strict=True)
            split = [(value_of(n), p.dim) for n, p in pairs if n is not None and p is not None and p.kind == "S"]
            return {value: dim for value, dim in split if value[0] in unknown and value[1] == 0}
    return {}


def _is_dim(placement: Placement | None, place: int | None) -> bool:
    return place is not None and placement is not None and placement.kind == "S" and placement.dim == place


def _matrix(node: fx.Node, batch: Batch) -> None:
    """Note what matrix product the node is."""
    record, taken = info(node), operands(node)
    counted = [batch.get(value_of(n)) if n is not None else None for n in taken]
    matrix = product_of(record.name, shape_args(node), record.shapes, counted)
    if matrix is not None:
        first, *others = (info(n).grad for i in matrix.factors if (n := taken[i]) is not None)
        if record.dtype.is_complex:
            sizes = matrix.sizes._replace(batch=COMPLEX_PRODUCTS * matrix.sizes.batch)
            matrix = replace(matrix, sizes=sizes)
        update_info(node, matrix=matrix, grads=(first, any(others)))


def _batch_dims(node: fx.Node, batch: Batch) -> list[int | None]:
    """The dims of the outputs that count samples: where a letter that counts them in an input ends up."""
    record = info(node)
    places = [batch.get(value_of(n)) if n is not None else None for n in operands(node)]
    if all(p is None for p in places):
        return [None] * len(record.shapes)
    taken = shape_args(node)[0]
    if record.name in VIEWS and places[0] == 0 and taken[0] == 1:
        return [len(record.shape) - len(taken) if record.name == "aten.expand" else 0]
    for strategy in strategies(record.name, shape_args(node), record.shapes, 1):
        if any(_is_dim(wanted, place) for place, wanted in zip(places, strategy.inputs, strict=True)):
            return [o.dim if o.kind == "S" else None for o in strategy.outputs]
    return [None] * len(record.shapes)


def _storage(tensor: torch.Tensor) -> int:
    return int(StorageWeakRef(tensor.untyped_storage()).cdata)


def _saved(graph: fx.Graph, device: str) -> None:
    """Run the graph on meta tensors and note, for each node, whose memory its backward keeps."""
    values: dict[fx.Node, Any] = {}
    owner: dict[int, str] = {}
    parameters: set[int] = set()
    for node in graph.nodes:
        if node.op == "output":
            continue
        record = info(node)
        kept: list[torch.Tensor] = []
        if node.op == "placeholder":
            value: Any = torch.empty(record.shape, dtype=record.dtype, device="meta", requires_grad=record.grad)
            if record.kind != "input":
                parameters.add(_storage(value))
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
            run = _KERNELS.get(record.name, node.target) if _is_kernel(record.name, device) else node.target
            hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t)  # type: ignore[misc]
            with hooks:
                value = run_on_meta(run, args, kwargs)
        values[node] = value
        first = value[0] if isinstance(value, (tuple, list)) else value
        root = owner.setdefault(_storage(first), node.name)
        for output in value if isinstance(value, (tuple, list)) else ():
            owner.setdefault(_storage(output), node.name)
        stored = {_storage(t): t for t in kept if _storage(t) not in parameters}
        update_info(
            node,
            root=root,
            view=node.op == "call_function" and root != node.name,
            keeps=tuple(dict.fromkeys(owner[s] for s in stored if s in owner)),
            inner=sum(t.untyped_storage().nbytes() for s, t in stored.items() if s not in owner),
        )


def _gradients(graph: fx.Graph, device: str) -> None:
    """Note which operands are parameters that get gradients, or views of such, and what is no kernel's backward."""
    parameters = {node.name for node in graph.find_nodes(op="placeholder") if info(node).kind == "parameter"}
    for node in calls(graph):
        taken = [(i, info(n)) for i, n in enumerate(operands(node)) if n is not None]
        update_info(node, weights=tuple(i for i, record in taken if record.grad and record.root in parameters))
        if info(node).name == "autopart.rms_norm" and not _is_kernel(info(node).name, device):
            x, _, _, dtype = node.args
            computed: Any = dtype or info(x).dtype  # type: ignore[arg-type]
            update_info(node, times=REFERENCE_GRADIENTS * computed.itemsize / info(node).dtype.itemsize)


def _is_kernel(name: str, device: str) -> bool:
    """Attention keeps no scores on any device; the fused norms are kernels on GPUs alone."""
    return name == "aten.scaled_dot_product_attention" or device != "cpu"


class _Attention(torch.autograd.Function):
    """What a flash kernel keeps: query, key, value, mask, output and one log-sum-exp (float32) a query. The output lies
    as (samples, queries, heads, width), so that to bring the heads together again takes no copy."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any = None, *rest: Any) -> Any:
        *batch, heads, queries, _ = query.shape if query.dim() > 3 else (1, *query.shape)
        out = query.new_empty(*batch, queries, heads, value.shape[-1]).transpose(-2, -3)
        out = out if query.dim() > 3 else out[0]
        statistics = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, *([] if mask is None else [mask]), out, statistics)
        return out


class _RmsNorm(torch.autograd.Function):
    """What the kernel keeps: input, weight and one reciprocal root (float32) a row."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, *rest: Any) -> Any:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)


_KERNELS = {
    "aten.scaled_dot_product_attention": lambda *args, scale=None, enable_gqa=False: _Attention.apply(*args),
    "autopart.rms_norm": _RmsNorm.apply,
}
