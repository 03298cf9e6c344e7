"""fx.Graph a stage -> source text: one readable Python module per stage.

Every line is one value. Views and scalars are folded into the line that uses them; what the reader should know of a
split or a collective stands behind it. Equal blocks are written once, as a class, and looped over.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from autopart.blocks import Block, find_blocks, plural
from autopart.graph import info
from autopart.naming import ATOM, UNARY, Scope, Text, output_name, wanted_name
from autopart.spelling import INLINE, Speller, joins_bias, scalar_infix
from autopart.stages import OWNED, StageGraph

WIDTH = 100


def emit(stage: StageGraph, stages: int, title: str, mesh: str, recompute: bool, classes: Mapping[str, str]) -> str:
    """The source of one stage's module; `classes` gives the user's class of every module by its path."""
    return _Emitter(stage, stages, title, mesh, recompute, classes).text()


class _Emitter:
    def __init__(
        self, stage: StageGraph, stages: int, title: str, mesh: str, recompute: bool, classes: Mapping[str, str]
    ) -> None:
        self.stage, self.stages, self.title, self.mesh = stage, stages, title, mesh
        self.recompute, self.classes = recompute, classes
        self.speller = Speller(set(re.findall(r"(\w+)=", mesh)))

    def text(self) -> str:
        stage = self.stage
        blocks = find_blocks(stage, 1 if self.recompute else 2, self.classes)
        classes = [part for block in blocks for part in ["", "", *self._block(block)]]
        body = self._stage(blocks)
        runtime = sorted({"Groups", "weight", *self.speller.used})
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
            *(["from autopart.kernels.rms_norm import rms_norm"] if "rms_norm" in self.speller.used else []),
            "from autopart.runtime import " + ", ".join(n for n in runtime if n != "rms_norm"),
        ]
        text = "\n".join([*header, *classes, "", "", *body]) + "\n"
        code = text.replace("from torch.nn", "").replace("import torch", "")
        for module, alias in (("import torch\n", "torch."), ("from torch.nn import functional as F\n", "F.")):
            if not re.search(rf"(?<![\w.]){re.escape(alias)}", code):
                text = text.replace(module, "")
        return text

    # ---- lines -------------------------------------------------------------------------------------------

    def _write(self, scope: Scope, nodes: Sequence[fx.Node], needed: set[fx.Node]) -> None:
        """Lines for `nodes`; `needed` are those whose values are used elsewhere."""
        inside = set(nodes)
        last_source = ""
        for node in nodes:
            record = info(node)
            if record.name == "autopart.getitem" and node in scope.names:
                continue
            if len(record.shapes) > 1:
                self._unpack(scope, node)
                continue
            if joins_bias(node) and node not in needed:
                continue
            if record.name == "runtime.update":
                buffer, value = (self.speller.value(scope, a) for a in node.args)
                scope.lines.append(f"{buffer.code} = {value.within(ATOM)}.detach()")
                continue
            inline = (
                len(node.users) == 1
                and node not in needed
                and next(iter(node.users)) in inside
                and (record.name in INLINE or scalar_infix(node))
            )
            text = self.speller.expression(scope, node)
            if inline and len(text.code) < WIDTH // 2 and not record.note.startswith(("forward", "backward")):
                scope.names[node] = text
                continue
            first = node.args[0] if node.args else None
            while isinstance(first, fx.Node) and first in inside and self._inlined(scope, first):
                first = first.args[0]
            follows = isinstance(first, fx.Node) and first in inside and first not in needed
            name = scope.follow(node, first, wanted_name(node)) if follows else scope.name(node, wanted_name(node))  # type: ignore[arg-type]
            source = record.source if record.source != last_source else ""
            last_source = record.source or last_source
            scope.lines.append(_comment(f"{name} = {text.code}", record.note, source))

    def _inlined(self, scope: Scope, node: fx.Node) -> bool:
        """Whether the node has no line of its own."""
        written = node in scope.names and scope.names[node].code not in scope.taken
        return written and len(node.users) == 1 and bool(node.args) and not scalar_infix(node)

    def _unpack(self, scope: Scope, node: fx.Node) -> None:
        """One line that names all outputs, those without use `_`."""
        text = self.speller.expression(scope, node)
        picks = {u.args[1]: u for u in node.users}
        names = []
        for index in range(len(info(node).shapes)):
            pick = picks.get(index)
            names.append(scope.name(pick, output_name(node, index)) if pick is not None else "_")
        scope.lines.append(_comment(f"{', '.join(names)} = {text.code}", "", info(node).source))

    # ---- classes -----------------------------------------------------------------------------------------

    def _weights(self, parameters: Sequence[fx.Node], scope: Scope, prefix: str, variable: str) -> list[str]:
        lines = []
        for node in parameters:
            record = info(node)
            within = bool(prefix) and re.match(rf"{re.escape(prefix)}(?!\w)", record.name) is not None
            rest = record.name.removeprefix(prefix) if within else ""
            own = (f"draws{rest}" if rest[:1] != "." else rest[1:]) if within else record.name
            attribute = re.sub(r"\W", "_", own)
            scope.names[node] = Text(f"self.{attribute}")
            shape = list(record.whole)
            placed = "".join(f', {axis}="{p}"' for axis, p in record.placed)
            quoted = (f'f"{{{variable}}}{rest}"' if rest else variable) if within else f'"{record.name}"'
            if record.kind == "stream":
                self.speller.used.add("stream")
                lines.append(f"self.{attribute} = stream(groups, {quoted})")
                continue
            kind = "weight" if record.kind == "parameter" else "buffer"
            self.speller.used.add(kind)
            dtype = "" if record.dtype == torch.float32 else f", dtype={record.dtype}"
            frozen = "" if record.grad or kind == "buffer" else ", requires_grad=False"
            lines.append(_comment(f"self.{attribute} = {kind}(groups, {quoted}, {shape}{dtype}{frozen}{placed})"))
        return lines

    def _block(self, block: Block) -> list[str]:
        scope = Scope()
        nodes = block.runs[0]
        used = dict.fromkeys(n for node in nodes for n in node.all_input_nodes)
        parameters = [n for n in used if info(n).kind in OWNED]
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
        parameters = [n for n in placeholders if n in used and info(n).kind in OWNED]
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
            attribute = plural(block.labels[0])
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
        returned = ", ".join(self.speller.value(scope, r).code for r in results)
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
        attribute = plural(block.labels[0])
        self_call = "layer"
        chained = [
            j
            for j in range(len(block.outside[0]))
            if len(block.runs) > 1
            and all(block.outside[i][j] in block.outputs[i - 1] for i in range(1, len(block.runs)))
        ]
        first = [self.speller.value(scope, n).code for n in block.outside[0]]
        same = all(
            j in chained or all(outside[j] is block.outside[0][j] for outside in block.outside)
            for j in range(len(block.outside[0]))
        )
        passed_on = all(
            set(o.users) <= set(run)
            for outputs, run in zip(block.outputs, block.runs[1:], strict=False)
            for o in outputs
        )
        if same and passed_on and len(block.outputs[0]) == 1 and len(chained) == 1:
            name = scope.name(block.outputs[-1][0], "hidden")
            arguments = [name if j in chained else f for j, f in enumerate(first)]
            if first[chained[0]] != name:
                scope.lines.append(f"{name} = {first[chained[0]]}")
            call = self._checkpointed(self_call, arguments)
            scope.lines += [f"for layer in self.{attribute}:", f"    {name} = {call}"]
            return
        for i, outputs in enumerate(block.outputs):
            arguments = [self.speller.value(scope, n).code for n in block.outside[i]]
            names = [scope.name(o, "hidden") for o in outputs]
            call = self._checkpointed(f"self.{attribute}[{i}]", arguments)
            scope.lines.append(f"{', '.join(names)} = {call}")

    def _checkpointed(self, function: str, arguments: Sequence[str]) -> str:
        if not self.recompute:
            return f"{function}({', '.join(arguments)})"
        self.speller.used.add("recomputed")
        return f"recomputed({', '.join([function, *arguments])})"

    def _valid(self, outer: Scope) -> tuple[list[str], list[str]]:
        """A method that counts the valid targets of a micro-batch."""
        if not self.stage.valid:
            return [], []
        scope = Scope(names={k: v for k, v in outer.names.items() if k.op == "placeholder"})
        inputs = [n for n in self.stage.graph.nodes if n.op == "placeholder" and info(n).kind == "input"]
        counted = {n for valid in self.stage.valid for n in _ancestors(valid.targets)}
        scope.taken |= {outer.names[n].code for n in inputs if len(counted.intersection(n.users)) > 1}
        ordered = [n for n in self.stage.graph.nodes if n in counted and n.op == "call_function"]
        self._write(scope, ordered, {valid.targets for valid in self.stage.valid})
        results = []
        for valid in self.stage.valid:
            count = f"({self.speller.value(scope, valid.targets).within(UNARY)} != {valid.ignore_index}).sum()"
            results.append(f'"{valid.loss}": (int({count}), {list(valid.axes)!r})')
        return [
            "",
            f"    def count_valid(self, {', '.join(outer.names[n].code for n in inputs)}):",
            '        """Targets that count towards each mean of a micro-batch, and the axes that split them."""',
            *_indent(scope.lines),
            f"        return {{{', '.join(results)}}}",
        ], scope.lines


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
    return plural(block.labels[0]).upper()


def _table(name: str, labels: Sequence[str]) -> list[str]:
    stem, numbers = labels[0].rpartition(".")[0], [label.rpartition(".")[2] for label in labels]
    in_row = [int(n) for n in numbers] == list(range(int(numbers[0]), int(numbers[0]) + len(numbers)))
    if in_row and all(label.rpartition(".")[0] == stem for label in labels):
        return [f'{name} = [f"{stem}.{{i}}" for i in range({numbers[0]}, {int(numbers[0]) + len(numbers)})]']
    return [f"{name} = {list(labels)!r}"]


def _argument(node: fx.Node) -> str:
    return "hidden" if info(node).grad else wanted_name(node)


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
