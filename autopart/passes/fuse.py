"""fx.Graph -> fx.Graph: a subgraph that computes the same as a fused kernel becomes a call of the kernel."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import fx

from autopart.errors import not_known
from autopart.ir.graph import Traced, calls, info, is_pick, meta_of, new_call, update_info
from autopart.kernels.forms import FORMS, Form
from autopart.kernels.kernel import Kernel
from autopart.kernels.table import KERNELS, STEP
from autopart.passes.codegen.naming import OUTPUTS, wanted_name
from autopart.passes.fuse_attention import FUSED as FUSED_ATTENTION
from autopart.passes.fuse_attention import fuse_attention
from autopart.passes.fuse_dropout import RESIDUAL, fuse_dropout
from autopart.passes.fuse_stochastic_depth import DEPTH, fuse_stochastic_depth
from autopart.passes.pattern import Match, candidates, loose, match
from autopart.passes.randomness import FUSED
from autopart.passes.simplify import merge_equal
from autopart.passes.traffic import traffic
from autopart.sharding.notation import RowError
from autopart.sharding.rules import strategies


def fuse(traced: Traced, device: str, off: Collection[str] = ()) -> Traced:
    """Replace what equals a kernel's reference by a call of the kernel, in place, where the call moves fewer bytes.

    Kernels in `off` are left out, and on `device` "cpu" those that pay on GPUs alone.

    The largest pattern is tried first. `Traced.near_misses` has what differs from a kernel in constants, dtypes or
    sizes alone.
    """
    for name in off:
        if name not in (known := (*KERNELS, FUSED, RESIDUAL, DEPTH, STEP)):
            raise not_known("no_fuse", name, known)
    if device != "cpu" and DEPTH not in off:
        fuse_stochastic_depth(traced.graph)
        traced.graph.eliminate_dead_code()
    if device != "cpu" and FUSED_ATTENTION not in off:
        fuse_attention(traced)
    missed: dict[fx.Node, str] = {}
    kernels = [k for k in KERNELS.values() if k.name not in off and (k.on_cpu or device != "cpu")]
    by_operator = _by_operator(kernels, {info(n).name for n in calls(traced.graph)})
    for node in reversed(calls(traced.graph)):
        if not node.users:
            continue
        for kernel, form in by_operator.get(info(node).name, ()):
            found, near = _found(kernel, form, node)
            before = found and _place(found)
            if found and before:
                _replace(traced.graph, kernel, found, before)
                missed.pop(node, None)
                break
            if near:
                missed.setdefault(node, kernel.name)
    if device != "cpu" and RESIDUAL not in off:
        fuse_dropout(traced.graph)
    traced.graph.eliminate_dead_code()
    merge_equal(traced.graph)  # such as what attention reads, which every block would make
    places = (f"{name} at {info(node).source or info(node).name}" for node, name in missed.items())
    traced.near_misses = tuple(dict.fromkeys(places))
    return traced


def _by_operator(kernels: Sequence[Kernel], present: Collection[str]) -> Mapping[str, Sequence[tuple[Kernel, Form]]]:
    """The operator of a form's anchor -> the kernels and their forms that end in it, the largest first. Forms with an
    operator that the graph lacks are left out."""
    found: dict[str, list[tuple[Kernel, Form]]] = defaultdict(list)
    for kernel in kernels:
        for form in (form for form in FORMS[kernel.name] if form.needs in present):
            found[info(loose(kernel, form).anchor).name].append((kernel, form))
    return {name: sorted(forms, key=lambda pair: -loose(*pair).size) for name, forms in found.items()}


def _found(kernel: Kernel, form: Form, node: fx.Node) -> tuple[Match | None, bool]:
    """The match of a kernel whose anchor is `node`; and whether there is a near miss instead."""
    near = False
    for arguments in candidates(kernel, form, node):
        if any(isinstance(a, fx.Node) and info(a).grad for a in (arguments[i] for i in kernel.no_gradient)):
            continue
        found = match(kernel, arguments, node)
        if found is not None and _fits(kernel, found):
            return found, False
        near = found is None and loose(kernel, form).size > 1
    return None, near


def _fits(kernel: Kernel, found: Match) -> bool:
    """Whether the kernel pays and its rule holds for these shapes, and all that it replaces is of one block."""
    given = [meta_of(a) if isinstance(a, fx.Node) else a for a in found.arguments]
    arguments = {a for a in found.arguments if isinstance(a, fx.Node)}
    moved: float = sum(info(n).bytes for n in {*arguments, *found.outputs})
    moved = kernel.bytes_moved(*given).forward if kernel.streamed else moved
    if len({info(n).layer for n in found.inside}) > 1 or moved >= sum(map(traffic, found.inside)):
        return False
    if not kernel.pays(*given):
        return False
    sizes = tuple(torch.Size(info(a).shape) if isinstance(a, fx.Node) else a for a in found.arguments)
    try:
        strategies(f"autopart.{kernel.name}", sizes, [info(o).shape for o in found.outputs], 1)
    except RowError:
        return False
    return True


def _place(found: Match) -> fx.Node | None:
    """The operator before which the kernel's call goes: the first of those that are replaced behind all arguments; None
    where a result is read before."""
    last = max(a for a in found.arguments if isinstance(a, fx.Node))
    before = min(n for n in found.inside if n > last)
    readers = [user for o in found.outputs for user in o.users if user not in found.inside]
    return before if all(user > before for user in readers) else None


def _replace(graph: fx.Graph, kernel: Kernel, found: Match, before: fx.Node) -> None:
    last = found.outputs[-1]
    with graph.inserting_before(before):
        results = [call := new_call(graph, kernel.function, found.arguments, last)]
        if len(found.outputs) > 1:
            names = (*map(wanted_name, found.outputs[:-1]), wanted_name(last if is_pick(last) else call))
            update_info(call, outputs=OUTPUTS.get(kernel.name, names))
            results = [new_call(graph, operator.getitem, (call, i), o) for i, o in enumerate(found.outputs)]
    update_info(call, fused=traffic(call), unfused=sum(map(traffic, found.inside)))
    for old, new in zip(found.outputs, results, strict=True):
        old.replace_all_uses_with(new)
    for node in sorted(found.inside, reverse=True):
        graph.erase_node(node)
