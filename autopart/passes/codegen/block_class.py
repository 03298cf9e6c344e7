"""The class that equal blocks share, and the calls of its modules."""

import itertools
from collections.abc import Sequence

from torch import fx

from autopart.ir.graph import info
from autopart.passes.codegen.blocks import Block, BlockList
from autopart.passes.codegen.lines import comment, indent, write_lines
from autopart.passes.codegen.module import StageModule
from autopart.passes.codegen.naming import argument_name
from autopart.passes.codegen.pieces import find_pieces
from autopart.passes.codegen.scope import Expression, Scope
from autopart.passes.codegen.weights import init_lines, weight_lines
from autopart.passes.stage_graph import OWNED


def block_class(module: StageModule, alike: Sequence[Block]) -> list[str]:
    """The lines of the class of blocks with equal programs."""
    scope, block = Scope(), next((block for block in alike if block.cut), alike[0])
    used = dict.fromkeys(n for node in block.nodes for n in node.all_input_nodes)
    parameters = [n for n in used if info(n).kind in OWNED and n not in block.outside]
    weights = weight_lines(module, parameters, scope, block.label, "name")
    arguments = []
    for outside in block.outside:
        arguments.append(scope.name(outside, _argument(block, outside)))
        if module.is_sliced(outside):
            module.printer.used.add("gathered")
            scope.names[outside] = Expression(f"gathered({arguments[-1]})")
    if any(map(module.is_sliced, parameters)):
        scope.reserve("weights")
        note = "forward: all-gather over dp. backward: all-gather, reduce-scatter over dp"
        scope.lines.append(comment("weights = gathered(self)", note))
    write_lines(module, scope, block.nodes, set(block.outputs), find_pieces(block.nodes, block.cut, block.outputs))
    return [
        f"class {block.kind}(nn.Module):",
        f'    """{_names([block.label for block in alike])}"""',
        "",
        *init_lines("groups: Groups, name: str", weights, scope.lines),
        "",
        f"    def forward(self, {', '.join(arguments)}):",
        *indent(scope.lines),
        f"        return {', '.join(scope.names[o].code for o in block.outputs)}",
    ]


def _argument(block: Block, node: fx.Node) -> str:
    """The name of a value as a parameter of `forward`. What a row of blocks hands on is named as the result."""
    if info(node).kind in OWNED:
        return info(node).name
    like = [n for n in block.outside if info(n).grad and info(n).kind not in OWNED]
    passed = like == [node] and len(block.outputs) == 1
    return argument_name(block.outputs[0] if passed else node)


def _names(labels: Sequence[str]) -> str:
    """The labels as text: ``layers.0 .. layers.5``, or ``layers.0, layers.2 .. layers.10``."""
    if in_row(labels):
        return " .. ".join(dict.fromkeys([labels[0], labels[-1]]))
    return ", ".join(labels) if len(labels) < 3 else f"{labels[0]}, {labels[1]} .. {labels[-1]}"


def in_row(labels: Sequence[str]) -> bool:
    """Whether the labels are those of consecutive modules of one list."""
    stem, _, first = labels[0].rpartition(".")
    return list(labels) == [f"{stem}.{i}" for i in range(int(first), int(first) + len(labels))]


def write_calls(module: StageModule, scope: Scope, results: set[fx.Node], row: Sequence[Block], of: BlockList) -> None:
    """Append the calls of neighbouring blocks to the scope: a loop where each block takes the output of the one before.

    results  values that blocks gave so far; those of `row` are added
    of       the list that `row` is a part of
    """
    attribute, members, place = of.attribute, of.members, of.members.index(row[0])
    chained = _chained(row)
    if chained is not None:
        arguments = [_given(module, scope, n) for n in row[0].outside]
        name = _result(scope, results, row[0], row[-1].outputs[0])
        if arguments[chained] != name:
            scope.lines.append(f"{name} = {arguments[chained]}")
        arguments[chained] = name
        start, end = place or "", place + len(row)
        part = f"[{start}:{end if end < len(members) else ''}]" if len(row) < len(members) else ""
        call = _call(module, row[0], "layer", arguments)
        scope.lines += [f"for layer in self.{attribute}{part}:", f"    {name} = {call}"]
        return
    for i, block in enumerate(row, place):
        arguments = [_given(module, scope, n) for n in block.outside]
        names = [_result(scope, results, block, o) for o in block.outputs]
        given = f"{', '.join(names)} = " if names else ""  # a block may change buffers alone
        scope.lines.append(given + _call(module, block, f"self.{attribute}[{i}]", arguments))


def _chained(row: Sequence[Block]) -> int | None:
    """Index of the argument that each block takes from the block before; None where no loop can call the blocks.

    In a loop all other arguments are the same for all blocks, and only the next block uses a block's output.
    """
    arguments = range(len(row[0].outside))
    chained = [
        j for j in arguments if all(block.outside[j] in before.outputs for before, block in itertools.pairwise(row))
    ]
    same = all(j in chained or all(block.outside[j] is row[0].outside[j] for block in row) for j in arguments)
    passed_on = all(
        set(output.users) <= set(block.nodes) for before, block in itertools.pairwise(row) for output in before.outputs
    )
    loops = len(row) > 1 and same and passed_on and len(row[0].outputs) == 1 and len(chained) == 1
    return chained[0] if loops else None


def _given(module: StageModule, scope: Scope, node: fx.Node) -> str:
    """A value as an argument of a block's call. Of a weight in slices the argument is the slice."""
    code = module.printer.value(scope, node).code
    return code.removeprefix("gathered(").removesuffix(")") if module.is_sliced(node) else code


def _result(scope: Scope, results: set[fx.Node], block: Block, output: fx.Node) -> str:
    """The name of a block's output.

    The only output takes over the name of an argument that this block alone reads, if the argument is another block's
    output or already has the wanted name.
    """
    wanted = argument_name(output)
    given = [n for n in block.outside if n in results or (n in scope.names and scope.names[n].code == wanted)]
    given = [n for n in given if set(n.users) <= set(block.nodes)]
    results.add(output)
    if len(block.outputs) == len(given) == 1:
        scope.names[output] = scope.names[given[0]]
        return scope.names[output].code
    return scope.name(output, wanted)


def _call(module: StageModule, block: Block, function: str, arguments: Sequence[str]) -> str:
    """The call of a block, by `recomputed` where backward computes some of the block again."""
    if block.recompute == "none":
        return f"{function}({', '.join(arguments)})"
    module.printer.used.add("recomputed")
    return f"recomputed({', '.join([function, *arguments])})"
