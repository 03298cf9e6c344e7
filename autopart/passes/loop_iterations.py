"""The operators that an unrolled loop repeats: the scan of a state space model is a Python loop over tokens or chunks.

A trace has every iteration of such a loop. The planner decides once for all of them: the operators at the same place of
successive iterations take the same strategy.

The nodes of a segment, in order, are read as a text, whose letters are (operator, line and callers, module, dtypes,
number of dims). A loop is a run of nodes in which every letter equals the one a period later, as far as at least
MIN_ITERATIONS periods. So operators of several modules, such as blocks in a row, are not of one loop: their modules
differ. What a loop reads may differ from iteration to iteration, as may sizes and indices.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from autopart.frontend.short_loops import FIRST_ITERATIONS
from autopart.ir.graph import info, made_by, operands, value_of

MIN_ITERATIONS = 8
"""The fewest iterations of a loop."""

MAX_REPEATS = 16
"""How many times a letter may stand in one iteration."""


def loop_iterations(nodes: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """For every operator of every loop among the nodes of one segment, in order: its nodes in all iterations."""
    return [list(alike) for loop in _loops(nodes) for alike in zip(*loop, strict=True)]


def equal_iterations(nodes: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Node of an iteration behind the first ones of a loop -> the node of the last of these, which stands for it.

    The iterations do the same, with tensors of the same shapes from the same places: the iteration itself, the one
    before, or outside. Only numbers such as indices differ.
    """
    found: dict[fx.Node, fx.Node] = {}
    for loop in _loops(nodes):
        every = [{node.name: i for i, node in enumerate(iteration)} for iteration in loop]
        first = FIRST_ITERATIONS - 1
        does = [_does(node, every[first - 1], every[first]) for node in loop[first]]
        for before, own, iteration in zip(every[first:], every[first + 1 :], loop[first + 1 :], strict=False):
            if does != [_does(node, before, own) for node in iteration]:
                break
            found |= zip(iteration, loop[first], strict=True)
    return found


def first_same_operand(node: fx.Node) -> list[int]:
    """For every operand the index of the first operand that is the same value. Where a node stands for the iterations
    of a loop, as many operands as there are iterations are as many values."""
    values = [None if n is None else value_of(n) for n in operands(node)]
    counts, first = Counter(values), {value: i for i, value in reversed([*enumerate(values)])}
    apart = {v for v in counts if v is not None and counts[v] == info(v[0]).times > info(node).times}
    return [i if value in apart else first[value] for i, value in enumerate(values)]


def _does(node: fx.Node, before: Mapping[str, int], own: Mapping[str, int]) -> tuple[Any, ...]:
    """What a node of an iteration does, without whole numbers."""

    def place(name: str) -> Any:
        return (True, own[name]) if name in own else (False, before[name]) if name in before else name

    def token(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return place(value.name)
        if isinstance(value, (list, tuple)):
            return tuple(map(token, value))
        return int if type(value) is int else value

    record = info(node)
    memory = [(place(name), output) for name, output in map(made_by, (record.root, *record.saves))]
    about = replace(record, root="", saves=(), times=1)
    return about, token(node.args), sorted((key, token(value)) for key, value in node.kwargs.items()), memory


def _loops(nodes: Sequence[fx.Node]) -> Iterator[list[list[fx.Node]]]:
    """The whole iterations of every loop among the nodes of one segment."""
    letters = _letters(nodes)
    later: list[list[int]] = [[] for _ in nodes]
    """Index of a node -> the indices of the next nodes with its letter."""
    places: dict[int, list[int]] = defaultdict(list)
    for i in reversed(range(len(nodes))):
        later[i] = places[letters[i]][: -MAX_REPEATS - 1 : -1]
        places[letters[i]].append(i)
    start = 0
    while start < len(nodes):
        period, end = _run(letters, start, later[start])
        if period:
            yield [list(nodes[i : i + period]) for i in range(start, end, period)]
        start = end


def _letters(nodes: Sequence[fx.Node]) -> list[int]:
    numbers: dict[object, int] = {}
    found = []
    for node in nodes:
        record = info(node)
        dims = tuple(map(len, record.shapes))
        letter = record.name, record.frames, record.source, record.module, record.dtypes, dims
        found.append(numbers.setdefault(letter, len(numbers)))
    return found


def _run(letters: Sequence[int], start: int, later: Sequence[int]) -> tuple[int, int]:
    """(period, end) of the loop that begins at `start`, which ends with a whole iteration; (0, start + 1) where none
    does."""
    for again in later:
        period, end = again - start, again
        while end < len(letters) and letters[end] == letters[end - period]:
            end += 1
        iterations = (end - start) // period
        if iterations >= MIN_ITERATIONS:
            return period, start + iterations * period
    return 0, start + 1
