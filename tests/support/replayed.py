"""Collectives between ranks that run one after the other in one process."""

from collections.abc import Callable
from typing import Any

import torch

Reduction = Callable[[torch.Tensor], torch.Tensor]


def replayed(run: Callable[[int, Reduction, Reduction], Any], ranks: int, calls: int) -> list[Any]:
    """``run(rank, reduce_max, reduce_sum)`` of every rank, where each calls the two reductions in turn, `calls` times
    in all.

    A call of a reduction returns the reduction of what all ranks gave. That is known only once all ranks have run up to
    the call, so that all ranks run `calls` times more, each time with one more result to return.
    """
    results: list[torch.Tensor] = []
    for _ in range(calls):
        given = [_Recorder(results) for _ in range(ranks)]
        for rank, recorder in enumerate(given):
            run(rank, recorder.reduce, recorder.reduce)
        found = torch.stack([recorder.unanswered for recorder in given])
        results.append(found.sum(0) if len(results) % 2 else found.amax(0))
    answered = [_Recorder(results) for _ in range(ranks)]
    last = [run(rank, recorder.reduce, recorder.reduce) for rank, recorder in enumerate(answered)]
    assert all(recorder.count == calls for recorder in answered)
    return last


class _Recorder:
    """Answers the first calls by known results, and keeps what the next call was given."""

    def __init__(self, results: list[torch.Tensor]) -> None:
        self.results = results
        self.count = 0

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The known result of this call; x where it is not known."""
        self.count += 1
        if self.count <= len(self.results):
            return self.results[self.count - 1].clone()
        if self.count == len(self.results) + 1:
            self.unanswered = x.detach().clone()
        return x
