"""The statements of a model's source by file and line, read by Python's `ast`."""

import ast
import linecache
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from autopart.ir.graph import Frame


@dataclass(frozen=True)
class Statement:
    """A simple statement of a user's function.

    place      file and first line, which identify the statement
    targets    variables that are assigned: one, or those of a tuple by position ("" for what is no variable)
    reads      names in the expression that is assigned or returned
    returns    whether the statement is a `return`
    is_call    whether the expression is a single call
    """

    place: tuple[str, int]
    targets: tuple[str, ...] = ()
    reads: frozenset[str] = frozenset()
    returns: bool = False
    is_call: bool = False


def statement_of(frame: Frame) -> Statement | None:
    """The statement at a frame's line; None where the source cannot be read, or the line is a header such as `for`."""
    return _statements(frame.file).get(frame.line)


@lru_cache(maxsize=256)
def _statements(file: str) -> dict[int, Statement]:
    """Line of a file -> the simple statement that the line is part of."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return {}
    found: dict[int, Statement] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)):
            statement = _read(file, node)
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                found[line] = statement
    return found


def _read(file: str, node: ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Return | ast.Expr) -> Statement:
    value = node.value
    reads = {part.id for part in ast.walk(value) if isinstance(part, ast.Name)} if value is not None else set()
    targets: tuple[str, ...] = ()
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        targets = tuple(_variables(node.targets[0]))
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        targets = tuple(_variables(node.target))
        reads |= set(targets) if isinstance(node, ast.AugAssign) else set()
    place = file, node.lineno
    return Statement(place, targets, frozenset(reads), isinstance(node, ast.Return), isinstance(value, ast.Call))


def _variables(target: ast.expr) -> Iterator[str]:
    parts = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
    for part in parts:
        yield part.id if isinstance(part, ast.Name) else ""
