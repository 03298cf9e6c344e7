"""How an operator's call is written in emitted code: tables of operators by form, and functions for special forms."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from autopart.ir.graph import has_gradient, info
from autopart.kernels.attention import attention
from autopart.kernels.table import kernel_of
from autopart.passes.codegen.scope import ATOM, BINARY, UNARY, Expression, Scope

INFIX = {
    "add.Tensor": "+", "sub.Tensor": "-", "mul.Tensor": "*", "div.Tensor": "/", "pow.Tensor_Scalar": "**",
    "eq.Tensor": "==", "eq.Scalar": "==", "ne.Tensor": "!=", "ne.Scalar": "!=", "lt.Tensor": "<",
    "lt.Scalar": "<", "le.Tensor": "<=", "le.Scalar": "<=", "gt.Tensor": ">", "gt.Scalar": ">",
    "ge.Tensor": ">=", "ge.Scalar": ">=", "__and__.Tensor": "&", "bitwise_and.Tensor": "&",
    "__or__.Tensor": "|", "bitwise_or.Tensor": "|",
}  # fmt: skip
"""Operators -> the Python operator between their two arguments."""
VIEWS = {
    "reshape": "reshape", "view": "view", "transpose.int": "transpose", "permute": "permute", "unsqueeze": "unsqueeze",
    "expand": "expand", "t": "t", "masked_fill.Scalar": "masked_fill", "cumsum": "cumsum",
    "squeeze.dim": "squeeze", "gather": "gather", "detach": "detach", "split.Tensor": "split",
    "split_with_sizes": "split",
}  # fmt: skip
"""Operators -> the tensor's method. Most give views, and may be part of another line (INLINE)."""
METHODS = VIEWS | {
    name: name.split(".")[0]
    for name in """sum sum.dim_IntList mean mean.dim amax amin topk sort argsort max.dim min.dim argmax argmin
    unbind.int tril triu index_select flip roll repeat scatter.src scatter.value diff logsumexp square
    new_zeros""".split()
}
TORCH = {
    "abs", "cos", "sin", "tanh", "exp", "log", "rsqrt", "sqrt", "sigmoid", "matmul", "mm", "bmm", "where.self",
    "where.ScalarOther", "neg", "full_like", "zeros_like", "min.other", "max.other", "maximum", "minimum",
    "slice_scatter", "select_scatter", "fill.Tensor",
}  # fmt: skip
"""Operators that are written as functions of `torch`."""
FUNCTIONAL = {"linear", "relu", "silu", "conv1d", "conv2d", "conv3d"}
"""Operators that are written as functions of `torch.nn.functional`."""
FACTORIES = {"arange", "full", "zeros", "ones", "arange.start", "arange.start_step"}
"""Operators that are written as functions of `torch` with the stage's device."""


