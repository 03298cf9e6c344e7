"""fx.Graph a stage -> source text: one readable Python module per stage.

Every line is one value. Views and scalars are folded into the line that uses them; what the reader should know of a
split or a collective stands behind it. Equal blocks are written once, as a class, and looped over.
"""

from __future__ import annotations

import builtins
import itertools
import keyword
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from autopart.graph import Info, info
from autopart.relayout import RELAYOUTS
from autopart.stages import StageGraph

WIDTH = 100
RESERVED = {*keyword.kwlist, *dir(builtins), *(row.function for row in RELAYOUTS.values()), "torch", "nn", "F", "layer",
            "rms_norm", "weight", "buffer", "recomputed", "self", "groups", "name"}  # fmt: skip

INFIX = {
    "add.Tensor": "+", "sub.Tensor": "-", "mul.Tensor": "*", "div.Tensor": "/", "pow.Tensor_Scalar": "**",
    "eq.Tensor": "==", "eq.Scalar": "==", "ne.Tensor": "!=", "ne.Scalar": "!=", "lt.Tensor": "<",
    "lt.Scalar": "<", "le.Tensor": "<=", "le.Scalar": "<=", "gt.Tensor": ">", "gt.Scalar": ">",
    "ge.Tensor": ">=", "ge.Scalar": ">=", "__and__.Tensor": "&", "bitwise_and.Tensor": "&",
    "__or__.Tensor": "|", "bitwise_or.Tensor": "|",
}  # fmt: skip
METHODS = {
    "reshape": "reshape", "view": "view", "transpose.int": "transpose", "permute": "permute", "unsqueeze": "unsqueeze",
    "expand": "expand", "t": "t", "masked_fill.Scalar": "masked_fill", "cumsum": "cumsum",
    "squeeze.dim": "squeeze", "gather": "gather", "split.Tensor": "split", "split_with_sizes": "split",
}  # fmt: skip
TORCH = {
    "abs", "cos", "sin", "tanh", "exp", "log", "rsqrt", "sqrt", "sigmoid", "matmul", "mm", "bmm", "where.self",
    "where.ScalarOther", "neg", "full_like", "zeros_like", "min.other", "max.other", "maximum", "minimum",
    "slice_scatter", "select_scatter",
}  # fmt: skip
FUNCTIONAL = {"linear", "relu", "silu", "conv1d", "conv2d", "conv3d"}
FACTORIES = {"arange", "full", "zeros", "ones", "arange.start", "arange.start_step"}
ATOM, UNARY, BINARY = 3, 2, 1
"""How tightly an expression binds."""


@dataclass(frozen=True)
class Text:
    """An expression with its precedence."""

    code: str
    binds: int = ATOM

    def within(self, binds: int) -> str:
        """The expression as an operand of something that binds so tightly."""
        return self.code if self.binds >= binds else f"({self.code})"


@dataclass
class Scope:
    """One function being written: names in use, and what each node is called."""

    names: dict[fx.Node, Text] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    lines: list[str] = field(default_factory=list)

    def name(self, node: fx.Node, wanted: str) -> str:
        """A fresh name for a node."""
        wanted = re.sub(r"\W", "_", wanted) or "value"
        wanted = f"_{wanted}" if wanted[0].isdigit() else wanted
        numbered = (f"{wanted}_{i}" for i in itertools.count(2))
        name = wanted
        while name in self.taken or name in RESERVED:
            name = next(numbered)
        self.taken.add(name)
        self.names[node] = Text(name)
        return name

    def follow(self, node: fx.Node, source: fx.Node, wanted: str) -> str:
        """The name of `source`, which nothing else uses, if it is one that `node` wants; else a fresh one."""
        name = self.names[source].code if source in self.names else ""
        if len(source.users) == 1 and name in self.taken and re.fullmatch(rf"{re.escape(wanted)}(_\d+)?", name):
            self.names[node] = Text(name)
            return name
        return self.name(node, wanted)


