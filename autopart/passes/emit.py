"""fx.Graph a stage -> source text: one readable Python module per stage.

Every line is one value. Views and scalars are folded into the line that uses them; what the reader should know of a
split or a collective stands behind it. Equal blocks are written once, as a class, and looped over.
"""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from autopart.ir.graph import info
from autopart.passes.codegen.blocks import Block, find_blocks, plural, segments
from autopart.passes.codegen.naming import ATOM, UNARY, Scope, Text, output_name, wanted_name
from autopart.passes.codegen.spelling import INLINE, Speller, joins_bias, scalar_infix
from autopart.passes.stage_graph import OWNED, StageGraph
from autopart.sharding.resharding import GATHERED_AGAIN

WIDTH = 100
AGAIN = {"none": "", "selective": "recomputed_selectively", "full": "recomputed"}
"""What a block is called through, so that backward computes again what it does not keep."""
WIDE = [
    "Slices are kept in a dtype wider than the one that the model computes in (used=), and the gradients there too.",
]
SLICED = [
    "Of a weight_slice a rank keeps one of dp equal parts. gathered(...) is the whole while it is used, and again in",
    "backward, which leaves to each rank the summed gradient of its part.",
]


def emit(
    stage: StageGraph,
    stages: int,
    title: str,
    mesh: str,
    recompute: Sequence[str],
    sliced: bool,
    master: str | None,
    classes: Mapping[str, str],
) -> str:
    """The source of one stage's module.

    recompute  the mode of each of the stage's runs, the setup not among them
    sliced     whether a rank holds a slice alone of every weight that dp leaves whole (ZeRO 3)
    master     the dtype of such slices, where they are kept in a wider one
    classes    the user's class of every module by its path
    """
    return _Emitter(stage, stages, title, mesh, recompute, sliced, master, classes).text()