class Axis(str):
    """The name of an attribute of `self`, as an argument of an emitted call."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"self.{self!s}"


class Printer:
    """Writes expressions, and collects the functions that these call.

    axes   names of the mesh axes, which emitted code reads as `self.tp`
    used   names of the functions of `autopart.runtime` and of the kernels that were written
    """

    def __init__(self, axes: set[str]) -> None:
        self.axes = axes
        self.used: set[str] = set()

    def value(self, scope: Scope, arg: Any) -> Expression:
        """The expression for an argument: a node, a list of arguments, or a constant."""
        if isinstance(arg, fx.Node):
            if arg not in scope.names:
                scope.names[arg] = self.expression(scope, arg)
            return scope.names[arg]
        if isinstance(arg, (list, tuple)):
            return Expression("[" + ", ".join(self.value(scope, a).code for a in arg) + "]")
        if isinstance(arg, float) and arg in (float("inf"), float("-inf")):
            return Expression(f'float("{arg}")')
        return Expression(repr(arg), ATOM if not (isinstance(arg, (int, float)) and arg < 0) else UNARY)

    def call(self, scope: Scope, function: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Expression:
        parts = [self.value(scope, a).code for a in args]
        parts += [f"{k}={self.value(scope, v).code}" for k, v in kwargs.items()]
        return Expression(f"{function}({', '.join(parts)})")

    def expression(self, scope: Scope, node: fx.Node) -> Expression:
        """The expression that computes a node from its arguments."""
        record = info(node)
        args, kwargs = trim(node), dict(node.kwargs)
        family, _, name = record.name.partition(".")
        special = SPECIAL.get(record.name)
        if special is not None:
            return special(self, scope, node, args, kwargs)
        if family == "runtime":
            self.used.add(name)
            axes = [a for a in args if isinstance(a, str) and a in self.axes]
            return self.call(scope, name, [Axis(a) if a in axes and isinstance(a, str) else a for a in args], kwargs)
        if kernel := kernel_of(record.name):
            self.used.add(name)
            defaults = [p.default for p in inspect.signature(kernel.function).parameters.values()][: len(args)]
            while not isinstance(args[-1], fx.Node) and args[-1] == defaults.pop():
                args.pop()
            return self.call(scope, name, args, kwargs)
        if family == "aten" and name in INFIX and len(args) == 2 and not kwargs:
            return self.infix(scope, INFIX[name], *args)
        if family == "aten" and name in METHODS and not kwargs:
            self_text = self.value(scope, args[0]).within(ATOM)
            sizes = name in ("reshape", "view", "expand", "permute") and args[1]  # none: the empty list is spelt out
            rest = args[1] if sizes else args[1:]
            return Expression(f"{self_text}.{METHODS[name]}({', '.join(self.value(scope, a).code for a in rest)})")
        if family == "aten" and name in FUNCTIONAL:
            return self.call(scope, f"F.{name.split('.')[0]}", args, kwargs)
        if family == "aten" and name in FACTORIES:
            return self.call(scope, f"torch.{name.split('.')[0]}", args, {**kwargs, "device": Axis("device")})
        if family == "aten" and name in TORCH:
            return self.call(scope, f"torch.{name.split('.')[0]}", args, kwargs)
        overload = str(node.target).removesuffix(".default")
        return self.call(scope, f"torch.ops.{overload}", args, kwargs)

    def infix(self, scope: Scope, operator: str, left: Any, right: Any) -> Expression:
        a, b = self.value(scope, left), self.value(scope, right)
        return Expression(f"{a.within(UNARY)} {operator} {b.within(UNARY)}", BINARY)


INLINE = {f"aten.{n}" for n in VIEWS if n not in ("split.Tensor", "split_with_sizes")} | {
    "aten.slice.Tensor", "aten.select.int", "aten.neg", "aten._to_copy", "aten.arange", "aten.cos", "aten.sin",
    "runtime.slice_of",
}  # fmt: skip
"""Operators that may be part of the line of their only user."""


def is_infix(node: fx.Node) -> bool:
    """Whether the node is a Python operator between two values."""
    return info(node).name.partition(".")[2] in INFIX and len(node.args) == 2 and not node.kwargs


def scalar_infix(node: fx.Node) -> bool:
    """Whether the node is a Python operator between a value and a number."""
    name = info(node).name.partition(".")[2]
    return name in INFIX and sum(isinstance(a, fx.Node) for a in node.args) == 1


def joins_bias(node: fx.Node) -> bool:
    """Whether the only use of a product is the addition of its bias, so that both are written as one F.linear."""
    if info(node).name != "aten.linear" or len(node.users) != 1:
        return False
    return bias_of(next(iter(node.users)), node) is not None


def bias_of(add: fx.Node, product: fx.Node) -> fx.Node | None:
    """The bias that `add` adds to `product`; None where it adds something else."""
    if add.op == "output" or info(add).name != "aten.add.Tensor" or add.args[0] is not product or len(add.args) != 2:
        return None
    bias = add.args[1]
    is_bias = isinstance(bias, fx.Node) and info(bias).kind == "parameter" and len(info(bias).shape) == 1
    return bias if is_bias else None  # type: ignore[return-value]


def trim(node: fx.Node) -> list[Any]:
    """The positional arguments of a call, without trailing ones that have the schema's default value.

    The greatest int64 as the end of a slice is as no end.
    """
    args = [None if type(a) is int and a == sys.maxsize else a for a in node.args]
    if isinstance(node.target, torch._ops.OpOverload):
        schema = [a for a in node.target._schema.arguments if not a.kwarg_only]
        while args and len(args) <= len(schema) and schema[len(args) - 1].has_default_value():
            if isinstance(args[-1], fx.Node) or args[-1] != schema[len(args) - 1].default_value:
                break
            args.pop()
    return args


def _linear_bias(printer: Printer, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Expression:
    product = args[0]
    if isinstance(product, fx.Node) and product not in scope.names and joins_bias(product):
        x, w = product.args
        return printer.call(scope, "F.linear", [x, w, args[1]], {})
    if len(args) == 2 and not kwargs:
        return printer.infix(scope, "+", *args)
    return printer.call(scope, "torch.add", args[:2], {"alpha": args[2]} if len(args) > 2 else kwargs)


def _embedding(printer: Printer, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Expression:
    weight, ids, *rest = args
    extra = {"padding_idx": rest[0]} if rest and rest[0] != -1 else {}
    extra |= {"scale_grad_by_freq": True} if len(rest) > 1 and rest[1] else {}
    return printer.call(scope, "F.embedding", [ids, weight], extra)


def _attention(printer: Printer, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Expression:
    names = ("attn_mask", "dropout_p", "is_causal")
    defaults = (None, 0.0, False)
    named = {k: v for k, v, d in zip(names, args[3:], defaults, strict=False) if isinstance(v, fx.Node) or v != d}
    return printer.call(scope, "F.scaled_dot_product_attention", args[:3], {**named, **kwargs})


def _fused_attention(
    printer: Printer, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]
) -> Expression:
    """Query, key and value by position, the other arguments by name."""
    printer.used.add("attention")
    others = list(inspect.signature(attention).parameters.values())[3 : len(args)]
    named = {o.name: a for o, a in zip(others, args[3:], strict=True) if isinstance(a, fx.Node) or a != o.default}
    return printer.call(scope, "attention", args[:3], named)


def _gelu(printer: Printer, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Expression:
    return printer.call(scope, "F.gelu", args[:1], kwargs)


def _cast(printer: Printer, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Expression:
    return Expression(f"{printer.value(scope, args[0]).within(ATOM)}.to({kwargs['dtype']})")


def _cat(printer: Printer, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Expression:
    return printer.call(scope, "torch.cat", args[:1], {"dim": args[1]} if len(args) > 1 else {})


def _slice(printer: Printer, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Expression:
    defaults: list[Any] = [None, 0, None, None, 1]
    source, dim, start, end, step = [*args, *defaults[len(args) :]]
    whole = info(source).shape
    dim %= len(whole)
    first = "" if not start else str(start)
    last = "" if end is None or end >= whole[dim] else str(end)
    stride = f":{step}" if step != 1 else ""
    index = [":"] * dim + [f"{first}:{last}{stride}"]
    if dim == len(whole) - 1 and dim > 1:
        index = ["...", index[-1]]
    return Expression(f"{printer.value(scope, source).within(ATOM)}[{', '.join(index)}]")


def _select(printer: Printer, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Expression:
    dim = args[1] % len(info(args[0]).shape)
    return Expression(f"{printer.value(scope, args[0]).within(ATOM)}[{', '.join([':'] * dim + [str(args[2])])}]")


def _neg(printer: Printer, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Expression:
    return Expression(f"-{printer.value(scope, args[0]).within(ATOM)}", UNARY)


def _pad(printer: Printer, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Expression:
    mode, value = args[2] if len(args) > 2 else "constant", args[3] if len(args) > 3 else None
    named: dict[str, Any] = {"mode": mode} if mode != "constant" else {}
    if value is not None:
        named["value"] = value if has_gradient(info(node).dtype) else int(value)
    return printer.call(scope, "F.pad", args[:2], named)


def _getitem(printer: Printer, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Expression:
    return Expression(f"{printer.value(scope, args[0]).within(ATOM)}[{args[1]}]")


def _layer_norm(printer: Printer, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Expression:
    return printer.call(scope, "F.layer_norm", args[:5], {})


def _softmax(printer: Printer, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Expression:
    function = info(node).name.removeprefix("aten.").removesuffix(".int")
    return printer.call(
        scope, f"F.{function}", args[:1], {"dim": args[1], **({"dtype": args[2]} if len(args) > 2 else {})}
    )


def _loss(printer: Printer, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Expression:
    reduction = ("none", "mean", "sum")[args[2] if len(args) > 2 else 1]
    return printer.call(scope, f"F.{info(node).name.removeprefix('aten.')}", args[:2], {"reduction": reduction})


SPECIAL: dict[str, Callable[[Printer, Scope, fx.Node, list[Any], dict[str, Any]], Expression]] = {
    "aten.add.Tensor": _linear_bias,
    "aten.embedding": _embedding,
    "aten.scaled_dot_product_attention": _attention,
    "autopart.attention": _fused_attention,
    "aten.gelu": _gelu,
    "aten.layer_norm": _layer_norm,
    "aten.softmax.int": _softmax,
    "aten.log_softmax.int": _softmax,
    "aten.mse_loss": _loss,
    "aten.l1_loss": _loss,
    "aten._to_copy": _cast,
    "aten.cat": _cat,
    "aten.slice.Tensor": _slice,
    "aten.select.int": _select,
    "aten.neg": _neg,
    "aten.pad": _pad,
    "autopart.getitem": _getitem,
}
