"""fx.Graph -> fx.Graph: every node's FLOPs, its dim of samples, and to the byte what autograd saves for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx

from autopart.cost.compute import is_loss
from autopart.frontend.torch_private import StorageWeakRef, tree_leaves
from autopart.ir.graph import Traced, calls, info, operands, run_on_meta, shape_args, update_info, value_of
from autopart.ir.random_ops import uniform_of
from autopart.kernels.kernel import Kernel
from autopart.kernels.table import kernel_of
from autopart.passes.backward_peak import gradient_copies
from autopart.passes.mean_loss import first_mixing
from autopart.sharding.notation import Placement
from autopart.sharding.rules import flops, is_contraction, product_of, strategies, sums_up

VIEWS = ("aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten.using_ints", "aten.expand")
"""Operators whose rule has no letter for a dim of size 1. A single sample in dim 0 stays in dim 0."""


COMPLEX_PRODUCTS = 4
"""Real matrix products in a complex one: (a + ib)(c + id) = ac - bd + i(ad + bc)."""

Batch = dict[tuple[fx.Node, int], int | None]
"""Value -> its dim that counts samples; None where it has none."""


def annotate(traced: Traced, device: str) -> Traced:
    """Fill in the records in place. What fused kernels save depends on `device`, "cpu" or another type."""
    batch = _counting(traced)
    for node in calls(traced.graph):
        record = info(node)
        update_info(node, batch=batch.get(value_of(node)))
        if record.name == "autopart.getitem":
            continue
        work = flops(record.name, shape_args(node), record.shapes)
        work *= COMPLEX_PRODUCTS if record.dtype.is_complex and is_contraction(record.name) else 1
        contracts = is_contraction(record.name)
        update_info(node, flops=work, product=contracts and sums_up(record.name, shape_args(node), record.shapes))
        if contracts:
            _matrix(node, batch)
    _logits(traced.graph)
    mixes = first_mixing(traced.graph) if traced.micro_batch > 1 else None
    traced.mixed_at = "" if mixes is None else info(mixes).source or info(mixes).name
    if traced.updated and not traced.mixed_at:
        traced.mixed_at = f"the buffer {traced.updated[0]}, which changes once a micro-batch"
    _saved(traced.graph, device)
    _gradients(traced.graph, device)
    for node in calls(traced.graph):
        kernel = kernel_of(info(node).name)
        if kernel is not None and kernel.workspace is not None:
            given = node.args[0]
            assert isinstance(given, fx.Node)
            update_info(node, computes=info(given).dtype, plain=device == "cpu")
    return traced


def _logits(graph: fx.Graph) -> None:
    """Mark the values that go only into a cross-entropy, back to the product that makes the logits."""
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
    """The dim of every value that counts samples.

    A value that no input reaches, such as a mask, counts samples in dim 0 if a user's rule splits it with a value that
    does.
    """
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
    """The operands in `unknown` whose dim 0 has the letter that counts samples in another operand, or in the output."""
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
    """Note which matrix product the node is, and which of its factors get gradients."""
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
    """The dims of the outputs that count samples: those with the letter that counts samples in an input."""
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
    """Run the graph on meta tensors, and note for every node whose memory autograd saves for its backward."""
    values: dict[fx.Node, Any] = {}
    owner: dict[int, str] = {}
    parameters: set[int] = set()
    for node in graph.nodes:
        if node.op == "output":
            continue
        record = info(node)
        saved: list[torch.Tensor] = []
        if node.op == "placeholder":
            value: Any = torch.empty(record.shape, dtype=record.dtype, device="meta", requires_grad=record.grad)
            if record.kind != "input":
                parameters.add(_storage(value))
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
            run = _as_it_runs(node, device)
            hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t)  # type: ignore[misc]
            with hooks:
                value = run_on_meta(run, args, kwargs)
        values[node] = value
        first = value[0] if isinstance(value, (tuple, list)) else value
        root = owner.setdefault(_storage(first), node.name)
        for i, output in enumerate(value if isinstance(value, (tuple, list)) else ()):
            owner.setdefault(_storage(output), f"{node.name}:{i}")
        stored = {_storage(t): t for t in saved if _storage(t) not in parameters}
        update_info(
            node,
            root=root,
            view=node.op == "call_function" and root != node.name,
            saves=tuple(dict.fromkeys(owner[s] for s in stored if s in owner)),
            inner=sum(t.untyped_storage().nbytes() for s, t in stored.items() if s not in owner),
        )
        if info(node).inner and is_contraction(record.name):
            update_info(node, fixed=_fixed_bytes(node, values, device))


def _fixed_bytes(node: fx.Node, values: Mapping[fx.Node, Any], device: str) -> float:
    """The bytes of `Info.inner` of a product that do not grow with the samples: 2 a - b, where it has a bytes with the
    samples of the trace and b with twice as many. 0 where all operands count samples, or none does."""
    counting = {n: info(n).batch for n in node.all_input_nodes}
    if len({dim is None for dim in counting.values()}) < 2:
        return 0.0
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _twice(values[n], counting[n]))
    saved: list[torch.Tensor] = []
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
            outputs = tree_leaves(run_on_meta(_as_it_runs(node, device), args, kwargs))
    except RuntimeError:  # a size among its arguments
        return 0.0
    known = {_storage(t) for t in [*tree_leaves((args, kwargs)), *outputs] if isinstance(t, torch.Tensor)}
    twice = {_storage(t): t.untyped_storage().nbytes() for t in saved if _storage(t) not in known}
    inner = info(node).inner
    return float(min(max(2 * inner - sum(twice.values()), 0), inner))


def _twice(value: Any, dim: int | None) -> Any:
    """A tensor on meta with twice the size of a dim, its dims in the same order in memory; any other value as it is."""
    if dim is None or not isinstance(value, torch.Tensor):
        return value
    shape = [2 * size if i == dim else size for i, size in enumerate(value.shape)]
    strides: tuple[int, ...] = value.stride()
    order = sorted(range(value.dim()), key=lambda i: -strides[i])
    made = torch.empty([shape[i] for i in order], dtype=value.dtype, device="meta")
    return made.permute([order.index(i) for i in range(len(order))]).requires_grad_(value.requires_grad)


def _gradients(graph: fx.Graph, device: str) -> None:
    """Note which operands are trained parameters or views of them; of a fused kernel whose reference runs, also
    `Info.gradient_copies`."""
    parameters = {node.name for node in graph.find_nodes(op="placeholder") if info(node).kind == "parameter"}
    saved = {root for node in calls(graph) for root in info(node).saves}
    for node in calls(graph):
        taken = [(i, info(n)) for i, n in enumerate(operands(node)) if n is not None]
        update_info(node, weights=tuple(i for i, record in taken if record.grad and record.root in parameters))
        if _by_reference(node, device) and info(node).grad:
            record = info(node)
            roots = [record.root, *(f"{node.name}:{i}" for i in range(1, len(record.shapes)))]
            sizes = dict(zip(roots, record.output_bytes, strict=True))
            freed = sum(sizes[root] for root in roots if root in saved and root not in record.saves)
            update_info(node, gradient_copies=gradient_copies(node, freed))


def _by_reference(node: fx.Node, device: str) -> bool:
    """Whether a fused kernel's reference runs in its place."""
    kernel = kernel_of(info(node).name)
    return kernel is not None and device == "cpu" and not kernel.everywhere