class _Emitter:
    def __init__(
        self,
        stage: StageGraph,
        stages: int,
        title: str,
        mesh: str,
        recompute: Sequence[str],
        sliced: bool,
        master: str | None,
        classes: Mapping[str, str],
    ) -> None:
        self.stage, self.stages, self.title, self.mesh = stage, stages, title, mesh
        self.modes = ["none"] * (len(stage.segments) - len(recompute)) + list(recompute)
        self.sliced, self.master, self.classes = sliced, master, classes
        self.results: set[fx.Node] = set()
        self.speller = Speller(set(re.findall(r"(\w+)=", mesh)))

    def text(self) -> str:
        stage = self.stage
        blocks = find_blocks(stage, self.modes, self.sliced, self.classes)
        kinds: dict[str, list[Block]] = {}
        for block in blocks.values():
            kinds.setdefault(block.kind, []).append(block)
        classes = [part for alike in kinds.values() for part in ["", "", *self._block(alike)]]
        body = self._stage(blocks)
        runtime = sorted({"Groups", *self.speller.used})
        header = [
            f'"""{self.title}, stage {stage.index} of {self.stages} on {self.mesh}. Written by autopart.',
            "",
            "Placements of a weight along an axis: S0 split along dim 0; R whole, with whole gradients; C whole, with",
            "gradients that the runtime sums over the axis at the end of a step.",
            *(SLICED if "weight_slice" in runtime else []),
            *(WIDE if "weight_slice" in runtime and self.master else []),
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
        """Lines for `nodes`; `needed` are those whose values are used elsewhere. What backward does not keep is let go
        of once the user's line that used it last is done, if it is of samples: the rest is small."""
        inside = set(nodes)
        last_source = ""
        kept = {root for root, _ in self.stage.kept}
        alive: dict[str, fx.Node] = {}
        done: set[fx.Node] = set()
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
            if source and (over := [n for n, value in alive.items() if done.issuperset(value.users)]):
                scope.lines.append(_comment(f"del {', '.join(over)}"))
                alive = {n: value for n, value in alive.items() if n not in over}
            scope.lines.append(_comment(f"{name} = {text.code}", record.note, source))
            done |= self._read(scope, node)
            alive.pop(name, None)
            if record.batch is not None and record.root not in kept and node not in needed:
                alive[name] = node

    def _read(self, scope: Scope, node: fx.Node) -> set[fx.Node]:
        """A node that is written, with those that are part of its line."""
        found, todo = {node}, list(node.all_input_nodes)
        while todo:
            part = todo.pop()
            if part.op == "call_function" and (part not in scope.names or scope.names[part].code not in scope.taken):
                found.add(part)
                todo += part.all_input_nodes
        return found

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
            attribute = re.sub(r"\W|^(?=\d)", "_", own)
            scope.names[node] = Text(f"self.{attribute}")
            shape = list(record.whole)
            placed = "".join(f', {axis}="{p}"' for axis, p in record.placed)
            quoted = (f'f"{{{variable}}}{rest}"' if rest else variable) if within else f'"{record.name}"'
            if record.kind == "stream":
                self.speller.used.add("stream")
                lines.append(f"self.{attribute} = stream(groups, {quoted})")
                continue
            kind = "buffer" if record.kind == "buffer" else "weight_slice" if self._is_sliced(node) else "weight"
            self.speller.used.add(kind)
            if kind == "weight_slice":
                self.speller.used.add("gathered")
                scope.names[node] = Text(f"weights.{attribute}" if prefix else f"gathered(self.{attribute})")
            dtype = "" if record.dtype == torch.float32 else f", dtype={record.dtype}"
            if kind == "weight_slice" and self.master:
                dtype = f", dtype=torch.{self.master}, used={record.dtype}"
            frozen = "" if record.grad or kind == "buffer" else ", requires_grad=False"
            lines.append(_comment(f"self.{attribute} = {kind}(groups, {quoted}, {shape}{dtype}{frozen}{placed})"))
        return lines

    def _is_sliced(self, node: fx.Node) -> bool:
        record = info(node)
        return self.sliced and record.kind == "parameter" and record.grad and ("dp", "C") in record.placed

    def _block(self, alike: Sequence[Block]) -> list[str]:
        """The class of blocks that are the same program."""
        scope, block = Scope(), alike[0]
        used = dict.fromkeys(n for node in block.nodes for n in node.all_input_nodes)
        parameters = [n for n in used if info(n).kind in OWNED and n not in block.outside]
        weights = self._weights(parameters, scope, block.label, "name")
        arguments = []
        for outside in block.outside:
            arguments.append(scope.name(outside, _argument(outside)))
            if self._is_sliced(outside):
                self.speller.used.add("gathered")
                scope.names[outside] = Text(f"gathered({arguments[-1]})")
        if any(map(self._is_sliced, parameters)):
            scope.taken.add("weights")
            note = "forward: all-gather over dp. backward: all-gather, reduce-scatter over dp"
            scope.lines.append(_comment("weights = gathered(self)", note))
        self._write(scope, block.nodes, set(block.outputs))
        results = [scope.names[o].code for o in block.outputs]
        return [
            f"class {block.kind}(nn.Module):",
            f'    """{_names([block.label for block in alike])}"""',
            "",
            *_init("groups: Groups, name: str", weights, scope.lines),
            "",
            f"    def forward(self, {', '.join(arguments)}):",
            *_indent(scope.lines),
            f"        return {', '.join(results)}",
        ]

    def _stage(self, blocks: Mapping[int, Block]) -> list[str]:
        stage, scope = self.stage, Scope()
        flat = [n for i, (_, nodes) in enumerate(stage.segments) if i not in blocks for n in nodes]
        used = dict.fromkeys(n for node in flat for n in node.all_input_nodes)
        used |= dict.fromkeys(n for block in blocks.values() for n in block.outside)
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
        lists: dict[str, list[Block]] = {}
        for block in blocks.values():
            lists.setdefault(plural(block.label), []).append(block)
        made = [_module_list(attribute, members) for attribute, members in lists.items()]
        valid = self._valid(scope)
        rows = {row[0]: row for row in segments(stage, blocks)}
        again = any(info(n).name in GATHERED_AGAIN for _, nodes in stage.segments for n in nodes)
        pending: list[fx.Node] = []
        for index, (_, nodes) in enumerate(stage.segments):
            if index not in blocks:
                pending += nodes
            elif index in rows:
                self._write(scope, pending, needed | _used_outside(pending))
                pending = []
                row = [blocks[i] for i in rows[index]]
                self._calls(scope, row, lists[plural(row[0].label)])
        self._write(scope, pending, needed | _used_outside(pending))
        returned = ", ".join(self.speller.value(scope, r).code for r in results)
        tables = [line for attribute, members in lists.items() for line in _table(attribute.upper(), members)]
        return [
            *tables,
            *(["", ""] if tables else []),
            "class Stage(nn.Module):",
            f'    """Stage {stage.index}: {"gives what it sends" if stage.sent else "gives the loss"}."""',
            "",
            f"    inputs = {stage.inputs!r}",
            f"    received = {[c.name for c in stage.received]!r}",
            f"    sent = {[c.name for c in stage.sent]!r}",
            *(["    gathers_again = True"] if again else []),
            "",
            *_init("groups: Groups", [*weights, *made], [*scope.lines, *valid[1]], bool(stage.valid)),
            "",
            f"    def forward(self, {', '.join(arguments)}):",
            *_indent(scope.lines),
            f"        return {returned}",
            *valid[0],
        ]

    def _calls(self, scope: Scope, row: Sequence[Block], members: Sequence[Block]) -> None:
        """Calls of neighbours out of a list of modules: a loop where the output of one is the input of the next."""
        attribute, place = plural(row[0].label), members.index(row[0])
        chained = [
            j
            for j in range(len(row[0].outside))
            if all(block.outside[j] in before.outputs for before, block in itertools.pairwise(row))
        ]
        same = all(
            j in chained or all(block.outside[j] is row[0].outside[j] for block in row)
            for j in range(len(row[0].outside))
        )
        passed_on = all(
            set(output.users) <= set(block.nodes)
            for before, block in itertools.pairwise(row)
            for output in before.outputs
        )
        if len(row) > 1 and same and passed_on and len(row[0].outputs) == 1 and len(chained) == 1:
            first = [self._given(scope, n) for n in row[0].outside]
            name = self._result(scope, row[0], row[-1].outputs[0])
            if first[chained[0]] != name:
                scope.lines.append(f"{name} = {first[chained[0]]}")
            arguments = [name if j in chained else f for j, f in enumerate(first)]
            start, end = place or "", place + len(row)
            part = f"[{start}:{end if end < len(members) else ''}]" if len(row) < len(members) else ""
            call = self._call(row[0], "layer", arguments)
            scope.lines += [f"for layer in self.{attribute}{part}:", f"    {name} = {call}"]
            return
        for i, block in enumerate(row, place):
            arguments = [self._given(scope, n) for n in block.outside]
            names = [self._result(scope, block, o) for o in block.outputs]
            call = self._call(block, f"self.{attribute}[{i}]", arguments)
            scope.lines.append(f"{', '.join(names)} = {call}")

    def _given(self, scope: Scope, node: fx.Node) -> str:
        """A value as an argument of a block: of a weight in slices, the slice."""
        code = self.speller.value(scope, node).code
        return code.removeprefix("gathered(").removesuffix(")") if self._is_sliced(node) else code

    def _result(self, scope: Scope, block: Block, output: fx.Node) -> str:
        """The name of a block's result: that of what another block gave to it alone, where there is one."""
        given = [n for n in block.outside if n in self.results and set(n.users) <= set(block.nodes)]
        self.results.add(output)
        if len(block.outputs) == len(given) == 1:
            scope.names[output] = scope.names[given[0]]
            return scope.names[output].code
        return scope.name(output, "hidden")

    def _call(self, block: Block, function: str, arguments: Sequence[str]) -> str:
        again = AGAIN[block.recompute]
        if not again:
            return f"{function}({', '.join(arguments)})"
        self.speller.used.add(again)
        return f"{again}({', '.join([function, *arguments])})"

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


def _names(labels: Sequence[str]) -> str:
    """``layers.0 .. layers.5``, or ``layers.0, layers.2 .. layers.10``."""
    if _in_row(labels):
        return " .. ".join(dict.fromkeys([labels[0], labels[-1]]))
    return ", ".join(labels) if len(labels) < 3 else f"{labels[0]}, {labels[1]} .. {labels[-1]}"


def _in_row(labels: Sequence[str]) -> bool:
    """Whether these are one list's modules, one after the other."""
    stem, _, first = labels[0].rpartition(".")
    return list(labels) == [f"{stem}.{i}" for i in range(int(first), int(first) + len(labels))]


def _module_list(attribute: str, members: Sequence[Block]) -> str:
    kinds = list(dict.fromkeys(block.kind for block in members))
    if len(kinds) == 1:
        return f"self.{attribute} = nn.ModuleList({kinds[0]}(groups, name) for name in {attribute.upper()})"
    return f"self.{attribute} = nn.ModuleList(kind(groups, name) for name, kind in {attribute.upper()}.items())"


def _table(name: str, members: Sequence[Block]) -> list[str]:
    """What a list's modules are in the model: their names and, where they are of several kinds, their classes."""
    labels = [block.label for block in members]
    if len({block.kind for block in members}) > 1:
        return [f"{name} = {{", *(f'    "{block.label}": {block.kind},' for block in members), "}"]
    if not _in_row(labels):
        return [f"{name} = {labels!r}"]
    stem, _, first = labels[0].rpartition(".")
    return [f'{name} = [f"{stem}.{{i}}" for i in range({first}, {int(first) + len(labels)})]']


def _argument(node: fx.Node) -> str:
    if info(node).kind in OWNED:
        return info(node).name
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
