"""How many gradients are alive at once in the backward of a function: counted in a run on meta tensors."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from autopart.frontend.torch_private import StorageWeakRef, TorchDispatchMode
from autopart.ir.graph import info


def gradient_copies(node: fx.Node, freed: int) -> float:
    """Most bytes of gradients that are alive at once in a node's backward / bytes of its outputs, at least 2.

    What autograd saved in the forward is not counted: once it is freed, gradients take its place. So they do of the
    `freed` bytes of outputs, which later operators saved. The gradients of the outputs are counted. What is less than
    half of an output is not, as the gradients of weights.
    """
    arguments = tuple((info(a).shape, info(a).dtype, info(a).grad) if isinstance(a, fx.Node) else a for a in node.args)
    tensors = tuple(isinstance(a, fx.Node) for a in node.args)
    least = min(info(node).output_bytes) / 2
    return max(2.0, (_peak(node.target, arguments, tensors, least) - freed) / info(node).bytes)


@lru_cache(maxsize=256)
def _peak(function: Callable[..., Any], arguments: tuple[Any, ...], tensors: tuple[bool, ...], least: float) -> int:
    given = [_meta(*a) if tensor else a for a, tensor in zip(arguments, tensors, strict=True)]
    wanted = [a for a, tensor in zip(given, tensors, strict=True) if tensor and a.requires_grad]
    with _Alive(least) as alive:
        results = function(*given)
        start = _Start.apply(*(results if isinstance(results, (tuple, list)) else (results,)))
        del results
        saved = alive.count()
        alive.peak = 0
        torch.autograd.grad(start, wanted, allow_unused=True)
    return alive.peak - saved


def _meta(shape: tuple[int, ...], dtype: torch.dtype, grad: bool) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


class _Start(torch.autograd.Function):
    """A scalar whose backward makes the gradients of the outputs. Nothing but autograd holds them, as in training."""

    @staticmethod
    def forward(ctx: Any, *outputs: torch.Tensor) -> torch.Tensor:
        ctx.like = [(o.shape, o.dtype) for o in outputs]
        return outputs[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in ctx.like)


class _Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make and that are still alive.

    least  bytes of the smallest tensor that counts
    peak   the most bytes after any operator
    bytes  storage -> bytes, of all that was made
    """

    def __init__(self, least: float) -> None:
        super().__init__()
        self.least, self.peak = least, 0
        self.bytes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {StorageWeakRef(a.untyped_storage()) for a in args if isinstance(a, torch.Tensor)}
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, torch.Tensor):
                storage = StorageWeakRef(result.untyped_storage())
                if storage not in given and result.untyped_storage().nbytes() >= self.least:
                    self.bytes[storage] = result.untyped_storage().nbytes()
        self.peak = max(self.peak, self.count())
        return results

    def count(self) -> int:
        """Bytes of what is alive now."""
        self.bytes = {storage: size for storage, size in self.bytes.items() if not storage.expired()}
        return sum(self.bytes.values())
