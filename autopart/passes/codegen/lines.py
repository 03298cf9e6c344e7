"""The lines of a function: one for each value, and a `del` for large values that backward does not read."""

import re
from collections.abc import Callable, Sequence
from functools import partial

from torch import fx

from autopart.ir.graph import info
from autopart.passes.codegen.module import StageModule
from autopart.passes.codegen.naming import output_name, same_statement, wanted_name
from autopart.passes.codegen.pieces import Piece, in_order
from autopart.passes.codegen.scope import ATOM, Expression, Scope
from autopart.passes.codegen.spelling import INLINE, is_infix, joins_bias, scalar_infix

WIDTH = 100
"""The most columns of a line without its comment."""

INLINE_WIDTH = 66
"""The most columns of an expression that may be part of another."""

COMMENT = 64
"""The column at which the comment of a shorter line begins."""


def write_lines(
    module: StageModule, scope: Scope, nodes: Sequence[fx.Node], needed: set[fx.Node], found: Sequence[Piece] = ()
) -> None:
    """Append the lines of `nodes` to the scope.

    needed  nodes whose values are used elsewhere
    found   pieces of a recomputed block that run once

    A value with a dim of samples that autograd does not save is deleted once all its uses are written, in front of the
    next line of the user's source. Other values that autograd does not save are small.
    """
    pieces = {node for piece in found for node in piece.nodes if piece.function}
    _write(module, scope, in_order(nodes, found), set(nodes), needed, pieces)


def _write(
    module: StageModule,
    scope: Scope,
    items: Sequence[fx.Node | Piece],
    inside: set[fx.Node],
    needed: set[fx.Node],
    pieces: set[fx.Node],
) -> None:
    """Append the lines of `items` to the scope. `inside`: all nodes of the function; `pieces`: nodes of pieces."""
    last_source = ""
    saved = {root for root, _ in module.stage.saved}
    alive: dict[str, fx.Node] = {}
    done: set[fx.Node] = set()
    is_dead = partial(_is_dead, done=done, needed=needed)
    for item in items:
        node = item.outputs[-1] if isinstance(item, Piece) else item
        record = info(node)
        if record.name == "autopart.getitem" and node in scope.names:
            continue
        if len(record.shapes) > 1 or (isinstance(item, Piece) and len(item.outputs) > 1):
            text = _expression(module, scope, item)
            done |= _written_with(scope, node)
            for name in _unpack(scope, item, text, is_dead):
                alive.pop(name, None)
            continue
        if joins_bias(node) and node not in needed and item is node:
            continue
        if record.name == "runtime.update":
            buffer, value = (module.printer.value(scope, a) for a in node.args)
            scope.lines.append(f"{buffer.code} = {value.within(ATOM)}.detach()")
            continue
        before = len(scope.lines)
        text = _expression(module, scope, item)
        if item is node and _goes_inline(node, inside, needed, pieces) and len(text.code) < INLINE_WIDTH:
            scope.names[node] = text
            continue
        source = record.source if record.source != last_source else ""
        last_source = record.source or last_source
        if source and (over := [n for n, value in alive.items() if done.issuperset(value.users)]):
            scope.lines.insert(before, comment(f"del {', '.join(over)}"))
            alive = {n: value for n, value in alive.items() if n not in over}
        done |= {*_written_with(scope, node), *(item.nodes if isinstance(item, Piece) else ())}
        name = scope.name(node, wanted_name(node), is_dead)
        scope.lines.append(comment(f"{name} = {text.code}", record.note, source))
        alive.pop(name, None)
        if record.batch is not None and record.root not in saved and node not in needed:
            alive[name] = node


def _expression(module: StageModule, scope: Scope, item: fx.Node | Piece) -> Expression:
    """The expression of a node, or the call that runs a piece once.

    A piece of more than one expression becomes a function, whose lines are appended to the scope.
    """
    if not isinstance(item, Piece):
        return module.printer.expression(scope, item)
    inner = Scope(dict(scope.names), dict.fromkeys(scope.holders))
    *before, last = item.nodes
    single = item.outputs == (last,)
    _write(module, inner, before if single else item.nodes, set(item.nodes), set(item.outputs), set())
    if single:
        result = module.printer.expression(inner, last).code
    else:
        result = ", ".join(inner.names[output].code for output in item.outputs)
    module.printer.used.add(item.function)
    function = f"lambda: {result}"
    if inner.lines or len(function) > WIDTH:
        function = re.sub(r"\W", "_", f"compute_{wanted_name(item.outputs[-1])}")
        inner.lines.append(comment(f"return {result}"))
        scope.lines.append("\n".join([f"def {function}():", *indent(inner.lines, 4)]))
    return Expression(f"{item.function}({', '.join([function, *_recomputed(scope, item)])})")


