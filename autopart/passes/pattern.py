"""A kernel's reference as a pattern: the graph of its operators, and the places of a traced graph where it stands.

A pattern is found in two steps. The first compares operators and who reads whom, and so finds what the arguments of
the kernel would be. The second traces the reference with exactly these arguments: their shapes, dtypes and constants.
What equals this trace, argument for argument, is the kernel. What the first step finds and the second rejects is a near
miss: another epsilon or another order of casts.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from autopart.frontend.torch_private import FakeTensorMode, lazy_graph_modules
from autopart.ir.graph import KEY, Info, Traced, calls, info
from autopart.kernels.forms import FORMS, Chosen, Form
from autopart.kernels.kernel import Kernel
from autopart.passes.simplify import simplify
from autopart.passes.stored_patterns import stored
from autopart.sharding.rules import op_name

aten = torch.ops.aten
Found = dict[fx.Node, fx.Node]
"""Node of a pattern -> node of the traced graph."""

COMMUTATIVE = {"aten.add.Tensor", "aten.mul.Tensor"}
PLACES = {"aten.slice.Tensor", "aten.select.int"}
"""Operators that read elements by their places."""


class Pattern(NamedTuple):
    """The graph of a reference.

    inputs   the placeholders, one for each tensor among the arguments
    outputs  the nodes that the kernel gives
    size     number of operators
    """

    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    size: int

    @property
    def anchor(self) -> fx.Node:
        """The output that is made from the most operators, from which a search begins: of several the last."""
        return max(reversed(self.outputs), key=lambda output: len(_makers([output])))


class Match(NamedTuple):
    """A place in a traced graph where a kernel may stand.

    arguments  of the kernel: nodes and constants
    outputs    the nodes that the kernel's results replace
    inside     the nodes that it replaces, outputs among them
    """

    arguments: tuple[Any, ...]
    outputs: tuple[fx.Node, ...]
    inside: frozenset[fx.Node]


def _makers(nodes: Iterable[fx.Node], within: Collection[fx.Node] | None = None) -> set[fx.Node]:
    """Nodes, and the nodes that they are made from; of these and of what makes them, those in `within`."""
    found, todo = set[fx.Node](), list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [n for n in node.all_input_nodes if within is None or n in within]
    return found


@cache
def _fake_mode() -> FakeTensorMode:
    """The mode of all tensors that references are traced with."""
    return FakeTensorMode()


def pattern_of(reference: Callable[..., Any], arguments: Sequence[Any]) -> Pattern:
    """The graph of a reference, called with these arguments, of which tensors are on meta. It is simplified as a
    traced model is."""
    given = [a for a in arguments if isinstance(a, torch.Tensor)]
    with _fake_mode():
        tensors = [torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta") for a in given]

    def run(*given: torch.Tensor) -> Any:
        rest = iter(given)
        return reference(*(next(rest) if isinstance(a, torch.Tensor) else a for a in arguments))

    with _fake_mode(), lazy_graph_modules(True), torch.no_grad():
        graph = make_fx(run, pre_dispatch=True)(*tensors).graph
    inputs = tuple(graph.find_nodes(op="placeholder"))
    (results,) = graph.output_node().args
    graph.output_node().args = tuple(results) if isinstance(results, (tuple, list)) else (results,)
    graph.eliminate_dead_code()  # such as torch.promote_types, which gives no tensor
    for node in graph.nodes:
        if node.op != "output":
            _record(node)
    simplify(Traced(graph, "", {}, {}, 1, {}, {}, tuple(node.name for node in inputs)))
    return _pattern(graph)


def _pattern(graph: fx.Graph) -> Pattern:
    return Pattern(tuple(graph.find_nodes(op="placeholder")), graph.output_node().args, len(calls(graph)))  # type: ignore[arg-type]


def _record(node: fx.Node) -> None:
    """Put a record on a node of a pattern, and give it the operator that torch.export would give."""
    if node.target is aten.to.dtype:
        node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": node.args[1]}
    if node.target is aten.chunk.default:
        whole, chunks, dim = (*node.args, 0)[:3]
        size = -(-whole.meta["val"].shape[dim] // chunks)  # type: ignore[union-attr]
        node.target, node.args = aten.split.Tensor, (whole, size, dim)
    value = node.meta["val"]
    values = value if isinstance(value, (tuple, list)) else (value,)
    kind = "input" if node.op == "placeholder" else "op"
    name = node.name if node.op == "placeholder" else op_name(node.target)
    shapes, dtypes = tuple(tuple(v.shape) for v in values), tuple(v.dtype for v in values)
    node.meta[KEY] = Info(kind, name, shapes, dtypes, grad=True)


@cache
def loose(kernel: Kernel, form: Form) -> Pattern:
    """The pattern of a form, of which the first step compares operators."""
    place = next(i for i, other in enumerate(FORMS[kernel.name]) if other is form)
    graph = stored(kernel.name, place)
    return pattern_of(kernel.reference, form.arguments) if graph is None else _pattern(graph)


class _Tensor(NamedTuple):
    """Shape and dtype of an argument that is a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@lru_cache(maxsize=256)
