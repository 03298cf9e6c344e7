"""The intermediate representation: a torch.fx graph with a frozen record, `Info`, on every node.

A graph has placeholders (parameters, buffers, inputs), operator calls, and one output node: the loss, and behind it the
new values of the buffers that the forward pass changes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import fx

from autopart.errors import PartitionError
from autopart.sharding.notation import Shape
from autopart.sharding.rules import Product, flatten, op_name
from autopart.sharding.rules.base import Args

KEY = "autopart"


class Frame(NamedTuple):
    """One call of the forward pass while it was traced: the file, the line in it, and the function's name."""

    file: str
    line: int
    function: str


class KernelBytes(NamedTuple):
    """Bytes of a fused kernel, besides its operands and results.

    workspace          most bytes of temporaries besides gradients
    chunk              such bytes of a chunk, whose size does not grow with the samples
    forward, backward  what is read and written apart from matrix products
    """

    workspace: float = 0.0
    chunk: float = 0.0
    forward: float = 0.0
    backward: float = 0.0


NO_BYTES = KernelBytes()


@dataclass(frozen=True)
class Info:
    """What the passes know of one node.

    kind     "parameter", "buffer", "input" or "op"; in a stage's graph also "received" and "stream"
    name     the parameter's or buffer's name in the model, the batch's key, or the operator's name
    shapes   the shape of each output;  dtypes: its dtype
    grad     whether gradients flow through the node
    layer    the block that it was traced in, a numbered module ("model.layers.3"; `passes.inner_blocks`), or ""
    module   the innermost module ("model.layers.3.mlp.up_proj")
    source   the user's line, "modeling_llama.py:88"
    frames   the calls that lead to that line, the innermost last
    batch    the dim that counts samples, or None
    flops    FLOPs of the forward pass
    product  whether matrix units do the work
    kernel   the operator whose kernels run, where that is not `name`
    matrix   the matrix product that the operator is, or None; in a stage's graph, the product on a rank
    computes the dtype that the product is computed in, where that is not the output's
    grads    whether gradients flow to the matrix product's first factor, and to another factor
    root     the node of whose memory the first output is a view; its own name if it is none; "n:1" for output 1 of n
    saves    the roots whose memory autograd saves for this node's backward
    inner    bytes that autograd saves besides, as a softmax's statistics;  fixed: those that no sample adds to
    view     whether the output is memory of an input, so that the operator takes no time
    logits   whether every path from the node to the loss goes through a cross-entropy, by way of views and casts
    weights  the indices of the operands that are trained parameters, or views of such
    gradient_copies  how many tensors of the size of its largest gradient exist in its backward, if it is no product
    backward_ratio   seconds of its backward / seconds of its forward;  times: iterations of a loop that it stands for
    kernel_bytes     of a fused kernel, besides operands and results
    plain    whether plain torch runs in place of a fused kernel's Triton functions
    outputs  of a fused kernel with several outputs: names of the values that they replaced
    fused    bytes that a fused kernel reads and writes;  unfused: that the operators in its place would; 0 of others

    In a stage's graph, for one rank at the planned micro-batch:
    size     bytes of the outputs;  several: whether several segments use the value
    moved    bytes that the operator reads and writes
    note     what a reader of the emitted line should know
    placed   of a parameter: (axis, placement) for every axis;  whole: its shape on all ranks together
    """

    kind: str
    name: str
    shapes: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...]
    grad: bool = False
    layer: str = ""
    module: str = ""
    source: str = ""
    frames: tuple[Frame, ...] = field(default=(), repr=False)
    batch: int | None = None
    flops: float = 0.0
    product: bool = False
    kernel: str = ""
    matrix: Product | None = None
    computes: torch.dtype | None = None
    grads: tuple[bool, bool] = (False, False)
    root: str = ""
    saves: tuple[str, ...] = ()
    inner: float = 0
    fixed: float = 0
    view: bool = False
    logits: bool = False
    weights: tuple[int, ...] = ()
    gradient_copies: float = 2.0
    size: float = 0.0
    several: bool = False
    moved: float = 0.0
    backward_ratio: int = 0
    kernel_bytes: KernelBytes = NO_BYTES
    plain: bool = False
    times: int = 1
    outputs: tuple[str, ...] = ()
    fused: float = 0.0
    unfused: float = 0.0
    note: str = ""
    placed: tuple[tuple[str, str], ...] = ()
    whole: Shape = ()

    @property
    def shape(self) -> Shape:
        return self.shapes[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.dtypes[0]

    @property
    def model_flops(self) -> float:
        """FLOPs of a matrix product, 0 for other operators. Causal attention counts as attention without a mask."""
        causal = self.matrix is not None and self.matrix.sizes.causal
        return self.times * self.flops * (2 if causal else 1) if self.product else 0.0

    @property
    def output_bytes(self) -> list[int]:
        """Bytes of each output."""
        return [math.prod(shape) * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]

    @property
    def bytes(self) -> int:
        """Bytes of all outputs."""
        return sum(self.output_bytes)


@dataclass
class Traced:
    """A traced model: the graph, and the values of its buffers (None for buffers on the meta device)."""

    graph: fx.Graph
    name: str
    buffers: dict[str, torch.Tensor | None]
    aliases: dict[str, str]
    """Every further name of a tied parameter -> its first name, which the graph uses."""
    micro_batch: int
    classes: dict[str, str]
    """Every module's path -> the name of its class."""
    parameters: dict[str, Shape]
    """Every parameter's first name -> its shape, for the whole model, whether or not the graph reads the parameter."""
    updated: tuple[str, ...] = ()
    """The buffers that the forward pass changes, in the order of the graph's outputs behind the loss."""
    returned: tuple[str, ...] = ()
    """Names of the tensors that the model returns and the loss comes from, as `passes.trace` takes them."""
    near_misses: tuple[str, ...] = ()
    """Places that are like a fused kernel, but differ from it in constants, dtypes or sizes."""
    mixed_at: str = ""
    """The user's line by which the loss is no mean over samples, or the buffer that changes with every micro-batch; ""
    if there is neither."""

    @property
    def mean_of_samples(self) -> bool:
        """Whether the mean of the micro-batches' losses is the loss of the batch."""
        return not self.mixed_at

    @property
    def hash(self) -> str:
        """A hash of the graph's operators, arguments, shapes, dtypes and parameter names."""
        return hashlib.sha256(show(self.graph).encode()).hexdigest()[:16]


def info(node: fx.Node) -> Info:
    """The record of a node."""
    record: Info = node.meta[KEY]
    return record


def has_gradient(dtype: torch.dtype) -> bool:
    """Whether tensors of this dtype can have gradients."""
    return dtype.is_floating_point or dtype.is_complex


def update_info(node: fx.Node, **changes: Any) -> None:
    """Put changed fields into a node's record."""
    node.meta[KEY] = replace(node.meta[KEY], **changes)


def calls(graph: fx.Graph) -> list[fx.Node]:
    """The operator nodes, in order."""
    return [n for n in graph.nodes if n.op == "call_function"]


def placeholders(graph: fx.Graph, kind: str = "") -> list[fx.Node]:
    """The placeholder nodes (of one kind)."""
    return [n for n in graph.nodes if n.op == "placeholder" and kind in ("", info(n).kind)]


def loss_of(graph: fx.Graph) -> fx.Node:
    """The node whose value the graph returns."""
    node = graph.output_node().args[0]
    assert isinstance(node, fx.Node)
    return node


def updates_of(traced: Traced) -> dict[str, fx.Node]:
    """Name of every buffer that the forward pass changes -> the node of its new value."""
    return dict(zip(traced.updated, traced.graph.output_node().args[1:], strict=True))  # type: ignore[arg-type]


def call_args(node: object, name: str) -> tuple[Any, ...]:
    """The arguments of `node` if it is a call of the operator `name`; else ()."""
    found = isinstance(node, fx.Node) and node.op == "call_function" and info(node).name == name
    return tuple(node.args) if found else ()  # type: ignore[attr-defined]


def is_pick(node: fx.Node) -> bool:
    """Whether the node picks one output of an operator with several."""
    return info(node).name == "autopart.getitem"


def value_of(node: fx.Node) -> tuple[fx.Node, int]:
    """The operator that made a node's value, and the index of the output."""
    return (node.args[0], node.args[1]) if is_pick(node) else (node, 0)  # type: ignore[return-value]


def made_by(root: str) -> tuple[str, int]:
    """The name of the node, and the index of the output, whose memory `Info.root` names."""
    name, _, output = root.partition(":")
    return name, int(output or 0)


def shape_args(node: fx.Node) -> Args:
    """A node's positional arguments with the size of each tensor in place of the tensor, as the rules take them."""
    return tuple(fx.map_arg(tuple(node.args), lambda n: torch.Size(info(n).shape)))


def operands(node: fx.Node) -> list[fx.Node | None]:
    """A node's arguments as the operands of its rule; None for what is no tensor."""
    return [a if isinstance(a, fx.Node) else None for a in flatten(tuple(node.args))]


def with_operands(args: tuple[Any, ...], operands: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of a call with others in the places that `operands` lists; None leaves an argument as it is."""
    assert len(flatten(args)) == len(operands)
    rest = iter(operands)

    def put(arg: Any) -> Any:
        if (
            isinstance(arg, (list, tuple))
            and len(flatten((arg,))) == len(arg)
            and any(isinstance(a, fx.Node) for a in arg)
        ):
            return [put(a) for a in arg]
        operand = next(rest)
        return arg if operand is None else operand

    return tuple(put(a) for a in args)


def meta_of(node: fx.Node) -> Any:
    """A meta tensor of the node's shape and dtype; a tuple of them for an operator with several outputs."""
    record = info(node)
    values = tuple(torch.empty(s, dtype=d, device="meta") for s, d in zip(record.shapes, record.dtypes, strict=True))
    return values[0] if len(values) == 1 else values


def run_on_meta(target: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    """Call an operator on meta tensors. An operator with an argument `device` makes its output on meta."""
    if isinstance(target, torch._ops.OpOverload) and any(a.name == "device" for a in target._schema.arguments):
        kwargs = {**kwargs, "device": "meta"}
    return target(*args, **kwargs)


def new_call(
    graph: fx.Graph, target: Callable[..., Any], args: Args, like: fx.Node, kwargs: dict[str, Any] | None = None
) -> fx.Node:
    """Add an operator call at the insertion point. Its module and source line are those of `like`; its shapes come from
    a run on meta tensors."""
    node = graph.call_function(target, args, kwargs or {})
    meta_args, meta_kwargs = fx.map_arg((args, kwargs or {}), meta_of)
    with torch.no_grad():
        result = run_on_meta(target, meta_args, meta_kwargs)
    outputs = result if isinstance(result, (tuple, list)) else (result,)
    grad = any(info(n).grad for n in node.all_input_nodes)
    node.meta[KEY] = replace(
        info(like),
        kind="op",
        name=op_name(target),
        shapes=tuple(tuple(o.shape) for o in outputs),
        dtypes=tuple(o.dtype for o in outputs),
        grad=grad and has_gradient(outputs[0].dtype),
    )
    return node


def show(graph: fx.Graph) -> str:
    """The graph as text: for every node a line with its operator, arguments, shapes and dtypes."""

    def lines() -> Iterator[str]:
        for node in graph.nodes:
            if node.op == "output":
                yield f"return {', '.join(map(str, node.args))}"
                continue
            record = info(node)
            shapes = ", ".join(
                f"{str(d).removeprefix('torch.')}{list(s)}" for s, d in zip(record.shapes, record.dtypes, strict=True)
            )
            if node.op == "placeholder":
                yield f"{node.name} = {record.kind} {record.name}: {shapes}"
            else:
                kwargs = "".join(f", {k}={v}" for k, v in node.kwargs.items())
                yield f"{node.name} = {record.name}({', '.join(map(str, node.args))}{kwargs}): {shapes}"

    return "\n".join(lines())


def verify(graph: fx.Graph) -> None:
    """Raise PartitionError unless every node has a record that running it on meta tensors confirms."""
    graph.lint()
    for node in graph.nodes:
        if node.op != "output" and KEY not in node.meta:
            raise PartitionError(f"node {node.name} has no record", "a pass made it and did not say what it is")
        if node.op != "call_function":
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), meta_of)
        try:
            with torch.no_grad():
                result = run_on_meta(node.target, args, kwargs)
        except Exception as error:
            raise PartitionError(f"node {node.name} does not run", f"{info(node).name}: {error}") from error
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        shapes = tuple(tuple(o.shape) for o in outputs)
        if shapes != info(node).shapes:
            raise PartitionError(f"node {node.name} has shapes {shapes}", f"its record says {info(node).shapes}")
