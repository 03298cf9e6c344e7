"""The most bytes of tensors that are alive at once, on any device: a dispatch mode sees them made and freed."""

from collections.abc import Iterable
from typing import Any

import torch

from autopart.frontend.torch_private import StorageWeakRef, TorchDispatchMode, tree_leaves


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made in this thread that are still alive, and their peak.

    known  tensors that were there before and count
    apart  tensors that were there before and do not count
    peak   the most bytes after any operator; may be set back to 0
    """

    def __init__(self, known: Iterable[torch.Tensor] = (), apart: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.made = {StorageWeakRef(tensor.untyped_storage()): 0 for tensor in apart}
        self.upper_bound = self.peak = 0
        self.see(list(known))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.see(out)
        return out

    def see(self, out: Any) -> None:
        """Count what is in `out`. Bytes alive are counted anew only where what was alive at the last count and what was
        made since are together above the peak."""
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = StorageWeakRef(storage)
                if key not in self.made:
                    self.made[key] = storage.nbytes()
                    self.upper_bound += storage.nbytes()
        if self.upper_bound > self.peak:
            self.peak = max(self.peak, self.alive)

    @property
    def alive(self) -> int:
        """Bytes alive now."""
        for gone in [storage for storage in self.made if storage.expired()]:
            self.upper_bound -= self.made.pop(gone)
        return self.upper_bound
