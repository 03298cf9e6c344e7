"""Weights in slices (ZeRO 3), gathered ahead: while a block computes, the weights of the next block travel.

A forward pass, and the backward of a micro-batch, gather the same weights in the same order every time. The first pass
of a kind is recorded. Later passes of the kind start each gather before the weights are asked for, one position ahead.
A position is what a module gathers together, or neighbouring weights that are gathered one by one. All ranks of the
group run the same program, and so start the same gathers in the same order.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from autopart.runtime.flat_slices import start_gather
from autopart.runtime.process_group import Group


@dataclass(frozen=True)
class Wanted:
    """Weights that are gathered together: this rank's slices, the shapes and dtypes of the whole weights, and whether
    the weights are all of a module."""

    slices: Sequence[Tensor]
    shapes: Sequence[torch.Size]
    dtypes: Sequence[torch.dtype]
    of_module: bool

    @property
    def key(self) -> tuple[int, ...]:
        """Equal for equal weights."""
        return tuple(map(id, self.slices))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole weights."""
        return sum(shape.numel() * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True))


Position = list[Wanted]
"""What a position of a pass gathers, in order."""


class Prefetch:
    """The gathers of one rank's weights over a group of ranks.

    most  the most bytes of whole weights that are gathered ahead; 0: none are
    """

    def __init__(self, group: Group, most: int) -> None:
        self.group, self.most = group, most
        self.known: dict[Hashable, list[Position]] = {}
        """Kind of pass -> its positions, recorded in the last pass that was another than the one before."""
        self.ahead: dict[tuple[int, ...], Callable[[], list[Tensor]]] = {}
        """Weights that are on their way -> what waits for them and gives them whole."""
        self.positions: list[Position] | None = None
        """Of this pass, as far as it went; None outside of passes."""
        self.expected: list[Position] = []

    @contextmanager
    def during(self, kind: Hashable) -> Iterator[None]:
        """A pass: all gathers within have the order of the last pass of this kind, or are recorded."""
        if not self.most:
            yield
            return
        self.positions, self.expected = [], self.known.get(kind, [])
        try:
            yield
            if not self.expected:
                self.known[kind] = self.positions
        finally:
            self._drop()
            self.positions, self.expected = None, []

    def gather(self, wanted: Wanted) -> list[Tensor]:
        """The whole weights. Those of the next position are on their way when this returns."""
        first = self.positions is not None and self._note(wanted)
        if self.expected and not self._is_expected(wanted):
            self._drop()
            self.expected = []  # so that this pass is recorded
        started = self.ahead.pop(wanted.key, None) or self._start(wanted)
        wholes = started()
        if first and self.expected:
            self._start_next()
        return wholes

    def _note(self, wanted: Wanted) -> bool:
        """Note a gather of this pass; whether it is the first of its position."""
        assert self.positions is not None
        last = self.positions[-1] if self.positions else []
        if last and not wanted.of_module and not last[0].of_module:
            last.append(wanted)
            return False
        self.positions.append([wanted])
        return True

    def _is_expected(self, wanted: Wanted) -> bool:
        """Whether the pass before had the gather that was noted last at the same place."""
        assert self.positions is not None
        place, index = len(self.positions) - 1, len(self.positions[-1]) - 1
        known = self.expected[place] if place < len(self.expected) else []
        return index < len(known) and known[index].key == wanted.key

    def _start_next(self) -> None:
        """Start the gathers of the next position, unless they are more than `most` bytes."""
        assert self.positions is not None
        following = self.expected[len(self.positions)] if len(self.positions) < len(self.expected) else []
        if sum(wanted.nbytes for wanted in following) <= self.most:
            for wanted in following:
                self.ahead[wanted.key] = self._start(wanted)

    def _start(self, wanted: Wanted) -> Callable[[], list[Tensor]]:
        return start_gather(wanted.slices, wanted.shapes, wanted.dtypes, self.group)

    def _drop(self) -> None:
        """Wait for what was gathered ahead and not asked for."""
        for finish in self.ahead.values():
            finish()
        self.ahead.clear()