def _exact(kernel: Kernel, arguments: tuple[Any, ...]) -> Pattern:
    """The pattern of a kernel for arguments of a traced graph, which the second step compares."""
    tensors = (torch.empty(a.shape, dtype=a.dtype, device="meta") if isinstance(a, _Tensor) else a for a in arguments)
    return pattern_of(kernel.reference, tuple(tensors))


def candidates(kernel: Kernel, form: Form, node: fx.Node) -> Iterator[tuple[Any, ...]]:
    """The arguments with which a kernel may give `node` as its pattern's anchor, by operators and who reads whom."""
    pattern, given = loose(kernel, form), form.arguments
    constants = {a for a in given if _is_constant(a)}
    for found in _with_outputs(pattern, _matches(pattern.anchor, node, {}, None), None):
        if any(place not in found for place in pattern.inputs):
            continue
        values = _constants(pattern, found, constants)
        leaves = iter(pattern.inputs)
        yield tuple(
            found[next(leaves)] if isinstance(a, torch.Tensor) else values.get(a, a) if _is_constant(a) else a
            for a in given
        )


def _is_constant(argument: object) -> bool:
    """Whether an argument of a form stands for a number that a model chooses."""
    return isinstance(argument, Chosen) or (isinstance(argument, float) and argument not in (0.0, 1.0))


def _constants(pattern: Pattern, found: Found, wanted: Collection[float]) -> dict[float, float]:
    """A form's constants -> the numbers in their places of the traced graph: arguments of their own before those in
    lists, such as a chunk's length in the shape of a reshape."""
    values: dict[float, float] = {}
    leaves = [pair for want, node in found.items() for pair in _pairs(_with_defaults(want), _with_defaults(node)) or ()]
    for a, b in (*leaves, *_numbers(leaves)):
        if isinstance(a, (int, float)) and a in wanted and isinstance(b, (int, float)):
            values.setdefault(a, b)
    return values