def _recomputed(scope: Scope, piece: Piece) -> list[str]:
    """The variables that a piece reads and that the second run of the block computes or gathers again."""
    found: dict[str, None] = {}
    for node in (n for mine in piece.nodes for n in mine.all_input_nodes if n not in piece.nodes):
        while scope.is_inline(node) and info(node).view and node.op == "call_function":
            node = node.all_input_nodes[0]
        code = scope.names[node].code if node in scope.names else ""
        if node in piece.rerun or code.startswith(("weights.", "gathered(")):
            found[code] = None
    return list(found)


def _is_dead(holder: fx.Node, done: set[fx.Node], needed: set[fx.Node]) -> bool:
    """Whether all uses of a value are written, and the value is not needed elsewhere."""
    return holder not in needed and done.issuperset(holder.users)


def _goes_inline(node: fx.Node, inside: set[fx.Node], needed: set[fx.Node], pieces: set[fx.Node]) -> bool:
    """Whether the node may be part of the line of its only user. A user in a piece that runs once takes views alone."""
    record = info(node)
    if len(node.users) != 1 or node in needed:
        return False
    (user,) = node.users
    return (
        user in inside
        and (record.name in INLINE or scalar_infix(node) or (is_infix(node) and same_statement(node, user)))
        and not record.note.startswith(("forward", "backward"))
        and (record.view or user not in pieces)
    )


def _written_with(scope: Scope, node: fx.Node) -> set[fx.Node]:
    """A written node, with the nodes that are part of its line."""
    found, todo = {node}, list(node.all_input_nodes)
    while todo:
        part = todo.pop()
        if part.op == "call_function" and (part not in scope.names or scope.is_inline(part)):
            found.add(part)
            todo += part.all_input_nodes
    return found


def _unpack(scope: Scope, item: fx.Node | Piece, text: Expression, is_dead: Callable[[fx.Node], bool]) -> list[str]:
    """Append one line that names all outputs of an operator or a piece. Returns the names; an output without a use is
    `_`."""
    if isinstance(item, Piece) and len(item.outputs) > 1:
        names = [scope.name(node, wanted_name(node), is_dead) for node in item.outputs]
        scope.lines.append(comment(f"{', '.join(names)} = {text.code}"))
        return names
    node = item.outputs[0] if isinstance(item, Piece) else item
    picks = {u.args[1]: u for u in node.users}
    names = []
    for index in range(len(info(node).shapes)):
        pick = picks.get(index)
        names.append(scope.name(pick, output_name(node, index), is_dead) if pick is not None else "_")
    scope.lines.append(comment(f"{', '.join(names)} = {text.code}", "", info(node).source))
    return names


def used_outside(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Those of `nodes` that another node uses."""
    inside = set(nodes)
    return {n for n in nodes if any(u not in inside for u in n.users)}


def comment(code: str, *notes: str) -> str:
    """The line with its notes as a comment. A long line that is one call is broken between the call's arguments."""
    text = "  ".join(n for n in notes if n)
    if len(code) <= WIDTH:
        return f"{code:<{COMMENT}}  # {text}" if text else code
    head, inner, tail = _outer_call(code)
    if not inner:
        return f"{code}  # {text}" if text else code
    note = f"  # {text}" if text else ""
    return "\n".join([f"{head}{note}", *_wrapped(inner), tail])


def _wrapped(arguments: str) -> list[str]:
    """Arguments, as indented lines of at most WIDTH columns that are broken between arguments."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(arguments):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append(arguments[start : i + 1])
            start = i + 1
    lines = [""]
    for part in (p.strip() for p in [*parts, arguments[start:]]):
        if lines[-1] and len(lines[-1]) + len(part) + 5 > WIDTH:
            lines.append("")
        lines[-1] = f"{lines[-1]} {part}".strip()
    return [f"    {line}" for line in lines]


def _outer_call(code: str) -> tuple[str, str, str]:
    """``name = f(``, the arguments, and ``)`` of a line that is one call. Of another line: the line, "" and ""."""
    start = code.find("(")
    if start < 0 or not code.endswith(")"):
        return code, "", ""
    depth = 0
    for i, c in enumerate(code[start:], start):
        depth += (c in "([") - (c in ")]")
        if depth == 0:
            return (code[: start + 1], code[start + 1 : -1], ")") if i == len(code) - 1 else (code, "", "")
    return code, "", ""


def indent(lines: Sequence[str], by: int = 8) -> list[str]:
    """The lines, `by` columns further in: 8 for the body of a method."""
    return [f"{' ' * by}{part}" for line in lines for part in line.split("\n")]