def emit(stage: StageGraph, stages: int, title: str, mesh: str, recompute: bool, classes: Mapping[str, str]) -> str:
    """The source of one stage's module; `classes` gives the user's class of every module by its path."""
    return _Emitter(stage, stages, title, mesh, recompute, classes).text()


@dataclass(frozen=True)
class Block:
    """Runs of a stage that are the same program: their labels, nodes, and the values from outside."""

    name: str
    labels: tuple[str, ...]
    runs: tuple[tuple[fx.Node, ...], ...]
    outside: tuple[tuple[fx.Node, ...], ...]
    outputs: tuple[tuple[fx.Node, ...], ...]


class _Emitter:
    def __init__(
        self, stage: StageGraph, stages: int, title: str, mesh: str, recompute: bool, classes: Mapping[str, str]
    ) -> None:
        self.stage, self.stages, self.title, self.mesh = stage, stages, title, mesh
        self.recompute, self.classes = recompute, classes
        self.used: set[str] = set()
        self.axes: set[str] = set()

    def text(self) -> str:
        stage = self.stage
        blocks = _blocks(stage, 1 if self.recompute else 2, self.classes)
        classes = [part for block in blocks for part in ["", "", *self._block(block)]]
        body = self._stage(blocks)
        runtime = sorted({"Groups", "weight", *self.used})
        header = [
            f'"""{self.title}, stage {stage.index} of {self.stages} on {self.mesh}. Written by autopart.',
            "",
            "Placements of a weight along an axis: S0 split along dim 0; R whole, with whole gradients; C whole, with",
            "gradients that the runtime sums over the axis at the end of a step.",
            '"""',
            "",
            "import torch",
            "from torch import nn",
            "from torch.nn import functional as F",
            "",
            *(["from autopart.kernels.rms_norm import rms_norm"] if "rms_norm" in self.used else []),
            "from autopart.runtime import " + ", ".join(n for n in runtime if n != "rms_norm"),
        ]
        text = "\n".join([*header, *classes, "", "", *body]) + "\n"
        code = text.replace("from torch.nn", "").replace("import torch", "")
        for module, alias in (("import torch\n", "torch."), ("from torch.nn import functional as F\n", "F.")):
            if not re.search(rf"(?<![\w.]){re.escape(alias)}", code):
                text = text.replace(module, "")
        return text

    # ---- expressions -------------------------------------------------------------------------------------

    def _value(self, scope: Scope, arg: Any) -> Text:
        if isinstance(arg, fx.Node):
            if arg not in scope.names:
                scope.names[arg] = self._expression(scope, arg)
            return scope.names[arg]
        if isinstance(arg, (list, tuple)):
            return Text("[" + ", ".join(self._value(scope, a).code for a in arg) + "]")
        if isinstance(arg, float) and arg in (float("inf"), float("-inf")):
            return Text(f'float("{arg}")')
        return Text(repr(arg), ATOM if not (isinstance(arg, (int, float)) and arg < 0) else UNARY)

    def _call(self, scope: Scope, function: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Text:
        parts = [self._value(scope, a).code for a in args]
        parts += [f"{k}={self._value(scope, v).code}" for k, v in kwargs.items()]
        return Text(f"{function}({', '.join(parts)})")

    def _expression(self, scope: Scope, node: fx.Node) -> Text:
        record = info(node)
        args, kwargs = _trim(node), dict(node.kwargs)
        family, _, name = record.name.partition(".")
        special = SPECIAL.get(record.name)
        if special is not None:
            return special(self, scope, node, args, kwargs)
        if family == "runtime":
            self.used.add(name)
            axes = [a for a in args if isinstance(a, str) and a in self.mesh_axes]
            self.axes.update(axes)
            return self._call(scope, name, [Axis(a) if a in axes and isinstance(a, str) else a for a in args], kwargs)
        if record.name == "autopart.rms_norm":
            self.used.add("rms_norm")
            return self._call(scope, "rms_norm", args if args[-1] is not None else args[:-1], kwargs)
        if family == "aten" and name in INFIX and len(args) == 2 and not kwargs:
            return self._infix(scope, INFIX[name], *args)
        if family == "aten" and name in METHODS and not kwargs:
            self_text = self._value(scope, args[0]).within(ATOM)
            rest = args[1] if name in ("reshape", "view", "expand", "permute") else args[1:]
            return Text(f"{self_text}.{METHODS[name]}({', '.join(self._value(scope, a).code for a in rest)})")
        if family == "aten" and name in FUNCTIONAL:
            return self._call(scope, f"F.{name.split('.')[0]}", args, kwargs)
        if family == "aten" and name in FACTORIES:
            return self._call(scope, f"torch.{name.split('.')[0]}", args, {**kwargs, "device": Axis("device")})
        if family == "aten" and name in TORCH:
            return self._call(scope, f"torch.{name.split('.')[0]}", args, kwargs)
        overload = str(node.target).removesuffix(".default")
        return self._call(scope, f"torch.ops.{overload}", args, kwargs)

    @property
    def mesh_axes(self) -> set[str]:
        return set(re.findall(r"(\w+)=", self.mesh))

    def _infix(self, scope: Scope, operator: str, left: Any, right: Any) -> Text:
        a, b = self._value(scope, left), self._value(scope, right)
        return Text(f"{a.within(UNARY)} {operator} {b.within(UNARY)}", BINARY)

    # ---- lines -------------------------------------------------------------------------------------------

    def _write(self, scope: Scope, nodes: Sequence[fx.Node], needed: set[fx.Node]) -> None:
        """Lines for `nodes`; `needed` are those whose values are used elsewhere."""
        inside = set(nodes)
        last_source = ""
        for node in nodes:
            record = info(node)
            if record.name == "autopart.getitem" and node in scope.names:
                continue
            if record.name in ("aten.split.Tensor", "aten.split_with_sizes"):
                self._split(scope, node)
                continue
            if _joins_bias(node) and node not in needed:
                continue
            inline = (
                len(node.users) == 1
                and node not in needed
                and next(iter(node.users)) in inside
                and (record.name in INLINE or _scalar_infix(node))
            )
            text = self._expression(scope, node)
            if inline and len(text.code) < WIDTH // 2 and not record.note.startswith(("forward", "backward")):
                scope.names[node] = text
                continue
            first = node.args[0] if node.args else None
            while isinstance(first, fx.Node) and first in inside and self._inlined(scope, first):
                first = first.args[0]
            follows = isinstance(first, fx.Node) and first in inside and first not in needed
            name = scope.follow(node, first, _wanted(node)) if follows else scope.name(node, _wanted(node))  # type: ignore[arg-type]
            source = record.source if record.source != last_source else ""
            last_source = record.source or last_source
            scope.lines.append(_comment(f"{name} = {text.code}", record.note, source))

    def _inlined(self, scope: Scope, node: fx.Node) -> bool:
        """Whether the node has no line of its own."""
        written = node in scope.names and scope.names[node].code not in scope.taken
        return written and len(node.users) == 1 and bool(node.args) and not _scalar_infix(node)

    def _split(self, scope: Scope, node: fx.Node) -> None:
        text = self._expression(scope, node)
        picks = {u.args[1]: u for u in node.users}
        names = []
        for index in range(len(info(node).shapes)):
            pick = picks.get(index)
            names.append(scope.name(pick, f"{_wanted(node)}_{index}") if pick is not None else "_")
        scope.lines.append(_comment(f"{', '.join(names)} = {text.code}", "", info(node).source))

    # ---- classes -----------------------------------------------------------------------------------------

    def _weights(self, parameters: Sequence[fx.Node], scope: Scope, prefix: str, variable: str) -> list[str]:
        lines = []
        for node in parameters:
            record = info(node)
            own = record.name.removeprefix(f"{prefix}.") if prefix else record.name
            attribute = own.replace(".", "_")
            scope.names[node] = Text(f"self.{attribute}")
            shape = list(record.whole)
            placed = "".join(f', {axis}="{p}"' for axis, p in record.placed)
            quoted = f'f"{{{variable}}}.{own}"' if prefix and own != record.name else f'"{record.name}"'
            kind = "weight" if record.kind == "parameter" else "buffer"
            self.used.add(kind)
            dtype = "" if record.dtype == torch.float32 else f", dtype={record.dtype}"
            frozen = "" if record.grad or kind == "buffer" else ", requires_grad=False"
            lines.append(_comment(f"self.{attribute} = {kind}(groups, {quoted}, {shape}{dtype}{frozen}{placed})"))
        return lines

    def _block(self, block: Block) -> list[str]:
        scope = Scope()
        nodes = block.runs[0]
        used = dict.fromkeys(n for node in nodes for n in node.all_input_nodes)
        parameters = [n for n in used if info(n).kind in ("parameter", "buffer")]
        weights = self._weights(parameters, scope, block.labels[0], "name")
        arguments = []
        for outside in block.outside[0]:
            arguments.append(scope.name(outside, _argument(outside)))
        self._write(scope, nodes, set(block.outputs[0]))
        results = [scope.names[o].code for o in block.outputs[0]]
        names = f"{block.labels[0]} .. {block.labels[-1]}" if len(block.labels) > 1 else block.labels[0]
        return [
            f"class {block.name}(nn.Module):",
            f'    """{names}"""',
            "",
            *_init("groups: Groups, name: str", weights, scope.lines),
            "",
            f"    def forward(self, {', '.join(arguments)}):",
            *_indent(scope.lines),
            f"        return {', '.join(results)}",
        ]

    def _stage(self, blocks: Sequence[Block]) -> list[str]:
        stage, scope = self.stage, Scope()
        of_run = {nodes: (block, i) for block in blocks for i, nodes in enumerate(block.runs)}
        flat = [n for label, nodes in stage.runs if tuple(nodes) not in of_run for n in nodes]
        used = dict.fromkeys(n for node in flat for n in node.all_input_nodes)
        placeholders = [n for n in stage.graph.nodes if n.op == "placeholder"]
        parameters = [n for n in placeholders if n in used and info(n).kind in ("parameter", "buffer")]
        weights = self._weights(parameters, scope, "", "")
        arguments = [
            scope.name(n, info(n).name if info(n).kind == "input" else _argument(n))
            for kind in ("input", "received")
            for n in placeholders
            if info(n).kind == kind
        ]
        output = stage.graph.output_node().args[0]
        results = list(output) if isinstance(output, (list, tuple)) else [output]
        needed = {r for r in results if isinstance(r, fx.Node)}
        made = []
        for block in blocks:
            attribute = _plural(block.labels[0])
            made.append(
                f"self.{attribute} = nn.ModuleList({block.name}(groups, name) for name in {_table_name(block)})"
            )
        valid = self._valid(scope)
        written: set[Block] = set()
        pending: list[fx.Node] = []
        for _, nodes in stage.runs:
            found = of_run.get(tuple(nodes))
            if found is None:
                pending += nodes
                continue
            self._write(scope, pending, needed | _used_outside(pending))
            pending = []
            if found[0] not in written:
                written.add(found[0])
                self._loop(scope, found[0], needed)
        self._write(scope, pending, needed | _used_outside(pending))
        returned = ", ".join(self._value(scope, r).code for r in results)
        tables = [line for block in blocks for line in _table(_table_name(block), block.labels)]
        return [
            *tables,
            *(["", ""] if tables else []),
            "class Stage(nn.Module):",
            f'    """Stage {stage.index}: {"gives what it sends" if stage.sent else "gives the loss"}."""',
            "",
            f"    inputs = {stage.inputs!r}",
            f"    received = {[c.name for c in stage.received]!r}",
            f"    sent = {[c.name for c in stage.sent]!r}",
            "",
            *_init("groups: Groups", [*weights, *made], [*scope.lines, *valid[1]], bool(stage.valid)),
            "",
            f"    def forward(self, {', '.join(arguments)}):",
            *_indent(scope.lines),
            f"        return {returned}",
            *valid[0],
        ]

    def _loop(self, scope: Scope, block: Block, needed: set[fx.Node]) -> None:
        """Calls of a block's modules: a loop where the output of one is the input of the next."""
        attribute = _plural(block.labels[0])
        self_call = "layer"
        chained = [
            j
            for j in range(len(block.outside[0]))
            if len(block.runs) > 1
            and all(block.outside[i][j] in block.outputs[i - 1] for i in range(1, len(block.runs)))
        ]
        first = [self._value(scope, n).code for n in block.outside[0]]
        if len(block.outputs[0]) == 1 and len(chained) == 1:
            name = scope.name(block.outputs[-1][0], "hidden")
            arguments = [name if j in chained else f for j, f in enumerate(first)]
            if first[chained[0]] != name:
                scope.lines.append(f"{name} = {first[chained[0]]}")
            call = self._checkpointed(self_call, arguments)
            scope.lines += [f"for layer in self.{attribute}:", f"    {name} = {call}"]
            return
        for i, outputs in enumerate(block.outputs):
            arguments = [self._value(scope, n).code for n in block.outside[i]]
            names = [scope.name(o, "hidden") for o in outputs]
            call = self._checkpointed(f"self.{attribute}[{i}]", arguments)
            scope.lines.append(f"{', '.join(names)} = {call}")

    def _checkpointed(self, function: str, arguments: Sequence[str]) -> str:
        if not self.recompute:
            return f"{function}({', '.join(arguments)})"
        self.used.add("recomputed")
        return f"recomputed({', '.join([function, *arguments])})"

    def _valid(self, outer: Scope) -> tuple[list[str], list[str]]:
        """A method that counts the valid targets of a micro-batch."""
        if not self.stage.valid:
            return [], []
        scope = Scope(names={k: v for k, v in outer.names.items() if k.op == "placeholder"})
        inputs = [n for n in self.stage.graph.nodes if n.op == "placeholder" and info(n).kind == "input"]
        lines: list[str] = []
        results = []
        for valid in self.stage.valid:
            nodes = _ancestors(valid.targets)
            ordered = [n for n in self.stage.graph.nodes if n in nodes and n.op == "call_function"]
            self._write(scope, ordered, {valid.targets})
            count = f"({self._value(scope, valid.targets).within(UNARY)} != {valid.ignore_index}).sum()"
            results.append(f'"{valid.loss}": (int({count}), {list(valid.axes)!r})')
        lines += scope.lines
        return [
            "",
            f"    def count_valid(self, {', '.join(outer.names[n].code for n in inputs)}):",
            '        """Targets that count towards each mean of a micro-batch, and the axes that split them."""',
            *_indent(lines),
            f"        return {{{', '.join(results)}}}",
        ], lines


class Axis(str):
    """An attribute of `self` among the arguments of an emitted call."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"self.{self!s}"


def _init(parameters: str, lines: Sequence[str], body: Sequence[str], valid: bool = False) -> list[str]:
    axes = [a for a in ("dp", "tp", "device") if any(re.search(rf"self\.{a}\b", line) for line in body)]
    return [
        f"    def __init__(self, {parameters}):",
        "        super().__init__()",
        *[f"        self.{axis} = groups.{axis}" for axis in axes],
        *(["        self.valid = {}"] if valid else []),
        *_indent(lines),
    ]


def _indent(lines: Sequence[str]) -> list[str]:
    return [f"        {part}" for line in lines for part in line.split("\n")]


def _table_name(block: Block) -> str:
    return _plural(block.labels[0]).upper()


def _table(name: str, labels: Sequence[str]) -> list[str]:
    stem, numbers = labels[0].rpartition(".")[0], [label.rpartition(".")[2] for label in labels]
    in_row = [int(n) for n in numbers] == list(range(int(numbers[0]), int(numbers[0]) + len(numbers)))
    if in_row and all(label.rpartition(".")[0] == stem for label in labels):
        return [f'{name} = [f"{stem}.{{i}}" for i in range({numbers[0]}, {int(numbers[0]) + len(numbers)})]']
    return [f"{name} = {list(labels)!r}"]


def _plural(label: str) -> str:
    return re.sub(r"\W", "_", label.rpartition(".")[0]) or "layers"


def _argument(node: fx.Node) -> str:
    return "hidden" if info(node).grad else _wanted(node)


def _used_outside(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    inside = set(nodes)
    return {n for n in nodes if any(u not in inside for u in n.users)}


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen, todo = {node}, [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                todo.append(source)
    return seen


def _comment(code: str, *notes: str) -> str:
    """The line with its notes behind it; a long one broken at the arguments of its last call."""
    text = "  ".join(n for n in notes if n)
    if len(code) <= WIDTH:
        return f"{code:<64}  # {text}" if text else code
    head, inner, tail = _outer_call(code)
    if not inner:
        return f"{code}  # {text}" if text else code
    note = f"  # {text}" if text else ""
    indent = " " * 4
    wrapped = textwrap.wrap(
        inner, WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join([f"{head}{note}", *wrapped, tail])


def _outer_call(code: str) -> tuple[str, str, str]:
    """``name = f(`` , the arguments, and ``)`` of a line that is one call; empty where it is none."""
    start = code.find("(")
    if start < 0 or not code.endswith(")"):
        return code, "", ""
    depth = 0
    for i, c in enumerate(code[start:], start):
        depth += (c in "([") - (c in ")]")
        if depth == 0:
            return (code[: start + 1], code[start + 1 : -1], ")") if i == len(code) - 1 else (code, "", "")
    return code, "", ""


INLINE = {f"aten.{n}" for n in METHODS if n not in ("split.Tensor", "split_with_sizes")} | {
    "aten.slice.Tensor", "aten.select.int", "aten.neg", "aten._to_copy", "aten.arange", "aten.cos", "aten.sin",
    "runtime.slice_of",
}  # fmt: skip


def _scalar_infix(node: fx.Node) -> bool:
    name = info(node).name.partition(".")[2]
    return name in INFIX and sum(isinstance(a, fx.Node) for a in node.args) == 1


def _joins_bias(node: fx.Node) -> bool:
    """A product whose only use is the addition of its bias: both make one F.linear."""
    if info(node).name != "aten.linear" or len(node.users) != 1:
        return False
    return _bias_of(next(iter(node.users)), node) is not None


def _bias_of(add: fx.Node, product: fx.Node) -> fx.Node | None:
    """The bias if `add` adds one to `product`."""
    if info(add).name != "aten.add.Tensor" or add.args[0] is not product or len(add.args) != 2:
        return None
    bias = add.args[1]
    is_bias = isinstance(bias, fx.Node) and info(bias).kind == "parameter" and len(info(bias).shape) == 1
    return bias if is_bias else None  # type: ignore[return-value]


NOUNS = {"scaled_dot_product_attention": "attention", "cross_entropy_loss": "loss", "mean_cross_entropy": "loss",
         "vocab_cross_entropy": "loss", "_to_copy": "cast"}  # fmt: skip


def _wanted(node: fx.Node) -> str:
    """A name a person might choose: the layer's for products and norms, else the operator's."""
    record: Info = info(node)
    if record.kind == "received":
        return record.name
    name = record.name.split(".")[1] if "." in record.name else record.name
    layer = next((part for part in reversed(record.module.split(".")) if part and not part.isdigit()), "")
    products = ("linear", "matmul", "mm", "layer_norm", "rms_norm", "embedding", "conv2d", "vocab_embedding")
    if record.name.startswith("runtime.") and name in ("mean_cross_entropy", "vocab_cross_entropy"):
        return "loss"
    if (name in products or _adds_bias(node)) and layer:
        return layer
    if record.name.startswith("runtime.") or name in FOLLOWING:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return _wanted(source) if source.op == "call_function" else _plain(info(source).name)
    return NOUNS.get(name, name)


def _plain(name: str) -> str:
    """The last part of a parameter's, input's or received value's name."""
    parts = name.split(".")
    return parts[-2] if parts[-1] in ("weight", "bias") and len(parts) > 1 else parts[-1]


FOLLOWING = {
    "reshape",
    "transpose.int",
    "transpose",
    "permute",
    "unsqueeze",
    "expand",
    "t",
    "squeeze",
    "slice",
    "select",
}
"""Operators whose result goes by the name of what they reshape."""


def _adds_bias(node: fx.Node) -> bool:
    other = node.args[1] if len(node.args) > 1 else None
    return info(node).name == "aten.add.Tensor" and isinstance(other, fx.Node) and info(other).kind == "parameter"


def _trim(node: fx.Node) -> list[Any]:
    """Positional arguments without trailing ones that are the schema's defaults."""
    args = list(node.args)
    if isinstance(node.target, torch._ops.OpOverload):
        schema = [a for a in node.target._schema.arguments if not a.kwarg_only]
        while args and len(args) <= len(schema) and schema[len(args) - 1].has_default_value():
            if isinstance(args[-1], fx.Node) or args[-1] != schema[len(args) - 1].default_value:
                break
            args.pop()
    return args


# ---- operators with a spelling of their own ------------------------------------------------------------------


def _linear_bias(emitter: _Emitter, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Text:
    product = args[0]
    if isinstance(product, fx.Node) and product not in scope.names and _joins_bias(product):
        x, w = product.args
        return emitter._call(scope, "F.linear", [x, w, args[1]], {})
    if len(args) == 2 and not kwargs:
        return emitter._infix(scope, "+", *args)
    return emitter._call(scope, "torch.add", args[:2], {"alpha": args[2]} if len(args) > 2 else kwargs)


def _embedding(emitter: _Emitter, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Text:
    weight, ids, *rest = args
    extra = {"padding_idx": rest[0]} if rest and rest[0] != -1 else {}
    return emitter._call(scope, "F.embedding", [ids, weight], extra)


def _attention(emitter: _Emitter, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Text:
    names = ("attn_mask", "dropout_p", "is_causal")
    defaults = (None, 0.0, False)
    named = {k: v for k, v, d in zip(names, args[3:], defaults, strict=False) if isinstance(v, fx.Node) or v != d}
    return emitter._call(scope, "F.scaled_dot_product_attention", args[:3], {**named, **kwargs})


def _gelu(emitter: _Emitter, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Text:
    return emitter._call(scope, "F.gelu", args[:1], kwargs)


def _cast(emitter: _Emitter, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Text:
    return Text(f"{emitter._value(scope, args[0]).within(ATOM)}.to({kwargs['dtype']})")


def _cat(emitter: _Emitter, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Text:
    return emitter._call(scope, "torch.cat", args[:1], {"dim": args[1]} if len(args) > 1 else {})


def _slice(emitter: _Emitter, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Text:
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
    return Text(f"{emitter._value(scope, source).within(ATOM)}[{', '.join(index)}]")


def _select(emitter: _Emitter, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Text:
    dim = args[1] % len(info(args[0]).shape)
    return Text(f"{emitter._value(scope, args[0]).within(ATOM)}[{', '.join([':'] * dim + [str(args[2])])}]")


def _neg(emitter: _Emitter, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Text:
    return Text(f"-{emitter._value(scope, args[0]).within(ATOM)}", UNARY)


def _pad(emitter: _Emitter, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Text:
    named = {"value": int(args[3]) if not info(node).dtype.is_floating_point else args[3]} if len(args) > 3 else {}
    return emitter._call(scope, "F.pad", args[:2], named)


def _getitem(emitter: _Emitter, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Text:
    return Text(f"{emitter._value(scope, args[0]).within(ATOM)}[{args[1]}]")


def _layer_norm(emitter: _Emitter, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Text:
    return emitter._call(scope, "F.layer_norm", args[:5], {})


def _softmax(emitter: _Emitter, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Text:
    function = info(node).name.removeprefix("aten.").removesuffix(".int")
    return emitter._call(
        scope, f"F.{function}", args[:1], {"dim": args[1], **({"dtype": args[2]} if len(args) > 2 else {})}
    )


def _loss(emitter: _Emitter, scope: Scope, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Text:
    reduction = ("none", "mean", "sum")[args[2] if len(args) > 2 else 1]
    return emitter._call(scope, f"F.{info(node).name.removeprefix('aten.')}", args[:2], {"reduction": reduction})


SPECIAL: dict[str, Callable[[_Emitter, Scope, fx.Node, list[Any], dict[str, Any]], Text]] = {
    "aten.add.Tensor": _linear_bias,
    "aten.embedding": _embedding,
    "aten.scaled_dot_product_attention": _attention,
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


# ---- blocks --------------------------------------------------------------------------------------------------


def _blocks(stage: StageGraph, least: int, classes: Mapping[str, str]) -> list[Block]:
    """Consecutive numbered runs that are the same program, `least` or more."""
    groups: list[list[tuple[str, list[fx.Node]]]] = []
    previous: Any = None
    for label, nodes in stage.runs:
        signature = _program(label, nodes) if re.search(r"\.\d+$", label) else None
        if signature is not None and signature == previous:
            groups[-1].append((label, nodes))
        elif signature is not None:
            groups.append([(label, nodes)])
        previous = signature
    blocks: list[Block] = []
    counts: Counter[str] = Counter()
    for group in groups:
        stem = _plural(group[0][0])
        if len(group) < least:
            continue
        counts[stem] += 1
        if counts[stem] > 1:
            continue
        name = _class_name(classes.get(group[0][0], "Layer"), {b.name for b in blocks})
        outside: list[tuple[fx.Node, ...]] = []
        outputs: list[tuple[fx.Node, ...]] = []
        for _, nodes in group:
            inside = set(nodes)
            outside.append(
                tuple(
                    dict.fromkeys(
                        n
                        for node in nodes
                        for n in node.all_input_nodes
                        if n not in inside and info(n).kind not in ("parameter", "buffer")
                    )
                )
            )
            outputs.append(tuple(n for n in nodes if any(u not in inside for u in n.users)))
        blocks.append(
            Block(name, tuple(g[0] for g in group), tuple(tuple(g[1]) for g in group), tuple(outside), tuple(outputs))
        )
    return blocks


def _class_name(wanted: str, taken: set[str]) -> str:
    """The user's class name; numbered where two kinds of block go by one."""
    names = itertools.chain([wanted], (f"{wanted}{i}" for i in itertools.count(2)))
    return next(name for name in names if name not in {*taken, "Stage"})


def _program(label: str, nodes: Sequence[fx.Node]) -> tuple[Any, ...]:
    """What a run does, without its names."""
    local = {n: i for i, n in enumerate(nodes)}
    others: dict[fx.Node, int] = {}

    def token(node: fx.Node) -> str:
        if node in local:
            return f"%{local[node]}"
        record = info(node)
        if record.kind in ("parameter", "buffer"):
            return f"{record.name.removeprefix(label)} {record.placed} {record.whole} {record.dtype}"
        return f"${others.setdefault(node, len(others))}"

    lines = []
    for node in nodes:
        plain = fx.map_arg((node.args, node.kwargs), lambda n: Axis(token(n)))
        used_outside = any(u not in local for u in node.users)
        lines.append((info(node).name, repr(plain), info(node).shapes, used_outside))
    return tuple(lines)