def _as_it_runs(node: fx.Node, device: str) -> Callable[..., Any]:
    """A function that saves for backward what runs in the node's place: a fused kernel for attention on every device,
    for other operators on GPUs alone."""
    name = info(node).name
    kernel = kernel_of(name)
    if name == "autopart.dropout_attention":
        return lambda *args: _Attention.apply(True, *args[:8])
    if name == "autopart.attention":
        return lambda *args: _Attention.apply(False, *args[:8])
    if name == "autopart.residual_dropout":
        return lambda x, bias, residual, *_: _Dropped.apply(x, residual, x.shape[:-1], x.shape[-1:])
    if name == "autopart.stochastic_depth":
        return lambda x, residual, *_: _Dropped.apply(x, residual, x.shape[:1], (1,))
    if name == "aten.scaled_dot_product_attention":
        return lambda *args, scale=None, enable_gqa=False: _Attention.apply(False, *args[:4])
    if kernel is not None and (kernel.everywhere or device != "cpu"):
        return partial(_Fused.apply, kernel)
    return node.target  # type: ignore[return-value]


class _Attention(torch.autograd.Function):
    """Saves what a flash attention kernel saves: query, key, value, masks and biases, output, and for each query a
    log-sum-exp in float32; with dropout, a hash too. In memory the output is (samples, queries, heads, width), so that
    a reshape to all heads takes no copy."""

    @staticmethod
    def forward(ctx: Any, hashed: bool, query: Any, key: Any, value: Any, *others: Any) -> Any:
        *batch, heads, queries, _ = query.shape if query.dim() > 3 else (1, *query.shape)
        out = query.new_empty(*batch, queries, heads, value.shape[-1]).transpose(-2, -3)
        out = out if query.dim() > 3 else out[0]
        statistics = query.new_empty(query.shape[:-1], dtype=torch.float32)
        hashes = [torch.empty_like(statistics, dtype=torch.int32)] if hashed else []
        given = [t for t in others if isinstance(t, torch.Tensor)]
        ctx.save_for_backward(query, key, value, *given, out, statistics, *hashes)
        return out


class _Dropped(torch.autograd.Function):
    """Saves the hashes of rows and of columns, of these shapes, by which backward draws the mask again."""

    @staticmethod
    def forward(ctx: Any, x: Any, residual: Any, rows: Any, columns: Any) -> Any:
        ctx.save_for_backward(*(x.new_empty(shape, dtype=torch.int32) for shape in (rows, columns)))
        return torch.empty_like(residual, dtype=torch.promote_types(x.dtype, residual.dtype))


class _Fused(torch.autograd.Function):
    """Saves what the Triton kernels of a fused kernel keep for backward."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, *args: Any) -> Any:
        with torch.no_grad():
            outputs = kernel.reference(*args)
        several = isinstance(outputs, (tuple, list))
        fresh = tuple(torch.empty_like(o) for o in (outputs if several else (outputs,)))
        ctx.save_for_backward(*kernel.kept(args, fresh))
        return fresh if several else fresh[0]
