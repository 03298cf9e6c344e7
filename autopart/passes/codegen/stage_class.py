"""The class `Stage`: the values that a stage takes, computes and gives, with its blocks as lists of modules."""

from collections.abc import Mapping

from torch import fx

from autopart.ir.graph import info
from autopart.passes.codegen.block_class import in_row, write_calls
from autopart.passes.codegen.blocks import Block, BlockList, find_lists, loops
from autopart.passes.codegen.lines import indent, used_outside, write_lines
from autopart.passes.codegen.module import StageModule
from autopart.passes.codegen.naming import argument_name
from autopart.passes.codegen.scope import UNARY, Scope
from autopart.passes.codegen.weights import init_lines, weight_lines
from autopart.passes.stage_graph import OWNED
from autopart.sharding.resharding import GATHERED_AGAIN


def stage_class(module: StageModule, blocks: Mapping[int, Block]) -> list[str]:
    """The lines of the class, after the tables of its lists of blocks. `blocks`: index of a segment -> its block."""
    stage, scope = module.stage, Scope()
    weights = weight_lines(module, _own(module, blocks), scope)
    lists = find_lists(blocks, scope)
    modules = [_module_list(each) for each in lists.values()]
    arguments = [
        scope.name(n, info(n).name if info(n).kind == "input" else argument_name(n))
        for kind in ("input", "received")
        for n in stage.graph.find_nodes(op="placeholder")
        if info(n).kind == kind
    ]
    counted = _count_valid(module, scope)
    returned = _write_forward(module, scope, blocks, lists)
    again = any(info(n).name in GATHERED_AGAIN for _, nodes in stage.segments for n in nodes)
    tables = [line for each in lists.values() for line in _table(each)]
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
        *init_lines("groups: Groups", [*weights, *modules], [*scope.lines, *counted[1]], bool(stage.valid)),
        "",
        f"    def forward(self, {', '.join(arguments)}):",
        *indent(scope.lines),
        f"        return {returned}",
        *counted[0],
    ]


def _own(module: StageModule, blocks: Mapping[int, Block]) -> list[fx.Node]:
    """The weights, buffers and random streams that the stage itself reads or hands to its blocks."""
    flat = [n for i, (_, nodes) in enumerate(module.stage.segments) if i not in blocks for n in nodes]
    used = {n for node in flat for n in node.all_input_nodes}
    used |= {n for block in blocks.values() for n in block.outside}
    return [n for n in module.stage.graph.find_nodes(op="placeholder") if n in used and info(n).kind in OWNED]


def _write_forward(
    module: StageModule, scope: Scope, blocks: Mapping[int, Block], lists: Mapping[str, BlockList]
) -> str:
    """Append the lines of `forward` to the scope. Returns the expression that `forward` returns."""
    output = module.stage.graph.output_node().args[0]
    results = list(output) if isinstance(output, (list, tuple)) else [output]
    needed = {r for r in results if isinstance(r, fx.Node)}
    rows = {row[0]: row for row in loops(blocks)}
    pending: list[fx.Node] = []
    given: set[fx.Node] = set()
    for index, (_, nodes) in enumerate(module.stage.segments):
        if index not in blocks:
            pending += nodes
        elif index in rows:
            write_lines(module, scope, pending, needed | used_outside(pending))
            pending = []
            row = [blocks[i] for i in rows[index]]
            write_calls(module, scope, given, row, lists[row[0].path])
    write_lines(module, scope, pending, needed | used_outside(pending))
    return ", ".join(module.printer.value(scope, r).code for r in results)


def _count_valid(module: StageModule, outer: Scope) -> tuple[list[str], list[str]]:
    """The method that counts the valid targets of a micro-batch, and the lines of its body."""
    stage = module.stage
    if not stage.valid:
        return [], []
    scope = Scope(names={k: v for k, v in outer.names.items() if k.op == "placeholder"})
    inputs = [n for n in stage.graph.find_nodes(op="placeholder") if info(n).kind == "input"]
    counted = {n for valid in stage.valid for n in _ancestors(valid.targets)}
    for node in inputs:
        scope.holders[outer.names[node].code] = node
    ordered = [n for n in stage.graph.nodes if n in counted and n.op == "call_function"]
    write_lines(module, scope, ordered, {valid.targets for valid in stage.valid})
    results = []
    for valid in stage.valid:
        count = f"({module.printer.value(scope, valid.targets).within(UNARY)} != {valid.ignore_index}).sum()"
        results.append(f'"{valid.loss}": (int({count}), {list(valid.axes)!r})')
    return [
        "",
        f"    def count_valid(self, {', '.join(outer.names[n].code for n in inputs)}):",
        '        """Targets that count towards each mean of a micro-batch, and the axes that split them."""',
        *indent(scope.lines),
        f"        return {{{', '.join(results)}}}",
    ], scope.lines


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and all nodes that it is computed from."""
    seen, todo = {node}, [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                todo.append(source)
    return seen


def _module_list(blocks: BlockList) -> str:
    """The line of `__init__` that makes a list of blocks."""
    kinds, table = list(dict.fromkeys(block.kind for block in blocks.members)), blocks.table
    if len(kinds) == 1:
        return f"self.{blocks.attribute} = nn.ModuleList({kinds[0]}(groups, name) for name in {table})"
    return f"self.{blocks.attribute} = nn.ModuleList(kind(groups, name) for name, kind in {table}.items())"


def _table(blocks: BlockList) -> list[str]:
    """The table of a list of blocks: their paths in the model and, where there are several, their classes."""
    name, members, labels = blocks.table, blocks.members, [block.label for block in blocks.members]
    if len({block.kind for block in members}) > 1:
        return [f"{name} = {{", *(f'    "{block.label}": {block.kind},' for block in members), "}"]
    if not in_row(labels):
        return [f"{name} = {labels!r}"]
    stem, _, first = labels[0].rpartition(".")
    return [f'{name} = [f"{stem}.{{i}}" for i in range({first}, {int(first) + len(labels)})]']
