"""Weights and activations that are whole only while they are used.

Weights lie in slices over data-parallel ranks, activations in shards over tensor-parallel ranks. Both are gathered once
in forward. Where backward reads the whole, autograd saves how to gather it (a `DeferredGather`) in place of the whole.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from autopart.runtime.prefetch import Prefetch, Wanted
from autopart.runtime.process_group import Group


class DeferredGather:
    """Tensors that are gathered together.

    Backward gathers the tensors it needs when it needs the first of them, and frees each after the last of its `uses`.
    `run` gathers the tensors of the given indices.
    """

    def __init__(self, count: int, run: Callable[[Sequence[int]], Sequence[Tensor]]) -> None:
        self.run = run
        self.uses = [0] * count
        self.again: dict[int, Tensor] = {}

    def forward(self) -> Sequence[Tensor]:
        """All weights, gathered. A weak reference to memory keeps its address from being used again."""
        wholes = self.run(range(len(self.uses)))
        known = _KNOWN.get()
        if known is not None:
            known.update({StorageWeakRef(w.untyped_storage()): (self, i) for i, w in enumerate(wholes)})
        return wholes

    def whole_again(self, index: int) -> Tensor:
        """One of the tensors, whole, in backward."""
        if not self.again:
            needed = [i for i, uses in enumerate(self.uses) if uses]
            self.again = dict(zip(needed, self.run(needed), strict=True))
        self.uses[index] -= 1
        return self.again[index] if self.uses[index] else self.again.pop(index)


_KNOWN: ContextVar[dict[StorageWeakRef, tuple[DeferredGather, int]] | None] = ContextVar("known", default=None)
"""Memory of the tensors that a forward pass has gathered -> how to gather them again."""


@dataclass(frozen=True)
class _Kept:
    """Stands, until backward, for a view of a gathered tensor.

    dtype             of the view: `view_as_complex` has another than the gathered tensor
    offset            in the storage, in elements of that dtype
    is_conj, is_neg   whether the view is of the conjugates or of the negatives
    """

    gather: DeferredGather
    index: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    is_conj: bool
    is_neg: bool

    def again(self) -> Tensor:
        """The view, of the tensor gathered again."""
        whole = self.gather.whole_again(self.index)
        view = whole.new_empty(0, dtype=self.dtype)
        view.set_(whole.untyped_storage(), self.offset, self.size, self.stride)
        view = view.conj() if self.is_conj else view
        return torch._neg_view(view) if self.is_neg else view


@contextmanager
def keeping_parts() -> Iterator[None]:
    """A forward pass that keeps nothing whole of what it gathers. Blocks that are recomputed save no gathered weight
    anyway, and gather in their second run."""
    token = _KNOWN.set({})
    try:
        with saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _KNOWN.reset(token)


def _pack(saved: Tensor) -> Tensor | _Kept:
    """What autograd saves in place of a tensor. Gathered memory that nothing refers to any more is freed."""
    known = _KNOWN.get()
    if not known:
        return saved
    for gone in [memory for memory in known if memory.expired()]:
        del known[gone]
    found = known.get(StorageWeakRef(saved.untyped_storage()))
    if found is None:
        return saved
    found[0].uses[found[1]] += 1
    offset = int(saved.storage_offset())
    return _Kept(*found, saved.dtype, saved.size(), saved.stride(), offset, saved.is_conj(), saved.is_neg())


def _unpack(kept: Tensor | _Kept) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept.again()


# ---- weights in slices -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slicing:
    """What a weight in slices (`groups.weight_slice`) is a slice of: the whole's shape and dtype, and the ranks that
    have the other slices.

    prefetch  what gathers the weights (`zero.DataParallelState`); None: they are gathered when they are asked for
    send      what takes the gradients of whole weights, instead of autograd, and sums them over ranks
              (`zero.DataParallelState`)
    """

    shape: torch.Size
    dtype: torch.dtype
    group: Group
    prefetch: Prefetch | None = None
    send: Callable[[Sequence[Any], Sequence[Tensor]], None] | None = None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slicings: Sequence[Slicing], of_module: bool, *slices: Tensor) -> tuple[Tensor, ...]:
        first = ctx.slicing = slicings[0]
        ctx.slices = slices
        prefetch = first.prefetch or Prefetch(first.group, 0)

        def run(some: Sequence[int]) -> Sequence[Tensor]:
            shapes, dtypes = zip(*((slicings[i].shape, slicings[i].dtype) for i in some), strict=True)
            return prefetch.gather(Wanted([slices[i] for i in some], shapes, dtypes, of_module))

        return tuple(DeferredGather(len(slices), run).forward())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        ctx.slicing.send(ctx.slices, gradients)
        return None, None, *[None] * len(gradients)


def gathered(owner: Any) -> Any:
    """A weight that lies in slices over ranks, whole; of a module, all such weights, as attributes. Backward gathers
    it again, and reduce-scatters its gradient into the slices."""
    if isinstance(owner, nn.Module):
        slices = {n: p for n, p in owner.named_parameters(recurse=False) if hasattr(p, "slicing")}
        wholes = _Whole.apply([p.slicing for p in slices.values()], True, *slices.values())
        return SimpleNamespace(**dict(zip(slices, wholes, strict=True)))
    return _Whole.apply([owner.slicing], False, owner)[0]
