"""Where a forward pass asks how many blocks a list has, some of which are left out of a trace.

What a model does behind the block in the middle, it would do elsewhere in a shorter list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from torch import nn

from autopart.frontend.layer_sampling import Sample, UnlikeLayers
from autopart.frontend.short_loops import in_files_of


@contextmanager
def no_block_counts(skeleton: nn.Module, sampled: Sequence[Sample]) -> Iterator[None]:
    """Have `len` of the model's files raise UnlikeLayers for a list of `sampled`."""
    lists = {id(skeleton.get_submodule(sample.path)): sample for sample in sampled if sample.dropped}

    def length(value: object) -> int:
        if id(value) in lists:
            raise UnlikeLayers(lists[id(value)], "the forward pass asks how many blocks there are", whole=True)
        return len(value)  # type: ignore[arg-type]

    with in_files_of(skeleton, "len", length) if lists else nullcontext():
        yield
