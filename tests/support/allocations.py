"""Counts the bytes of tensors that are alive while a block of code runs, on any device."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Storages that operators make, below autograd. Those of tensors that were there before are not counted.

    now      bytes of those that are alive
    peak     the most that were alive after an operator
    largest  the most elements of one of them
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage(), 0)
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes()
                if self._see(tensor.untyped_storage(), size):
                    self.largest = max(self.largest, size // tensor.itemsize)
        self.peak = max(self.peak, self.now)
        return found

    def _see(self, storage: torch.UntypedStorage, size: int) -> bool:
        """Count `size` for a storage until it is freed; whether it is new."""
        new = id(storage) not in self._known
        if new:
            self._known.add(id(storage))
            self.now += size
            weakref.finalize(storage, self._drop, id(storage), size)
        return new

    def _drop(self, key: int, size: int) -> None:
        self._known.remove(key)
        self.now -= size