def _numbers(pairs: Sequence[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """Pairs of leaves, where those of lists of one length are pairs of their elements."""
    for a, b in pairs:
        if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b):
            yield from zip(a, b, strict=True)
        else:
            yield a, b


def match(kernel: Kernel, arguments: tuple[Any, ...], node: fx.Node) -> Match | None:
    """The match with exactly these arguments whose anchor is `node`; None where the trace of the reference differs or
    another operator reads a value inside that has a gradient. What has none is left to others, and computed again."""
    sizes = (_Tensor(info(a).shape, info(a).dtype) if isinstance(a, fx.Node) else a for a in arguments)
    try:
        pattern = _exact(kernel, tuple(sizes))
    except (RuntimeError, ValueError, TypeError, IndexError):  # the reference takes no such arguments
        return None
    leaves = [a for a in arguments if isinstance(a, fx.Node)]
    places = dict(zip(pattern.inputs, leaves, strict=True))
    for found in _with_outputs(pattern, _matches(pattern.anchor, node, places, _equal), _equal):
        outputs = tuple(found[o] for o in pattern.outputs)
        inside = frozenset(found[n] for n in found if n.op == "call_function")
        read = _read_outside(inside, outputs)
        if not any(info(n).grad for n in read):
            return Match(arguments, outputs, inside - read)
    return None


def _read_outside(inside: frozenset[fx.Node], outputs: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes inside that others need: those that nodes outside read, and what these are made from."""
    read = [n for n in inside.difference(outputs) if any(user not in inside for user in n.users)]
    return _makers(read, within=inside).difference(outputs)


def _with_outputs(pattern: Pattern, partial: Iterator[Found], equal: Callable[..., bool] | None) -> Iterator[Found]:
    """The matches of a pattern\'s anchor, extended by its other outputs."""
    for found in partial:
        for output in pattern.outputs:
            places = [] if output in found else _below(output, found)
            found = next((more for place in places for more in _matches(output, place, found, equal)), found)
        if all(output in found for output in pattern.outputs):
            yield found


def _below(want: fx.Node, found: Found) -> list[fx.Node]:
    """The nodes that may be `want`: by its first operand, readers of a node that was found."""
    if want in found:
        return [found[want]]
    operands = [n for n in want.all_input_nodes if n.op == "call_function"] or want.all_input_nodes
    return [user for place in _below(operands[0], found) for user in place.users] if operands else []


def _matches(want: fx.Node, node: fx.Node, found: Found, equal: Callable[..., bool] | None) -> Iterator[Found]:
    """Every way to extend `found` so that `node` is `want`. `equal`, if given, compares constants."""
    if want in found:
        if found[want] is node:
            yield found
        return
    if want.op == "placeholder":
        yield {**found, want: node}
        return
    if node.op != "call_function" or info(node).name != info(want).name:
        return
    orders = [_with_defaults(node)]
    if info(want).name in COMMUTATIVE and len(node.args) == 2:
        orders.append((*node.args[::-1], *orders[0][2:]))
    for args in orders:
        pairs = _pairs((_with_defaults(want), want.kwargs), (args, node.kwargs))
        if pairs is None or (equal and not all(equal(want, a, b) for a, b in pairs if not isinstance(a, fx.Node))):
            continue
        nodes = [(a, b) for a, b in pairs if isinstance(a, fx.Node)]
        yield from _all(nodes, {**found, want: node}, equal)


def _all(pairs: Sequence[tuple[fx.Node, fx.Node]], found: Found, equal: Callable[..., bool] | None) -> Iterator[Found]:
    if not pairs:
        yield found
        return
    for extended in _matches(*pairs[0], found, equal):
        yield from _all(pairs[1:], extended, equal)


def _with_defaults(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments of a call, those included that were left to their defaults. Whether cuDNN may be used is
    as by default, which changes no value; so is whether results of topk are sorted, where no place among them is read:
    any order is right if they need not be."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.args
    names, defaults = _parameters(node.target)
    args = (*node.args, *defaults[len(node.args) :])
    if not names:
        return args
    placed = any(info(user).name in PLACES for pick in node.users for user in pick.users if user.op == "call_function")
    ignored = {i for i, name in names.items() if name != "sorted" or not placed}
    return tuple(defaults[i] if i in ignored else given for i, given in enumerate(args))


@cache
def _parameters(target: torch._ops.OpOverload) -> tuple[dict[int, str], tuple[Any, ...]]:
    """Of an operator's positional parameters those that may be as by default, by their places; and all defaults."""
    schema = [a for a in target._schema.arguments if not a.kwarg_only]
    names = {i: a.name for i, a in enumerate(schema) if "cudnn" in a.name or a.name == "sorted"}
    return names, tuple(a.default_value for a in schema)


def _pairs(want: Any, given: Any) -> list[tuple[Any, Any]] | None:
    """Leaf by leaf, what two trees of arguments have; None where their forms differ or one has a node alone. A list
    without nodes is a leaf."""
    if not _has_node(want) and not _has_node(given):
        return [(want, given)]
    if isinstance(want, (tuple, list)) and isinstance(given, (tuple, list)):
        if len(want) != len(given):
            return None
        parts = [_pairs(a, b) for a, b in zip(want, given, strict=True)]
    elif isinstance(want, dict) and isinstance(given, dict):
        if want.keys() != given.keys():
            return None
        parts = [_pairs(want[key], given[key]) for key in want]
    elif isinstance(want, fx.Node) != isinstance(given, fx.Node):
        return None
    else:
        return [(want, given)]
    return None if None in parts else [pair for part in parts for pair in part]  # type: ignore[union-attr]


def _has_node(tree: Any) -> bool:
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    return any(map(_has_node, tree)) if isinstance(tree, (tuple, list)) else isinstance(tree, fx.Node)


def _equal(node: fx.Node, want: Any, given: Any) -> bool:
    """Whether two constants of a call are the same: a dim may be counted from either end."""
    if isinstance(want, (list, tuple)) and isinstance(given, (list, tuple)):
        return len(want) == len(given) and all(_equal(node, a, b) for a, b in zip(want, given, strict=True))
    if isinstance(want, bool) != isinstance(given, bool):
        return False
    rank = len(info(node).shape)
    dims = isinstance(want, int) and isinstance(given, int) and min(want, given) < 0 <= max(want, given) < rank
    return want == given or (dims and want % rank == given % rank)
