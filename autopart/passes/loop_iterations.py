"""The operators that an unrolled loop repeats: the scan of a state space model is a Python loop over tokens or chunks.

A trace has every iteration of such a loop. The planner decides once for all of them: the operators at the same place of
successive iterations take the same strategy.

The nodes of a segment, in order, are read as a text, whose letters are (operator, line and callers, module, dtypes,
number of dims). A loop is a run of nodes in which every letter equals the one a period later, as far as at least
MIN_ITERATIONS periods. So operators of several modules, such as blocks in a row, are not of one loop: their modules
differ. What a loop reads may differ from iteration to iteration, as may sizes and indices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import fx

from autopart.ir.graph import info

MIN_ITERATIONS = 8
"""The fewest iterations of a loop."""

MAX_REPEATS = 16
"""How many times a letter may stand in one iteration."""


def loop_iterations(nodes: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """For every operator of every loop among the nodes of one segment, in order: its nodes in all iterations."""
    letters = _letters(nodes)
    later: list[list[int]] = [[] for _ in nodes]
    """Index of a node -> the indices of the next nodes with its letter."""
    places: dict[int, list[int]] = defaultdict(list)
    for i in reversed(range(len(nodes))):
        later[i] = places[letters[i]][: -MAX_REPEATS - 1 : -1]
        places[letters[i]].append(i)
    found, start = list[list[fx.Node]](), 0
    while start < len(nodes):
        period, end = _run(letters, start, later[start])
        if period:
            found += [list(nodes[start + offset : end : period]) for offset in range(period)]
        start = end
    return found


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
